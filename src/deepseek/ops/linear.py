"""Matrix products in the precision of the activations, on the units that the machine has.

Every product takes the dtype of its activations; the weight is cast to it at the moment of use (mixed precision is then
FP32 weights under BF16 activations, with no global switch to forget).

BF16 on a CPU without BF16 instructions: torch sends a BF16 product to a oneDNN kernel that emulates the missing
instructions, at about a quarter of the speed of the same product in FP32 (docs/log.md). A BF16 product is *defined* as
"operands rounded to BF16, products summed in FP32, result rounded to BF16", and FP32 units can do exactly that:
products of two BF16 numbers are exact in FP32. So `mm` widens the operands there and rounds the result. With BF16
instructions (AVX512-BF16, AMX) or on a GPU the product goes to them directly: through torch, or in training through
the native kernels (csrc/training_pairs.h), as `bf16_way` has chosen.

Shape letters: M rows, K inner, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import CHOSEN, dense_rows, dtype_code, fast_bf16, native, runs_native, threads, trains_native
from .quantized import plain_linear

FEW = 8  # rows whose BF16 product takes as long as reading the weights; of fewer, torch's takes several times that


def to_compute_dtype(x: Tensor) -> Tensor:
    """`x` as the operand of a product: FP32 where half precision has no units of its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) and not fast_bf16(x.device.type) else x


def mm(a_MK: Tensor, b_KO: Tensor) -> Tensor:
    """a @ b; half-precision operands are summed in FP32 and the result is rounded back once."""
    return (to_compute_dtype(a_MK) @ to_compute_dtype(b_KO)).to(a_MK.dtype)


def product(a: Tensor, b: Tensor, x: Tensor, dtype: torch.dtype, *, a_transposed: bool = False,
            b_transposed: bool = False) -> Tensor:
    """a @ b through the native kernels, either one transposed, as operands of the dtype of the activations `x`."""
    a, b = dense_rows(a), dense_rows(b)
    rows, inner = a.shape[::-1] if a_transposed else a.shape
    columns = b.shape[0] if b_transposed else b.shape[1]
    out = a.new_empty(rows, columns, dtype=dtype)
    native.product(a.data_ptr(), a.stride(0), dtype_code(a, x), a_transposed, b.data_ptr(), b.stride(0),
                   dtype_code(b, x), b_transposed, rows, columns, inner, out.data_ptr(), dtype_code(out), threads())
    return out


class Linear(torch.autograd.Function):
    """y = x W^T (+ b) with both gradients on the same units; weights and their gradient keep the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_OK: Tensor, b_O: Tensor | None) -> Tensor:
        ctx.has_bias, ctx.w_dtype = b_O is not None, w_OK.dtype
        if b_O is None and trains_native(x_MK, w_OK):
            ctx.save_for_backward(x_MK, w_OK)
            return product(x_MK, w_OK, x_MK, x_MK.dtype, b_transposed=True)
        ctx.save_for_backward(x_MK, w_OK)  # as it is stored: a copy in the activations' dtype lives for one product
        y = to_compute_dtype(x_MK) @ to_compute_dtype(w_OK.to(x_MK.dtype)).t()
        if b_O is not None:
            y += b_O
        return y.to(x_MK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MO: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx = dw = db = None
        if not ctx.has_bias and trains_native(x, w):
            dy = dy_MO.to(x.dtype)
            if ctx.needs_input_grad[0]:
                dx = product(dy, w, x, x.dtype)
            if ctx.needs_input_grad[1]:
                dw = product(dy, x, x, ctx.w_dtype, a_transposed=True)
            return dx, dw, None
        dy = to_compute_dtype(dy_MO.to(x.dtype))
        if ctx.needs_input_grad[0]:
            dx = (dy @ to_compute_dtype(w.to(x.dtype))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (dy.t() @ to_compute_dtype(x)).to(ctx.w_dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = dy.sum(0).to(ctx.w_dtype)
        return dx, dw, db


def linear(x: Tensor, w_OK: Tensor, b_O: Tensor | None = None) -> Tensor:
    """x[..., K] -> [..., O] in the dtype of x: `torch.nn.functional.linear(x, w.to(x.dtype), b.to(x.dtype))`."""
    rows = x.numel() // x.shape[-1]
    trained = torch.is_grad_enabled() and (x.requires_grad or w_OK.requires_grad)
    if x.dtype == w_OK.dtype == torch.bfloat16 and 0 < rows <= FEW and CHOSEN and runs_native(w_OK) and not trained:
        y = plain_linear(x.reshape(rows, -1).float(), w_OK).view(*x.shape[:-1], len(w_OK))
        return (y if b_O is None else y + b_O).to(x.dtype)
    ours = trained and b_O is None and trains_native(x, w_OK)
    if x.dtype == w_OK.dtype and (x.dtype == torch.float32 or (fast_bf16(x.device.type) and not ours)):
        return torch.nn.functional.linear(x, w_OK, b_O)
    y = Linear.apply(x.reshape(-1, x.shape[-1]), w_OK, b_O)
    return y.view(*x.shape[:-1], w_OK.shape[0])
