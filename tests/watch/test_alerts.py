"""A skewed workload trips the alert, with the right slice in its message; a healthy one does not."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from deepseek.watch.alerts import Alert, AlertLimits, Alerts, shares
from deepseek.watch.metrics import MetricKey, key

EVEN = {"code_expert": 0.25, "law_expert": 0.25, "text_expert": 0.5}


class Traffic:
    """Snapshots that grow minute by minute."""

    def __init__(self) -> None:
        self.minute = 0
        self.now: dict[MetricKey, float] = {}

    def add(self, value: float, name: str, *labels: str) -> None:
        self.now[key(name, *labels)] = self.now.get(key(name, *labels), 0.0) + value

    def go(self, tokens: float, domains: dict[str, float], client: str = "a", **more: float
           ) -> tuple[float, dict[MetricKey, float]]:
        self.minute += 1
        for domain, share in domains.items():
            for kind, value in (("domain", domain), ("client", client)):
                self.add(tokens * share, "slice_tokens_total", kind, value)
            for band in ("1-2", "3-4"):
                self.add(3 * tokens * share, "group_slots_total", f"{domain}_expert", band)
                self.add(3 * tokens * EVEN[f"{domain}_expert"], "group_expected_slots_total", f"{domain}_expert", band)
        for band in ("1-2", "3-4"):
            self.add(3 * tokens, "slots_total", band)
        self.add(tokens, "judged_tokens_total")
        for counter, count in more.items():
            self.add(count, *counter.split("__"))
        return 60.0 * self.minute, dict(self.now)


HEALTHY = {"code": 0.25, "law": 0.25, "text": 0.5}
SKEWED = {"code": 0.02, "law": 0.25, "text": 0.73}


def test_a_skewed_workload_and_its_end() -> None:
    told: list[tuple[Alert, bool]] = []
    alerts, traffic = Alerts(AlertLimits(minutes=5), [lambda *what: told.append(what)]), Traffic()
    for _ in range(12):
        assert alerts.evaluate(*traffic.go(1000, HEALTHY)) == []
    fired = [alerts.evaluate(*traffic.go(1000, SKEWED)) for _ in range(8)]
    assert fired[0] == [] and len(fired[-1]) == 1
    alert, = fired[-1]
    assert (alert.rule, alert.subject) == ("share_low", "code_expert")
    assert alert.value == pytest.approx(0.08)
    assert "check the data distribution" in alert.message and "8% of its expected share" in alert.message
    assert "domain=code went from" in alert.message and "domain=text went from" in alert.message
    assert "client" not in alert.message and "domain=law" not in alert.message
    assert alert.since == min(a.since for found in fired for a in found)
    for _ in range(6):
        alerts.evaluate(*traffic.go(1000, HEALTHY))
    assert [begins for _, begins in told] == [True, False] and not alerts.firing


def test_a_client_is_named() -> None:
    alerts, traffic = Alerts(AlertLimits(minutes=2)), Traffic()
    for _ in range(4):
        alerts.evaluate(*traffic.go(1000, HEALTHY, client="a"))
    for _ in range(3):
        found = alerts.evaluate(*traffic.go(1000, SKEWED, client="b"))
    assert "client=b went from 50% to 100%" in found[0].message and "domain=code went from" in found[0].message


def test_skewed_from_the_start_names_what_there_is() -> None:
    alerts, traffic = Alerts(AlertLimits(minutes=2)), Traffic()
    alerts.evaluate(0.0, {})
    for _ in range(3):
        found = alerts.evaluate(*traffic.go(1000, SKEWED))
    assert "client=a has 100% of the tokens; domain=text has 73% of the tokens" in found[0].message


def test_little_traffic_says_nothing() -> None:
    alerts, traffic = Alerts(AlertLimits(minutes=2)), Traffic()
    for _ in range(9):
        assert alerts.evaluate(*traffic.go(20, SKEWED, requests_total__law__error=1, feedback_total__law__down=1)) == []


def test_a_server_that_began_anew() -> None:
    """Numbers that became smaller count from zero."""
    alerts, traffic = Alerts(AlertLimits(minutes=2)), Traffic()
    for _ in range(5):
        alerts.evaluate(*traffic.go(1000, HEALTHY))
    traffic.now.clear()
    for _ in range(3):
        assert alerts.evaluate(*traffic.go(1000, HEALTHY)) == []


@pytest.mark.parametrize(("rule", "counts"), [
    ("conflict_high", {"conflict_tokens_total": 700}),
    ("stall_high", {"step_seconds_total": 60, "expert_stall_seconds_total": 40}),
    ("errors_high", {"requests_total__law_expert__stop": 27, "requests_total__other__error": 3}),
    ("negative_feedback_high", {"feedback_total__law_expert__up": 5, "feedback_total__unknown__down": 20})])
def test_the_other_rules(rule: str, counts: dict[str, Any]) -> None:
    alerts, traffic = Alerts(AlertLimits(minutes=2)), Traffic()
    for _ in range(4):
        found = alerts.evaluate(*traffic.go(1000, HEALTHY, **counts))
    assert [alert.rule for alert in found] == [rule] and "over 2 minutes" in found[0].message


def mix(**shares: float) -> dict[str, Any]:
    return {f"pool_decisions_total__{member}": 100 * share for member, share in shares.items()}


def test_a_pool_whose_members_change() -> None:
    told: list[tuple[Alert, bool]] = []
    alerts, traffic = Alerts(AlertLimits(minutes=5), [lambda *what: told.append(what)]), Traffic()
    for _ in range(12):
        assert alerts.evaluate(*traffic.go(1000, HEALTHY, **mix(law=0.5, med=0.4, base=0.1))) == []
    for _ in range(5):
        found = alerts.evaluate(*traffic.go(1000, HEALTHY, client="b", **mix(law=0.05, med=0.85, base=0.1)))
    alert, = found
    assert (alert.rule, alert.value, alert.limit) == ("pool_drift", pytest.approx(0.45), 0.25)
    assert "45% of the decisions moved over 5 minutes (limit 25%)" in alert.message
    assert "law went from 50% to 5% of the decisions" in alert.message and "med went from 40% to 85%" in alert.message
    assert "client=b went from 0% to 100% of the tokens" in alert.message
    for _ in range(9):  # it is what it was: the mix has changed for good
        alerts.evaluate(*traffic.go(1000, HEALTHY, **mix(law=0.05, med=0.85, base=0.1)))
    assert [begins for _, begins in told] == [True, False]


@pytest.mark.parametrize("after", [0.0, 0.4])
def test_a_pool_that_abstains_more_or_less_often(after: float) -> None:
    alerts, traffic = Alerts(AlertLimits(minutes=5)), Traffic()
    for _ in range(11):
        alerts.evaluate(*traffic.go(1000, HEALTHY, **mix(law=0.8, base=0.2)))
    for _ in range(5):
        found = alerts.evaluate(*traffic.go(1000, HEALTHY, **mix(law=1 - after, base=after)))
    assert [(alert.rule, alert.value) for alert in found] == [("abstention_drift", pytest.approx(0.2))]
    assert f"base went from 20% to {after:.0%} of the decisions" in found[0].message


def test_chance_moves_a_mix_of_few_decisions() -> None:
    """Shares of twenty members in a hundred decisions differ by a third from one hundred to the next."""
    draw, alerts, traffic = random.Random(0), Alerts(AlertLimits(minutes=5)), Traffic()
    moved = 0.0
    for _ in range(60):
        counts = Counter(f"m{draw.randrange(20)}" for _ in range(21))
        time, now = traffic.go(1000, HEALTHY, **mix(**{name: n / 100 for name, n in counts.items()}))
        assert alerts.evaluate(time, now) == []
        if len(alerts.past) > 10:
            (_, before), *_ = alerts.past
            edge = alerts.past[5][1]
            was, own = shares(edge, before), shares(now, edge)
            moved = max(moved, sum(abs(own.get(name, 0.0) - was.get(name, 0.0)) for name in {*was, *own}) / 2)
    assert moved > AlertLimits.pool_drift
