"""The sparse FFN of a layer: gate, routed experts, shared experts.

Routed experts are two tensors, gate_up_proj [E, 2I, H] and down_proj [E, H, I], as transformers keeps them in memory;
on disk every expert has its own names (checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..config import ModelConfig
from .gate import Gate, Route
from .layers import MLP


class RoutedExperts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up_proj [2I, H] and down_proj [H, I] of one expert; views."""
        return self.gate_up_proj[expert], self.down_proj[expert]

    def gate_up(self, expert: int, x_PH: Tensor) -> tuple[Tensor, Tensor]:
        """gate(x) and up(x) of one expert, [P, I]."""
        gate, up = ops.linear(x_PH, self.gate_up_proj[expert]).chunk(2, 1)
        return gate, up

    def down(self, expert: int, h_PI: Tensor) -> Tensor:
        """down(h) of one expert, [P, H]."""
        return ops.linear(h_PI, self.down_proj[expert])

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        return ops.expert_mlp(x_TH, route.index_TK, route.weight_TK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = RoutedExperts(config)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_BTH: Tensor, control: Callable[[Route], Route] | None = None,
                gate: Callable[[Tensor], Route] | None = None) -> tuple[Tensor, Route]:
        """control: changes what the gate decides. gate: decides in its place, [T, H] -> Route."""
        x_TH = x_BTH.flatten(0, -2)
        route = (self.gate if gate is None else gate)(x_TH)
        if control is not None:
            route = control(route)
        out = self.experts(x_TH, route)
        if hasattr(self, "shared_experts"):
            out = out + self.shared_experts(x_TH)
        return out.view(x_BTH.shape), route
