"""The small pieces: Linear, RMSNorm, SwiGLU MLP, rotary embedding.

Shape letters: B batch, T tokens, H hidden, N heads, P = rotary width / 2 (pairs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..config import LongRope, ModelConfig, YarnScaling


class Linear(nn.Linear):
    """nn.Linear through `ops.linear`: a half-precision product uses FP32 units where there are no others."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """arXiv 1910.07467; statistics in FP32, output in the dtype of the input."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense layers' FFN and the shared experts (all of them as one wide MLP)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotary pair of a model, [P] float32."""
    return inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.yarn or config.longrope)


def inverse_frequencies(width: int, base: float, scaling: YarnScaling | LongRope | None) -> Tensor:
    """Angle per position of each of width / 2 rotary pairs, [P] float32. LongRoPE divides each by a factor of its own;
    under YaRN (arXiv 2309.00071, section 3.2) high frequencies are kept, low ones divided by `factor`, with a linear
    ramp between the pairs that turn beta_fast and beta_slow times over the original context."""
    # real numbers also while a model is built on the meta device (see Decoder)
    pair_P = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    inv_P = 1.0 / (base ** (2 * pair_P / width))
    if scaling is None:
        return inv_P
    if isinstance(scaling, LongRope):
        return 1.0 / (torch.tensor(scaling.factors, device="cpu") * base ** (2 * pair_P / width))
    original = scaling.original_max_position_embeddings

    def pair_of(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp_P = (pair_P - low) / ((high - low) or 0.001)
    stretch_P = ramp_P.clamp(0, 1)
    return inv_P / scaling.factor * stretch_P + inv_P * (1 - stretch_P)


class Rotary(nn.Module):
    """cos and sin of the rotary angles at given positions, FP32 [B, T, P], scaled as YaRN or LongRoPE asks."""

    inv_P: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("inv_P", rotary_frequencies(config), persistent=False)
        scaling = config.yarn or config.longrope
        self.scale = scaling.rotary_scale if scaling else 1.0

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions_BT.unsqueeze(-1).float() * self.inv_P
        return angle.cos() * self.scale, angle.sin() * self.scale
