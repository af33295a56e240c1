"""Failures of the machine and of libraries: one line and an exit code, the traceback where it is asked for."""

from __future__ import annotations

import errno
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from deepseek import cli
from deepseek.cli import info
from deepseek.config import ModelConfig
from deepseek.errors import ConfigError
from deepseek.files import locked, take_lock


class LibraryError(Exception):
    pass


LibraryError.__module__ = "polars.exceptions"


@pytest.mark.parametrize(("error", "code", "line"), [
    (ConfigError("n = 3: must be 4"), 2, "n = 3: must be 4"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
    (MemoryError(), 1, "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "not enough memory: CUDA out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\n 8 bytes"), 1,
     "not enough memory: DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    (RecursionError("maximum recursion depth exceeded"), 1, "the input is nested too deeply"),
    (LibraryError("bad\nfile"), 1, "polars: LibraryError: bad file (DEEPSEEK_DEBUG=1 shows where)"),
    (KeyError("x"), 1, "KeyError: 'x' (DEEPSEEK_DEBUG=1 shows where)"),
])
def test_a_failure_is_one_line(
    error: Exception, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(info, "run", fails)
    assert cli.main(["info", "v3-63m"]) == code
    assert capsys.readouterr().err == f"deepseek: {line}\n"
    monkeypatch.setenv("DEEPSEEK_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["info", "v3-63m"])


@pytest.mark.parametrize("words", [
    ["data", "tokenizer", "DATA", "--out", "OUT"],
    ["data", "validate", "DATA", "--out", "OUT"],
    ["train", "v3-63m", "DATA", "--out", "OUT"],
    ["quantize", "MODEL", "OUT"],
    ["quantize", "MODEL", "OUT", "--format", "bf16"],
    ["atlas", "profile", "MODEL", "--data", "a=DATA", "b=DATA", "--out", "OUT"],
    ["infer", "--model", "MODEL", "--input", "DATA", "--output", "OUT"],
], ids=lambda words: " ".join(word for word in words[:2] if word.islower()))
def test_what_another_process_writes_is_left_alone(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"text": "a"}\n' * 3)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(ModelConfig.preset("v3-63m").to_dict()))
    names = {"DATA": str(data), "OUT": str(out), "MODEL": str(tmp_path / "model"), "a=DATA": f"a={data}",
             "b=DATA": f"b={data}"}
    with locked(out), ExitStack() as stack:
        if words[0] == "infer":  # goes on with what is in the file, and locks the file itself
            take_lock(stack.enter_context(out.open("ab")), out)
        assert cli.main([names.get(word, word) for word in words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"deepseek: {out}: another process is writing it"


@pytest.mark.parametrize(("text", "said"), [
    ("a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n"
                               for i in range(9)), "its aliases make"),
    ("a: &a [*a]\n", "an alias stands inside"),
    ("[" * 70 + "]" * 70, "nested at most 64 deep"),
    ("[" * 5000, "nested at most 64 deep"),
    ("a: " + "x" * (8 << 20), "must be at most 8,388,608 bytes"),
    ("when: 2024-13-45\n", "month must be in 1..12"),
    ("? [a]\n: b\n? {c: d}\n: e\n", "unhashable key"),
    ("a: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
])
@pytest.mark.parametrize("command", [["tune", "--config"], ["data", "run"]])
def test_yaml_within_bounds(
    command: list[str], text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.yaml").write_text(text, encoding="utf-8")
    assert cli.main([*command, str(tmp_path / "given.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "given.yaml") in line and said in line
