"""Every heavy operation, declared once: checks, the readable torch reference, and the fast form beside it."""

from .attention import causal_attention
from .experts import expert_mlp
from .linear import fast_bf16, linear
from .loss import linear_cross_entropy
from .mlp import swiglu
from .native import fits
from .norm import rms_norm
from .quantised import (
    ExpertTable,
    choose_experts,
    grouped_quantised_linear,
    latent_attention,
    pack_panels,
    panel_linear,
    prepare_latents,
    quantised_experts,
    quantised_linear,
    quantised_mlp,
)

__all__ = [
    "ExpertTable", "causal_attention", "choose_experts", "expert_mlp", "fast_bf16", "fits", "grouped_quantised_linear",
    "latent_attention", "linear", "linear_cross_entropy", "pack_panels", "panel_linear", "prepare_latents",
    "quantised_experts", "quantised_linear", "quantised_mlp", "rms_norm",
    "swiglu",
]
