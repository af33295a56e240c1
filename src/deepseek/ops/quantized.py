"""Products with quantized weights.

The arithmetic is one for all kernels and for the references here (csrc/kernels.h): activations become int8 with one
scale a row, products are summed exactly over blocks of 64 columns, blocks are added in FP32 in their order by fused
multiply-add. A token's result therefore does not depend on the tokens it is computed with, bit by bit; SiLU,
exponentials and normalisations differ between torch and csrc/ by FP32 rounding only.

Results are float32. None of these operations has a gradient.

Shape letters: T tokens, G groups (heads), K columns, O rows, H hidden, I intermediate, E experts, P panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from . import checks
from .native import address, native, runs_native, threads
from .panels import BLOCK, LEVELS, Bits, Quantized, matrix_bytes, mlp_bytes, unpack, unpack_mlp
from .registry import register_op

PLAIN_BITS = {torch.bfloat16: 16, torch.float32: 32}  # of weights that are not quantized


class ExpertTable(tuple[Tensor, ...]):
    """The packed MLPs of one layer's experts, checked once. Raises ValueError naming the expert that does not fit."""

    hidden: int
    inner: int
    bits: Bits
    fetch: tuple[Any, int] | None = None  # a native Residency and the layer's place in it, where addresses may be 0

    def __new__(cls, experts: Sequence[Tensor], hidden: int, inner: int, bits: Bits = 4) -> ExpertTable:
        table = super().__new__(cls, experts)
        table.hidden, table.inner, table.bits = hidden, inner, bits
        for e, packed in enumerate(table):
            checks.packed_bytes(f"expert {e}", packed, mlp_bytes(hidden, inner, bits))
        return table

    def __reduce__(self) -> tuple[type[ExpertTable], tuple[tuple[Tensor, ...], int, int, Bits]]:
        return ExpertTable, (tuple(self), self.hidden, self.inner, self.bits)

    @cached_property
    def addresses(self) -> Tensor:
        return torch.tensor([packed.data_ptr() for packed in self], dtype=torch.int64)


