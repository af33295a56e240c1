"""Which requests run in a step, and how many tokens of each.

A step has room for `max_num_batched_tokens` tokens and `max_num_seqs` requests:

    1. requests that generate: one token each (a step that drafts gives them more, speculative.py)
    2. requests whose prompts have begun: the next piece, in the order of their arrival
    3. waiting ones, while there is room: the policy says which

A request whose constraint is still at work on its next mask misses the step. A request's pages are allocated before it
runs. Where there are none, the youngest running request is preempted: its pages are freed and it waits again, first in
the queue; what it had computed and is still in the prefix tree serves it later.

Policies:

    fcfs     in the order of arrival
    expert   of those waiting, the one whose experts are most like those in use, so that a step reads fewer of them;
             but a request that has waited `age_limit` seconds goes first, so none starves (ELDR, arXiv 2607.00466,
             batches for locality in this spirit). How many of a group run together follows from its queue: a long
             queue fills all places, a short one as many as it has, and the next group takes the places that are left,
             one by one.
             Only the order changes: no request's output depends on its company.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .block_manager import BlockManager
from .expert_affinity import ExpertAffinity
from .options import EngineOptions
from .request import Request
from .step_output import ScheduledRequest


class Scheduler:
    def __init__(
        self, block_manager: BlockManager, affinity: ExpertAffinity, options: EngineOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_manager, self.affinity, self.options, self.clock = block_manager, affinity, options, clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempted = self.steps = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def requests(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Forget a request and free its pages."""
        if request in self.running:
            self.running.remove(request)
            self.insert_prefix(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.block_manager.free(request.sequence.block_table)

    def insert_prefix(self, request: Request, positions: int | None = None) -> None:
        """Insert the request's computed pages into the prefix cache, unless its routing was overridden."""
        if self.block_manager.prefix_cache and request.params.experts is None:
            sequence = request.sequence
            key = sequence.prefix_key(sequence.num_computed_tokens if positions is None else positions)
            self.block_manager.insert_prefix(sequence.block_table, key, request.adapter)

    def schedule(self) -> list[ScheduledRequest]:
        """The batch of the next step, prompts first. Empty where all requests wait for constraints or readers."""
        budget, self.steps = self.options.max_num_batched_tokens, self.steps + 1
        batch: list[ScheduledRequest] = []
        ready = [one for one in self.running if one.sequence.num_computed_tokens < one.sequence.length and not one.held]
        if sum(1 + (one.sequence.draft_token is not None) for one in ready if not one.sequence.prefilling) > budget:
            for request in ready:  # a draft must not take the place of another's token
                request.sequence.draft_token = None
        for request in sorted(ready, key=lambda one: (
                one.sequence.prefilling, not one.sequence.prefilling and one.sequence.last_step)):
            if budget and request in self.running and self._allocate_or_preempt(request, batch):
                batch.append(self._scheduled(request, budget))
                budget -= batch[-1].chunk.tokens
        idle = [request for request in self.running if request.paused]
        while budget and self.waiting and (len(self.running) < self.options.max_num_seqs or idle):
            chosen = self._next()
            if chosen is None:
                break
            if len(self.running) < self.options.max_num_seqs and self._admit(chosen):
                batch.append(self._scheduled(chosen, budget))
                budget -= batch[-1].chunk.tokens
            elif idle:
                self.preempt(idle.pop())
            else:
                break
        assert batch or not ready
        # an adapter's tokens side by side, so that they are one product
        return sorted(batch, key=lambda one: (one.chunk.attn_impl != "naive", str(one.chunk.adapter or "")))

    def _scheduled(self, request: Request, budget: int) -> ScheduledRequest:
        sequence = request.sequence
        chunk, sequence.last_step = sequence.chunk(budget), self.steps
        end = chunk.past + chunk.tokens
        return ScheduledRequest(request, chunk, end >= sequence.length,
                                sequence.draft_token if end > sequence.length else None)

    def _allocate_or_preempt(self, request: Request, batch: list[ScheduledRequest]) -> bool:
        """Make room for all tokens of a running request; False if it had to be preempted itself."""
        sequence = request.sequence
        while not self.block_manager.allocate(
                sequence.block_table, sequence.length + (sequence.draft_token is not None)):
            if sequence.draft_token is not None:
                sequence.draft_token = None
                continue
            assert len(self.running) > 1, "a request that runs alone has room: admission saw to that"
            busy = {one.request.request_id for one in batch}
            others = [one for one in reversed(self.running) if one.request_id not in busy]
            youngest = next((one for one in others if one.paused), others[0])
            self.preempt(youngest)
            if youngest is request:
                return False
        return True

    def preempt(self, request: Request) -> None:
        self.preempted += 1
        self.running.remove(request)
        self.insert_prefix(request)
        self.block_manager.free(request.sequence.block_table)
        request.sequence.restart()
        self.waiting.insert(0, request)

    def _admit(self, request: Request) -> bool:
        """Move a request to the running ones, if its tokens so far find room beside those of the others."""
        sequence = request.sequence
        useful = sequence.length - 1
        if request.params.routed:  # a route is known only where a token has run
            useful = min(useful, sum(map(len, request.routes)))
        if request.unscored:  # a log-probability too
            useful = min(useful, len(request.prompt_logprobs) - 1)
        if request.pooled is not None:  # and a hidden state
            useful = min(useful, request.pooled)
        if request.params.experts is not None:  # its latents serve no other request
            useful = 0
        cached = self.block_manager.match_prefix(sequence.block_table, sequence.prefix_key(useful), request.adapter)
        if not self.block_manager.allocate(sequence.block_table, sequence.length):
            self.block_manager.free(sequence.block_table)
            return False
        sequence.restart(cached)
        if not sequence.token_ids:
            sequence.cached_tokens = cached
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def _next(self) -> Request | None:
        able = [one for one in self.waiting if not one.held and (
            one.prefill_leader is None or not one.prefill_leader.sequence.prefilling
            or one.prefill_leader.finish_reason is not None)]
        if not able:
            return None
        ensembles = [request.ensemble for request in self.running if request.ensemble is not None]
        if mates := [request for request in able if request.ensemble in ensembles]:
            return mates[0]  # the others wait for it
        oldest = able[0]
        if self.options.policy == "fcfs" or oldest.token_ids or (
                self.clock() - oldest.arrived > self.options.age_limit):
            return oldest
        return self.affinity.nearest(able, self.running)
