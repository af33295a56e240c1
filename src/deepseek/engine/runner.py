"""Work -> logits: one pass of the model over the step's tokens, all requests side by side.

Shape letters: T tokens of the step, S requests that sample, V vocabulary, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import CausalLM, RoutingRecord
from ..model.cache import LatentPool, Pack
from .control import Controls, combined
from .scheduler import Work


class Runner:
    def __init__(self, model: CausalLM, pool: LatentPool) -> None:
        self.model, self.pool = model, pool

    @torch.inference_mode()
    def run(
        self, works: Sequence[Work], controls: Sequence[Controls | None], record: bool
    ) -> tuple[list[Tensor | None], RoutingRecord | None]:
        """(the logits after each work's last token, FP32 on the CPU, None where it does not sample; the routing)."""
        chunks = [work.chunk for work in works]
        ids_T = torch.tensor([token for work in works
                              for token in work.request.tokens(work.chunk.past, work.chunk.past + work.chunk.tokens)])
        control = None
        if any(one is not None for one in controls):
            control = combined([(c.tokens, c.past, own) for c, own in zip(chunks, controls, strict=True)])
        routing = RoutingRecord() if record else None
        hidden_TH = self.model.packed(ids_T.to(self.model.device), Pack(self.pool, chunks, control), routing)
        ends = torch.tensor([chunk.tokens for chunk in chunks]).cumsum(0) - 1
        rows = [int(end) for end, work in zip(ends, works, strict=True) if work.samples]
        if not rows:
            return [None] * len(works), routing
        logits = iter(self.model.lm_head(hidden_TH[rows]).float().cpu())
        return [next(logits) if work.samples else None for work in works], routing


def routed(routing: RoutingRecord, start: int, stop: int) -> Tensor:
    """The experts of some of the tokens, int64 [T, L, K], layers in ascending order."""
    return torch.stack([routing.routes[layer].index_TK[start:stop] for layer in sorted(routing.routes)], 1).cpu()
