"""The settings of a training run, declared as in ../settings.py. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..data.mapping import RecordMap
from ..errors import ConfigError
from ..settings import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, UP_TO_ONE, Device, Option, Settings

Compress = Literal["none", "bf16", "int8", "local", "sparse"]
OUTER = {"local": (0.8, 0.9), "sparse": (1.0, 0.0)}  # lr and momentum of MuLoCo and SparseLoCo
STORE = "DEEPSEEK_STORE"  # environment: HOST:PORT of the store of a run in rounds
Precision = Literal["auto", "fp32", "bf16"]
Algorithm = Literal["adamw", "muon"]
Moments = Literal["fp32", "8bit"]

# settings of a leg of the learning rate's schedule; `warmup` is tuning's
SCHEDULE = frozenset(("steps", "lr", "min_lr_ratio", "warmup_steps", "warmup"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Defaults follow DeepSeek-V3 (arXiv 2412.19437, section 4.2) where they carry over to small models: betas, decay,
    clipping, bias speed, MTP weight, balance weight. Raises ConfigError naming setting, rule and value."""

    steps: Annotated[int, Option("optimizer steps", COUNT)] = 1000
    batch_size: Annotated[int, Option("sequences a batch", COUNT)] = 16
    seq_len: Annotated[int, Option("tokens a sequence", COUNT)] = 256
    accumulation: Annotated[int, Option("batches summed into one step", COUNT)] = 1
    lr: Annotated[float, Option(
        "highest learning rate; 1e-3, or 1e-4 where training starts from a checkpoint",
        POSITIVE)] = None  # type: ignore[assignment]
    min_lr_ratio: Annotated[float, Option("last learning rate as a share of it", NOT_NEGATIVE)] = 0.1
    warmup_steps: Annotated[int, Option("steps of linear warm-up", NATURAL)] = 50
    optimizer: Annotated[Algorithm, Option(
        "muon: Muon for matrices, each expert's its own, AdamW for embeddings, head, gates and norms")] = "adamw"
    moments: Annotated[Moments, Option(
        "how the optimizer keeps them; 8bit by blocks of 256, those of less than 4096 weights stay FP32")] = "fp32"
    momentum: Annotated[float, Option("Muon's momentum", SHARE)] = 0.95
    beta1: Annotated[float, Option("AdamW's first beta", SHARE)] = 0.9
    beta2: Annotated[float, Option("AdamW's second beta", SHARE)] = 0.95
    weight_decay: Annotated[float, Option("decay of matrices", NOT_NEGATIVE)] = 0.1
    clip: Annotated[float, Option("largest norm of the gradient", POSITIVE)] = 1.0
    precision: Annotated[Precision, Option(
        "of activations; auto is BF16 where that is faster; weights stay FP32")] = "auto"
    mtp_weight: Annotated[float, Option("weight of the multi-token prediction loss", NOT_NEGATIVE)] = 0.3
    balance_weight: Annotated[float, Option("weight of the sequence-wise balance loss", NOT_NEGATIVE)] = 1e-4
    bias_speed: Annotated[float, Option("speed of the gate-bias balancing", NOT_NEGATIVE)] = 1e-3
    guide_weight: Annotated[float, Option(
        "weight of the loss that guides labelled text to its expert's routing group", NOT_NEGATIVE)] = 0.1
    gradient_checkpointing: Annotated[bool, Option(
        "recompute layers in the backward pass: less memory, more time")] = False
    eval_every: Annotated[int, Option("steps between evaluations", COUNT)] = 100
    eval_batches: Annotated[int, Option("batches per evaluation", COUNT)] = 16
    save_every: Annotated[int, Option("steps between checkpoints", COUNT)] = 200
    compress: Annotated[Compress, Option(
        "what ranks send: gradients in FP32 (none), in BF16 or in 8 bits; or, after some steps of their own, what "
        "these changed: in 2 bits (local), or the largest 64 of each 4,096 values (sparse)")] = "none"
    inner_steps: Annotated[int, Option("steps between two merges (local, sparse)", COUNT)] = 30
    outer_lr: Annotated[float | None, Option(
        "learning rate of a merge: 0.8 (local) or 1 (sparse)", POSITIVE)] = None
    outer_momentum: Annotated[float | None, Option(
        "Nesterov momentum of a merge: 0.9 (local) or 0 (sparse)", SHARE)] = None
    error_decay: Annotated[float, Option(
        "share of what coding has lost that is made up for in the next merge", UP_TO_ONE)] = 0.95
    balance: Annotated[bool, Option(
        "let slow ranks take fewer steps in a round (local, sparse); how many depends on clocks then")] = True
    rank_timeout: Annotated[float, Option("seconds that ranks wait for another", POSITIVE)] = 600.0
    keep: Annotated[int, Option("checkpoints kept", COUNT)] = 2
    seed: Annotated[int, Option("seed of weights and data order", NATURAL)] = 0
    tensorboard: Annotated[bool, Option("write TensorBoard events")] = False

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", 1e-3)
        for name, value in zip(("outer_lr", "outer_momentum"), OUTER.get(self.compress, ()), strict=False):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for name in ("outer_lr", "outer_momentum"):
            if self.compress not in OUTER and (value := getattr(self, name)) is not None:
                raise ConfigError(f"{name} = {value}: has a meaning only with compress = local or sparse")


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """Where a run begins, and on what."""

    from_model: Annotated[str | Path | None, Option(
        "a checkpoint folder or a hub id: starts from its weights, with its configuration, tokenizer and names; all "
        "parameters are trained", metavar="MODEL", flag="from")] = None
    tokenizer: Annotated[str | Path | None, Option(
        "folder of a tokenizer; else one is trained on the data", metavar="DIR")] = None
    map: RecordMap | Mapping[str, Any] | str | Path | None = None
    valid_fraction: Annotated[float, Option("share of the documents held out", (
        "must be at least 0 and below 1", SHARE[1]))] = 0.01
    device: Annotated[Device, Option("where the model runs")] = "cpu"


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
