"""Whole blocks of a quantised model in one native call: what costs 20 operations from Python, 10 microseconds each,
costs one. The operations themselves (ops/quantised.py) are the slow twin, and what runs where a block cannot.

Shape letters: B batch, T tokens, H hidden, S positions, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .native import fits, native, threads
from .quantised import ExpertTable


class Block:
    """A native description of a module, made at its first use from `make() -> (native object, tensors it points to)`.

    A module drops it when its tensors may have moved; copies of a module start without one.
    """

    def __init__(self, make: Callable[[], tuple[Any, tuple[Any, ...]]] | None = None) -> None:
        self.native: Any
        self.held: tuple[Any, ...]
        self.native, self.held = make() if make is not None else (None, ())

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return Block, ()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def mla_block(
    sizes: tuple[int, ...], bits: int, weights: tuple[Tensor | None, ...], vectors: tuple[Tensor | None, ...],
    q_eps: float, kv_eps: float, scale: float, key_NPK16: Tensor, interleave: bool
) -> Block | None:
    """csrc/quantised.h, `Mla`; None where the native kernels cannot take it.

    sizes: hidden, heads, nope, rope, rank, value, q_rank (0: none). weights: q_a, q_b, kv_a, kv_b, o, packed. vectors:
    q_norm, kv_norm, q_a_bias, kv_a_bias, o_bias, float32.
    """
    _, _, nope, _, rank, value, _ = sizes
    given = [v for v in (*weights, *vectors, key_NPK16) if v is not None]
    whole = nope % 16 == 0 and value % 16 == 0 and rank % 16 == 0 and key_NPK16.dtype == torch.bfloat16
    if not whole or not fits(*given) or any(v.dtype != torch.float32 for v in vectors if v is not None):
        return None
    return Block(lambda: (native.Mla(
        sizes, bits, tuple(map(address, weights)), tuple(map(address, vectors)), q_eps, kv_eps, scale,
        address(key_NPK16), interleave), tuple(given)))


def run_mla(
    block: Block, x_BTH: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, rows_BSC: Tensor, first_B: Tensor, past: int
) -> Tensor:
    """The block's output, [B, T, H]; writes cache rows past … past + T - 1. rows_BSC: float32, rows of a sequence side
    by side; first_B: int64, as `latent_attention` takes it."""
    batch, tokens, _ = x_BTH.shape
    assert rows_BSC.shape[1] >= past + tokens and rows_BSC.stride(2) == 1 and rows_BSC.dtype == torch.float32
    x, cos, sin = x_BTH.contiguous(), cos_BTP.contiguous(), sin_BTP.contiguous()
    out = torch.empty_like(x)
    native.mla_forward(block.native, x.data_ptr(), batch, tokens, cos.data_ptr(), sin.data_ptr(), cos.shape[0] > 1,
                       rows_BSC.data_ptr(), rows_BSC.stride(0), first_B.data_ptr(), past, out.data_ptr(), threads())
    return out


def moe_block(
    gate: tuple[Any, ...], gate_weight: Tensor, gate_bias: Tensor | None, table: ExpertTable, shared: Tensor | None,
    shared_inner: int
) -> Block | None:
    """csrc/quantised.h, `Moe`; None where the native kernels cannot take it.

    gate: experts, groups, kept groups, top, group_best, sigmoid, normalise, scale anyway, scale (`choose_experts`).
    gate_weight: `pack_panels` of it.
    """
    given = [v for v in (gate_weight, gate_bias, shared, *table) if v is not None]
    if not fits(*given) or (gate_bias is not None and gate_bias.dtype != torch.float32):
        return None
    addresses = table.addresses
    return Block(lambda: (native.Moe(
        table.hidden, table.inner, shared_inner, table.bits, gate, address(gate_weight),
        gate_weight.dtype == torch.bfloat16, address(gate_bias), address(addresses), address(shared)),
        (*given, addresses)))


def run_moe(block: Block, x_TH: Tensor, experts: int, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output [T, H], index [T, K] int64, weight [T, K], scores [T, E])."""
    x, tokens = x_TH.contiguous(), len(x_TH)
    out, scores_TE = torch.empty_like(x), x.new_empty(tokens, experts)
    index_TK, weight_TK = torch.empty(tokens, top, dtype=torch.int64), x.new_empty(tokens, top)
    native.moe_forward(block.native, x.data_ptr(), tokens, scores_TE.data_ptr(), index_TK.data_ptr(),
                       weight_TK.data_ptr(), out.data_ptr(), threads())
    return out, index_TK, weight_TK, scores_TE
