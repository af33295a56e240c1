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

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

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
