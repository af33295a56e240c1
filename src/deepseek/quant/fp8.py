"""The official FP8 weight format of DeepSeek-V3.

A matrix W [O, I] is stored as float8_e4m3fn beside `weight_scale_inv` [ceil(O/128), ceil(I/128)] in FP32; despite its
name the scale is what the stored value is multiplied with:  W[o, i] = stored[o, i] * scale_inv[o // 128, i // 128].
(deepseek-ai/DeepSeek-V3, README_WEIGHTS.md and inference/fp8_cast_bf16.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError

BLOCK = 128
_LARGEST = 448.0  # of e4m3fn


def dequantize(stored_OI: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """FP8 blocks -> [O, I] in `dtype` (products in FP32). Raises CheckpointError where the scales do not fit."""
    if stored_OI.ndim != 2:
        raise CheckpointError(f"an FP8 weight must be a matrix, got shape {tuple(stored_OI.shape)}")
    rows, cols = stored_OI.shape
    want = (-(-rows // BLOCK), -(-cols // BLOCK))
    if tuple(scale_inv.shape) != want:
        got = tuple(scale_inv.shape)
        raise CheckpointError(f"weight_scale_inv must have shape {want} for a weight {(rows, cols)}, got {got}")
    scale = scale_inv.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    return (stored_OI.float() * scale).to(dtype)


def quantize(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """[O, I] -> (float8_e4m3fn [O, I], FP32 scales): each block is stretched so that its largest value becomes 448."""
    rows, cols = w_OI.shape
    padded = torch.nn.functional.pad(w_OI.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [ro, 128, co, 128]
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / _LARGEST
    stored = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :cols]
    return stored.to(torch.float8_e4m3fn), scale
