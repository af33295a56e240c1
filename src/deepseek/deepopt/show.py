"""A run as it goes, from its folder: what `deepseek watch RUN` shows. Reads files alone, imports no torch."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .run_folder import run_in
from .settings import IN_ROUNDS

RECENT = 20  # records that speeds and losses are means of
BAR = 40
GONE = 60.0  # seconds without a process in the run after which it has ended: those that died start again sooner


class RunView:
    """Follows the log of the run in `out`. Raises ConfigError where there is no run."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps: list[dict[str, Any]] = []  # records of steps or rounds
        self.held_out: list[dict[str, Any]] = []
        self._place, self._file = 0, 0  # read up to here, of the file with this number
        self._seen: float | None = None  # when a process was in the run

    def look(self) -> tuple[str, bool]:
        """(the view, whether the run may go on)."""
        if (run := run_in(self.out)) is None:
            raise ConfigError(f"{self.out}: holds no run (no settings.json)")
        self._read()
        train, now = run["train"], time.monotonic()
        step, steps = max((one["step"] for one in (*self.steps[-1:], *self.held_out[-1:])), default=0), train["steps"]
        busy = in_use(self.out)
        self._seen = now if busy else self._seen
        state = "running" if busy else "finished" if step >= steps else "stopped, or on another machine"
        more = bool(busy) or (step < steps and (self._seen is None or now - self._seen < GONE))
        seconds = time_left(self.steps[-RECENT:], steps - step)
        filled = round(BAR * step / steps)
        lines = [f"{self.out}: {state}", f"{'step':<12} {step:,} of {steps:,}  [{'#' * filled}{'.' * (BAR - filled)}]  "
                 f"{step / steps:.0%}" + (f", about {duration(seconds)} left" if seconds and busy else "")]
        return "\n".join(lines + table(self.steps[-RECENT:], self.held_out, train)), more

    def _read(self) -> None:
        """Take what has come since, or all anew where the log was cut back to a checkpoint."""
        try:
            file = (self.out / "log.jsonl").open("rb")
        except FileNotFoundError:
            return
        with file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._file or about.st_size < self._place:
                self._file, self._place = about.st_ino, 0
                self.steps.clear()
                self.held_out.clear()
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    break
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise CheckpointError(f"{file.name}: a line is not JSON: {error}") from None
                self._place += len(line)
                (self.steps if "loss" in record else self.held_out).append(record)


def table(steps: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], train: dict[str, Any]) -> list[str]:
    """Lines on the last records of steps, and on all evaluations."""
    rows: dict[str, str] = {}
    if steps:
        last = steps[-1]
        taken = _taken(steps)
        rows["loss"] = f"{last['loss']:.4f}, mean of the last {taken}: {_mean(steps, 'loss'):.4f}"
        rows["rate"] = f"lr {last['lr']:.3g}, gradient's norm {last['grad_norm']:.3g}, MaxVio {last['max_vio']:.2f}"
    if found := [one for one in held_out if "eval_loss" in one]:
        best = min(found, key=lambda one: one["eval_loss"])
        rows["held out"] = f"{found[-1]['eval_loss']:.4f} at step {found[-1]['step']:,}" + (
            "" if best is found[-1] else f", lowest {best['eval_loss']:.4f} at step {best['step']:,}")
        if "routing_accuracy" in found[-1]:
            rows["held out"] += f", routing accuracy {found[-1]['routing_accuracy']:.1%}"
    if speeds := [one["tokens_per_second"] for one in steps if one.get("tokens_per_second")]:
        rows["speed"] = f"{statistics.harmonic_mean(speeds):,.0f} tokens/s"
        if "efficiency" in steps[-1]:
            rows["speed"] += f", efficiency {_mean(steps, 'efficiency'):.1%}"
    if steps and "bytes_sent" in steps[-1]:
        rounds = train["compress"] in IN_ROUNDS
        rows["a rank sent"] = f"{steps[-1]['bytes_sent'] / 1e6:,.3f} MB in the last {'round' if rounds else 'step'}"
        if rounds:
            rows["a rank sent"] += f", received {steps[-1]['bytes_received'] / 1e6:,.3f} MB"
    if steps and "imbalance" in steps[-1]:
        rows["experts"] = f"the busiest rank has {steps[-1]['imbalance']:.2f} times the mean"
    for key, unit in (("steps", "steps"), ("shares", "batches")):
        if steps and key in steps[-1]:
            rows["ranks"] = ", ".join(f"{rank}: {count} {unit}" for rank, count in steps[-1][key].items())
    return [f"{name:<12} {text}" for name, text in rows.items()]


def time_left(steps: Sequence[dict[str, Any]], left: int) -> float | None:
    """Seconds that so many steps will take, by the last records; None where nothing is known."""
    timed = [(one, step) for one, step in zip(steps, _lengths(steps), strict=True) if "seconds" in one]
    return left * sum(one["seconds"] for one, _ in timed) / sum(step for _, step in timed) if timed else None


def in_use(out: Path) -> bool:
    """Whether a process of this machine trains in `out`, by the locks that the kernel lists."""
    files = [about for path in (*out.glob(".lock"), *out.glob(".lock-*")) if (about := path.stat())]
    held = {f"{os.major(one.st_dev):02x}:{os.minor(one.st_dev):02x}:{one.st_ino}" for one in files}
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any(word in held for line in lines for word in line.split())


def duration(seconds: float) -> str:
    """In words: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _lengths(steps: Sequence[dict[str, Any]]) -> list[int]:
    """How many steps of the schedule each record is about; the first of a round's is taken to be as the next."""
    lengths = [two["step"] - one["step"] for one, two in pairwise(steps)]
    first = lengths[0] if lengths else steps[0]["step"] if steps and "round" in steps[0] else 1
    return [first, *lengths][: len(steps)]


def _taken(steps: Sequence[dict[str, Any]]) -> str:
    return f"{len(steps)} {'round' if 'round' in steps[-1] else 'step'}{'s' * (len(steps) > 1)}"


def _mean(steps: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(one[key] for one in steps if key in one)
