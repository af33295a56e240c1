"""The settings of a training run: one table for the dataclass, its checks and the command line; and the rules that such
tables have in common. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

Rule = tuple[str, Callable[[Any], bool]]  # as a message says it, and whether a value follows it


def setting(default: Any, text: str) -> Any:
    """A field with its line of help."""
    return field(default=default, metadata={"help": text})


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_of(*words: str) -> Rule:
    return f"must be {', '.join(words[:-1])} or {words[-1]}", lambda v: v in words


COUNT: Rule = "must be an integer >= 1", lambda v: is_int(v) and v >= 1
NATURAL: Rule = "must be an integer >= 0", lambda v: is_int(v) and v >= 0
POSITIVE: Rule = "must be a positive number", lambda v: is_number(v) and v > 0
NOT_NEGATIVE: Rule = "must be a number >= 0", lambda v: is_number(v) and v >= 0
SHARE: Rule = "must lie in [0, 1)", lambda v: is_number(v) and 0 <= v < 1
PRECISION = one_of("auto", "fp32", "bf16")


def check(settings: object, rules: Mapping[str, Rule]) -> None:
    """rules: names of settings, with blanks between them -> what all of these must follow. Raises ConfigError naming
    setting, rule and value."""
    for names, (text, holds) in rules.items():
        for name in names.split():
            if not holds(value := getattr(settings, name)):
                raise ConfigError(f"{name} = {value!r}: {text}")


# settings of a leg of the learning rate's schedule; `warmup` is tuning's
SCHEDULE = frozenset(("steps", "lr", "min_lr_ratio", "warmup_steps", "warmup"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Defaults follow DeepSeek-V3 (arXiv 2412.19437, section 4.2) where they carry over to small models: betas, decay,
    clipping, bias speed, MTP weight, balance weight. Raises ConfigError naming setting, rule and value."""

    steps: int = setting(1000, "optimiser steps")
    batch_size: int = setting(16, "sequences a batch")
    seq_len: int = setting(256, "tokens a sequence")
    accumulation: int = setting(1, "batches summed into one step")
    lr: float = setting(None, "highest learning rate; 1e-3, or 1e-4 where training starts from a checkpoint")
    min_lr_ratio: float = setting(0.1, "last learning rate as a share of it")
    warmup_steps: int = setting(50, "steps of linear warm-up")
    beta1: float = setting(0.9, "AdamW's first beta")
    beta2: float = setting(0.95, "AdamW's second beta")
    weight_decay: float = setting(0.1, "AdamW's decay of matrices")
    clip: float = setting(1.0, "largest norm of the gradient")
    precision: str = setting("auto", "auto, fp32 or bf16; weights and moments stay FP32")
    mtp_weight: float = setting(0.3, "weight of the multi-token prediction loss")
    balance_weight: float = setting(1e-4, "weight of the sequence-wise balance loss")
    bias_speed: float = setting(1e-3, "speed of the gate-bias balancing")
    guide_weight: float = setting(0.1, "weight of the loss that guides labelled text to its expert's routing group")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward pass: less memory, more time")
    eval_every: int = setting(100, "steps between evaluations")
    eval_batches: int = setting(16, "batches an evaluation")
    save_every: int = setting(200, "steps between checkpoints")
    keep: int = setting(2, "checkpoints kept")
    seed: int = setting(0, "seed of weights and data order")
    tensorboard: bool = setting(False, "write TensorBoard events")

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", 1e-3)
        check(self, {
            "steps batch_size seq_len accumulation eval_every eval_batches save_every keep": COUNT,
            "lr clip": POSITIVE,
            "min_lr_ratio weight_decay mtp_weight balance_weight bias_speed guide_weight": NOT_NEGATIVE,
            "warmup_steps seed": NATURAL, "beta1 beta2": SHARE, "precision": PRECISION})


@dataclass(frozen=True)
class Leg:
    """A stretch of a run, up to step `steps`, with a warm-up and a cosine of its own. A run has one; every extension by
    more steps adds one."""

    steps: int
    lr: float
    min_lr_ratio: float
    warmup_steps: int

    @classmethod
    def of(cls, config: TrainConfig) -> Leg:
        return cls(config.steps, config.lr, config.min_lr_ratio, config.warmup_steps)


def learning_rate(legs: Sequence[Leg], step: int) -> float:
    """Of a leg: linear warm-up from the last rate of the leg before (0 in the first), then a cosine down to
    min_lr_ratio * lr at its last step."""
    begin, base = 0, 0.0
    for leg in legs:
        if step < leg.steps or leg is legs[-1]:
            break
        begin, base = leg.steps, leg.min_lr_ratio * leg.lr
    if (taken := step - begin) < leg.warmup_steps:
        return base + (leg.lr - base) * (taken + 1) / leg.warmup_steps
    done = (taken - leg.warmup_steps) / max(1, leg.steps - begin - leg.warmup_steps)
    return leg.lr * (leg.min_lr_ratio + (1 - leg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(done, 1))))
