"""What is counted of every step and every request. The definitions are those of docs/monitoring.md.

A named group is a set of experts in some layers. The strength of a group at a token is the sum of the gate's weights on
its experts over the layers, divided by what an even router would give it, so that large groups are not favoured.
Domains and groups go by one name: text of `law` or `law_expert` is labelled for the group `law_expert`.

The engine knows nothing of this: it calls `step` with what it ran, which keeps the routes and returns. They are counted
together, many steps at a time, when somebody reads or much has gathered: a few large tensor operations instead of many
small ones in every step.

Shape letters: T tokens, L MoE layers, K experts a token, E experts, P = L x K places of a token, N requests, G named
groups, D = G + 1 labels.
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
from .metrics import Histogram, key

REASONS, RATINGS = ("stop", "length", "abort", "error"), ("up", "down")
CLOSE = 0.05  # of the stronger one's strength: two groups that near are in conflict
BANDS = 3  # of layers, that metrics are kept for
GATHERED = 2048  # tokens whose routes wait to be counted
SLICES = 256  # values of a kind of slice that are remembered: those seen last


class Ran(Protocol):
    """A request's part of a step: what is looked at is request.number, .domain, .tags and chunk.tokens."""

    @property
    def request(self) -> Any: ...
    @property
    def chunk(self) -> Any: ...


@dataclass(frozen=True)
class _Step:
    parts: Sequence[tuple[Any, int]]  # request, tokens
    index: Sequence[Tensor]  # [T, K] a layer
    weight: Sequence[Tensor]


@dataclass(frozen=True)
class _End:
    number: int
    name: str  # of the counter
    first: float | None
    each: float | None


@dataclass(frozen=True)
class Counts:
    """Of routes, by now or of some minutes. slots: by label of the tokens, the first has none. labelled: tokens.
    confusion: label, strongest. conflict: the two groups that are close, lower place first."""

    slots_DLE: Tensor
    labelled_G: Tensor
    confusion_GG: Tensor
    conflict_GG: Tensor

    def since(self, old: Counts) -> Counts:
        return Counts(*(now - before for now, before in zip(vars(self).values(), vars(old).values(), strict=True)))

    def copy(self) -> Counts:
        return Counts(*(own.clone() for own in vars(self).values()))


class Groups:
    """The named groups of a model, and its bands of layers, ready for counting."""

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
        nobody_1G = torch.zeros(1, len(self.names))
        self.member_PG = torch.cat([self.member_LEG.flatten(0, 1), nobody_1G])  # places, and one for no expert
        self.even_G = self.expected_LG.sum(0).clamp(min=1e-9)
        rows = torch.arange(len(self.layers)).tensor_split(min(BANDS, max(1, len(self.layers))))
        ends = [(self.layers[int(own[0])], self.layers[int(own[-1])]) for own in rows if len(own)]
        self.bands = {str(a) if a == b else f"{a}-{b}": own for (a, b), own in zip(ends, rows, strict=False)}

    def place(self, domain: str | None) -> int:
        """Of the group that bears a domain's name, -1 for none."""
        return self.names.index(domain) if domain in self.names else -1

    def label(self, domain: str | None) -> str:
        """The name that a domain is counted under: one of a few, whatever clients send."""
        if domain is None:
            return "unknown"
        same = (domain, f"{domain}_expert", domain.removesuffix("_expert"))
        return next((name for known in (self.names, NAMES) for name in same if name in known), "other")


