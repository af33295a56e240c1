"""How much memory this process may use, within a container's limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError


def cgroups(controller: str, file: str) -> Iterator[Path]:
    """The files of this process's control group and of those above it, version 2 or 1, that exist."""
    table = Path("/proc/self/cgroup")
    for line in table.read_text().splitlines() if table.exists() else ():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controllers and controller)
        group = root / inside.lstrip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(root) and (folder / file).exists():
                yield folder / file


def ram() -> tuple[int, int]:
    """(total, available) bytes, within a container's limits; page cache that can be dropped counts as available."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    files = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
    for limit_file, usage_file in files.items():
        for path in cgroups("memory", limit_file):
            limit = path.read_text().strip()
            if limit.isdecimal() and int(limit) < memory.total:
                used = int(path.with_name(usage_file).read_text())
                stat = dict(line.split() for line in path.with_name("memory.stat").read_text().splitlines())
                dropped = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                total, available = min(total, int(limit)), min(available, int(limit) - used + dropped)
    return total, max(available, 0)


def check_memory(needed: int, what: str) -> None:
    """Raises ConfigError where `what` needs more bytes than there are, before they are allocated."""
    if needed > (total := ram()[0]):
        raise ConfigError(f"{what}: needs {needed / 2**30:,.1f} GiB of memory, this machine has {total / 2**30:,.1f}")
