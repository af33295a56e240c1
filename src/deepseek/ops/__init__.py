"""Every heavy operation, declared once: checks, the readable torch reference, and the fast form beside it."""

from .attention import causal_attention
from .experts import expert_mlp
from .linear import fast_bf16, linear
from .loss import linear_cross_entropy
from .norm import rms_norm
from .quantised import (
    ExpertTable,
    bf16_linear,
    grouped_quantised_linear,
    latent_attention,
    pack_bf16,
    quantised_experts,
    quantised_linear,
    quantised_mlp,
)

__all__ = [
    "ExpertTable", "bf16_linear", "causal_attention", "expert_mlp", "fast_bf16", "grouped_quantised_linear",
    "latent_attention", "linear", "linear_cross_entropy", "pack_bf16", "quantised_experts", "quantised_linear",
    "quantised_mlp", "rms_norm",
]