# ---- references -------------------------------------------------------------------------------------------------


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values as float32 [T, K padded to 64], scale [T]): scale = absmax / 127, round to nearest even. A row with
    a number that is not finite makes all its results NaN."""
    x = pad(x_TK.float(), (0, -x_TK.shape[-1] % BLOCK))
    peak_T = x.abs().amax(-1)
    inverse_T = torch.where(peak_T > 0, torch.tensor(127.0) / peak_T, 0.0)  # a number / a tensor rounds twice
    inverse_T = torch.where(inverse_T < 3e38, inverse_T, 0.0)
    return (x * inverse_T.unsqueeze(-1)).round(), peak_T / 127.0


def linear_reference(x_TK: Tensor, w: Quantized) -> Tensor:
    """x W^T in the arithmetic above, [T, O]; reference implementation, equal to the kernels bit by bit."""
    q_TK, scale_T = quantize_rows(x_TK)
    rows, columns = w.code_OK.shape
    if w.scale_Ob is None:
        acc_TO = (q_TK[:, :columns].double() @ w.code_OK.double().t()).float()
    else:
        levels = torch.tensor(LEVELS, dtype=torch.float32)[w.code_OK.long()]
        levels_ObK = pad(levels, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
        sums_bTO = torch.bmm(q_TK.unflatten(1, (-1, BLOCK)).transpose(0, 1), levels_ObK.permute(1, 2, 0))
        acc_TO = sums_bTO.new_zeros(sums_bTO.shape[1:])
        for b, sums_TO in enumerate(sums_bTO):  # all integers: float64 holds product and sum, one rounding is an fma
            acc_TO = (acc_TO.double() + sums_TO.double() * w.scale_Ob[:, b].double()).float()
    return acc_TO * (w.step_O * scale_T.unsqueeze(1))


def mlp_reference(x_TH: Tensor, packed: Tensor, inner: int, bits: Bits) -> Tensor:
    gate, up, down = unpack_mlp(packed, x_TH.shape[1], inner, bits)
    return linear_reference(silu(linear_reference(x_TH, gate)) * linear_reference(x_TH, up), down)


def experts_reference(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, table: ExpertTable, shared: Tensor | None, shared_inner: int
) -> Tensor:
    y_TKH = x_TH.new_zeros(*index_TK.shape, x_TH.shape[1])
    for e in index_TK.unique().tolist():
        token, slot = (index_TK == e).nonzero(as_tuple=True)
        y_TKH[token, slot] = mlp_reference(x_TH[token], table[e], table.inner, table.bits)
    out_TH = torch.zeros_like(x_TH) if shared is None else mlp_reference(x_TH, shared, shared_inner, table.bits)
    for k in range(index_TK.shape[1]):
        out_TH = torch.addcmul(out_TH, weight_TK[:, k : k + 1], y_TKH[:, k])
    return out_TH


# ---- operations -------------------------------------------------------------------------------------------------


@register_op(lambda x, packed, rows, bias=None, *, bits=4: x.new_empty(*x.shape[:-1], rows))
def quantized_linear(
    x: Tensor, packed: Tensor, rows: int, bias: Tensor | None = None, *, bits: int = 4
) -> Tensor:
    """x[..., K] -> [..., rows]: x W^T + bias; packed: W in panels (ops/panels.py)."""
    x_TK = checks.activations("x", x).reshape(-1, x.shape[-1])
    tokens, columns = x_TK.shape
    checks.packed_bytes("packed", packed, matrix_bytes(rows, columns, bits))
    if runs_native(x_TK, packed):
        out = x_TK.new_empty(tokens, rows)
        native.quantized_linear(x_TK.data_ptr(), tokens, columns, packed.data_ptr(), rows, bits, out.data_ptr(),
                                threads())
    else:
        out = linear_reference(x_TK, unpack(packed, rows, columns, bits))
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], rows)


@register_op(lambda x_TH, packed, inner, *, bits=4: x_TH.new_empty(x_TH.shape))
def quantized_mlp(x_TH: Tensor, packed: Tensor, inner: int, *, bits: int = 4) -> Tensor:
    """down(silu(gate x) * up x) from one packed range, [T, H]."""
    x_TH = checks.activations("x", x_TH)
    tokens, hidden = x_TH.shape
    checks.packed_bytes("packed", packed, mlp_bytes(hidden, inner, bits))
    if not runs_native(x_TH, packed):
        return mlp_reference(x_TH, packed, inner, bits)
    out = torch.empty_like(x_TH)
    native.quantized_experts(x_TH.data_ptr(), tokens, hidden, 0, 0, 0, 0, 0, inner, packed.data_ptr(), inner, bits,
                             out.data_ptr(), threads())
    return out


@register_op(lambda x_TH, index_TK, weight_TK, experts, inner, shared=None, shared_inner=0, *, bits=4: (
    x_TH.new_empty(x_TH.shape)))
def quantized_experts(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: Sequence[Tensor], inner: int,
    shared: Tensor | None = None, shared_inner: int = 0, *, bits: int = 4
) -> Tensor:
    """Weighted sum over each token's experts, plus the shared experts where given, [T, H].

    index_TK: int64, 0..E-1. experts: one packed MLP each; an ExpertTable of them saves checking them every time.
    """
    x_TH = checks.activations("x", x_TH)
    tokens, hidden = x_TH.shape
    table = experts if isinstance(experts, ExpertTable) else ExpertTable(experts, hidden, inner, bits)
    if (table.hidden, table.inner, table.bits) != (hidden, inner, bits):
        raise ValueError(f"experts are for hidden, intermediate, bits {(table.hidden, table.inner, table.bits)}, "
                         f"asked for {(hidden, inner, bits)}")
    if index_TK.dtype != torch.int64 or index_TK.shape != weight_TK.shape or len(index_TK) != tokens:
        raise ValueError(f"index must be int64 [{tokens}, K] beside weight of the same shape, got "
                         f"{index_TK.dtype} {list(index_TK.shape)} and {list(weight_TK.shape)}")
    if index_TK.numel():
        low, high = (int(v) for v in index_TK.aminmax())
        if low < 0 or high >= len(table):
            raise ValueError(f"index holds {low if low < 0 else high}: must lie in 0..{len(table) - 1}")
    weight_TK = weight_TK.float()
    if shared is not None:
        checks.packed_bytes("shared", shared, mlp_bytes(hidden, shared_inner, bits))
    index_TK, weight_TK = index_TK.contiguous(), weight_TK.contiguous()
    if not runs_native(x_TH, *table[:1]):
        return experts_reference(x_TH, index_TK, weight_TK, table, shared, shared_inner)
    out = torch.empty_like(x_TH)
    native.quantized_experts(
        x_TH.data_ptr(), tokens, hidden, index_TK.data_ptr(), weight_TK.data_ptr(), index_TK.shape[1],
        table.addresses.data_ptr(), len(table), inner, address(shared),
        shared_inner, bits, out.data_ptr(), threads(), *(table.fetch or ()))
    return out


@register_op(lambda x_TGK, packed, offset, stride, rows, *, bits=4: x_TGK.new_empty(*x_TGK.shape[:2], rows))
def grouped_quantized_linear(
    x_TGK: Tensor, packed: Tensor, offset: int, stride: int, rows: int, *, bits: int = 4
) -> Tensor:
    """[T, G, rows]: group g of x times the `rows` rows whose panels begin `offset + g * stride` bytes into packed.

    MLA's value half of kv_b_proj, head by head, without copying it out. x may be a slice of wider rows.
    """
    checks.activations("x", x_TGK, dense=False)
    tokens, groups, columns = x_TGK.shape
    if offset < 0 or stride < 0 or offset % 64 or stride % 64:
        raise ValueError(f"offset and stride must be multiples of 64 bytes, got {offset} and {stride}")
    checks.packed_bytes("packed", packed, offset + (groups - 1) * stride + matrix_bytes(rows, columns, bits))
    if not runs_native(packed) or x_TGK.stride(2) != 1:
        parts = (packed.flatten()[offset + g * stride :][: matrix_bytes(rows, columns, bits)] for g in range(groups))
        return torch.stack([linear_reference(x_TGK[:, g], unpack(part, rows, columns, bits))
                            for g, part in enumerate(parts)], 1)
    out = x_TGK.new_empty(tokens, groups, rows)
    native.quantized_groups(x_TGK.data_ptr(), tokens, groups, columns, x_TGK.stride(0), x_TGK.stride(1),
                            packed.data_ptr() + offset, stride, rows, bits, out.data_ptr(), threads())
    return out


@register_op(lambda x_TK, w_OK: x_TK.new_empty(len(x_TK), len(w_OK)))
def plain_linear(x_TK: Tensor, w_OK: Tensor) -> Tensor:
    """[T, O] in float32: x times a BF16 or FP32 matrix; products and sums in FP32. For few tokens: it reads the matrix
    where it lies, at the rate of the memory."""
    x_TK = checks.activations("x", x_TK)
    (tokens, columns), rows = x_TK.shape, len(w_OK)
    if w_OK.shape != (rows, columns) or w_OK.dtype not in PLAIN_BITS:
        raise ValueError(f"weights must be [rows, {columns}], bfloat16 or float32, got {w_OK.dtype} "
                         f"{list(w_OK.shape)}")
    if not runs_native(x_TK, w_OK):
        return x_TK @ w_OK.float().t()
    out = x_TK.new_empty(tokens, rows)
    native.plain_linear(x_TK.data_ptr(), tokens, columns, w_OK.data_ptr(), PLAIN_BITS[w_OK.dtype], rows,
                        out.data_ptr(), threads())
    return out
