"""A conversion without noise, and what it left, read by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek.convert import Report, quantize, writing

# widths that are no multiples of 16 or 64, some above 64
RAGGED: dict[str, Any] = dict(hidden_size=72, intermediate_size=90, moe_intermediate_size=24, vocab_size=97)


def quiet(source: Path, format: Any = "nf4", name: str = "q", **options: Any) -> tuple[Path, Report]:
    out = source.parent / name
    return out, quantize(source, out, format, progress=False, **options)


def header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the entries, read by hand."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    assert entries.pop("__metadata__") == {"format": "pt"}
    return 8 + length, entries


def interrupt(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    """Ctrl-C before the file with `marker` in its name is written."""
    write = writing.write_file

    def stopped(path: Path, *rest: Any) -> Any:
        if marker in path.name:
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(writing, "write_file", stopped)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
