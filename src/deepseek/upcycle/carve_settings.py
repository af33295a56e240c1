"""The settings of `deepseek upcycle --carve`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..settings import ABOVE_ZERO, COUNT, NATURAL, SHARE, Option, Settings


@dataclass(frozen=True, kw_only=True)
class CarveConfig(Settings):
    """What `carve` makes of a dense model. Raises ConfigError naming setting, rule and value."""

    carve: Annotated[float | None, Option(
        "make experts of the FFN's neurons, so that this share of the FFN is active for a token", ABOVE_ZERO,
        metavar="SHARE")] = None
    calibrate: Annotated[tuple[str, ...], Option(
        "text by which neurons are grouped: PATH or NAME=PATH; else text that the model writes itself",
        metavar="DATA")] = ()
    calibration_tokens: Annotated[int, Option("tokens of that text", COUNT)] = 16384
    expert_width: Annotated[int, Option("neurons of an expert", COUNT)] = 16
    always_active: Annotated[float, Option("share of a layer's neurons in the shared expert", SHARE)] = 0.125
    dense_layers: Annotated[int, Option("first layers that stay dense", NATURAL)] = 1
    refit: Annotated[bool, Option(
        "fit the experts' down projections to the dense layer's output on the calibration text")] = True
    calibration_seed: Annotated[int, Option("seed of the calibration text", NATURAL)] = 0
