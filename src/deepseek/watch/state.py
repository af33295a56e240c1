"""Figures for people: what the dashboard and the terminal show, computed from two snapshots.

Ratios and shares are 0..1, times are seconds; None is what cannot be said, as where nothing ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .metrics import BASE, Snapshot, delta, key, quantile, total_delta, values

HUNDRED_MILLION = 1e8


@dataclass(frozen=True)
class Rates:
    """Of a stretch of time. tokens, new_tokens: a second. first, each: percentiles of the time to the first token and
    of the time per token. cost: of 10^8 tokens. watch: counting's share of the steps' time."""

    tokens: float
    new_tokens: float
    first_p50: float | None
    first_p99: float | None
    each_p50: float | None
    each_p99: float | None
    joules_per_token: float | None
    cost: float | None
    watch: float | None


@dataclass(frozen=True)
class Residency:
    """hits: experts that were in memory when they were wanted. prefetch_hits: prefetched experts that were then wanted.
    stall: share of the steps' time spent waiting for the disk."""

    hits: float | None
    prefetch_hits: float | None
    stall: float | None
    read_bytes: float


@dataclass(frozen=True)
class GroupState:
    """A named group. ratio: slots over expected slots, also by band of layers; share, expected: of all slots. accuracy:
    of its `labelled` tokens. resident, hits: its experts in memory, and found there."""

    name: str
    ratio: float | None
    expected: float
    share: float | None
    bands: dict[str, float | None]
    accuracy: float | None
    labelled: float
    drift: float | None
    resident: float | None
    hits: float | None


@dataclass(frozen=True)
class DomainState:
    """How the requests of a domain ended, by finish reason; `tools`, `schemas`, `satisfied`: those that went well."""

    domain: str
    requests: float
    ended: dict[str, float]
    completed: float | None
    tools: float | None
    schemas: float | None
    satisfied: float | None
    rated: float


@dataclass(frozen=True)
class MemberState:
    """A member of the pool, or the base. decisions: in which it had the largest weight; share: of all of them; weight:
    its part of all weights; accuracy: of the `labelled` decisions, which it should have had."""

    name: str
    kind: str
    decisions: float
    share: float | None
    weight: float | None
    labelled: float
    accuracy: float | None


@dataclass(frozen=True)
class PoolState:
    """What a pool decided. abstained: share of the decisions that left the base alone. composite: requests answered in
    parts. hits: share of the searches of knowledge bases that found passages. seconds: of a decision, with its
    passages. members: the most chosen first."""

    decisions: float
    abstained: float | None
    composite: float
    parts: float
    labelled: float
    accuracy: float | None
    retrievals: float
    hits: float | None
    seconds: float | None
    members: list[MemberState]


@dataclass(frozen=True)
class MonitorState:
    """Everything on the dashboard but the heat map and the curves.

    time, began: seconds since the epoch. minutes: of the window. step: mean seconds. distinct: experts asked for over
    those of uniform routing. figures: numbers without labels. rates: of the last minute; window: of the window. bands:
    balance by band. entropy_most: of uniform routing. conflict, confusion: tokens by pair of named groups.
    """

    model: str
    time: float
    began: float
    minutes: float
    step: float | None
    distinct: float | None
    figures: dict[str, float]
    rates: Rates
    window: Rates
    groups: list[GroupState]
    band_names: list[str]
    bands: dict[str, dict[str, float | None]]
    entropy_most: float
    accuracy: float | None
    chance: float | None
    conflicts: float | None
    conflict_requests: float | None
    conflict: list[list[int]]
    confusion: list[list[int]]
    residency: Residency | None
    pool: PoolState | None
    energy: dict[str, float]
    business: list[DomainState]
    comments: list[dict[str, object]]
    alerts: list[dict[str, Any]]
    past_alerts: list[dict[str, object]]
    slices: dict[str, list[tuple[str, float]]]


