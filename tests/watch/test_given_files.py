"""What is given out for Prometheus and Grafana speaks of metrics that exist, and Prometheus' own tool accepts it; the
manual has every metric."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek.watch.alerts import AlertLimits
from deepseek.watch.metrics import METRICS, PREFIX, RENAMED
from tests.helpers import ROOT

FILES = Path(str(files("deepseek.watch") / "files"))
MANUAL = ROOT / "docs" / "monitoring.md"
BOARD: dict[str, Any] = json.loads((FILES / "grafana.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = yaml.safe_load((FILES / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]


def expressions() -> Iterator[str]:
    for panel in BOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (rule["expr"] for rule in RULES)


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_metrics_and_labels_exist(expression: str) -> None:
    found = re.findall(rf"{PREFIX}(\w+)(\{{[^}}]*\}})?", expression)
    assert found or "up{" in expression
    for name, labels in found:
        metric = METRICS.get(name) or METRICS[name.removesuffix("_bucket")]
        assert metric.exported
        own = {*metric.labels, "instance", "job", *(["le"] if metric.kind == "histogram" else [])}
        assert set(re.findall(r"(\w+)\s*=~?", labels)) <= own, expression


def test_every_exported_metric_is_on_the_board() -> None:
    shown = " ".join(expressions())
    missing = [name for name, metric in METRICS.items() if metric.exported and PREFIX + name not in shown]
    assert set(missing) <= {"steps_total", "cache_free_positions", "preempted_total", "process_cpus", "resident_bytes",
                            "gpu_memory_bytes", "expert_read_bytes_total", "refused_total", "slots_total"}


def test_the_rules_have_the_limits_of_the_server() -> None:
    limits, rules = AlertLimits(), {rule["alert"]: rule for rule in RULES}
    assert f"< {limits.share_low:g}" in rules["ExpertShareLow"]["expr"]
    assert f"[{limits.minutes:g}m]" in rules["ExpertShareLow"]["expr"]
    for name, limit in (("ExpertConflictsHigh", limits.conflict_high), ("ExpertStallsHigh", limits.stall_high),
                        ("RequestErrorsHigh", limits.errors_high),
                        ("NegativeFeedbackHigh", limits.negative_feedback_high),
                        ("PoolDrift", limits.pool_drift), ("AbstentionDrift", limits.abstention_drift)):
        assert f"> {limit:g}" in rules[name]["expr"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian's package prometheus)")
def test_promtool_accepts_them(tmp_path: Path) -> None:
    for what in ("rules", "config"):
        name = {"rules": "alerts.yml", "config": "prometheus.yml"}[what]
        done = subprocess.run(["promtool", "check", what, name], cwd=FILES, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for i, expression in enumerate(sorted(set(expressions()))):  # the board's too, as rules
        board = expression.replace("$__rate_interval", "5m").replace("$instance", ".*")
        (tmp_path / f"{i}.yml").write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": [
            {"record": "x", "expr": board}]}]}))
    done = subprocess.run(["promtool", "check", "rules", *map(str, tmp_path.iterdir())], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_manual_has_every_metric() -> None:
    text = MANUAL.read_text(encoding="utf-8")
    assert [name for name, metric in METRICS.items() if metric.exported and f"`{PREFIX}{name}`" not in text] == []
    assert [name for name in re.findall(rf"`{PREFIX}(\w+)`", text) if name not in {*METRICS, *RENAMED}] == []
    for old, new in RENAMED.items():
        assert f"| `{PREFIX}{old}` | `{PREFIX}{new}` |" in text
