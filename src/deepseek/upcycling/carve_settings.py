"""The settings of `deepseek upcycle --carve | --latent [--heal]`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..deepopt.settings import Precision
from ..settings import ABOVE_ZERO, COUNT, NATURAL, POSITIVE, SHARE, UP_TO_ONE, Option, Settings


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Settings):
    """The text by which a dense model is measured. Raises ConfigError naming setting, rule and value."""

    calibrate: Annotated[tuple[str, ...], Option(
        "text by which the dense model is measured: PATH or NAME=PATH; else text that it writes itself",
        metavar="DATA")] = ()
    calibration_tokens: Annotated[int, Option("tokens of that text", COUNT)] = 16384
    calibration_seed: Annotated[int, Option("seed of the calibration text", NATURAL)] = 0


@dataclass(frozen=True, kw_only=True)
class LatentConfig(CalibrationConfig):
    """What `latent_form` makes of a dense model. Raises ConfigError naming setting, rule and value."""

    latent: Annotated[int | None, Option(
        "lossy, to be healed: keep so many numbers of a token's keys and values, beside its rotary key, in the latent; "
        "kv_lora_rank is 16/15 of it, rounded up to 16, for constant channels", COUNT, metavar="RANK")] = None
    latent_rotary: Annotated[int | None, Option(
        "width of the rotary key beside the latent (default: a head's, at most 64)", COUNT, metavar="DIMS")] = None


@dataclass(frozen=True, kw_only=True)
class CarveConfig(CalibrationConfig):
    """What `carve` makes of a dense model. Raises ConfigError naming setting, rule and value."""

    carve: Annotated[float | None, Option(
        "make experts of the FFN's neurons, so that this share of the FFN is active for a token", ABOVE_ZERO,
        metavar="SHARE")] = None
    expert_width: Annotated[int, Option("neurons of an expert; 64 where it will be quantized to four bits", COUNT)] = 32
    always_active: Annotated[float, Option("share of a layer's neurons in the shared expert", SHARE)] = 0.125
    dense_layers: Annotated[int, Option("first layers that stay dense", NATURAL)] = 1
    refit: Annotated[bool, Option(
        "fit the experts' down projections to the dense layer's output on the calibration text")] = True


@dataclass(frozen=True, kw_only=True)
class HealConfig(Settings):
    """How `carve` and `latent_form` train their result, with the dense model as the teacher. Raises ConfigError naming
    setting, rule and value."""

    heal: Annotated[tuple[str, ...], Option(
        "train the experts, or the latent attention, on this text, PATH or NAME=PATH, the same share of each name; it "
        "also calibrates", metavar="DATA")] = ()
    heal_tokens: Annotated[int, Option("tokens to train on", COUNT)] = 2_000_000
    heal_lr: Annotated[float, Option("highest learning rate", POSITIVE)] = 4e-4
    heal_batch: Annotated[int, Option("windows of 512 tokens a step", COUNT)] = 2
    kl_share: Annotated[float, Option(
        "share of the loss that compares with the dense model; the rest is cross entropy with the text",
        UP_TO_ONE)] = 0.8
    anneal: Annotated[float, Option(
        "share of the steps in which the active share falls from all to what is asked (carve)", SHARE)] = 0.0
    heal_precision: Annotated[Precision, Option(
        "of activations; auto is BF16 where there are units for it; weights and moments stay FP32")] = "auto"
    heal_evaluated: Annotated[int, Option("held-out windows of each name in an evaluation", COUNT)] = 8
    heal_saved: Annotated[int, Option("steps between checkpoints", COUNT)] = 20
    heal_seed: Annotated[int, Option("seed of the order of the text", NATURAL)] = 0
