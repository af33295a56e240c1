"""Knowledge bases: which passages are found, and how long it takes to index 100,000 of them and to ask.

Questions that others wrote, none of them a copy of a passage:

    clauses    LawBench 1-1, "what does clause N of law X say", on the laws of laws_zh; the clause is the answer
    scenarios  LawBench 3-2, a situation in plain words; the clauses that say what its reference answer says
    pages      MedQuAD's questions on its answers, put together again as the pages that they come from: the subject as
               the title, and the kind of each answer (Overview, Symptoms, Prognosis, …) as its heading
    bare       the same without headings of kinds

The three first sets together are `all`; `bare` shows what headings are worth.

Laws are revised, and the numbers that LawBench's answers give are often those of another revision, or of another clause
altogether. So a question of `clauses` counts where the clause of that number says what the reference answer says. For
`scenarios` the number does not count: right is every clause that has at least 0.9 of the share of the answer's pairs of
characters (by inverse frequency, from behind the number) that the best one has, and a question counts where that best
share is at least 0.3 and one such clause is of the law that the answer names.

A passage is right if it is part of a right clause or answer. All weights in retrieval.py and knowledge.py were chosen
on every second question; the figures are of the others.

Time: the files of several sets, cut into passages of 500 characters, until there are 100,000. Nothing is read from a
cache of ours. One thread.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from deepseek import KnowledgeBase
from deepseek.route.documents import parse
from deepseek.route.knowledge import Mode
from deepseek.route.passages import passages
from deepseek.route.terms import clauses, terms
from fetch_data import DATA
from harness import arguments, machine, table, versions, write_result

LAWS, LAWBENCH, MEDQUAD = "law/laws_zh/text.jsonl", "law/lawbench/zero_shot", "medicine/medicine_medquad/qa.jsonl"
MORE = ("text/books_en/text.jsonl", "text/peps_en/text.jsonl", "chinese/d2l_zh/text.jsonl",
        "chinese/poetry_zh/text.jsonl", "code/code_python/text.jsonl", "code/code_other/text.jsonl",
        "law/licences_en/licences.jsonl", "law/books_law_en/text.jsonl", "finance/books_finance_en/text.jsonl",
        "chinese/howtocook_zh/text.jsonl", "medicine/medicine_pubmedqa/pqal.jsonl")
KINDS = {"What is (are)": "Overview", "treatments for": "Treatment", "symptoms of": "Symptoms",
         "How to diagnose": "Diagnosis", "at risk for": "Risk factors", "What causes": "Causes",
         "outlook for": "Prognosis", "stages of": "Stages", "research (or": "Research", "How to prevent": "Prevention",
         "How many people": "Frequency", "inherited": "Inheritance", "complications": "Complications",
         "genetic changes": "Genetics", "support": "Support", "What to do": "Living with it"}
_CLAUSE = re.compile("第[零〇一二两三四五六七八九十百千0-9]+条")


class Place(NamedTuple):
    """A part of a file that answers a question."""

    file: str
    start: int
    end: int


Questions = list[tuple[str, list[Place]]]


def records(path: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def write_laws(data: Path, folder: Path) -> dict[str, str]:
    """File -> text, a file a law."""
    folder.mkdir(parents=True)
    out = {}
    for i, record in enumerate(records(data / LAWS)):
        file = folder / f"{i:03}.md"
        file.write_text(record["text"], encoding="utf-8")
        out[str(file)] = record["text"]
    return out


def law_questions(data: Path, laws: dict[str, str]) -> tuple[dict[str, Questions], int]:
    """({set: its questions}, how many were left out)."""
    titles = {file: re.sub("中华人民共和国", "", "".join(re.findall("^# (.*)$", text, re.MULTILINE))).strip()
              for file, text in laws.items()}
    places: dict[tuple[str, str], Place] = {}
    for file, text in laws.items():
        for cut in passages(parse(text.encode(), "markdown", file), 1000):
            if cut.section and _CLAUSE.fullmatch(cut.section[-1]):
                name, = clauses(terms(cut.section[-1]))
                first = places.get((file, name))
                places[file, name] = Place(file, first.start if first else cut.start, cut.end)
    statements = Statements([(place, laws[place.file][place.start : place.end]) for place in places.values()])
    found: dict[str, Questions] = {"clauses": [], "scenarios": []}
    left_out = 0
    for record in records(data / LAWBENCH):
        kind = {"回答以下问题，只需直接给出法条内容": "clauses", "请根据具体场景与问题给出法律依据": "scenarios"}.get(
            re.split("[:，]只需要|[:：]", record["instruction"])[0].removesuffix("，"))
        if kind is None:
            continue
        named = record["question"] if kind == "clauses" else record["answer"]
        clause = _CLAUSE.search(named)
        before = named[: clause.start()] if clause else named[:40]
        files = [file for file, title in titles.items() if title and title in before]
        longest = max((len(titles[file]) for file in files), default=0)
        files = [file for file in files if len(titles[file]) == longest]
        right: list[Place] = []
        if kind == "scenarios" and files:
            right = statements.saying(record["answer"][clause.end() if clause else 0 :])
        elif clause:
            known = (places.get((file, clauses(terms(clause[0]))[0])) for file in files)
            right = [place for place in known
                     if place and alike(laws[place.file][place.start : place.end], record["answer"]) >= 0.8][:1]
        if any(place.file in files for place in right):
            found[kind].append((record["question"].removeprefix("场景:"), right))
        else:
            left_out += 1
    return found, left_out


def pairs(text: str) -> set[str]:
    """Pairs of neighbouring characters."""
    text = re.sub(r"\W", "", text)
    return {text[i : i + 2] for i in range(len(text) - 1)}


def alike(one: str, other: str) -> float:
    """Pairs of characters that two texts share, as a share of the shorter one's."""
    a, b = pairs(one), pairs(other)
    return len(a & b) / max(1, min(len(a), len(b)))


