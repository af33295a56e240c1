"""A tiny configuration, and models whose every number matters."""

from __future__ import annotations

from typing import Any

import torch

from deepseek.config import ModelConfig
from deepseek.model import CausalLM

TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
    moe_intermediate_size=16, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, n_group=4, topk_group=2,
    first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12,
    max_position_embeddings=256)


@torch.no_grad()
def random_model(config: ModelConfig, seed: int = 0) -> CausalLM:
    """Nothing left at zero or one, logits of magnitude 1-5, uneven routing."""
    generator = torch.Generator().manual_seed(seed)
    model = CausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            gain = 2.0 if name.endswith(("lm_head.weight", "gate.weight", "embed_tokens.weight")) else 1.0
            parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(-0.1, 0.15, generator=generator)
    return model.eval()
