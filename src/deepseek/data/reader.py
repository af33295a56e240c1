"""Files -> documents. What cannot be read is reported by file and line, never swallowed.

    *.jsonl, *.ndjson   one record a line
    *.json              one record, or a list of them
    anything else       text or code: one document a file (a large file comes in pieces, cut at line ends)
    *.gz                any of these, compressed
    a folder            its files, recursively, sorted by name, without hidden and binary ones

A record is a string, a conversation, or an object recognised by its keys: `text`, a conversation under one of
CONVERSATIONS, or at least one key of ASKING and one of ANSWERING. Parts of the last kind are joined in the order of
those two tuples, a line each, which covers question/answer, problem/analysis, instruction/input/output,
prompt/completion and their relatives.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import DataError, NotFoundError

PIECE_BYTES = 4 << 20
CONVERSATIONS = ("messages", "conversations", "conversation", "turns", "dialogue")
ASKING = ("instruction", "context", "body", "problem", "question", "prompt", "input", "en", "options")
ANSWERING = ("analysis", "rationale", "solution", "canonical_solution", "long_answer", "answer", "answers", "output",
             "completion", "response", "golden", "correct", "target", "zh")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "bot": "assistant", "model": "assistant"}

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Document:
    """One text. turns: (role, text) of a conversation, roles system, user and assistant; `text` is its plain form."""

    text: str
    source: str
    line: int | None = None
    turns: Turns = ()


@dataclass(frozen=True)
class Problem:
    """Something that could not be read: `reason` is one of a few kinds, `detail` says where exactly."""

    source: str
    line: int | None
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


@dataclass
class ReadReport:
    """What was read and what was not. strict: raise DataError at the first problem."""

    strict: bool = False
    files: int = 0
    documents: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Problems by reason."""
        return Counter(problem.reason for problem in self.problems)

    def problem(self, source: str, line: int | None, reason: str, detail: str = "") -> None:
        """Note a problem; raises DataError where the report is strict."""
        self.problems.append(Problem(source, line, reason, detail))
        if self.strict:
            raise DataError(str(self.problems[-1]))

    def summary(self, limit: int = 20) -> str:
        """A few lines for people: totals, then problems by kind, then the first `limit` of them by place."""
        skipped = ", ".join(f"{n} {kind}" for kind, n in sorted(self.skipped.items()))
        lines = [f"{self.documents:,} documents, {self.characters:,} characters from {self.files:,} files"
                 + (f"; skipped {skipped}" if skipped else "")]
        if self.problems:
            kinds = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common())
            lines += [f"{len(self.problems):,} problems: {kinds}", *(f"  {p}" for p in self.problems[:limit])]
        if len(self.problems) > limit:
            lines.append(f"  … and {len(self.problems) - limit:,} more")
        return "\n".join(lines)


def read_documents(paths: Sequence[str | Path], report: ReadReport) -> Iterator[Document]:
    """Every document of `paths`, in their order, folders sorted; a pure function of the files.

    Raises NotFoundError for a path that does not exist, DataError for a folder without a readable file, when nothing
    at all can be read, and, if the report is strict, at the first problem.
    """
    before = report.documents
    _must_exist(paths)
    for path in map(Path, paths):
        start, seen = report.documents, len(report.problems)
        for file in list_files([path], report):
            for document in _read(file, report, named=file == path):
                report.documents += 1
                report.characters += len(document.text)
                yield document
        if path.is_dir() and report.documents == start:
            why = "".join(f"; {problem}" for problem in report.problems[seen:][:1])
            raise DataError(f"{path}: the folder holds no readable text{why}")
    if report.documents == before:
        raise DataError("nothing to read" + "".join(f"; {problem}" for problem in report.problems[:3]))


def list_files(paths: Sequence[str | Path], report: ReadReport | None = None) -> Iterator[Path]:
    """The files under `paths` in reading order; hidden ones inside folders are left out and counted in `report`."""
    _must_exist(paths)
    for path in map(Path, paths):
        if path.is_file():
            yield path
        for folder, folders, names in os.walk(path):
            hidden = [name for name in folders + names if name.startswith(".")]
            if hidden and report is not None:
                report.skipped["hidden"] += len(hidden)
            folders[:] = sorted(set(folders) - set(hidden))
            yield from filter(Path.is_file, (Path(folder, name) for name in sorted(set(names) - set(hidden))))


def _must_exist(paths: Sequence[str | Path]) -> None:
    for path in map(Path, paths):
        if not path.is_file() and not path.is_dir():
            raise NotFoundError(f"{path}: no such file or folder")


