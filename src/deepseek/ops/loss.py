"""Cross entropy of a linear head without ever holding all logits.

The logits of a training batch are by far its largest tensor (4,096 tokens x 129,280 words x 4 bytes = 2.1 GB). The
gradient of cross entropy with respect to the logits is known as soon as they are (softmax - one hot), so one pass over
chunks of rows computes a chunk of logits, its loss, its gradient, and from that the gradients of the input and of the
head; the chunk never leaves the cache and is never needed again. The same idea, on GPUs, is in Liger-Kernel
(arXiv 2410.10989). Forward alone (no gradient wanted) does the first half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import to_compute_dtype
from .native import address, dtype_code, native, runs_native, threads, trains_native

CHUNK_BYTES = 32 << 20  # logits held at a time: enough rows for the products, little enough for a shared cache
IGNORE = -100


def chunk_rows(vocab: int) -> int:
    return max(16, CHUNK_BYTES // (4 * vocab))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, w_VH: Tensor, labels_M: Tensor, wants_grad: bool) -> Tensor:
        keep = labels_M != IGNORE
        count = keep.sum().clamp(min=1)
        want_x, want_w = (wants_grad and want for want in ctx.needs_input_grad[:2])
        ctx.want, ctx.dtypes = (want_x, want_w), (x_MH.dtype, w_VH.dtype)
        if trains_native(x_MH, w_VH) and runs_native(x_MH, w_VH):
            total, dx, dw = _native_loss(x_MH, w_VH, labels_M, 1 / count, want_x, want_w)
            ctx.save_for_backward(*(g for g in (dx, dw) if g is not None))
            return total
        wide = to_compute_dtype(w_VH.to(x_MH.dtype))
        x = to_compute_dtype(x_MH)
        dx = torch.empty_like(x) if want_x else None
        dw = torch.zeros_like(wide) if want_w else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = min(chunk_rows(w_VH.shape[0]), max(1, len(x)))
        buffer = x.new_empty(rows, w_VH.shape[0])
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            logits = torch.mm(x[part], wide.t(), out=buffer[: len(x[part])]).float()
            target = labels_M[part].masked_fill(~keep[part], 0).unsqueeze(1)  # any other bad label fails in gather
            picked = logits.gather(1, target).squeeze(1)
            top = logits.amax(1, keepdim=True)
            p = logits.sub_(top).exp_()
            norm = p.sum(1, keepdim=True)
            total += ((norm.log() + top).squeeze(1) - picked).masked_fill_(~keep[part], 0).sum()
            if not (want_x or want_w):
                continue
            weight = (keep[part] / count).unsqueeze(1)
            p.mul_(weight / norm).scatter_add_(1, target, -weight)
            p = p.to(x.dtype)
            if dx is not None:
                torch.mm(p, wide, out=dx[part])
            if dw is not None:
                dw.addmm_(p.t(), x[part])
        ctx.save_for_backward(*(g for g in (dx, dw) if g is not None))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = iter(ctx.saved_tensors)
        dx, dw = ((next(grads) * scale).to(dt) if want else None for want, dt in zip(ctx.want, ctx.dtypes, strict=True))
        return dx, dw, None, None


def _native_loss(x_MH: Tensor, w_VH: Tensor, labels_M: Tensor, scale: Tensor, want_x: bool,
                 want_w: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loop above in one call: (mean loss, gradient of x, gradient of w), both FP32."""
    (rows, hidden), vocab = x_MH.shape, w_VH.shape[0]
    bad = (labels_M != IGNORE) & ((labels_M < 0) | (labels_M >= vocab))
    if bad.any():
        raise IndexError(f"label {labels_M[bad][0].item()} is out of range 0..{vocab - 1}")
    labels = labels_M.long().contiguous()
    loss = x_MH.new_empty(rows, dtype=torch.float32)
    dx = torch.empty_like(x_MH, dtype=torch.float32) if want_x else None
    dw = torch.empty_like(w_VH, dtype=torch.float32) if want_w else None
    native.head_loss(
        x_MH.data_ptr(), dtype_code(x_MH), w_VH.data_ptr(), dtype_code(w_VH, x_MH), labels.data_ptr(), rows,
        hidden, vocab, scale.item(), min(chunk_rows(vocab), max(1, rows)), loss.data_ptr(), address(dx),
        address(dw), threads())
    return loss.sum() * scale, dx, dw


def linear_cross_entropy(x_MH: Tensor, w_VH: Tensor, labels_M: Tensor) -> Tensor:
    """Mean over the labelled rows of cross_entropy(x @ w^T, labels); rows labelled -100 do not count. FP32 scalar."""
    return _LinearCrossEntropy.apply(x_MH, w_VH, labels_M, torch.is_grad_enabled())
