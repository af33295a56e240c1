"""Which experts a request is likely to visit: what batches are formed by.

A signature is a distribution over all (layer, expert), [L E], each layer's shares summing to one. A request's own
routing is measured while its prompt runs. Before that, the guess is the mean of what requests of the same domain were
measured to do, or, while there were none, the experts of the atlas that bear the domain's name; without either, nothing
is known and no order is preferred.

The domain is what the caller says, or what the keyword rules say of the text (domain.py), or unknown. Requests of an
adapter learn apart from those of another: it moves what the gates see.

Shape letters: L MoE layers, E experts, K experts a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..atlas import Atlas
from ..config import ModelConfig
from .request import Request
from .step_output import ScheduledRequest, StepOutput

HALF_LIFE = 32  # requests after which an old measurement of a domain counts half
LEARNED = 256  # domains that are remembered beside those of the atlas: callers may name as many as they like


class ExpertAffinity:
    def __init__(self, config: ModelConfig, atlas: Atlas | None = None) -> None:
        self.layers, self.experts = config.moe_layers, config.n_routed_experts
        self.measured: dict[int, Tensor] = {}  # request number -> counts [L, E]
        self.domains: dict[str, Tensor] = {}
        self.named = frozenset(group.name for group in atlas.groups) if atlas is not None else frozenset()
        for group in atlas.groups if atlas is not None else ():
            share_LE = torch.zeros(len(self.layers), self.experts)
            for expert in group.experts:
                share_LE[self.layers.index(expert.layer), expert.index] = 1.0
            self.domains[group.name] = share_LE / share_LE.sum(1, keepdim=True).clamp(min=1.0)

    def wants_routes(self, batch: Sequence[ScheduledRequest]) -> bool:
        return any(scheduled.prompt for scheduled in batch)

    def on_step(self, output: StepOutput) -> None:
        """Measure the requests whose prompts ran."""
        for scheduled, start, stop in output.rows():
            if output.routing is not None and scheduled.prompt:
                self.measure(scheduled.request, output.experts(start, stop))

    def measure(self, request: Request, index_TLK: Tensor) -> None:
        """Count the experts of some tokens of a request."""
        counts_LE = self.measured.get(request.request_id)
        if counts_LE is None:
            counts_LE = self.measured[request.request_id] = torch.zeros(len(self.layers), self.experts)
        flat = index_TLK.transpose(0, 1).flatten(1)
        counts_LE.scatter_add_(1, flat.clamp(min=0), (flat >= 0).float())

    def finish(self, request: Request) -> None:
        """A request is over: its domain learns from it."""
        counts_LE = self.measured.pop(request.request_id, None)
        if counts_LE is None or (kind := affinity_key(request)) is None:
            return
        share_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1.0)
        old_LE = self.domains.pop(kind, None)
        keep = 0.5 ** (1 / HALF_LIFE)
        self.domains[kind] = share_LE if old_LE is None else keep * old_LE + (1 - keep) * share_LE
        if len(self.domains) > LEARNED + len(self.named):
            del self.domains[next(name for name in self.domains if name not in self.named)]  # longest ago

    def of(self, request: Request) -> Tensor | None:
        counts_LE = self.measured.get(request.request_id)
        if counts_LE is not None:
            return counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1.0)
        known = self.domains.get(kind) if (kind := affinity_key(request)) is not None else None
        return self.domains.get(request.domain or "") if known is None else known

    def nearest(self, waiting: Sequence[Request], running: Sequence[Request]) -> Request:
        """Of those waiting, the one whose signature has the largest overlap (sum of minima) with the mean of those
        running; ties, and requests of which nothing is known, in their order."""
        known = [share_LE for request in running if (share_LE := self.of(request)) is not None]
        if not known:
            return self._majority(waiting)
        mean_LE = torch.stack(known).mean(0)
        best, most = waiting[0], -1.0
        seen: dict[str | None, float] = {}
        for request in waiting:
            key = affinity_key(request) if request.request_id not in self.measured else f"#{request.request_id}"
            if key not in seen:
                share_LE = self.of(request)
                seen[key] = 0.0 if share_LE is None else float(torch.minimum(share_LE, mean_LE).sum())
            if seen[key] > most + 1e-6:
                best, most = request, seen[key]
        return best

    def _majority(self, waiting: Sequence[Request]) -> Request:
        """Nothing runs yet: the first of the kind with the longest queue, so that a batch can be filled from it."""
        count = Counter(map(affinity_key, waiting))
        return max(waiting, key=lambda request: 0 if (kind := affinity_key(request)) is None else count[kind])


def affinity_key(request: Request) -> str | None:
    """What requests are alike: their domain, and with an adapter that too; None where nothing is known."""
    return request.domain if request.adapter is None else f"{request.domain or ''}@{request.adapter}"
