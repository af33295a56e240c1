"""Every heavy operation, declared once: checks, the readable torch reference, and the fast form beside it."""

from .attention import causal_attention
from .experts import expert_mlp
from .linear import fast_bf16, linear
from .loss import linear_cross_entropy
from .mlp import swiglu
from .norm import rms_norm

__all__ = ["causal_attention", "expert_mlp", "fast_bf16", "linear", "linear_cross_entropy", "rms_norm", "swiglu"]
