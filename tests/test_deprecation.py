"""Every name that was renamed still works, warns, and says what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from operator import attrgetter

import pytest
import torch

from deepseek.config import ModelConfig
from deepseek.model import CausalLM

RENAMED = [
    ("deepseek.ops", "quantised_linear", "quantized_linear"),
    ("deepseek.ops", "grouped_quantised_linear", "grouped_quantized_linear"),
    ("deepseek.ops", "quantised_mlp", "quantized_mlp"),
    ("deepseek.ops", "quantised_experts", "quantized_experts"),
    ("deepseek.checkpoint", "quantised_places", "quantized_targets"),
    ("deepseek.checkpoint", "disk_parts", "hf_names"),
    ("deepseek.model", "LatentCache", "cache.LatentCache"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_works_and_warns(module: str, old: str, new: str) -> None:
    room = import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is deprecated: use {module}\.{new}") as caught:
        assert getattr(room, old) is attrgetter(new)(room)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("module", sorted({module for module, *_ in RENAMED}))
def test_an_unknown_name_is_still_an_error(module: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        getattr(import_module(module), "nothing")  # noqa: B009


def test_the_order_of_attention_is_its_impl(tiny_config: Callable[..., ModelConfig]) -> None:
    model, ids = CausalLM(tiny_config()).init_weights(torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3]])
    with pytest.warns(DeprecationWarning, match="order is deprecated: use attn_impl") as caught:
        logits = model(ids, order="absorbed")
    assert caught[0].filename == __file__
    assert torch.equal(logits, model(ids, attn_impl="absorbed")) and not torch.equal(logits, model(ids))