class Counters:
    """Of one server since it began. Any thread may call any method."""

    def __init__(self, config: ModelConfig, atlas: Atlas | None = None) -> None:
        self.config, self.atlas, self.groups = config, atlas, Groups(config, atlas)
        layers, experts, named = len(self.groups.layers), self.groups.experts, len(self.groups.names)
        self.lock = threading.Lock()
        self._pending: deque[_Step] = deque()
        self._gathered = 0
        self.counts = Counts(*(torch.zeros(shape, dtype=torch.int64) for shape in (
            (named + 1, layers, experts), (named,), (named, named), (named, named))))
        self.wanted_LE = torch.zeros(layers, experts, dtype=torch.int64)  # once a step
        self.strength: dict[int, Tensor] = {}  # of requests under way, [G]
        self._told: deque[_End | str] = deque()  # requests that ended, and counters that grow by one
        self.steps = 0
        self.step_seconds = self.inline_seconds = self.settle_seconds = 0.0
        self.numbers: dict[str, float] = defaultdict(float)
        self.slices: dict[str, dict[str, float]] = {}  # kind -> value -> tokens, seen last comes last
        labels = sorted({*self.groups.names, *(self.groups.label(name) for name in NAMES), "other", "unknown"})
        for name, outcomes in (("requests_total", REASONS), ("feedback_total", RATINGS)):
            for label in labels:  # from the start: Prometheus does not see the growth of what was not there
                self.numbers |= {key(name, label, outcome): 0.0 for outcome in outcomes}
        self.first_token = Histogram("first_token_seconds")
        self.per_token = Histogram("token_seconds")

    # ---- a step -------------------------------------------------------------------------------------------------

    def step(self, works: Sequence[Ran], routing: RoutingRecord | None, seconds: float) -> None:
        """A step is over: its requests in the order of their tokens, the routes of all tokens, its time."""
        began = time.perf_counter()
        self.steps, self.step_seconds = self.steps + 1, self.step_seconds + seconds
        parts = [(work.request, work.chunk.tokens) for work in works]
        routes = [] if routing is None else [routing.routes[layer] for layer in self.groups.layers]
        self._pending.append(_Step(parts, [r.index_TK for r in routes], [r.weight_TK for r in routes]))
        self._gathered += sum(tokens for _, tokens in parts)
        self.inline_seconds += time.perf_counter() - began
        if self._gathered > GATHERED and self.lock.acquire(blocking=False):  # else somebody who reads counts it
            try:
                self._settle()
            finally:
                self.lock.release()

    def _settle(self) -> None:
        began = time.perf_counter()
        ended = [self._told.popleft() for _ in range(len(self._told))]  # before the steps, all of which they have had
        steps = [self._pending.popleft() for _ in range(len(self._pending))]
        self._gathered = 0
        requests: dict[int, Any] = {}
        tokens_of: Counter[int] = Counter()
        for request, tokens in (part for step in steps for part in step.parts):
            requests[request.number] = request
            tokens_of[request.number] += tokens
        for number, request in requests.items():
            for kind, value in (("domain", self.groups.label(request.domain)), *request.tags.items()):
                self._slice(kind, value, tokens_of[number])
        if routed := [step for step in steps if step.index]:
            self._routes(routed, requests)
        for end in ended:
            if isinstance(end, str):
                self.numbers[end] += 1
                continue
            self.numbers[end.name] += 1
            if end.first is not None:
                self.first_token.add(end.first)
            if end.each is not None:
                self.per_token.add(end.each)
            if (strength_G := self.strength.pop(end.number, None)) is not None:
                self.numbers["judged_requests_total"] += 1
                best_2 = strength_G.topk(min(2, len(strength_G))).values
                self.numbers["conflict_requests_total"] += int(near(best_2[None])[0])
        self.settle_seconds += time.perf_counter() - began

    def _slice(self, kind: str, value: str, tokens: int) -> None:
        own = self.slices.setdefault(kind, {})
        own[value] = own.pop(value, 0.0) + tokens
        if len(own) > SLICES:
            del own[next(iter(own))]

    def _routes(self, steps: Sequence[_Step], requests: Mapping[int, Any]) -> None:
        groups, (layers, experts), numbers = self.groups, self.wanted_LE.shape, self.numbers
        named, nobody = len(groups.names), layers * experts  # the place of an index that is no expert
        # numpy for whole numbers: torch would wake its threads, which wait for the model's
        steps = sorted(steps, key=lambda step: tuple(step.index[0].shape))  # one call for all steps of a shape
        widest = max(step.index[0].shape[1] for step in steps)  # a request may ask for more experts than others
        alike = [list(own) for _, own in groupby(steps, key=lambda step: tuple(step.index[0].shape))]
        index_TLK = np.concatenate([_side_by_side([step.index for step in own], widest, -1).numpy() for own in alike])
        weight_TLK = torch.cat([_side_by_side([step.weight for step in own], widest, 0) for own in alike])
        place_TLK = index_TLK + experts * np.arange(layers)[:, None]
        if (absent_TLK := index_TLK < 0).any():
            place_TLK[absent_TLK] = nobody
        place_TP = place_TLK.reshape(len(place_TLK), -1)
        row = {number: i for i, number in enumerate(requests)}
        parts = [(row[request.number], tokens) for step in steps for request, tokens in step.parts]
        of_T = np.repeat([i for i, _ in parts], [tokens for _, tokens in parts])
        label_T = np.array([groups.place(groups.label(request.domain)) for request in requests.values()])[of_T]
        count_D = np.bincount(((label_T + 1)[:, None] * (nobody + 1) + place_TP).ravel(),
                              minlength=(named + 1) * (nobody + 1)).reshape(named + 1, nobody + 1)
        counts = self.counts
        counts.slots_DLE.add_(torch.from_numpy(count_D[:, :nobody]).view_as(counts.slots_DLE))
        tokens_S = np.array([len(step.index[0]) for step in steps])
        asked = np.zeros((len(steps), nobody + 1), dtype=bool)
        asked[np.repeat(np.arange(len(steps)), tokens_S)[:, None], place_TP] = True
        self.wanted_LE += torch.from_numpy(asked[:, :nobody].sum(0)).view_as(self.wanted_LE)
        expected = layers * experts * (1 - (1 - self.config.num_experts_per_tok / experts) ** tokens_S).sum()
        numbers["distinct_experts_expected_total"] += float(expected)
        if not named:
            return
        strength_TG = embedding_bag(torch.from_numpy(place_TP), groups.member_PG, mode="sum",
                                    per_sample_weights=weight_TLK.float().flatten(1)) / groups.even_G
        best_T2 = strength_TG.topk(min(2, named), 1)
        numbers["judged_tokens_total"] += len(strength_TG)
        pairs_C2 = best_T2.indices[near(best_T2.values)].sort(1).values
        numbers["conflict_tokens_total"] += len(pairs_C2)
        if len(pairs_C2):
            counts.conflict_GG.add_(torch.bincount(
                pairs_C2[:, 0] * named + pairs_C2[:, 1], minlength=named * named).view(named, named))
        known_T = label_T >= 0
        counts.labelled_G.add_(torch.from_numpy(np.bincount(label_T[known_T], minlength=named)))
        known_T &= best_T2.values[:, 0].numpy() > 0  # else no named group was visited
        counts.confusion_GG.add_(torch.from_numpy(np.bincount(
            label_T[known_T] * named + best_T2.indices[:, 0].numpy()[known_T], minlength=named * named)
        ).view(named, named))
        sum_NG = torch.zeros(len(requests), named).index_add_(0, torch.from_numpy(of_T), strength_TG)
        for number, own_G in zip(requests, sum_NG, strict=True):
            before = self.strength.get(number)
            self.strength[number] = own_G if before is None else before + own_G

    # ---- requests -----------------------------------------------------------------------------------------------

    def finished(self, number: int, domain: str | None, reason: str, first: float | None,
                 each: float | None) -> None:
        """A request is over. first: seconds to its first token; each: from a token to the next, mean."""
        self._told.append(_End(number, key("requests_total", self.groups.label(domain), reason), first, each))

    def count(self, name: str, domain: str | None, outcome: str) -> None:
        """One more of a counter by domain and outcome: tool_calls_total, schema_answers_total, feedback_total."""
        self._told.append(key(name, self.groups.label(domain), outcome))

    def refused(self, status: int) -> None:
        self._told.append(key("refused_total", str(status)))

    # ---- figures ------------------------------------------------------------------------------------------------

    def now(self) -> Counts:
        """A copy of what is counted of routes."""
        with self.lock:
            self._settle()
            return self.counts.copy()

    def reading(self, before: Counts | None = None) -> dict[str, float]:
        """All numbers by now. before: the counts at the begin of the last minutes, for what is said of these."""
        with self.lock:
            self._settle()
            groups, counts = self.groups, self.counts
            recent = counts if before is None else counts.since(before)
            out: dict[str, float] = {
                "steps_total": self.steps, "step_seconds_total": self.step_seconds,
                "watch_seconds_total": self.inline_seconds + self.settle_seconds}
            out |= dict(self.numbers) | self.first_token.reading() | self.per_token.reading()
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
                out["distinct_experts_total"] = float(self.wanted_LE.sum())
            for g, name in enumerate(groups.names):
                wanted_LE = self.wanted_LE * groups.member_LEG[..., g].double()
                out[key("group_wanted_total", name)] = float(wanted_LE.sum())
                out[key("labelled_tokens_total", name)] = int(counts.labelled_G[g])
                out[key("right_tokens_total", name)] = int(counts.confusion_GG[g, g])
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


def near(best_T2: Tensor) -> Tensor:
    """Boolean [T]: whether the stronger two of the groups are in conflict. best_T2: their strengths."""
    if best_T2.shape[1] < 2:
        return torch.zeros(len(best_T2), dtype=torch.bool)
    return best_T2[:, 0] - best_T2[:, 1] < CLOSE * best_T2[:, 0]


def balance(config: ModelConfig, groups: Groups, slots_LE: Tensor) -> dict[str, float]:
    """Entropy, MaxVio and dead experts of some slots, by band; nothing of bands without any."""
    usage = ExpertUsage(config)
    out: dict[str, float] = {}
    usage.counts_LE = slots_LE
    entropy_L = (usage.diversity() * groups.experts).clamp(min=1.0).log()
    for band, rows in groups.bands.items():
        if slots_LE[rows].any():
            out[key("routing_entropy", band)] = float(entropy_L[rows].mean())
            out[key("max_vio", band)] = float(usage.max_vio()[rows].mean())
            out[key("dead_experts", band)] = float(usage.dead()[rows].sum())
    return out
