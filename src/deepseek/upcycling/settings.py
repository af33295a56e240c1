"""The settings of growing experts, declared as in ../settings.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..deepopt.settings import Precision
from ..settings import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, Option, Settings, is_int, is_number


@dataclass(frozen=True, kw_only=True)
class GrowConfig(Settings):
    """How named experts are grown beside the FFNs of a dense model. Raises ConfigError naming setting, rule and value.

    Defaults: those with which seven names were grown on a model of 135 M parameters (docs/upcycling.md).
    """

    others: Annotated[tuple[str | Path, ...], Option(
        "text of none of the names, which their experts are to leave alone", metavar="DATA")] = ()
    first_layer: Annotated[int | None, Option(
        "first layer with experts; a third of the way up if not given", NATURAL)] = None
    group_experts: Annotated[int, Option("experts of a name in every layer", (
        "must be an integer >= 2", lambda v: is_int(v) and v >= 2))] = 4
    group_width: Annotated[int, Option("width of an expert; must divide that of the FFN", COUNT)] = 64
    steps: Annotated[int, Option("optimizer steps", COUNT)] = 240
    rows: Annotated[int, Option("rows of text a step, from the names in turn", COUNT)] = 7
    seq_len: Annotated[int, Option("tokens a row", COUNT)] = 512
    lr: Annotated[float, Option("highest learning rate of the experts", POSITIVE)] = 1e-3
    gate_lr: Annotated[float, Option("that of the gates, as a share of it", NOT_NEGATIVE)] = 0.1
    guide_weight: Annotated[float, Option(
        "weight of the loss that guides text to its name's group", NOT_NEGATIVE)] = 0.1
    gate_tokens: Annotated[int, Option("tokens of each name that the gates are fitted to before", COUNT)] = 4096
    precision: Annotated[Precision, Option("of activations; auto is BF16 where that is faster")] = "auto"
    valid_fraction: Annotated[float, Option("share of the records held out, by a hash of their text", (
        "must lie in (0, 1)", lambda v: is_number(v) and 0 < v < 1))] = 0.1
    eval_every: Annotated[int, Option("steps between evaluations", COUNT)] = 120
    eval_rows: Annotated[int, Option("held-out records of each name an evaluation", COUNT)] = 24
    save_every: Annotated[int, Option("steps between checkpoints", COUNT)] = 20
    warmup: Annotated[float, Option("share of the steps with a rising learning rate", SHARE)] = 0.05
    seed: Annotated[int, Option("seed of order and of new parameters", NATURAL)] = 0
    package_precision: Annotated[Literal["float32", "bfloat16"], Option(
        "of the experts in the packages")] = "bfloat16"
    license: Annotated[str, Option("licence that the packages state", metavar="TEXT")] = "unstated"
