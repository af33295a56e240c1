"""The gate against a literal transcription of the published formulas: plain loops, one token at a time.

The affinities are compared first, with a float64 sigmoid or softmax. The choice is then transcribed from the gate's own
FP32 affinities, so that every comparison, ties included, must come out the same: indices are compared exactly, in
order. The sums of two FP32 numbers (bias, group score) are rounded to FP32 as the formula would on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import ConfigError
from deepseek.model.gate import Gate, Route, choose
from deepseek.ops.gate import top_k

CASES = 10_000  # tokens over all random configurations
PER_CONFIG = 50


def best(values: list[float], count: int) -> list[int]:
    """Indices of the `count` largest, descending, equal values by index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def f32(x: float) -> float:
    return float(np.float32(x))


def v3_token(s: list[float], b: list[float], c: ModelConfig) -> tuple[list[int], list[float]]:
    """arXiv 2412.19437, equations 12-16 for one token, with section 2.1.2's group limit."""
    choice = [f32(s_i + b_i) for s_i, b_i in zip(s, b, strict=True)]
    size = c.n_routed_experts // c.n_group
    groups = [choice[g * size : (g + 1) * size] for g in range(c.n_group)]
    if c.n_group > 1:
        group_score = [f32(sum(sorted(group)[-2:])) for group in groups]
        kept = set(best(group_score, c.topk_group))
        choice = [v if i // size in kept else -math.inf for i, v in enumerate(choice)]
    index = best(choice, c.num_experts_per_tok)
    weight = [s[i] for i in index]
    if c.norm_topk_prob:
        weight = [w / (sum(weight) + 1e-20) for w in weight]
    return index, [w * c.routed_scaling_factor for w in weight]


def v2_token(s: list[float], c: ModelConfig) -> tuple[list[int], list[float]]:
    """arXiv 2405.04434, sections 2.2.1 and 2.2.2: a group counts as much as its best expert."""
    choice = list(s)
    if c.topk_method == "group_limited_greedy":
        size = c.n_routed_experts // c.n_group
        kept = set(best([max(s[g * size : (g + 1) * size]) for g in range(c.n_group)], c.topk_group))
        choice = [v if i // size in kept else -math.inf for i, v in enumerate(s)]
    index = best(choice, c.num_experts_per_tok)
    weight = [s[i] for i in index]
    if c.norm_topk_prob and len(weight) > 1:
        return index, [w / (sum(weight) + 1e-20) for w in weight]
    return index, [w * c.routed_scaling_factor for w in weight]


def random_shape(rng: np.random.Generator) -> dict[str, Any]:
    """Experts, groups, kept groups and top-k, anything that a configuration allows."""
    experts = int(rng.choice([8, 12, 16, 32, 64]))
    groups = int(rng.choice([g for g in (1, 2, 3, 4, 8, 16) if experts % g == 0 and (g == 1 or experts // g >= 2)]))
    kept = int(rng.integers(1, groups + 1))
    top = int(rng.integers(1, min(experts // groups * kept, 9) + 1))
    return dict(n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=top,
                norm_topk_prob=bool(rng.integers(2)), routed_scaling_factor=float(rng.choice([1.0, 2.5])))


def random_logits(rng: np.random.Generator, experts: int) -> Tensor:
    """Smooth, or of five levels only (ties everywhere), or all equal, or so large that the sigmoid saturates."""
    kind = rng.integers(8)
    logits_TE: Any = rng.normal(0, 2, (PER_CONFIG, experts))
    if kind in (0, 1, 2):
        logits_TE = rng.integers(-2, 3, logits_TE.shape) * 0.5
    elif kind == 3:
        logits_TE = np.full_like(logits_TE, 0.25)
    elif kind == 4:
        logits_TE *= 40
    return torch.tensor(logits_TE, dtype=torch.float32)


def random_bias(rng: np.random.Generator, experts: int) -> Tensor:
    """None at all, small, of a few levels, or so negative that every choice value is below zero."""
    kind = rng.integers(5)
    bias_E = {
        0: np.zeros(experts), 1: rng.normal(0, 0.1, experts), 2: rng.integers(-2, 3, experts) * 0.25,
        3: rng.uniform(-4, -1.5, experts), 4: rng.integers(-4, -1, experts) * 1.0,
    }[int(kind)]
    return torch.tensor(bias_E, dtype=torch.float32)


def agree(route: Route, literal: Callable[[list[float]], tuple[list[int], list[float]]]) -> None:
    index, weight = zip(*map(literal, route.scores_TE.tolist()), strict=True)
    assert route.index_TK.tolist() == list(index)
    np.testing.assert_allclose(route.weight_TK.numpy(), weight, rtol=1e-6, atol=1e-30)


def test_v3_gate_is_the_formula(tiny_config: Callable) -> None:
    rng = np.random.default_rng(0)
    below_zero = tied = masked_winner = 0
    for _ in range(CASES // PER_CONFIG):
        config = tiny_config(**random_shape(rng))
        logits_TE, bias_E = random_logits(rng, config.n_routed_experts), random_bias(rng, config.n_routed_experts)
        route = choose(logits_TE, config, bias_E)
        exact_TE = 1 / (1 + np.exp(-logits_TE.double().numpy()))
        np.testing.assert_allclose(route.scores_TE.numpy(), exact_TE, rtol=1e-6, atol=1e-37)  # FP32 ends there
        assert route.index_TK.dtype == torch.int64
        agree(route, partial(v3_token, b=bias_E.tolist(), c=config))

        choice_TE = route.scores_TE + bias_E
        below_zero += int((choice_TE.gather(1, route.index_TK) < 0).any(1).sum())
        tied += sum(len(row.unique()) < len(row) for row in choice_TE)
        masked_winner += int((choice_TE.argmax(1) != route.index_TK[:, 0]).sum())
    # the cases that matter were there
    assert below_zero > CASES // 5 and tied > CASES // 5 and masked_winner > CASES // 50


def test_v2_gate_is_the_formula(tiny_config: Callable) -> None:
    rng = np.random.default_rng(1)
    for case in range(2_000 // PER_CONFIG):
        method = ("greedy", "group_limited_greedy")[case % 2]
        config = tiny_config(**random_shape(rng), topk_method=method, scoring_func="softmax", model_type="deepseek_v2")
        logits_TE = random_logits(rng, config.n_routed_experts)
        route = choose(logits_TE, config, None)
        exact_TE = np.exp(logits_TE.double().numpy())
        exact_TE /= exact_TE.sum(1, keepdims=True)
        np.testing.assert_allclose(route.scores_TE.numpy(), exact_TE, rtol=2e-6, atol=1e-37)
        agree(route, partial(v2_token, c=config))


def test_a_discarded_group_never_wins(tiny_config: Callable) -> None:
    """All choice values below zero: masking with 0 instead of -inf would take the discarded group's experts."""
    config = tiny_config(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=4)
    bias_E = torch.tensor([-1.5] * 4 + [-3.0] * 4)
    route = choose(torch.randn(100, 8), config, bias_E)
    assert route.index_TK.max() < 4


def test_ties_go_to_the_lower_index(tiny_config: Callable) -> None:
    config = tiny_config(n_routed_experts=64, n_group=8, topk_group=4, num_experts_per_tok=6)
    route = choose(torch.zeros(7, 64), config, torch.zeros(64))
    assert route.index_TK.tolist() == [[0, 1, 2, 3, 4, 5]] * 7
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 2.0, 2.0]])
    assert [top_k(x, k).tolist()[0] for k in (1, 3, 4, 6)] == [[1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5, 0]]


def test_the_bias_steers_but_does_not_weigh(tiny_config: Callable) -> None:
    config = tiny_config(n_group=1, topk_group=1)
    logits_TE, bias_E = torch.randn(50, 16), torch.zeros(16)
    bias_E[5] = 10.0
    route = choose(logits_TE, config, bias_E)
    assert (route.index_TK[:, 0] == 5).all()
    chosen_TK = logits_TE.sigmoid().gather(1, route.index_TK)
    torch.testing.assert_close(route.weight_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))


def test_logits_and_gradients_of_the_module(tiny_config: Callable) -> None:
    """FP32 whatever the input's precision; the gradient comes through the weights, never through the choice."""
    gate = Gate(tiny_config())
    with torch.no_grad():
        gate.weight.normal_()
    gate.e_score_correction_bias.normal_()
    x_TH = torch.randn(9, 32).bfloat16()
    route = gate(x_TH)
    expected = choose(x_TH.float() @ gate.weight.t(), gate.config, gate.e_score_correction_bias)
    assert route.weight_TK.dtype == torch.float32 and torch.equal(route.index_TK, expected.index_TK)
    torch.testing.assert_close(route.weight_TK, expected.weight_TK)
    route.weight_TK.square().sum().backward()
    s = (x_TH.float() @ gate.weight.detach().t()).requires_grad_()
    w = s.sigmoid().gather(1, route.index_TK)
    (w / w.sum(1, keepdim=True)).square().sum().backward()
    assert s.grad is not None
    torch.testing.assert_close(gate.weight.grad, s.grad.t() @ x_TH.float())
    assert "e_score_correction_bias" not in dict(gate.named_parameters())


def test_a_group_of_one_expert_is_refused(tiny_config: Callable) -> None:
    with pytest.raises(ConfigError, match="n_group = 16"):
        tiny_config(n_group=16, topk_group=8)
