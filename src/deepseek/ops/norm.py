"""RMSNorm with a gradient that makes as few passes over memory as torch allows.

    y = w * x / rms(x),  rms(x) = sqrt(mean(x^2) + eps)                                   (arXiv 1910.07467)
    dx = r * (w dy) - x * r^3 * mean(x * w dy),  r = 1 / rms(x);     dw = sum over rows of dy * x * r

Statistics are FP32 whatever the dtype of x. torch's own `F.rms_norm` has no fused CPU form (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import dtype_code, native, runs_native, threads, trains_native


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        if trains_native(x_MH, w_H) and x_MH.is_contiguous() and w_H.dtype == torch.float32:
            y, r_M1 = torch.empty_like(x_MH), x_MH.new_empty(len(x_MH), 1, dtype=torch.float32)
            ctx.save_for_backward(x_MH, w_H, r_M1)
            native.norm_forward(x_MH.data_ptr(), dtype_code(x_MH), w_H.data_ptr(), *x_MH.shape, eps, y.data_ptr(),
                                r_M1.data_ptr(), threads())
            return y
        x = x_MH.float()
        r_M1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_MH, w_H, r_M1)
        return (x * r_M1).to(x_MH.dtype).mul_(w_H.to(x_MH.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MH: Tensor) -> tuple[Tensor | None, ...]:
        x_MH, w_H, r_M1 = ctx.saved_tensors
        if trains_native(x_MH, w_H) and x_MH.is_contiguous() and w_H.dtype == torch.float32:
            dy, dx, grad_w = dy_MH.contiguous(), torch.empty_like(x_MH), torch.empty_like(w_H)
            parts = grad_w.new_empty(-(-len(x_MH) // 64), len(w_H))
            native.norm_backward(x_MH.data_ptr(), dy.data_ptr(), dtype_code(x_MH), w_H.data_ptr(), r_M1.data_ptr(),
                                 *x_MH.shape, dx.data_ptr(), parts.data_ptr(), grad_w.data_ptr(), threads())
            return dx, grad_w, None
        x, dy = x_MH.float(), dy_MH.float()
        xr = x * r_M1
        dy_xr = dy * xr
        dw = dy_xr.sum(0).to(w_H.dtype) if ctx.needs_input_grad[1] else None
        w_H = w_H.float()
        mean_M1 = torch.mv(dy_xr, w_H).div_(x.shape[-1]).unsqueeze(-1)
        wdy = dy * w_H
        dx = wdy.addcmul_(xr, mean_M1, value=-1).mul_(r_M1)
        return dx.to(x_MH.dtype), dw, None


def rms_norm(x: Tensor, w_H: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of x[..., H]; the result has the dtype of x."""
    if w_H.shape != x.shape[-1:]:
        raise ValueError(f"weights must be [{x.shape[-1]}], got {list(w_H.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or w_H.requires_grad):
        return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), w_H, eps).view(x.shape)
    if x.dtype == w_H.dtype == torch.float32 and runs_native(x, w_H):
        out = torch.empty_like(x)
        width = x.shape[-1]
        native.rms_norm(x.data_ptr(), x.numel() // width, width, width, w_H.data_ptr(), eps, out.data_ptr(), threads())
        return out
    h = x.float()
    h = h * h.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return h.to(x.dtype) * w_H.to(x.dtype)