def _read(path: Path, report: ReadReport, *, named: bool) -> Iterator[Document]:
    kind = path.with_suffix("") if path.suffix == ".gz" else path
    read = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json}.get(kind.suffix.lower(), _read_text)
    try:
        with path.open("rb") as raw:
            file = cast(BinaryIO, gzip.open(raw)) if path.suffix == ".gz" else raw  # noqa: SIM115 - `raw` is closed
            head = file.read(8192)
            file.seek(0)
            if b"\0" in head and not named:
                report.skipped["binary"] += 1
            elif b"\0" in head:
                report.problem(str(path), None, "binary", "a NUL byte near its beginning")
            elif not head.strip():
                report.problem(str(path), None, "empty")
            else:
                report.files += 1
                yield from read(file, str(path), report)
    except (OSError, EOFError, zlib.error) as error:  # no permission, a directory that vanished, damaged gzip
        report.problem(str(path), None, "unreadable", str(error))


def _decode(data: bytes, source: str, line: int | None, report: ReadReport, offset: int = 0) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        report.problem(source, line, "not UTF-8", f"byte 0x{data[error.start]:02x} at offset {offset + error.start:,}")
        return None


def _read_text(file: BinaryIO, source: str, report: ReadReport) -> Iterator[Document]:
    offset = 0
    while piece := file.read(PIECE_BYTES) + file.readline():
        text = _decode(piece, source, None, report, offset)
        if text is None:
            return  # what follows a damaged place cannot be trusted either
        text = text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(piece)
        if text.strip():
            yield Document(text, source)


def _read_lines(file: BinaryIO, source: str, report: ReadReport) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, source, number, report)
        if text is not None:
            yield from _parse(text, source, number, report)


def _read_json(file: BinaryIO, source: str, report: ReadReport) -> Iterator[Document]:
    text = _decode(file.read().removeprefix(b"\xef\xbb\xbf"), source, None, report)
    if text is not None:
        yield from _parse(text, source, None, report)


def _parse(text: str, source: str, line: int | None, report: ReadReport) -> Iterator[Document]:
    """The documents of one line, or of a whole .json file (where a list without roles is a list of records)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        report.problem(source, line, "not JSON", str(error))
        return
    whole = line is None and isinstance(value, list) and not all(_is_turn(item) for item in value)
    for number, record in enumerate(value, 1) if whole else [(line, value)]:
        try:
            for body, turns in _record(record):
                if lone := re.search("[\ud800-\udfff]", body):
                    raise DataError(f"a lone surrogate {lone[0]!r}, which UTF-8 cannot hold")
                yield Document(body, source, number, turns)
        except DataError as error:
            report.problem(source, number, "unusable record", str(error))


def _record(record: Any) -> list[tuple[str, Turns]]:
    """(text, turns) of one record; more than one where it holds several instances. Raises DataError, saying why not."""
    if isinstance(record, str):
        record = {"text": record}
    if isinstance(record, list):
        return [_conversation(record)]
    if not isinstance(record, Mapping):
        raise DataError(f"must be an object, a list of turns or a string, got {type(record).__name__}")
    keys = {str(key).lower(): value for key, value in record.items()}
    if isinstance(keys.get("text"), str):
        parts = [keys["text"], _part(keys.get("code"))]  # MBPP has the task under `text` and its solution under `code`
    elif said := [keys[key] for key in CONVERSATIONS if isinstance(keys.get(key), list)]:
        return [_conversation(said[0])]
    elif isinstance(keys.get("instances"), list):  # self-instruct: one instruction, several inputs and outputs
        rest = {key: value for key, value in keys.items() if key != "instances"}
        return [pair for instance in keys["instances"] if isinstance(instance, Mapping)
                for pair in _record({**rest, **instance})]
    else:
        asked, answered = ([_part(keys.get(key)) for key in names] for names in (ASKING, ANSWERING))
        if not (any(asked) and any(answered)):
            names = ", ".join(sorted(keys)[:12]) + (", …" if len(keys) > 12 else "")
            raise DataError(f"no text, and no filled question and answer, under a known key; it has {names or 'none'}")
        parts = asked + answered
    text = ""
    for part in filter(None, parts):
        text += part if not text or text.endswith("\n") else "\n" + part
    if not text.strip():
        raise DataError("the text is empty")
    return [(text, ())]


def _part(value: Any) -> str:
    """A value as text; choices become a line each; what is nested deeper is not text."""
    if isinstance(value, Mapping):
        value = [f"{key}. {item}" for key, item in value.items() if not isinstance(item, list | dict)]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else ""


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _conversation(turns: list[Any]) -> tuple[str, Turns]:
    """Turns as {role, content}, as {from, value}, or as strings that alternate between user and assistant."""
    out: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            role, text = ("assistant" if number % 2 else "user"), turn
        elif _is_turn(turn):
            role = ROLES.get(str(turn.get("role", turn.get("from"))).lower(), "")
            text = turn.get("content", turn.get("value"))
        else:
            raise DataError(f"turn {number + 1} has neither role and content nor from and value")
        if not role:
            raise DataError(f"turn {number + 1} has role {turn.get('role', turn.get('from'))!r}, "
                            f"must be one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise DataError(f"turn {number + 1} has no text")
        out.append((role, text))
    if not any(text.strip() for _, text in out):
        raise DataError("the conversation is empty")
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in out), tuple(out)
