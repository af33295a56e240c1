"""Counts steps and requests. The definitions are those of docs/monitoring.md.

A named group is a set of experts in some layers. The strength of a group at a token is the sum of the gate's weights on
its experts over the layers, divided by what an even router would give it, so that large groups are not favoured.
Domains and groups go by one name: text of `law` or `law_expert` is labelled for the group `law_expert`.

Which groups are rivals, of which the strongest counts: those that training built in are the gate's own, share no expert
and are rivals of each other and of the routing groups without a name, as in training. A measured name is a tag beside
them: its rivals are all names but those with which it shares more than half of the smaller one's experts, since these
are two names of the same experts. So nothing that is profiled changes what is said of names that training built in.

The engine calls `on_step`, which keeps the routes and returns. They are counted together, many steps at a time, when a
snapshot is taken or many have gathered: a few large tensor operations instead of many small ones in every step.

Shape letters: T tokens, L MoE layers, K experts a token, E experts, P = L x K places of a token, N requests, G named
groups, D = G + 1 labels, R rivals: the named groups first, then the routing groups without a name.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..atlas import Atlas, ExpertUsage
from ..config import ModelConfig
from ..domain import NAMES
from ..model import RoutingRecord
from .metrics import Histogram, MetricKey, key

REASONS, RATINGS = ("stop", "length", "abort", "error"), ("up", "down")
CLOSE = 0.05  # of the stronger one's strength: two groups that near are in conflict
BANDS = 3  # bands of layers that have metrics of their own
GATHERED = 2048  # tokens whose routes wait to be counted
MEMBERS = 64  # of a pool that are counted from the start; of a larger one others follow when they are chosen
SLICES = 256  # values of a kind of slice that are kept: those seen last


class StepItem(Protocol):
    """A request's part of a step. Read: request.request_id, .domain, .metric_labels, and chunk.tokens."""

    @property
    def request(self) -> Any: ...
    @property
    def chunk(self) -> Any: ...


class EngineStep(Protocol):
    """The output of an engine's step: what ran, in the order of its tokens, their routes, seconds."""

    @property
    def batch(self) -> Sequence[StepItem]: ...
    @property
    def routing(self) -> RoutingRecord | None: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class _Step:
    parts: Sequence[tuple[Any, int]]  # request, tokens
    index: Sequence[Tensor]  # [T, K] a layer
    weight: Sequence[Tensor]


@dataclass(frozen=True)
class _End:
    request_id: int
    counter: MetricKey
    first: float | None
    each: float | None


@dataclass(frozen=True)
class Counts:
    """Counts of routes, in total or over some minutes. slots: by label of the tokens, the first for tokens without one.
    labelled: tokens. confusion: label, strongest group. conflict: the two groups that are close, lower index first."""

    slots_DLE: Tensor
    labelled_G: Tensor
    confusion_GG: Tensor
    conflict_GG: Tensor

    def since(self, old: Counts) -> Counts:
        return Counts(*(now - before for now, before in zip(vars(self).values(), vars(old).values(), strict=True)))

    def copy(self) -> Counts:
        return Counts(*(own.clone() for own in vars(self).values()))


