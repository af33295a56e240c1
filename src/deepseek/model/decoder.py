"""Decoder layers, and what runs them.

    x + mla(norm(x)), then x + ffn(norm(x));   ffn: dense for the first layers, then gate + experts

Shape letters: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .cache import BatchCache, PackedBatch
from .experts import MoE
from .gate import Route
from .layers import MLP, RMSNorm, Rotary
from .mla import MLA, AttentionContext
from .mtp import MTPInput, SharedHead


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTH: Tensor, context: AttentionContext, attention: Callable[..., Tensor] | None = None,
                gate: Callable[[Tensor], Route] | None = None) -> tuple[Tensor, Route | None]:
        """attention, gate: replace the layer's own."""
        attend = self.self_attn if attention is None else attention
        x = x_BTH + attend(self.input_layernorm(x_BTH), context, self.layer)
        normed = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return x + self.mlp(normed), None
        control = context.visible.control if isinstance(context.visible, PackedBatch) else None
        y, route = self.mlp(normed, None if control is None else partial(control, self.layer), gate)
        return x + y, route


class MTPLayer(DecoderLayer):
    """A decoder layer with the MTP module's input and head around it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.input = MTPInput(config)
        self.shared_head = SharedHead(config)


class Decoder(nn.Module):
    """Everything but the head; named `model` inside `CausalLM`, as the published weights are."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        table_VH = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table_VH, freeze=False)
        if not table_VH.is_meta:  # to draw there makes torch import its compiler, which costs every command seconds
            self.embed_tokens.reset_parameters()
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mtp = nn.ModuleList(
            MTPLayer(config, config.num_hidden_layers + i) for i in range(config.num_nextn_predict_layers))
        self.rotary = Rotary(config)


@dataclass
class RoutingRecord:
    """Pass one as `routing=` to keep what the gates decided: layer -> Route over the B*T tokens of the call."""

    routes: dict[int, Route] = field(default_factory=dict)


def run_layers(run: Callable[[DecoderLayer, Tensor, AttentionContext], tuple[Tensor, Route | None]],
               layers: Sequence[DecoderLayer], x: Tensor, context: AttentionContext, routing: RoutingRecord | None,
               ) -> Tensor:
    for layer in layers:
        x, route = run(layer, x, context)
        if routing is not None and route is not None:
            routing.routes[layer.layer] = route
    return x


class LayerRunner(Protocol):
    """Runs decoder layers over a PackedBatch as `run_layers` does, beside the modules, which stay as they are."""

    def __call__(self, layers: Sequence[DecoderLayer], x_BTH: Tensor, context: AttentionContext,
                 routing: RoutingRecord | None) -> Tensor: ...

    def scratch(self, x_BTH: Tensor) -> BatchCache:
        """A cache for a call that keeps none."""
