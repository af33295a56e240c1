"""Fetch the public data that the benchmarks read, each set from the repository of those who publish it.

    python benchmarks/fetch_data.py --list      sets, licences, sources, hashes; nothing is fetched
    python benchmarks/fetch_data.py             all of them into benchmarks/.cache/data (about 100 MB)
    python benchmarks/fetch_data.py --only law  the sets whose name begins so

Two kinds of file. A published file is downloaded as it is and must have its SHA-256; a broken download is continued. A
made file is built by one of the functions below from the files of repositories at pinned commits: markup is removed,
tables become JSON lines. Git fetches those files and checks each against the commit's hash.

Whatever is written is whole or absent. fetched.json lists it with source, licence and SHA-256; a second run fetches
only what is missing or was altered.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

DATA = Path(__file__).parent / ".cache" / "data"
LIST = "fetched.json"
Convert = Callable[[str, bytes], Iterator[dict[str, Any]]]  # (path in the repository, content) -> records


class FetchError(Exception):
    """A set could not be fetched; says which file, why, and what to do."""


@dataclass(frozen=True)
class Published:
    """A file as its publisher has it. sha256: of the file written, so of the unpacked one where `path` ends in .gz."""

    repository: str  # owner/name@commit
    path: str
    sha256: str

    @property
    def source(self) -> str:
        return f"{self.repository}:{self.path}"


@dataclass(frozen=True)
class Made:
    """A file of JSON lines. sources: (owner/name@commit, patterns as in .gitignore of the files read there); their
    records in the order of their paths, up to `limit` bytes from each source."""

    convert: Convert
    sources: tuple[tuple[str, tuple[str, ...]], ...]
    limit: int = 1 << 40

    @property
    def source(self) -> str:
        return "\n".join(f"{repository}:{' '.join(patterns)}" for repository, patterns in self.sources)


@dataclass(frozen=True)
class DataSet:
    licence: str
    files: dict[str, Published | Made]


# ---- files of repositories -> records --------------------------------------------------------------------------------


def whole(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    yield {"text": data.decode("utf-8")}


def chapter(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """A chapter of Standard Ebooks: the text of its headings, paragraphs and cells. The apparatus is left out."""
    if Path(path).stem in ("titlepage", "halftitlepage", "imprint", "colophon", "uncopyright", "endnotes"):
        return
    blocks = [" ".join("".join(element.itertext()).split()) for element in ElementTree.fromstring(data).iter()
              if re.fullmatch(r"h[1-6]|p|td|th", element.tag.rpartition("}")[2])]
    yield {"text": "\n\n".join(filter(None, blocks))}


def translation(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """The translated strings of a .po file."""
    found = re.findall(r'^msgstr ((?:".*"\n?)+)', data.decode("utf-8"), re.MULTILINE)[1:]  # the first is its header
    strings = ("".join(json.loads(line) for line in one.strip().split("\n")) for one in found)
    yield {"text": "\n\n".join(filter(None, strings))}


def poems(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Twenty poems a record: titles, authors, lines."""
    def lines(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from lines(one)

    known = ("title", "rhythmic", "chapter", "section", "author", "paragraphs", "content")
    found = json.loads(data)
    found = found if isinstance(found, list) else [found]
    said = ["\n".join(lines([one.get(key) for key in known])) for one in found]
    for start in range(0, len(said), 20):
        yield {"text": "\n\n".join(said[start : start + 20])}


def items(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """A JSON list: a record an item."""
    yield from json.loads(data)


def choices(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """TAL-SCQ5K's lines."""
    for line in data.decode("utf-8").splitlines():
        one = json.loads(line.replace("$$", "$"))
        options = {option["aoVal"]: option["content"].strip() for (option,) in one["answer_option_list"]}
        yield {"problem": one["problem"].strip(), "options": options,
               "analysis": "\n".join(one["answer_analysis"]).strip(), "answer": one["answer_value"]}


def abstracts(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """PubMedQA's questions with their abstracts."""
    for one in json.loads(data).values():
        yield {"question": one["QUESTION"], "context": "\n".join(one["CONTEXTS"]), "long_answer": one["LONG_ANSWER"]}


def answers(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """MedQuAD's pairs; some have no answer."""
    for pair in ElementTree.fromstring(data).iter("QAPair"):
        question, answer = (" ".join((pair.findtext(key) or "").split()) for key in ("Question", "Answer"))
        if question and answer:
            yield {"question": question, "answer": answer}


def dialogues(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Dialogues as Taskmaster, Schema-Guided Dialogue, KdConv (whose speakers alternate) and CrossWOZ write them."""
    found = json.loads(data)
    for one in found.values() if isinstance(found, dict) else found:
        turns = next(one[key] for key in ("utterances", "turns", "messages") if key in one)
        messages: list[dict[str, str]] = []
        for n, turn in enumerate(turns):
            said = next(turn[key] for key in ("utterance", "text", "content", "message") if key in turn).strip()
            speaker = str(turn.get("speaker", turn.get("role", ("user", "assistant")[n % 2]))).lower()
            role = "assistant" if speaker in ("assistant", "system", "sys") else "user"
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + said
            else:
                messages.append({"role": role, "content": said})
        if len(messages) > 1:
            yield {"messages": messages}


# ---- what there is ---------------------------------------------------------------------------------------------------


def _books(*books: str) -> dict[str, Published | Made]:
    return {"text.jsonl": Made(chapter, tuple(
        (f"standardebooks/{book}", ("/src/epub/text/*.xhtml",)) for book in books), 1_600_000)}


def _published(repository: str, **files: tuple[str, str]) -> dict[str, Published | Made]:
    return {name: Published(repository, path, sha256) for name, (path, sha256) in files.items()}


BOOKS = "CC0 1.0 over public-domain texts (US)"
MMLU = "HaeChan0305/MLILAB-FedLLM@d92730e8bacd7b3a61e551e015e40588e10234b4"
TAL = "math-eval/TAL-SCQ5K@8a66d6e14c65ba002beda39747e6b7c43bd2d472"
TASKMASTER = "google-research-datasets/Taskmaster@d92cb6af3005f1dc09c39e75e7daf4a04905e00b"
SCHEMA_GUIDED = "google-research-datasets/dstc8-schema-guided-dialogue@e852981ae34990f4358979625854259302feaa78"
TATQA = "NExTplusplus/TAT-QA@870accc41953dcde885aabeb963d94aabdc0fbc3"

SETS: dict[str, DataSet] = {
    "text/books_en": DataSet(BOOKS, _books(
        "jane-austen_pride-and-prejudice@8ec1ca806088448201a95e277010ea160d3ebb48",
        "arthur-conan-doyle_the-adventures-of-sherlock-holmes@23b2b6e0aa1350aaccaac91e1d0fe3bb6ed4c81f",
        "herman-melville_moby-dick@f6a255003170e113bb80a33cad230154af4caef8",
        "charles-darwin_the-origin-of-species@7c13c26dbac394a5fbe31c21b0403a8688686ba3",
        "george-eliot_middlemarch@c54ac09aae18f8b480daa8326111e2693691b2ba",
        "charles-dickens_great-expectations@d386bda66efcfd71ae1fea0528f453c06b1ccbaa",
        "leo-tolstoy_war-and-peace_louise-maude_aylmer-maude@53ec5870bee8c8d0d213c090c5ff78d52f474c9d",
        "mary-shelley_frankenstein@0e54fe85d3916535d8fa9dddebee03b107fa0888")),
    "text/peps_en": DataSet("public domain or CC0 1.0, as each says", {"text.jsonl": Made(whole, (
        ("python/peps@ba4deeb7969588d937da609008d05bb83a47b1ab", ("/peps/pep-07*.rst", "/peps/pep-80*.rst")),))}),
    "text/tinyshakespeare": DataSet("public domain", _published(
        "karpathy/char-rnn@6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e", **{"input.txt": (
            "data/tinyshakespeare/input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")})),
    "chinese/d2l_zh": DataSet("Apache-2.0", {"text.jsonl": Made(whole, (
        ("d2l-ai/d2l-zh@e6b18ccea71451a55fcd861d7b96fddf2587b09a", ("/chapter_*/*.md",)),))}),
    "chinese/pydocs_zh": DataSet("CC0 1.0", {"text.jsonl": Made(translation, (
        ("python/python-docs-zh-cn@693cf6be2bc17f3d50ee21fe207c6964f3fab130",
         ("/tutorial/*.po", "/howto/*.po", "/faq/*.po", "/c-api/*.po")),), 2_200_000)}),
    "chinese/poetry_zh": DataSet("MIT over public-domain texts", {"text.jsonl": Made(poems, (
        ("chinese-poetry/chinese-poetry@99ebbef7e1345c0985c44b9fd96a3f9e776f117b",
         ("/论语/*.json", "/诗经/*.json", "/楚辞/*.json", "/宋词/ci.song.*.json")),), 2_900_000)}),
    "chinese/howtocook_zh": DataSet("Unlicense (public domain)", {"text.jsonl": Made(whole, (
        ("Anduin2017/HowToCook@cbeb536760320efe24f9a61fe354a318d5887e30", ("/dishes/**/*.md", "/tips/**/*.md")),))}),
    "code/code_python": DataSet("MIT (TheAlgorithms), BSD-3-Clause (networkx, httpx)", {"text.jsonl": Made(whole, (
        ("TheAlgorithms/Python@f5988cc09713315817df6a7e327e258013a94440", ("*.py",)),
        ("networkx/networkx@cfc6b79fc53f583aa15a79b2187ae30bd4f480ed", ("/networkx/**/*.py", "!tests/")),
        ("encode/httpx@ae1b9f66238f75ced3ced5e4485408435de10768", ("/httpx/**/*.py",))), 4_000_000)}),
    "code/code_other": DataSet("MIT; the Rust book MIT or Apache-2.0", {"text.jsonl": Made(whole, (
        ("TheAlgorithms/Java@9d05db2d14702454a418ff31158905e502df83e0", ("/src/main/**/*.java",)),
        ("TheAlgorithms/C-Plus-Plus@b9c118fb5dca86f6325e816481959e1e6c360373", ("*.cpp", "*.h")),
        ("TheAlgorithms/Rust@2c53ddfa4b43da4df34bc2f990c5e806f455cb90", ("/src/**/*.rs",)),
        ("rust-lang/book@917544888a55e4da7109bdba8c88c893c0da70f4", ("/src/*.md",))), 1_000_000)}),
    "math/math_tal": DataSet("MIT", {f"{language}_{part}.jsonl": Made(choices, ((TAL, (
        f"/{language}_single_choice_constructed_5K/{language}_single_choice_{part}_{size}.jsonl",)),))
        for language in ("ch", "en") for part, size in (("train", "3K"), ("test", "2K"))}),
    "law/laws_zh": DataSet("official texts, not protected by copyright", {"text.jsonl": Made(whole, (
        ("LawRefBook/Laws@2f4c5c23716267af9dbebbbbd6cbbf732b101981", ("*.md", "!/*.md", "!地方性法规/", "!案例/")),),
        7_000_000)}),
    "law/licences_en": DataSet("CC BY 4.0 (licensedb), CC0 1.0 (site-policy)", {
        "licences.jsonl": Made(whole, (("aboutcode-org/scancode-licensedb@053a651f5e0182bec226b90c4ad47a709da8687b",
                                        ("/docs/[a-c]*.LICENSE",)),), 1_000_000),
        "site_policy.jsonl": Made(whole, (("github/site-policy@12992597c5d9d8cfc006693c54b9609d9993bc99",
                                           ("/Policies/**/*.md",)),))}),
    "law/books_law_en": DataSet(BOOKS, _books(
        "alexander-hamilton_john-jay_james-madison_the-federalist-papers@75f7b50db76aa0f3b6114933d33fa4354034a909")),
    "law/lawbench": DataSet("Apache-2.0", {"zero_shot/all.jsonl": Made(items, (
        ("open-compass/LawBench@e30981bb3ff54c41571f222e0b23e92d27375388", ("/data/zero_shot/*.json",)),))}),
    "finance/books_finance_en": DataSet(BOOKS, _books(
        "adam-smith_the-wealth-of-nations@2b5c1ea5d6a904972dcb0bec9b89a32f0c3255c5")),
    "finance/finance_tatqa": DataSet("MIT (repository), CC BY 4.0 (paper)", {
        f"{part}.jsonl": Made(items, ((TATQA, (f"/dataset_raw/tatqa_dataset_{part}.json",)),))
        for part in ("dev", "test_gold")}),
    "medicine/medicine_medquad": DataSet("CC BY 4.0", {"qa.jsonl": Made(answers, (
        ("abachaa/MedQuAD@577bd37b96c02d1833b2c9eed2de9f96964e96cb", ("/[1-9]_*/*.xml",)),), 5_200_000)}),
    "medicine/medicine_pubmedqa": DataSet("MIT (repository); the abstracts are PubMed's", {
        "pqal.jsonl": Made(abstracts, (
            ("pubmedqa/pubmedqa@1cbae8e92f72f20c8d3747cbb3bf5bc53554d997", ("/data/ori_pqal.json",)),))}),
    "dialogue/dialogue_taskmaster": DataSet("CC BY 4.0", {
        "tm3.jsonl": Made(dialogues, ((TASKMASTER, ("/TM-3-2020/data/data_00.json",)),)),
        "tm4.jsonl": Made(dialogues, ((TASKMASTER, ("/TM-4-2024/data/*.json",)),))}),
    "dialogue/dialogue_sgd": DataSet("CC BY-SA 4.0 (share-alike)", {"train.jsonl": Made(dialogues, (
        (SCHEMA_GUIDED, ("/train/dialogues_00*.json", "/train/dialogues_01*.json")),), 2_400_000)}),
    "dialogue/dialogue_zh": DataSet("Apache-2.0", {
        "kdconv.jsonl": Made(dialogues, (("thu-coai/KdConv@653db76432de09a004ba708a68f8bbd5500e6bec",
                                          ("/data/*/dev.json", "/data/*/test.json")),)),
        "crosswoz.jsonl": Made(dialogues, (("thu-coai/CrossWOZ@df82c9fdff91b9b130f2d6b89110d3870ba6260e",
                                            ("/data/crosswoz/val.json.zip", "/data/crosswoz/test.json.zip")),))}),
    "eval/gsm8k": DataSet("MIT", _published("openai/grade-school-math@3101c7d5072418e28b9008a6636bde82a006892c", **{
        "train.jsonl": ("grade_school_math/data/train.jsonl",
                        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        "test.jsonl": ("grade_school_math/data/test.jsonl",
                       "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")})),
    "eval/mmlu": DataSet("MIT (hendrycks/test)", {f"test/{subject}_test.csv": Published(
        MMLU, f"data/mmlu/test/{subject}_test.csv", sha256) for subject, sha256 in (
            ("econometrics", "13f21181bb3a26bfd290284ab80850f9c1e1ba90f00df6f17112b8c68e934cee"),
            ("high_school_macroeconomics", "a06fba67bf6b92e5174d049fdb484df8c6e663586a910e725e195ebf43116b9c"),
            ("high_school_microeconomics", "a6acbf0d864e51540e0c219e433dc0f54a56d8a35255bf294d4de8d09b7ef00d"),
            ("professional_accounting", "728c6030e2e2e882a73305279b149b34b44c8f0203bdf6c5c75d48602bfb883a"))}),
    "eval/humaneval": DataSet("MIT", _published("openai/human-eval@6d43fb980f9fee3c892a914eda09951f772ad10d", **{
        "HumanEval.jsonl": ("data/HumanEval.jsonl.gz",
                            "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2")})),
    "eval/aqua": DataSet("Apache-2.0", _published("google-deepmind/AQuA@26b64ed1f22208c6742f47df547dfd65088ec30d", **{
        "dev.jsonl": ("dev.json", "4a52301d8a49ae0b286f8e697f9c5da1b109b247b825b47b4c6de34312dceec5")})),
    "eval/cmath": DataSet("CC BY 4.0", _published("XiaoMi/cmath@9fa13ef0b2d03f5a18c1ace7001248d3981d65ea", **{
        "cmath_dev.jsonl": ("datasets/cmath_dev.jsonl",
                            "b9c6333a31fd740e7f5b5a71022bd59e00748798a3377364346d280549b25e3b")})),
    "eval/wikitext2": DataSet("CC BY-SA 3.0 (share-alike)", _published(
        "pytorch/examples@77f55b912142e11fcfdf5b530231fb9c52f181e8", **{"wiki.test.tokens": (
            "word_language_model/data/wikitext-2/test.txt",
            "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0")})),
    "esft": DataSet("MIT", _published("deepseek-ai/ESFT@579a7711e4b332b4c57b47e378a0cf240d85caa6", **{
        "datasets/train/law.jsonl": ("datasets/train/law.jsonl",
                                     "185980f79f83a12a3bba2ec361593e46b7ba77f609092ea01820ecf0c7c932ed")})),
}


# ---- fetching --------------------------------------------------------------------------------------------------------


def download(url: str, part: Path, timeout: float = 60) -> None:
    """The content of `url` in `part`. What is there already of it is kept, where the server can continue."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            continued = answer.status == 206
            with part.open("ab" if continued else "wb") as file:
                while piece := answer.read(1 << 20):
                    file.write(piece)
            if (missing := answer.length or 0) > 0:  # what was announced and has not come
                raise FetchError(f"{url}: ended {missing:,} bytes early; run again, it continues there")
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing stands behind what we have: it is whole, or of another file
            return
        raise FetchError(f"{url}: the server answers {error.code} {error.reason}") from None
    except http.client.IncompleteRead as error:
        with part.open("ab") as file:
            file.write(error.partial)
        raise FetchError(f"{url}: ended {error.expected or 0:,} bytes early; run again, it continues there") from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise FetchError(f"{url}: not reached: {getattr(error, 'reason', error)}") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_published(file: Published, target: Path, mirror: str) -> None:
    repository, _, commit = file.repository.partition("@")
    url = f"{mirror}/{repository}/{commit}/{urllib.parse.quote(file.path)}"
    part = target.with_name(target.name + ".part")
    download(url, part)
    whole_file = part
    if file.path.endswith(".gz"):
        whole_file = target.with_name(target.name + ".unpacked")
        try:
            whole_file.write_bytes(gzip.decompress(part.read_bytes()))
        except (OSError, EOFError) as error:
            part.unlink()
            raise FetchError(f"{url}: is no whole gzip file ({error}); it was removed") from None
    if (found := sha256_of(whole_file)) != file.sha256:
        for one in {part, whole_file}:
            one.unlink()
        raise FetchError(f"{url}: SHA-256 {found}, must be {file.sha256}; it was removed")
    whole_file.replace(target)
    part.unlink(missing_ok=True)


def checked_out(repository: str, patterns: Iterable[str], folder: Path, host: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of a commit's files under the patterns, by path; a .zip gives its members."""
    name, _, commit = repository.partition("@")
    url = f"{host}/{name}"
    environment = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE")}
    environment["GIT_TERMINAL_PROMPT"] = "0"  # a repository that is gone must not ask for a password
    for command in (["init", "--quiet"], ["remote", "add", "origin", url],
                    ["fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", commit],
                    ["sparse-checkout", "set", "--no-cone", *patterns],
                    ["-c", "core.symlinks=false", "-c", "core.autocrlf=false", "checkout", "--quiet", commit]):
        try:
            done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False,
                                  env=environment)
        except FileNotFoundError:
            raise FetchError(f"{url}: needs git, which is not installed") from None
        if done.returncode:
            said = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise FetchError(f"{url}: git {command[command[0] == '-c' and 4]} of commit {commit[:12]} failed: {said}")
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != ".git")
    if not found:
        raise FetchError(f"{url}: commit {commit[:12]} has no file under {' '.join(patterns)}")
    for path in found:
        data = path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.namelist():
                    if member.endswith(".json") and not member.startswith("__MACOSX"):
                        yield member, archive.read(member)
        else:
            yield path.relative_to(folder).as_posix(), data


def fetch_made(file: Made, target: Path, host: str) -> None:
    part = target.with_name(target.name + ".part")
    with part.open("w", encoding="utf-8") as out:
        for repository, patterns in file.sources:
            written = 0
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".git-") as folder:
                for path, data in checked_out(repository, patterns, Path(folder), host):
                    try:
                        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in file.convert(path, data)]
                    except (ValueError, LookupError, RuntimeError, AttributeError, TypeError, SyntaxError) as error:
                        raise FetchError(f"{repository}: {path} is not as expected: {error!r}") from error
                    for line in lines:
                        if (written := written + len(line.encode())) > file.limit:
                            break
                        out.write(line)
    part.replace(target)


def fetch(data: Path, names: Iterable[str], mirror: str, git: str) -> list[str]:
    """Fetch these sets into `data`. Returns what went wrong; the others are there then."""
    listed = data / LIST
    done: dict[str, Any] = json.loads(listed.read_text()) if listed.is_file() else {}
    wrong = []
    for name in names:
        for inner, file in SETS[name].files.items():
            key, target = f"{name}/{inner}", data / name / inner
            known = done.get(key, {})
            expected = file.sha256 if isinstance(file, Published) else known.get("sha256")
            if known.get("source", file.source) == file.source and target.is_file() and sha256_of(target) == expected:
                print(f"{key}: there already")
            else:
                print(f"{key}: fetching", flush=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    if isinstance(file, Published):
                        fetch_published(file, target, mirror)
                    else:
                        fetch_made(file, target, git)
                except FetchError as error:
                    wrong.append(str(error))
                    print(f"  failed: {error}", flush=True)
                    continue
            done[key] = {"source": file.source, "licence": SETS[name].licence, "sha256": sha256_of(target)}
            part = listed.with_name(LIST + ".part")
            part.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(listed)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="SET", default=[""], help="sets whose names begin so, such as law")
    parser.add_argument("--list", action="store_true", help="print sets, licences, sources and hashes; fetch nothing")
    parser.add_argument("--mirror", default="https://raw.githubusercontent.com", help="where published files are "
                        "(default: %(default)s)")
    parser.add_argument("--git", default="https://github.com", help="where repositories are (default: %(default)s)")
    args = parser.parse_args(arguments)
    if unknown := [only for only in args.only if not any(name.startswith(only) for name in SETS)]:
        parser.error(f"--only {' '.join(unknown)}: no such set; --list names them")
    names = [name for name in SETS if name.startswith(tuple(args.only))]
    if args.list:
        for name in names:
            print(f"{name}: {SETS[name].licence}")
            for inner, file in SETS[name].files.items():
                print(f"  {inner}")
                print(*(f"    {line}" for line in file.source.split("\n")), sep="\n")
                if isinstance(file, Published):
                    print(f"    SHA-256 {file.sha256}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    wrong = fetch(args.out, names, args.mirror.rstrip("/"), args.git.rstrip("/"))
    if wrong:
        print(f"{len(wrong)} files are missing:", *wrong, sep="\n  ", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
