"""How an engine runs its requests: EngineOptions, checked when made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from ..errors import ConfigError, nearest

Policy = Literal["fcfs", "expert"]


class EngineSettings(TypedDict, total=False):
    """EngineOptions as keyword arguments, for type checkers and editors."""

    batch_size: int
    step_tokens: int
    cache_tokens: int | None
    prefix_cache: bool
    policy: Policy
    age_limit: float
    expert_memory: int | str | None
    warmup_experts: str | Sequence[str]
    prefetch: bool
    speculate: bool


@dataclass(frozen=True)
class EngineOptions:
    """How requests are run. batch_size: requests that run together at most. step_tokens: tokens of a step at most, a
    longer prompt runs in pieces. cache_tokens: positions of the latent pool; None takes what batch_size requests of
    full length need, or what fits a quarter of free memory, one request of full length at least. prefix_cache: keep
    pages for prompts that begin alike. policy, age_limit (seconds): scheduler.py. expert_memory: bytes (or "4GiB") for
    routed experts, the others stay on disk; None is all. warmup_experts: names whose experts are in memory before the
    first request, or "auto": the frequent ones of recorded use. prefetch: read the next layer's experts ahead.
    speculate: draft with the MTP module, if there is one, where it pays. Raises ConfigError naming option, value and
    rule."""

    batch_size: int = 32
    step_tokens: int = 512
    cache_tokens: int | None = None
    prefix_cache: bool = True
    policy: Policy = "fcfs"
    age_limit: float = 30.0
    expert_memory: int | str | None = None
    warmup_experts: str | Sequence[str] = ()
    prefetch: bool = True
    speculate: bool = True

    def __post_init__(self) -> None:
        self._need("batch_size", "must be an integer >= 1", _whole(self.batch_size, 1))
        self._need("step_tokens", "must be an integer >= 1", _whole(self.step_tokens, 1))
        self._need("cache_tokens", "must be null or an integer >= 1",
                   self.cache_tokens is None or _whole(self.cache_tokens, 1))
        self._need("prefix_cache", "must be true or false", isinstance(self.prefix_cache, bool))
        self._need("policy", "must be fcfs or expert", self.policy in ("fcfs", "expert"))
        self._need("age_limit", "must be a number of seconds >= 0",
                   isinstance(self.age_limit, int | float) and self.age_limit >= 0)

        if self.expert_memory is not None:
            object.__setattr__(self, "expert_memory", parse_bytes(self.expert_memory))
        names = self.warmup_experts.split(",") if isinstance(self.warmup_experts, str) else self.warmup_experts
        self._need("warmup_experts", "must be names", isinstance(names, Sequence) and all(
            isinstance(name, str) for name in names))
        object.__setattr__(self, "warmup_experts", tuple(name.strip() for name in names if name.strip()))
        self._need("prefetch", "must be true or false", isinstance(self.prefetch, bool))
        self._need("speculate", "must be true or false", isinstance(self.speculate, bool))

    def _need(self, field: str, rule: str, holds: bool) -> None:
        if not holds:
            raise ConfigError(f"{field} = {getattr(self, field)!r}: {rule}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> EngineOptions:
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise ConfigError(f"{unknown[0]} = {options[unknown[0]]!r}: is no option of the engine; there are "
                              f"{', '.join(known)}{nearest(unknown[0], known)}")
        return cls(**options)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
