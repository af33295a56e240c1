"""Every heavy operation, declared once: checks, a readable torch reference, and the fast implementation."""

from typing import TYPE_CHECKING

from ..deprecation import renamed
from .attention import causal_attention
from .experts import expert_mlp
from .gate import choose_experts
from .latent import latent_attention, naive_attention, prepare_latents
from .linear import linear
from .loss import linear_cross_entropy
from .low_rank import add_low_rank
from .mlp import swiglu, swiglu_rows
from .native import fast_bf16
from .norm import rms_norm
from .quantized import (
    ExpertTable,
    grouped_quantized_linear,
    plain_linear,
    quantized_experts,
    quantized_linear,
    quantized_mlp,
)
from .rotary import rotate

__all__ = [
    "ExpertTable", "add_low_rank", "causal_attention", "choose_experts", "expert_mlp", "fast_bf16",
    "grouped_quantized_linear", "latent_attention", "linear", "linear_cross_entropy", "naive_attention",
    "plain_linear", "prepare_latents", "quantized_experts", "quantized_linear", "quantized_mlp", "rms_norm",
    "rotate", "swiglu", "swiglu_rows",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {
        "grouped_quantised_linear": "grouped_quantized_linear",
        "quantised_experts": "quantized_experts",
        "quantised_linear": "quantized_linear",
        "quantised_mlp": "quantized_mlp",
    })
