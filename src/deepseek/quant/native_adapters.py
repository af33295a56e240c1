"""Adapters as the native kernels take them: LoRA on the products around attention, and on kv_b_proj inside it.

Shape letters: T tokens, N heads, R latent rank, K columns, O rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..config import ModelConfig
from ..model.adapter_paths import LowRank
from ..model.adapters import Adapted, Member, Share
from ..model.decoder import DecoderLayer
from ..ops.native import runs_native
from ..ops.native_layers import LayerStack, adapters_of
from ..ops.panels import ROWS
from .pack import quantize_panels

PASSES = 64  # of different adapters, of which a stack keeps where their matrices lie


def layer_adapters(stack: LayerStack, layers: Sequence[DecoderLayer], members: tuple[Member, ...]) -> Any:
    """A pass's adapters, native; None where the layers cannot run with them: they know LoRA on attention, without
    kv_b_proj."""
    if members not in stack.adapters:
        if len(stack.adapters) >= PASSES:
            stack.adapters.clear()
        stack.adapters[members] = _found(layers, members)
    return stack.adapters[members]


def _found(layers: Sequence[DecoderLayer], members: tuple[Member, ...]) -> Any:
    products: list[list[Any]] = []
    for mla in (layer.self_attn for layer in layers):
        queries = [None, mla.q_proj] if mla.config.q_lora_rank is None else [mla.q_a_proj, mla.q_b_proj]
        products.append([*queries, mla.kv_a_proj_with_mqa, mla.o_proj])
    others = {module for layer in layers for module in layer.modules() if isinstance(module, Adapted)}
    others -= {module for own in products for module in own}
    if any(not isinstance(member, str) or any(member in module.names for module in others) for member in members):
        return None

    def matrices(module: Any, member: Member) -> tuple[Tensor, Tensor] | None:
        path = module.path(member) if isinstance(module, Adapted) else None
        return None if path is None else (path.a, path.b)

    found = [[[matrices(module, member) for member in members] for module in own] for own in products]
    every = [matrix for layer in found for product in layer for pair in product for matrix in pair or ()]
    known = runs_native(*every) and all(matrix.dtype == torch.float32 for matrix in every)
    return adapters_of(found) if known else None


class AbsorbedLora:
    """LoRA on kv_b_proj, s B A, in absorbed attention: what it adds to queries and to values. B is in 8 bits by
    head, as W_key is there; r is the rank, padded to whole panels."""

    def __init__(self, path: LowRank, config: ModelConfig) -> None:
        a_rR, b_Or = path.matrices()
        a_rR, b_Or = pad(a_rR, (0, 0, 0, -path.rank % ROWS)), pad(b_Or, (0, -path.rank % ROWS))
        key_NDr, value_NWr = b_Or.view(config.num_attention_heads, -1, len(a_rR)).split(
            (config.qk_nope_head_dim, config.v_head_dim), 1)
        self.key = by_head(key_NDr.transpose(1, 2)) if config.qk_nope_head_dim else None
        self.value = by_head(value_NWr)
        self.down, self.up = a_rR, a_rR.t().contiguous()
        self.rank, self.width = a_rR.shape[0], config.v_head_dim

    def queries(self, q_TND: Tensor) -> Tensor:
        assert self.key is not None
        q_TNr = ops.grouped_quantized_linear(q_TND, self.key, 0, self.key.shape[1], self.rank, bits=8)
        out = ops.plain_linear(q_TNr.flatten(0, 1), self.up)
        return out.view(*q_TNr.shape[:2], -1)

    def values(self, latent_TNR: Tensor) -> Tensor:
        latent_TNr = ops.plain_linear(latent_TNR.flatten(0, 1), self.down).view(*latent_TNR.shape[:2], -1)
        return ops.grouped_quantized_linear(latent_TNr, self.value, 0, self.value.shape[1], self.width, bits=8)


AbsorbedLoras = Sequence[tuple[AbsorbedLora, Share]]


def by_head(w_NOK: Tensor) -> Tensor:
    """Each head's matrix in 8 bits, uint8 [N, bytes of one]."""
    return torch.stack([quantize_panels(w_OK.contiguous(), 8)[0].flatten() for w_OK in w_NOK])
