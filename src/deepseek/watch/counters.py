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
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..atlas import Atlas, ExpertUsage
from ..config import ModelConfig
from ..domain import NAMES
from ..model import RoutingRecord
from .metrics import EACH, FIRST, Histogram, key, values

CLOSE = 0.05  # of the stronger one's strength: two groups that near are in conflict
BANDS = 3  # of layers, that metrics are kept for
GATHERED = 2048  # tokens whose routes wait to be counted
SLICES = 512  # values of slices; further ones are "other"


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
        for name in (domain, f"{domain}_expert"):
            if name in self.names or name in NAMES:
                return name
        return "other"


class Counters:
    """Of one server since it began. Any thread may call any method."""

    def __init__(self, config: ModelConfig, atlas: Atlas | None = None) -> None:
        self.config, self.atlas, self.groups = config, atlas, Groups(config, atlas)
        layers, experts, named = len(self.groups.layers), self.groups.experts, len(self.groups.names)
        self.lock = threading.Lock()
        self._pending: deque[_Step] = deque()
        self._gathered = 0
        self.slots_DLE = torch.zeros(named + 1, layers, experts, dtype=torch.int64)  # by label, the first has none
        self.wanted_LE = torch.zeros(layers, experts, dtype=torch.int64)  # once a step
        self.confusion_GG = torch.zeros(named, named, dtype=torch.int64)  # label, strongest
        self.conflict_GG = torch.zeros(named, named, dtype=torch.int64)  # the two that are close, lower place first
        self.strength: dict[int, Tensor] = {}  # of requests under way, [G]
        self._over: list[int] = []  # requests that ended
        self.steps = 0
        self.step_seconds = self.inline_seconds = self.settle_seconds = 0.0
        self.numbers: Counter[str] = Counter()
        self.first_token = Histogram("first_token_seconds", FIRST)
        self.per_token = Histogram("token_seconds", EACH)

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
        if self._gathered > GATHERED:
            self.settle()

    def settle(self) -> None:
        """Count what has gathered."""
        with self.lock:
            self._settle()

    def _settle(self) -> None:
        began = time.perf_counter()
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
        while self._over:
            if (strength_G := self.strength.pop(self._over.pop(), None)) is not None:
                self.numbers["judged_requests_total"] += 1
                best_2 = strength_G.topk(min(2, len(strength_G))).values
                self.numbers["conflict_requests_total"] += int(close(best_2[None])[0])
        self.settle_seconds += time.perf_counter() - began

    def _slice(self, kind: str, value: str, tokens: int) -> None:
        name = key("slice_tokens_total", kind, value)
        if name not in self.numbers and len(values(self.numbers, "slice_tokens_total")) >= SLICES:
            name = key("slice_tokens_total", kind, "other")
        self.numbers[name] += tokens

    def _routes(self, steps: Sequence[_Step], requests: Mapping[int, Any]) -> None:
        groups, (layers, experts), numbers = self.groups, self.wanted_LE.shape, self.numbers
        named, nobody = len(groups.names), layers * experts  # the place of an index that is no expert
        # numpy for whole numbers: torch would wake its threads, which wait for the model's
        index_TLK = np.concatenate([np.stack([own.cpu().numpy() for own in step.index], 1) for step in steps])
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
        self.slots_DLE += torch.from_numpy(count_D[:, :nobody]).view_as(self.slots_DLE)
        asked = np.zeros((len(steps), nobody + 1), dtype=bool)
        asked[np.repeat(np.arange(len(steps)), [len(step.index[0]) for step in steps])[:, None], place_TP] = True
        self.wanted_LE += torch.from_numpy(asked[:, :nobody].sum(0)).view_as(self.wanted_LE)
        if not named:
            return
        weight_TLK = torch.cat([torch.stack(tuple(step.weight), 1) for step in steps]).float().cpu()
        strength_TG = embedding_bag(torch.from_numpy(place_TP), groups.member_PG, mode="sum",
                                    per_sample_weights=weight_TLK.flatten(1)) / groups.even_G
        best_T2 = strength_TG.topk(min(2, named), 1)
        numbers["judged_tokens_total"] += len(strength_TG)
        pairs_C2 = best_T2.indices[close(best_T2.values)].sort(1).values
        numbers["conflict_tokens_total"] += len(pairs_C2)
        if len(pairs_C2):
            self.conflict_GG += torch.bincount(
                pairs_C2[:, 0] * named + pairs_C2[:, 1], minlength=named * named).view(named, named)
        known_T = label_T >= 0
        self.confusion_GG += torch.from_numpy(np.bincount(
            label_T[known_T] * named + best_T2.indices[:, 0].numpy()[known_T], minlength=named * named)
        ).view(named, named)
        sum_NG = torch.zeros(len(requests), named).index_add_(0, torch.from_numpy(of_T), strength_TG)
        for number, own_G in zip(requests, sum_NG, strict=True):
            before = self.strength.get(number)
            self.strength[number] = own_G if before is None else before + own_G

    # ---- requests -----------------------------------------------------------------------------------------------

    def finished(self, number: int, domain: str | None, reason: str, first: float | None,
                 each: float | None) -> None:
        """A request is over. first: seconds to its first token; each: from a token to the next, mean."""
        with self.lock:
            self.numbers[key("requests_total", self.groups.label(domain), reason)] += 1
            self._over.append(number)
            if first is not None:
                self.first_token.add(first)
            if each is not None:
                self.per_token.add(each)

    def count(self, name: str, domain: str | None, outcome: str) -> None:
        """One more of a counter by domain and outcome: tool_calls_total, schema_answers_total, feedback_total."""
        with self.lock:
            self.numbers[key(name, self.groups.label(domain), outcome)] += 1

    def refused(self, status: int) -> None:
        with self.lock:
            self.numbers[key("refused_total", str(status))] += 1

    # ---- figures ------------------------------------------------------------------------------------------------

    def slots(self) -> Tensor:
        """How often each expert was visited so far, [L, E]."""
        return self.slots_DLE.sum(0)

    def reading(self, before_LE: Tensor | None = None) -> dict[str, float]:
        """All numbers by now. before_LE: slots at the begin of the last minutes, for what is said of these."""
        with self.lock:
            self._settle()
            groups = self.groups
            out: dict[str, float] = {
                "steps_total": self.steps, "step_seconds_total": self.step_seconds,
                "watch_seconds_total": self.inline_seconds + self.settle_seconds}
            out |= self.numbers | self.first_token.reading() | self.per_token.reading()
            slots_LE = self.slots()
            slots_L = slots_LE.sum(1)
            slots_LG = torch.einsum("le,leg->lg", slots_LE.float(), groups.member_LEG)
            expected_LG = slots_L.unsqueeze(1) * groups.expected_LG
            for band, rows in groups.bands.items():
                out[key("slots_total", band)] = float(slots_L[rows].sum())
                for g, name in enumerate(groups.names):
                    if groups.expected_LG[rows, g].any():
                        out[key("group_slots_total", name, band)] = float(slots_LG[rows, g].sum())
                        out[key("group_expected_slots_total", name, band)] = float(expected_LG[rows, g].sum())
            for g, name in enumerate(groups.names):
                out[key("group_wanted_total", name)] = float((self.wanted_LE * groups.member_LEG[..., g]).sum())
                if labelled := int(self.confusion_GG[g].sum()):
                    out[key("labelled_tokens_total", name)] = labelled
                    out[key("right_tokens_total", name)] = int(self.confusion_GG[g, g])
                if (drift := self._drift(g)) is not None:
                    out[key("drift", name)] = drift
            recent_LE = slots_LE - (0 if before_LE is None else before_LE)
        return out | balance(self.config, groups, recent_LE)

    def _drift(self, g: int) -> float | None:
        assert self.atlas is not None
        stated = self.atlas.group(self.groups.names[g]).evidence.get("coverage_slots")
        slots_LE = self.slots_DLE[g + 1]
        if stated is None or not slots_LE.any():
            return None
        own_L = (slots_LE * self.groups.member_LEG[..., g]).sum(1) / slots_LE.sum(1)
        return float(own_L.mean()) - stated


def close(best_T2: Tensor) -> Tensor:
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
