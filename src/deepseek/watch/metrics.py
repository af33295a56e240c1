"""Every metric, by name, with its definition; docs/monitoring.md says the same at more length.

A snapshot holds numbers by MetricKey. Those of a histogram are the counts up to each bound and the sum, by the label
`le`: a bound or "sum". What cannot be measured is absent, never zero.

Rates, ratios and percentiles are of what has grown between two snapshots; a number that has become smaller was reset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

PREFIX = "moe_dr_"
BASE = "base"  # the label `member` where a pool left the base alone
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class MetricKey(NamedTuple):
    """A number of a snapshot: a metric's name and the values of its labels."""

    name: str
    labels: tuple[str, ...] = ()

    def to_text(self) -> str:
        """As it is stored: `slots_total|1-9`. `|` in a value becomes `/`."""
        return "|".join([self.name, *(value.replace("|", "/") for value in self.labels)])

    @classmethod
    def of_text(cls, text: str) -> MetricKey:
        """The key of a stored number, which may bear a former name."""
        name, *labels = text.split("|")
        return cls(RENAMED.get(name, name), tuple(labels))


Snapshot = Mapping[MetricKey, float]


@dataclass(frozen=True)
class Metric:
    """exported: also to Prometheus; False for those with more values of a label than it should keep. bounds: of a
    histogram's buckets, seconds. formerly: the name of earlier releases, exported beside the new one, deprecated."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    exported: bool = True
    bounds: tuple[float, ...] = ()
    formerly: str = ""


def _counter(name: str, help: str, *labels: str, exported: bool = True, formerly: str = "") -> Metric:
    return Metric(f"{name}_total", "counter", labels, help, exported, formerly=formerly)


def _gauge(name: str, help: str, *labels: str, formerly: str = "") -> Metric:
    return Metric(name, "gauge", labels, help, formerly=formerly)


SYSTEM = (
    _counter("steps", "Steps that the engine ran"),
    _counter("step_seconds", "Seconds in these steps"),
    _counter("watch_seconds", "Seconds spent on counting, within steps and beside them"),
    _counter("tokens", "Tokens: ran through the model (computed), found in the prefix cache (cached), new (sampled)",
             "kind"),
    _counter("slots", "Slots, (token, place) pairs of the gate, in a band of layers", "band"),
    _counter("group_slots", "Slots that went to a named group's experts", "group", "band"),
    _counter("group_expected_slots", "Slots that would have gone there under uniform routing", "group", "band"),
    _counter("group_wanted", "Experts of a group that a layer of a step asked for, each once", "group"),
    _counter("group_missed", "Those of them that were not in memory, or just being read", "group"),
    _gauge("group_resident_ratio", "Share of a group's experts that are in memory", "group",
           formerly="group_resident_share"),
    _counter("distinct_experts", "Experts that a layer of a step asked for, each once"),
    _counter("distinct_experts_expected", "The same if routing were uniform: E (1 - (1 - K/E)^T) for T tokens"),
    _counter("experts_wanted", "The same as distinct_experts, as the residency counts it, where not all experts are in "
                               "memory"),
    _counter("experts_missed", "Those of them that were not in memory"),
    _counter("experts_late", "Those of them that were just being read"),
    _counter("experts_prefetched", "Experts read ahead", formerly="experts_foretold_total"),
    _counter("prefetch_hits", "Those of them that the layer then asked for", formerly="experts_used_total"),
    _counter("expert_stall_seconds", "Seconds in which the computation waited for experts from disk"),
    _counter("expert_read_bytes", "Bytes of experts read from disk"),
    _gauge("requests_running", "Requests that have pages of the cache"),
    _gauge("requests_waiting", "Requests in the queue"),
    _gauge("cache_free_positions", "Positions of the latent cache that a new request could have"),
    _counter("preempted", "Requests that were preempted because the cache was full"),
    _gauge("cpu_ratio", "Use of all processors, 0..1", formerly="cpu_share"),
    _gauge("process_cpus", "Processors' worth of time that this process uses"),
    _gauge("resident_bytes", "Memory of this process"),
    _gauge("memory_ratio", "Use of the machine's memory, 0..1", formerly="memory_share"),
    _gauge("gpu_ratio", "Use of the GPU, 0..1 (NVML)", formerly="gpu_share"),
    _gauge("gpu_memory_bytes", "Memory in use on the GPU (NVML)"),
    _counter("energy_joules", "Energy of the processors' packages (cpu, RAPL) and of the GPU (gpu, NVML)", "source",
             formerly="joules_total"),
    _gauge("price_per_hour", "What an hour of this machine costs, as configured"),
)
MODEL = (
    _counter("labelled_tokens", "Tokens of requests whose domain bears a named group's name", "group"),
    _counter("correct_tokens", "Those of them whose strongest named group is that one", "group",
             formerly="right_tokens_total"),
    _counter("judged_tokens", "Tokens whose named groups were compared"),
    _counter("conflict_tokens", "Those of them whose two strongest named groups are close"),
    _counter("judged_requests", "Requests whose named groups were compared, over all their tokens"),
    _counter("conflict_requests", "Those of them whose two strongest named groups are close"),
    _gauge("routing_entropy", "Entropy (nats) of the experts' shares of the slots of the last minutes, mean of a band",
           "band"),
    _gauge("max_vio", "(largest load - mean load) / mean load of the last minutes, mean of a band", "band"),
    _gauge("dead_experts", "Experts that no token of the last minutes visited", "band"),
    _gauge("drift", "Share of a domain's slots on the group of its name, less what its atlas states",
           "group"),
)
BUSINESS = (
    _counter("requests", "Requests that ended, by finish reason (stop, length, abort, error)", "domain", "reason"),
    _counter("adapter_requests", "Requests that ended, by the adapter they went through (mixture: several at once), or "
             "the base, where there are several", "adapter", "reason"),
    _counter("adapter_tokens", "Tokens that ran through the model, by adapter or base", "adapter"),
    _counter("refused", "Requests that were refused, by status", "status"),
    Metric("time_to_first_token_seconds", "histogram", ("le",), "From a request's arrival to its first token",
           bounds=FIRST, formerly="first_token_seconds"),
    Metric("request_time_per_output_token_seconds", "histogram", ("le",), "From a token to the next, mean of a request",
           bounds=EACH, formerly="token_seconds"),
    _counter("tool_calls", "Answers with calls of tools: right if all name a tool and hold what it requires", "domain",
             "outcome"),
    _counter("schema_answers", "Answers that had to match a schema: valid if they are whole", "domain", "outcome"),
    _counter("feedback", "Feedback, up or down", "domain", "rating"),
    _counter("slice_tokens", "Tokens by domain, client, language and adapter of their requests", "kind", "value",
             exported=False),
)
POOL = (
    _counter("pool_decisions", "Decisions of the pool on a request or a part of one, by the member with the largest "
             "weight; base: none fitted", "member"),
    _counter("pool_weight", "Weights of members and the base, summed over the decisions", "member"),
    _counter("pool_labelled", "Decisions on requests whose domain bears a member's name, by that member", "member"),
    _counter("pool_correct", "Those of them that gave it the largest weight", "member"),
    _counter("pool_retrievals", "Searches of knowledge bases for an answer: hit where passages were quoted, else empty",
             "outcome"),
    _counter("pool_composite", "Requests that were answered in parts"),
    _counter("pool_parts", "Parts of them that were begun"),
    _counter("pool_seconds", "Seconds spent on decisions and passages"),
)
METRICS = {metric.name: metric for metric in (*SYSTEM, *MODEL, *BUSINESS, *POOL)}
RENAMED = {metric.formerly: metric.name for metric in METRICS.values() if metric.formerly}  # served until 0.2


def key(name: str, *labels: str) -> MetricKey:
    """The key of a metric's number, with a value for each of its labels."""
    assert len(labels) == len(METRICS[name].labels), name
    return MetricKey(name, labels)


