"""The layout in which quantized matrices lie in files, in memory and under the kernels: panels of 16 output rows.

A matrix W [O, K] is cut into panels of 16 rows and, along K, into blocks of 64. Rows are padded to 16, columns to 64,
with weights of value zero. A panel is one contiguous range of bytes, a multiple of 64 long, and holds in this order:

    step     16 x float32            one a row
    scale    blocks x 16 x uint8     [block][row], padded with zeros to a multiple of 64 bytes (4 bits only)
    codes    4 bits: blocks x 8 x 16 x 4 bytes. Byte [b][g][r][j] holds row r, column 64 b + 8 g + j in its low half
             and column 64 b + 8 g + 4 + j in its high half.
             8 bits: blocks x 16 x 16 x 4 int8. Byte [b][g][r][j] is row r, column 64 b + 4 g + j.

    4 bits:  W[r, k] = step[r] * scale[k / 64][r] * LEVELS[code]
    8 bits:  W[r, k] = step[r] * code

LEVELS is the NF4 codebook (arXiv 2305.14314, appendix E) in units of 1/127, rounded to integers, so that a block's
products with int8 activations are exact integers. Sixteen rows by four columns of bytes are what one AVX-512 VNNI
instruction, or one row of an AMX tile, multiplies: the same bytes serve every instruction set (csrc/).

A gated MLP (an expert, the shared experts, a dense layer's FFN) is one range: the panels of gate and up in turns
(g0 u0 g1 u1 …), then those of down.

Shape letters: O output rows, K columns, b blocks of 64 columns, P panels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

Bits = int  # 4 or 8

ROWS = 16  # of a panel
BLOCK = 64  # columns that share a scale
# round(127 * level) of the NF4 codebook
LEVELS = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)
ZERO = LEVELS.index(0)


class Quantized(NamedTuple):
    """A quantized matrix, readable. code_OK: uint8 0..15 (4 bits) or int8; scale_Ob: uint8 (4 bits) or None; step_O."""

    code_OK: Tensor
    scale_Ob: Tensor | None
    step_O: Tensor

    @property
    def bits(self) -> Bits:
        return 8 if self.scale_Ob is None else 4

    def dequantize(self) -> Tensor:
        """[O, K] float32, by the formula at the top of this file."""
        if self.scale_Ob is None:
            return self.code_OK.float() * self.step_O.unsqueeze(1)
        table = torch.tensor(LEVELS, dtype=torch.float32, device=self.code_OK.device)
        levels = table.index_select(0, self.code_OK.int().flatten()).view_as(self.code_OK)  # faster than table[code]
        scale = (self.scale_Ob.float() * self.step_O.unsqueeze(1)).repeat_interleave(BLOCK, 1)
        return levels * scale[:, : levels.shape[1]]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def panel_bytes(columns: int, bits: Bits = 4) -> int:
    """Bytes of one panel of a matrix with `columns` columns. Raises ValueError for bits other than 4 and 8."""
    if bits not in (4, 8):
        raise ValueError(f"bits = {bits}: must be 4 or 8")
    blocks = -(-columns // BLOCK)
    return 64 + (_up(16 * blocks, 64) + 512 * blocks if bits == 4 else 1024 * blocks)


def matrix_bytes(rows: int, columns: int, bits: Bits = 4) -> int:
    return -(-rows // ROWS) * panel_bytes(columns, bits)


def mlp_bytes(hidden: int, inner: int, bits: Bits = 4) -> int:
    """Bytes of a gated MLP: gate and up [inner, hidden], down [hidden, inner]."""
    return 2 * matrix_bytes(inner, hidden, bits) + matrix_bytes(hidden, inner, bits)


def pack(q: Quantized) -> Tensor:
    """Pack a matrix into panels, uint8 [matrix_bytes]."""
    return _panels(q).flatten()


def _panels(q: Quantized) -> Tensor:
    """The panels of a matrix, uint8 [P, panel_bytes]."""
    rows, columns = q.code_OK.shape
    panels, blocks = -(-rows // ROWS), -(-columns // BLOCK)
    fill = ZERO if q.bits == 4 else 0
    code = q.code_OK.new_full((panels * ROWS, blocks * BLOCK), fill)
    code[:rows, :columns] = q.code_OK
    step = q.step_O.new_zeros(panels * ROWS, dtype=torch.float32)
    step[:rows] = q.step_O
    out = torch.zeros(panels, panel_bytes(columns, q.bits), dtype=torch.uint8, device=code.device)
    out[:, :64] = step.view(panels, ROWS).view(torch.uint8)
    if q.scale_Ob is None:
        tiles = code.view(panels, ROWS, blocks, 16, 4).permute(0, 2, 3, 1, 4)
        out[:, 64:] = tiles.reshape(panels, -1).view(torch.uint8)
        return out
    scale = q.scale_Ob.new_zeros(panels * ROWS, blocks)
    scale[:rows] = q.scale_Ob
    out[:, 64 : 64 + 16 * blocks] = scale.view(panels, ROWS, blocks).transpose(1, 2).reshape(panels, -1)
    low, high = code.view(panels, ROWS, blocks, 8, 2, 4).permute(4, 0, 2, 3, 1, 5).reshape(2, panels, -1)
    out[:, panel_bytes(columns) - 512 * blocks :] = low | high << 4
    return out


def unpack(packed: Tensor, rows: int, columns: int, bits: Bits = 4) -> Quantized:
    """Undo `pack`. Raises CheckpointError where their number does not fit the shape."""
    if packed.dtype != torch.uint8 or packed.numel() != (need := matrix_bytes(rows, columns, bits)):
        raise CheckpointError(f"a {bits}-bit matrix [{rows}, {columns}] is {matrix_bytes(rows, columns, bits)} bytes "
                              f"(uint8), got {packed.numel()} of {packed.dtype}")
    return _from_panels(packed.reshape(-1, need // -(-rows // ROWS)), rows, columns, bits)


def _from_panels(panel_P: Tensor, rows: int, columns: int, bits: Bits) -> Quantized:
    panels, blocks = len(panel_P), -(-columns // BLOCK)
    step_O = panel_P[:, :64].contiguous().view(torch.float32).flatten()[:rows]
    if bits == 8:
        code = panel_P[:, 64:].reshape(panels, blocks, 16, ROWS, 4).permute(0, 3, 1, 2, 4)
        return Quantized(code.reshape(panels * ROWS, -1)[:rows, :columns].view(torch.int8), None, step_O)
    scale = panel_P[:, 64 : 64 + 16 * blocks].reshape(panels, blocks, ROWS).transpose(1, 2).reshape(-1, blocks)
    both = panel_P[:, panel_bytes(columns) - 512 * blocks :].reshape(panels, blocks, 8, ROWS, 4)
    code = torch.stack((both & 15, both >> 4), 3).permute(0, 4, 1, 2, 3, 5)  # [P, ROWS, b, 8, 2, 4]
    return Quantized(code.reshape(panels * ROWS, -1)[:rows, :columns], scale[:rows], step_O)


def pack_mlp(gate: Quantized, up: Quantized, down: Quantized) -> Tensor:
    """A gated MLP as one range of bytes, uint8 [mlp_bytes]."""
    return torch.cat((torch.stack((_panels(gate), _panels(up)), 1).flatten(), pack(down)))


def unpack_mlp(packed: Tensor, hidden: int, inner: int, bits: Bits = 4) -> tuple[Quantized, Quantized, Quantized]:
    """(gate, up, down) of `pack_mlp`'s bytes; bytes after them (alignment) are ignored.

    Raises CheckpointError where there are too few.
    """
    if packed.dtype != torch.uint8 or packed.numel() < (need := mlp_bytes(hidden, inner, bits)):
        raise CheckpointError(f"a {bits}-bit MLP of hidden {hidden}, intermediate {inner} is "
                              f"{mlp_bytes(hidden, inner, bits)} bytes (uint8), got {packed.numel()} of {packed.dtype}")
    split = 2 * matrix_bytes(inner, hidden, bits)
    both = packed[:split].reshape(-1, 2, panel_bytes(hidden, bits))
    return (_from_panels(both[:, 0], inner, hidden, bits), _from_panels(both[:, 1], inner, hidden, bits),
            unpack(packed[split:need], hidden, inner, bits))
