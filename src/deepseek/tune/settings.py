"""The settings of tuning: one table for the Python call, the YAML file and the command line. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TuneConfig:
    """Raises ConfigError naming setting, rule and value.

    What is trained: nothing but the experts of expert_tune (names of the atlas, ids such as "3.17", or "auto": those
    that the records visit most); else everything but those of expert_freeze; with an adapter, its side paths alone.
    """

    expert_tune: Sequence[str] | str | None = _setting(None, "names of experts to train alone, or auto")
    expert_freeze: Sequence[str] | None = _setting(None, "names of experts to leave as they are, all else is trained")
    atlas: str | None = _setting(None, "atlas file; else the one beside the model")
    score: str = _setting("token", "auto: ESFT's token or gate score")
    threshold: float | None = _setting(None, "auto: share to cover; ESFT's 0.2 (token) or 0.1 (gate) if not given")
    shared_experts: bool = _setting(False, "train the shared experts too")
    non_expert_modules: bool = _setting(False, "train everything that is neither expert nor router too")
    train_router: bool = _setting(False, "train the router (the gates' weights) too")
    balance: bool = _setting(False, "keep balancing by the gate bias")
    lr: float = _setting(1e-5, "highest learning rate")
    epochs: float = _setting(1.0, "times through the records")
    steps: int | None = _setting(None, "optimiser steps, instead of epochs")
    batch_size: int = _setting(8, "records a batch")
    accumulation: int = _setting(1, "batches summed into one step")
    max_length: int | None = _setting(None, "tokens of a record at most; 512, or the model's positions, if not given")
    overlong: str = _setting("error", "longer records: error, cut or skip")
    warmup: float = _setting(0.05, "share of the steps with a rising learning rate")
    min_lr_ratio: float = _setting(0.1, "last learning rate as a share of the highest")
    weight_decay: float = _setting(0.0, "AdamW's decay of matrices")
    clip: float = _setting(1.0, "largest norm of the gradient")
    precision: str = _setting("auto", "of activations: auto, fp32 or bf16")
    gradient_checkpointing: bool = _setting(False, "recompute layers in the backward pass: less memory, more time")
    valid_fraction: float = _setting(0.1, "share of the records held out, by a hash of their text")
    eval_every: int = _setting(100, "steps between evaluations")
    eval_records: int = _setting(256, "held-out records an evaluation, of each kind")
    save_every: int = _setting(100, "steps between checkpoints")
    replay: float = _setting(0.0, "share of general or old records mixed into every batch's worth of new ones")
    seed: int = _setting(0, "seed of order and of new parameters")
    device: str = _setting("cpu", "cpu or cuda")

    def __post_init__(self) -> None:
        if self.expert_tune is not None and self.expert_freeze is not None:
            raise ConfigError("expert_tune and expert_freeze exclude each other: the first trains these experts alone, "
                              "the second all but these")
        if isinstance(self.expert_tune, str) and self.expert_tune != "auto":
            raise ConfigError(f"expert_tune = {self.expert_tune!r}: must be a list of names, or auto")
        if isinstance(self.expert_freeze, str):
            raise ConfigError(f"expert_freeze = {self.expert_freeze!r}: must be a list of names")
        for key in ("expert_tune", "expert_freeze"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str) and not value:
                raise ConfigError(f"{key} = []: must name at least one expert (or be left out)")
        for key in "batch_size accumulation eval_every eval_records save_every".split():
            self._need(key, "must be an integer >= 1", lambda v: _is_int(v) and v >= 1)
        for key in ("steps", "max_length"):
            self._need(key, "must be an integer >= 1, or left out", lambda v: v is None or (_is_int(v) and v >= 1))
        for key in ("lr", "clip", "epochs"):
            self._need(key, "must be a positive number", lambda v: _is_number(v) and v > 0)
        for key in ("weight_decay", "min_lr_ratio"):
            self._need(key, "must be a number >= 0", lambda v: _is_number(v) and v >= 0)
        for key in ("warmup", "replay"):
            self._need(key, "must lie in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1)
        self._need("valid_fraction", "must lie in (0, 1)", lambda v: _is_number(v) and 0 < v < 1)
        self._need("device", "must be cpu or cuda", lambda v: v in ("cpu", "cuda"))
        self._need("seed", "must be an integer >= 0", lambda v: _is_int(v) and v >= 0)
        self._need("score", "must be token or gate", lambda v: v in ("token", "gate"))
        self._need("overlong", "must be error, cut or skip", lambda v: v in ("error", "cut", "skip"))
        self._need("precision", "must be auto, fp32 or bf16", lambda v: v in ("auto", "fp32", "bf16"))
        self._need("threshold", "must lie in (0, 1], or be left out",
                   lambda v: v is None or (_is_number(v) and 0 < v <= 1))

    def _need(self, key: str, rule: str, holds: Any) -> None:
        if not holds(value := getattr(self, key)):
            raise ConfigError(f"{key} = {value!r}: {rule}")

    @classmethod
    def of(cls, **settings: Any) -> TuneConfig:
        """Raises ConfigError for a setting that there is not, listing those that there are."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ConfigError(f"unknown setting {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**settings)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
