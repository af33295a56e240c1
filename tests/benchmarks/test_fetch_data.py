"""benchmarks/fetch_data.py against a server and a repository of this machine."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fetch_data.py"
CONTENT = b'{"question": "2 + 2", "answer": "4"}\n' * 50
COMMIT = "0" * 40


@pytest.fixture
def fetch_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_data", module)  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; of the first answers it sends `cut` bytes less than it announces."""

    files: dict[str, bytes]
    asked: list[tuple[str, str | None]]
    cut = 0
    ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        if (data := self.server.files.get(self.path)) is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : len(data) - self.server.cut])
        self.server.cut = 0

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def published(module: ModuleType, server: Server, content: bytes = CONTENT, path: str = "data/test.jsonl") -> str:
    """Serve `content` as the only set; its SHA-256 is CONTENT's. The key of its file."""
    file = module.Published(f"owner/set@{COMMIT}", path, hashlib.sha256(CONTENT).hexdigest())
    module.SETS.clear()
    module.SETS["eval/set"] = module.DataSet("MIT", {"test.jsonl": file})
    server.files[f"/owner/set/{COMMIT}/{path}"] = content
    return "eval/set/test.jsonl"


def run(module: ModuleType, server: Server | None, out: Path, *more: str) -> int:
    mirror = server.url if server else "http://127.0.0.1:1"
    status: int = module.main(["--out", str(out), "--mirror", mirror, *more])
    return status


