"""Multi-token prediction (arXiv 2412.19437, section 2.2): module d predicts the token d places beyond the next one.

    h' = W_eh [ enorm(embedding of token i+d) ; hnorm(h of token i from the module before) ]
    h'' = one decoder layer (h');   logits = lm_head(shared_head.norm(h''))

Embedding and head are the main model's. The main model hands over its hidden state *after* the final norm, as vLLM,
SGLang and transformers do with the published weights. On disk a module is the layer after the last,
`model.layers.61.*` in DeepSeek-V3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .layers import Linear, RMSNorm


class SharedHead(nn.Module):
    """Holds the norm in front of the main model's head, under the name the published weights give it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPInput(nn.Module):
    """enorm, hnorm and eh_proj: the two inputs become one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, embedding_BTH: Tensor, previous_BTH: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedding_BTH), self.hnorm(previous_BTH)), -1))
