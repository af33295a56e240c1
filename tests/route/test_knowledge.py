"""Knowledge bases: what is added is found, cited exactly, kept up to date; what cannot be read is named."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepseek import KnowledgeBase
from deepseek.cli import main
from deepseek.errors import ConfigError, DataError, NotFoundError, RequestError
from deepseek.route import PoolMember, knowledge
from deepseek.route.reading import read_document

LAW = """# 民法典

## 第一章 一般规定

第九百九十条 人格权是民事主体享有的生命权、身体权、健康权、姓名权等权利。

除前款规定的人格权外，自然人享有基于人身自由、人格尊严产生的其他人格权益。

第九百九十一条 民事主体的人格权受法律保护，任何组织或者个人不得侵害。

## 第二章 肖像权

第一千零一十八条 自然人享有肖像权，有权依法制作、使用、公开或者许可他人使用自己的肖像。
"""
MEDICINE = """# Asthma

## Symptoms

Wheezing, coughing and tightness of the chest, often at night.

## Treatment

Inhaled corticosteroids prevent attacks; a fast reliever ends one.

# Gout

## Symptoms

Sudden pain in one joint, most often of the big toe, which is red and swollen.
"""


@pytest.fixture
def base(tmp_path: Path) -> KnowledgeBase:
    (tmp_path / "law.md").write_text(LAW, encoding="utf-8")
    (tmp_path / "medicine.md").write_text(MEDICINE, encoding="utf-8")
    made = KnowledgeBase(tmp_path / "base.knowledge")
    assert made.add([tmp_path / "law.md", tmp_path / "medicine.md"]) == (2, 0, 0)
    for file in tmp_path.glob("*.md"):
        os.utime(file, ns=(10**18, 10**18))  # not new: the time tells whether it changed
    made.add([tmp_path / "law.md", tmp_path / "medicine.md"])
    return made


@pytest.mark.parametrize(("query", "section"), [
    ("民法典第990条的内容是什么？", "民法典 > 第一章 一般规定 > 第九百九十条"),
    ("第一千零一十八条", "民法典 > 第二章 肖像权 > 第一千零一十八条"),
    ("别人可以公开我的肖像吗", "民法典 > 第二章 肖像权 > 第一千零一十八条"),
    ("How is asthma treated?", "Asthma > Treatment"), ("symptoms of gout", "Gout > Symptoms")])
@pytest.mark.parametrize("mode", ["hybrid", "bm25"])
def test_what_answers_a_question_is_found_first(base: KnowledgeBase, query: str, section: str,
                                                mode: knowledge.Mode) -> None:
    assert base.search(query, mode=mode)[0].section == section
    assert base.search(query, mode="rrf")


def test_a_citation_is_exact(base: KnowledgeBase) -> None:
    found = base.search("人格权 symptoms", 10)
    assert len({passage.section for passage in found}) > 3
    for passage in found:
        assert read_document(passage.file).text[passage.start : passage.end] == passage.text
    assert found[0].citation == (f"{found[0].file}, {found[0].section}, characters {found[0].start}-{found[0].end}")


def test_no_word_of_the_query_no_passage(base: KnowledgeBase) -> None:
    assert base.search("zebra") == base.search("") == base.search("the of") == []


def test_an_unchanged_file_is_not_read_again(base: KnowledgeBase, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "law.md", tmp_path / "medicine.md"]
    monkeypatch.setattr(knowledge, "read_document", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(knowledge, "sha256", lambda _: pytest.fail("it was read"))
    assert base.add(files) == (0, 0, 2)
    monkeypatch.undo()
    monkeypatch.setattr(knowledge, "read_document", lambda *_: pytest.fail("it was parsed"))
    os.utime(files[0])  # a new time, the same content
    assert base.add(files) == (0, 0, 2)


def test_a_changed_file_replaces_its_passages(base: KnowledgeBase, tmp_path: Path) -> None:
    other = KnowledgeBase(base.path)  # sees what another has written
    assert other.search("gout")
    (tmp_path / "medicine.md").write_text("# Fever\n\nA temperature above 38 degrees.\n", encoding="utf-8")
    assert base.add([tmp_path / "law.md", tmp_path / "medicine.md"]) == (0, 1, 1)
    for one in (base, other):
        assert one.search("gout") == [] and one.search("fever")[0].section == "Fever"
    assert [Path(file.path).name for file in base.files()] == ["law.md", "medicine.md"]


def test_a_large_index_is_not_read_at_every_commit(base: KnowledgeBase, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge, "_CHEAP", -1)  # every index is a large one
    other = KnowledgeBase(base.path)
    assert other.search("gout") and other._due > time.monotonic() - 60
    other._due = time.monotonic() + 3600
    (tmp_path / "fever.md").write_text("# Fever\n\nA temperature above 38 degrees.\n", encoding="utf-8")
    base.add([tmp_path / "fever.md"])
    base.remove([tmp_path / "medicine.md"])
    assert other.search("fever") == [], "not read yet"
    assert other.search("gout") == [], "what was removed is not quoted all the same"
    other._due = 0
    assert other.search("fever")[0].section == "Fever"


def test_a_file_that_is_written_while_it_is_read_is_looked_at_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    base = KnowledgeBase(tmp_path / "a.knowledge")
    file.write_text("first word", encoding="utf-8")
    base.add([file])
    stat = file.stat()
    file.write_text("other word", encoding="utf-8")  # as long, and within the clock's step
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert base.add([file]) == (0, 1, 0)


def test_remove(base: KnowledgeBase, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"lawn.md: not in .*; did you mean .*law.md\?"):
        base.remove([tmp_path / "lawn.md"])
    base.remove([tmp_path / "law.md"])
    assert base.search("肖像权") == [] and base.search("gout")
    base.remove()
    assert not base.path.exists()
    with pytest.raises(NotFoundError, match="no such knowledge base"):
        base.search("gout")


def test_vectors_are_fitted_again_when_the_base_has_doubled(base: KnowledgeBase, tmp_path: Path) -> None:
    def fitted() -> int:
        return sqlite3.connect(base.path).execute("SELECT value FROM facts WHERE name = 'fitted'").fetchone()[0]

    def add(name: str, passages: int) -> None:
        (tmp_path / name).write_text("".join(f"# {name} {i}\n\nword{i} and {name}.\n\n" for i in range(passages)),
                                     encoding="utf-8")
        base.add([tmp_path / name])

    first = fitted()
    assert first == 6
    add("few.md", first - 1)
    assert fitted() == first and base.search("word3 few", mode="hybrid")
    add("more.md", 1)
    assert fitted() == 2 * first
    similar = base.search("few md", mode="dense")
    assert similar and similar[0].similarity > 0.5


def test_a_passage_that_stands_twice_is_found_once(base: KnowledgeBase, tmp_path: Path) -> None:
    (tmp_path / "copy.md").write_text(MEDICINE, encoding="utf-8")
    base.add([tmp_path / "copy.md"])
    assert len([passage for passage in base.search("gout", 10) if "big toe" in passage.text]) == 1


# ---- what cannot be read --------------------------------------------------------------------------------------------


def test_missing_files_and_folders_stop_before_anything_is_read(tmp_path: Path) -> None:
    base = KnowledgeBase(tmp_path / "base.knowledge")
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    with pytest.raises(NotFoundError, match=r"absent\.txt: no such file"):
        base.add([tmp_path / "good.txt", tmp_path / "absent.txt"])
    with pytest.raises(DataError, match="is a folder: name its files"):
        base.add([tmp_path / "good.txt", tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: must be a file"):
        base.add([tmp_path / "pipe"])
    with pytest.raises(ConfigError, match="encoding = 'utf-9': no such encoding"):
        base.add([tmp_path / "good.txt"], encoding="utf-9")
    assert not base.path.exists()


@pytest.mark.parametrize(("name", "data", "message"), [
    ("empty.txt", b"", "holds no text"), ("blank.md", b" \n\n \t", "holds no text"),
    ("comments.html", b"<!-- only -->", "holds no text"), ("empty.html", b"", "holds no text"),
    ("broken.pdf", b"%PDF-1.7\nnothing", "not a PDF that can be read"),
    ("picture.png", b"\x89PNG\r\n\x1a\n\0\0", "a binary file"), ("program", b"\x7fELF\0\1", "a binary file"),
    ("latin.txt", "café".encode("latin-1"), "not UTF-8: byte 0xe9 at 3; another encoding is named with encoding"),
    ("chinese.txt", "合同法".encode("gb18030"), "not UTF-8: byte 0xba at 0")])
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_kept(tmp_path: Path, name: str, data: bytes,
                                                                     message: str) -> None:
    base = KnowledgeBase(tmp_path / "base.knowledge")
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good text", encoding="utf-8")
    with pytest.raises(DataError, match="1 of 2 files not added, the others are in the base: ") as caught:
        base.add([tmp_path / name, tmp_path / "good.txt"])
    assert f"{tmp_path / name}: " in str(caught.value) and message in str(caught.value)
    assert [Path(file.path).name for file in base.files()] == ["good.txt"]


def test_a_changed_file_that_cannot_be_read_keeps_its_passages(base: KnowledgeBase, tmp_path: Path) -> None:
    (tmp_path / "medicine.md").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError):
        base.add([tmp_path / "medicine.md"])
    assert base.search("gout")


def test_encodings(tmp_path: Path) -> None:
    base = KnowledgeBase(tmp_path / "base.knowledge")
    (tmp_path / "a.txt").write_bytes("合同法总则".encode("gb18030"))
    (tmp_path / "b.txt").write_bytes("侵权责任".encode("utf-16"))
    (tmp_path / "c.html").write_bytes('<meta charset="gbk"><p>婚姻家庭</p>'.encode("gbk"))
    base.add([tmp_path / "a.txt"], encoding="gb18030")
    base.add([tmp_path / "b.txt", tmp_path / "c.html"])
    for word in ("合同法", "侵权责任", "婚姻家庭"):
        assert word in base.search(word)[0].text


def test_the_same_file_twice_and_by_a_link(tmp_path: Path) -> None:
    base = KnowledgeBase(tmp_path / "base.knowledge")
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert base.add([tmp_path / "a.txt", tmp_path / "a.txt", tmp_path / "link.txt"]) == (1, 0, 0)
    assert [file.path for file in base.files()] == [str((tmp_path / "a.txt").resolve())]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((NotFoundError, DataError), match="loop"):
        base.add([tmp_path / "loop"])


def test_a_line_of_a_megabyte(tmp_path: Path) -> None:
    base = KnowledgeBase(tmp_path / "base.knowledge")
    (tmp_path / "long.txt").write_text("word " * 199_999 + "needle", encoding="utf-8")
    (tmp_path / "solid.txt").write_text("x" * 1_000_000, encoding="utf-8")
    base.add([tmp_path / "long.txt", tmp_path / "solid.txt"])
    found = base.search("needle")[0]
    assert found.end == 999_995 + 6 and len(found.text) <= 1000
    assert [file.passages for file in base.files()][1] == 1000


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    KnowledgeBase("statutes").add([tmp_path / "a.txt"])
    assert knowledge.names() == ["statutes"]
    assert KnowledgeBase("statutes").path == tmp_path / "deepseek" / "knowledge" / "statutes.knowledge"
    with pytest.raises(NotFoundError, match=r"no such knowledge base; did you mean statutes\?"):
        KnowledgeBase("statute").search("a")
    for name in ("", ".", "a b", "-x", "x" * 200):
        with pytest.raises(ConfigError, match="name = "):
            KnowledgeBase(name)
    with pytest.raises(ConfigError, match="is a folder"):
        KnowledgeBase(tmp_path)
    with pytest.raises(ConfigError, match="passage_size = 300: the base has 1000"):
        KnowledgeBase("statutes", passage_size=300).add([tmp_path / "a.txt"])


def test_what_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "text.knowledge").write_text("no database " * 100, encoding="utf-8")
    sqlite3.connect(tmp_path / "other.knowledge").executescript("CREATE TABLE a(b); PRAGMA user_version = 1;")
    for name in ("text", "other"):
        with pytest.raises(DataError, match=f"{name}.knowledge: not a knowledge base"):
            KnowledgeBase(tmp_path / f"{name}.knowledge").search("a")


@pytest.mark.parametrize(("given", "message"), [
    ({"top_k": 0}, "top_k = 0"), ({"top_k": True}, "top_k = True"), ({"mode": "best"}, "mode = 'best'"),
    ({"query": None}, "query = None")])
def test_bad_questions(base: KnowledgeBase, given: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        base.search(**{"query": "a"} | given)


def test_one_process_writes_at_a_time(base: KnowledgeBase, tmp_path: Path) -> None:
    with knowledge.locked(base.path), pytest.raises(ConfigError, match="another process is writing it"):
        base.add([tmp_path / "law.md"])
    assert base.search("gout")


def test_threads_ask_while_another_process_adds(tmp_path: Path) -> None:
    """Every answer is of one state of the base; in the end all see all."""
    files = [tmp_path / f"{i}.md" for i in range(12)]
    for i, file in enumerate(files):
        parts = (f"# Part {part}\n\nword{i} fact{part}\n\n第{i + 1}条 甲方\n\n" for part in range(i % 7 + 1))
        file.write_text("".join(parts), encoding="utf-8")
    base = KnowledgeBase(tmp_path / "base.knowledge")
    base.add(files[:1])
    member = PoolMember("facts", "Facts", "knowledge", base.path)
    code = """
