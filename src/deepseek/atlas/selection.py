"""From scores to experts: the selection rule of ESFT (arXiv 2407.01906), and the scores it is applied to.

Over T tokens that visit K of E experts each, per layer:

    token   r_i = how often expert i was chosen / (K T)                  sums to one
    gate    g_i = mean of the gate's weight for i, before the model's routed_scaling_factor

    experts by descending score are taken until their running sum reaches the threshold (0.2 token, 0.1 gate)

A gate that normalises its K weights (V3) has gate scores that sum to one; V2-Lite's sum to the softmax mass of its K.

The rule is decided in whole ten-thousandths: a score is first rounded to 4 decimal places (its exact binary value, half
to even), and the running sum is one of integers, so no order of additions can change a selection. In this arithmetic
the authors' published configurations follow from their published routing logs; from unrounded scores one layer of each
does not.

Shape letters: T tokens, K experts a token, E experts.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, NotFoundError

if TYPE_CHECKING:
    from numpy import ndarray

Score = Literal["token", "gate"]
THRESHOLDS: dict[Score, float] = {"token": 0.2, "gate": 0.1}  # the authors' own
PLACES = 4


def select_experts(scores: Mapping[int, Tensor | Sequence[float] | ndarray], threshold: float) -> dict[int, list[int]]:
    """`{layer: scores_E}` -> `{layer: [expert index, …]}` by descending score, as ESFT selects.

    Scores count in ten-thousandths; ties go to the lower index; a layer whose scores do not add up to the threshold
    gives all its experts. threshold: in (0, 1]. Raises ConfigError for another, DataError for scores that are none.
    """
    if isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise ConfigError(f"threshold = {threshold!r}: must lie above 0 and be at most 1")
    wanted = Decimal(repr(float(threshold))).scaleb(PLACES)
    return {layer: _select(_ten_thousandths(layer, values), wanted) for layer, values in scores.items()}


def _ten_thousandths(layer: int, values: Tensor | Sequence[float] | ndarray) -> list[int]:
    found = [float(value) for value in values]
    if not found:
        raise DataError(f"layer {layer} has no scores: must have one for each expert")
    if wrong := [value for value in found if not (math.isfinite(value) and value >= 0)]:
        raise DataError(f"layer {layer} has the score {wrong[0]}: must be a number >= 0")
    return [round(round(value, PLACES) * 10**PLACES) for value in found]


def _select(scores: list[int], wanted: Decimal) -> list[int]:
    chosen: list[int] = []
    total = 0
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if total >= wanted:
            break
        chosen.append(index)
        total += scores[index]
    return chosen


def token_scores(index_TK: Tensor, experts: int) -> Tensor:
    """r of every expert, FP64 [E]."""
    return torch.bincount(index_TK.flatten(), minlength=experts).double() / max(index_TK.numel(), 1)


def gate_scores(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """g of every expert, FP64 [E]. weight_TK: without routed_scaling_factor."""
    summed = torch.bincount(index_TK.flatten(), weight_TK.flatten().double(), minlength=experts)
    return summed / max(len(index_TK), 1)


def read_routing_log(path: str | Path, top_k: int) -> tuple[Tensor, Tensor]:
    """One layer's routing log as ESFT's authors publish it: (index_TK int64, weight_TK FP64) over all its sequences.

    A line is a sequence of T tokens: T*K expert ids joined by tabs, two tabs, T*K weights joined by tabs; *.gz is read
    as it lies. Raises NotFoundError, or DataError naming file and line.
    """
    path = Path(path)
    indices: list[Tensor] = []
    weights: list[Tensor] = []
    try:
        with (gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")) as file:
            for number, line in enumerate(file, 1):
                ids, parted, values = line.rstrip("\n").partition("\t\t")
                try:
                    index, weight = [int(i) for i in ids.split("\t")], [float(v) for v in values.split("\t")]
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not a line of a routing log: {error}") from None
                if not parted or len(index) != len(weight) or len(index) % top_k or min(index) < 0:
                    raise DataError(f"{path}:{number}: {len(index)} expert ids and {len(weight)} weights: must be "
                                    f"equally many, {top_k} a token, and no id negative")
                indices.append(torch.tensor(index).view(-1, top_k))
                weights.append(torch.tensor(weight, dtype=torch.float64).view(-1, top_k))
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not indices:
        raise DataError(f"{path}: the routing log is empty")
    return torch.cat(indices), torch.cat(weights)
