"""Alerts without Prometheus: rules over the last minutes of snapshots, with what may have caused them.

When a named group is used less than LOW of its expected share, or a pool chooses other members than before, the traffic
has changed more often than the router: so the message names the slices (domain, client, language, adapter) whose part
of the tokens changed most between the time before the window and the window itself. alerts.yml holds the same rules for
Prometheus.

    share_low                 a named group below LOW of its share under uniform routing
    conflict_high             tokens whose two strongest groups are close
    stall_high                share of the steps' time in which the engine waited for the disk
    errors_high               requests that ended in an error
    negative_feedback_high    feedback that is mostly bad
    pool_drift                the members that a pool chooses are others than before
    abstention_drift          a pool leaves the base alone more, or less, often than before
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from .metrics import BASE, Snapshot, delta, total_delta, values

log = logging.getLogger("deepseek.watch")
LOW = 0.30
LEAST_TOKENS = 1000  # of a window: fewer say nothing
CLEAR = 0.1  # an alert is over when its value has left the limit by this share of it
LEAST_REQUESTS = 20
LEAST_DECISIONS = 100  # of a pool, in the window and before it
CHANGED = 0.05  # a slice is named when its part of the tokens moved by more


@dataclass(frozen=True)
class Alert:
    rule: str
    subject: str
    value: float
    limit: float
    message: str
    since: float


@dataclass(frozen=True)
class AlertLimits:
    """minutes: of the window. The others are the limits of the rules (see the top of this file)."""

    minutes: float = 10.0
    share_low: float = LOW
    conflict_high: float = 0.5
    stall_high: float = 0.5
    errors_high: float = 0.05
    negative_feedback_high: float = 0.5
    pool_drift: float = 0.25
    abstention_drift: float = 0.15


class Alerts:
    """Evaluates each new snapshot. sinks get an alert once when it begins and once when it is over."""

    def __init__(self, limits: AlertLimits | None = None, sinks: Iterable[Callable[[Alert, bool], None]] = ()) -> None:
        self.limits, self.sinks = limits or AlertLimits(), list(sinks)
        self.past: deque[tuple[float, Snapshot]] = deque()
        self.firing: dict[tuple[str, str], Alert] = {}

    def evaluate(self, time: float, now: Snapshot) -> list[Alert]:
        """Add a snapshot; returns the alerts that fire now."""
        window = 60 * self.limits.minutes
        self.past.append((time, now))
        while len(self.past) > 2 and self.past[1][0] <= time - 2 * window:
            self.past.popleft()
        edge = next((old for at, old in reversed(self.past) if at <= time - window), None)
        found = {} if edge is None else {
            (alert.rule, alert.subject): alert for alert in self._rules(time, self.past[0][1], edge, now)}
        before, self.firing = self.firing, {
            which: replace(alert, since=self.firing[which].since) if which in self.firing else alert
            for which, alert in found.items()}
        for which in self.firing.keys() - before.keys():
            self.notify(self.firing[which], True)
        for which in before.keys() - self.firing.keys():
            self.notify(before[which], False)
        return list(self.firing.values())

    def notify(self, alert: Alert, begins: bool) -> None:
        for sink in self.sinks:
            try:
                sink(alert, begins)
            except Exception:  # a full disk, say: the others still get it
                log.exception("watch: an alert could not be passed on")

    def _rules(self, time: float, before: Snapshot, edge: Snapshot, now: Snapshot) -> Iterable[Alert]:
        limits = self.limits
        over = "over a minute" if limits.minutes == 1 else f"over {limits.minutes:g} minutes"
        if delta(now, edge, "judged_tokens_total") >= LEAST_TOKENS:
            cause = _cause(before, edge, now)
            for group, ratio in ratios(now, edge).items():
                if ratio < limits.share_low * (1 + CLEAR * (("share_low", group) in self.firing)):
                    yield Alert("share_low", group, ratio, limits.share_low,
                                f"{group} has {ratio:.0%} of its expected share of the experts' slots {over} (limit "
                                f"{limits.share_low:.0%}): check the data distribution{cause}", time)
        ended = dict.fromkeys(("stop", "length", "abort", "error"), 0.0)
        for domain, reason in values(now, "requests_total"):
            ended[reason] += delta(now, edge, "requests_total", domain, reason)
        rated = {"up": 0.0, "down": 0.0}
        for domain, rating in values(now, "feedback_total"):
            rated[rating] += delta(now, edge, "feedback_total", domain, rating)
        for rule, part, whole, least, words in (
                ("conflict_high", delta(now, edge, "conflict_tokens_total"), delta(now, edge, "judged_tokens_total"),
                 LEAST_TOKENS, "of the tokens lie between two named groups"),
                ("stall_high", delta(now, edge, "expert_stall_seconds_total"), delta(now, edge, "step_seconds_total"),
                 1.0, "of the time the engine waited for experts from disk: give more expert_memory, or warm others"),
                ("errors_high", ended["error"], sum(ended.values()), LEAST_REQUESTS,
                 "of the requests ended in an error"),
                ("negative_feedback_high", rated["down"], sum(rated.values()), LEAST_REQUESTS,
                 "of the feedback is bad")):
            limit = getattr(limits, rule)
            if whole >= least and part / whole > limit * (1 - CLEAR * ((rule, "") in self.firing)):
                yield Alert(rule, "", part / whole, limit,
                            f"{part / whole:.0%} {words}, {over} (limit {limit:.0%})", time)
        decided = [total_delta(*pair, "pool_decisions_total") for pair in ((edge, before), (now, edge))]
        if min(decided) >= LEAST_DECISIONS:
            was, own = shares(edge, before), shares(now, edge)
            whole = sum(1 / count for count in decided)
            for rule, names, what in (("pool_drift", {*was, *own}, "the pool chooses other members than before"),
                                      ("abstention_drift", {BASE}, "the pool leaves the base alone more or less often "
                                                                   "than before")):
                pairs = [(was.get(name, 0.0), own.get(name, 0.0)) for name in names]
                half = 1 if names == {BASE} else 2  # of a whole mix, what some lost others won
                moved = sum(abs(a - b) for a, b in pairs) / half
                chance = sum(math.sqrt((a + b) / 2 * (1 - (a + b) / 2) * whole * 2 / math.pi) for a, b in pairs) / half
                limit = getattr(limits, rule)
                if moved > max(limit, 2 * chance) * (1 - CLEAR * ((rule, "") in self.firing)):
                    yield Alert(rule, "", moved, limit, f"{what}: {moved:.0%} of the decisions moved {over} (limit "
                                f"{limit:.0%})" + "".join(_changes(was, own, "decisions")) + _cause(before, edge, now),
                                time)


def ratios(now: Snapshot, old: Snapshot) -> dict[str, float]:
    """Each named group's slots since the older snapshot, over those that uniform routing would give it."""
    sums: dict[str, list[float]] = {}
    for group, band in values(now, "group_expected_slots_total"):
        own = sums.setdefault(group, [0.0, 0.0])
        for i, name in enumerate(("group_slots_total", "group_expected_slots_total")):
            own[i] += delta(now, old, name, group, band)
    return {group: slots / expected for group, (slots, expected) in sums.items() if expected}


