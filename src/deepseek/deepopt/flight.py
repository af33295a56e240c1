"""A round that a rank has finished: a thread sends its part, waits for the others, and brings theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .members import Members, Verdict
from .ranks import even
from .settings import TrainConfig

PATIENCE = 600.0  # seconds that a rank waits to be let in, at least: it comes in at the end of a round
SAID = ("tokens", "steps", "speed", "loss", "leaving", "own")  # what others need of `about`; own of a site

Found = tuple[Verdict, dict[int, dict[str, Any]], dict[int, bytes]]  # what the merged ranks say, and their parts


@dataclass
class Flight:
    """begin, step: of the schedule, before and after the round. ranks: whose parts are waited for. about, part: what
    this one has to say and gives; nothing where it has joined since. latest: the last round that is planned. sent: this
    rank's weights as they were then."""

    number: int
    begin: int
    step: int
    ranks: list[int]
    about: dict[str, Any]
    part: bytes
    latest: Verdict
    sent: dict[str, Tensor]
    began: float = field(default_factory=time.monotonic)
    found: Future[Found] = field(default_factory=Future)

    def start(self, members: Members, config: TrainConfig) -> None:
        """Begin. Until `found` is set, only this thread may use the store."""
        def work() -> None:
            try:
                self.found.set_result(self._bring(members, config))
            except BaseException as error:
                self.found.set_exception(error)

        threading.Thread(target=work, daemon=True).start()

    def _bring(self, members: Members, config: TrainConfig) -> Found:
        members.sent = members.received = 0
        if self.part:
            members.finish(self.number, {key: self.about[key] for key in SAID if key in self.about}, self.part)
        present = members.wait(self.number, self.ranks, None if self.part else max(PATIENCE, members.grace))
        verdict = members.decide(self.number, self._verdict(members, config, present))
        said = {rank: members.about(self.number, rank) for rank in verdict.merged}
        return verdict, said, {rank: self.part if rank == members.rank else members.part(self.number, rank)
                               for rank in said}

    def _verdict(self, members: Members, config: TrainConfig, present: Sequence[int]) -> Verdict:
        """What this rank would decide on the round."""
        assert config.inner_steps is not None
        said = {rank: members.about(self.number, rank) for rank in present}
        new = [rank for rank in self.latest.members if rank not in self.ranks]  # let in meanwhile
        staying = [rank for rank in present if not said[rank]["leaving"]] + new
        joining = members.asking({*present, *new}) if staying else []
        every = sorted([*staying, *joining])
        fastest = max((said[rank]["speed"] for rank in staying if rank in said), default=1.0)
        steps = {rank: max(1, round(config.inner_steps * said[rank]["speed"] / fastest))
                 if config.balance and rank in said else config.inner_steps for rank in every}
        return Verdict(list(present), every, joining, steps, end_of(self.latest, config.accumulation))


def batches_of(plan: Verdict, accumulation: int) -> list[int]:
    """Those of each member in a round, which each step divides among them."""
    return [plan.steps[rank] * part for rank, part in zip(
        plan.members, even(accumulation, len(plan.members)), strict=True)]


def end_of(plan: Verdict, accumulation: int) -> int:
    """The first batch after those of a round."""
    return plan.begin + sum(batches_of(plan, accumulation))