def left(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_published_file_is_fetched_once(fetch_data: ModuleType, server: Server, tmp_path: Path) -> None:
    key = published(fetch_data, server)
    assert run(fetch_data, server, tmp_path) == 0
    assert (tmp_path / key).read_bytes() == CONTENT
    assert left(tmp_path) == {key, "fetched.json"}
    listed = json.loads((tmp_path / "fetched.json").read_text())[key]
    assert listed == {"source": f"owner/set@{COMMIT}:data/test.jsonl", "licence": "MIT",
                      "sha256": hashlib.sha256(CONTENT).hexdigest()}
    assert run(fetch_data, server, tmp_path) == 0 and len(server.asked) == 1
    (tmp_path / key).write_bytes(CONTENT[:-1])  # altered here: fetched again
    assert run(fetch_data, server, tmp_path) == 0 and len(server.asked) == 2
    assert (tmp_path / key).read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_truncated_download_is_continued(fetch_data: ModuleType, server: Server, tmp_path: Path, ranges: bool,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    key = published(fetch_data, server)
    server.cut, server.ranges = 700, ranges
    assert run(fetch_data, server, tmp_path) == 1
    assert "ended 700 bytes early; run again" in capsys.readouterr().err
    assert left(tmp_path) == {key + ".part"}  # never under its name while it is not whole
    assert run(fetch_data, server, tmp_path) == 0
    assert server.asked[-1][1] == f"bytes={len(CONTENT) - 700}-"
    assert (tmp_path / key).read_bytes() == CONTENT and left(tmp_path) == {key, "fetched.json"}


def test_altered_file_is_refused_and_removed(fetch_data: ModuleType, server: Server, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    altered = CONTENT.replace(b"4", b"5", 1)
    key = published(fetch_data, server, altered)
    assert run(fetch_data, server, tmp_path) == 1
    said = capsys.readouterr().err
    assert hashlib.sha256(altered).hexdigest() in said and hashlib.sha256(CONTENT).hexdigest() in said
    assert left(tmp_path) == set()
    part = tmp_path / (key + ".part")  # what an earlier run left is longer than the file: refused, then fetched anew
    published(fetch_data, server)
    part.write_bytes(CONTENT + b"more")
    assert run(fetch_data, server, tmp_path) == 1 and left(tmp_path) == set()
    assert run(fetch_data, server, tmp_path) == 0 and (tmp_path / key).read_bytes() == CONTENT


def test_gzip_is_unpacked(fetch_data: ModuleType, server: Server, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    key = published(fetch_data, server, gzip.compress(CONTENT)[:-9], "data/test.jsonl.gz")
    assert run(fetch_data, server, tmp_path) == 1
    assert "is no whole gzip file" in capsys.readouterr().err and left(tmp_path) == set()
    published(fetch_data, server, gzip.compress(CONTENT), "data/test.jsonl.gz")
    assert run(fetch_data, server, tmp_path) == 0
    assert (tmp_path / key).read_bytes() == CONTENT and left(tmp_path) == {key, "fetched.json"}


def test_missing_file_and_no_network_name_the_address(fetch_data: ModuleType, server: Server, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    published(fetch_data, server)
    server.files.clear()
    assert run(fetch_data, server, tmp_path) == 1
    assert f"{server.url}/owner/set/{COMMIT}/data/test.jsonl: the server answers 404" in capsys.readouterr().err
    assert run(fetch_data, None, tmp_path) == 1
    assert "http://127.0.0.1:1/owner/set" in (said := capsys.readouterr().err) and "not reached" in said
    assert left(tmp_path) == set()


def test_list_and_unknown_set(fetch_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_data.main(["--list", "--only", "eval/gsm8k", "--out", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert "eval/gsm8k: MIT" in said and "openai/grade-school-math@3101c7d" in said and "SHA-256 3730d312" in said
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="2"):
        fetch_data.main(["--only", "nosuch"])
    assert "nosuch: no such set" in capsys.readouterr().err


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments], cwd=folder,
                          check=True, capture_output=True, text=True).stdout.strip()


def repository(host: Path, files: dict[str, bytes]) -> str:
    """A repository owner/set with one commit. Its hash."""
    folder = host / "owner" / "set"
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        git(folder, "config", key, "true")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "data")
    return git(folder, "rev-parse", "HEAD")


def made(module: ModuleType, convert: Any, commit: str, *patterns: str, limit: int = 1 << 40) -> str:
    module.SETS.clear()
    module.SETS["text/set"] = module.DataSet("MIT", {"text.jsonl": module.Made(
        convert, ((f"owner/set@{commit}", patterns),), limit)})
    return "text/set/text.jsonl"


def test_made_file_is_of_the_pinned_commit(fetch_data: ModuleType, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    host, out = tmp_path / "host", tmp_path / "out"
    commit = repository(host, {"docs/b.md": b"second", "docs/a.md": b"first", "other.txt": b"no", "docs/x/c.md": b"no"})
    (host / "owner/set/docs/a.md").write_bytes(b"later")
    git(host / "owner/set", "commit", "--quiet", "-a", "-m", "later")
    key = made(fetch_data, fetch_data.whole, commit, "/docs/*.md")
    assert run(fetch_data, None, out, "--git", host.as_uri()) == 0
    assert (out / key).read_text() == '{"text": "first"}\n{"text": "second"}\n'
    assert left(out) == {key, "fetched.json"}  # nothing of git's stays
    capsys.readouterr()
    assert run(fetch_data, None, out, "--git", "file:///nowhere") == 0  # there already: git is not asked
    assert "there already" in capsys.readouterr().out
    made(fetch_data, fetch_data.whole, commit, "/docs/*.md", limit=len('{"text": "first"}\n'))
    (out / key).write_text("altered\n")
    assert run(fetch_data, None, out, "--git", host.as_uri()) == 0
    assert (out / key).read_text() == '{"text": "first"}\n'


def test_made_file_that_cannot_be_made(fetch_data: ModuleType, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    host, out = tmp_path / "host", tmp_path / "out"
    commit = repository(host, {"docs/a.md": b"not JSON"})
    for convert, wanted, pattern, reason in (
            (fetch_data.whole, commit, "/none/*.md", "has no file under /none/*.md"),
            (fetch_data.whole, COMMIT, "/docs/*.md", "git fetch of commit 000000000000 failed"),
            (fetch_data.items, commit, "/docs/*.md", "docs/a.md is not as expected")):
        made(fetch_data, convert, wanted, pattern)
        assert run(fetch_data, None, out, "--git", host.as_uri()) == 1
        assert reason in capsys.readouterr().err
        assert left(out) <= {"text/set/text.jsonl.part"}


def zipped(name: str, data: bytes, folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr(name, data)
    return (folder / "z.zip").read_bytes()


def test_every_form_of_a_source(fetch_data: ModuleType, tmp_path: Path) -> None:
    """Each converter on a file as its publisher writes it."""
    cases: list[tuple[str, bytes, list[Any]]] = [
        ("chapter", b'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>No</title></head><body><h2>I</h2>'
                    b"<p>It <i>was</i>\n so.</p></body></html>", [{"text": "I\n\nIt was so."}]),
        ("translation", 'msgid ""\nmsgstr ""\n"Language: zh\\n"\n\nmsgid "a"\nmsgstr "甲"\n\nmsgid "b"\nmsgstr ""\n'
                        '"乙"\n"丙"\n'.encode(), [{"text": "甲\n\n乙丙"}]),
        ("poems", '[{"author": "晏殊", "rhythmic": "红窗听", "paragraphs": ["一。", "二。"], "tags": ["no"]}]'.encode(),
         [{"text": "红窗听\n晏殊\n一。\n二。"}]),
        ("items", b'[{"question": "q", "answer": "a"}]', [{"question": "q", "answer": "a"}]),
        ("choices", b'{"problem": "$$1$$ + 1 ", "answer_option_list": [[{"aoVal": "A", "content": "2 "}]], '
                    b'"answer_analysis": ["add "], "answer_value": "A"}\n',
         [{"problem": "$1$ + 1", "options": {"A": "2"}, "analysis": "add", "answer": "A"}]),
        ("abstracts", b'{"1": {"QUESTION": "q", "CONTEXTS": ["c", "d"], "LONG_ANSWER": "a"}}',
         [{"question": "q", "context": "c\nd", "long_answer": "a"}]),
        ("answers", b"<Document><QAPairs><QAPair><Question>q</Question><Answer>a\n b</Answer></QAPair><QAPair>"
                    b"<Question>r</Question><Answer></Answer></QAPair></QAPairs></Document>",
         [{"question": "q", "answer": "a b"}]),
        ("dialogues", b'[{"utterances": [{"speaker": "user", "text": "a"}, {"speaker": "assistant", "text": "b"}]}]',
         [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
        ("dialogues", b'[{"turns": [{"speaker": "USER", "utterance": "a"}, {"speaker": "SYSTEM", "utterance": "b"}, '
                      b'{"speaker": "SYSTEM", "utterance": "c"}]}]',
         [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\nc"}]}]),
        ("dialogues", b'[{"messages": [{"message": "a"}, {"message": "b"}]}, {"messages": [{"message": "alone"}]}]',
         [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
        ("dialogues", zipped("val.json", b'{"7": {"messages": [{"role": "usr", "content": "a"}, '
                                         b'{"role": "sys", "content": "b"}]}}', tmp_path),
         [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
    ]
    for n, (convert, data, records) in enumerate(cases):
        host = tmp_path / str(n)
        commit = repository(host, {"file.zip" if data.startswith(b"PK") else "file": data})
        key = made(fetch_data, getattr(fetch_data, convert), commit, "/file*")
        assert run(fetch_data, None, host / "out", "--git", host.as_uri()) == 0, convert
        assert [json.loads(line) for line in (host / "out" / key).read_text().splitlines()] == records, convert
    assert list(fetch_data.chapter("src/epub/text/colophon.xhtml", b"")) == []


def test_sets_are_pinned(fetch_data: ModuleType) -> None:
    for name, one in fetch_data.SETS.items():
        assert one.licence, name
        for file in one.files.values():
            sources = file.source.split("\n")
            assert all(len(source.split("@")[1].split(":")[0]) == 40 for source in sources), (name, sources)
            assert not isinstance(file, fetch_data.Published) or len(file.sha256) == 64, name
