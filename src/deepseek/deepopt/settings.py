"""The settings of a training run: one table for the dataclass, its checks and the command line. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Defaults follow DeepSeek-V3 (arXiv 2412.19437, section 4.2) where they carry over to small models: betas, decay,
    clipping, bias speed, MTP weight, balance weight. Raises ConfigError naming setting, rule and value."""

    steps: int = _setting(1000, "optimiser steps")
    batch_size: int = _setting(16, "sequences a batch")
    seq_len: int = _setting(256, "tokens a sequence")
    accumulation: int = _setting(1, "batches summed into one step")
    lr: float = _setting(1e-3, "highest learning rate")
    min_lr_ratio: float = _setting(0.1, "last learning rate as a share of it")
    warmup_steps: int = _setting(50, "steps of linear warm-up")
    beta1: float = _setting(0.9, "AdamW's first beta")
    beta2: float = _setting(0.95, "AdamW's second beta")
    weight_decay: float = _setting(0.1, "AdamW's decay of matrices")
    clip: float = _setting(1.0, "largest norm of the gradient")
    precision: str = _setting("auto", "auto, fp32 or bf16; weights and moments stay FP32")
    mtp_weight: float = _setting(0.3, "weight of the multi-token prediction loss")
    balance_weight: float = _setting(1e-4, "weight of the sequence-wise balance loss")
    bias_speed: float = _setting(1e-3, "speed of the gate-bias balancing")
    guide_weight: float = _setting(0.1, "weight of the loss that guides labelled text to its expert's routing group")
    gradient_checkpointing: bool = _setting(False, "recompute layers in the backward pass: less memory, more time")
    eval_every: int = _setting(100, "steps between evaluations")
    eval_batches: int = _setting(16, "batches an evaluation")
    save_every: int = _setting(200, "steps between checkpoints")
    keep: int = _setting(2, "checkpoints kept")
    seed: int = _setting(0, "seed of weights and data order")
    tensorboard: bool = _setting(False, "write TensorBoard events")

    def __post_init__(self) -> None:
        for key in "steps batch_size seq_len accumulation eval_every eval_batches save_every keep".split():
            self._need(key, "must be an integer >= 1", lambda v: isinstance(v, int) and v >= 1)
        for key in ("lr", "clip"):
            self._need(key, "must be a positive number", lambda v: math.isfinite(v) and v > 0)
        for key in ("min_lr_ratio warmup_steps weight_decay mtp_weight balance_weight bias_speed guide_weight "
                    "seed").split():
            self._need(key, "must be a number >= 0", lambda v: math.isfinite(v) and v >= 0)
        for key in ("beta1", "beta2"):
            self._need(key, "must lie in [0, 1)", lambda v: 0 <= v < 1)
        self._need("precision", "must be auto, fp32 or bf16", lambda v: v in ("auto", "fp32", "bf16"))

    def _need(self, key: str, rule: str, holds: Any) -> None:
        if not holds(value := getattr(self, key)):
            raise ConfigError(f"{key} = {value!r}: {rule}")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to min_lr_ratio * lr at the last step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(done, 1))))
