"""Multi-head latent attention (MLA), arXiv 2405.04434 section 2.1; DeepSeek-V3 keeps it unchanged.

    c   = RMSNorm(x W_kv_a)[:R]      the latent: all that is cached, beside
    k_r = rope(x W_kv_a)[R:]         one rotary key shared by all heads
    k_n, v = c W_kv_b                per head, rebuilt from the latent
    score(i, j) = (q_n(i) . k_n(j) + q_r(i) . k_r(j)) * scale

attn_impl: two ways to compute the same products.

    naive      rebuild k_n and v of every position, then ordinary attention. Training and prefill: many queries share
               the rebuilt keys.
    absorbed   q_n W_kv_b^T first (R wide), score against the latent itself, sum latents, then W_kv_b once. Decoding:
               reads R + rope numbers a position instead of N * (nope + value).

Shape letters: B batch, T new tokens, S cached positions (T included), N heads, R latent rank, D = nope + rope.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops import causal_attention, rotate
from ..ops.linear import mm
from .adapter import LoRALinear
from .adapter_paths import LowRank
from .adapters import Adapter, bare, of_all_rows, path_of
from .cache import Impl, PackedBatch
from .layers import Linear, RMSNorm

AttnImpl = Impl | Literal["auto"]


class AttentionMask:
    """Which positions each query of a batch may look at: the real tokens up to its own position. real_BT: False for
    padding."""

    def __init__(self, real_BT: Tensor) -> None:
        self.real_BT = real_BT

    @cached_property
    def dense(self) -> Tensor:
        """Boolean [B, 1, T, T], True where a query may look."""
        return causal_mask(self.real_BT.shape[1], 0, self.real_BT.device) & self.real_BT[:, None, None, :]


def causal_mask(tokens: int, past: int, device: torch.device) -> Tensor:
    """Boolean [1, 1, T, past + T]: True up to each query's own position."""
    return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril_(past)[None, None]


class AttentionContext(NamedTuple):
    """What the attention of one call needs beside hidden states; the same for every layer.

    cos, sin: rotary angles, [B or 1, T, rope / 2]. visible: a PackedBatch for chunks of sequences side by side, as one
    row of the batch, each with its attn_impl; without a cache a mask, None where nothing is padding, and attn_impl.
    """

    cos: Tensor
    sin: Tensor
    visible: AttentionMask | PackedBatch | None = None
    attn_impl: Impl = "naive"


class MLA(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, config.latent_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = Linear(heads * config.v_head_dim, hidden, bias=bias)

    def forward(self, x_BTH: Tensor, context: AttentionContext, layer: int) -> Tensor:
        config, visible, cos, sin = self.config, context.visible, context.cos, context.sin
        q_nope, q_rope = self.queries(x_BTH).split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        q_rope = rotate(q_rope, cos, sin, config.rope_interleave)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTH).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin, config.rope_interleave).squeeze(2)
        rows = torch.cat((self.kv_a_layernorm(latent), k_rope), -1)
        if isinstance(visible, PackedBatch):
            visible.write(layer, rows[0])
            parts = []
            for chunk, place, rows in visible.read(layer):
                shape = (len(rows), chunk.tokens)
                mask = causal_mask(chunk.tokens, chunk.past, rows.device) if chunk.past else None
                out = self._attend(q_nope[0, place].unflatten(0, shape), q_rope[0, place].unflatten(0, shape),
                                   rows.to(q_nope.dtype), chunk.attn_impl, mask, chunk.adapter)
                parts.append(out.flatten(0, 1))
            out_BTNW = torch.cat(parts)
        else:
            out_BTNW = self._attend(q_nope, q_rope, rows, context.attn_impl, None if visible is None else visible.dense,
                                    of_all_rows())
        return self.o_proj(out_BTNW.reshape(*x_BTH.shape[:2], -1))

    def queries(self, x_BTH: Tensor) -> Tensor:
        """Every head's query before rotation, [B, T, N, D]."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_BTH)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTH)))
        return q.unflatten(-1, (-1, self.config.qk_head_dim))

    def _attend(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, attn_impl: str, mask: Tensor | None,
                adapter: Adapter | None) -> Tensor:
        """rows: latents and rotary keys of all positions, [B, S, R + rope]. adapter: whose they are."""
        latent, k_rope = rows.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        # LoRA on kv_b_proj is a call, not a matrix that could be absorbed
        naive = attn_impl == "naive" or isinstance(self.kv_b_proj, LoRALinear)
        attend = self._naive if naive else self._absorbed
        return attend(q_nope, q_rope, latent, k_rope, mask, path_of(self.kv_b_proj, adapter))

    def _naive(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None,
               side: LowRank | None) -> Tensor:
        config = self.config
        batch, length, _ = latent.shape
        kv = bare(self.kv_b_proj)(latent)  # over positions, not over the rows of the pass
        if side is not None:
            kv = kv + side(latent.flatten(0, 1)).view(batch, length, -1)
        kv = kv.view(batch, length, config.num_attention_heads, -1)
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), -1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, config.num_attention_heads, -1)
        q = torch.cat((q_nope, q_rope), -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        return causal_attention(q, k, v.transpose(1, 2), config.softmax_scale, mask).transpose(1, 2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None,
                  side: LowRank | None) -> Tensor:
        config = self.config
        w_NDR = self.kv_b_proj.weight.to(latent.dtype).view(config.num_attention_heads, -1, config.kv_lora_rank)
        w_key, w_value = w_NDR.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        q_latent = mm(q_nope.transpose(1, 2), w_key)  # [B, N, T, R]
        a_rR = b_value = None
        if side is not None:
            a_rR, b_Or = (part.to(latent.dtype) for part in side.matrices())
            b_key, b_value = b_Or.view(config.num_attention_heads, -1, side.rank).split(
                (config.qk_nope_head_dim, config.v_head_dim), 1)
            q_latent = q_latent + mm(mm(q_nope.transpose(1, 2), b_key), a_rR)
        latent, k_rope = latent.unsqueeze(1), k_rope.unsqueeze(1)  # one head, shared by all
        scores = mm(q_latent, latent.transpose(-1, -2)).float()
        scores = (scores + mm(q_rope.transpose(1, 2), k_rope.transpose(-1, -2)).float()) * config.softmax_scale
        tokens, length = scores.shape[-2:]
        if mask is None:
            mask = torch.ones(tokens, length, dtype=torch.bool, device=scores.device).tril_(length - tokens)
        probs = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).to(latent.dtype)
        sum_BNTR = mm(probs, latent)
        out = mm(sum_BNTR, w_value.transpose(1, 2))
        if a_rR is not None and b_value is not None:
            out = out + mm(mm(sum_BNTR, a_rR.t()), b_value.transpose(1, 2))
        return out.transpose(1, 2)  # [B, T, N, W]
