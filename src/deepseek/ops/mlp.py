"""SwiGLU: silu(gate) * up, with its gradient, in one pass each where the native kernels run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from .native import dtype_code, native, runs_native, threads, trains_native


class _NativeSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        h = torch.empty_like(gate)
        native.swiglu_forward(gate.data_ptr(), up.data_ptr(), dtype_code(gate), gate.numel(), h.data_ptr(), threads())
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up, dh = torch.empty_like(gate), torch.empty_like(up), dh.contiguous()
        native.swiglu_backward(dh.data_ptr(), gate.data_ptr(), up.data_ptr(), dtype_code(gate), gate.numel(),
                               d_gate.data_ptr(), d_up.data_ptr(), threads())
        return d_gate, d_up


def swiglu_rows(gate_PI: Tensor, up_PI: Tensor) -> Tensor:
    """The same for inference: with the native kernels a number's bits do not depend on where it lies."""
    if gate_PI.dtype == up_PI.dtype == torch.float32 and runs_native(gate_PI, up_PI):
        return _NativeSwiGLU.apply(gate_PI, up_PI)
    return silu(gate_PI) * up_PI


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element, in their dtype."""
    if trains_native(gate, up) and runs_native(gate, up) and gate.dtype == up.dtype:
        return _NativeSwiGLU.apply(gate, up)
    return silu(gate) * up