class Statements:
    """Texts at places, and those that say what another text says."""

    def __init__(self, texts: list[tuple[Place, str]]) -> None:
        self.places = [place for place, _ in texts]
        self.having: dict[str, list[int]] = {}
        for i, (_, text) in enumerate(texts):
            for pair in pairs(text):
                self.having.setdefault(pair, []).append(i)

    def saying(self, text: str) -> list[Place]:
        """Those with at least 0.9 of the share of the text's pairs that the best one has, if that is at least 0.3.
        A pair counts by its inverse frequency."""
        shares, total = np.zeros(len(self.places)), 1e-9
        for pair in pairs(text):
            having = self.having.get(pair, [])
            weight = np.log(1 + len(self.places) / max(len(having), 1))
            shares[having] += weight
            total += weight
        best = shares.max() / total
        return [self.places[i] for i in np.flatnonzero(shares / total >= 0.9 * best)] if best >= 0.3 else []


def write_pages(data: Path, folder: Path, headings: bool) -> tuple[list[Path], Questions]:
    """A file a page of MedQuAD, and its questions."""
    folder.mkdir(parents=True)
    pages: dict[str, list[dict[str, Any]]] = {}
    for record in records(data / MEDQUAD):
        pages.setdefault(record["path"], []).append(record)
    questions: dict[str, list[Place]] = {}
    for i, answers in enumerate(pages.values()):
        file, text = folder / f"{i:04}.md", f"# {answers[0]['focus']}\n\n"
        for answer in answers:
            if headings:
                text += f"## {next(kind for said, kind in KINDS.items() if said in answer['question'])}\n\n"
            start = len(text)
            text += answer["answer"].strip().replace("\r", "\n") + "\n\n"
            questions.setdefault(answer["question"], []).append(Place(str(file), start, len(text)))
        file.write_text(text, encoding="utf-8")
    return sorted(folder.iterdir()), list(questions.items())


def found_share(base: KnowledgeBase, questions: Questions, mode: Mode) -> list[float]:
    """Share of the questions with a right passage among the first 1, 3 and 10."""
    hits = np.zeros(3)
    for question, right in questions:
        got = base.search(question, 10, mode=mode)
        first = next((rank for rank, one in enumerate(got) if any(
            one.file == place.file and one.start < place.end and one.end > place.start for place in right)), 99)
        hits += [first < most for most in (1, 3, 10)]
    return (hits / len(questions)).tolist()


def many_files(data: Path, folder: Path, most: int, size: int) -> list[Path]:
    """Files that make `most` passages, or all there are."""
    folder.mkdir(parents=True)
    files, count = list[Path](), 0
    for source in (LAWS, MEDQUAD, *MORE):
        for record in records(data / source):
            text = record.get("text") or "\n\n".join(str(value) for value in record.values() if isinstance(value, str))
            if count >= most:
                return files
            count += sum(1 for _ in passages(parse(text.encode(), "markdown", source), size))
            files.append(folder / f"{len(files):05}.md")
            files[-1].write_text(text, encoding="utf-8")
    return files


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that fetch_data.py filled")
    parser.add_argument("--work", type=Path, default=Path("runs/knowledge"), help="folder of the files and bases")
    parser.add_argument("--passages", type=int, default=100_000, help="of the base that is timed")
    parser.add_argument("--only", choices=("recall", "speed"))
    args = parser.parse_args()
    for place in (LAWS, LAWBENCH, MEDQUAD):
        if not (args.data / place).exists():
            raise SystemExit(f"{args.data / place}: no such file; `python benchmarks/fetch_data.py` fetches it")
    shutil.rmtree(args.work, ignore_errors=True)
    result: dict[str, Any] = {"machine": machine(1), "versions": versions("numpy", "threadpoolctl")}
    lines = ["# Knowledge bases", ""]
    if args.only != "speed":
        lines += recall(args, result)
    if args.only != "recall":
        lines += speed(args, result)
    lines += [f"{result['machine']['cpu']}; one thread; numpy {result['versions']['numpy']}."]
    name = f"knowledge-{args.only}" if args.only else "knowledge"
    write_result(name, "\n".join(lines), result, keep=args.passages == 100_000)


