"""A dense model of Llama's kind as it is, run by V3's decoder with attention of its own: what a lossy form is made from
and its teacher, at no more memory than its own weights.

The keys of a head have the two numbers of each rotary pair side by side, as in the exact form (checkpoint/dense.py),
whose rotary angles and cache serve here too.

Shape letters: B batch, T tokens, S positions, H hidden, N heads, G key heads, D numbers of a head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..checkpoint.dense import DenseAsV3, DenseConfig
from ..checkpoint.files import Tensors
from ..config import ModelConfig
from ..convert.upcycling import open_dense
from ..model import CausalLM
from ..model.cache import PackedBatch
from ..model.decoder import DecoderLayer
from ..model.layers import Linear, Rotary
from ..model.mla import AttentionContext, causal_mask
from ..ops import causal_attention, rotate

PARTS = ("q", "k", "v", "o")


class GroupedAttention(nn.Module):
    """Attention in which some heads share keys and values, arXiv 2305.13245."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear

    def __init__(self, dense: DenseConfig) -> None:
        super().__init__()
        self.dense, self.config = dense, dense.to_v3()
        wide = dense.heads * dense.head_dim
        for part in PARTS:
            inputs, outputs = (wide, dense.hidden) if part == "o" else (
                dense.hidden, wide if part == "q" else dense.key_width)
            setattr(self, f"{part}_proj", Linear(inputs, outputs, bias=part in dense.biases))
        self.scale = dense.rotary_scale**2 / self.rotary_scale**2 / dense.head_dim**0.5

    @property
    def rotary_scale(self) -> float:
        """Of the exact form's cos and sin."""
        return self.config.longrope.rotary_scale if self.config.longrope else 1.0

    def heads(self, x_BTH: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, N, D], keys and values [B, T, G, D], the former two rotated."""
        pairs = self.dense.head_dim // 2
        cos, sin = context.cos[..., :pairs], context.sin[..., :pairs]
        q, k, v = (getattr(self, f"{part}_proj")(x_BTH).unflatten(-1, (-1, self.dense.head_dim)) for part in "qkv")
        return rotate(q, cos, sin, True), rotate(k, cos, sin, True), v

    def attend(self, q_BTND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None = None) -> Tensor:
        group = self.dense.heads // self.dense.key_heads
        k, v = (part.repeat_interleave(group, 2).transpose(1, 2) for part in (k_BSGD, v_BSGD))
        return causal_attention(q_BTND.transpose(1, 2), k, v, self.scale, mask).transpose(1, 2)

    def forward(self, x_BTH: Tensor, context: AttentionContext, layer: int) -> Tensor:
        q, k, v = self.heads(x_BTH, context)
        visible = context.visible
        if isinstance(visible, PackedBatch):
            rows = torch.cat((v.flatten(2), k.flatten(2)), -1)
            visible.write(layer, pad(rows, (0, self.config.latent_dim - rows.shape[-1]))[0])
            parts, width = [], self.dense.key_width
            for chunk, place, rows in visible.read(layer):
                shape = (len(rows), chunk.tokens)
                mask = causal_mask(chunk.tokens, chunk.past, rows.device) if chunk.past else None
                v, k = (part.unflatten(-1, (-1, self.dense.head_dim))
                        for part in rows[..., : 2 * width].to(x_BTH.dtype).split(width, -1))
                parts.append(self.attend(q[0, place].unflatten(0, shape), k, v, mask).flatten(0, 1))
            out = torch.cat(parts)
        else:
            out = self.attend(q, k, v, None if visible is None else visible.dense)
        return self.o_proj(out.reshape(*x_BTH.shape[:2], -1))


class DenseLayer(DecoderLayer):
    self_attn: GroupedAttention  # type: ignore[assignment]

    def __init__(self, config: ModelConfig, layer: int, dense: DenseConfig) -> None:
        super().__init__(config, layer)
        self.self_attn = GroupedAttention(dense)


class DenseSource:
    """A dense model's tensors, by layer or all together. source: as `upcycle` takes it."""

    def __init__(self, source: str | Path, context: int | None = None) -> None:
        self.files, keys, self.texts = open_dense(source)
        self.dense = DenseConfig.from_dict(keys, str(self.files.folder), context)
        self.exact = DenseAsV3(self.dense, self.files)

    def layer(self, number: int) -> DenseLayer:
        """A layer in float32."""
        with torch.device("meta"):
            layer = DenseLayer(self.exact.config, number, self.dense)
        self._fill(layer, f"model.layers.{number}.")
        return layer.requires_grad_(False).eval()

    def model(self) -> CausalLM:
        """All of it in float32."""
        model = CausalLM.on_meta(self.exact.config)
        model.model.layers = nn.ModuleList(self.layer(number) for number in range(self.dense.layers))
        self._fill(model.model.embed_tokens, "model.embed_tokens.")
        self._fill(model.model.norm, "model.norm.")
        if self.dense.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        else:
            self._fill(model.lm_head, "lm_head.")
        model.model.rotary = Rotary(model.config)
        return model.requires_grad_(False).eval()

    def _fill(self, module: nn.Module, stem: str) -> None:
        for name, tensor in module.state_dict().items():
            rows = read(self.files, stem + name)
            if name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                rows = rows.unflatten(0, (-1, 2, self.dense.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            module.get_submodule(name.rpartition(".")[0]).register_parameter(
                name.rpartition(".")[2], nn.Parameter(rows.contiguous(), requires_grad=False))
            assert rows.shape == tensor.shape


def read(files: Tensors, name: str) -> Tensor:
    """A tensor in float32."""
    return files.read_rows(name, 0, files.shape(name)[0], torch.float32)
