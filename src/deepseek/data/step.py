"""What the steps of the pipeline share: a folder that appears whole, remembers what it was made of, and is not made
twice."""

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

FORMAT = 2  # of what is read from records: another one makes every step run again
FILE = "step.json"

Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Done:
    """What a step left behind. ran: False where it was there already. seconds: what it took when it ran."""

    folder: Path
    ran: bool
    seconds: float
    counts: Mapping[str, Any]


def run_step(name: str, out: str | Path, given: list[Any], work: Callable[[Path], dict[str, Any]]) -> Done:
    """Let `work` fill an empty folder that then takes the place of `out`, unless `out` was made of the same `given`.

    What an earlier run left when it was killed is removed. Raises ConfigError where another process is at it.
    """
    out = Path(out)
    fingerprint = hashlib.sha256(json.dumps([FORMAT, name, given], default=str).encode()).hexdigest()
    if (known := about(out)) and known.get("fingerprint") == fingerprint:
        return Done(out, False, known["seconds"], known["counts"])
    if out.exists() and not known and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty and not the result of a step; it is left alone")
    with locked(out):
        for stale in out.parent.iterdir():
            if re.fullmatch(rf"\.{{1,2}}{re.escape(out.name)}(\.[0-9a-f]{{8}}){{1,2}}", stale.name) and stale.is_dir():
                shutil.rmtree(stale)
        began = time.perf_counter()
        unfinished = f"{out} is not written, as its step was not finished; the steps before it are kept"
        with kept(unfinished), replace_folder(out) as staging:
            counts = work(staging)
            seconds = time.perf_counter() - began
            write_json(staging / FILE, {"step": name, "fingerprint": fingerprint, "seconds": round(seconds, 3),
                                        "counts": counts})
    return Done(out, True, seconds, counts)


def about(folder: str | Path) -> dict[str, Any]:
    """The step.json of a folder, {} where there is none."""
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and {"step", "fingerprint", "seconds", "counts"} <= set(found) else {}
    except (OSError, ValueError):
        return {}


def input_fingerprint(folder: str | Path) -> Any:
    """What identifies the records of a folder: the fingerprint of the step that made it, else its files. Raises
    NotFoundError where it holds no records."""
    files = record_files(folder)
    if found := about(folder):
        return found["fingerprint"]
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Given], Result], items: Iterator[Given], ahead: int
) -> Iterator[Result]:
    """`pool.map` that reads no more than `ahead` items in advance."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
