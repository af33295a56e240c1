"""Files -> documents. What cannot be read is reported by file and line.

    *.jsonl, *.ndjson   one record a line
    *.json              one record, or a list of them
    *.csv, *.tsv        a row a record, named by its first row (or numbered: see RecordMap.header)
    *.parquet           a row a record
    anything else       text or code: one document a file (a large file comes in pieces, cut at line ends)
    *.gz, *.zst         any of these but Parquet, compressed
    a folder            its files, recursively, sorted by name, without hidden and binary ones
    a pattern           such as data/law/*.jsonl (** for folders between): what it matches, sorted by name
    hf:NAME[:SPLIT]     a data set of the `datasets` library, on the hub or saved in the folder NAME; split `train`

Records are parsed by record_formats.py.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import ConfigError, DataError, NotFoundError
from ..files import to_json
from .mapping import RecordMap
from .record_formats import known_keys, parse_record
from .records import COLUMNS, Document, collect, to_documents
from .turns import is_turn

PIECE_BYTES = 4 << 20
NOT_LEARNT = "records that ask not to be learnt"
UNUSED_KEYS = 2000  # that are counted at most: some data have a new one in every record
ROWS = 10_000  # of a Parquet file in memory at a time
Named = Mapping[str, Sequence["str | Path"]]  # expert name -> its files and folders


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
    """What was read and what was not. skipped: files and records by kind. unused: keys of records that mean nothing
    here. strict: raise DataError at the first problem."""

    strict: bool = False
    files: int = 0
    documents: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Problems by reason."""
        return Counter(problem.reason for problem in self.problems)

    def problem(self, source: str, line: int | None, reason: str, detail: str = "", raw: str = "") -> None:
        """Note a problem; raises DataError where the report is strict. raw: the record as it stands in the file."""
        self.problems.append(Problem(source, line, reason, detail))
        if self.strict:
            raise DataError(str(self.problems[-1]))

    def notes(self, most: int = 12) -> list[str]:
        """Return a line about keys that were not used, if there were any."""
        if not self.unused:
            return []
        listed = ", ".join(f"{key} ({count:,})" for key, count in self.unused.most_common(most))
        return [f"keys of records that were not used: {listed}" + (", …" if len(self.unused) > most else "")]

    def summary(self, limit: int = 20) -> str:
        """Format a few lines: totals, then problems by kind, then the first `limit` of them by place."""
        skipped = ", ".join(f"{n} {kind}" for kind, n in sorted(self.skipped.items()))
        lines = [f"{self.documents:,} documents, {self.characters:,} characters from {self.files:,} files"
                 + (f"; skipped {skipped}" if skipped else "")]
        lines += self.notes()
        if self.problems:
            kinds = ", ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common())
            lines += [f"{len(self.problems):,} problems: {kinds}", *(f"  {p}" for p in self.problems[:limit])]
        if len(self.problems) > limit:
            lines.append(f"  … and {len(self.problems) - limit:,} more")
        return "\n".join(lines)


def read_documents(
    paths: Sequence[str | Path] | Named, report: ReadReport, mapping: RecordMap | None = None
) -> Iterator[Document]:
    """Read the documents of `paths`, in their order, folders sorted; a pure function of the files. Paths under the name
    of an expert give documents with that name. mapping: what the columns of records are, where their names do not say
    it.

    Raises NotFoundError for a path that does not exist, DataError for a folder without a readable file, when nothing
    at all can be read, and, if the report is strict, at the first problem.
    """
    if isinstance(paths, Mapping):
        for places in paths.values():
            _must_exist(places)
        for name, places in paths.items():
            yield from (replace(document, expert=name or document.expert)
                        for document in read_documents(places, report, mapping))
        return
    before = report.documents
    _must_exist(paths)
    for path in paths:
        start, seen = report.documents, len(report.problems)
        if is_hub(path):
            report.files += 1
            yield from _count(_documents(enumerate(_hub(path), 1), str(path), report, mapping), report)
        else:
            for file in list_files([path], report):
                yield from _count(read_file(file, report, mapping, named=file == Path(path)), report)
        if report.documents == start and Path(path).is_dir():
            why = "".join(f"; {problem}" for problem in report.problems[seen:][:1])
            raise DataError(f"{path}: the folder holds no readable text{why}")
    if report.documents == before:
        raise DataError("nothing to read" + "".join(f"; {problem}" for problem in report.problems[:3]))


