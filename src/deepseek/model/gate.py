"""The gate: which K of E experts a token visits, and with what weight.

DeepSeek-V3 (arXiv 2412.19437, equations 12-16, and section 2.1.2 on balancing without an auxiliary loss):

    s   = sigmoid(x W^T)                                   affinity, FP32
    c   = s + b                                            b steers the choice and never enters the weight
    groups: the sum of the two best c in each of n_group groups; the topk_group best groups stay, the rest are -inf
    I   = the K best c
    w   = s[I] / (sum s[I] + 1e-20) * routed_scaling_factor

DeepSeek-V2 (arXiv 2405.04434): s = softmax(x W^T); a group's score is its single best s; no b; weights are normalised
or scaled.

Ties go to the lower index (a stable sort), so that equal scores mean equal choices on every machine.

Balancing: after each step, b_i += speed * sign(mean load - load_i) (`update_bias`), and a tiny loss per sequence
(`sequence_balance_loss`, equations 17-20).

Shape letters: T tokens, H hidden, E experts, G groups, K experts a token, B sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ModelConfig


class Route(NamedTuple):
    """What a gate decided. index_TK int64, weight_TK FP32, scores_TE FP32 (without the bias)."""

    index_TK: Tensor
    weight_TK: Tensor
    scores_TE: Tensor


class Gate(nn.Module):
    """One layer's gate. `e_score_correction_bias` is state, not a parameter: only `update_bias` moves it."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TH: Tensor) -> Route:
        return choose(x_TH.float() @ self.weight.float().t(), self.config, self.bias)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self, "e_score_correction_bias", None)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, speed: float) -> None:
        """b_i += speed * sign(mean load - load_i): an overloaded expert becomes a little less attractive."""
        load = load_E.to(self.e_score_correction_bias)
        self.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def choose(logits_TE: Tensor, config: ModelConfig, bias_E: Tensor | None) -> Route:
    """The formulas at the top of this file, for either generation."""
    groups, top = config.n_group, config.num_experts_per_tok
    sigmoid = config.scoring_func == "sigmoid"
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if groups > 1 and config.topk_group < groups and config.topk_method != "greedy":
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_TG = top_k_values(choice_TE.unflatten(-1, (groups, -1)), best).sum(-1)
        keep_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, top_k(group_TG, config.topk_group), True)
        choice_TE = choice_TE.unflatten(-1, (groups, -1)).masked_fill(~keep_TG.unsqueeze(-1), -torch.inf).flatten(-2)
    index_TK = top_k(choice_TE, top)
    weight_TK = scores_TE.gather(1, index_TK)
    if config.norm_topk_prob and (sigmoid or top > 1):
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        if not sigmoid:  # V2 normalises *or* scales (DeepSeek's modeling_deepseek.py)
            return Route(index_TK, weight_TK, scores_TE)
    return Route(index_TK, weight_TK * config.routed_scaling_factor, scores_TE)


def top_k_values(x: Tensor, k: int) -> Tensor:
    """The k largest values along the last dimension (no indices, so ties do not matter)."""
    return x.topk(k, dim=-1).values if k > 1 else x.amax(-1, keepdim=True)


def top_k(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, descending, ties to the lower index.

    `Tensor.topk` breaks ties as it likes. It is used when no row has a tie across the cut or inside the choice, which
    one comparison tells; a stable sort settles the rare rest.
    """
    width = x.shape[-1]
    values, index = x.topk(min(k + 1, width), dim=-1)
    if not (values[..., 1:] == values[..., :-1]).any():
        return index[..., :k]
    return x.argsort(dim=-1, descending=True, stable=True)[..., :k]


def sequence_balance_loss(route: Route, sequences: int, mask_T: Tensor | None = None) -> Tensor:
    """Complementary sequence-wise balance loss before its factor alpha, averaged over sequences.

    f_i = E/(K T) * how often expert i is among the K best affinities; P_i = mean of s_i / sum s; loss = sum f_i P_i,
    which is 1 for perfect balance. mask_T: False for padding, which counts for nothing.
    """
    scores_TE, top = route.scores_TE, route.index_TK.shape[1]
    experts = scores_TE.shape[1]
    picked_TE = torch.zeros_like(scores_TE).scatter_(1, scores_TE.detach().topk(top, dim=-1).indices, 1.0)
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    if mask_T is None:
        f_BE = picked_TE.view(sequences, -1, experts).mean(1)
        p_BE = share_TE.view(sequences, -1, experts).mean(1)
    else:
        keep_BT1 = mask_T.view(sequences, -1, 1).to(scores_TE.dtype)
        length_B1 = keep_BT1.sum(1).clamp(min=1)
        f_BE = (picked_TE.view(sequences, -1, experts) * keep_BT1).sum(1) / length_B1
        p_BE = (share_TE.view(sequences, -1, experts) * keep_BT1).sum(1) / length_B1
    return (f_BE * p_BE).sum(-1).mean() * (experts / top)


def expert_load(index_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """How many pairs each expert received, int64 [E]; tokens masked False do not count."""
    index = index_TK if mask_T is None else index_TK[mask_T]
    return torch.bincount(index.flatten(), minlength=num_experts)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load over the last dimension; 0 is perfect balance."""
    mean = load.float().mean(-1)
    return (load.amax(-1) - mean) / mean.clamp(min=1e-9)
