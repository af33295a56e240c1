"""The settings of tuning: one table for the Python call, the YAML file and the command line. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from ..deepopt.settings import (
    COUNT,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    PRECISION,
    SHARE,
    Rule,
    check,
    is_number,
    one_of,
    setting,
)
from ..errors import ConfigError, nearest

DEFAULT_LR = {"experts": 3e-4, "lora": 2e-4, "full": 1e-5}  # by mode


class TuneSettings(TypedDict, total=False):
    """TuneConfig as keyword arguments, for type checkers and editors."""

    expert_tune: Sequence[str] | str | None
    expert_freeze: Sequence[str] | str | None
    atlas: str | None
    score: str
    threshold: float | None
    shared_experts: bool
    non_expert_modules: bool
    train_router: bool
    balance: bool
    lr: float | None
    epochs: float
    steps: int | None
    batch_size: int
    accumulation: int
    max_length: int | None
    overlong: str
    chat_template_kwargs: Mapping[str, Any] | None
    parse_special: bool
    reasoning: str
    warmup: float
    min_lr_ratio: float
    weight_decay: float
    clip: float
    precision: str
    gradient_checkpointing: bool
    valid_fraction: float
    eval_every: int
    eval_records: int
    general_records: int
    save_every: int
    replay: float
    seed: int
    device: str


@dataclass(frozen=True)
class TuneConfig:
    """Raises ConfigError naming setting, rule and value.

    What is trained: nothing but the experts of expert_tune (names of the atlas, ids such as "3.17", or "auto": those
    that the records visit most); else everything but those of expert_freeze; with an adapter, its LoRA matrices alone.
    """

    expert_tune: Sequence[str] | str | None = setting(None, "names of experts to train alone, or auto")
    expert_freeze: Sequence[str] | str | None = setting(None, "names of experts to leave; all else is trained")
    atlas: str | None = setting(None, "atlas file; else the one beside the model")
    score: str = setting("token", "auto: ESFT's token or gate score")
    threshold: float | None = setting(None, "auto: share to cover; ESFT's 0.2 (token) or 0.1 (gate) if not given")
    shared_experts: bool = setting(False, "train the shared experts too")
    non_expert_modules: bool = setting(False, "train everything that is neither expert nor router too")
    train_router: bool = setting(False, "train the router (the gates' weights) too")
    balance: bool = setting(False, "keep balancing by the gate bias")
    lr: float | None = setting(None, "highest learning rate; else 3e-4 for experts, 2e-4 for LoRA, 1e-5 for all")
    epochs: float = setting(1.0, "times through the records")
    steps: int | None = setting(None, "optimiser steps, instead of epochs")
    batch_size: int = setting(8, "records a batch")
    accumulation: int = setting(1, "batches summed into one step")
    max_length: int | None = setting(None, "tokens of a record at most; 512, or the model's positions, if not given")
    overlong: str = setting("error", "longer records: error, cut or skip")
    chat_template_kwargs: Mapping[str, Any] | None = setting(
        None, """variables of the chat template, a JSON object such as '{"thinking": true}'""")
    parse_special: bool = setting(False, "control tokens that `text` records spell out count as tokens")
    reasoning: str = setting("learn", "what assistants' turns say they thought: learn or drop")
    warmup: float = setting(0.05, "share of the steps with a rising learning rate")
    min_lr_ratio: float = setting(0.1, "last learning rate as a share of the highest")
    weight_decay: float = setting(0.0, "AdamW's decay of matrices")
    clip: float = setting(1.0, "largest norm of the gradient")
    precision: str = setting("auto", "of activations: auto, fp32 or bf16")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward pass: less memory, more time")
    valid_fraction: float = setting(0.1, "share of the records held out, by a hash of their text")
    eval_every: int = setting(100, "steps between evaluations")
    eval_records: int = setting(256, "held-out records an evaluation")
    general_records: int = setting(64, "windows of general text an evaluation, and documents that they come from")
    save_every: int = setting(100, "steps between checkpoints")
    replay: float = setting(0.0, "share of general or old records mixed into every batch's worth of new ones")
    seed: int = setting(0, "seed of order and of new parameters")
    device: str = setting("cpu", "cpu or cuda")

    def __post_init__(self) -> None:
        if self.expert_tune is not None and self.expert_freeze is not None:
            raise ConfigError("expert_tune and expert_freeze exclude each other: the first trains these experts alone, "
                              "the second all but these")
        if isinstance(self.expert_tune, str) and self.expert_tune != "auto":
            object.__setattr__(self, "expert_tune", (self.expert_tune,))
        if isinstance(self.expert_freeze, str):
            object.__setattr__(self, "expert_freeze", (self.expert_freeze,))
        for key in ("expert_tune", "expert_freeze"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str) and not value:
                raise ConfigError(f"{key} = []: must name at least one expert (or be left out)")
        check(self, {
            "batch_size accumulation eval_every eval_records general_records save_every": COUNT,
            "steps max_length": _or_none(COUNT), "lr": _or_none(POSITIVE), "clip epochs": POSITIVE,
            "weight_decay min_lr_ratio": NOT_NEGATIVE,
            "warmup replay": SHARE, "seed": NATURAL, "precision": PRECISION, "device": one_of("cpu", "cuda"),
            "valid_fraction": ("must lie in (0, 1)", lambda v: is_number(v) and 0 < v < 1),
            "score": one_of("token", "gate"), "overlong": one_of("error", "cut", "skip"),
            "reasoning": one_of("learn", "drop"),
            "chat_template_kwargs": ("must be an object of JSON values, {name: value}, or be left out",
                                     lambda v: v is None or (isinstance(v, dict) and _is_json(v))),
            "threshold": _or_none(("must lie in (0, 1]", lambda v: is_number(v) and 0 < v <= 1))})

    @classmethod
    def of(cls, **settings: Any) -> TuneConfig:
        """Raises ConfigError for a setting that there is not, listing those that there are."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ConfigError(f"unknown setting {', '.join(unknown)}; there are {', '.join(known)}"
                              f"{nearest(unknown[0], known)}")
        return cls(**settings)


def _or_none(rule: Rule) -> Rule:
    return f"{rule[0]}, or be left out", lambda v: v is None or rule[1](v)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
