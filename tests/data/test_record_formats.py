"""Where the answer begins, what a map says, and that every file of the real sets is understood."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest
import zstandard

from deepseek.data import Document, ReadReport, RecordMap, list_files, read_documents
from deepseek.errors import ConfigError, DataError, NotFoundError
from tests.helpers import PUBLISHED
from tests.helpers.jsonl import write_jsonl


def read(*paths: Any, mapping: RecordMap | None = None) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(read_documents(paths, report, mapping)), report


# ---- records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "asked", "answer"), [
    ({"question": "几个？", "answer": "三个"}, "几个？\n", "三个"),
    ({"instruction": "I", "input": "in", "output": "out"}, "I\nin\n", "out"),
    ({"problem": "P", "options": {"A": "1"}, "analysis": "R", "answer": "A"}, "P\nA. 1\n", "R\nA"),
    ({"prompt": "def f():\n", "canonical_solution": "    return 1\n"}, "def f():\n", "    return 1\n"),
    ({"text": "Write add.", "code": "def add(): ..."}, "Write add.\n", "def add(): ..."),
    ({"question": "Q", "choices": ["no", "yes"], "answer": 1}, "Q\nA. no\nB. yes\n", "B"),
])
def test_the_answer_begins_where_the_prompt_ends(record: Any, asked: str, answer: str, tmp_path: Path) -> None:
    [document], _ = read(write_jsonl(tmp_path / "a.jsonl", [record]))
    assert document.response_start == len(asked)
    assert (document.text[: document.response_start], document.text[document.response_start :]) == (asked, answer)


@pytest.mark.parametrize("record", [
    {"text": "plain"}, "bare", {"messages": ["hi", "you"]}, {"questions": [{"question": "Q", "answer": "A"}]}])
def test_what_has_no_single_answer_has_no_place_for_it(record: Any, tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", [record]))[0][0].response_start is None


def test_metadata_and_expert_are_kept(tmp_path: Path) -> None:
    about = {"complexity": "中级", "language": "Python", "error_type": ["边界条件", "递归深度"]}
    path = write_jsonl(tmp_path / "a.jsonl", [
        {"input": "i", "output": "o", "metadata": about, "expert": "code_expert"},
        {"text": "t", "lang": "en", "complexity": "easy"}, {"text": "t", "expert": 3}])
    (one, two), report = read(path)
    assert (one.metadata, one.expert, one.text, one.response_start) == (about, "code_expert", "i\no", 2)
    assert (two.metadata, two.expert) == ({"complexity": "easy", "language": "en"}, None)
    assert "expert = 3: must be a name" in report.problems[0].detail
    named = list(read_documents({"law_expert": [path], "": [path]}, ReadReport()))
    assert [d.expert for d in named] == ["law_expert", "law_expert", "code_expert", None], "the caller knows best"


# ---- tables -----------------------------------------------------------------------------------------------------


def test_csv_with_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["question", "choice0", "choice1", "answer"], ["One, \"or\"\ntwo?", "1", "2", "1"],
                          ["short", "row"], ["Last?", "x", "y", "0"]])
    documents, report = read(path)
    assert [(d.text, d.line) for d in documents] == [
        ("One, \"or\"\ntwo?\nA. 1\nB. 2\nB", 2), ("Last?\nA. x\nB. y\nA", 5)]
    assert [str(p) for p in report.problems] == [f"{path}:4: unusable record: 2 columns, must be 4"]


def test_csv_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "mmlu.csv").write_text("1+1?,1,2,3,4,B\n2+2?,1,2,3,4,D\n")
    documents, _ = read(tmp_path / "mmlu.csv")
    assert documents[1].text == "2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nD"
    (tmp_path / "b.tsv").write_text("7\tasked\tsaid\n8\tand\tso\n")
    with pytest.raises(DataError, match=r"b\.tsv: unusable table: no column is known; .* is 7, asked, said"):
        read(tmp_path / "b.tsv")
    mapping = RecordMap.from_dict({"prompt": 1, "answer": 2, "metadata": {"id": 0}})
    documents, _ = read(tmp_path / "b.tsv", mapping=mapping)
    assert [(d.text, d.response_start, d.metadata) for d in documents] == [
        ("asked\nsaid", 6, {"id": "7"}), ("and\nso", 4, {"id": "8"})]


def test_damaged_tables_say_where(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\ngood\n\xff\xfe\nafter\n")
    (tmp_path / "b.csv").write_text('text\ngood\n"open quote\n')
    documents, report = read(tmp_path)
    assert report.counts == {"not UTF-8": 1, "not CSV": 1}
    assert {d.text for d in documents} <= {"good"}, "nothing of what follows the damage"


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polars as pl

    from deepseek.data import reader

    monkeypatch.setattr(reader, "ROWS", 2)
    pl.DataFrame({"question": ["a", "b", None], "answer": ["1", "2", "3"], "expert": [None, "x", None]}).write_parquet(
        tmp_path / "a.parquet")
    documents, report = read(tmp_path)
    assert [(d.text, d.line, d.expert) for d in documents] == [("a\n1", 1, None), ("b\n2", 2, "x")]
    assert [(p.line, p.reason) for p in report.problems] == [(3, "unusable record")]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet: unreadable"):
        read(tmp_path / "a.parquet")


def test_a_tokenizer_learns_from_parquet_without_waiting_for_itself(tmp_path: Path) -> None:
    """Both libraries have a rayon pool; see records.collect."""
    import polars as pl

    from deepseek.tokenizer import Tokenizer

    for i in range(6):
        table = pl.DataFrame({"text": [f"some words {i} {j} " * 20 for j in range(300)]})
        table.write_parquet(tmp_path / f"{i}.parquet")
    assert Tokenizer.train((d.text for d in read_documents([tmp_path], ReadReport())), 300).vocab_size == 300


def test_zst(tmp_path: Path) -> None:
    lines = b'{"text": "x"}\n{"text": "y"}\n'
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(lines[:14]) + pack(lines[14:]))
    (tmp_path / "b.zst").write_bytes(b"not zstandard")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"text\nz\n"))
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == ["x", "y", "z"]
    assert [(Path(p.source).name, p.reason) for p in report.problems] == [("b.zst", "unreadable")]


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path / "*.txt")[0]] == ["a.txt", "b.txt"]
    assert [p.name for p in list_files([f"{tmp_path}/**/*.txt"])] == ["a.txt", "b.txt", "c.txt"]
    with pytest.raises(NotFoundError, match=r"\*\.rst: matches no file"):
        read(tmp_path / "*.rst")


def test_data_sets_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the datasets extra")
    rows = datasets.Dataset.from_list([{"question": "Q", "answer": "A"}, {"question": "R", "answer": "B"}])
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "set"))
    assert [d.text for d in read(f"hf:{tmp_path / 'set'}")[0]] == ["Q\nA", "R\nB"]
    [one], _ = read(f"hf:{tmp_path / 'set'}:test")
    assert (one.text, one.response_start, one.line) == ("R\nB", 2, 1)
    files = list(list_files([f"hf:{tmp_path / 'set'}"]))
    assert files and all(file.is_file() for file in files)
    with pytest.raises(DataError, match="split = 'dev': must be one of train, test"):
        read(f"hf:{tmp_path / 'set'}:dev")


def test_without_the_datasets_library_a_hub_id_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"hf:owner/name: needs the datasets library: .*'moe-dr\[datasets\]'"):
        read("hf:owner/name")


# ---- maps -------------------------------------------------------------------------------------------------------


def test_a_map_says_which_column_is_what(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(
        "prompt: [title, body.text]\nanswer: verdict\nexpert: kind\nmetadata: {grade: level}\n")
    mapping = RecordMap.load(tmp_path / "map.yaml")
    path = write_jsonl(tmp_path / "a.jsonl", [
        {"title": "T", "body": {"text": "B"}, "verdict": "V", "kind": "law_expert", "level": 3},
        {"title": "T", "body": {}, "verdict": "V", "kind": None, "level": 3}])
    [document], report = read(path, mapping=mapping)
    assert (document.text, document.response_start, document.expert, document.metadata) == (
        "T\nB\nV", 4, "law_expert", {"grade": 3})
    assert report.problems[0].detail == "there is no column 'body.text'"
    said = RecordMap.from_dict({"messages": "log"})
    [talk], _ = read(write_jsonl(tmp_path / "b.jsonl", [{"log": [{"role": "user", "content": "hi"}]}]), mapping=said)
    assert talk.turns == (("user", "hi"),)


@pytest.mark.parametrize(("keys", "message"), [
    ({"txt": "a"}, "map: unknown key 'txt': the keys are text, prompt, answer, messages, system,"),
    ({"text": "a", "prompt": "b", "answer": "c"}, "one of text, messages, or prompt with answer; it has text, prompt"),
    ({"prompt": "b"}, "it has prompt"),
    ({"answer": "b"}, "it has answer"),
    ({"text": []}, r"text = \[\]: must be a column"),
    ({"text": True}, "text = True: must be a column"),
    ({"text": "a", "header": 1}, "header = 1: must be true or false"),
    ({"text": "a", "metadata": 4}, "metadata = 4: must be"),
    (["text"], "not a mapping"),
])
def test_a_map_that_says_nothing_is_refused(keys: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecordMap.from_dict(keys)


def test_bad_yaml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("text: [")
    with pytest.raises(ConfigError, match=r"m\.yaml: not YAML"):
        RecordMap.load(tmp_path / "m.yaml")
    with pytest.raises(NotFoundError, match="no such file"):
        RecordMap.load(tmp_path / "none.yaml")


# ---- the real sets ----------------------------------------------------------------------------------------------

NO_RECORDS = {  # files that hold no records
    "medicine/medicine_pubmedqa/test_ground_truth.json",  # {id: answer}: the key to the questions
}
DAMAGED = {  # what is wrong in the sets themselves: (problems, reason)
    "law/lawbench/zero_shot/2-6.jsonl": {"unusable record": 11},  # an empty answer
    "medicine/medicine_pubmedqa/pqal.jsonl": {"not JSON": 2},  # a line break inside a string tears one record in two
}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs ../shared/data")
def test_every_file_of_the_real_sets_is_understood() -> None:
    seen, found = 0, {}
    for path in sorted(PUBLISHED.rglob("*")):
        name = path.relative_to(PUBLISHED).as_posix()
        if path.suffix not in (".jsonl", ".csv", ".json") or name.startswith(("esft/results", "tokenizer")):
            continue
        if name in NO_RECORDS:
            continue
        documents, report = read(path)
        seen += len(documents)
        if report.problems:
            found[name] = dict(report.counts)
    assert found == DAMAGED
    assert seen > 75_000