class Groups:
    """The named groups of a model and its bands of layers, as tensors for counting."""

    def __init__(self, config: ModelConfig, atlas: Atlas | None) -> None:
        self.names = tuple(atlas) if atlas is not None else ()
        self.layers, self.experts = config.moe_layers, config.n_routed_experts
        self.member_LEG = torch.zeros(len(self.layers), self.experts, len(self.names))
        row_of = {layer: row for row, layer in enumerate(self.layers)}
        for g, name in enumerate(self.names):
            assert atlas is not None
            for expert in atlas[name]:
                self.member_LEG[row_of[expert.layer], expert.index, g] = 1.0
        self.expected_LG = self.member_LEG.sum(1) / max(self.experts, 1)  # share of a layer's slots if all are even
        built_in = [] if atlas is None else [group.kind == "built-in" for group in atlas.groups]
        member_ER = self._rivals(config, built_in)
        absent_1R = torch.zeros(1, member_ER.shape[1])
        self.member_PR = torch.cat([member_ER, absent_1R])  # places, and one for no expert
        self.even_R = member_ER.sum(0).div(max(self.experts, 1)).clamp(min=1e-9)
        self.chance_G = 1 / self.against_RR[: len(self.names)].sum(1).clamp(min=1).double()
        rows = torch.arange(len(self.layers)).tensor_split(min(BANDS, max(1, len(self.layers))))
        ends = [(self.layers[int(own[0])], self.layers[int(own[-1])]) for own in rows if len(own)]
        self.bands = {str(a) if a == b else f"{a}-{b}": own for (a, b), own in zip(ends, rows, strict=False)}

    def _rivals(self, config: ModelConfig, built_in: Sequence[bool]) -> Tensor:
        """The members of each rival, [L E, R]. Sets against_RR, the rivals that each is compared with, itself included,
        and contest_R, those that are compared at every token, whatever its label."""
        named_ER = self.member_LEG.flatten(0, 1)
        columns = [named_ER]
        if any(built_in):
            taken_E = named_ER[:, torch.tensor(built_in)].any(1)
            for group in torch.arange(self.experts).tensor_split(config.n_group):
                own_LE = torch.zeros(len(self.layers), self.experts)
                own_LE[:, group] = 1.0
                if not (own_E := own_LE.flatten())[taken_E].any():
                    columns.append(own_E.unsqueeze(1))
        member_ER = torch.cat(columns, 1)
        named, rivals = named_ER.shape[1], member_ER.shape[1]
        shared_RR, size_R = member_ER.T @ member_ER, member_ER.sum(0)
        gate_R = torch.tensor([*built_in, *[True] * (rivals - named)], dtype=torch.bool)  # one of its own groups
        apart_RR = shared_RR <= torch.minimum(size_R, size_R.unsqueeze(1)) / 2
        apart_RR[:, named:] = False
        self.against_RR = torch.where(gate_R.unsqueeze(1), gate_R, apart_RR) | torch.eye(rivals, dtype=torch.bool)
        self.contest_R = gate_R if any(built_in) else torch.ones(rivals, dtype=torch.bool)
        self.everyone = bool(self.against_RR.all())  # is everyone's rival
        return member_ER

    def strongest(self, strength_NR: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
        """(place, strength) of the strongest of each label's rivals, itself included."""
        best = (strength_NR if self.everyone else strength_NR.masked_fill(~self.against_RR[label_N], -1.0)).max(1)
        return best.indices, best.values

    def near(self, strength_NR: Tensor) -> tuple[Tensor, Tensor]:
        """(boolean [N]: whether the strongest of all and the strongest of its rivals are in conflict; the two, lower
        index first, [N, 2])."""
        if self.against_RR.shape[0] > 1 and self.everyone:  # the same, quicker
            best = strength_NR.topk(2, 1)
            first_N, second_N = best.values.unbind(1)
            return first_N - second_N < CLOSE * first_N, best.indices.sort(1).values
        first = strength_NR.masked_fill(~self.contest_R, -1.0).max(1, keepdim=True)
        rivals_NR = (self.against_RR[first.indices[:, 0]] & self.contest_R).scatter(1, first.indices, False)
        second = strength_NR.masked_fill(~rivals_NR, -1.0).max(1, keepdim=True)
        close_N1 = (second.values >= 0) & (first.values - second.values < CLOSE * first.values)
        return close_N1[:, 0], torch.cat([first.indices, second.indices], 1).sort(1).values

    def chance(self, labelled: Sequence[float]) -> float | None:
        """Routing accuracy of tokens that go to all of their rivals alike. labelled: tokens of each group."""
        weight_G = torch.tensor(labelled, dtype=torch.float64)
        weight_G = weight_G if weight_G.any() else torch.ones_like(weight_G)
        return float((weight_G * self.chance_G).sum() / weight_G.sum()) if len(weight_G) else None

    def place(self, domain: str | None) -> int:
        """The index of the group that bears a domain's name, -1 for none."""
        return self.names.index(domain) if domain in self.names else -1

    def label(self, domain: str | None) -> str:
        """The name that a domain is counted under: one of a few, whatever clients send."""
        if domain is None:
            return "unknown"
        return next((name for known in (self.names, NAMES) for name in same_name(domain) if name in known), "other")


def same_name(domain: str | None) -> tuple[str, ...]:
    """The names that stand for a domain."""
    return () if domain is None else (domain, f"{domain}_expert", domain.removesuffix("_expert"))


class ServingCounters:
    """The counts of one server since it began. Thread-safe."""

    def __init__(self, config: ModelConfig, atlas: Atlas | None = None, adapters: Sequence[str] = (),
                 members: Mapping[str, str] | None = None) -> None:
        """adapters: what the tag `adapter` of a request may say, the base's name among them; empty without any.
        members: name -> kind of those of the pool and of the base; None without a pool."""
        self.config, self.atlas, self.groups = config, atlas, Groups(config, atlas)
        layers, experts, named = len(self.groups.layers), self.groups.experts, len(self.groups.names)
        self.lock = threading.Lock()
        self._pending: deque[_Step] = deque()
        self._gathered = 0
        self.counts = Counts(*(torch.zeros(shape, dtype=torch.int64) for shape in (
            (named + 1, layers, experts), (named,), (named, named), (named, named))))
        self.wanted_LE = torch.zeros(layers, experts, dtype=torch.int64)  # once a step
        self.strength: dict[int, Tensor] = {}  # of requests under way, [R]
        self._events: deque[_End | tuple[MetricKey, float]] = deque()  # requests that ended, and counters that grow
        self.steps = 0
        self.step_seconds = self.inline_seconds = self.settle_seconds = 0.0
        self.numbers: dict[MetricKey, float] = defaultdict(float)
        self.slices: dict[str, dict[str, float]] = {}  # kind -> value -> tokens, seen last comes last
        labels = sorted({*self.groups.names, *(self.groups.label(name) for name in NAMES), "other", "unknown"})
        for name, outcomes in (("requests_total", REASONS), ("feedback_total", RATINGS)):
            for label in labels:  # from the start: Prometheus does not see the growth of what was not there
                self.numbers |= {key(name, label, outcome): 0.0 for outcome in outcomes}
        for adapter in adapters:
            self.numbers |= {key("adapter_requests_total", adapter, reason): 0.0 for reason in REASONS}
            self.numbers[key("adapter_tokens_total", adapter)] = 0.0
        self.members = members
        if members is not None:
            for name in ("pool_composite_total", "pool_parts_total", "pool_seconds_total"):
                self.numbers[key(name)] = 0.0
            self.numbers |= {key("pool_retrievals_total", outcome): 0.0 for outcome in ("hit", "empty")}
            self.numbers |= {key(f"pool_{what}_total", member): 0.0 for member in list(members)[:MEMBERS]
                             for what in ("decisions", "weight", "labelled", "correct")}
        self.first_token = Histogram("time_to_first_token_seconds")
        self.per_token = Histogram("request_time_per_output_token_seconds")

    # ---- a step -------------------------------------------------------------------------------------------------

    def wants_routes(self, batch: object) -> bool:
        return True

    def on_step(self, output: EngineStep) -> None:
        self.step(output.batch, output.routing, output.seconds)

    def step(self, works: Sequence[StepItem], routing: RoutingRecord | None, seconds: float) -> None:
        """Keep a step: its requests in the order of their tokens, the routes of all tokens, its seconds."""
        began = time.perf_counter()
        self.steps, self.step_seconds = self.steps + 1, self.step_seconds + seconds
        parts = [(work.request, work.chunk.tokens) for work in works]
        routes = [] if routing is None else [routing.routes[layer] for layer in self.groups.layers]
        self._pending.append(_Step(parts, [r.index_TK for r in routes], [r.weight_TK for r in routes]))
        self._gathered += sum(tokens for _, tokens in parts)
        self.inline_seconds += time.perf_counter() - began
        if self._gathered > GATHERED and self.lock.acquire(blocking=False):  # else the reader that has it counts
            try:
                self._settle()
            finally:
                self.lock.release()

    def _settle(self) -> None:
        began = time.perf_counter()
        ended = [self._events.popleft() for _ in range(len(self._events))]  # popped first: their steps are pending
        steps = [self._pending.popleft() for _ in range(len(self._pending))]
        self._gathered = 0
        requests: dict[int, Any] = {}
        tokens_of: Counter[int] = Counter()
        for request, tokens in (part for step in steps for part in step.parts):
            requests[request.request_id] = request
            tokens_of[request.request_id] += tokens
        for number, request in requests.items():
            for kind, value in (("domain", self.groups.label(request.domain)), *request.metric_labels.items()):
                self._slice(kind, value, tokens_of[number])
            if (adapter := request.metric_labels.get("adapter")) is not None:
                self.numbers[key("adapter_tokens_total", adapter)] += tokens_of[number]
        if routed := [step for step in steps if step.index]:
            self._routes(routed, requests)
        for end in ended:
            if isinstance(end, tuple):
                self.numbers[end[0]] += end[1]
                continue
            self.numbers[end.counter] += 1
            if end.first is not None:
                self.first_token.add(end.first)
            if end.each is not None:
                self.per_token.add(end.each)
            if (strength_R := self.strength.pop(end.request_id, None)) is not None:
                self.numbers[key("judged_requests_total")] += 1
                self.numbers[key("conflict_requests_total")] += int(self.groups.near(strength_R[None])[0])
        self.settle_seconds += time.perf_counter() - began

    def _slice(self, kind: str, value: str, tokens: int) -> None:
        own = self.slices.setdefault(kind, {})
        own[value] = own.pop(value, 0.0) + tokens
        if len(own) > SLICES:
            del own[next(iter(own))]

    def _routes(self, steps: Sequence[_Step], requests: Mapping[int, Any]) -> None:
        groups, (layers, experts), numbers = self.groups, self.wanted_LE.shape, self.numbers
        named, absent = len(groups.names), layers * experts  # the place of an index that is no expert
        # numpy for whole numbers: torch would wake its threads, which wait for the model's
        steps = sorted(steps, key=lambda step: tuple(step.index[0].shape))  # one call for all steps of a shape
        widest = max(step.index[0].shape[1] for step in steps)  # a request may ask for more experts than others
        alike = [list(own) for _, own in groupby(steps, key=lambda step: tuple(step.index[0].shape))]
        index_TLK = np.concatenate([_side_by_side([step.index for step in own], widest, -1).numpy() for own in alike])
        weight_TLK = torch.cat([_side_by_side([step.weight for step in own], widest, 0) for own in alike])
        place_TLK = index_TLK + experts * np.arange(layers)[:, None]
        if (absent_TLK := index_TLK < 0).any():
            place_TLK[absent_TLK] = absent
        place_TP = place_TLK.reshape(len(place_TLK), -1)
        row = {number: i for i, number in enumerate(requests)}
        parts = [(row[request.request_id], tokens) for step in steps for request, tokens in step.parts]
        of_T = np.repeat([i for i, _ in parts], [tokens for _, tokens in parts])
        label_T = np.array([groups.place(groups.label(request.domain)) for request in requests.values()])[of_T]
        count_D = np.bincount(((label_T + 1)[:, None] * (absent + 1) + place_TP).ravel(),
                              minlength=(named + 1) * (absent + 1)).reshape(named + 1, absent + 1)
        counts = self.counts
        counts.slots_DLE.add_(torch.from_numpy(count_D[:, :absent]).view_as(counts.slots_DLE))
        tokens_S = np.array([len(step.index[0]) for step in steps])
        asked = np.zeros((len(steps), absent + 1), dtype=bool)
        asked[np.repeat(np.arange(len(steps)), tokens_S)[:, None], place_TP] = True
        self.wanted_LE += torch.from_numpy(asked[:, :absent].sum(0)).view_as(self.wanted_LE)
        expected = layers * experts * (1 - (1 - self.config.num_experts_per_tok / experts) ** tokens_S).sum()
        numbers[key("distinct_experts_expected_total")] += float(expected)
        if not named:
            return
        strength_TR = embedding_bag(torch.from_numpy(place_TP), groups.member_PR, mode="sum",
                                    per_sample_weights=weight_TLK.float().flatten(1)) / groups.even_R
        numbers[key("judged_tokens_total")] += len(strength_TR)
        close_T, pair_T2 = groups.near(strength_TR)
        numbers[key("conflict_tokens_total")] += int(close_T.sum())
        pair_C2 = pair_T2[close_T & (pair_T2[:, 1] < named)]
        counts.conflict_GG.add_(torch.bincount(
            pair_C2[:, 0] * named + pair_C2[:, 1], minlength=named * named).view(named, named))
        known_T = torch.from_numpy(label_T >= 0)
        label_C = torch.from_numpy(label_T)[known_T]
        counts.labelled_G.add_(torch.bincount(label_C, minlength=named))
        best_C, strength_C = groups.strongest(strength_TR[known_T], label_C)
        found_C = (strength_C > 0) & (best_C < named)  # else no named group was visited, or one without a name more
        counts.confusion_GG.add_(torch.bincount(
            label_C[found_C] * named + best_C[found_C], minlength=named * named).view(named, named))
        sum_NR = torch.zeros(len(requests), strength_TR.shape[1]).index_add_(0, torch.from_numpy(of_T), strength_TR)
        for number, own_R in zip(requests, sum_NR, strict=True):
            before = self.strength.get(number)
            self.strength[number] = own_R if before is None else before + own_R

    # ---- requests -----------------------------------------------------------------------------------------------

    def finished(self, number: int, domain: str | None, reason: str, first: float | None,
                 each: float | None, adapter: str | None = None) -> None:
        """Count a request that has ended. first: seconds to its first token; each: mean seconds per further token."""
        if adapter is not None:
            self.add("adapter_requests_total", adapter, reason)
        self._events.append(_End(number, key("requests_total", self.groups.label(domain), reason), first, each))

    def count(self, name: str, domain: str | None, outcome: str) -> None:
        """Increment a counter by domain and outcome: tool_calls_total, schema_answers_total, feedback_total."""
        self.add(name, self.groups.label(domain), outcome)

    def refused(self, status: int) -> None:
        self.add("refused_total", str(status))

    def add(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Let a counter grow."""
        self._events.append((key(name, *labels), by))

    def member(self, domain: str | None) -> str | None:
        """The member of the pool that bears a domain's name."""
        return next((name for name in same_name(domain) if name in (self.members or ())), None)

    # ---- figures ------------------------------------------------------------------------------------------------

    def now(self) -> Counts:
        """A copy of the counts of routes."""
        with self.lock:
            self._settle()
            return self.counts.copy()

    def snapshot(self, before: Counts | None = None) -> dict[MetricKey, float]:
        """All numbers. before: the counts at the beginning of the window, for the metrics of the last minutes."""
        with self.lock:
            self._settle()
            groups, counts = self.groups, self.counts
            recent = counts if before is None else counts.since(before)
            out: dict[MetricKey, float] = {
                key("steps_total"): self.steps, key("step_seconds_total"): self.step_seconds,
                key("watch_seconds_total"): self.inline_seconds + self.settle_seconds}
            out |= dict(self.numbers) | self.first_token.snapshot() | self.per_token.snapshot()
            out |= {key("slice_tokens_total", kind, value): tokens for kind, own in self.slices.items()
                    for value, tokens in own.items()}
            slots_LE = counts.slots_DLE.sum(0)
            slots_L = slots_LE.sum(1)
            slots_LG = torch.einsum("le,leg->lg", slots_LE.double(), groups.member_LEG.double())
            expected_LG = slots_L.unsqueeze(1) * groups.expected_LG.double()
            for band, rows in groups.bands.items():
                out[key("slots_total", band)] = float(slots_L[rows].sum())
                for g, name in enumerate(groups.names):
                    if groups.expected_LG[rows, g].any():
                        out[key("group_slots_total", name, band)] = float(slots_LG[rows, g].sum())
                        out[key("group_expected_slots_total", name, band)] = float(expected_LG[rows, g].sum())
            if groups.layers:
                out[key("distinct_experts_total")] = float(self.wanted_LE.sum())
            for g, name in enumerate(groups.names):
                wanted_LE = self.wanted_LE * groups.member_LEG[..., g].double()
                out[key("group_wanted_total", name)] = float(wanted_LE.sum())
                out[key("labelled_tokens_total", name)] = int(counts.labelled_G[g])
                out[key("correct_tokens_total", name)] = int(counts.confusion_GG[g, g])
                if (drift := self._drift(g, recent.slots_DLE[g + 1])) is not None:
                    out[key("drift", name)] = drift
            return out | balance(self.config, groups, recent.slots_DLE.sum(0))

    def _drift(self, g: int, slots_LE: Tensor) -> float | None:
        assert self.atlas is not None
        stated = self.atlas.group(self.groups.names[g]).evidence.get("coverage_slots")
        if stated is None or not slots_LE.any():
            return None
        own_L = (slots_LE * self.groups.member_LEG[..., g].double()).sum(1) / slots_LE.sum(1)
        return float(own_L.mean()) - stated


def _side_by_side(steps: Sequence[Sequence[Tensor]], width: int, filler: float) -> Tensor:
    """[T, L, width] of the layers' tensors [t, K] of steps that are all of one shape."""
    (tokens, top), layers = steps[0][0].shape, len(steps[0])
    own_SLtK = torch.cat([own for step in steps for own in step]).view(len(steps), layers, tokens, top).cpu()
    own_TLK = own_SLtK.transpose(1, 2).flatten(0, 1)
    return own_TLK if top == width else torch.nn.functional.pad(own_TLK, (0, width - top), value=filler)


def balance(config: ModelConfig, groups: Groups, slots_LE: Tensor) -> dict[MetricKey, float]:
    """Entropy, MaxVio and dead experts of some slots, by band; bands without slots are left out."""
    usage = ExpertUsage(config)
    out: dict[MetricKey, float] = {}
    usage.counts_LE = slots_LE
    entropy_L = (usage.diversity() * groups.experts).clamp(min=1.0).log()
    for band, rows in groups.bands.items():
        if slots_LE[rows].any():
            out[key("routing_entropy", band)] = float(entropy_L[rows].mean())
            out[key("max_vio", band)] = float(usage.max_vio()[rows].mean())
            out[key("dead_experts", band)] = float(usage.dead()[rows].sum())
    return out
