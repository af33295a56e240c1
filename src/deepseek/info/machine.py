"""The machine at hand: processor, memory, measured read bandwidth, GPUs; container limits count."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ..memory import cgroups, ram


@dataclass(frozen=True)
class Gpu:
    """One GPU: bytes, and bytes a second read from its memory (measured). cache: its last level's bytes."""

    name: str
    memory: int
    available: int
    bandwidth: float
    cache: int = 0


@dataclass(frozen=True)
class Machine:
    """One machine: bytes, and bytes a second read from main memory by all cores at once (measured).

    `memory` and `cores_available` are what this process may use: container limits and CPU affinity count. cache: bytes
    of the last level, 0 where unknown.
    """

    cpu: str
    cores_physical: int
    cores_available: int
    memory: int
    available: int
    bandwidth: float
    cache: int = 0
    instructions: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    disk_free: int = 0


def measure_machine(folder: str | Path = ".") -> Machine:
    """Look at this machine and read its memory for about half a second, beside whatever else it is doing.

    `folder` says which disk is meant.
    """
    import psutil
    import torch

    (cpu, instructions), (memory, available) = _cpu(), ram()
    cores, cache = count_cores(), _last_level_cache()
    size = min(max(256 << 20, 2 * cache), 2 << 30, available // 4)
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        bandwidth = read_bandwidth(f"cuda:{index}", min(4 << 30, free // 4))
        properties = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(properties.name, total, free, bandwidth, properties.L2_cache_size))
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        bandwidth = read_bandwidth("cpu", size)
    finally:
        torch.set_num_threads(threads)
    return Machine(
        cpu, psutil.cpu_count(logical=False) or cores, cores, memory, available, bandwidth, cache, instructions,
        tuple(gpus), shutil.disk_usage(folder).free)


def read_bandwidth(device: str, size: int, seconds: float = 0.4) -> float:
    """Bytes a second: the fastest of at least three sums over `size` bytes (neighbours can only slow a pass down)."""
    import torch

    numbers = torch.ones(size // 8, dtype=torch.int64, device=device)  # not zeros: their pages may not exist yet
    passes: list[float] = []
    end = time.perf_counter() + seconds
    while len(passes) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        numbers.sum().item()  # waits for a GPU as well
        passes.append(time.perf_counter() - start)
    return numbers.nbytes / min(passes)


def _cpu() -> tuple[str, tuple[str, ...]]:
    """The processor's name, and its instruction sets that matter for 4-bit, 8-bit and BF16 products (Linux only)."""
    path, facts = Path("/proc/cpuinfo"), {}
    if path.exists():
        first = path.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    sets = {"avx2": {"avx2"}, "avx512": {"avx512f"}, "vnni": {"avx512_vnni", "avx_vnni"}, "amx": {"amx_tile"},
            "bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "neon": {"asimd"}, "i8mm": {"i8mm"}}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, tuple(name for name, any_of in sets.items() if flags & any_of)


def _last_level_cache() -> int:
    """Bytes of the largest cache level, all of its instances together (Linux; 0 elsewhere)."""
    sizes: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        if match := re.fullmatch(r"(\d+)([KMG])", (index / "size").read_text().strip()):
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            sizes[level, shared] = int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]]
    top = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == top)


def count_cores() -> int:
    """Cores that this process may use: affinity, and a container's quota rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [path.read_text().split() for path in cgroups("cpu", "cpu.max")]
    quotas += [[path.read_text().strip(), path.with_name("cpu.cfs_period_us").read_text().strip()]
               for path in cgroups("cpu", "cpu.cfs_quota_us")]
    for quota, period in quotas:
        if quota.isdecimal():  # no limit reads "max" or -1
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)