def _count(documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    for document in documents:
        report.documents += 1
        report.characters += len(document.text)
        yield document


def list_files(paths: Sequence[str | Path], report: ReadReport | None = None) -> Iterator[Path]:
    """List the files under `paths` in reading order, those behind a hub id included; hidden ones inside folders are
    left out and counted in `report`."""
    _must_exist(paths)
    for place in paths:
        if is_hub(place):
            yield from (Path(file["filename"]) for file in _hub(place).cache_files)
        for path in map(Path, [] if is_hub(place) else _matches(place)):
            if path.is_file():
                yield path
            for folder, folders, names in os.walk(path):
                hidden = [name for name in folders + names if name.startswith(".")]
                if hidden and report is not None:
                    report.skipped["hidden"] += len(hidden)
                folders[:] = sorted(set(folders) - set(hidden))
                yield from filter(Path.is_file, (Path(folder, name) for name in sorted(set(names) - set(hidden))))


def is_hub(path: str | Path) -> bool:
    """Say whether this names a data set of the `datasets` library rather than files."""
    return str(path).startswith("hf:")


def _matches(path: str | Path) -> list[str]:
    """The path itself where it exists, else what it matches as a pattern."""
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        return [str(path)]
    return sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - pathlib takes no absolute pattern


def _must_exist(paths: Sequence[str | Path]) -> None:
    for path in paths:
        if is_hub(path):
            continue
        if not (found := _matches(path)):
            raise NotFoundError(f"{path}: matches no file")
        for one in map(Path, found):
            if not one.is_file() and not one.is_dir():
                raise NotFoundError(f"{one}: no such file or folder")


# ---- one file ---------------------------------------------------------------------------------------------------


def read_file(path: Path, report: ReadReport, mapping: RecordMap | None = None, *, named: bool) -> Iterator[Document]:
    """Read the documents of one file. named: the user gave this very path, so that a binary file is a problem."""
    name = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    kind = name.suffix.lower()
    try:
        if kind == ".parquet":
            report.files += 1
            yield from _read_parquet(path, report, mapping)
            return
        with path.open("rb") as raw:
            file = _uncompressed(raw, path.suffix)
            head = file.read(8192)
            if b"\0" in head and not named:
                report.skipped["binary"] += 1
            elif b"\0" in head:
                report.problem(str(path), None, "binary", "a NUL byte near its beginning")
            elif not head.strip():
                report.problem(str(path), None, "empty")
            else:
                raw.seek(0)
                file = _uncompressed(raw, path.suffix)
                report.files += 1
                if kind in (".jsonl", ".ndjson"):
                    yield from read_lines(enumerate(file, 1), str(path), report, mapping)
                elif kind == ".json":
                    yield from _read_json(file, str(path), report, mapping)
                elif kind in (".csv", ".tsv"):
                    yield from _read_table(file, str(path), report, mapping, "\t" if kind == ".tsv" else ",")
                else:
                    yield from _read_text(file, str(path), report)
    except (OSError, EOFError, zlib.error) as error:  # no permission, a directory that vanished, damaged gzip
        report.problem(str(path), None, "unreadable", str(error))


def _uncompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if suffix == ".zst":
        import zstandard

        return cast(BinaryIO, io.BufferedReader(_Zst(zstandard.ZstdDecompressor().stream_reader(
            raw, read_across_frames=True, closefd=False))))
    return raw


class _Zst(io.RawIOBase):
    """A zstandard stream whose damage is an OSError, as gzip's is."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return int(self.stream.readinto(buffer))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None


def _decode(data: bytes, source: str, line: int | None, report: ReadReport, offset: int = 0) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        report.problem(source, line, "not UTF-8", f"byte 0x{data[error.start]:02x} at offset {offset + error.start:,}",
                       "" if line is None else data.decode("utf-8", "backslashreplace").rstrip("\r\n"))
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


def read_lines(
    lines: Iterable[tuple[int, bytes]], source: str, report: ReadReport, mapping: RecordMap | None = None
) -> Iterator[Document]:
    """Read the documents of numbered lines of JSON; blank lines are skipped."""
    for number, line in lines:
        if not line.strip():
            continue
        text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, source, number, report)
        if text is None:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            report.problem(source, number, "not JSON", str(error), text.rstrip("\r\n"))
            continue
        try:
            yield from documents_of(value, source, number, report, mapping)
        except DataError as error:
            report.problem(source, number, "unusable record", str(error), text.rstrip("\r\n"))


def _read_json(
    file: BinaryIO, source: str, report: ReadReport, mapping: RecordMap | None
) -> Iterator[Document]:
    """Read one record or a list of records from a JSON file (a list of turns is one record)."""
    text = _decode(file.read().removeprefix(b"\xef\xbb\xbf"), source, None, report)
    if text is None:
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        report.problem(source, None, "not JSON", str(error))
        return
    whole = isinstance(value, list) and not all(is_turn(item) for item in value)
    yield from _documents(enumerate(value, 1) if whole else [(None, value)], source, report, mapping)


def _documents(
    records: Iterable[tuple[int | None, Any]], source: str, report: ReadReport, mapping: RecordMap | None
) -> Iterator[Document]:
    for number, record in records:
        try:
            yield from documents_of(record, source, number, report, mapping)
        except DataError as error:
            raw = to_json(record, ensure_ascii=False, default=str)
            report.problem(source, number, "unusable record", str(error), raw)


def documents_of(
    record: Any, source: str, number: int | None, report: ReadReport, mapping: RecordMap | None = None
) -> list[Document]:
    """The documents of one record, which is counted in `report` where it asks to be left out, as are its keys that mean
    nothing. Raises DataError where it cannot be used."""
    found = parse_record(record, mapping)
    if not found:
        report.skipped[NOT_LEARNT] += 1
    for one in found:
        report.unused.update(one.unused)
    if len(report.unused) > UNUSED_KEYS:
        report.unused = Counter(dict(report.unused.most_common(UNUSED_KEYS // 2)))
    return [Document(one.text, source, number, one.turns, one.expert, one.metadata, one.response_start)
            for one in found]


# ---- tables -----------------------------------------------------------------------------------------------------


def _read_table(
    file: BinaryIO, source: str, report: ReadReport, mapping: RecordMap | None, delimiter: str
) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize >> 32)
    rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    at = [1]  # the line where the current row begins

    def numbered() -> Iterator[tuple[int, list[str]]]:
        while True:
            try:
                row = next(rows, None)
            except (csv.Error, UnicodeDecodeError) as error:
                what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not CSV"
                report.problem(source, None, what, f"after line {rows.line_num}: {error}")
                return
            if row is None:
                return
            if row:
                yield at[0], row
            at[0] = rows.line_num + 1

    table = numbered()
    if (first := next(table, None)) is None:
        return
    names = [name.strip() for name in first[1]]
    if mapping is not None:
        header = mapping.header if mapping.header is not None else not all(isinstance(c, int) for c in mapping.columns)
    else:
        header = known_keys(names)
    before: list[tuple[int, list[str]]] = []
    if not header:
        before, names = [first], [str(i) for i in range(len(names))]
        if mapping is None and len(names) == 6 and first[1][5] in ("A", "B", "C", "D"):
            names = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]  # MMLU as first published
        elif mapping is None:
            report.problem(source, None, "unusable table", "no column is known; say with a map which is what; the "
                           f"first row is {', '.join(first[1])[:120]}")
            return

    def records() -> Iterator[tuple[int, Any]]:
        for part in (before, table):
            for line, row in part:
                if len(row) == len(names):
                    yield line, dict(zip(names, row, strict=True))
                else:
                    report.problem(source, line, "unusable record", f"{len(row)} columns, must be {len(names)}",
                                   delimiter.join(row))

    yield from _documents(records(), source, report, mapping)


def _read_parquet(path: Path, report: ReadReport, mapping: RecordMap | None) -> Iterator[Document]:
    import polars

    try:
        table = polars.scan_parquet(path)
        names, rows = table.collect_schema().names(), collect(table.select(polars.len())).item()
        for start in range(0, rows, ROWS):
            part = collect(table.slice(start, ROWS))
            if mapping is None and set(COLUMNS) <= set(names):  # what a step of the pipeline wrote
                yield from to_documents(part)
            else:
                yield from _documents(enumerate(part.iter_rows(named=True), start + 1), str(path), report, mapping)
    except polars.exceptions.PolarsError as error:
        raise OSError(str(error)) from None


def _hub(name: str | Path) -> Any:
    """The data set behind hf:NAME[:SPLIT]."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{name}: needs the datasets library: pip install 'moe-dr[datasets]'") from None
    place, _, split = str(name).removeprefix("hf:").partition(":")
    try:
        if Path(place, "state.json").is_file() or Path(place, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(place)
            if isinstance(found, datasets.DatasetDict):
                if (split or "train") not in found:
                    raise ValueError(f"split = {split or 'train'!r}: must be one of {', '.join(found)}")
                return found[split or "train"]
            return found
        return datasets.load_dataset(place, split=split or "train")
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(f"{name}: {' '.join(str(error).split())}") from None