import sys
from deepseek import KnowledgeBase
from deepseek.route import knowledge
knowledge._COMMIT = 0.01  # several transactions an add
for end in (4, 8, 12):
    KnowledgeBase(sys.argv[1]).add(sys.argv[2 : 2 + end])
"""
    with subprocess.Popen([sys.executable, "-c", code, str(base.path), *map(str, files)],
                          stderr=subprocess.PIPE) as adding:
        def ask(thread: int) -> int:
            asked = 0
            while adding.poll() is None or not asked:
                for passage in member.passages(f"word{thread * 3} fact{asked % 7} 第{asked % 12 + 1}条"):
                    assert passage.text in Path(passage.file).read_text(encoding="utf-8") and passage.score > 0
                asked += 1
                time.sleep(0.005)
            return asked

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(4)))
        assert adding.stderr and adding.stderr.read() == b"" and adding.wait() == 0
    assert len(base.files()) == 12
    for one in (member.passages("word11"), base.search("word11")):
        assert Path(one[0].file).name == "11.md"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("medicine.md").write_text(MEDICINE, encoding="utf-8")
    assert main(["knowledge", "list"]) == 0
    assert main(["knowledge", "add", "health", "medicine.md"]) == 0
    assert main(["knowledge", "list"]) == 0 and main(["knowledge", "list", "health"]) == 0
    assert main(["knowledge", "search", "health", "treatment of asthma", "--top-k", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 new, 0 changed, 0 unchanged; the base has 1 files, 3 passages" in out
    assert "health: 1 files, 3 passages" in out and "medicine.md: markdown, " in out
    assert f"[1] {tmp_path}/medicine.md, Asthma > Treatment, characters " in out and "corticosteroids" in out
    assert main(["knowledge", "search", "health", "gout", "--json"]) == 0
    assert '"section": "Gout > Symptoms"' in capsys.readouterr().out
    assert main(["knowledge", "remove", "health", "medicine.md"]) == 0 and main(["knowledge", "remove", "health"]) == 0
    assert main(["knowledge", "search", "health", "gout"]) == 2
    assert "no such knowledge base" in capsys.readouterr().err


def test_a_base_without_passages_finds_nothing(base: KnowledgeBase, tmp_path: Path) -> None:
    base.remove([tmp_path / "law.md", tmp_path / "medicine.md"])
    assert base.search("gout") == []
    assert base.add([tmp_path / "law.md"]) == (1, 0, 0)
    assert base.search("肖像权")


# ---- an embedding model of the user's choice ------------------------------------------------------------------------


def by_letters(texts: list[str]) -> list[list[float]]:
    return [[text.lower().count(letter) + 0.01 for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def test_an_embedding_function(tmp_path: Path) -> None:
    (tmp_path / "medicine.md").write_text(MEDICINE, encoding="utf-8")
    path = tmp_path / "base.knowledge"
    base = KnowledgeBase(path, embedding=by_letters)
    base.add([tmp_path / "medicine.md"])
    assert base.search("symptoms of gout")[0].section == "Gout > Symptoms"
    by_cosine = base.search("zzz", mode="dense")  # no word of it is there; the function has vectors all the same
    assert len(by_cosine) == 3 and 0 < by_cosine[0].similarity <= 1.001
    with pytest.raises(ConfigError, match="was made with an embedding function, which must be given"):
        KnowledgeBase(path).search("gout")
    with pytest.raises(ConfigError, match="embedding = 'model2vec:x': the base has function"):
        KnowledgeBase(path, embedding="model2vec:x").search("gout")
    with pytest.raises(ConfigError, match=r"array of shape \(1, 3\) for 1 texts: must be \(1, 26\)"):
        KnowledgeBase(path, embedding=lambda texts: [[1, 2, 3] for _ in texts]).search("gout")


def test_embeddings_that_cannot_be(base: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(ConfigError, match="embedding = 'function': the base has vectors of its own"):
        KnowledgeBase(base.path, embedding=by_letters).search("gout")
    for name, message in (("bert", "must be a function, or LIBRARY:MODEL"),
                          ("model2vec:x", "model2vec is not installed")):
        with pytest.raises(ConfigError, match=message):
            KnowledgeBase(tmp_path / "other.knowledge", embedding=name).add([tmp_path / "law.md"])
    assert not (tmp_path / "other.knowledge").exists()


def test_vectors_that_are_missing_after_a_failure_are_made_by_the_next_add(tmp_path: Path) -> None:
    (tmp_path / "medicine.md").write_text(MEDICINE, encoding="utf-8")
    calls = []

    def failing(texts: list[str]) -> list[list[float]]:
        calls.append(len(texts))
        if len(calls) == 1:
            raise RuntimeError("no more memory")
        return by_letters(texts)

    base = KnowledgeBase(tmp_path / "base.knowledge", embedding=failing)
    with pytest.raises(RuntimeError, match="no more memory"):
        base.add([tmp_path / "medicine.md"])
    assert base.search("symptoms of gout")[0].section == "Gout > Symptoms", "BM25 has it"
    base.add([tmp_path / "medicine.md"])
    assert base.search("symptoms of gout")[0].similarity > 0
