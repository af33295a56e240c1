"""Every name that was renamed still works, warns, and says what to write instead."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any

import pytest
import torch

from deepseek.cli.main import infer_main
from deepseek.config import ModelConfig
from deepseek.engine import LLM, EngineOptions
from deepseek.errors import ConfigError, RequestError
from deepseek.model import CausalLM
from deepseek.model import cache as cache_module

RENAMED = [
    ("deepseek.ops", "quantised_linear", "quantized_linear"),
    ("deepseek.ops", "grouped_quantised_linear", "grouped_quantized_linear"),
    ("deepseek.ops", "quantised_mlp", "quantized_mlp"),
    ("deepseek.ops", "quantised_experts", "quantized_experts"),
    ("deepseek.checkpoint", "quantised_places", "quantized_targets"),
    ("deepseek.checkpoint", "disk_parts", "hf_names"),
    ("deepseek.model", "LatentCache", "cache.BatchCache"),
    ("deepseek.model.cache", "LatentCache", "BatchCache"),
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


def test_a_cache_under_its_old_name_serves_the_model(tiny_config: Callable[..., ModelConfig]) -> None:
    model, ids = CausalLM(tiny_config()).init_weights(torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3]])
    with pytest.warns(DeprecationWarning, match="LatentCache is deprecated"):
        cache = cache_module.LatentCache(model.config, 1, capacity=2, dtype=torch.float32, device="cpu")  # type: ignore[attr-defined]
    assert torch.equal(model(ids, cache=cache), model(ids)) and (cache.batch, cache.length) == (1, 3)


def test_the_order_of_attention_is_its_impl(tiny_config: Callable[..., ModelConfig]) -> None:
    model, ids = CausalLM(tiny_config()).init_weights(torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3]])
    with pytest.warns(DeprecationWarning, match="order is deprecated: use attn_impl") as caught:
        logits = model(ids, order="absorbed")
    assert caught[0].filename == __file__
    assert torch.equal(logits, model(ids, attn_impl="absorbed")) and not torch.equal(logits, model(ids))


def test_former_names_of_options_work_in_python(tiny_config: Callable[..., ModelConfig]) -> None:
    model = CausalLM(tiny_config()).init_weights(torch.Generator().manual_seed(0))
    with pytest.warns(DeprecationWarning) as caught:
        llm = LLM(model, batch_size=3, step_tokens=7)  # type: ignore[call-arg]
    assert sorted(str(one.message) for one in caught) == [
        "batch_size is called max_num_seqs now", "step_tokens is called max_num_batched_tokens now"]
    assert {one.filename for one in caught} == {__file__}
    assert llm.engine.options == EngineOptions(max_num_seqs=3, max_num_batched_tokens=7)
    with pytest.warns(DeprecationWarning, match="batch_size is called max_num_seqs now"):
        assert EngineOptions(batch_size=3) == EngineOptions(max_num_seqs=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="max_num_seqs and batch_size: are two names of one setting: leave out"):
        EngineOptions(batch_size=3, max_num_seqs=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="max_num_seqs = 0: must be"), pytest.warns(DeprecationWarning):
        EngineOptions(batch_size=0)  # type: ignore[call-arg]


def test_former_flags_work_and_are_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[dict[str, Any]] = []

    def make(_: str, **options: Any) -> None:
        made.append(options)
        raise RequestError("enough")

    monkeypatch.setattr("deepseek.engine.llm.LLM", make)
    words = shlex.split('deepseek-infer --model deepseek-v3 --warmup_experts "text_expert,code_expert" --batch_size 32 '
                        '--prompt x')
    monkeypatch.setattr("sys.argv", words)
    assert infer_main() == 2
    assert made[0]["max_num_seqs"] == 32 and made[0]["warmup_experts"] == ["text_expert,code_expert"]
    assert capsys.readouterr().err == (
        "deepseek: warning: --batch_size is called --max_num_seqs now\ndeepseek: enough\n")
    monkeypatch.setattr("sys.argv", [*words, "--max-num-seqs", "3"])
    assert infer_main() == 2 and len(made) == 1
    assert "max_num_seqs and batch_size: are two names of one setting" in capsys.readouterr().err
