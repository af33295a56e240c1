"""Samples the machine: processors, memory, energy, the GPU. What cannot be read is absent, never zero.

Energy: RAPL's counters under /sys/class/powercap (Linux, often readable by root alone), which run over at their own
maximum; NVML for the GPU, where the package pynvml is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from .metrics import MetricKey, key

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Rapl:
    """RAPL: joules of all packages since the first read. root: a folder like /sys/class/powercap."""

    root: Path = POWERCAP
    total: float = 0.0
    _last: dict[Path, int] = field(default_factory=dict)

    def read(self) -> float | None:
        """None where there is no counter that can be read. Only zones named `package-N` count: what else there is lies
        within them (cores) or around them (psys), or is not always there (DRAM)."""
        seen = False
        for zone in sorted(self.root.glob("*-rapl:[0-9]*")):
            try:
                if not (zone / "name").read_text().startswith("package"):
                    continue
                now = int((zone / "energy_uj").read_text())
                limit = int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue
            seen = True
            last = self._last.get(zone, now)
            self.total += ((now - last) if now >= last else now + limit - last) / 1e6
            self._last[zone] = now
        return self.total if seen else None


class MachineSampler:
    """Samples the machine; not thread-safe."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.rapl = Rapl(powercap)
        self.rapl.read()
        self.process = psutil.Process()
        self.process.cpu_percent()
        psutil.cpu_percent()
        self._gpu = _nvml()

    def read(self) -> dict[MetricKey, float]:
        """Ratios 0..1, bytes, joules since the start."""
        memory = psutil.virtual_memory()
        out: dict[MetricKey, float | None] = {
            key("cpu_ratio"): psutil.cpu_percent() / 100, key("process_cpus"): self.process.cpu_percent() / 100,
            key("resident_bytes"): float(self.process.memory_info().rss), key("memory_ratio"): memory.percent / 100,
            key("energy_joules_total", "cpu"): self.rapl.read()}
        if self._gpu is not None:
            out |= self._gpu()
        return {name: value for name, value in out.items() if value is not None}


def _nvml() -> Any:
    """A function that reads the first GPU; None without one or without pynvml."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # ImportError, or any of NVML's own errors
        return None

    figures: dict[MetricKey, Callable[[], float]] = {  # each may be missing: of an older chip, of a part of one (MIG)
        key("gpu_ratio"): lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        key("gpu_memory_bytes"): lambda: float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        key("energy_joules_total", "gpu"): lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}

    def read() -> dict[MetricKey, float]:
        out = {}
        for name, figure in figures.items():
            with contextlib.suppress(pynvml.NVMLError):
                out[name] = figure()
        return out

    return read
