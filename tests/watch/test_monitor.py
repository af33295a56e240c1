"""Figures that need time: energy and cost a token, curves over a restart, a webhook that nobody answers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace as Plain
from typing import Any

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.model import Route, RoutingRecord
from deepseek.watch.alerts import Alert
from deepseek.watch.counters import ServingCounters
from deepseek.watch.metrics import MetricKey, key
from deepseek.watch.monitor import Monitor
from deepseek.watch.options import WatchOptions
from deepseek.watch.power import MachineSampler
from deepseek.watch.state import rates
from deepseek.watch.terminal import view

LONG: dict[str, Any] = dict(interval=3600.0, alert_minutes=10.0)  # a snapshot only when the test takes one


def item(request_id: int, domain: str | None, tokens: int, labels: dict[str, str] | None = None) -> Plain:
    """A request's part of a step."""
    return Plain(request=Plain(request_id=request_id, domain=domain, metric_labels=labels or {}),
                 chunk=Plain(tokens=tokens))


@pytest.fixture
def make(tiny_config: Callable, tmp_path: Path) -> Iterator[Callable[..., tuple[Monitor, dict[MetricKey, float]]]]:
    opened = []

    def build(options: WatchOptions | None = None, **changes: Any) -> tuple[Monitor, dict[MetricKey, float]]:
        engine = {key("tokens_total", "computed"): 0.0, key("tokens_total", "sampled"): 0.0,
                  key("requests_running"): 0.0, key("requests_waiting"): 0.0}
        counters = ServingCounters(tiny_config(**changes))
        opened.append(Monitor("tiny", counters, lambda: engine, options or WatchOptions(**LONG),
                              machine=MachineSampler(tmp_path)))
        return opened[-1], engine

    yield build
    for monitor in opened:
        monitor.close()


def test_energy_and_cost_of_a_token(make: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    (folder / "name").write_text("package-0\n")
    (folder / "max_energy_range_uj").write_text("1000000000")
    (folder / "energy_uj").write_text("1000000")
    monitor, engine = make(WatchOptions(**LONG, price_per_hour=3.6))
    (folder / "energy_uj").write_text("5000000")
    engine[key("tokens_total", "computed")] = 80.0
    monitor.sample()
    state = asdict(monitor.state())
    assert state["rates"]["joules_per_token"] == pytest.approx(4 / 80) and state["energy"] == {"cpu": 4.0}
    seconds = state["time"] - monitor.began
    assert 0 < state["window"]["cost"] <= 3.6 / 3600 * seconds / 80 * 1e8
    tokens = {key("tokens_total", "computed"): 60.0, key("tokens_total", "cached"): 20.0}
    assert rates(5.0, {}, 15.0, tokens | {key("price_per_hour"): 3.6}).cost == pytest.approx(3.6 / 3600 * 10 / 80 * 1e8)
    assert "0.05 J a token" in view(state)
    assert b'moe_dr_energy_joules_total{source="cpu"} 4.0' in monitor.metrics()


def test_without_counters_of_energy_nothing_is_said_of_it(make: Callable) -> None:
    monitor, _ = make()
    state = asdict(monitor.state())
    assert state["rates"]["joules_per_token"] is None and state["energy"] == {} and state["window"]["cost"] is None
    assert b"joules" not in monitor.metrics() and "J a token" not in view(state)


def test_everything_has_a_state_before_anything_ran(make: Callable) -> None:
    for changes in ({}, {"first_k_dense_replace": 3}):  # the second has no routed experts
        monitor, _ = make(**changes)
        state = asdict(monitor.state())
        json.dumps(state, allow_nan=False)
        json.dumps([monitor.heat(), monitor.series()], allow_nan=False)
        assert state["accuracy"] is None and state["groups"] == [] and "no alert" in view(state)
        assert state["figures"]["cpu_share"] == state["figures"]["cpu_ratio"], "the former name stays for one release"


def test_the_heat_map_is_of_the_last_minutes(make: Callable) -> None:
    monitor, _ = make()
    index = torch.tensor([[0, 1, 2, 3]] * 6)
    routing = RoutingRecord({layer: Route(index, torch.ones(6, 4), torch.zeros(6, 16)) for layer in (1, 2)})
    monitor.counters.step([item(1, None, 6)], routing, 1.0)
    heat = monitor.heat()
    assert heat["ratio"] == [[4.0] * 4 + [0.0] * 12] * 2 and heat["groups"][0][0] == []


def test_curves_over_a_restart(make: Callable) -> None:
    monitor, engine = make()
    engine[key("tokens_total", "computed")] = 100.0
    monitor.sample()
    engine[key("tokens_total", "computed")] = 40.0  # a new server goes on with the history
    monitor.sample()
    curve = monitor.series()["rates"]["tokens"]
    assert len(curve) == 2 and min(curve) > 0
    before, after = ({key("tokens_total", "computed"): tokens} for tokens in (100.0, 40.0))
    assert rates(0.0, before, 10.0, after).tokens == 4.0


def test_a_webhook_that_nobody_answers(make: Callable, caplog: pytest.LogCaptureFixture) -> None:
    monitor, _ = make(WatchOptions(**LONG, alert_webhook="http://127.0.0.1:9/secret"))
    with caplog.at_level("WARNING", logger="deepseek.watch"):
        for sink in monitor.alerts.sinks:
            sink(Alert("share_low", "code_expert", 0.1, 0.3, "a message", 0.0), True)
        end = time.monotonic() + 30
        while len(caplog.records) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert any("127.0.0.1" in record.message and "error" in record.message for record in caplog.records)
    assert "secret" not in caplog.text
    assert monitor.history.alerts()[0]["message"] == "a message"


@pytest.mark.parametrize(("option", "message"), [
    ({"alert_minutes": 0}, "alert_minutes = 0: must be above 0"),
    ({"alert_minutes": math.inf}, "alert_minutes = inf: must be above 0 and at most 120"),
    ({"price_per_hour": -1.0}, "price_per_hour = -1.0: must be a number >= 0"),
    ({"price_per_hour": math.nan}, "price_per_hour = nan"), ({"alert_webhook": "example.org"}, "begins with http"),
    ({"alert_webhook": "http://"}, "alert_webhook = 'http://'"), ({"alert_webhook": "http://x:abc/"}, "alert_webhook")])
def test_options_that_cannot_be(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WatchOptions(**option)
