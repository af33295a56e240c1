"""Deltas of experts beside a base: the term w (W' - W) x, alone, with LoRA adapters, on plain and quantized weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from deepseek.checkpoint import base_tensors, fingerprint, load_model, save_delta, tensor_hashes
from deepseek.convert import dequantize, merge, quantize
from deepseek.engine import LLM
from deepseek.errors import CheckpointError, ConfigError
from deepseek.model.adapters import Mixture, bytes_on, rows_of, whole
from tests.engine.test_adapters import Served, served  # noqa: F401 - a fixture
from tests.engine.test_mixtures import summed
from tests.helpers.engines import exact_in_company, params
from tests.helpers.reference import mixed_prompts

EXPERTS = "1.0 1.3 1.8 2.1 2.15".split()  # of them "code" has LoRA on 1.0, 1.3, 2.1 and 2.15
MIXTURES: list[Any] = ["tax", {"tax": 0.5}, {"tax": 0.6, "code": 0.4}, {"tax": 1.0, "law": -0.5, "code": 0.3},
                       {"tax": 0.5, "half": 0.5}, "code", None]


def save_tuned(base: Path, folder: Path, seed: int, parts: str = "gate up down") -> Path:
    """A delta with random steps on EXPERTS."""
    model, generator = load_model(base), torch.Generator().manual_seed(seed)
    tensors = base_tensors(model)
    tuned = {}
    for expert in EXPERTS:
        layer, index = expert.split(".")
        for part in parts.split():
            name = f"model.layers.{layer}.mlp.experts.{index}.{part}_proj.weight"
            w = tensors[name]
            tuned[name] = w + torch.randn(w.shape, generator=generator) * w.std() * 0.7
    return save_delta(folder, tuned, fingerprint(tensor_hashes(model), model.config), {})


@pytest.fixture(scope="module")
def own(served: Callable[..., Served], tmp_path_factory: Any) -> Served:  # noqa: F811
    one, place = served(), tmp_path_factory.mktemp("deltas")
    one.adapters |= {"tax": save_tuned(one.plain, place / "tax", 1), "half": save_tuned(one.plain, place / "half", 2,
                                                                                        "down")}
    return one


def beside(own: Served, folder: Path, **options: Any) -> LLM:
    return own.llm(folder, "law", "code", "tax", "half", **options)


@pytest.mark.parametrize("absorbed", [False, True], ids=["naive", "absorbed"])
@torch.no_grad()
def test_a_delta_beside_is_the_model_with_it(own: Served, absorbed: bool) -> None:
    model, want = beside(own, own.plain).model, load_model(own.plain, adapter=own.adapters["tax"])
    ids, impl = torch.arange(5, 60)[None], "absorbed" if absorbed else "naive"
    with rows_of(whole("tax")):
        got = model(ids, attn_impl=impl)
    other, plain = want(ids, attn_impl=impl), model(ids)
    scale = other.abs().max()
    assert (got - other).abs().max() <= 1e-5 * scale and (plain - other).abs().max() > 1e-2 * scale
    assert torch.equal(plain, load_model(own.plain)(ids))  # rows of none are the base's


@pytest.mark.parametrize("weights", [one for one in MIXTURES if isinstance(one, dict)], ids=str)
@torch.no_grad()
def test_a_mixture_is_the_explicit_sum(own: Served, weights: dict[str, float], tmp_path: Path) -> None:
    model, ids = beside(own, own.plain).model, torch.arange(5, 60)[None]
    with rows_of(whole(Mixture.of(weights))):
        got = model(ids)
    want = summed(own, weights, tmp_path)(ids)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@exact_in_company
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantized_weights_have_the_same_bits_whatever_the_neighbours(
    own: Served, bits: Literal["nf4", "int8"], tmp_path: Path
) -> None:
    draw, asked = random.Random(4), params(logprobs=2, prompt_logprobs=1)
    quantize(own.plain, tmp_path / "base", bits, progress=False)
    llm = beside(own, tmp_path / "base")
    prompts = mixed_prompts(draw, 96, 10)
    chosen = [draw.choice(MIXTURES) for _ in prompts]
    together, alone = llm.generate(prompts, asked, adapter=chosen), LLM(llm.model, prefix_cache=False)
    for prompt, mixture, output in zip(prompts, chosen, together, strict=True):
        want, = alone.generate([prompt], asked, adapter=mixture)
        assert (output.token_ids, output.logprobs, output.prompt_logprobs) == (
            want.token_ids, want.logprobs, want.prompt_logprobs), mixture


@exact_in_company
@pytest.mark.parametrize("bits", ["nf4", "int8"])
@torch.no_grad()
def test_quantized_experts_become_the_tuned_ones(own: Served, bits: Literal["nf4", "int8"], tmp_path: Path) -> None:
    """W + (W' - W) is W' whatever W is rounded to; what differs is the int8 of the base's activations."""
    quantize(own.plain, tmp_path / "base", bits, progress=False)
    dequantize(tmp_path / "base", tmp_path / "dense", "float32", progress=False)
    want, tuned = load_model(tmp_path / "dense"), base_tensors(load_model(own.plain, adapter=own.adapters["tax"]))
    ids = torch.arange(5, 95)[None]
    plain = want(ids)[0]
    for expert in EXPERTS:
        layer, index = expert.split(".")
        for name, place in base_tensors(want).items():
            if name.startswith(f"model.layers.{layer}.mlp.experts.{index}."):
                place.copy_(tuned[name])
    theirs = want(ids)[0]
    with rows_of(whole("tax")):
        got = beside(own, tmp_path / "base").model(ids)[0]
    moved, off = (theirs - plain).norm(dim=-1), (got - theirs).norm(dim=-1)
    assert float((off / moved).median()) < 0.25


def test_its_memory_is_said(own: Served) -> None:
    llm = beside(own, own.plain)
    config, sizes = llm.model.config, bytes_on(llm.model)
    matrix = config.hidden_size * config.moe_intermediate_size
    places = 2 * 8 * config.n_routed_experts  # where an expert is among those of each layer, in 64 bits
    assert sizes["tax"] == 4 * len(EXPERTS) * 3 * matrix + places
    assert sizes["half"] == 4 * len(EXPERTS) * matrix + places
    assert f"tax ({sizes['tax'] / 2**20:.1f} MiB)" in repr(llm)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
                                  "model.layers.0.self_attn.o_proj.weight", "model.norm.weight",
                                  "model.layers.1.mlp.shared_experts.up_proj.weight"])
def test_what_a_delta_beside_a_base_may_not_hold(own: Served, name: str, tmp_path: Path) -> None:
    model = load_model(own.plain)
    tensors, base = base_tensors(model), fingerprint(tensor_hashes(model), model.config)
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    save_delta(tmp_path / "delta", {one: tensors[one] * 2 for one in (name, expert)}, base, {})
    with pytest.raises(ConfigError, match=rf"adapter tax .*: holds {name}: beside a base a delta may change matrices "
                       "of routed experts alone: give it without a name"):
        LLM(own.plain, adapters={"tax": tmp_path / "delta"})
    assert LLM(own.plain, adapter=tmp_path / "delta").adapters == ()


def test_a_delta_of_another_base_is_refused(own: Served, tmp_path: Path) -> None:
    merge(own.plain, own.adapters["tax"], tmp_path / "other", progress=False)
    with pytest.raises(CheckpointError, match="tax: made for another base"):
        LLM(tmp_path / "other", adapters={"tax": own.adapters["tax"]})
