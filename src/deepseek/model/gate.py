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

Guidance: where groups bear names, `group_guidance_loss` draws labelled tokens to the group of their label
(docs/experts.md says why in this form).

Shape letters: T tokens, H hidden, E experts, G groups, K experts a token, B sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy

from ..config import ModelConfig
from ..ops.gate import choose_reference, top_k_values


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
    def update_bias(self, load_E: Tensor, speed: float, *, within_groups: bool = False) -> None:
        """b_i += speed * sign(mean load - load_i): an overloaded expert becomes a little less attractive.

        within_groups: the mean is that of the expert's routing group, and a group's biases keep the sum zero, so that
        no group gains or loses against another; named groups carry the load of their domain.
        """
        load = load_E.to(self.e_score_correction_bias)
        if not within_groups:
            self.e_score_correction_bias += speed * torch.sign(load.mean() - load)
            return
        bias_GE = self.e_score_correction_bias.view(self.config.n_group, -1)
        load_GE = load.view_as(bias_GE)
        bias_GE += speed * torch.sign(load_GE.mean(1, keepdim=True) - load_GE)
        bias_GE -= bias_GE.mean(1, keepdim=True)


class RoutingRule(NamedTuple):
    """How `ops.choose_experts` chooses: its arguments after the bias, explained there."""

    groups: int
    kept_groups: int
    top: int
    group_best: int
    sigmoid: bool
    normalise: bool
    scale_anyway: bool
    scale: float


def routing_rule(config: ModelConfig) -> RoutingRule:
    """The rule of a model: V3's, V2's, or what its config.json says."""
    limited = config.n_group > 1 and config.topk_group < config.n_group and config.topk_method != "greedy"
    sigmoid = config.scoring_func == "sigmoid"
    return RoutingRule(
        config.n_group, config.topk_group, config.num_experts_per_tok,
        (2 if config.topk_method == "noaux_tc" else 1) if limited else 0, sigmoid,
        config.norm_topk_prob and (sigmoid or config.num_experts_per_tok > 1), sigmoid, config.routed_scaling_factor)


def choose(logits_TE: Tensor, config: ModelConfig, bias_E: Tensor | None) -> Route:
    """The formulas at the top of this file, for either generation, with a gradient."""
    return Route(*choose_reference(logits_TE, bias_E, *routing_rule(config)))


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


GUIDANCE_TEMPERATURE = 0.1  # of group scores, which lie in 0..2


def group_guidance_loss(route: Route, group_T: Tensor, groups: int) -> Tensor:
    """Cross entropy of the group scores with the group of the label, averaged over labelled tokens, before its factor.

    The score is the gate's own: the sum of the two best affinities of a group, without the bias. At the temperature
    used the loss fades once the label's group leads by about half, and leaves the other groups what they have.
    group_T: int64 group of each token, -1 without a label.
    """
    best = min(2, route.scores_TE.shape[1] // groups)
    score_TG = top_k_values(route.scores_TE.unflatten(-1, (groups, -1)), best).sum(-1)
    labelled = group_T >= 0
    loss = cross_entropy(score_TG / GUIDANCE_TEMPERATURE, group_T, ignore_index=-1, reduction="sum")
    return loss / labelled.sum().clamp(min=1)


def score_guidance_loss(route: Route, group_T: Tensor, groups: int) -> Tensor:
    """Binary cross entropy of every affinity with whether the token is of its expert's group, before its factor.

    For gates whose weights are raw scores (norm_topk_prob false): each group learns by itself when to open, whatever
    the others do, so that groups trained apart can stand beside each other. Tokens of the group and all others have
    half of a group's loss each. group_T: int64; `groups` for text of none of them, -1 without a label.
    """
    labelled_T = group_T >= 0
    is_TG = (group_T[labelled_T].unsqueeze(1) == torch.arange(groups, device=group_T.device)).float()
    inside_G = is_TG.sum(0)
    share_TG = is_TG / inside_G.clamp(min=1) + (1 - is_TG) / (len(is_TG) - inside_G).clamp(min=1)
    scores_TGE = route.scores_TE[labelled_T].unflatten(-1, (groups, -1))
    loss_TGE = binary_cross_entropy(scores_TGE, is_TG.unsqueeze(-1).expand_as(scores_TGE), reduction="none")
    return (loss_TGE.mean(-1) * share_TG).sum() / (2 * groups)


def guidance_loss(route: Route, group_T: Tensor, config: ModelConfig) -> Tensor:
    """The loss that guides labelled tokens to their group, in the form that suits the gate's weights."""
    raw = config.scoring_func == "sigmoid" and not config.norm_topk_prob
    return (score_guidance_loss if raw else group_guidance_loss)(route, group_T, config.n_group)


def group_weight(route: Route, groups: int) -> Tensor:
    """Share of a token's gate weight that goes to each routing group, [T, G]; rows sum to one."""
    experts = route.scores_TE.shape[1]
    weight_TG = route.weight_TK.new_zeros(len(route.weight_TK), groups)
    weight_TG.scatter_add_(1, route.index_TK // (experts // groups), route.weight_TK)
    return weight_TG / weight_TG.sum(1, keepdim=True)


def expert_load(index_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """How many pairs each expert received, int64 [E]; tokens masked False do not count."""
    index = index_TK if mask_T is None else index_TK[mask_T]
    return torch.bincount(index.flatten(), minlength=num_experts)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load over the last dimension; 0 is perfect balance."""
    mean = load.float().mean(-1)
    return (load.amax(-1) - mean) / mean.clamp(min=1e-9)
