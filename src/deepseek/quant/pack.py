"""Packs matrices into quantized panels, with the native kernels or else the codecs of this folder.

The codes are the same; a block's fitted scale may differ in its last bit, because FP32 sums run in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.native import native, runs_native, threads
from ..ops.panels import Bits, pack, panel_bytes
from . import int8, nf4


def quantize_panels(w_OK: Tensor, bits: Bits) -> tuple[Tensor, float, float]:
    """(uint8 [ceil(O / 16), panel_bytes], squared error, squared weights) of a finite matrix in float32."""
    rows, columns = w_OK.shape
    if w_OK.dtype == torch.float32 and runs_native(w_OK):
        packed = torch.zeros(-(-rows // 16), panel_bytes(columns, bits), dtype=torch.uint8)
        return packed, *native.quantize_panels(w_OK.data_ptr(), rows, columns, bits, packed.data_ptr(), threads())
    q = (nf4 if bits == 4 else int8).quantize(w_OK)
    return pack(q).view(-1, panel_bytes(columns, bits)), squared(w_OK - q.dequantize()), squared(w_OK)


def squared(w: Tensor) -> float:
    return float(torch.linalg.vector_norm(w, dtype=torch.float64)) ** 2
