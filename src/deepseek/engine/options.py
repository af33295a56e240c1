"""How an engine runs its requests: EngineOptions, checked when made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from ..errors import ConfigError
from ..settings import COUNT, Option, Settings, takes_former_names

Policy = Literal["fcfs", "expert"]


class EngineSettings(TypedDict, total=False):
    """EngineOptions as keyword arguments, for type checkers and editors."""

    max_num_seqs: int
    max_num_batched_tokens: int
    cache_tokens: int | None
    prefix_cache: bool
    policy: Policy
    age_limit: float
    expert_memory: int | str | None
    warmup_experts: str | Sequence[str]
    prefetch: bool
    speculate: bool


@takes_former_names
@dataclass(frozen=True)
class EngineOptions(Settings):
    """How requests are run. Raises ConfigError naming option, value and rule."""

    max_num_seqs: Annotated[int, Option(
        "requests that run together at most", COUNT, formerly="batch_size")] = 32
    max_num_batched_tokens: Annotated[int, Option(
        "tokens of a step at most; longer prompts run in pieces", COUNT, formerly="step_tokens")] = 512
    cache_tokens: Annotated[int | None, Option(
        "positions of the latent pool; else what max_num_seqs requests of full length need, or what fits a quarter of "
        "free memory, one request of full length at least", COUNT)] = None
    prefix_cache: Annotated[bool, Option("keep pages for prompts that begin alike")] = True
    policy: Annotated[Policy, Option(
        "which waiting request is next: the first, or the one whose experts are in use")] = "fcfs"
    age_limit: Annotated[float, Option("seconds after which a waiting request is next whatever its experts", (
        "must be a number of seconds >= 0", lambda v: isinstance(v, int | float) and v >= 0))] = 30.0
    expert_memory: Annotated[int | str | None, Option(
        "memory for the routed experts of a quantized model, such as 4GiB; the others stay on disk; else all",
        metavar="SIZE")] = None
    warmup_experts: Annotated[str | Sequence[str], Option(
        "names whose experts are in memory before the first request, or auto: the frequent ones of recorded use",
        metavar="NAMES", each=True)] = ()
    prefetch: Annotated[bool, Option("read the next layer's experts ahead")] = True
    speculate: Annotated[bool, Option("draft with the MTP module, if there is one, where it pays")] = True

    def __post_init__(self) -> None:
        if self.expert_memory is not None:
            object.__setattr__(self, "expert_memory", parse_bytes(self.expert_memory))
        super().__post_init__()
        names = [part.strip() for name in self.warmup_experts for part in name.split(",")]
        object.__setattr__(self, "warmup_experts", tuple(filter(None, names)))


def parse_bytes(text: str | int) -> int:
    """4GiB, 500MB, 0.5 GiB or a number of bytes. Raises ConfigError for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"expert_memory = {text!r}: must be a number of bytes such as 4GiB or 500MB")
    units: dict[str, int] = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10,
                             "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30}
    number = text.strip().rstrip("aAbBgGiIkKmMtT").strip()
    unit = text.strip()[len(number) :].strip().lower()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"expert_memory = {text!r}: must be a number of bytes such as 4GiB or 500MB") from None
    if not 0 < value < 1 << 62:
        raise ConfigError(f"expert_memory = {text!r}: must be positive")
    return int(value)
