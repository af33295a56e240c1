"""Greedy tokens are those of the model called by itself, whatever is switched on beside it.

The settings are a pairwise covering set: every two values of two different features meet in one of them. The short form
runs in every test run; the long one is 200 prompts under each setting.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from deepseek.atlas import Atlas
from deepseek.checkpoint import load_model
from deepseek.engine import LLM, ExpertControl, SamplingParams
from deepseek.engine.speculative import Drafter, Trial
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from tests.helpers import reference
from tests.helpers.engines import exact_in_company, nf4

pytestmark = exact_in_company

FEATURES: dict[str, tuple[Any, ...]] = {
    "max_num_seqs": (1, 3, 32),
    "max_num_batched_tokens": (512, 7, 33),
    "prefix_cache": (True, False),
    "cache_tokens": (8192, 512),  # the second so small that requests step back
    "policy": ("fcfs", "expert"),
    "experts": ("all", "cold", "warm", "one a layer"),
    "prefetch": (True, False),
    "speculate": (False, True),
    "beside": ("nothing", "sampled", "routed", "replay", "controlled"),  # what else the prompts' neighbours ask for
}
TOKENS = 6


def cover(features: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Settings in which every pair of values of two features occurs, chosen greedily."""
    names = list(features)
    pairs = {((a, x), (b, y)) for a, b in combinations(names, 2) for x, y in product(features[a], features[b])}
    rows = []
    while pairs:
        best = max(product(*features.values()),
                   key=lambda row: sum(pair in pairs for pair in combinations(zip(names, row, strict=True), 2)))
        rows.append(dict(zip(names, best, strict=True)))
        pairs -= set(combinations(rows[-1].items(), 2))
    return rows


COVER = cover(FEATURES)


@pytest.fixture(scope="module")
def folder(tiny_config: Callable, random_model: Callable, tmp_path_factory: Any) -> Path:
    place = tmp_path_factory.mktemp("equality")
    tokenizer = Tokenizer.train(["the quick brown fox", "0123456789"] * 4, 300)
    config = tiny_config(vocab_size=tokenizer.vocab_size, n_routed_experts=16, n_group=4, topk_group=2,
                         num_experts_per_tok=3, max_position_embeddings=512, num_nextn_predict_layers=1)
    folder = nf4(random_model(config), place, tokenizer)
    Atlas.built_in(config, ["a_expert", "b_expert", "c_expert", "d_expert"]).save(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Callable[[list[int]], tuple[int, ...]]:
    """Greedy tokens by the model alone, each prompt once."""
    model: CausalLM = load_model(folder)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def of(prompt: list[int]) -> tuple[int, ...]:
        return known.get(tuple(prompt)) or known.setdefault(tuple(prompt), reference.plain(model, prompt, TOKENS))

    return of


@pytest.fixture
def half_right(monkeypatch: pytest.MonkeyPatch, plain: Callable) -> Iterator[None]:
    """Drafts in every step: the module's own, random as it is, and in every other request the right one."""
    draft = Drafter.draft

    def helped(self: Drafter, run: Any) -> None:
        draft(self, run)
        for request, *_ in run:
            if request.sequence.draft_token is not None and request.request_id % 2 and len(request.token_ids) < TOKENS:
                request.sequence.draft_token = plain(request.prompt_ids)[len(request.token_ids)]

    monkeypatch.setattr(Drafter, "draft", helped)
    monkeypatch.setattr(Trial, "drafts", lambda self: True)
    yield


def least(folder: Path) -> int:
    """The smallest budget: one expert a layer."""
    with pytest.raises(Exception, match=r"the least that works is") as failure:
        LLM(folder, expert_memory=1)
    return int(str(failure.value).split("works is ")[1].split()[0].replace(",", ""))


def check(folder: Path, plain: Callable, setting: dict[str, Any], count: int) -> None:
    options = dict(setting)
    experts, beside = options.pop("experts"), options.pop("beside")
    if experts != "all":
        options["expert_memory"] = least(folder) * (1 if experts == "one a layer" else 6)
    if experts == "warm":
        options["warmup_experts"] = "b_expert,d_expert"
    llm = LLM(folder, **options)
    prompts = reference.mixed_prompts(random.Random(7), llm.model.config.vocab_size, count)
    greedy: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    params = [SamplingParams(**greedy)] * count
    if beside == "replay":
        routes = [output.routed for output in
                  LLM(llm.model, speculate=False).generate(prompts[::2], SamplingParams(routed=True, **greedy))]
    changed = {
        "sampled": lambda i: SamplingParams(max_tokens=TOKENS, temperature=1.3, seed=i, top_p=0.9, ignore_eos=True),
        "routed": lambda i: SamplingParams(routed=True, **greedy),
        "replay": lambda i: SamplingParams(experts=ExpertControl(replay=routes[i // 2]), **greedy),
        "controlled": lambda i: SamplingParams(experts=ExpertControl(mask=["a_expert"], top_k=2), **greedy),
    }
    if beside in changed:
        params = [changed[beside](i) if i % 2 == 0 else one for i, one in enumerate(params)]
    exact = [beside not in ("sampled", "controlled") or bool(i % 2) for i in range(count)]
    got = [output.token_ids for output in llm.generate(prompts, params)]
    assert [tokens for tokens, held in zip(got, exact, strict=True) if held] == [
        plain(prompt) for prompt, held in zip(prompts, exact, strict=True) if held]
    engine = llm.engine
    engine.block_manager.check_integrity([])
    assert engine.block_manager.available == engine.block_manager.count
    assert options["prefix_cache"] == bool(engine.stats.cached)
    if options["cache_tokens"] < 1024 and options["max_num_seqs"] > 1:
        assert engine.scheduler.preempted > 0
    if options["speculate"]:
        assert 0 < engine.drafter.stats.accepted < engine.drafter.stats.drafted
    if experts != "all":
        assert engine.residency.stats.missed > 0


def test_the_settings_cover_every_pair() -> None:
    names = list(FEATURES)
    for a, b in combinations(names, 2):
        met = {(row[a], row[b]) for row in COVER}
        assert met == set(product(FEATURES[a], FEATURES[b])), (a, b)
    assert len(COVER) < 40


@pytest.mark.parametrize("setting", COVER, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.usefixtures("half_right")
def test_tokens_are_those_of_the_model_alone(folder: Path, plain: Callable, setting: dict[str, Any]) -> None:
    check(folder, plain, setting, 16)


@pytest.mark.slow
@pytest.mark.parametrize("setting", COVER, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.usefixtures("half_right")
def test_tokens_of_200_prompts_are_those_of_the_model_alone(
    folder: Path, plain: Callable, setting: dict[str, Any]
) -> None:
    check(folder, plain, setting, 200)
