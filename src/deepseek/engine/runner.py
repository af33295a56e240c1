"""A batch -> logits: one pass of the model over the step's tokens, all requests side by side.

Shape letters: T tokens of the step, S requests that sample, V vocabulary, L MoE layers, K experts a token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..model import CausalLM, RoutingRecord
from ..model.adapters import rows_of, side_by_side, whole
from ..model.cache import LatentPool, PackedBatch
from ..model.decoder import LayerRunner
from .routing_override import combine_overrides
from .step_output import ScheduledRequest, StepOutput

SCORED = 64  # rows of logits at a time: with a large vocabulary they are many bytes


class Runner:
    """layers: runs the model's layers, None for its own way."""

    def __init__(self, model: CausalLM, pool: LatentPool, layers: LayerRunner | None = None) -> None:
        self.model, self.pool, self.layers = model, pool, layers

    @torch.inference_mode()
    def run(self, batch: Sequence[ScheduledRequest], record: bool) -> StepOutput:
        """Run the model over a batch. record: with its routing."""
        began, chunks = time.perf_counter(), [scheduled.chunk for scheduled in batch]
        ids: list[int] = []
        for scheduled in batch:
            past, drafts = scheduled.chunk.past, [] if scheduled.draft is None else [scheduled.draft]
            ids += scheduled.request.sequence.tokens(past, past + scheduled.chunk.tokens - len(drafts)) + drafts
        overrides = [scheduled.request.routing_override for scheduled in batch]
        control = None
        if any(one is not None for one in overrides):
            control = combine_overrides([(c.tokens, c.past, own) for c, own in zip(chunks, overrides, strict=True)])
        routing = RoutingRecord() if record else None
        pack = PackedBatch(self.pool, chunks, control)
        hidden_TH = self.model.packed(torch.tensor(ids, device=self.model.device), pack, routing, self.layers)
        counts = [chunk.tokens for chunk in chunks]
        hidden = hidden_TH.split(counts)
        wanted = [scheduled.samples + (scheduled.draft is not None) for scheduled in batch]
        rows = [i for end, count in zip(accumulate(counts), wanted, strict=True) for i in range(end - count, end)]
        if not rows:
            return StepOutput(batch, [hidden_TH.new_empty(0)] * len(batch), hidden, routing, began)
        with rows_of(side_by_side(zip((c.adapter for c in chunks), wanted, strict=True)) if pack.spans else ()):
            logits_SV = self.model.lm_head(hidden_TH[rows]).float().cpu()
        return StepOutput(batch, logits_SV.split(wanted), hidden, routing, began)

    @torch.inference_mode()
    def score(self, scheduled: ScheduledRequest, hidden_TH: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens that follow those of a chunk. Raises MoEDRError for NaN."""
        known = len(scheduled.request.prompt_logprobs) - 1 - scheduled.chunk.past
        for first in range(max(0, known), scheduled.chunk.tokens, SCORED):
            with rows_of(whole(scheduled.request.adapter)):
                logits_SV = self.model.lm_head(hidden_TH[first : first + SCORED]).float().cpu()
            scheduled.request.score(scheduled.chunk.past + first, logits_SV)
