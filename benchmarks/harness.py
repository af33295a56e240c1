"""What every benchmark shares: alternate the contenders, take medians, print a table, write a dated result.

Machines are shared and noisy, so contenders run in turn (A B C, A B C, …) and are compared by the median of their
round-by-round ratios, next to the median of each.
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
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


Build = Callable[[str, int], Callable[[], object]]  # (name of the contender, threads) -> one unit of its work


def _serve(build: Build, name: str, threads: int, calls: Connection) -> None:
    torch.set_num_threads(threads)
    work = build(name, threads)
    while calls.recv():
        began = time.perf_counter()
        work()
        calls.send(time.perf_counter() - began)


def alternate(build: Build, names: Sequence[str], threads: int, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every contender in every round. Each lives in a process of its own, so that none inherits another's
    heap or thread pool; one works at a time."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(build, name, threads, theirs), daemon=True))
        processes[-1].start()
    for turn in range(-warmup, rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            took = pipe.recv()
            if turn >= 0:
                seconds[name].append(took)
            print(f"  {'warm-up' if turn < 0 else f'round {turn + 1}'}  {name:<34}{took:8.2f} s", flush=True)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return seconds


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
            "gpu": gpu, "python": platform.python_version()}


def versions(*packages: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


def table(rows: list[list[str]]) -> str:
    """Rows (the first is the head) as a Markdown table."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_result(name: str, text: str, data: dict[str, Any]) -> Path:
    """results/NAME-DATE.md for people and .json beside it for programs."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{day}.md"
    path.write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten to {path.relative_to(Path(__file__).parent.parent)}")
    return path


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser
