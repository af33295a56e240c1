"""Checks of operations' arguments, made before a native kernel gets a pointer."""

from __future__ import annotations

import torch
from torch import Tensor


def activations(name: str, x: Tensor, *, dense: bool = True) -> Tensor:
    """Check that x is float32 without a gradient, and make it contiguous if `dense`. Raises ValueError."""
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient and quantized products have none: use torch.no_grad()")
    return x.contiguous() if dense else x


def packed_bytes(name: str, packed: Tensor, need: int) -> None:
    """Raises ValueError unless there are at least `need` bytes as the kernels read them."""
    if packed.dtype != torch.uint8 or packed.numel() < need or not packed.is_contiguous():
        raise ValueError(f"{name} must be {need} contiguous bytes (uint8), got {packed.numel()} of {packed.dtype}")
    if packed.device.type == "cpu" and packed.data_ptr() % 64:
        raise ValueError(f"{name} must begin at a multiple of 64 bytes, begins {packed.data_ptr() % 64} after one")
