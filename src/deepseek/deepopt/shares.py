"""How ranks in step divide the micro-batches of a step: in proportion to the speed of each, in whole batches.

Each rank says how long its part took, along with the gradients; so all of them know the same, and decide the same. What
depends on clocks then is in which order a step's gradients are summed, and with coded gradients what each rank's coding
loses. A division that makes a step faster by less than GAIN is not worth another order, so ranks that are about equally
fast stay with the even one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..errors import ConfigError
from .ranks import even
from .settings import TrainConfig

EVERY = 5  # steps between two looks
NEWEST = 0.2  # weight of the newest measurement in a speed
GAIN = 0.1  # by which a step must become shorter


class Shares:
    """Of `count` micro-batches among `size` ranks. moves: they may change, else they are even."""

    def __init__(self, count: int, size: int, *, moves: bool) -> None:
        self.now, self.moves = even(count, size), moves and size > 1
        self.speeds: list[float] = []  # tokens a second of each rank's own computing
        self._warm = False

    def take(self, step: int, tokens: Sequence[int], seconds: Sequence[float]) -> None:
        """Take in how many tokens each batch of a step had, and how long each rank computed. The first step of a
        process is left out: it allocates."""
        if self.moves and self._warm:
            ends = zip(self.now, accumulate(self.now), seconds, strict=True)
            new = [sum(tokens[end - share : end]) / max(taken, 1e-9) for share, end, taken in ends]
            self.speeds = [(1 - NEWEST) * old + NEWEST * one for old, one in zip(self.speeds or new, new, strict=True)]
            if step % EVERY == 0:
                better = by_speed(sum(self.now), self.speeds)
                if longest(better, self.speeds) < (1 - GAIN) * longest(self.now, self.speeds):
                    self.now = better
        self._warm = True

    def state(self) -> dict[str, Any]:
        return {"now": self.now, "speeds": self.speeds}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore `state`, where it is of as many batches and ranks."""
        if self.moves and state is not None and (len(state["now"]), sum(state["now"])) == (
                len(self.now), sum(self.now)):
            self.now, self.speeds = list(state["now"]), list(state["speeds"])


def by_speed(count: int, speeds: Sequence[float]) -> list[int]:
    """`count` whole parts, at least one each, so that the longest takes as short as can be; the first of equal ones get
    more."""
    shares = [1] * len(speeds)
    for _ in range(count - len(speeds)):
        shares[min(range(len(speeds)), key=lambda rank: (shares[rank] + 1) / speeds[rank])] += 1
    return shares


def longest(shares: Sequence[int], speeds: Sequence[float]) -> float:
    return max(share / speed for share, speed in zip(shares, speeds, strict=True))


def check_even(config: TrainConfig, ranks: int) -> None:
    """Raises ConfigError where ranks that need each other in each batch would not take equally many, or where there is
    but one."""
    if config.fsdp and ranks == 1:
        raise ConfigError("fsdp = True: has a meaning only with several ranks: start them with --ranks N, or by "
                          "torchrun")
    if config.accumulation % ranks:
        with_, of_all = ("fsdp", "weights") if config.fsdp else ("expert_parallel", "experts")
        raise ConfigError(f"accumulation = {config.accumulation}: must be a multiple of the number of ranks ({ranks}) "
                          f"with {with_}: in each batch all ranks need the {of_all} of all")
