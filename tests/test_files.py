"""Files are whole or absent: under an injected failure, and for a reader that watches while they are exchanged."""

from __future__ import annotations

import ast
import ctypes
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deepseek import files
from deepseek.errors import ConfigError, NotFoundError
from deepseek.files import locked, read_text, read_yaml, replace_folder, sha256, to_json, write_atomically, write_json
from tests.helpers import ROOT


class InjectedError(RuntimeError):
    """The injected failure."""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_atomically_makes_parents_and_encodes(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "专家\n")
    assert path.read_bytes() == "专家\n".encode()
    write_atomically(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and names(path.parent) == ["b.txt"]


def test_permissions_follow_the_umask_not_mkstemp(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
        with replace_folder(tmp_path / "folder"):
            pass
        assert os.umask(0o027) == 0o027  # reading the mask must not change it
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise InjectedError

    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        patch.setattr(os, at, fail)
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_write_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"领域": [1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"领域": [1]} and "领域" in text and text.endswith("}\n")


def test_what_json_cannot_say_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert (tmp_path / "x.json").read_text() == "1\n" and names(tmp_path) == ["x.json"]


def test_sha256_is_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")  # the test vector of FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_appears_whole(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "parent" / "folder"
    if existing:
        path.mkdir(parents=True)
        (path / "old").write_text("old")
    with replace_folder(path) as staging:
        assert staging.parent == path.parent and names(staging) == []
        (staging / "sub").mkdir()
        (staging / "sub" / "new").write_text("new")
        assert path.exists() == existing
    assert names(path) == ["sub"] and (path / "sub" / "new").read_text() == "new"
    assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "folder"
    if existing:
        path.mkdir()
        (path / "old").write_text("old")
    with pytest.raises(InjectedError), replace_folder(path) as staging:
        (staging / "new").write_text("new")
        raise InjectedError
    assert names(tmp_path) == (["folder"] if existing else [])
    assert not existing or (path / "old").read_text() == "old"


def test_a_failing_exchange_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")

    def fail(*_: object) -> None:
        raise InjectedError

    monkeypatch.setattr(files, "exchange", fail)
    with pytest.raises(InjectedError), replace_folder(path) as staging:
        (staging / "new").write_text("new")
    assert names(tmp_path) == ["folder"] and names(path) == ["old"]


def test_without_the_kernel_call_the_exchange_takes_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    for content in ("first", "second"):
        with replace_folder(tmp_path / "folder") as staging:
            (staging / "x").write_text(content)
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "x").read_text() == "second"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(NotADirectoryError, match="notes"), replace_folder(tmp_path / "notes"):
        pass
    assert names(tmp_path) == ["notes"] and (tmp_path / "notes").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with replace_folder(tmp_path / "link") as staging:
        (staging / "new").write_text("new")
    assert names(tmp_path) == ["link", "real"] and (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


READER = """
    import os, sys
    path = sys.argv[1]
    print("ready", flush=True)
    reads, versions = 0, set()
    while not os.path.exists(path + ".stop"):
        with open(os.path.join(path, "whole")) as file:  # raises where the folder is missing or still being filled
            head, tail = file.read().split()
        assert head == tail, (head, tail)
        reads += 1
        versions.add(head)
    print(reads, len(versions))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_a_reader_never_sees_a_missing_or_partial_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"

    def write(version: int) -> None:
        with replace_folder(path) as staging:
            (staging / "whole").write_text(f"{version} {version}")

    write(0)
    reader = subprocess.Popen([sys.executable, "-c", textwrap.dedent(READER), str(path)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    end, version = time.monotonic() + 1.0, 0
    while time.monotonic() < end or version < 20:
        version += 1
        write(version)
    (tmp_path / "folder.stop").touch()
    out, err = reader.communicate(timeout=30)
    assert reader.returncode == 0, err
    reads, seen = map(int, out.split())
    assert reads > 100 and seen > 5
    assert names(tmp_path) == ["folder", "folder.stop"]


def test_a_lock_is_for_one_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out"
    with locked(path):
        with pytest.raises(ConfigError, match=f"{path}: another process is writing it"), locked(path):
            pass
        with locked(tmp_path / "other"):
            pass
    with pytest.raises(InjectedError), locked(path):
        raise InjectedError
    assert names(tmp_path) == []
    with locked(path):
        write_atomically(path, "kept")
    assert names(tmp_path / "new") == ["out"]


def test_a_lock_writes_nothing_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "notes")
    with locked(tmp_path / "out"):
        pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_folder_whose_parent_cannot_be_written_is_locked_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    (tmp_path / "mount").mkdir()
    with locked(tmp_path / "mount"):
        assert names(tmp_path) == ["mount"]
        with pytest.raises(ConfigError, match="another process is writing it"), locked(tmp_path / "mount"):
            pass
    with locked(tmp_path / "mount"), locked("/"):  # which has no name beside which to lie
        pass


def test_a_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    child = textwrap.dedent(f"""
        import sys
        from deepseek.files import locked
        with locked({str(tmp_path / 'out')!r}):
            print("mine", flush=True)
            sys.stdin.read()
        """)
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"mine\n"
        with pytest.raises(ConfigError, match="out: another process is writing it"), locked(tmp_path / "out"):
            pass
        process.kill()
    with locked(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_aliases_and_merges_that_configurations_use(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {r: 1, k: [a, b]}\none: {<<: *base, r: 2}\nmany: [*base, *base]\n")
    base = {"r": 1, "k": ["a", "b"]}
    assert read_yaml(tmp_path / "a.yaml") == {"base": base, "one": base | {"r": 2}, "many": [base, base]}
    (tmp_path / "empty.yaml").touch()
    assert read_yaml(tmp_path / "empty.yaml") is None
    (tmp_path / "rows.json").write_text(json.dumps([{"n": i} for i in range(2000)]))
    assert read_yaml(tmp_path / "rows.json")[1999] == {"n": 1999}


@pytest.mark.parametrize(("text", "value"), [
    ("1e-5", 1e-5), ("3e-4", 3e-4), ("1E5", 1e5), ("-2e3", -2e3), ("+1.5e2", 150.0), ("1.e3", 1e3), (".5e1", 5.0),
    ("-.5", -0.5), ("1.0e-5", 1e-5), ("0.5", 0.5), ("5.", 5.0), ("1e+06", 1e6), ("3", 3), ("-7", -7),
    (".inf", math.inf), ("'1e-5'", "1e-5"), ("1e", "1e"), ("e5", "e5"), ("1e5x", "1e5x"),
    ("1.2.3", "1.2.3"), ("v1e5", "v1e5"), (".", "."),
    ("1e5-2", "1e5-2"), ("true", True)])
def test_numbers_in_yaml_are_those_of_its_present_version(text: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"lr: {text}\nall: [{text}]\n")
    found = read_yaml(tmp_path / "a.yaml")
    assert found == {"lr": value, "all": [value]} and type(found["lr"]) is type(value)


def test_yaml_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: must be at most 8,388,608 bytes"):
        read_yaml("/dev/zero")


def test_a_key_given_twice_in_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1\nall:\n  lr: 2\n  <<: {lr: 3}\n  lr: 2\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not YAML: line 5: lr is given twice"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("lr: 1\nall:\n  <<: {lr: 3}\n  lr: 2\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": 1, "all": {"lr": 2}}


def test_nothing_reads_yaml_by_another_way() -> None:
    source = ROOT / "src" / "deepseek"
    assert [path.name for path in source.rglob("*.py") if re.search(r"import yaml|yaml\.", path.read_text())] == [
        "files.py"]


# ---- JSON that we write -------------------------------------------------------------------------------------------


def test_json_has_no_nan(tmp_path: Path) -> None:
    """Python writes NaN and Infinity, which no other reader takes: null stands in their places."""
    value = {"a": [math.nan, 1.5, (math.inf, {"b": -math.inf})], "c": "NaN", math.inf: 1}
    assert to_json(value) == '{"a": [null, 1.5, [null, {"b": null}]], "c": "NaN", "inf": 1}'
    write_json(tmp_path / "a.json", value)
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": [None, 1.5, [None, {"b": None}]], "c": "NaN", "inf": 1}
    assert to_json({"é": 1}, ensure_ascii=False, indent=1) == json.dumps({"é": 1}, ensure_ascii=False, indent=1)


# calls whose text is hashed, measured, compared, shown within a prompt or sent between our own processes: nothing that
# another program reads
WITHIN = {"tokenizer.py": 3, "tune/show.py": 1, "serve/responses.py": 1, "serve/chat.py": 1,
          "serve/output_parser.py": 1,
          "engine/constraint.py": 1, "workers.py": 3, "domain.py": 1, "files.py": 1, "data/stage.py": 1,
          "data/shards.py": 1, "deepopt/run_folder.py": 1, "checkpoint/identity.py": 1, "templates.py": 2,
          "conversation.py": 5}


def test_nothing_writes_json_that_may_hold_nan() -> None:
    source = ROOT / "src" / "deepseek"
    found: Counter[str] = Counter()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump") and not any(
                    word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in node.keywords):
                found[str(path.relative_to(source))] += 1
    assert {name: number for name, number in found.items() if number > WITHIN.get(name, 0)} == {}, (
        "use files.to_json, or allow_nan=False")


def test_what_keeps_a_text_from_being_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, error, message in (("gone.txt", NotFoundError, "gone.txt: no such file"),
                                 (".", ConfigError, "cannot be read: must be a file"),
                                 ("latin.txt", ConfigError, "latin.txt: not UTF-8: byte 0xe9 at 3")):
        with pytest.raises(error, match=message):
            read_text(tmp_path / name, ConfigError)
