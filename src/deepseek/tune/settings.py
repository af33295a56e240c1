"""The settings of tuning: one table for the Python call, the YAML file and the command line. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypedDict

from ..deepopt.settings import PRECISION
from ..errors import ConfigError, nearest
from ..settings import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, Option, check, is_number, one_of

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

    expert_tune: Annotated[Sequence[str] | str | None, Option("names of experts to train alone, or auto")] = None
    expert_freeze: Annotated[Sequence[str] | str | None, Option(
        "names of experts to leave; all else is trained")] = None
    atlas: Annotated[str | None, Option("atlas file; else the one beside the model")] = None
    score: Annotated[str, Option("auto: ESFT's token or gate score", one_of("token", "gate"))] = "token"
    threshold: Annotated[float | None, Option(
        "auto: share to cover; ESFT's 0.2 (token) or 0.1 (gate) if not given", (
            "must lie in (0, 1]", lambda v: is_number(v) and 0 < v <= 1))] = None
    shared_experts: Annotated[bool, Option("train the shared experts too")] = False
    non_expert_modules: Annotated[bool, Option("train everything that is neither expert nor router too")] = False
    train_router: Annotated[bool, Option("train the router (the gates' weights) too")] = False
    balance: Annotated[bool, Option("keep balancing by the gate bias")] = False
    lr: Annotated[float | None, Option(
        "highest learning rate; else 3e-4 for experts, 2e-4 for LoRA, 1e-5 for all", POSITIVE)] = None
    epochs: Annotated[float, Option("times through the records", POSITIVE)] = 1.0
    steps: Annotated[int | None, Option("optimizer steps, instead of epochs", COUNT)] = None
    batch_size: Annotated[int, Option("records a batch", COUNT)] = 8
    accumulation: Annotated[int, Option("batches summed into one step", COUNT)] = 1
    max_length: Annotated[int | None, Option(
        "tokens of a record at most; 512, or the model's positions, if not given", COUNT)] = None
    overlong: Annotated[str, Option("longer records: error, cut or skip", one_of("error", "cut", "skip"))] = "error"
    chat_template_kwargs: Annotated[Mapping[str, Any] | None, Option(
        """variables of the chat template, a JSON object such as '{"thinking": true}'""", (
            "must be an object of JSON values, {name: value}", lambda v: isinstance(v, dict) and _is_json(v)))] = None
    parse_special: Annotated[bool, Option("control tokens that `text` records spell out count as tokens")] = False
    reasoning: Annotated[str, Option(
        "what assistants' turns say they thought: learn or drop", one_of("learn", "drop"))] = "learn"
    warmup: Annotated[float, Option("share of the steps with a rising learning rate", SHARE)] = 0.05
    min_lr_ratio: Annotated[float, Option("last learning rate as a share of the highest", NOT_NEGATIVE)] = 0.1
    weight_decay: Annotated[float, Option("AdamW's decay of matrices", NOT_NEGATIVE)] = 0.0
    clip: Annotated[float, Option("largest norm of the gradient", POSITIVE)] = 1.0
    precision: Annotated[str, Option("of activations: auto, fp32 or bf16", PRECISION)] = "auto"
    gradient_checkpointing: Annotated[bool, Option(
        "recompute layers in the backward pass: less memory, more time")] = False
    valid_fraction: Annotated[float, Option(
        "share of the records held out, by a hash of their text", (
            "must lie in (0, 1)", lambda v: is_number(v) and 0 < v < 1))] = 0.1
    eval_every: Annotated[int, Option("steps between evaluations", COUNT)] = 100
    eval_records: Annotated[int, Option("held-out records per evaluation", COUNT)] = 256
    general_records: Annotated[int, Option(
        "windows of general text an evaluation, and documents that they come from", COUNT)] = 64
    save_every: Annotated[int, Option("steps between checkpoints", COUNT)] = 100
    replay: Annotated[float, Option(
        "share of general or old records mixed into every batch's worth of new ones", SHARE)] = 0.0
    seed: Annotated[int, Option("seed of order and of new parameters", NATURAL)] = 0
    device: Annotated[str, Option("cpu or cuda", one_of("cpu", "cuda"))] = "cpu"

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
        check(self)

    @classmethod
    def of(cls, **settings: Any) -> TuneConfig:
        """Raises ConfigError for a setting that there is not, listing those that there are."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ConfigError(f"unknown setting {', '.join(unknown)}; there are {', '.join(known)}"
                              f"{nearest(unknown[0], known)}")
        return cls(**settings)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
