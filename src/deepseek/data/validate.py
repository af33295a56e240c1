"""Files -> records in Parquet and a quarantine, on several processes.

The unit of work is a file, or UNIT bytes of a large file of lines; each writes its own parts and its own quarantine,
which are laid in reading order. So the result does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ..errors import DataError
from ..files import to_json
from .mapping import RecordMap
from .reader import UNUSED_KEYS, Named, ReadReport, is_hub, list_files, read_documents, read_file, read_lines
from .records import Document, Parts, to_table
from .settings import ValidateSettings

if TYPE_CHECKING:
    import polars

    from .stage import Progress

UNIT = 32 << 20
SMALL = 64 << 20  # bytes of input below which one process is quicker than two
BLOCK = 4096


class FilePart(NamedTuple):
    """A file, or the lines of it that begin in [start, end); lines count from first_line."""

    number: int
    name: str
    path: str
    named: bool
    start: int = 0
    end: int | None = None
    first_line: int = 1


@dataclass(frozen=True)
class Checks:
    settings: ValidateSettings
    experts: tuple[str, ...]
    mapping: RecordMap | None


class _Quarantine(ReadReport):
    """A report whose problems are lines of a file and counts, so that their number costs no memory."""

    def __init__(self, file: TextIO) -> None:
        super().__init__()
        self.file = file
        self.reasons: Counter[str] = Counter()

    def problem(self, source: str, line: int | None, reason: str, detail: str = "", raw: str = "") -> None:
        self.reasons[reason] += 1
        record = {"source": source, "line": line, "reason": reason, "detail": detail, "raw": raw}
        self.file.write(to_json(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n")
        if len(self.problems) < 3:
            super().problem(source, line, reason, detail)


def source_fingerprint(named: Named) -> list[Any]:
    """Names, paths, sizes and times of all files, those behind a hub id included."""
    return [(name, str(place), str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
            for name, places in named.items() for place in places for file in list_files([place])]


def read_all(
    named: Named, folder: Path, settings: ValidateSettings, experts: Sequence[str], mapping: RecordMap | None,
    workers: int, progress: Progress | None,
) -> dict[str, Any]:
    """Fill `folder`; the counts. Raises DataError for a place without a single usable record."""
    hidden = ReadReport()
    units, places = _units(named, hidden)
    checks = Checks(settings, tuple(experts), mapping)
    size = sum((unit.end or Path(unit.path).stat().st_size) - unit.start for unit in units if not is_hub(unit.path))
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    skipped = hidden.skipped
    unused: Counter[str] = Counter()
    kept_of: Counter[str] = Counter()
    first: dict[str, str] = {}

    def results() -> Iterator[dict[str, Any]]:
        if workers == 1 or size < SMALL:
            for unit in units:
                yield _read_unit(unit, folder, checks)
            return
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal,
                                 (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C is the parent's
            waiting = [pool.submit(_read_unit, unit, folder, checks) for unit in units]
            try:
                for future in waiting:
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    with (folder / "quarantine.jsonl").open("wb") as quarantine:
        for unit, found in zip(units, results(), strict=True):
            total.update({key: found[key] for key in ("kept", "characters", "files")})
            reasons.update(found["reasons"])
            skipped.update(found["skipped"])
            unused.update(found["unused"])
            kept_of[places[unit.number]] += found["kept"]
            if found["problems"]:
                first.setdefault(places[unit.number], found["problems"][0])
            part = folder / f"quarantine-{unit.number:05d}.jsonl"
            quarantine.write(part.read_bytes())
            part.unlink()
            if progress is not None:
                progress(total["kept"] + reasons.total())
    for place in dict.fromkeys(places):
        if not kept_of[place]:
            what = "the folder holds no usable record" if Path(place).is_dir() else "holds no usable record"
            raise DataError(f"{place}: {what}" + (f"; {first[place]}" if place in first else ""))
    return {"read": total["kept"] + reasons.total(), "kept": total["kept"], "quarantined": reasons.total(),
            "reasons": dict(reasons.most_common()), "files": total["files"], "skipped": dict(skipped),
            "unused": dict(unused.most_common(UNUSED_KEYS)),
            "characters": total["characters"]}


def _units(named: Named, report: ReadReport) -> tuple[list[FilePart], list[str]]:
    """(units, the place that the user gave for each)."""
    units: list[FilePart] = []
    places: list[str] = []
    for name, given in named.items():
        for place in given:
            before = len(units)
            if is_hub(place):
                units.append(FilePart(len(units), name, str(place), True))
            for path in [] if is_hub(place) else list_files([place], report):
                lines = path.suffix.lower() in (".jsonl", ".ndjson")
                named_ = path == Path(place)
                first_line, start, size = 1, 0, path.stat().st_size
                while lines and size - start > UNIT:
                    end, count = _cut(path, start)
                    units.append(FilePart(len(units), name, str(path), named_, start, end, first_line))
                    start, first_line = end, first_line + count
                if start < size or not start:
                    end_ = size if start else None
                    units.append(FilePart(len(units), name, str(path), named_, start, end_, first_line))
            if len(units) == before:
                raise DataError(f"{place}: the folder holds no file")
            places += [str(place)] * (len(units) - before)
    return units, places


def _cut(path: Path, start: int) -> tuple[int, int]:
    """(end of the line that begins before start + UNIT, lines up to there)."""
    with path.open("rb") as file:
        file.seek(start)
        count = file.read(UNIT).count(b"\n")
        rest = file.readline()
        return file.tell(), count + (1 if rest else 0)


def _read_unit(unit: FilePart, folder: Path, checks: Checks) -> dict[str, Any]:
    parts = Parts(folder, f"part-{unit.number:05d}")
    with (folder / f"quarantine-{unit.number:05d}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        report = _Quarantine(file)
        characters = 0
        documents = _documents(unit, report, checks)
        while block := list(islice(documents, BLOCK)):
            table = _checked(to_table(block), report, checks)
            characters += int(table["text"].str.len_chars().sum())
            parts.add(table)
        parts.close()
    return {"kept": parts.rows, "characters": characters, "files": report.files, "skipped": report.skipped,
            "unused": report.unused, "reasons": report.reasons,
            "problems": [str(problem) for problem in report.problems]}


def _documents(unit: FilePart, report: ReadReport, checks: Checks) -> Iterator[Document]:
    found: Iterator[Document]
    if is_hub(unit.path):
        found = read_documents([unit.path], report, checks.mapping)
    elif unit.end is None:
        found = read_file(Path(unit.path), report, checks.mapping, named=unit.named)
    else:
        report.files += unit.start == 0
        found = read_lines(_lines(unit), unit.path, report, checks.mapping)
    for document in found:
        yield replace(document, expert=unit.name) if unit.name else document


def _lines(unit: FilePart) -> Iterator[tuple[int, bytes]]:
    assert unit.end is not None
    with Path(unit.path).open("rb") as file:
        file.seek(unit.start)
        left, number = unit.end - unit.start, unit.first_line
        while left > 0:
            line = file.readline()
            yield number, line
            left, number = left - len(line), number + 1
            if not line:
                raise DataError(f"{unit.path}: became shorter while it was read")


def _checked(table: polars.DataFrame, report: ReadReport, checks: Checks) -> polars.DataFrame:
    """The rows that are good; the others are reported."""
    import polars as pl

    size, text, s = pl.col("text").str.len_chars(), pl.col("text"), checks.settings
    damage = text.str.count_matches(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd]") / size
    names = pl.col("expert").is_null() | (
        pl.col("expert").is_in(list(checks.experts)) if checks.experts
        else pl.col("expert").str.contains(r"^[\p{L}_][\p{L}\p{N}_]*$"))
    reason = (pl.when(size < s.min_characters).then(pl.lit("too short"))
              .when(size > s.max_characters).then(pl.lit("too long"))
              .when(damage > s.max_damage).then(pl.lit("damaged text"))
              .when(~names).then(pl.lit("unknown expert")))
    table = table.with_columns(reason.alias("reason"))
    detail = {"too short": lambda t, e: f"{len(t)} characters, must be at least {s.min_characters}",
              "too long": lambda t, e: f"{len(t):,} characters, must be at most {s.max_characters:,}",
              "damaged text": lambda t, e: "too many control or replacement characters",
              "unknown expert": lambda t, e: f"{e!r}, must be " + (
                  f"one of {', '.join(checks.experts)}" if checks.experts else "made of letters, digits and _")}
    bad = table.filter(pl.col("reason").is_not_null())
    for said, expert, source, line, why in bad.select("text", "expert", "source", "line", "reason").iter_rows():
        report.problem(source, line, why, detail[why](said, expert), said)
    return table.filter(pl.col("reason").is_null()).drop("reason")
