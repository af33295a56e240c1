"""Continuous batching: whatever arrives, steps back or is aborted, pages are never lost or shared wrongly, nobody
starves, and every request gets its own tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.checkpoint import load_model, save_model
from deepseek.convert import quantize
from deepseek.engine import LLM, ExpertControl, SamplingParams
from deepseek.errors import ConfigError, RequestError
from deepseek.model import CausalLM, LatentCache
from deepseek.ops.native import native


@pytest.fixture(scope="module")
def model(tiny_config: Callable, random_model: Callable, tmp_path_factory: Any) -> CausalLM:
    place = tmp_path_factory.mktemp("scheduler")
    made = random_model(tiny_config(max_position_embeddings=1024, n_routed_experts=16, n_group=4, topk_group=2))
    quantize(save_model(made, place / "plain"), place / "q", "nf4", progress=False)
    return load_model(place / "q")


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 6, "temperature": 0, "ignore_eos": True} | changes))


@torch.inference_mode()
def plain(model: CausalLM, prompt: list[int], count: int) -> tuple[int, ...]:
    """Greedy tokens by the model alone: the prompt in one call, then token by token."""
    cache = LatentCache(model.config, 1, len(prompt) + count)
    logits, out = model(torch.tensor([prompt]), cache=cache, order="naive", last_only=True), []
    while True:
        out.append(int(logits[0, -1].argmax()))
        if len(out) == count:
            return tuple(out)
        logits = model(torch.tensor([[out[-1]]]), cache=cache, order="absorbed", last_only=True)


def random_prompts(draw: random.Random, model: CausalLM, count: int) -> list[list[int]]:
    """Some begin alike, in the middle of a page and beyond one."""
    stems = [[draw.randrange(model.config.vocab_size) for _ in range(n)] for n in (0, 30, 128, 150, 260)]
    return [draw.choice(stems) + [draw.randrange(model.config.vocab_size) for _ in range(draw.choice([1, 2, 9, 40]))]
            for _ in range(count)]


needs_native = pytest.mark.skipif(native is None, reason="exact in any company with the native kernels alone")

@needs_native
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_random_arrivals_aborts_and_preemptions(model: CausalLM, seed: int) -> None:
    draw = random.Random(seed)
    pages = draw.choice([3, 4, 6, 12])
    llm = LLM(model, batch_size=draw.choice([2, 4, 9]), step_tokens=draw.choice([5, 40, 300]), cache_tokens=128 * pages,
              prefix_cache=draw.random() < 0.7, policy=draw.choice(["fcfs", "expert"]), age_limit=0.0)
    engine = llm.engine
    todo = random_prompts(draw, model, draw.randint(1, 14))
    alive: list[Any] = []
    done: list[Any] = []
    while todo or alive:
        while todo and draw.random() < 0.5:
            prompt = todo.pop()
            sampling = params(max_tokens=draw.choice([1, 4, 12, 140]))
            if -(-(len(prompt) + sampling.max_tokens) // 128) > pages:
                with pytest.raises(RequestError, match="must fit the cache of"):
                    engine.add(llm.requests(prompt, sampling)[0])
                continue
            alive += llm.requests(prompt, sampling)
            engine.add(alive[-1])
        if alive and draw.random() < 0.05:
            engine.abort(draw.choice(alive))
        engine.step()
        engine.pages.check([request.table for request in engine.scheduler.running])
        assert len(engine.scheduler.running) <= engine.options.batch_size
        assert all(not request.table.pages for request in engine.scheduler.waiting)
        done += [request for request in alive if request.finish_reason is not None]
        alive = [request for request in alive if request.finish_reason is None]
    assert engine.idle and engine.pages.available == pages and not engine.signatures.measured
    for request in done:
        assert not request.table.pages
        own = plain(model, request.prompt_ids, len(request.token_ids)) if request.token_ids else ()
        assert tuple(request.token_ids) == own
        assert request.finish_reason == "abort" or len(request.token_ids) == request.limit


@needs_native
def test_a_request_that_stepped_back_goes_on_with_the_same_tokens(model: CausalLM) -> None:
    llm = LLM(model, batch_size=4, cache_tokens=128 * 4, step_tokens=64)
    prompts = random_prompts(random.Random(1), model, 4)
    prompts = [prompt[:100] for prompt in prompts]
    sampling = params(max_tokens=200)
    got = llm.generate(prompts, sampling)
    assert llm.engine.scheduler.preempted > 0
    assert [output.token_ids for output in got] == [plain(model, prompt, 200) for prompt in prompts]


def test_samples_do_not_depend_on_the_company(model: CausalLM) -> None:
    sampling = params(temperature=1.5, seed=3, logprobs=2, top_p=0.9)
    prompts = random_prompts(random.Random(2), model, 9)
    alone = [LLM(model).generate([prompt], sampling)[0] for prompt in prompts]
    assert LLM(model, step_tokens=20).generate(prompts, sampling) == alone


def test_n_continuations_share_the_prompt(model: CausalLM) -> None:
    """Their tokens are those of single requests with the next seeds; the prompt runs once."""
    prompt = list(range(60)) * 4
    llm = LLM(model)
    output = llm.generate([prompt], params(n=4, seed=10, temperature=1.0))[0]
    single = [LLM(model).generate([prompt], params(seed=10 + i, temperature=1.0))[0] for i in range(4)]
    assert [choice.token_ids for choice in output.choices] == [one.token_ids for one in single]
    assert llm.engine.counters.computed < 2 * len(prompt)
    assert output.usage == {"prompt_tokens": 240, "completion_tokens": 24, "total_tokens": 264}
    assert len({choice.token_ids for choice in output.choices}) == 4


def test_logprobs_are_those_of_the_model(model: CausalLM) -> None:
    output = LLM(model).generate([[5, 6, 7]], params(logprobs=3, max_tokens=4))[0]
    with torch.no_grad():
        log_TV = model(torch.tensor([[5, 6, 7]]), order="naive")[0].double().log_softmax(-1)
    first = output.logprobs[0]
    assert first.token == output.token_ids[0] and first.logprob == pytest.approx(float(log_TV[-1].max()))
    assert [token for token, _ in first.top] == log_TV[-1].topk(3).indices.tolist() and len(output.logprobs) == 4
    assert LLM(model).generate([[5]], params(logprobs=0))[0].logprobs[0].top == ()


def test_routed_experts_come_back_and_replaying_them_changes_nothing(model: CausalLM) -> None:
    prompts = random_prompts(random.Random(4), model, 3)
    outputs = LLM(model, step_tokens=50).generate(prompts, params(routed=True))
    layers = model.config.moe_layers
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.routed.shape == (len(prompt) + 5, len(layers), model.config.num_experts_per_tok)
        again = LLM(model).generate([prompt], params(experts=ExpertControl(replay=output.routed)))[0]
        assert again.token_ids == output.token_ids
        other = (output.routed + 1) % model.config.n_routed_experts
        forced = LLM(model).generate([prompt], params(routed=True, experts=ExpertControl(replay=other)))[0]
        assert torch.equal(forced.routed[: len(other)], other)


def test_controls_of_one_request_leave_the_others_alone(model: CausalLM) -> None:
    prompts = random_prompts(random.Random(5), model, 6)
    prompts[2] = prompts[0]  # nor is one served from what another had computed in its own way
    want = LLM(model).generate(prompts, params(routed=True))
    few = params(routed=True, experts=ExpertControl(top_k=1))
    many = params(routed=True, experts=ExpertControl(top_k=7))
    mixed = LLM(model).generate(prompts, [few, params(routed=True), many, params(), params(), params()])
    assert [mixed[i] for i in (1, 3, 4, 5)] == [want[i] for i in (1, 3, 4, 5)]
    assert bool((mixed[0].routed[..., 1:] == -1).all()) and bool((mixed[2].routed >= 0).all())
    assert mixed[2].routed.shape[2] == 7
    llm = LLM(model)
    llm.generate([prompts[0]], few)
    assert llm.generate([prompts[0]], params()) == [want[0]] and not llm.engine.counters.cached
    with pytest.raises(RequestError, match=r"experts\.top_k = 99: must lie in 1\.\.16"):
        LLM(model).generate([[1]], params(experts=ExpertControl(top_k=99)))
    with pytest.raises(RequestError, match="no atlas beside the model"):
        LLM(model).generate([[1]], params(experts=ExpertControl(mask=["law_expert"])))


def test_coupled_prompts_advance_together(model: CausalLM) -> None:
    """With all the weight on one, its tokens; with equal ones, the likeliest of the mean."""
    a, b = [3, 4, 5], [9, 8, 7, 6, 5]
    llm = LLM(model)
    assert llm.mix([a, b], [1e9, 1e-9], params()).token_ids == llm.generate([a], params())[0].token_ids
    got, tokens = llm.mix([a, b], None, params(max_tokens=3)).token_ids, []
    with torch.no_grad():
        for _ in range(3):
            mean_V = sum(model(torch.tensor([prompt + tokens]), order="naive")[0, -1].double().softmax(-1)
                         for prompt in (a, b))
            tokens.append(int(mean_V.argmax()))
    assert got == tuple(tokens)
    llm.engine.pages.check([])
    with pytest.raises(RequestError, match="must be positive"):
        llm.mix([a, b], [1, 0])


def test_nobody_starves_under_batching_by_expert(model: CausalLM) -> None:
    """A lone request of another domain waits for its age, not for the end of the queue."""
    now = [0.0]
    llm = LLM(model, batch_size=2, policy="expert", age_limit=5.0, prefix_cache=False)
    llm.engine.scheduler.clock = lambda: now[0]
    order: list[str | None] = []
    for i in range(30):
        domain = "lone" if i == 2 else "crowd"
        request, = llm.requests([i, i + 1, i + 2], params(max_tokens=2), domain=domain)
        request.arrived = 0.0
        llm.engine.add(request)
    while not llm.engine.idle:
        order += [r.domain for r in llm.engine.step() if r.finish_reason is not None]
        now[0] += 1.0
    assert 4 < order.index("lone") < 16


def test_batches_are_formed_of_one_domain(model: CausalLM) -> None:
    """Without ages: both domains' requests run among their own, whatever the order of arrival."""
    llm = LLM(model, batch_size=4, policy="expert", age_limit=1e9, prefix_cache=False)
    draw = random.Random(0)
    share = {name: [draw.randrange(96) for _ in range(8)] for name in ("a", "b")}
    for i in range(24):
        name = "ab"[i % 2]
        request, = llm.requests(share[name] + [i], params(max_tokens=3), domain=name)
        llm.engine.add(request)
    mixed = 0
    while not llm.engine.idle:
        llm.engine.step()
        mixed += len({r.domain for r in llm.engine.scheduler.running}) == 2
    assert mixed <= 6