def values(snapshot: Snapshot, name: str) -> dict[tuple[str, ...], float]:
    """A metric's numbers by the values of its labels."""
    return {own.labels: value for own, value in snapshot.items() if own.name == name}


def delta(now: Snapshot, old: Snapshot, name: str, *labels: str) -> float:
    """The growth of a number since the older snapshot, or since it was reset."""
    own = key(name, *labels)
    value, before = now.get(own, 0.0), old.get(own, 0.0)
    return value - before if value >= before else value


def total_delta(now: Snapshot, old: Snapshot, name: str) -> float:
    """The growth of a metric, summed over its labels."""
    return sum(delta(now, old, name, *labels) for labels in values(now, name))


def quantile(share: float, now: Snapshot, old: Snapshot, name: str) -> float | None:
    """A quantile of a histogram between two snapshots, linear within a bucket as Prometheus' histogram_quantile.

    None without observations."""
    bounds = [(bound, delta(now, old, name, _bound(bound))) for bound in (*METRICS[name].bounds, math.inf)]
    if not bounds[-1][1]:
        return None
    rank, below, start = share * bounds[-1][1], 0.0, 0.0
    for bound, count in bounds:
        if count >= rank and count > below:
            return start if bound == math.inf else start + (bound - start) * (rank - below) / (count - below)
        below, start = count, bound
    return start


def _bound(bound: float) -> str:
    """A bound as Prometheus writes it."""
    return "+Inf" if bound == math.inf else str(bound)


class Histogram:
    """Counts of observations up to each bound of a metric."""

    def __init__(self, name: str) -> None:
        self.name, self.bounds, self.sum = name, (*METRICS[name].bounds, math.inf), 0.0
        self.counts = [0] * len(self.bounds)

    def add(self, seconds: float) -> None:
        self.sum += seconds
        for i, bound in enumerate(self.bounds):
            self.counts[i] += seconds <= bound

    def snapshot(self) -> dict[MetricKey, float]:
        return {key(self.name, _bound(bound)): float(count)
                for bound, count in zip(self.bounds, self.counts, strict=True)} | {key(self.name, "sum"): self.sum}


def exposition(snapshot: Snapshot) -> bytes:
    """A snapshot in Prometheus' text format."""
    from prometheus_client import generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.core import Metric as Family

    def family(metric: Metric, name: str, help: str, found: Mapping[tuple[str, ...], float]) -> Family:
        if metric.kind == "histogram":
            histogram = HistogramMetricFamily(PREFIX + name, help)
            histogram.add_metric([], [(bound, n) for (bound,), n in found.items() if bound != "sum"], found["sum",])
            return histogram
        own = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        one = own(PREFIX + name, help, labels=metric.labels)
        for labels, value in found.items():
            one.add_metric(labels, value)
        return one

    class Once:
        def collect(self) -> Iterator[Family]:
            for metric in METRICS.values():
                if metric.exported and (found := values(snapshot, metric.name)):
                    yield family(metric, metric.name, metric.help, found)
                    if metric.formerly:
                        yield family(metric, metric.formerly, f"Deprecated: use {PREFIX}{metric.name}", found)

    return generate_latest(Once())
