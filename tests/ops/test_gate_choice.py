"""The gate's choice: native kernels, their torch reference, and a third way of sorting.

Shape letters: T tokens, E experts, G groups, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek import ops
from deepseek.config import ModelConfig
from deepseek.model.gate import choose, routing_rule
from tests.helpers.operations import natively, randn

GATES: dict[str, dict[str, Any]] = {
    "V3": dict(n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=6, routed_scaling_factor=2.5),
    "V3, the real one": dict(n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8),
    "V3, one group": dict(n_routed_experts=20, n_group=1, topk_group=1, num_experts_per_tok=5),
    "V3, every group": dict(n_routed_experts=16, n_group=4, topk_group=4, num_experts_per_tok=4),
    "V3, all that is left": dict(n_routed_experts=16, n_group=8, topk_group=2, num_experts_per_tok=4),
    "V3, top 1": dict(n_routed_experts=16, n_group=4, topk_group=1, num_experts_per_tok=1),
    "V3, not normalised": dict(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3,
                               norm_topk_prob=False),
    "V2 greedy": dict(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax", n_routed_experts=24,
                      n_group=1, topk_group=1, num_experts_per_tok=6, norm_topk_prob=False),
    "V2 groups": dict(model_type="deepseek_v2", topk_method="group_limited_greedy", scoring_func="softmax",
                      n_routed_experts=40, n_group=8, topk_group=3, num_experts_per_tok=6, norm_topk_prob=False,
                      routed_scaling_factor=16.0),
    "V2 normalised": dict(model_type="deepseek_v2", topk_method="group_limited_greedy", scoring_func="softmax",
                          n_routed_experts=40, n_group=8, topk_group=3, num_experts_per_tok=6, norm_topk_prob=True,
                          routed_scaling_factor=16.0),
    "V2 normalised, top 1": dict(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax",
                                 n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=1,
                                 norm_topk_prob=True),
}


def chosen(scores_TE: Tensor, config: ModelConfig, bias_E: Tensor | None) -> Tensor:
    """The K best by stable sorting alone, so that ties go to the lower index."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if best := routing_rule(config).group_best:
        grouped_TGE = choice_TE.unflatten(-1, (config.n_group, -1))
        group_TG = grouped_TGE.sort(-1, descending=True)[0][..., :best].sum(-1)
        rank_TG = group_TG.argsort(dim=-1, descending=True, stable=True)
        out_TG = torch.ones(rank_TG.shape, dtype=torch.bool).scatter_(1, rank_TG[:, : config.topk_group], False)
        choice_TE = grouped_TGE.masked_fill(out_TG.unsqueeze(-1), -torch.inf).flatten(-2)
    return choice_TE.argsort(dim=-1, descending=True, stable=True)[:, : config.num_experts_per_tok]


@natively
@pytest.mark.parametrize("changes", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "wide"])
def test_choices_are_those_of_the_model(changes: dict[str, Any], kind: str, tiny_config: Callable,
                                        some_threads: int) -> None:
    """Exactly, ties too: those go to the lower index. Weights up to rounding."""
    config = tiny_config(**changes)
    experts = config.n_routed_experts
    levels = torch.tensor([-1.7, -0.4, 0.3, 0.9, 2.2])  # few enough for ties, too odd for sums to meet by chance
    logits_TE = {"random": randn(500, experts), "all equal": torch.full((3, experts), 0.7),
                 "ties": levels[torch.randint(0, 5, (500, experts))], "wide": randn(500, experts) * 30}[kind]
    bias_E = None if config.topk_method != "noaux_tc" else {
        "ties": torch.tensor([0.0, 0.0625])[torch.arange(experts) % 2], "all equal": torch.zeros(experts)}.get(
        kind, randn(experts, seed=5) * 0.1)
    route = choose(logits_TE, config, bias_E)
    index_TK, weight_TK, scores_TE = ops.choose_experts(logits_TE, bias_E, *routing_rule(config))
    torch.testing.assert_close(scores_TE, route.scores_TE, rtol=1e-5, atol=1e-7)
    assert torch.equal(index_TK, chosen(scores_TE, config, bias_E))
    same_T = (index_TK == route.index_TK).all(-1)
    if kind != "wide":  # there scores meet at 0 and 1, and one rounding decides
        assert same_T.all()
    assert same_T.float().mean() > 0.5
    torch.testing.assert_close(weight_TK[same_T], route.weight_TK[same_T], rtol=1e-5, atol=1e-7)


@natively
def test_a_gate_of_nan_still_names_experts() -> None:
    logits_TE = randn(4, 16)
    logits_TE[1], logits_TE[2, 3] = torch.nan, torch.nan
    for sigmoid in (False, True):
        index_TK, weight_TK, _ = ops.choose_experts(
            logits_TE, None, groups=4, kept_groups=2, top=4, group_best=2, sigmoid=sigmoid, normalise=True,
            scale_anyway=True, scale=1.0)
        assert ((index_TK >= 0) & (index_TK < 16)).all() and weight_TK[1].isnan().all()
        assert all(len(set(row)) == 4 for row in index_TK.tolist())


