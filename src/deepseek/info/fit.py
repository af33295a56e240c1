"""Which format of a model runs where on a machine, at most how fast, and what 10^8 tokens cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RequestError
from .accounting import Memory, ModelInfo
from .machine import Machine
from .units import in_bytes

Place = Literal["gpu", "ram", "disk", "storage", "none"]
WORKING_SHARE = 0.10  # activations, buffers and the program itself, on top of weights and cache


@dataclass(frozen=True)
class Fit:
    """One format on one machine, in bytes: `need` = weights + cache of `context` positions + working memory.

    place: gpu or ram (it runs from there), disk (too big, unless routed experts stream from disk with `resident` bytes
    in RAM), storage (a file format only), none (too big even then). tokens_per_second: the limit that bandwidth sets
    for one sequence, None where the model does not run from memory; `bound` is False where it could be faster, because
    the processor's cache holds more than a tenth of what a token reads.
    """

    format: str
    context: int
    weights: int
    cache: int
    need: int
    resident: int
    place: Place
    tokens_per_second: float | None
    bound: bool
    note: str

    @property
    def fits(self) -> bool:
        return self.place in ("gpu", "ram")


def fit(info: ModelInfo, machine: Machine, context: int | None = None) -> list[Fit]:
    """Where each format would run with `context` cached positions (None: those of `info`), one entry per format.

    Goes by the memory that is available now. A GPU that holds everything wins over RAM; a model is not split over GPUs.
    """
    if context is not None and context < 1:
        raise RequestError(f"context = {context!r}: must be a positive number of tokens")
    context = min(context or info.context, info.config.max_position_embeddings)
    return [_fit(info, memory, machine, context) for memory in info.memory]


def _fit(info: ModelInfo, memory: Memory, machine: Machine, context: int) -> Fit:
    cache = info.cache_per_token * context * (2 if memory.format == "FP32" else 1)
    need, resident = (round((size + cache) * (1 + WORKING_SHARE)) for size in (memory.weights, memory.resident))
    read = memory.read + cache
    gpu = max((g for g in machine.gpus if g.available >= need), key=lambda g: g.bandwidth, default=None)
    place: Place
    speed, bound = None, True
    if memory.format == "FP8":
        place, note = "storage", "loads as BF16"
        note += "" if machine.disk_free >= memory.weights else "; exceeds the free disk"
    elif runner := gpu or (machine if machine.available >= need else None):
        place, note = ("gpu", gpu.name) if gpu else ("ram", "")
        speed, bound = runner.bandwidth / read, read > 10 * runner.cache
    elif machine.available >= resident:
        place, note = "disk", f"{in_bytes(resident)} with experts from disk"
    else:
        place, note = "none", f"{in_bytes(resident)} even with experts from disk"
    return Fit(memory.format, context, memory.weights, cache, need, resident, place, speed, bound, note)


def cost(price_per_hour: float, tokens_per_second: float) -> float:
    """Price of 10^8 tokens, in the currency of the price. Raises RequestError for a negative price or no speed."""
    if not (math.isfinite(price_per_hour) and price_per_hour >= 0):
        raise RequestError(f"price_per_hour = {price_per_hour!r}: must be a number >= 0")
    if not (math.isfinite(tokens_per_second) and tokens_per_second > 0):
        raise RequestError(f"tokens_per_second = {tokens_per_second!r}: must be a number > 0")
    return price_per_hour / 3600 * 10**8 / tokens_per_second


def price_of_tokens(
    fits: Sequence[Fit] | None, price_per_hour: float | None, tokens_per_second: float | None
) -> dict[str, Any] | None:
    """What 10^8 tokens cost and where the speed is from. None where no price is given, or no format has a speed.

    basis: the speed is "given", a machine's upper "bound" (the cost is then a lower one), or an "estimate".
    """
    basis, format = "given", None
    if price_per_hour is None:
        if tokens_per_second is not None:
            raise RequestError(f"tokens_per_second = {tokens_per_second!r}: has a meaning only with price_per_hour")
        return None
    if tokens_per_second is None:
        cost(price_per_hour, 1.0)  # a bad price is an error whatever the speed
        if fits is None:
            raise RequestError(f"price_per_hour = {price_per_hour!r}: needs tokens_per_second or the machine")
        best = max(fits, key=lambda f: f.tokens_per_second or 0.0)
        if best.tokens_per_second is None:
            return None
        tokens_per_second, basis, format = best.tokens_per_second, "bound" if best.bound else "estimate", best.format
    return {"price_per_hour": price_per_hour, "tokens_per_second": tokens_per_second, "basis": basis, "format": format,
            "per_1e8_tokens": cost(price_per_hour, tokens_per_second)}