def recall(args: Any, result: dict[str, Any]) -> list[str]:
    laws = write_laws(args.data, args.work / "laws")
    sets, left_out = law_questions(args.data, laws)
    law = KnowledgeBase(args.work / "laws.knowledge")
    law.add(laws)
    tried = [(name, law, questions) for name, questions in sets.items()]
    for name, headings in (("pages", True), ("bare", False)):
        files, questions = write_pages(args.data, args.work / name, headings)
        base = KnowledgeBase(args.work / f"{name}.knowledge")
        base.add(files)
        tried.append((name, base, questions))
    rows = [["questions", "of them asked", "passages", *(f"{mode}, first 3 (first)" for mode in get_args(Mode))]]
    found: dict[str, dict[str, Any]] = {}
    for name, base, questions in tried:
        asked = questions[1::2]
        found[name] = {"questions": len(asked), "of": len(questions), "passages": sum(f.passages for f in base.files()),
                       "at 1, 3, 10": {mode: found_share(base, asked, mode) for mode in get_args(Mode)}}
        print(name, found[name], flush=True)
    parts = [found[name] for name in ("clauses", "scenarios", "pages")]
    found["all"] = {key: sum(part[key] for part in parts) for key in ("questions", "of")} | {
        "passages": found["clauses"]["passages"] + found["pages"]["passages"],
        "at 1, 3, 10": {mode: np.average([part["at 1, 3, 10"][mode] for part in parts], axis=0, weights=[
            part["questions"] for part in parts]).tolist() for mode in get_args(Mode)}}
    rows += [[name, f"{one['questions']:,} of {one['of']:,}", f"{one['passages']:,}",
              *(f"{100 * three:.1f} % ({100 * first:.1f})" for first, three, _ in one["at 1, 3, 10"].values())]
             for name, one in found.items()]
    result["recall"] = found
    result["left out"] = left_out
    return ["Share of the questions with a right passage among the first three (in first place):", "", table(rows), "",
            f"`all`: the three first sets. {left_out} questions of LawBench are left out: the base has not the law, or "
            "no clause of it says what the answer says.", ""]


def speed(args: Any, result: dict[str, Any]) -> list[str]:
    files = many_files(args.data, args.work / "many", args.passages, 500)
    base = KnowledgeBase(args.work / "many.knowledge", passage_size=500)
    rows = [["step", "seconds", "of processor time"]]

    def timed(name: str, run: Callable[[], Any]) -> Any:
        clock, began = time.process_time(), time.perf_counter()
        done = run()
        took, computed = time.perf_counter() - began, time.process_time() - clock
        result.setdefault("speed", {})[name] = {"seconds": took, "processor": computed}
        rows.append([name, f"{took:.2f}", f"{computed:.2f}"])
        return done

    timed("indexing", lambda: base.add(files))
    files[0].write_text(files[0].read_text(encoding="utf-8") + "\n\nOne more paragraph.\n", encoding="utf-8")
    assert timed("adding again, one file has changed", lambda: base.add(files)).changed == 1
    count, size = sum(file.passages for file in base.files()), base.path.stat().st_size
    sets, _ = law_questions(args.data, {str(file): file.read_text(encoding="utf-8") for file in files[:324]})
    asked = [question for questions in sets.values() for question, _ in questions][::4]
    asked += [record["question"] for record in records(args.data / MEDQUAD)][::15]
    base = KnowledgeBase(base.path)
    timed("opening, and the first query", lambda: base.search(asked[0]))
    times = []
    for question in asked:
        clock, began = time.process_time(), time.perf_counter()
        base.search(question)
        times.append((1000 * (time.perf_counter() - began), 1000 * (time.process_time() - clock)))
    for name, share in (("a query, median (ms)", 0.5), ("a query, 95th percentile (ms)", 0.95)):
        took, computed = (float(value) for value in np.quantile(times, share, axis=0))
        result["speed"][name] = {"took": took, "processor": computed}
        rows.append([name, f"{took:.1f}", f"{computed:.1f}"])
    result["speed"] |= {"passages": count, "files": len(files), "bytes": size, "queries": len(asked)}
    return [f"{count:,} passages of at most 500 characters in {len(files):,} files, {size / 1e6:.0f} MB on disk; "
            f"{len(asked)} queries:", "", table(rows), ""]


if __name__ == "__main__":
    main()
