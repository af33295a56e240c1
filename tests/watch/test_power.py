"""Energy from a tree of counters like Linux's; what is absent stays absent."""

from __future__ import annotations

from pathlib import Path

from deepseek.watch.metrics import key
from deepseek.watch.power import MachineSampler, Rapl


def zone(root: Path, name: str, energy: int, limit: int = 1_000_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    called = "psys" if name.endswith(":2") else "package-0" if name.count(":") == 1 else "core"
    (folder / "name").write_text(f"{called}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder


def test_joules_add_up_over_packages_and_run_over(tmp_path: Path) -> None:
    one, two = zone(tmp_path, "intel-rapl:0", 5_000_000), zone(tmp_path, "intel-rapl:1", 999_000_000)
    zone(tmp_path, "intel-rapl:0:0", 1)  # cores of package 0, which has them already
    zone(tmp_path, "intel-rapl:2", 1)  # the whole machine, the packages among it
    rapl = Rapl(tmp_path)
    assert rapl.read() == 0.0
    (one / "energy_uj").write_text("7500000\n")
    (two / "energy_uj").write_text("1000000\n")  # beyond its limit
    zone(tmp_path, "intel-rapl:0:0", 900_000_000)
    zone(tmp_path, "intel-rapl:2", 900_000_000)
    assert rapl.read() == 2.5 + 2.0


def test_without_counters_there_is_no_metric(tmp_path: Path) -> None:
    assert Rapl(tmp_path).read() is None
    folder = zone(tmp_path, "intel-rapl:0", 1)
    (folder / "energy_uj").unlink()
    assert Rapl(tmp_path).read() is None
    found = MachineSampler(tmp_path).read()
    assert key("energy_joules_total", "cpu") not in found
    assert found[key("resident_bytes")] > 1e7 and 0 <= found[key("memory_ratio")] <= 1
