"""Continuous batching: whatever arrives, steps back or is aborted, pages are never lost or shared wrongly, nobody
starves, and every request gets its own tokens."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.atlas import ExpertUsage
from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig
from deepseek.engine import LLM, EngineOptions, ExpertControl, SamplingParams, expert_affinity
from deepseek.errors import ConfigError, RequestError
from deepseek.model import CausalLM
from deepseek.model.cache import PAGE
from tests.helpers.engines import exact_in_company, finish, nf4, params
from tests.helpers.reference import mixed_prompts, plain


@pytest.fixture(scope="module")
def model(tiny_config: Callable, random_model: Callable, tmp_path_factory: Any) -> CausalLM:
    place = tmp_path_factory.mktemp("scheduler")
    made = random_model(tiny_config(max_position_embeddings=1024, n_routed_experts=16, n_group=4, topk_group=2))
    return load_model(nf4(made, place))



@exact_in_company
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_random_arrivals_aborts_and_preemptions(model: CausalLM, seed: int) -> None:
    draw = random.Random(seed)
    pages = draw.choice([3, 4, 6, 12])
    llm = LLM(model, max_num_seqs=draw.choice([2, 4, 9]), max_num_batched_tokens=draw.choice([5, 40, 300]),
              cache_tokens=128 * pages, prefix_cache=draw.random() < 0.7, policy=draw.choice(["fcfs", "expert"]),
              age_limit=0.0)
    engine = llm.engine
    todo = mixed_prompts(draw, model.config.vocab_size, draw.randint(1, 14))
    alive: list[Any] = []
    done: list[Any] = []
    while todo or alive:
        while todo and draw.random() < 0.5:
            prompt = todo.pop()
            sampling = params(max_tokens=draw.choice([1, 4, 12, 140]))
            if -(-(len(prompt) + sampling.max_tokens) // 128) > pages:
                with pytest.raises(RequestError, match="must fit the cache of"):
                    llm.requests(prompt, sampling)
                continue
            alive += llm.requests(prompt, sampling)
            engine.add(alive[-1])
        if alive and draw.random() < 0.05:
            engine.abort(draw.choice(alive))
        engine.step()
        engine.block_manager.check_integrity([request.sequence.block_table for request in engine.scheduler.running])
        assert len(engine.scheduler.running) <= engine.options.max_num_seqs
        assert all(not request.sequence.block_table.pages for request in engine.scheduler.waiting)
        done += [request for request in alive if request.finish_reason is not None]
        alive = [request for request in alive if request.finish_reason is None]
    assert engine.idle and engine.block_manager.available == pages and not engine.affinity.measured
    for request in done:
        assert not request.sequence.block_table.pages
        own = plain(model, request.prompt_ids, len(request.token_ids)) if request.token_ids else ()
        assert tuple(request.token_ids) == own
        assert request.finish_reason == "abort" or len(request.token_ids) == request.max_new_tokens


@exact_in_company
def test_a_request_that_stepped_back_goes_on_with_the_same_tokens(model: CausalLM) -> None:
    llm = LLM(model, max_num_seqs=4, cache_tokens=128 * 4, max_num_batched_tokens=64)
    prompts = mixed_prompts(random.Random(1), model.config.vocab_size, 4)
    prompts = [prompt[:100] for prompt in prompts]
    sampling = params(max_tokens=200)
    got = llm.generate(prompts, sampling)
    assert llm.engine.scheduler.preempted > 0
    assert [output.token_ids for output in got] == [plain(model, prompt, 200) for prompt in prompts]


def test_samples_do_not_depend_on_the_company(model: CausalLM) -> None:
    sampling = params(temperature=1.5, seed=3, logprobs=2, top_p=0.9)
    prompts = mixed_prompts(random.Random(2), model.config.vocab_size, 9)
    alone = [LLM(model).generate([prompt], sampling)[0] for prompt in prompts]
    assert LLM(model, max_num_batched_tokens=20).generate(prompts, sampling) == alone


def test_n_continuations_share_the_prompt(model: CausalLM) -> None:
    """Their tokens are those of single requests with the next seeds; the prompt runs once."""
    prompt = list(range(60)) * 4
    llm = LLM(model)
    output = llm.generate([prompt], params(n=4, seed=10, temperature=1.0))[0]
    single = [LLM(model).generate([prompt], params(seed=10 + i, temperature=1.0))[0] for i in range(4)]
    assert [choice.token_ids for choice in output.choices] == [one.token_ids for one in single]
    assert llm.engine.stats.computed < 2 * len(prompt)
    assert output.usage == {"prompt_tokens": 240, "completion_tokens": 24, "total_tokens": 264}
    assert len({choice.token_ids for choice in output.choices}) == 4


def test_logprobs_are_those_of_the_model(model: CausalLM) -> None:
    output = LLM(model).generate([[5, 6, 7]], params(logprobs=3, max_tokens=4))[0]
    with torch.no_grad():
        log_TV = model(torch.tensor([[5, 6, 7]]), attn_impl="naive")[0].double().log_softmax(-1)
    first = output.logprobs[0]
    assert first.token == output.token_ids[0] and first.logprob == pytest.approx(float(log_TV[-1].max()))
    assert [token for token, _ in first.top] == log_TV[-1].topk(3).indices.tolist() and len(output.logprobs) == 4
    assert LLM(model).generate([[5]], params(logprobs=0))[0].logprobs[0].top == ()


def test_routed_experts_come_back_and_replaying_them_changes_nothing(model: CausalLM) -> None:
    prompts = mixed_prompts(random.Random(4), model.config.vocab_size, 3)
    outputs = LLM(model, max_num_batched_tokens=50).generate(prompts, params(routed=True))
    layers = model.config.moe_layers
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.routed.shape == (len(prompt) + 5, len(layers), model.config.num_experts_per_tok)
        again = LLM(model).generate([prompt], params(experts=ExpertControl(replay=output.routed)))[0]
        assert again.token_ids == output.token_ids
        other = (output.routed + 1) % model.config.n_routed_experts
        forced = LLM(model).generate([prompt], params(routed=True, experts=ExpertControl(replay=other)))[0]
        assert torch.equal(forced.routed[: len(other)], other)


def test_controls_of_one_request_leave_the_others_alone(model: CausalLM) -> None:
    prompts = mixed_prompts(random.Random(5), model.config.vocab_size, 6)
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
    assert llm.generate([prompts[0]], params()) == [want[0]] and not llm.engine.stats.cached
    with pytest.raises(RequestError, match=r"experts\.top_k = 99: must lie in 1\.\.16"):
        LLM(model).generate([[1]], params(experts=ExpertControl(top_k=99)))
    with pytest.raises(RequestError, match="no atlas beside the model"):
        LLM(model).generate([[1]], params(experts=ExpertControl(mask=["law_expert"])))


def test_coupled_prompts_advance_together(model: CausalLM) -> None:
    """With all the weight on one, its tokens; with equal ones, the likeliest of the mean."""
    a, b = [3, 4, 5], [9, 8, 7, 6, 5]
    llm = LLM(model)
    assert llm.generate_ensemble([a, b], [1e9, 1e-9], params()).token_ids == llm.generate([a], params())[0].token_ids
    got, tokens = llm.generate_ensemble([a, b], None, params(max_tokens=3)).token_ids, list[int]()
    with torch.no_grad():
        for _ in range(3):
            p_V, q_V = (model(torch.tensor([prompt + tokens]), attn_impl="naive")[0, -1].double().softmax(-1)
                        for prompt in (a, b))
            tokens.append(int((p_V + q_V).argmax()))
    assert got == tuple(tokens)
    llm.engine.block_manager.check_integrity([])
    with pytest.raises(RequestError, match="must be positive"):
        llm.generate_ensemble([a, b], [1, 0])


def test_nobody_starves_under_batching_by_expert(model: CausalLM) -> None:
    """A lone request of another domain waits for its age, not for the end of the queue."""
    now = [0.0]
    llm = LLM(model, max_num_seqs=2, policy="expert", age_limit=5.0, prefix_cache=False)
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
    llm = LLM(model, max_num_seqs=4, policy="expert", age_limit=1e9, prefix_cache=False)
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
    llm = LLM(model, max_num_seqs=4, policy="expert", age_limit=1e9, prefix_cache=False)
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
    llm = LLM(model, max_num_seqs=3)
    prompts = mixed_prompts(random.Random(6), model.config.vocab_size, 5)
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
    assert llm.engine.block_manager.available == llm.engine.block_manager.count


def test_closing_a_stream_gives_its_pages_back(model: CausalLM, tmp_path: Any) -> None:
    llm = LLM(model, prefix_cache=False)
    request, = llm.requests([1, 2, 3], params(max_tokens=50))
    llm.engine.add(request)
    llm.engine.step()
    assert llm.engine.block_manager.available < llm.engine.block_manager.count
    llm.engine.abort(request)
    llm.engine.abort(request)
    assert request.finish_reason == "abort" and llm.engine.block_manager.available == llm.engine.block_manager.count
    assert llm.engine.stats.aborted == 1 and llm.engine.idle


@pytest.mark.parametrize(("option", "value"), [
    ("max_num_seqs", 0), ("max_num_batched_tokens", -3), ("cache_tokens", 0), ("policy", "lifo"), ("age_limit", -1),
    ("prefix_cache", 1), ("prefetch", None)])
def test_impossible_options_are_named(model: CausalLM, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} = "):
        LLM(model, **{option: value})


def test_unknown_options_are_refused(model: CausalLM) -> None:
    unknown: dict[str, Any] = {"max_seqs": 3}
    with pytest.raises(ConfigError, match="unknown setting max_seqs; there are max_num_seqs"):
        LLM(model, **unknown)


# ---- what goes wrong ends whom it concerns, and nobody else ---------------------------------------------------------


def test_an_error_in_a_step_reaches_its_caller_and_nobody_hangs(model: CausalLM, monkeypatch: Any) -> None:
    llm = LLM(model)
    want = llm.generate([[7, 8]], params())[0].token_ids
    run = llm.engine.runner.run
    broken = [True]

    def sometimes(*args: Any) -> Any:
        if broken[0]:
            raise OSError("the disk is gone")
        return run(*args)

    monkeypatch.setattr(llm.engine.runner, "run", sometimes)

    async def read(prompt: list[int]) -> tuple[int, ...]:
        async for request in llm.stream_async(prompt, params()):
            seen = tuple(request.token_ids)
        return seen

    async def two() -> Any:
        return await asyncio.wait_for(asyncio.gather(read([1, 2]), read([3]), return_exceptions=True), 20)

    assert [type(error) for error in asyncio.run(two())] == [OSError, OSError]
    with pytest.raises(OSError, match="the disk is gone"):
        llm.generate([[7, 8]], params())
    assert llm.engine.idle and llm.engine.block_manager.available == llm.engine.block_manager.count
    broken[0] = False
    assert asyncio.run(asyncio.wait_for(read([7, 8]), 20)) == want
    llm.close()


def test_logits_that_are_no_numbers_end_one_request(model: CausalLM, monkeypatch: Any) -> None:
    llm = LLM(model)
    prompts = [[1, 2, 3], [4, 5], [6]]
    want = llm.generate(prompts, params())
    requests = [llm.requests(prompt, params())[0] for prompt in prompts]
    monkeypatch.setattr(requests[1], "sample", lambda logits: 1 // 0)
    finish(llm, *requests)
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    assert isinstance(requests[1].error, ZeroDivisionError)
    assert [requests[i].output() for i in (0, 2)] == [want[i] for i in (0, 2)]


def test_a_callback_that_fails_or_aborts_others(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model, max_num_seqs=4)
    prompts = [[1, 2, 3], [4, 5], [6], [7]]
    want = llm.generate(prompts, params())
    requests = [llm.requests(prompt, params())[0] for prompt in prompts]
    requests[0].on_token = lambda request: llm.engine.abort(requests[1])
    monkeypatch.setattr(requests[2], "on_token", lambda request: 1 // 0)
    finish(llm, *requests)
    assert [request.finish_reason for request in requests] == ["length", "abort", "error", "length"]
    assert [requests[i].output() for i in (0, 3)] == [want[i] for i in (0, 3)]
    assert llm.engine.block_manager.available == llm.engine.block_manager.count
    llm.engine.block_manager.check_integrity([])


def test_aborting_the_first_of_several_continuations_lets_the_others_run(model: CausalLM) -> None:
    llm = LLM(model, max_num_batched_tokens=8)
    first, second = llm.requests(list(range(40)), params(n=2))
    llm.engine.add(first, second)
    llm.engine.step()
    assert first.sequence.prefilling
    llm.engine.abort(first)
    finish(llm)
    assert tuple(second.token_ids) == plain(model, list(range(40)), 6)


def test_coupled_prompts_that_do_not_fit_together_are_refused_and_others_in_between_do_no_harm(model: CausalLM) -> None:
    llm = LLM(model, cache_tokens=512, max_num_seqs=3)
    for prompts in ([[1] * 150, [2] * 150, [3] * 150], [[1] * 250, [2] * 250]):
        with pytest.raises(RequestError, match="must fit the cache of 512"):
            llm.generate_ensemble(prompts, None, params(max_tokens=20))
    want = LLM(model).generate_ensemble([[1] * 120, [2] * 120], None, params(max_tokens=20)).token_ids
    other, = llm.requests([5] * 120, params(max_tokens=100))
    llm.engine.add(other)  # whose growth makes a mate step back
    assert llm.generate_ensemble([[1] * 120, [2] * 120], None, params(max_tokens=20)).token_ids == want
    finish(llm)
    assert tuple(other.token_ids) == plain(model, [5] * 120, 100)
    with pytest.raises(RequestError, match="must be positive numbers"):
        llm.generate_ensemble([[1], [2]], [1, float("nan")])


def test_routes_come_back_whole_after_stepping_back(model: CausalLM) -> None:
    """Beside a twin, whose pages know more of the prompt than the request itself has run."""
    prompt = [i % 96 for i in range(255)]
    llm = LLM(model, cache_tokens=512, max_num_batched_tokens=20)
    got = llm.generate([prompt, prompt], params(max_tokens=30, routed=True))
    assert llm.engine.scheduler.preempted > 0
    want = LLM(model).generate([prompt], params(max_tokens=30, routed=True))[0]
    assert all(torch.equal(output.routed, want.routed) for output in got)


def test_those_that_generate_take_turns_where_a_step_is_too_small_for_all(model: CausalLM) -> None:
    llm = LLM(model, max_num_seqs=6)
    requests = [llm.requests([i], params(max_tokens=10))[0] for i in range(4)]
    llm.engine.add(*requests)
    llm.engine.step()
    llm.engine.scheduler.options = EngineOptions(max_num_seqs=6, max_num_batched_tokens=2)
    for _ in range(9):
        llm.engine.step()
    counts = [len(request.token_ids) for request in requests]
    assert max(counts) - min(counts) <= 1 and sum(counts) == 4 + 18
    finish(llm)
    assert [tuple(request.token_ids) for request in requests] == [plain(model, [i], 10) for i in range(4)]


def test_usage_counts_a_requests_own_tokens(model: CausalLM) -> None:
    usage, llm = ExpertUsage(model.config), LLM(model, prefix_cache=False)
    other, = llm.requests([9, 8, 7], params(max_tokens=40))
    llm.engine.add(other)
    output = llm.generate([[1, 2, 3, 4]], params(routed=True), usage=usage)[0]
    assert usage.tokens == 4 + 5  # the last token is never run
    assert int(usage.counts_LE.sum()) == output.routed.numel()
    counted = [torch.bincount(output.routed[:, row].flatten(), minlength=16) for row in range(output.routed.shape[1])]
    assert torch.equal(usage.counts_LE, torch.stack(counted))


def test_domains_of_callers_do_not_pile_up(model: CausalLM, monkeypatch: Any) -> None:
    monkeypatch.setattr(expert_affinity, "LEARNED", 5)
    llm = LLM(model, policy="expert")
    for i in range(12):
        llm.generate([[i]], params(max_tokens=1), domains=[f"domain {i % 9}"])
    assert len(llm.engine.affinity.domains) == 5 and "domain 2" in llm.engine.affinity.domains


def test_what_is_wrong_with_a_request_is_said_before_it_runs(model: CausalLM) -> None:
    llm = LLM(model, cache_tokens=256)
    with pytest.raises(RequestError, match="prompt 1: prompt and max_tokens are 306 tokens: must fit"):
        llm.generate([[1], [2] * 300], params())
    with pytest.raises(RequestError, match="must fit the cache"):
        llm.stream([2] * 300, params())
    routes = torch.zeros(1, len(model.config.moe_layers), model.config.num_experts_per_tok, dtype=torch.int64)
    for control, message in (
            (ExpertControl(replay=routes + 99), r"experts\.replay: must hold 0\.\.15"),
            (ExpertControl(replay=routes, top_k=2), "decides alone"),
            (ExpertControl(bias={"x": float("nan")}), "must be a finite number")):
        with pytest.raises(RequestError, match=message):
            llm.generate([[1]], params(experts=control))
    assert llm.engine.stats.aborted == 0
    assert len(LLM(model).generate([[1]], params(n=2, seed=2**63 - 1))[0].choices) == 2


def test_a_process_ends_in_the_middle_of_a_step(tiny_config: Callable, tmp_path: Any) -> None:
    code = ("import sys; from deepseek import LLM, SamplingParams, ModelConfig; from deepseek.model import CausalLM\n"
            "llm = LLM(CausalLM(ModelConfig.from_file(sys.argv[1])).init_weights())\n"
            "llm.submit(llm.requests([1, 2], SamplingParams(max_tokens=200, ignore_eos=True))[0])")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("places", "pages"), [(1, 4), (8, 2)])
def test_a_request_whose_reader_is_behind_waits_and_leaves_its_place(
        places: int, pages: int, tiny_config: Callable[..., Any], random_model: Callable[..., CausalLM]) -> None:
    """Its tokens are the same in the end; meanwhile others run in its place and on its pages."""
    model = random_model(tiny_config())
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    llm = LLM(model, max_num_seqs=places, cache_tokens=pages * PAGE)
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in ([5, 6, 7], [8] * (2 * PAGE - 30))]
    (slow,), (other,) = (llm.requests(prompt, params) for prompt in ([5, 6, 7], [8] * (2 * PAGE - 30)))
    engine = llm.engine
    engine.add(slow)
    for _ in range(4):
        engine.step()
    slow.paused, before = True, len(slow.token_ids)
    engine.step()
    assert before == len(slow.token_ids) < 20 and engine.stalled and not engine.idle
    engine.add(other)
    while other.finish_reason is None:
        assert engine.step() == [other]
    assert len(slow.token_ids) == before and engine.scheduler.waiting == [slow]
    slow.paused = False
    while slow.finish_reason is None:
        engine.step()
    assert [slow.token_ids, other.token_ids] == [*map(list, alone)]
    assert engine.idle and engine.block_manager.available == engine.block_manager.count
    engine.block_manager.check_integrity([])


def test_nothing_is_done_while_all_wait_for_their_readers(tiny_config: Callable[..., ModelConfig],
                                                         random_model: Callable[..., CausalLM]) -> None:
    llm = LLM(random_model(tiny_config()))
    (request,) = llm.requests([5, 6, 7], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    moved = threading.Event()
    request.on_token = lambda one: moved.set()
    request.paused = True
    llm.submit(request)
    time.sleep(0.3)
    assert llm.engine.scheduler.steps < 100 and not request.token_ids  # 16 looks; without a pause, thousands
    request.paused = False
    assert moved.wait(30)
    llm.close()
