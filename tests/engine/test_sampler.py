"""The sampler against literal twins, against transformers' processors, and against the distribution it should draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.engine.sampler import draw, nucleus, penalise, restrict, sample
from deepseek.engine.sampling_params import SamplingParams
from deepseek.errors import MoEDRError, RequestError


def random_logits(seed: int, vocabulary: int = 50) -> Tensor:
    return 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def kept(logits_V: Tensor) -> set[int]:
    return set(logits_V.isfinite().nonzero().flatten().tolist())


def restrict_twin(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The three rules as they are written down, on Python floats."""
    alive = set(range(len(logits)))
    if top_k:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        alive = {i for i in alive if logits[i] >= kth}
    if top_p < 1:
        total = math.fsum(math.exp(logits[i]) for i in alive)
        mass, chosen = 0.0, set[int]()
        for i in sorted(alive, key=lambda i: -logits[i]):
            if chosen and mass >= top_p:
                break
            chosen.add(i)
            mass += math.exp(logits[i]) / total
        alive = chosen
    if min_p:
        best = max(math.exp(logits[i]) for i in alive)
        alive = {i for i in alive if math.exp(logits[i]) >= min_p * best}
    return alive


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (500, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.95, 0.0), (0, 1e-9, 0.0),
    (0, 1.0, 0.05), (0, 1.0, 1.0), (10, 0.8, 0.1)])
def test_kept_set_is_that_of_the_literal_rules(top_k: int, top_p: float, min_p: float) -> None:
    for seed in range(20):
        logits_V = random_logits(seed)
        out_V = restrict(logits_V, top_k, top_p, min_p)
        assert kept(out_V) == restrict_twin(logits_V.tolist(), top_k, top_p, min_p)
        assert torch.equal(out_V[out_V.isfinite()], logits_V[out_V.isfinite()])


def test_top_k_keeps_what_equals_the_last() -> None:
    assert kept(restrict(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2, 1.0, 0.0)) == {1, 2, 3}


def test_repetition_penalty() -> None:
    logits_V = torch.tensor([2.0, -2.0, 0.0, 4.0, -4.0])
    seen_V = torch.tensor([True, True, True, False, False])
    assert penalise(logits_V, 2.0, seen_V).tolist() == [1.0, -4.0, 0.0, 4.0, -4.0]
    params = SamplingParams(temperature=0, repetition_penalty=3.0)
    generator = params.generator()
    assert sample(torch.tensor([2.0, 1.0]), params, generator, torch.tensor([True, False])) == 1
    assert sample(torch.tensor([2.0, 1.0]), params, generator, torch.tensor([False, False])) == 0


