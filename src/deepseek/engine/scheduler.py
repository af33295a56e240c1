"""Which requests run in a step, and how many tokens of each.

A step has room for `step_tokens` tokens and `batch_size` requests:

    1. requests that generate: one token each (a step that drafts gives them more, speculative.py)
    2. requests whose prompts have begun: the next piece, in the order of their arrival
    3. waiting ones, while there is room: the policy says which

A request whose constraint is still at work on its next mask misses the step. A request's pages are got before it runs.
Where there are none, the youngest running request gives its own back and waits again, first in the queue; what it had
computed and is still in the tree of prefixes serves it later.

Policies:

    fcfs     in the order of arrival
    expert   of those waiting, the one whose experts are most like those in use, so that a step reads fewer of them;
             but whoever has waited `age_limit` seconds goes first, so nobody starves (ELDR, arXiv 2607.00466, batches
             for locality in this spirit). How many of a group run together follows from its queue: a long queue fills
             all places, a short one as many as it has, and the next group takes the places that are left, one by one.
             Only the order changes: no request's output depends on its company.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..model.cache import PAGE, Chunk
from .expert_affinity import ExpertAffinity
from .options import Policy
from .pages import Pages
from .request import Request


@dataclass(frozen=True)
class Work:
    request: Request
    chunk: Chunk
    samples: bool  # the chunk reaches the request's end: the logits after it are wanted
    draft: int | None = None  # the chunk's last token, if that is a draft

    @property
    def prompt(self) -> bool:
        return self.chunk.past < len(self.request.prompt_ids)


class Scheduler:
    def __init__(
        self, pages: Pages, affinity: ExpertAffinity, *, batch_size: int, step_tokens: int, policy: Policy = "fcfs",
        age_limit: float = 30.0, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pages, self.affinity = pages, affinity
        self.batch_size, self.step_tokens, self.policy = batch_size, step_tokens, policy
        self.age_limit, self.clock = age_limit, clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempted = self.steps = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Forget a request and give its pages back."""
        if request in self.running:
            self.running.remove(request)
            self.file(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pages.release(request.table)

    def file(self, request: Request, positions: int | None = None) -> None:
        """Let others be served from what a request has computed, unless it had its gates do as it liked."""
        if request.params.experts is None:
            self.pages.file(request.table, request.filed(request.computed if positions is None else positions),
                            request.adapter)

    def schedule(self) -> list[Work]:
        """The work of the next step; those of a prompt first. Empty where all wait for constraints or readers."""
        budget, self.steps = self.step_tokens, self.steps + 1
        work: list[Work] = []
        ready = [request for request in self.running if request.computed < request.length and not request.held]
        if sum(1 + (request.draft is not None) for request in ready if not request.prefilling) > budget:
            for request in ready:  # a draft must not take the place of another's token
                request.draft = None
        for request in sorted(ready, key=lambda request: (request.prefilling, not request.prefilling and request.ran)):
            if budget and request in self.running and self._secure(request, work):
                work.append(self._work(request, budget))
                budget -= work[-1].chunk.tokens
        idle = [request for request in self.running if request.paused]
        while budget and self.waiting and (len(self.running) < self.batch_size or idle):
            chosen = self._next()
            if chosen is None:
                break
            if len(self.running) < self.batch_size and self._admit(chosen):
                work.append(self._work(chosen, budget))
                budget -= work[-1].chunk.tokens
            elif idle:
                self._step_back(idle.pop())
            else:
                break
        assert work or not ready
        # an adapter's tokens side by side, so that they are one product
        return sorted(work, key=lambda one: (one.chunk.order != "naive", one.chunk.adapter or ""))

    def _work(self, request: Request, budget: int) -> Work:
        chunk, request.ran = request.chunk(budget), self.steps
        end = chunk.past + chunk.tokens
        return Work(request, chunk, end >= request.length, request.draft if end > request.length else None)

    def _secure(self, request: Request, work: list[Work]) -> bool:
        """Room for all tokens of a running request; False if it had to step back itself."""
        while not self.pages.extend(request.table, request.length + (request.draft is not None)):
            if request.draft is not None:
                request.draft = None
                continue
            assert len(self.running) > 1, "a request that runs alone has room: admission saw to that"
            busy = {one.request.number for one in work}
            others = [one for one in reversed(self.running) if one.number not in busy]
            youngest = next((one for one in others if one.paused), others[0])
            self._step_back(youngest)
            if youngest is request:
                return False
        return True

    def _step_back(self, request: Request) -> None:
        self.preempted += 1
        self.running.remove(request)
        self.file(request)
        self.pages.release(request.table)
        request.computed = request.followed = 0
        request.draft = None
        self.waiting.insert(0, request)

    def _admit(self, request: Request) -> bool:
        """Into the running ones, if its tokens so far find room beside those of the others."""
        useful = request.length - 1
        if request.params.routed:  # a route is known only where a token has run
            useful = min(useful, sum(map(len, request.routed)))
        if request.unscored:  # a log-probability too
            useful = min(useful, len(request.prompt_logprobs) - 1)
        if request.pooled is not None:  # and a hidden state
            useful = min(useful, request.pooled)
        if request.params.experts is not None:  # its latents are nobody else's
            useful = 0
        shared = self.pages.serve(request.table, request.filed(useful), request.adapter)
        if not self.pages.extend(request.table, request.length):
            self.pages.release(request.table)
            return False
        request.computed = request.followed = shared
        if not request.token_ids:
            request.cached_tokens = shared
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def _next(self) -> Request | None:
        able = [request for request in self.waiting if not request.held and (
            request.after is None or not request.after.prefilling or request.after.finish_reason is not None)]
        if not able:
            return None
        couplings = [request.coupling for request in self.running if request.coupling is not None]
        if mates := [request for request in able if request.coupling in couplings]:
            return mates[0]  # the others wait for it
        oldest = able[0]
        if self.policy == "fcfs" or oldest.token_ids or self.clock() - oldest.arrived > self.age_limit:
            return oldest
        return self.affinity.nearest(able, self.running)


def pages_needed(positions: int) -> int:
    return -(-positions // PAGE)
