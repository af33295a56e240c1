"""A decoder layer of a quantised model in one native call: what takes 25 operations from Python, ten microseconds each,
takes one. The operations themselves (ops/quantised.py) are the slow twin, and what runs where this cannot.

Shape letters: B batch, T tokens, H hidden, S positions, C cache width, K experts a token, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .native import address, fits, native, threads
from .quantised import ExpertTable


class Attention(NamedTuple):
    """csrc/quantised.h, `Mla`. sizes: hidden, heads, nope, rope, rank, value, q_rank (0: none). weights: q_a, q_b,
    kv_a, kv_b, o, packed. vectors: q_norm, kv_norm, q_a_bias, kv_a_bias, o_bias, float32. key: as FusedMLA has it."""

    sizes: tuple[int, ...]
    bits: int
    weights: tuple[Tensor | None, ...]
    vectors: tuple[Tensor | None, ...]
    q_eps: float
    kv_eps: float
    scale: float
    key: Tensor
    interleave: bool


class FeedForward(NamedTuple):
    """csrc/quantised.h, `Ffn`. gate: experts, groups, kept groups, top, group_best, sigmoid, normalise, scale anyway,
    scale (as `choose_experts`); all zero with `table` None for a dense layer, whose MLP is `shared`."""

    bits: int
    gate: tuple[Any, ...]
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    table: ExpertTable | None
    shared: Tensor | None
    shared_inner: int


class LayerBlock:
    """One layer as the native kernels see it; holds what it points to. `ready` is False where they cannot take it.

    A copy of a module starts without the original's.
    """

    def __init__(
        self, attention: Attention | None = None, ffn: FeedForward | None = None, attention_norm: Tensor | None = None,
        ffn_norm: Tensor | None = None, eps: float = 0.0,
    ) -> None:
        self.ready = False
        if attention is None or ffn is None or attention_norm is None or ffn_norm is None:
            return
        table: tuple[Tensor, ...] = ffn.table or ()
        vectors = [v for v in (*attention.vectors, attention_norm, ffn_norm, ffn.gate_bias) if v is not None]
        given = (*attention.weights, attention.key, ffn.gate_weight, ffn.shared, *table, *vectors)
        _, _, nope, _, rank, value, _ = attention.sizes
        self.ready = (
            nope % 16 == 0 and value % 16 == 0 and rank % 16 == 0
            and all(v.dtype == torch.float32 for v in vectors) and fits(*(v for v in given if v is not None)))
        if not self.ready:
            return
        addresses = None if ffn.table is None else ffn.table.addresses
        in_bf16 = ffn.gate_weight is not None and ffn.gate_weight.dtype == torch.bfloat16
        self.held = (given, addresses)
        self.experts, self.top = ffn.gate[0], ffn.gate[3]
        self.layer = native.Layer(
            native.Mla(attention.sizes, attention.bits, tuple(map(address, attention.weights)),
                       tuple(map(address, attention.vectors)), attention.q_eps, attention.kv_eps, attention.scale,
                       address(attention.key), attention.interleave),
            native.Ffn(0 if ffn.table is None else ffn.table.inner, ffn.shared_inner, ffn.bits, ffn.gate,
                       address(ffn.gate_weight), in_bf16, address(ffn.gate_bias), address(addresses),
                       address(ffn.shared)),
            address(attention_norm), address(ffn_norm), eps)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerBlock, ()

    def run(
        self, x_BTH: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, rows_BSC: Tensor, first_B: Tensor, past: int, naive: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """(output [B, T, H], (index, weight, scores) of the gate or None). Writes cache rows past … past + T - 1.

        rows_BSC: float32, rows of a sequence side by side; first_B: int64, as `latent_attention` takes it. naive: the
        order of attention.
        """
        batch, tokens, _ = x_BTH.shape
        assert rows_BSC.shape[1] >= past + tokens and rows_BSC.stride(2) == 1 and rows_BSC.dtype == torch.float32
        x, cos, sin = x_BTH.contiguous(), cos_BTP.contiguous(), sin_BTP.contiguous()
        out, n = torch.empty_like(x), batch * tokens
        route = None
        if self.experts:
            index_TK = torch.empty(n, self.top, dtype=torch.int64)
            route = (index_TK, x.new_empty(n, self.top), x.new_empty(n, self.experts))
        index, weight, scores = (0, 0, 0) if route is None else (t.data_ptr() for t in route)
        native.layer_forward(
            self.layer, x.data_ptr(), batch, tokens, cos.data_ptr(), sin.data_ptr(), cos.shape[0] > 1,
            rows_BSC.data_ptr(), rows_BSC.stride(0), first_B.data_ptr(), past, naive, scores, index, weight,
            out.data_ptr(), threads())
        return out, route
