"""The gate's choice: K of E experts a token, from the logits (model/gate.py has the formulas and what they are for).

Shape letters: T tokens, E experts, G groups, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .native import address, native, runs_native, threads
from .registry import register_op


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


def within_best_groups(choice_TE: Tensor, groups: int, kept_groups: int, group_best: int) -> Tensor:
    """The choice with -inf outside the groups whose `group_best` best choices sum to most."""
    group_TG = top_k_values(choice_TE.unflatten(-1, (groups, -1)), group_best).sum(-1)
    keep_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, top_k(group_TG, kept_groups), True)
    return choice_TE.unflatten(-1, (groups, -1)).masked_fill(~keep_TG.unsqueeze(-1), -torch.inf).flatten(-2)


def choose_reference(
    logits_TE: Tensor, bias_E: Tensor | None, groups: int, kept_groups: int, top: int, group_best: int, sigmoid: bool,
    normalise: bool, scale_anyway: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose_experts` in torch, with a gradient from the weights and scores to the logits."""
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if group_best:
        choice_TE = within_best_groups(choice_TE, groups, kept_groups, group_best)
    index_TK = top_k(choice_TE, top)
    weight_TK = scores_TE.gather(1, index_TK)
    if normalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    if not normalise or scale_anyway:  # V2 normalises *or* scales (DeepSeek's modeling_deepseek.py)
        weight_TK = weight_TK * scale
    return index_TK, weight_TK, scores_TE


@register_op(lambda logits_TE, bias_E, groups, kept_groups, top, *rest: (
    logits_TE.new_empty(len(logits_TE), top, dtype=torch.int64), logits_TE.new_empty(len(logits_TE), top),
    logits_TE.new_empty(logits_TE.shape)))
def choose_experts(
    logits_TE: Tensor, bias_E: Tensor | None, groups: int, kept_groups: int, top: int, group_best: int, sigmoid: bool,
    normalise: bool, scale_anyway: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(index [T, top] int64, weight [T, top], scores [T, E]) of a gate, from its float32 logits. Without a gradient.

    kept_groups: how many of the `groups` stay, by the sum of their group_best best choices; group_best 0: all do.
    normalise: weights sum to one, and are then multiplied by `scale` only where scale_anyway (V3 does, V2 does not).
    """
    checks.activations("logits", logits_TE, dense=False)
    tokens, experts = logits_TE.shape
    if bias_E is not None and (bias_E.dtype != torch.float32 or bias_E.shape != (experts,)):
        raise ValueError(f"bias must be float32, one an expert ({experts}), got {bias_E.dtype} {list(bias_E.shape)}")
    if experts % groups or not 1 <= top <= kept_groups * experts // groups or not (
            kept_groups <= groups and group_best <= experts // groups):
        raise ValueError(f"{top} of {experts} experts in {kept_groups} of {groups} groups, each scored by its best "
                         f"{group_best}: does not come out")
    if not runs_native(logits_TE, *(() if bias_E is None else (bias_E,))):
        index_TK, weight_TK, scores_TE = choose_reference(logits_TE.contiguous(), bias_E, groups, kept_groups, top,
                                                          group_best, sigmoid, normalise, scale_anyway, scale)
        return index_TK.contiguous(), weight_TK, scores_TE
    scores_TE = torch.empty_like(logits_TE)
    index_TK = torch.empty(tokens, top, dtype=torch.int64)
    weight_TK = logits_TE.new_empty(tokens, top)
    native.choose_experts(
        logits_TE.data_ptr(), tokens, experts, groups, kept_groups, top, group_best, sigmoid, normalise, scale_anyway,
        scale, address(bias_E), scores_TE.data_ptr(), index_TK.data_ptr(),
        weight_TK.data_ptr(), threads())
    return index_TK, weight_TK, scores_TE
