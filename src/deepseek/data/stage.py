"""What the stages of the pipeline share: each writes a folder atomically, with a fingerprint of its input and settings,
and is skipped where that folder already exists."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from ..files import locked, replace_folder, write_json
from ..interrupts import kept
from .records import record_files

FORMAT = 2  # of what is read from records: another one makes every stage run again
FILE = "step.json"

Given = TypeVar("Given")
Result = TypeVar("Result")
Progress = Callable[[int], None]  # called with the number of records so far


@dataclass(frozen=True)
class StageResult:
    """The output of a stage. ran: False where it already existed. seconds: wall time of the run that made it."""

    folder: Path
    ran: bool
    seconds: float
    counts: Mapping[str, Any]


def run_stage(name: str, out: str | Path, given: list[Any], work: Callable[[Path], dict[str, Any]]) -> StageResult:
    """Run `work` on an empty folder, which then replaces `out`; skip it where `out` was made of the same `given`.

    Removes what a killed run left. Raises ConfigError where another process is writing `out`, DataError where
    `out` holds anything but the result of a stage.
    """
    out = Path(out)
    fingerprint = hashlib.sha256(json.dumps([FORMAT, name, given], default=str).encode()).hexdigest()
    if (known := about(out)) and known.get("fingerprint") == fingerprint:
        return StageResult(out, False, known["seconds"], known["counts"])
    if out.exists() and not known and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty and not the result of a stage; it is left alone")
    with locked(out):
        for stale in out.parent.iterdir():
            if re.fullmatch(rf"\.{{1,2}}{re.escape(out.name)}(\.[0-9a-f]{{8}}){{1,2}}", stale.name) and stale.is_dir():
                shutil.rmtree(stale)
        began = time.perf_counter()
        unfinished = f"{out} is not written, as its stage was not finished; the stages before it are kept"
        with kept(unfinished), replace_folder(out) as staging:
            counts = work(staging)
            seconds = time.perf_counter() - began
            write_json(staging / FILE, {"step": name, "fingerprint": fingerprint, "seconds": round(seconds, 3),
                                        "counts": counts})
    return StageResult(out, True, seconds, counts)


def about(folder: str | Path) -> dict[str, Any]:
    """Contents of a folder's step.json, {} where there is none."""
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and {"step", "fingerprint", "seconds", "counts"} <= set(found) else {}
    except (OSError, ValueError):
        return {}


def input_fingerprint(folder: str | Path) -> Any:
    """Identify the records of a folder by the fingerprint of the stage that made it, else by paths, sizes and times of
    its files. Raises NotFoundError where it holds no records."""
    files = record_files(folder)
    if found := about(folder):
        return found["fingerprint"]
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def ordered_map(
    pool: ThreadPoolExecutor, work: Callable[[Given], Result], items: Iterator[Given], ahead: int
) -> Iterator[Result]:
    """Map `work` over `items` like `pool.map`, reading at most `ahead` items in advance."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