@pytest.mark.parametrize("seed", range(6))
def test_processors_of_transformers_agree(seed: int) -> None:
    """Each rule alone and all in transformers' own order."""
    processors: Any = pytest.importorskip("transformers.generation.logits_process", reason="needs the test extra")
    logits_V, none = random_logits(seed), torch.zeros(1, 0, dtype=torch.long)
    for name, value, ours in (
        ("TopKLogitsWarper", 9, (9, 1.0, 0.0)),
        ("TopPLogitsWarper", 0.7, (0, 0.7, 0.0)),
        ("MinPLogitsWarper", 0.04, (0, 1.0, 0.04)),
    ):
        theirs_V = getattr(processors, name)(value)(none, logits_V[None].clone())[0]
        assert torch.equal(theirs_V, restrict(logits_V, *ours)), name
    prompt = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(seed))
    seen_V = torch.zeros(50, dtype=torch.bool)
    seen_V[prompt[0]] = True
    penalty = processors.RepetitionPenaltyLogitsProcessor(1.3)
    assert torch.equal(penalty(prompt, logits_V[None].clone())[0], penalise(logits_V, 1.3, seen_V))
    chain = [penalty, processors.TemperatureLogitsWarper(0.7), processors.TopKLogitsWarper(20),
             processors.TopPLogitsWarper(0.9), processors.MinPLogitsWarper(0.03)]
    theirs = logits_V[None].clone()
    for step in chain:
        theirs = step(prompt, theirs)
    assert kept(theirs[0]) == kept(restrict(penalise(logits_V, 1.3, seen_V) / 0.7, 20, 0.9, 0.03))


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 6,000 draws with a fixed seed: below the 99.9 % point of 7 degrees of freedom (24.32)."""
    params = SamplingParams(temperature=1.5, top_p=1.0, seed=11)
    logits_V, generator = random_logits(3, vocabulary=8), params.generator()
    n = 6000
    observed = torch.bincount(torch.tensor([sample(logits_V, params, generator) for _ in range(n)]), minlength=8)
    expected = n * (logits_V / 1.5).softmax(-1)
    assert expected.min() > 5
    assert float(((observed - expected) ** 2 / expected).sum()) < 24.32


@pytest.mark.parametrize("seed", range(12))
def test_a_draw_is_inversion_of_one_number(seed: int) -> None:
    logits_V = restrict(random_logits(seed), 0, 0.9, 0.0)
    u = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    weights = [math.exp(x) for x in logits_V.tolist()]
    mass, expected = 0.0, -1
    for i, w in enumerate(weights):
        mass += w / math.fsum(weights)
        if w and mass > u:
            expected = i
            break
    generator = torch.Generator().manual_seed(seed)
    assert draw(logits_V, generator) == expected
    twin = torch.Generator().manual_seed(seed)
    torch.rand((), generator=twin, dtype=torch.float64)
    assert torch.equal(twin.get_state(), generator.get_state())  # moved on by one number


def test_excluded_tokens_are_never_drawn() -> None:
    logits_V = torch.full((1000,), -torch.inf)
    logits_V[[7, 990]] = 0.0
    generator = torch.Generator().manual_seed(0)
    assert {draw(logits_V, generator) for _ in range(200)} == {7, 990}


def test_seeds_repeat_and_fresh_ones_differ() -> None:
    logits_V = torch.zeros(10_000)

    def tokens(params: SamplingParams) -> list[int]:
        generator = params.generator()
        return [sample(logits_V, params, generator) for _ in range(8)]

    assert tokens(SamplingParams(seed=5)) == tokens(SamplingParams(seed=5)) != tokens(SamplingParams(seed=6))
    assert tokens(SamplingParams()) != tokens(SamplingParams())


def test_greedy_takes_the_lowest_of_equals_and_draws_nothing() -> None:
    params = SamplingParams(temperature=0, seed=1, top_k=1)
    generator = params.generator()
    before = generator.get_state()
    assert sample(torch.tensor([0.0, 2.0, 2.0]), params, generator) == 1
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=0)
    logits_V = random_logits(0)
    token = sample(logits_V, params, params.generator())
    assert token == int(logits_V.argmax()) if temperature < 1 else 0 <= token < len(logits_V)


def test_sampling_leaves_the_logits_alone() -> None:
    logits_V = random_logits(0)
    before = logits_V.clone()
    params = SamplingParams(temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0)
    sample(logits_V, params, params.generator(), torch.ones(50, dtype=torch.bool))
    assert torch.equal(logits_V, before)


def test_nan_logits_are_an_error() -> None:
    params = SamplingParams()
    with pytest.raises(MoEDRError, match="not numbers"):
        sample(torch.tensor([0.0, math.nan]), params, params.generator())


@pytest.mark.parametrize(("field", "value"), [
    ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", math.nan),
    ("temperature", math.inf), ("temperature", "hot"), ("top_k", -1), ("top_k", 2.0), ("top_p", 0.0), ("top_p", 1.01),
    ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("seed", 1.0),
    ("seed", 2**63), ("stop", ("",)), ("stop", (1,)), ("stop", None), ("ignore_eos", 1)])
def test_impossible_values_name_field_value_and_rule(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(f"{field} = {value!r}: must ")


def test_one_stop_string_may_be_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_the_likeliest_are_the_same_whether_all_are_sorted_or_some() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (300, 5000):
        for scale in (0.1, 1.0, 5.0):
            for top_p in (0.01, 0.5, 0.95, 0.999):
                logits_V = torch.randn(vocabulary, generator=generator) * scale
                logits_V[::3] = logits_V[0]  # ties
                few = nucleus(logits_V, top_p, candidates=64)
                assert torch.equal(few, nucleus(logits_V, top_p, candidates=vocabulary))