def test_places_of_a_group_follow_its_queue(model: CausalLM) -> None:
    """Of three groups with 8, 3 and 1 requests: the first fills all places, the others what comes then, and no place
    stays empty while anybody waits."""
    llm = LLM(model, batch_size=4, policy="expert", age_limit=1e9, prefix_cache=False)
    draw = random.Random(0)
    share = {name: [draw.randrange(96) for _ in range(8)] for name in "abc"}
    for i, name in enumerate("cbabaabaaaaa"):
        request, = llm.requests(share[name] + [i], params(max_tokens=3), domain=name)
        llm.engine.add(request)
    scheduler, most = llm.engine.scheduler, dict.fromkeys("abc", 0)
    while left := len(scheduler.waiting) + len(scheduler.running):
        moved = [request.domain for request in llm.engine.step()]
        assert len(moved) == min(4, left)
        most = {name: max(count, moved.count(name)) for name, count in most.items()}
    assert most == {"a": 4, "b": 3, "c": 1}


def test_async_streams_and_leaving_one(model: CausalLM) -> None:
    llm = LLM(model, batch_size=3)
    prompts = random_prompts(random.Random(6), model, 5)
    want = llm.generate(prompts, params(max_tokens=20))

    async def read(prompt: list[int], most: int) -> tuple[int, ...]:
        seen: tuple[int, ...] = ()
        async for request in llm.stream_async(prompt, params(max_tokens=20 if most > 20 else 600)):
            seen = tuple(request.token_ids)
            if len(seen) >= most:
                break
        return seen

    async def everyone() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(read(prompt, 99 if i != 2 else 3) for i, prompt in enumerate(prompts)))

    got = asyncio.run(everyone())
    assert [got[i] for i in (0, 1, 3, 4)] == [want[i].token_ids for i in (0, 1, 3, 4)]
    assert 3 <= len(got[2]) < 600 and llm.engine.idle
    assert llm.engine.pages.available == llm.engine.pages.count


def test_closing_a_stream_gives_its_pages_back(model: CausalLM, tmp_path: Any) -> None:
    llm = LLM(model, prefix_cache=False)
    request, = llm.requests([1, 2, 3], params(max_tokens=50))
    llm.engine.add(request)
    llm.engine.step()
    assert llm.engine.pages.available < llm.engine.pages.count
    llm.engine.abort(request)
    llm.engine.abort(request)
    assert request.finish_reason == "abort" and llm.engine.pages.available == llm.engine.pages.count
    assert llm.engine.counters.aborted == 1 and llm.engine.idle


@pytest.mark.parametrize(("option", "value"), [
    ("batch_size", 0), ("step_tokens", -3), ("cache_tokens", 0), ("policy", "lifo"), ("age_limit", -1),
    ("prefix_cache", 1), ("prefetch", None)])
def test_impossible_options_are_named(model: CausalLM, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} = "):
        LLM(model, **{option: value})


def test_unknown_options_are_refused(model: CausalLM) -> None:
    with pytest.raises(ConfigError, match="batchsize = 3: is no option of the engine; there are batch_size"):
        LLM(model, batchsize=3)
