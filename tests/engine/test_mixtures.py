"""Mixtures of adapters: the sum of their terms, in any company, with pages of their own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.atlas import ExpertUsage
from deepseek.checkpoint import load_model
from deepseek.convert import merge
from deepseek.engine import LLM
from deepseek.engine.run_batch import run_file
from deepseek.errors import RequestError
from deepseek.model.adapters import Mixture, parts_of, rows_of, shares, side_by_side, whole
from tests.engine.test_adapters import Served, served  # noqa: F401 - a fixture
from tests.helpers.adapters import KINDS
from tests.helpers.engines import exact_in_company, params
from tests.helpers.reference import mixed_prompts

MIXTURES: list[Any] = [
    {"law": 0.6, "med": 0.4}, {"law": 0.2, "med": 0.5, "code": 0.3}, {"code": 1.0, "med": -0.5}, {"code": 0.7}, "med",
    "law", {"law": 0.5, "code": 0.5}, None]


def summed(own: Served, weights: Mapping[str, float], place: Path) -> Any:
    """The plain base with all weights W + sum_i w_i (W_i - W), W_i with one adapter merged."""
    model = load_model(own.plain, dtype=torch.float32)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, weight in weights.items():
        if not (folder := place / name).exists():
            merge(own.plain, own.adapters[name], folder, "float32", progress=False)
        for key, tensor in load_model(folder, dtype=torch.float32).state_dict().items():
            model.state_dict()[key].add_(weight * (tensor - base[key]))
    return model


@pytest.mark.parametrize("weights", [one for one in MIXTURES if isinstance(one, dict)], ids=str)
@pytest.mark.parametrize("absorbed", [False, True], ids=["naive", "absorbed"])
@torch.no_grad()
def test_a_mixture_is_the_explicit_sum(
    served: Callable[..., Served], weights: dict[str, float], absorbed: bool, tmp_path: Path  # noqa: F811
) -> None:
    own = served()
    model, want = own.llm(own.plain).model, summed(own, weights, tmp_path)
    ids, impl = torch.arange(5, 60)[None], "absorbed" if absorbed else "naive"
    with rows_of(whole(Mixture.of(weights))):
        got = model(ids, attn_impl=impl)
    other, plain = want(ids, attn_impl=impl), model(ids)
    scale = other.abs().max()
    assert (got - other).abs().max() <= 1e-5 * scale and (plain - other).abs().max() > 1e-2 * scale


def test_plain_weights_in_one_batch(served: Callable[..., Served], tmp_path: Path) -> None:  # noqa: F811
    own, draw = served(), random.Random(3)
    prompts, asked = mixed_prompts(draw, 96, len(MIXTURES)), params(max_tokens=0, prompt_logprobs=0)
    together = own.llm(own.plain).generate(prompts, asked, adapter=MIXTURES)
    for prompt, mixture, output in zip(prompts, MIXTURES, together, strict=True):
        weights = {mixture: 1.0} if isinstance(mixture, str) else mixture or {}
        with torch.no_grad():
            log_TV = summed(own, weights, tmp_path)(torch.tensor([prompt]))[0].log_softmax(-1)
        for position, one in enumerate((output.prompt_logprobs or [])[1:]):
            assert one is not None
            assert one.logprob == pytest.approx(float(log_TV[position, prompt[position + 1]]), abs=1e-4)


@exact_in_company
@pytest.mark.parametrize("base", ["quantized", "whole panels"])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 5},
                                     {"cache_tokens": 768, "max_num_batched_tokens": 33}], ids=str)
def test_four_bits_have_the_same_bits_whatever_the_neighbours_mixtures(
    served: Callable[..., Served], base: str, options: dict[str, Any]  # noqa: F811
) -> None:
    own, draw = served(base), random.Random(4)
    prompts, asked = mixed_prompts(draw, 96, 12), params(logprobs=2, prompt_logprobs=1)
    chosen = [draw.choice(MIXTURES) for _ in prompts]
    llm, alone = own.llm(**options), LLM(own.llm().model, prefix_cache=False)
    together = llm.generate(prompts, asked, adapter=chosen)
    again = llm.generate(prompts, asked, adapter=chosen)  # from the prefixes
    for prompt, mixture, *outputs in zip(prompts, chosen, together, again, strict=True):
        want, = alone.generate([prompt], asked, adapter=mixture)
        for output in outputs:
            assert (output.token_ids, output.logprobs) == (want.token_ids, want.logprobs)
            assert output.prompt_logprobs == want.prompt_logprobs


@exact_in_company
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_arrivals_and_preemptions(served: Callable[..., Served], seed: int) -> None:  # noqa: F811
    own, draw = served(), random.Random(seed)
    pages = draw.choice([4, 6, 12])
    llm = LLM(own.llm().model, max_num_seqs=draw.choice([2, 4, 9]), max_num_batched_tokens=draw.choice([5, 40, 300]),
              cache_tokens=128 * pages, prefix_cache=draw.random() < 0.7, policy=draw.choice(["fcfs", "expert"]))
    engine, alive, done = llm.engine, list[Any](), list[Any]()
    todo = mixed_prompts(draw, 96, draw.randint(1, 10))
    while todo or alive:
        while todo and draw.random() < 0.5:
            prompt, mixture = todo.pop(), draw.choice(MIXTURES)
            alive += llm.requests(prompt, params(max_tokens=draw.choice([1, 4, 60])), adapter=mixture)
            alive[-1].asked = prompt, mixture
            engine.add(alive[-1])
        engine.step()
        done += [request for request in alive if request.finish_reason is not None]
        alive = [request for request in alive if request.finish_reason is None]
    assert engine.idle and engine.block_manager.available == pages
    alone = LLM(own.llm().model, prefix_cache=False)
    for request in done:
        prompt, mixture = request.asked
        want, = alone.generate([prompt], params(max_tokens=request.max_new_tokens), adapter=mixture)
        assert request.token_ids == list(want.token_ids), mixture


def test_no_page_of_a_mixture_serves_another(served: Callable[..., Served]) -> None:  # noqa: F811
    own, prompt = served(), list(range(5, 205))
    llm = own.llm()
    cached = lambda mixture: llm.generate([prompt], params(), adapter=mixture)[0].cached_tokens  # noqa: E731
    assert [cached(mixture) for mixture in MIXTURES] == [0] * len(MIXTURES)
    assert [cached(mixture) for mixture in MIXTURES] == [len(prompt) - 1] * len(MIXTURES)
    assert cached({"med": 0.4, "law": 0.6}) == len(prompt) - 1 and cached({"med": 1}) == len(prompt) - 1


def test_use_is_counted_for_every_member(served: Callable[..., Served]) -> None:  # noqa: F811
    llm = served().llm()
    usage = ExpertUsage(llm.model.config)
    llm.generate([[5, 6, 7], [8, 9]], params(max_tokens=1), adapter=[{"law": 0.5, "code": 0.5}, "law"], usage=usage)
    assert {name: part.tokens for name, part in usage.adapters.items()} == {"law": 5, "code": 3}


def test_lines_of_a_file_say_weights(served: Callable[..., Served], tmp_path: Path) -> None:  # noqa: F811
    llm, (lines, out) = served().llm(), (tmp_path / name for name in ("in.jsonl", "out.jsonl"))
    lines.write_text('{"prompt": "the fox", "adapter": {"law": 0.5, "med": 0.5}}\n'
                     '{"prompt": "the fox", "adapter": {"law": 0.5, "tax": 0.5}}\n{"prompt": "the fox"}\n')
    run_file(llm, lines, out, params(max_tokens=8))
    want = llm.generate(["the fox"] * 2, params(max_tokens=8), adapter=[{"law": 0.5, "med": 0.5}, None])
    first, second, third = map(json.loads, out.read_text().splitlines())
    assert [first["text"], third["text"]] == [one.text for one in want] and first["text"] != third["text"]
    assert "adapter = 'tax': is no adapter that was loaded" in second["error"]


@pytest.mark.parametrize(("choice", "message"), [
    ({}, "adapter = {}: must be a name, or weights by name, one at least"),
    ({"tax": 1.0}, "adapter = 'tax': is no adapter that was loaded; there are law, med, code"),
    ({"law": 0}, "adapter: law: weight = 0: must be a finite number other than 0"),
    ({"law": math.nan}, "weight = nan: must be a finite number"), ({"law": "0.5"}, "weight = '0.5': must be a finite"),
    ({"law": True}, "weight = True: must be"), (["law"], r"adapter = \['law'\]: must be a name"),
    (3, "adapter = 3: must")])
def test_what_is_no_mixture(served: Callable[..., Served], choice: Any, message: str) -> None:  # noqa: F811
    with pytest.raises(RequestError, match=message):
        served().llm().requests([5], params(), adapter=choice)


def test_rows_of_one_adapter_are_gathered() -> None:
    half, whole_law = Mixture.of({"law": 0.5, "code": 0.5}), "law"
    spans = side_by_side([(half, 2), (None, 1), (whole_law, 1), (whole_law, 1), (Mixture.of({"code": 0.5}), 2)])
    found = shares(spans)
    assert list(found) == ["code", "law"] and parts_of(half) == (("code", 0.5), ("law", 0.5))
    law, code = found["law"], found["code"]
    assert isinstance(law.rows, torch.Tensor) and law.rows.tolist() == [0, 1, 3, 4]
    assert isinstance(law.weight, torch.Tensor) and law.weight.flatten().tolist() == [0.5, 0.5, 1, 1]
    assert isinstance(code.rows, torch.Tensor) and code.rows.tolist() == [0, 1, 5, 6] and code.weight == 0.5
    assert shares(side_by_side([(whole_law, 3)])) == {"law": (slice(0, 3), 1.0)}
    assert set(KINDS) == {"law", "med", "code"}
