"""Saturation and drift between two checkpoints, on numbers worked out by hand and on models whose change is known."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from deepseek.atlas import Atlas, ExpertUsage, NamedGroup
from deepseek.atlas.atlas import Shape
from deepseek.atlas.compare import Trace, compare, jensen_shannon, total_variation, trace
from deepseek.atlas.sample import Sample, draw
from deepseek.config import ModelConfig
from deepseek.errors import ConfigError
from deepseek.ids import ExpertSet
from deepseek.model import CausalLM
from tests.helpers.planted import K, Planted, text


def test_distances_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.5, 0.0])
    assert float(total_variation(p, q)) == 0.5
    assert float(jensen_shannon(p, q)) == pytest.approx(0.5)  # half of the mass is disjoint
    disjoint = torch.tensor([0.0, 0.0, 0.5, 0.5])
    assert float(total_variation(p, disjoint)) == 1.0 and float(jensen_shannon(p, disjoint)) == pytest.approx(1.0)
    assert float(total_variation(p, p)) == float(jensen_shannon(p, p)) == 0.0


def traced(config: ModelConfig, index_LTK: list[list[list[int]]]) -> Trace:
    index = torch.tensor(index_LTK, dtype=torch.int16)
    usage = ExpertUsage(config)
    usage.tokens = index.shape[1]
    for row, index_TK in enumerate(index):
        usage.counts_LE[row] = torch.bincount(index_TK.flatten().long(), minlength=config.n_routed_experts)
    usage.weights_LE = usage.counts_LE.double()
    return Trace(Shape.of(config), usage, index)


def test_saturation_by_hand(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(num_experts_per_tok=2)
    first = traced(config, [[[0, 1], [2, 3]], [[0, 1], [0, 1]]])
    second = traced(config, [[[1, 0], [3, 4]], [[5, 6], [1, 7]]])
    found = compare(first, second)
    assert found.saturation_L.tolist() == [0.75, 0.25] and found.chance == 2 / 16
    assert found.total_variation_L.tolist() == [0.25, 0.75]
    assert "    1       75.0%   0.250" in found.table() and " mean       50.0%   0.500" in found.table()
    whole = compare(first, first)
    assert whole.saturation_L.tolist() == [1, 1] and not whole.jensen_shannon_L.any()


@pytest.fixture
def sample(planted: Planted) -> Sample:
    return draw("", text("early"), planted.tokenizer, seq_len=32, tokens=2000, seed=0)


def test_a_gate_whose_experts_change_places(planted: Planted, sample: Sample) -> None:
    """Layer 1 turns its experts round by one: drift there, none in layer 2; the name loses what it carried there."""
    other: CausalLM = copy.deepcopy(planted.model)
    with torch.no_grad():
        gate = other.moe_blocks()[1].gate
        gate.weight.copy_(gate.weight.roll(1, 0))
    before, after = (trace(model, sample, planted.tokenizer) for model in (planted.model, other))
    assert before.usage.tokens == sample.tokens and before.index_LTK.shape == (2, sample.tokens, K)
    atlas = Atlas(before.shape, [NamedGroup(name, "measured", ExpertSet(sorted(ids)))
                                 for name, ids in planted.experts.items()])
    found = compare(before, after, atlas)
    assert found.saturation_L[1] == 1 and found.saturation_L[0] < 0.8
    assert found.total_variation_L[1] == 0 and found.jensen_shannon_L[1] == 0 < found.jensen_shannon_L[0]
    rolled = (before.index_LTK[0] + 1) % 16
    assert torch.equal(rolled.sort(1).values, after.index_LTK[0].sort(1).values)
    slots_before, slots_after, weight_before, weight_after = found.coverage["early"]
    assert slots_before > 0.95 and weight_before > 0.95
    mine = torch.tensor([expert.index for expert in planted.experts["early"] if expert.layer == 1])
    kept = float(torch.isin(rolled, mine).double().mean())
    assert slots_after == pytest.approx(slots_before / 2 + kept / 2, abs=0.02) and weight_after < 0.9
    assert "early   " in found.table() and f"-> {slots_after:>6.1%}" in found.table()


def test_other_shapes_are_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    one, two = tiny_config(), tiny_config(n_routed_experts=8)
    routes = [[[0, 1, 2, 3]]] * 2
    with pytest.raises(ConfigError, match=r"differ in shape: 2 layers x 16 experts.*; 2 layers x 8 experts"):
        compare(traced(one, routes), traced(two, routes))
    with pytest.raises(ConfigError, match="the atlas was made for another shape: 2 layers x 8"):
        compare(traced(one, routes), traced(one, routes), Atlas(Shape.of(two), []))


def test_a_dense_model_is_refused(planted: Planted, sample: Sample) -> None:
    with pytest.raises(ConfigError, match="no routed experts to compare"):
        trace(CausalLM(planted.model.config.with_(first_k_dense_replace=3)), sample, planted.tokenizer)
