"""Expert usage: counts against a loop, figures against their definitions, and what people and files get to see."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek.atlas import Atlas, ExpertUsage, NamedGroup
from deepseek.atlas.atlas import Shape
from deepseek.config import ModelConfig
from deepseek.errors import ConfigError, DataError
from deepseek.ids import ExpertId, ExpertSet
from deepseek.model import CausalLM, Route, RoutingRecord


def filled(config: ModelConfig, tokens: int = 400) -> ExpertUsage:
    """Usage with a skewed, reproducible load."""
    usage, generator = ExpertUsage(config), torch.Generator().manual_seed(0)
    record = RoutingRecord()
    for layer in config.moe_layers:
        preference_E = 0.2 * torch.randn(config.n_routed_experts, generator=generator)
        scores_TE = torch.rand(tokens, config.n_routed_experts, generator=generator) + preference_E
        weight_TK, index_TK = scores_TE.topk(config.num_experts_per_tok)
        record.routes[layer] = Route(index_TK, weight_TK, scores_TE)
    usage.add(record)
    return usage


def test_counts_are_those_of_a_loop_and_padding_counts_for_nothing(
    tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]
) -> None:
    config = tiny_config()
    model, usage = random_model(config), ExpertUsage(config)
    expected: Counter[tuple[int, int]] = Counter()
    weights: defaultdict[tuple[int, int], float] = defaultdict(float)
    left, right = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    for mask in (left, right, None):
        record = RoutingRecord()
        ids_BT = torch.randint(0, 96, (2, 5))
        with torch.no_grad():
            model(ids_BT, mask_BT=mask, routing=record)
        usage.add(record, None if mask is None else mask.flatten())
        real = [True] * 10 if mask is None else mask.flatten().bool().tolist()
        for layer, route in record.routes.items():
            for t, experts in enumerate(route.index_TK.tolist()):
                for k, expert in enumerate(experts):
                    expected[layer, expert] += real[t]
                    weights[layer, expert] += float(route.weight_TK[t, k]) * real[t]
    assert usage.tokens == 8 + 5 + 10
    assert usage.layers == (1, 2)
    for row, layer in enumerate(usage.layers):
        for expert in range(16):
            assert usage.counts_LE[row, expert] == expected[layer, expert]
            assert float(usage.weight()[row, expert]) == pytest.approx(weights[layer, expert] / 23)
    assert torch.allclose(usage.share().sum(1), torch.tensor(4.0, dtype=torch.float64))
    assert usage.uniform_share == 4 / 16


def test_names_by_their_share_of_the_slots(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config()
    atlas = Atlas(Shape.of(config), [
        NamedGroup(name, "measured", ExpertSet(ExpertId(*pair) for pair in own)) for name, own in {
            "code_expert": [(1, 0), (2, 0), (2, 1), (2, 2)], "law": [(1, 3)], "idle_expert": [(2, 15)]}.items()])
    usage = ExpertUsage(config)
    assert usage.named(atlas) == "" and usage.named(Atlas(Shape.of(config), [])) == ""
    usage.tokens = 10
    usage.counts_LE[0, 0], usage.counts_LE[0, 3], usage.counts_LE[0, 9] = 10, 20, 10
    usage.counts_LE[1, 0], usage.counts_LE[1, 9] = 10, 30
    # even routing gives an expert of a layer 40 / 16 slots: code_expert 10 of 80, law 2.5
    assert usage.named(atlas).splitlines() == ["law           25 % of the slots, 8.0 times even routing",
                                               "code_expert   25 % of the slots, 2.0 times even routing",
                                               "idle_expert    0 % of the slots, 0.0 times even routing"]
    usage.counts_LE *= 0
    usage.counts_LE[0, 0] = usage.counts_LE[1, 0] = 40
    assert usage.named(atlas).startswith("code_expert  100 % of the slots, 8.0 times even routing\n")
    both = Atlas(Shape.of(config), [*atlas.groups, *Atlas.built_in(config, ["first", "second"]).groups])
    assert [line.split()[0] for line in usage.named(both).splitlines()] == [
        "first", "second", "code_expert", "idle_expert", "law"], "tags come after the names of training"
    with pytest.raises(ConfigError, match="the atlas was made for another shape: 2 layers x 8 experts"):
        usage.named(Atlas.built_in(tiny_config(n_routed_experts=8), ["x"]))


def test_figures_follow_their_definitions(tiny_config: Callable[..., ModelConfig]) -> None:
    usage = ExpertUsage(tiny_config(num_hidden_layers=4))
    usage.tokens = 16
    usage.counts_LE[0] = 4  # perfectly even
    usage.counts_LE[1, :4] = 16  # all tokens at the same four
    usage.counts_LE[2, 0], usage.counts_LE[2, 1] = 48, 16
    assert usage.max_vio().tolist() == pytest.approx([0.0, 3.0, 11.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert usage.diversity().tolist() == pytest.approx([1.0, 0.25, math.exp(entropy) / 16])
    assert usage.dead().tolist() == [0, 12, 14]


@pytest.mark.parametrize(("preset", "cells"), [("nano", 6), ("v3-63m", 6), ("v3-16b-a3b", 6), ("deepseek-v3", 5)])
def test_table_fits_and_names_the_busiest(preset: str, cells: int) -> None:
    usage = filled(ModelConfig.preset(preset))
    lines = usage.table().splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 2 + len(usage.layers) + 1
    assert "400 tokens" in lines[0] and f"{usage.uniform_share:.1%}" in lines[0]
    for row, line in enumerate(lines[2:-1]):
        busiest = usage.share()[row].sort(descending=True, stable=True)
        found = re.findall(r"(\d+) +(\d+\.\d)%", line)
        assert line.split()[0] == str(usage.layers[row])
        assert [int(e) for e, _ in found] == busiest.indices[:cells].tolist()
        percent = (100 * busiest.values[:cells]).tolist()
        assert [float(s) for _, s in found] == pytest.approx(percent, abs=0.051)


def test_table_before_the_first_token(tiny_config: Callable[..., ModelConfig]) -> None:
    usage = ExpertUsage(tiny_config())
    assert usage.table().endswith("(nothing counted)")
    assert not usage.share().any() and not usage.diversity().any()
    with pytest.raises(DataError, match="no token"):
        usage.save_heat_map("never.png")


@pytest.mark.parametrize("preset", ["nano", "deepseek-v3"])
def test_heat_map_is_a_png_of_readable_size(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "experts.png"
    filled(ModelConfig.preset(preset), tokens=50).save_heat_map(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]
    width, height = struct.unpack(">II", data[16:24])
    assert 600 <= width <= 2000 and 200 <= height <= 1600


def test_json_and_back(tiny_config: Callable[..., ModelConfig]) -> None:
    usage = filled(tiny_config())
    again = ExpertUsage.from_json(usage.to_json())
    assert again.table() == usage.table()
    assert torch.equal(again.counts_LE, usage.counts_LE) and torch.equal(again.weights_LE, usage.weights_LE)
    good = json.loads(usage.to_json())
    for bad in ("", "[]", "{}", json.dumps(good | {"format": 2}), json.dumps(good | {"counts": [[1]]})):
        with pytest.raises(DataError, match="expert usage"):
            ExpertUsage.from_json(bad)


def test_a_record_of_another_model_is_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    usage, record = ExpertUsage(tiny_config()), RoutingRecord()
    with pytest.raises(ConfigError, match=r"layers \[\]: must be"):
        usage.add(record)
    for layer in usage.layers:
        record.routes[layer] = Route(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4), torch.ones(1, 8))
    with pytest.raises(ConfigError, match="8 experts: must be 16"):
        usage.add(record)
