"""What every benchmark shares: alternate the contenders, take medians, print a table, write a dated result.

Machines are shared and noisy, so contenders run in turn (A B C, A B C, …) and are compared by the median of their
round-by-round ratios, next to the median of each. A round during which the host took the processors away for a while
(Linux counts that: "steal") is measured again; how much it took in the rounds that count is in the result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

# As `make bench` and every command of `deepseek` have it, for all contenders: a worker's threads spin for a short time
# while they wait. Read when a worker imports torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

RESULTS = Path(__file__).parent / "results"
Round = TypeVar("Round")


Build = Callable[[str, int], Callable[[], object]]  # (name of the contender, threads) -> one unit of its work


DISTURBED = 0.03  # share of the processors' time that the host may take in a round


def stolen() -> tuple[int, int]:
    """(processor time that the host took away, all processor time) since start, in ticks; (0, 1) if nobody counts."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0, 1
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


def quiet_rounds(rounds: int, one: Callable[[], Round]) -> tuple[list[Round], list[float]]:
    """(results of `rounds` rounds in their order, share of time stolen in each). A disturbed round is measured again,
    three times as many rounds in all at most; then the least disturbed ones count."""
    tried: list[tuple[float, int, Round]] = []
    while len(tried) < 3 * rounds and sum(share <= DISTURBED for share, _, _ in tried) < rounds:
        before = stolen()
        result = one()
        share = (stolen()[0] - before[0]) / max(stolen()[1] - before[1], 1)
        verdict = "to be repeated" if share > DISTURBED else "counts"
        print(f"  round {len(tried) + 1}: the host took {share:.1%}; {verdict}", flush=True)
        tried.append((share, len(tried), result))
    kept = sorted(sorted(tried, key=lambda t: t[0] > DISTURBED and t[0])[:rounds], key=lambda t: t[1])
    return [result for _, _, result in kept], [share for share, _, _ in kept]


class Worker:
    """What `make(*args)` returns, in a process of its own, so that no contender inherits another's heap or thread pool.
    Calling it calls that. Raises EOFError if the process died."""

    def __init__(self, make: Callable[..., Callable[..., Any]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, args, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *args: Any) -> Any:
        self._pipe.send(args)
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(make: Callable[..., Callable[..., Any]], args: tuple[Any, ...], calls: Connection) -> None:
    work = make(*args)
    while (given := calls.recv()) is not None:
        calls.send(work(*given))


def _timed(build: Build, name: str, threads: int) -> Callable[[], float]:
    torch.set_num_threads(threads)
    work = build(name, threads)

    def run() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


def alternate(
    build: Build, names: Sequence[str], threads: int, rounds: int, warmup: int = 2
) -> tuple[dict[str, list[float]], list[float]]:
    """(seconds of every contender in every round, share of time stolen in each). One works at a time."""
    workers = {name: Worker(_timed, build, name, threads) for name in names}

    def one() -> dict[str, float]:
        took = {}
        for name, worker in workers.items():
            took[name] = worker()
            print(f"  {name:<34}{took[name]:8.2f} s", flush=True)
        return took

    for _ in range(warmup):
        one()
    kept, shares = quiet_rounds(rounds, one)
    for worker in workers.values():
        worker.stop()
    return {name: [took[name] for took in kept] for name in names}, shares


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def gemm_gflops(size: int = 2048, tries: int = 5) -> float:
    """FP32 matrix product of this minute, GFLOP/s: the ceiling that shares are stated against."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(tries):
        began = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                flags = set(line.split(":", 1)[1].split())
    units = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags]
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": cpu, "units": units, "threads": threads, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
            "gpu": gpu, "python": platform.python_version()}


def versions(*packages: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


def table(rows: list[list[str]]) -> str:
    """Rows (the first is the head) as a Markdown table."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_result(name: str, text: str, data: dict[str, Any], keep: bool = True) -> Path:
    """results/NAME-DATE.md for people and .json beside it for programs. keep: else it is printed only."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = RESULTS / f"{name}-{day}.md"
    if not keep:
        print(f"\n{text}\n\nnot written: this was not the whole benchmark on the fetched data")
        return path
    RESULTS.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten to {path.relative_to(Path(__file__).parent.parent)}")
    return path


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser
