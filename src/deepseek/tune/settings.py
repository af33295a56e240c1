"""The settings of tuning: one table for the Python call, the YAML file and the command line. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from ..deepopt.settings import Precision
from ..errors import ConfigError
from ..ids import ExpertId
from ..settings import (
    ABOVE_ZERO,
    COUNT,
    JSON,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Device,
    Option,
    Rule,
    Settings,
    is_int,
    is_number,
)

EXPERTS: Rule = "must name at least one expert", lambda v: isinstance(v, tuple) and bool(v) and all(
    isinstance(name, str | ExpertId) and name for name in v)
DEFAULT_LR = {"experts": 3e-4, "lora": 2e-4, "full": 1e-5}  # by mode


class TuneSettings(TypedDict, total=False):
    """TuneConfig as keyword arguments, for type checkers and editors."""

    expert_tune: Sequence[str] | str | None
    expert_freeze: Sequence[str] | str | None
    atlas: str | Path | None
    score: Literal["token", "gate"]
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
    overlong: Literal["error", "cut", "skip"]
    chat_template_kwargs: Mapping[str, Any] | None
    parse_special: bool
    reasoning: Literal["learn", "drop"]
    warmup: float
    min_lr_ratio: float
    weight_decay: float
    clip: float
    precision: Precision
    gradient_checkpointing: bool
    valid_fraction: float
    eval_every: int
    eval_records: int
    general_records: int
    save_every: int
    replay: float
    seed: int
    device: Device


@dataclass(frozen=True)
class TuneConfig(Settings):
    """Raises ConfigError naming setting, rule and value.

    What is trained: nothing but the experts of expert_tune (names of the atlas, ids such as "3.17", or "auto": those
    that the records visit most); else everything but those of expert_freeze; with an adapter, its LoRA matrices alone.
    """

    expert_tune: Annotated[tuple[str, ...] | str | None, Option(
        "names of experts to train alone, or auto", (
            EXPERTS[0], lambda v: v == "auto" or EXPERTS[1](v)), "NAME")] = None
    expert_freeze: Annotated[tuple[str, ...] | None, Option(
        "names of experts to leave; all else is trained", EXPERTS, "NAME")] = None
    atlas: Annotated[str | Path | None, Option("atlas file; else the one beside the model", metavar="FILE")] = None
    score: Annotated[Literal["token", "gate"], Option("for auto: ESFT's token or gate score")] = "token"
    threshold: Annotated[float | None, Option(
        "for auto: share to cover; ESFT's 0.2 (token) or 0.1 (gate) if not given", ABOVE_ZERO)] = None
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
    overlong: Annotated[Literal["error", "cut", "skip"], Option("what happens to longer records")] = "error"
    chat_template_kwargs: Annotated[Mapping[str, Any] | None, Option(
        """variables of the chat template, a JSON object such as '{"thinking": true}'""", JSON)] = None
    parse_special: Annotated[bool, Option("control tokens that `text` records spell out count as tokens")] = False
    reasoning: Annotated[Literal["learn", "drop"], Option(
        "what happens to the reasoning of assistants' turns")] = "learn"
    warmup: Annotated[float, Option("share of the steps with a rising learning rate", SHARE)] = 0.05
    min_lr_ratio: Annotated[float, Option("last learning rate as a share of the highest", NOT_NEGATIVE)] = 0.1
    weight_decay: Annotated[float, Option("AdamW's decay of matrices", NOT_NEGATIVE)] = 0.0
    clip: Annotated[float, Option("largest norm of the gradient", POSITIVE)] = 1.0
    precision: Annotated[Precision, Option("of activations; auto is BF16 where that is faster")] = "auto"
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
        "share of old records mixed into every batch's worth of new ones", SHARE)] = 0.0
    seed: Annotated[int, Option("seed of order and of new parameters", NATURAL)] = 0
    device: Annotated[Device, Option("where the model runs")] = "cpu"

    def __post_init__(self) -> None:
        if self.expert_tune is not None and self.expert_freeze is not None:
            raise ConfigError("expert_tune and expert_freeze exclude each other: the first trains these experts alone, "
                              "the second all but these")
        if self.expert_tune in (["auto"], ("auto",)):
            object.__setattr__(self, "expert_tune", "auto")
        super().__post_init__()


@dataclass(frozen=True)
class RunOptions(Settings):
    """What a run leaves, and how it takes a stream."""

    save: Annotated[Literal["auto", "delta", "full"], Option(
        "what is written; auto is a delta of tuned experts, a LoRA adapter, else a whole checkpoint")] = "auto"
    show_records: Annotated[int | None, Option(
        "print what would be learnt of the first N records, and stop", COUNT)] = None
    records_a_round: Annotated[int, Option("records of standard input a round", (
        "must be an integer >= 4", lambda v: is_int(v) and v >= 4))] = 256
    rounds: Annotated[int | None, Option("rounds of standard input to learn; else all until it ends", COUNT)] = None