def shares(now: Snapshot, old: Snapshot) -> dict[str, float]:
    """Each member's share of the pool's decisions since the older snapshot; empty where there were none."""
    counts = {name: delta(now, old, "pool_decisions_total", name) for name, in values(now, "pool_decisions_total")}
    whole = sum(counts.values())
    return {name: count / whole for name, count in counts.items() if count}


def _changes(was: Mapping[str, float], own: Mapping[str, float], what: str) -> list[str]:
    """The two shares that changed most, in words."""
    moved = sorted({*was, *own}, key=lambda name: (-abs(own.get(name, 0.0) - was.get(name, 0.0)), name))
    return [f"; {name} went from {was.get(name, 0.0):.0%} to {own.get(name, 0.0):.0%} of the {what}"
            for name in moved[:2] if abs(own.get(name, 0.0) - was.get(name, 0.0)) > CHANGED]


def _cause(before: Snapshot, edge: Snapshot, now: Snapshot) -> str:
    """The two slices of each kind whose part of the tokens changed most, in words; where none did, the largest ones."""
    changed, largest = [], []
    slices = values(now, "slice_tokens_total")
    for kind in sorted({kind for kind, _ in slices}):
        names = [name for own, name in slices if own == kind]
        new = {name: delta(now, edge, "slice_tokens_total", kind, name) for name in names}
        old = {name: delta(edge, before, "slice_tokens_total", kind, name) for name in names}
        if not any(new.values()):
            continue
        was, own = ({f"{kind}={name}": count / (sum(counts.values()) or 1.0) for name, count in counts.items()}
                    for counts in (old, new))
        if any(old.values()):
            changed += _changes(was, own, "tokens")
        name = max(own, key=lambda name: own[name])
        largest.append(f"; {name} has {own[name]:.0%} of the tokens")
    return "".join(changed or largest)
