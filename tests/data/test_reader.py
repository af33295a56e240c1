"""Every shape of record that real sets have is read; whatever is not read is reported by file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from deepseek.data import Document, ReadReport, list_files, read_documents
from deepseek.data import reader as module
from deepseek.errors import DataError, NotFoundError
from tests.helpers.jsonl import write_jsonl


def read(*paths: Path, strict: bool = False) -> tuple[list[Document], ReadReport]:
    report = ReadReport(strict=strict)
    return list(read_documents(paths, report)), report


# ---- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "text"), [
    ({"text": " kept as it is\n", "lang": "en"}, " kept as it is\n"),
    ("a bare string", "a bare string"),
    ({"text": "Write add.", "code": "def add(): ...\r\n", "test_list": []}, "Write add.\ndef add(): ...\r\n"),
    ({"question": "几个？", "answer": "三个"}, "几个？\n三个"),
    ({"instruction": "回答:", "question": "Q", "answer": "A"}, "回答:\nQ\nA"),
    ({"problem": "1+1", "options": {"A": "1", "B": "2"}, "analysis": "two", "answer": "B"}, "1+1\nA. 1\nB. 2\ntwo\nB"),
    ({"question": "Q", "options": ["A)1", "B)2"], "rationale": "R", "correct": "B"}, "Q\nA)1\nB)2\nR\nB"),
    ({"problem": "P", "solution": "S"}, "P\nS"),
    ({"input": "in", "output": "out", "metadata": {"language": "Python"}}, "in\nout"),
    ({"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "x"}, "def f():\n    return 1\n"),
    ({"prompt": "P", "completion": "C"}, "P\nC"),
    ({"prompt": "P", "answers": ["one", "two"]}, "P\none\ntwo"),
    ({"instruction": "I", "input": "", "output": "O"}, "I\nO"),
    ({"ID": "1", "Body": "Two.", "Question": "How many?", "Answer": 2.0}, "Two.\nHow many?\n2.0"),
    ({"en": "house", "zh": "房子"}, "house\n房子"),
])
def test_records_are_recognised_by_their_keys(record: Any, text: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    documents, report = read(path)
    [document] = documents
    assert (document.text, document.source, document.line, document.turns) == (text, str(path), 1, ())
    assert not report.problems


@pytest.mark.parametrize("conversation", [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}],
    [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "你好"}],
    ["hi", "你好"],
])
@pytest.mark.parametrize("key", ["messages", "conversations", None])
def test_conversations(conversation: list[Any], key: str | None, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{key: conversation, "id": 7} if key else conversation])
    turns = (("user", "hi"), ("assistant", "你好"))
    assert read(path)[0] == [Document("User: hi\n\nAssistant: 你好", str(path), 1, turns)]


def test_instances_become_a_document_each(tmp_path: Path) -> None:
    record = {"instruction": "I", "instances": [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]}
    assert [d.text for d in read(write_jsonl(tmp_path / "a.jsonl", [record]))[0]] == ["I\na\nb", "I\nc"]


@pytest.mark.parametrize(("record", "reason"), [
    ({"table": 1, "id": 2}, "no filled question and answer, under a known key; it has id, table"),
    ({"question": "Q", "answer": ""}, "it has answer, question"),
    ({"text": " \n"}, "the text is empty"),
    ({"text": "\ud800"}, "a lone surrogate"),
    (17, "must be an object, a list of turns or a string, got int"),
    ({"messages": [{"role": "critic", "content": "x"}]}, "turn 1 has role 'critic', must be one of system"),
    ({"messages": ["x", {"role": "user", "content": None}]}, "turn 2 has no text"),
    ({"messages": [{"speaker": "x"}]}, "turn 1 has neither role"),
    ({"messages": []}, "the conversation is empty"),
])
def test_what_no_key_fits_is_reported_by_line(record: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + json.dumps(record) + "\n")
    documents, report = read(path)
    assert [d.text for d in documents] == ["good"]
    [problem] = report.problems
    assert (problem.source, problem.line, problem.reason) == (str(path), 3, "unusable record")
    assert reason in problem.detail
    with pytest.raises(DataError, match=r"a\.jsonl:3: unusable record"):
        read(path, strict=True)


def test_json_files_hold_a_record_or_a_list_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "1"}, {"text": "2"}, {"no": 0}], indent=1))
    (tmp_path / "b.json").write_text(json.dumps([{"role": "user", "content": "hi"}]))
    (tmp_path / "c.json").write_text("{")
    documents, report = read(tmp_path)
    assert [(d.text, d.line) for d in documents] == [("1", 1), ("2", 2), ("User: hi", None)]
    assert [(Path(p.source).name, p.line, p.reason) for p in report.problems] == [
        ("a.json", 3, "unusable record"), ("c.json", None, "not JSON")]


# ---- files ------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_a_fixed_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.txt", "a.md", "c.TXT", ".git/config", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    (tmp_path / "b" / "image.png").write_bytes(b"\x89PNG\r\n\0\0")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == [f"text of {name}\n" for name in ("a.md", "c.TXT", "b/a.txt", "b/z.py")]
    assert report.skipped == {"hidden": 2, "binary": 1}
    assert report.problems == []
    assert report.summary() == "4 documents, 58 characters from 4 files; skipped 1 binary, 2 hidden"
    assert [p.name for p in list_files([tmp_path])] == ["a.md", "c.TXT", "a.txt", "image.png", "z.py"]
    assert [d.source for d in read(tmp_path / "b", tmp_path / "a.md")[0]][-1] == str(tmp_path / "a.md")


def test_gz(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("压缩".encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n{"text": "y"}\n'))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(os.urandom(9999).hex().encode())[:-20])
    (tmp_path / "d.gz").write_bytes(b"not gzip")
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == ["压缩", "x", "y"]
    assert [(Path(p.source).name, p.reason) for p in report.problems] == [
        ("c.txt.gz", "unreadable"), ("d.gz", "unreadable")]


def test_bad_utf8_and_empty_files_are_reported_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes("好".encode() + b"\xff\xfe rest")
    (tmp_path / "empty.txt").write_bytes(b" \n\t\n")
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n{"text": \n')
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == ["ok"]
    assert [str(p).removeprefix(f"{tmp_path}/").split(": Exp")[0] for p in report.problems] == [
        "bad.txt: not UTF-8: byte 0xff at offset 3", "empty.txt: empty",
        "lines.jsonl:2: not UTF-8: byte 0xe9 at offset 10", "lines.jsonl:3: not JSON"]
    assert report.counts == {"not UTF-8": 2, "empty": 1, "not JSON": 1}
    summary = report.summary(limit=3)
    assert "4 problems: 2 not UTF-8, 1 empty, 1 not JSON" in summary
    assert "bad.txt: not UTF-8" in summary
    assert summary.endswith("… and 1 more")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8"):
        read(tmp_path, strict=True)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\r\n')
    assert [d.text for d in read(tmp_path)[0]] == ["hello", "hello"]


def test_a_large_file_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 10)
    path = tmp_path / "a.txt"
    text = "一二三四五\n六\n" * 5
    path.write_text(text)
    documents, report = read(path)
    assert "".join(d.text for d in documents) == text
    assert {d.text for d in documents} == {"一二三四五\n", "六\n一二三四五\n", "六\n"}
    assert (report.files, report.documents, report.characters) == (1, len(documents), len(text))
    path.write_bytes(text.encode() + b"\xff\n" + text.encode())
    kept = "".join(d.text for d in read(path)[0])
    assert kept
    assert text.startswith(kept), "what stood before the damage, and nothing after it"
    assert read(path)[1].problems[0].detail == f"byte 0xff at offset {len(text.encode())}"


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere: no such file or folder"):
        read(tmp_path, tmp_path / "nowhere")
    with pytest.raises(DataError, match="the folder holds no readable text"):
        read(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"the folder holds no readable text; .*a\.txt: empty"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"nothing to read; .*a\.txt: empty"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"b\.bin: binary"):
        read(tmp_path / "b.bin")
    with pytest.raises(DataError, match="nothing to read"):
        read()
