"""Rotary position embedding (arXiv 2104.09864) on vectors laid out either way.

Shape letters: B batch, T tokens, N heads, P pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import dense_rows, dtype_code, native, threads, trains_native


def rotate(x_BTNP2: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, interleave: bool) -> Tensor:
    """Rotate the last dimension of [B, T, N, 2P], pairs (0,1), (2,3), … or, not interleaved, (0,P), (1,P+1), ….

    The result is laid out as two halves [cos part | sin part] in both cases: queries and keys agree, and that is all
    that a dot product sees.
    """
    if (torch.is_grad_enabled() and x_BTNP2.requires_grad and trains_native(x_BTNP2, cos_BTP, sin_BTP)
            and cos_BTP.dtype == sin_BTP.dtype == torch.float32 and cos_BTP.stride() == sin_BTP.stride()):
        return _NativeRotate.apply(x_BTNP2, cos_BTP, sin_BTP, interleave)
    x = x_BTNP2.float()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    cos, sin = cos_BTP.unsqueeze(2), sin_BTP.unsqueeze(2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BTNP2.dtype)


class _NativeRotate(torch.autograd.Function):
    """The same in one pass each way, to the bit."""

    @staticmethod
    def forward(ctx: Any, x_BTNP2: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, interleave: bool) -> Tensor:
        ctx.save_for_backward(cos_BTP, sin_BTP)
        ctx.interleave = interleave
        return _rotate(x_BTNP2, cos_BTP, sin_BTP, interleave, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTNP2: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(dense_rows(dy_BTNP2), cos, sin, ctx.interleave, back=True), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool, *, back: bool) -> Tensor:
    batch, length, heads, width = x.shape
    out = x.new_empty(x.shape)
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    steps = ((t.data_ptr(), t.stride(0), t.stride(2), t.stride(1), width) for t in (x, out))
    native.rotate(*steps, dtype_code(x), cos.data_ptr(), sin.data_ptr(), *cos.stride()[:2], batch, heads, length,
                  interleave, back, threads())
    return out