def rates(start: float, old: Snapshot, end: float, now: Snapshot) -> Rates:
    """Between two snapshots, taken at `start` and `end` seconds."""
    seconds = max(end - start, 1e-9)
    run = delta(now, old, "tokens_total", "computed") + delta(now, old, "tokens_total", "cached")
    joules = [delta(now, old, "energy_joules_total", source) for (source,) in values(now, "energy_joules_total")]
    price = now.get(key("price_per_hour"))
    first, each = "time_to_first_token_seconds", "request_time_per_output_token_seconds"
    return Rates(
        tokens=run / seconds, new_tokens=delta(now, old, "tokens_total", "sampled") / seconds,
        first_p50=quantile(0.5, now, old, first), first_p99=quantile(0.99, now, old, first),
        each_p50=quantile(0.5, now, old, each), each_p99=quantile(0.99, now, old, each),
        joules_per_token=ratio(sum(joules), run) if joules else None,
        cost=None if price is None else ratio(price / 3600 * seconds * HUNDRED_MILLION, run),
        watch=ratio(delta(now, old, "watch_seconds_total"), delta(now, old, "step_seconds_total")))


def residency(now: Snapshot, old: Snapshot) -> Residency | None:
    """None where all experts are always in memory."""
    if key("experts_wanted_total") not in now:
        return None
    wanted = delta(now, old, "experts_wanted_total")
    missed = delta(now, old, "experts_missed_total") + delta(now, old, "experts_late_total")
    return Residency(
        hits=ratio(max(0.0, wanted - missed), wanted),
        prefetch_hits=ratio(delta(now, old, "prefetch_hits_total"), delta(now, old, "experts_prefetched_total")),
        stall=ratio(delta(now, old, "expert_stall_seconds_total"), delta(now, old, "step_seconds_total")),
        read_bytes=delta(now, old, "expert_read_bytes_total"))


def pool(now: Snapshot, old: Snapshot, kinds: Mapping[str, str] | None, most: int = 20) -> PoolState | None:
    """None without a pool. kinds: of its members and the base."""
    if kinds is None:
        return None
    decisions, weight, labelled, correct = (
        {name: delta(now, old, f"pool_{what}_total", name) for name, in values(now, f"pool_{what}_total")}
        for what in ("decisions", "weight", "labelled", "correct"))
    whole, weights, known = sum(decisions.values()), sum(weight.values()), sum(labelled.values())
    retrieved = total_delta(now, old, "pool_retrievals_total")
    members = [MemberState(
        name, kinds[name], count, ratio(count, whole), ratio(weight.get(name, 0.0), weights), labelled.get(name, 0.0),
        ratio(correct.get(name, 0.0), labelled.get(name, 0.0)))
        for name, count in sorted(decisions.items(), key=lambda own: -own[1])[:most]]
    return PoolState(
        whole, ratio(decisions.get(BASE, 0.0), whole), delta(now, old, "pool_composite_total"),
        delta(now, old, "pool_parts_total"), known, ratio(sum(correct.values()), known), retrieved,
        ratio(delta(now, old, "pool_retrievals_total", "hit"), retrieved),
        ratio(delta(now, old, "pool_seconds_total"), whole), members)


def business(now: Snapshot, old: Snapshot) -> list[DomainState]:
    """The domains that had requests or feedback: how requests ended, tools, schemas, feedback."""
    out = []
    for domain in sorted({domain for name in ("requests_total", "feedback_total") for domain, _ in values(now, name)}):
        ended, tools, schemas, feedback = (
            {outcome: delta(now, old, name, domain, outcome) for own, outcome in values(now, name) if own == domain}
            for name in ("requests_total", "tool_calls_total", "schema_answers_total", "feedback_total"))
        requests, rated = sum(ended.values()), sum(feedback.values())
        if requests + rated:
            out.append(DomainState(
                domain, requests, ended, completed=ratio(ended.get("stop", 0.0), requests),
                tools=ratio(tools.get("right", 0.0), sum(tools.values())),
                schemas=ratio(schemas.get("valid", 0.0), sum(schemas.values())),
                satisfied=ratio(feedback.get("up", 0.0), rated), rated=rated))
    return out


def slices(now: Snapshot, old: Snapshot, most: int = 5) -> dict[str, list[tuple[str, float]]]:
    """The largest slices of each kind, with their share of the tokens."""
    found: dict[str, list[tuple[str, float]]] = {}
    for kind, value in values(now, "slice_tokens_total"):
        found.setdefault(kind, []).append((value, delta(now, old, "slice_tokens_total", kind, value)))
    return {kind: [(value, tokens / max(1.0, sum(n for _, n in own)))
                   for value, tokens in sorted(own, key=lambda entry: -entry[1])[:most] if tokens]
            for kind, own in found.items()}


def ratio(part: float, total: float) -> float | None:
    return part / total if total else None
