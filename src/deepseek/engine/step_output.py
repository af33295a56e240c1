"""What a step of the engine runs and what it computed, and who listens to it.

Shape letters: S rows of logits, V vocabulary, T tokens, H hidden, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint import UNNAMED
from ..model import RoutingRecord
from ..model.adapters import names_in
from ..model.cache import Chunk
from .request import Request


@dataclass(frozen=True)
class ScheduledRequest:
    """What a step runs of a request. samples: the chunk reaches the request's end: the logits after it are wanted.
    draft: the chunk's last token, if that is a draft."""

    request: Request
    chunk: Chunk
    samples: bool
    draft: int | None = None

    @property
    def prompt(self) -> bool:
        return self.chunk.past < len(self.request.prompt_ids)


@dataclass
class StepOutput:
    """One pass of the model over `batch`; logits and hidden have an entry a scheduled request.

    logits: FP32 [S, V] on the CPU, after the last token, and after the one before where the last is a draft; no rows
    where nothing is sampled. hidden: [T, H]. routing: of all tokens side by side; None where no listener wants it.
    began: perf_counter() at the start.
    What `Engine.postprocess` adds: advanced: the requests that got a token. accepted: ids of the requests whose draft
    was what they drew. seconds: of the whole step.
    """

    batch: Sequence[ScheduledRequest]
    logits: Sequence[Tensor]
    hidden: Sequence[Tensor]
    routing: RoutingRecord | None
    began: float
    advanced: list[Request] = field(default_factory=list)
    accepted: set[int] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(scheduled.chunk.tokens for scheduled in self.batch)

    def rows(self) -> Iterator[tuple[ScheduledRequest, int, int]]:
        """(scheduled, start, stop): its rows among all tokens, without a draft that was rejected."""
        start = 0
        for scheduled in self.batch:
            stop = start + scheduled.chunk.tokens
            rejected = scheduled.draft is not None and scheduled.request.request_id not in self.accepted
            yield scheduled, start, stop - rejected
            start = stop

    def experts(self, start: int, stop: int) -> Tensor:
        """The experts of some of the rows, int64 [T, L, K], layers in ascending order."""
        assert self.routing is not None
        routes = self.routing.routes
        return torch.stack([routes[layer].index_TK[start:stop] for layer in sorted(routes)], 1).cpu()


class StepListener(Protocol):
    """Gets every step's output, before the requests that ended in it leave. It must be quick."""

    def wants_routes(self, batch: Sequence[ScheduledRequest]) -> bool:
        """Whether the routing of this batch has to be recorded."""

    def on_step(self, output: StepOutput) -> None: ...


class UsageRecorder:
    """Counts the experts that tokens visit in `request.usage`, and in its adapters' parts of that."""

    def wants_routes(self, batch: Sequence[ScheduledRequest]) -> bool:
        return any(scheduled.request.usage is not None for scheduled in batch)

    def on_step(self, output: StepOutput) -> None:
        if output.routing is None:
            return
        usages, masks = {}, dict[int, Tensor]()
        for scheduled, start, stop in output.rows():
            usage, adapter = scheduled.request.usage, scheduled.request.adapter
            if usage is None:
                continue
            members = [name for name in names_in(adapter) if name != UNNAMED]
            for own in [usage, *map(usage.part, members)]:
                usages[id(own)] = own
                masks.setdefault(id(own), torch.zeros(output.tokens, dtype=torch.bool))[start:stop] = True
        for place, own in usages.items():
            own.add(output.routing, masks[place])


class RouteRecorder:
    """Keeps the routes of requests that asked for them, in `request.routes`."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def wants_routes(self, batch: Sequence[ScheduledRequest]) -> bool:
        return any(scheduled.request.params.routed for scheduled in batch)

    def on_step(self, output: StepOutput) -> None:
        if output.routing is None:
            return
        for scheduled, start, stop in output.rows():
            request = scheduled.request
            known = sum(map(len, request.routes)) - scheduled.chunk.past  # from before it was preempted
            if request.params.routed and 0 <= known < stop - start:
                control = request.params.experts
                top_k = control.top_k if control is not None and control.top_k else self.top_k
                # places beyond are those that others in the batch have more of
                request.routes.append(output.experts(start + known, stop)[:, :, :top_k])
