"""Files that others wrote are read within limits: each that breaks them is named, and nothing else suffers."""

from __future__ import annotations

import os
import signal
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek import KnowledgeBase
from deepseek.errors import DataError, NotFoundError
from deepseek.route import reading
from deepseek.route.documents import parse
from deepseek.route.reading import read_document
from deepseek.workers import WorkerError
from tests.route.test_knowledge_documents import CHINESE, HTML, MARKDOWN, pdf


def compressed_pdf(content: bytes) -> bytes:
    """A page whose content stream is compressed."""
    data = zlib.compress(content, 9)
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
               b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R>>",
               b"<</Length %d/Filter/FlateDecode>>stream\n%b\nendstream" % (len(data), data)]
    out, starts = b"%PDF-1.5\n", []
    for number, content in enumerate(objects, 1):
        starts.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    return out + b"xref\n0 5\n0000000000 65535 f \n%btrailer<</Size 5/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        table, len(out))


@pytest.mark.parametrize(("name", "data"), [
    ("a.html", HTML.encode()), ("b.pdf", pdf("First page.", "Second page.", outline={2: "Part"})),
    ("c.md", MARKDOWN.encode()), ("d.txt", CHINESE.encode()), ("named.txt", pdf("a PDF all the same"))])
def test_a_worker_reads_what_this_process_would(name: str, data: bytes, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(data)
    kind = {"html": "html", "pdf": "pdf", "md": "markdown", "txt": "text"}[name.partition(".")[2]]
    here = parse(data, kind, name)
    monkeypatch.setattr(reading, "HERE", 0)
    monkeypatch.setattr(reading, "parse", lambda *_: pytest.fail("it was parsed in this process"))
    assert read_document(tmp_path / name) == here


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def linked(path: Path) -> None:
    path.symlink_to(path.name)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("word/document.xml", b"\0" * 5_000_000)


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "huge.txt": (huge, r"has 1,073,741,824 bytes: must be at most 104,857,600: divide it"),
    "bomb.docx": (zipped, "a binary file"),
    "nul.txt": (write(b"word " * 5000 + b"\0"), "a binary file"),
    "deep.html": (write(b"<p>before</p>" + b"<div>" * 5_000 + b"deep"),
                  "HTML beyond the parser's limits: Excessive depth"),
    "encrypted.pdf": (write(pdf("secret", password="word")), "is encrypted"),
    "broken.pdf": (write(b"%PDF-1.7\nnothing"), "not a PDF that can be read"),
    "bomb.pdf": (write(compressed_pdf(b"(a) Tj " * 12_000_000)), "bomb.pdf: (takes more than|not a PDF|holds no text)"),
    "slow.html": (write(b"<p " + b" ".join(b"a%d=1" % i for i in range(100_000)) + b">x"), "takes more than 1 seconds"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = HOSTILE[name]
    make(tmp_path / name)
    monkeypatch.setattr(reading, "SECONDS", 0.6)
    monkeypatch.setattr(reading, "MEMORY", 400 << 20)
    with pytest.raises(DataError, match=message) as caught:
        read_document(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_files_beside_a_hostile_one_are_added(tmp_path: Path) -> None:
    huge(tmp_path / "huge.txt")
    (tmp_path / "deep.html").write_text("<div>" * 5_000, encoding="utf-8")
    for name in ("good.md", "good.html"):
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    base = KnowledgeBase(tmp_path / "base.knowledge")
    with pytest.raises(DataError, match=r"2 of 4 files not added, the others are in the base: .*huge\.txt: .*deep"):
        base.add([tmp_path / name for name in ("huge.txt", "good.md", "deep.html", "good.html")])
    assert [Path(file.path).name for file in base.files()] == ["good.html", "good.md"] and base.search("text")


def test_a_text_of_too_many_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    asked = {"path": str(tmp_path / "a.txt"), "name": "a.txt", "kind": "text", "encoding": "utf-8"}
    assert reading._answer(asked)["text"] == "one\n\ntwo"
    monkeypatch.setattr(reading, "PARTS", 1)
    assert reading._answer(asked) == {"limit": "its text has 2 paragraphs: must be at most 1: divide it"}


def test_links_in_a_circle(tmp_path: Path) -> None:
    linked(tmp_path / "loop.md")
    with pytest.raises((DataError, NotFoundError), match=r"loop\.md: cannot be read: Too many levels"):
        KnowledgeBase(tmp_path / "base.knowledge").add([tmp_path / "loop.md"])
    assert not (tmp_path / "base.knowledge").exists()


@pytest.mark.parametrize("text", ["# a" + " " * 300_000 + "b", "# a" + " #" * 150_000 + "b", "=" * 300_000 + "x",
                                  (" " * 1000 + "\n") * 300 + "x", "\n" + " " * 300_000, "```" * 100_000])
def test_markdown_takes_time_in_proportion(text: str) -> None:
    """A pattern that goes back over what it has read would take hours."""
    assert parse(f"x\n\n{text}".encode(), "markdown", "file").blocks


def test_a_worker_that_is_killed_is_one_file_that_is_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.html").write_text("<p>text", encoding="utf-8")
    (tmp_path / "b.html").write_text("<p>text", encoding="utf-8")
    read_document(tmp_path / "a.html")
    worker = reading.WORKERS.take()
    ask = reading.WORKERS.ask

    def killed(question: dict, **limits: float) -> dict:
        if question["path"].endswith("a.html"):
            os.kill(worker.pid, signal.SIGKILL)
            raise WorkerError(worker.wait(), 1)
        return ask(question, **limits)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.WORKERS, "ask", killed)
    base = KnowledgeBase(tmp_path / "base.knowledge")
    with pytest.raises(DataError, match=r"1 of 2 files not added.*a\.html: ended the process that read it"):
        base.add([tmp_path / "a.html", tmp_path / "b.html"])
    assert [Path(file.path).name for file in base.files()] == ["b.html"]


def test_a_worker_needs_no_numpy() -> None:
    """Its threads' memory would count against the limit."""
    import subprocess
    import sys

    code = "import sys, deepseek.route.reading; print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
