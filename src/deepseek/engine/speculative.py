"""Drafts from the MTP module, verified exactly.

After position i is run, its hidden state and the token that follows give the module's opinion of the token after that
(model/mtp.py). The draft runs in the next step beside the token it would follow, at the price of a second row instead
of a second step. Then the request draws its token from its own logits, with its own random numbers, as ever; if that is
the draft, the draft's row is already the one that comes next, and a second token is drawn from it. If not, the row is
overwritten. So what is said is what would have been said, greedy or sampled, to the bit.

Whether it pays depends on how often drafts are right, and on how much more a step costs with them, which depends on the
batch: `AdaptiveDrafting` measures both kinds of step, seconds a token, for batches of about each size, and takes the
better one, trying the other again from time to time (Cascade, arXiv 2506.20675, on why a fixed choice loses). A request
that lived through a time without drafts has gaps in its module's cache and is drafted no more.

Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import CausalLM
from ..model.cache import Chunk, LatentPool, PackedBatch
from ..model.decoder import LayerRunner
from .request import Request
from .step_output import StepOutput

TRIAL = 6  # steps of each kind from which the choice is made
TERM = 400  # steps for which it holds


@dataclass
class DraftStats:
    """Counters: drafts that ran, and those of them that were what was drawn."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Trial:
    """Seconds and tokens of steps with and without drafts, for batches of one size."""

    def __init__(self) -> None:
        self.steps, self.best = 0, True
        self.seconds = {True: 0.0, False: 0.0}
        self.tokens = {True: 0, False: 0}

    def drafts(self) -> bool:
        return self.steps < TRIAL if self.steps < 2 * TRIAL else self.best

    def add(self, drafts: bool, seconds: float, tokens: int) -> None:
        self.seconds[drafts] += seconds
        self.tokens[drafts] += tokens
        self.steps += 1
        if self.steps == 2 * TRIAL:
            self.best = self.rate(True) >= self.rate(False)
        elif self.steps >= TERM:
            self.steps = 0
            self.seconds, self.tokens = {True: 0.0, False: 0.0}, {True: 0, False: 0}

    def rate(self, drafts: bool) -> float:
        return self.tokens[drafts] / self.seconds[drafts] if self.seconds[drafts] else 0.0


class AdaptiveDrafting:
    """The choice by size of batch, in powers of two; of steps in which no prompt ran."""

    def __init__(self) -> None:
        self.trials: dict[int, Trial] = {}

    def of(self, batch: int) -> Trial:
        return self.trials.setdefault(batch.bit_length(), Trial())

    def table(self) -> list[tuple[str, float, float, bool]]:
        """(batch, tokens a second with drafts, without, whether drafts are on) of the latest trials."""
        return [(f"{1 << bits >> 1}-{(1 << bits) - 1}", trial.rate(True), trial.rate(False), trial.drafts())
                for bits, trial in sorted(self.trials.items())]


class Drafter:
    """Runs a model's first MTP module over what the model has run."""

    def __init__(self, model: CausalLM, pool: LatentPool, layers: LayerRunner | None = None) -> None:
        self.model, self.pool, self.layers = model, pool, layers
        self.stats, self.adaptive = DraftStats(), AdaptiveDrafting()

    def after_step(self, output: StepOutput, running: Sequence[Request], sampled: int) -> None:
        """Leave drafts for the next step with the requests that go on, where drafting pays. sampled: new tokens."""
        trial = self.adaptive.of(max(1, len(running)))
        drafted = sum(scheduled.draft is not None for scheduled in output.batch)
        self.stats.drafted += drafted
        self.stats.accepted += len(output.accepted)
        chosen = []
        for scheduled, hidden_TH in zip(output.batch, output.hidden, strict=True):
            request, sequence, past = scheduled.request, scheduled.request.sequence, scheduled.chunk.past
            sequence.draft_token, tokens = None, sequence.num_computed_tokens - past
            if request.finish_reason is None and request.ensemble is None and sequence.num_drafted_tokens == past:
                chunk = Chunk(tokens, past, sequence.block_table.pages, scheduled.chunk.attn_impl)
                chosen.append((request, chunk, hidden_TH[:tokens]))
        prompts = any(scheduled.prompt for scheduled in output.batch)
        if trial.drafts() or prompts:
            self.draft(chosen)
        if not trial.drafts():
            for request in running:
                request.sequence.draft_token = None
        if sampled and not prompts:
            trial.add(drafted > 0, time.perf_counter() - output.began, sampled)

    @torch.inference_mode()
    def draft(self, run: Sequence[tuple[Request, Chunk, Tensor]]) -> None:
        """Go on with the module's cache over chunks of positions that have just been run (in a pack's order, with their
        hidden states [T, H]), and leave a draft with every request that generates."""
        if not run:
            return
        following = [token for request, c, _ in run
                     for token in request.sequence.tokens(c.past + 1, c.past + c.tokens + 1)]
        h_TH = self.model.mtp_packed(0, torch.cat([hidden for *_, hidden in run]),
                                     torch.tensor(following, device=self.model.device),
                                     PackedBatch(self.pool, [chunk for _, chunk, _ in run]), self.layers)
        rows, end = [], -1
        for request, chunk, _ in run:
            end += chunk.tokens
            request.sequence.num_drafted_tokens = chunk.past + chunk.tokens
            if request.sequence.num_drafted_tokens == request.sequence.length - 1:
                rows.append((request, end))
        if rows:
            best = self.model.lm_head(h_TH[[end for _, end in rows]]).argmax(-1).tolist()
            for (request, _), token in zip(rows, best, strict=True):
                request.sequence.draft_token = token
