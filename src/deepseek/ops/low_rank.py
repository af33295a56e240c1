"""What adapters add to the product of one matrix, all of them in one call: y += sum_i w_i B_i A_i x, the weights w each
row's own.

A row's terms are summed adapter by adapter and rank by rank, whatever adapters other rows have: with the native kernels
a row's bits are the same in any company, on any instruction set and any number of threads.

Shape letters: T tokens, K columns, O rows of the matrix, R rank, N adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .native import native, runs_native, threads
from .registry import register_op


def add_low_rank_reference(
    y_TO: Tensor, x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], weight_TN: Tensor
) -> None:
    for i, (a_RK, b_RO) in enumerate(zip(a, b, strict=True)):
        rows = weight_TN[:, i].nonzero().squeeze(1)
        y_TO[rows] += (weight_TN[rows, i, None] * (x_TK[rows] @ a_RK.t())) @ b_RO


@register_op(lambda y_TO, x_TK, a, b, weight_TN: None, mutates=["y_TO"])
def add_low_rank(
    y_TO: Tensor, x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], weight_TN: Tensor
) -> None:
    """Add every adapter's term to y, in place. a: A [R, K] of each; b: its B turned round, [R, O]; weight: of each row
    and adapter, of which those of weight 0 play no part. All are float32."""
    checks.activations("x", x_TK, dense=False)
    (tokens, columns), rows = x_TK.shape, y_TO.shape[1]
    if y_TO.dtype != torch.float32 or len(y_TO) != tokens or weight_TN.shape != (tokens, len(a)) or len(b) != len(a):
        raise ValueError(f"y must be float32 [{tokens}, rows] and weight [{tokens}, {len(a)}] beside {len(b)} "
                         f"adapters, got {y_TO.dtype} {list(y_TO.shape)} and {list(weight_TN.shape)}")
    for a_RK, b_RO in zip(a, b, strict=True):
        if a_RK.shape[1:] != (columns,) or b_RO.shape != (len(a_RK), rows):
            raise ValueError(f"A and B must be [R, {columns}] and [R, {rows}], got {list(a_RK.shape)} and "
                             f"{list(b_RO.shape)}")
    if {weight_TN.dtype, *(t.dtype for t in (*a, *b))} != {torch.float32}:
        raise ValueError("A, B and weight must be float32")
    x_TK, weight_TN = x_TK.contiguous(), weight_TN.to(x_TK.device).contiguous()
    if runs_native(y_TO, x_TK, weight_TN, *a, *b):
        native.add_low_rank(x_TK.data_ptr(), tokens, columns, addresses([*zip(a, b, strict=True)]),
                            weight_TN.data_ptr(), rows, y_TO.data_ptr(), threads())
    else:
        add_low_rank_reference(y_TO, x_TK, a, b, weight_TN)


def addresses(adapters: Sequence[tuple[Tensor, Tensor] | None]) -> list[tuple[int, int, int]]:
    """A and B turned round of adapters where the kernels look for them; None: of one that has none here."""
    return [(0, 0, 0) if own is None else (own[0].data_ptr(), own[1].data_ptr(), len(own[0])) for own in adapters]
