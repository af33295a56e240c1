"""Work -> logits: one pass of the model over the step's tokens, all requests side by side.

Shape letters: T tokens of the step, S requests that sample, V vocabulary, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import CausalLM, Route, RoutingRecord
from ..model.adapters import rows_of, side_by_side, whole
from ..model.cache import LatentPool, Pack
from .routing_override import RoutingOverride, combine_overrides
from .scheduler import Work

SCORED = 64  # rows of logits at a time: with a large vocabulary they are many bytes


class Runner:
    def __init__(self, model: CausalLM, pool: LatentPool) -> None:
        self.model, self.pool = model, pool

    @torch.inference_mode()
    def run(
        self, works: Sequence[Work], overrides: Sequence[RoutingOverride | None], record: bool
    ) -> tuple[list[Tensor], list[Tensor], RoutingRecord | None]:
        """(logits after each work's last token, and after the one before where the last is a draft, FP32 on the CPU, no
        rows where it does not sample; the hidden states of each work's tokens; the routing)."""
        chunks = [work.chunk for work in works]
        ids: list[int] = []
        for work in works:
            own = work.chunk.tokens - (work.draft is not None)
            ids += work.request.tokens(work.chunk.past, work.chunk.past + own)
            ids += [] if work.draft is None else [work.draft]
        ids_T = torch.tensor(ids)
        control = None
        if any(one is not None for one in overrides):
            control = combine_overrides([(c.tokens, c.past, own) for c, own in zip(chunks, overrides, strict=True)])
        routing = RoutingRecord() if record else None
        pack = Pack(self.pool, chunks, control)
        hidden_TH = self.model.packed(ids_T.to(self.model.device), pack, routing)
        hidden = hidden_TH.split([chunk.tokens for chunk in chunks])
        wanted = [work.samples + (work.draft is not None) for work in works]
        rows_SH = torch.cat([own[len(own) - count :] for own, count in zip(hidden, wanted, strict=True)])
        if not len(rows_SH):
            return [hidden_TH.new_empty(0)] * len(works), list(hidden), routing
        with rows_of(side_by_side(zip((c.adapter for c in chunks), wanted, strict=True)) if pack.spans else ()):
            logits_SV = self.model.lm_head(rows_SH).float().cpu()
        return list(logits_SV.split(wanted)), list(hidden), routing

    @torch.inference_mode()
    def score(self, work: Work, hidden_TH: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens that follow a work's own. Raises MoEDRError for NaN."""
        for first in range(0, work.chunk.tokens, SCORED):
            with rows_of(whole(work.request.adapter)):
                logits_SV = self.model.lm_head(hidden_TH[first : first + SCORED]).float().cpu()
            work.request.score(work.chunk.past + first, logits_SV)


def part(routing: RoutingRecord, start: int, stop: int) -> RoutingRecord:
    """The routes of some of the tokens."""
    return RoutingRecord({layer: Route(*(field[start:stop] for field in route))
                          for layer, route in routing.routes.items()})


def routed(routing: RoutingRecord, start: int, stop: int) -> Tensor:
    """The experts of some of the tokens, int64 [T, L, K], layers in ascending order."""
    return torch.stack([routing.routes[layer].index_TK[start:stop] for layer in sorted(routing.routes)], 1).cpu()
