"""Rotary position embedding (arXiv 2104.09864) on vectors laid out either way.

Shape letters: B batch, T tokens, N heads, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BTNP2: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, interleave: bool) -> Tensor:
    """Rotate the last dimension of [B, T, N, 2P], pairs (0,1), (2,3), … or, not interleaved, (0,P), (1,P+1), ….

    The result is laid out as two halves [cos part | sin part] in both cases: queries and keys agree, and that is all
    that a dot product sees.
    """
    x = x_BTNP2.float()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    cos, sin = cos_BTP.unsqueeze(2), sin_BTP.unsqueeze(2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BTNP2.dtype)
