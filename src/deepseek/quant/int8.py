"""INT8: symmetric, one float32 step a row.

    step = max |w| / 127        code = round(w / step), -127..127        w ~ step * code

Shape letters: O output rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.panels import Quantized


def quantize(w_OK: Tensor) -> Quantized:
    """A matrix [O, K] (computed in float32) -> codes and steps; all its values must be finite."""
    w_OK = w_OK.float()
    step_O = w_OK.abs().amax(1) / 127
    code_OK = (w_OK / step_O.clamp(min=torch.finfo().tiny).unsqueeze(1)).round()
    return Quantized(code_OK.clamp(-127, 127).to(torch.int8), None, step_O)
