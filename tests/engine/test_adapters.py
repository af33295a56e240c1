"""Several adapters beside one base, different ones in one batch: each request gets what it gets alone, pages and expert
affinities are its adapter's own, and what cannot be is said."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.atlas import ExpertUsage
from deepseek.checkpoint import base_tensors, fingerprint, load_model, save_delta, save_model, tensor_hashes
from deepseek.convert import quantize
from deepseek.engine import LLM, expert_affinity
from deepseek.engine.warmup import record_use
from deepseek.errors import CheckpointError, ConfigError, DataError, NotFoundError, RequestError
from deepseek.model import RoutingRecord
from deepseek.model.adapters import Adapted, AdaptedLinear, rows_of, side_by_side, whole
from deepseek.ops.native import native
from deepseek.tokenizer import Tokenizer
from tests.helpers.adapters import KINDS, save_adapter
from tests.helpers.engines import exact_in_company, params
from tests.helpers.reference import mixed_prompts

TOKENIZER = Tokenizer.train(["the quick brown fox", "0123456789"] * 4, 300)
NAMES = (None, *KINDS)
BASES = {"quantized": {}, "a compressed query, biases": dict(q_lora_rank=24, attention_bias=True),
         "whole panels": dict(qk_nope_head_dim=16, v_head_dim=16), "drafts": dict(num_nextn_predict_layers=1)}

class Served:
    """A base in both forms, and an adapter of each kind."""

    def __init__(self, place: Path, make: Callable[[], Any]) -> None:
        self.plain, self.four = place / "plain", place / "four"
        save_model(make(), self.plain, tokenizer=TOKENIZER)
        quantize(self.plain, self.four, "nf4", progress=False)
        self.known: dict[Any, LLM] = {}
        self.adapters = {name: save_adapter(self.plain, place / name, seed, **fields)
                         for seed, (name, fields) in enumerate(KINDS.items())}

    def llm(self, folder: Path | None = None, *names: str, **options: Any) -> LLM:
        folder, budget = folder or self.four, "expert_memory" in options
        key = folder, *names
        if budget or key not in self.known:
            named = {name: self.adapters[name] for name in names or KINDS}
            made = LLM(folder, adapters=named, **options)
            if budget:
                return made
            self.known[key] = made
        return LLM(self.known[key].model, tokenizer=TOKENIZER, **options)

    def alone(self, name: str | None, folder: Path | None = None) -> LLM:
        """The base with this adapter and no other, as if it were the whole model."""
        key = folder or self.four, name
        if key not in self.known:
            self.known[key] = LLM(key[0], adapter=None if name is None else self.adapters[name], prefix_cache=False)
        return self.known[key]


@pytest.fixture(scope="module")
def served(tiny_config: Callable, random_model: Callable, tmp_path_factory: Any) -> Callable[..., Served]:
    known: dict[str, Served] = {}

    def of(base: str = "quantized") -> Served:
        if base not in known:
            config = tiny_config(max_position_embeddings=512, vocab_size=300, **BASES[base])
            known[base] = Served(tmp_path_factory.mktemp("adapters"), lambda: random_model(config))
        return known[base]

    return of


# ---- each request gets what it gets alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(KINDS))
def test_a_side_path_is_the_one_of_load_model(served: Callable[..., Served], name: str) -> None:
    """On plain weights logits are those of LoRALinear and LoRAExperts, up to the order of sums."""
    own = served()
    theirs, llm = load_model(own.plain, adapter=own.adapters[name]), own.llm(own.plain)
    prompt = list(range(5, 60))
    routing = RoutingRecord()
    with torch.no_grad():
        want = theirs(torch.tensor([prompt]), routing=routing)[0].log_softmax(-1)
        base = load_model(own.plain)(torch.tensor([prompt]))[0].log_softmax(-1)
    assert (want - base).abs().max() > 0.1
    got, = llm.generate([prompt], params(max_tokens=0, prompt_logprobs=0, routed=True), adapter=name)
    assert got.prompt_logprobs is not None and got.routed is not None
    for position, logprob in enumerate(got.prompt_logprobs[1:]):
        assert logprob is not None
        assert logprob.logprob == pytest.approx(float(want[position, prompt[position + 1]]), abs=1e-3)
    for row, layer in enumerate(sorted(routing.routes)):
        assert torch.equal(got.routed[:, row].sort().values, routing.routes[layer].index_TK.sort().values)


def test_plain_weights_in_one_batch(served: Callable[..., Served]) -> None:
    """Log-probabilities alone and in company differ by the order of sums."""
    own, draw = served(), random.Random(1)
    prompts = mixed_prompts(draw, 96, 12)
    names = [NAMES[i % 4] for i in range(12)]
    asked = params(logprobs=0, prompt_logprobs=0)
    together = own.llm(own.plain).generate(prompts, asked, adapter=names)
    for prompt, name, output in zip(prompts, names, together, strict=True):
        alone = own.alone(name, own.plain).generate([prompt], asked)[0]
        assert alone.token_ids == output.token_ids
        for one, other in ((alone.logprobs, output.logprobs), (alone.prompt_logprobs, output.prompt_logprobs)):
            assert [p and p.logprob for p in one or ()] == [
                p and pytest.approx(p.logprob, abs=1e-3) for p in other or ()]


@exact_in_company
@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 5}, {"prefix_cache": False},
                                     {"cache_tokens": 768, "max_num_batched_tokens": 33}, {"policy": "expert"}],
                         ids=str)
def test_four_bits_have_the_same_bits_in_any_company(
        served: Callable[..., Served], base: str, options: dict[str, Any]) -> None:
    own, draw = served(base), random.Random(2)
    prompts = mixed_prompts(draw, 96, 10)
    names = [draw.choice(NAMES) for _ in prompts]
    asked = params(logprobs=2, prompt_logprobs=1)
    llm = own.llm(**options)
    assert llm.engine.exact
    together = llm.generate(prompts, asked, adapter=names)
    again = llm.generate(prompts, asked, adapter=names)  # served from the prefixes, where they are kept
    for i, name in enumerate(names):
        want, = own.alone(name).generate([prompts[i]], asked)
        for output in (together[i], again[i]):
            assert (output.token_ids, output.logprobs, output.prompt_logprobs) == (
                want.token_ids, want.logprobs, want.prompt_logprobs), (name, i)
    llm.engine.block_manager.check_integrity([])


@exact_in_company
@pytest.mark.parametrize("name", list(KINDS))
def test_four_bits_are_near_the_side_path_that_was_trained(served: Callable[..., Served], name: str) -> None:
    """LoRALinear and LoRAExperts over the same four bits, without the fused forms: what differs is the int8 of
    activations, and of B on kv_b_proj. A token whose experts change by that goes elsewhere."""
    own, prompt = served(), list(range(5, 95))
    model, base, theirs = own.alone(name).model, load_model(own.four), load_model(own.four, adapter=own.adapters[name])
    with torch.inference_mode():
        with rows_of(whole("unnamed")):
            got = model(torch.tensor([prompt]))[0]
        bare, want = (one(torch.tensor([prompt]))[0] for one in (base, theirs))
        assert torch.equal(model(torch.tensor([prompt]))[0], bare)  # rows without an adapter are the base's
    moved, off = (want - bare).norm(dim=-1), (got - want).norm(dim=-1)
    assert float((off / moved).median()) < 0.25


@exact_in_company
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_arrivals_aborts_and_preemptions_of_several_adapters(served: Callable[..., Served], seed: int) -> None:
    own, draw = served(), random.Random(seed)
    pages = draw.choice([4, 6, 12])
    llm = LLM(own.llm().model, max_num_seqs=draw.choice([2, 4, 9]), max_num_batched_tokens=draw.choice([5, 40, 300]),
              cache_tokens=128 * pages, prefix_cache=draw.random() < 0.7, policy=draw.choice(["fcfs", "expert"]),
              age_limit=0.0)
    engine, alive, done = llm.engine, list[Any](), list[Any]()
    todo = mixed_prompts(draw, 96, draw.randint(1, 12))
    while todo or alive:
        while todo and draw.random() < 0.5:
            alive += llm.requests(todo.pop(), params(max_tokens=draw.choice([1, 4, 12, 90])),
                                  adapter=draw.choice(NAMES))
            engine.add(alive[-1])
        if alive and draw.random() < 0.05:
            engine.abort(draw.choice(alive))
        engine.step()
        engine.block_manager.check_integrity([request.sequence.block_table for request in engine.scheduler.running])
        done += [request for request in alive if request.finish_reason is not None]
        alive = [request for request in alive if request.finish_reason is None]
    assert engine.idle and engine.block_manager.available == pages
    for request in done:
        want, = own.alone(request.adapter).generate([request.prompt_ids], params(max_tokens=request.max_new_tokens))
        assert request.token_ids == list(want.token_ids[: len(request.token_ids)]), request.adapter
        assert len(request.token_ids) == request.max_new_tokens or request.finish_reason == "abort"


def test_an_adapter_runs_in_every_function(served: Callable[..., Served]) -> None:
    own, prompt = served(), [5, 6, 7, 8]
    llm = own.llm(own.plain)
    want = {name: llm.generate([prompt], params(), adapter=name)[0] for name in NAMES}
    assert len({output.token_ids for output in want.values()}) == 4
    hi = [{"role": "user", "content": "fox"}]

    async def streamed(name: str | None) -> tuple[int, ...]:
        return [tuple(request.token_ids) async for request in llm.stream_async(prompt, params(), adapter=name)][-1]

    async def all_at_once() -> list[tuple[int, ...]]:
        return await asyncio.gather(*map(streamed, NAMES))

    assert asyncio.run(all_at_once()) == [want[name].token_ids for name in NAMES]
    for name in NAMES:
        assert "".join(llm.stream(prompt, params(), adapter=name)) == want[name].text
        assert llm.generate_ensemble([prompt, prompt], None, params(), adapter=name).token_ids == want[name].token_ids
        assert llm.chat(hi, params(), adapter=name) == llm.generate([hi], params(), adapter=name)[0]
        (one,), _ = llm.embed([prompt], adapter=name)
        (other,), _ = own.alone(name, own.plain).embed([prompt])
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert llm.generate([prompt] * 4, params(), adapter=list(NAMES)) == list(want.values())
    llm.close()


def test_no_page_of_an_adapter_serves_another(served: Callable[..., Served]) -> None:
    own, prompt = served(), list(range(5, 205))
    llm = own.llm()
    cached = lambda name: llm.generate([prompt], params(), adapter=name)[0].cached_tokens  # noqa: E731
    assert [cached(name) for name in NAMES] == [0, 0, 0, 0]
    assert [cached(name) for name in NAMES] == [len(prompt) - 1] * 4
    assert set(llm.engine.block_manager.tree.roots) == set(NAMES)
    llm.engine.block_manager.check_integrity([])


@exact_in_company
def test_experts_of_an_adapter_within_a_budget(served: Callable[..., Served]) -> None:
    """Experts with LoRA adapters are read where they lie in the file, beside the budget; the others within it."""
    own, draw = served(), random.Random(4)
    least = LLM(own.four).model.moe_blocks()[1].experts.table[0].numel() * 2 + (1 << 16)
    prompts = mixed_prompts(draw, 96, 6)
    names = [NAMES[i % 4] for i in range(6)]
    llm = own.llm(expert_memory=4 * least)
    for prompt, name, output in zip(prompts, names, llm.generate(prompts, params(), adapter=names), strict=True):
        assert output == own.alone(name).generate([prompt], params())[0]
    assert llm.engine.residency is not None and llm.engine.residency.stats.missed > 0
    llm.close()


def test_requests_of_an_adapter_are_batched_by_its_own_routes(served: Callable[..., Served]) -> None:
    llm = served().llm(policy="expert")
    for name in (None, "code"):
        llm.generate([[9, 8, 7]], params(), adapter=name, domains=["law"])
    affinity = llm.engine.affinity
    assert {"law", "law@code"} <= set(affinity.domains)
    known = {name: llm.requests([1], params(), domain="law", adapter=name)[0] for name in NAMES}
    assert affinity.of(known[None]) is affinity.domains["law"]
    assert affinity.of(known["code"]) is affinity.domains["law@code"]
    assert affinity.of(known["med"]) is affinity.domains["law"]  # nothing is known of it yet
    nobody, = llm.requests([1], params(), adapter="med")
    assert affinity.of(nobody) is None and expert_affinity.affinity_key(nobody) == "@med"


def test_use_is_counted_and_recorded_by_adapter(served: Callable[..., Served], tmp_path: Path) -> None:
    own, prompts, names = served(), [[5, 6, 7, 8], [9, 8], [7], [5, 6, 7]], [None, "law", "code", "law"]
    llm = own.llm(own.plain, prefix_cache=False)
    usage, alone = ExpertUsage(llm.model.config), {name: ExpertUsage(llm.model.config) for name in ("law", "code")}
    llm.generate(prompts, params(), adapter=names, usage=usage)
    for name, one in alone.items():
        own.alone(name, own.plain).generate([p for p, n in zip(prompts, names, strict=True) if n == name], params(),
                                            usage=one)
        assert not one.adapters  # of the only adapter, whose part would be the whole
        assert torch.equal(usage.adapters[name].counts_LE, one.counts_LE) and usage.adapters[name].tokens == one.tokens
    assert set(usage.adapters) == {"law", "code"} and usage.tokens == 30 == 9 + 15 + 6
    for runs in (1, 2):  # the second adds to the half of the first
        record_use(usage, tmp_path)
        found = ExpertUsage.from_json((tmp_path / "expert_use.json").read_text())
        assert found.tokens == (30 if runs == 1 else 45)
        assert {name: part.tokens for name, part in found.adapters.items()} == (
            {"law": 15, "code": 6} if runs == 1 else {"law": 22, "code": 9})
        assert torch.equal(found.adapters["law"].counts_LE, sum(
            (alone["law"].counts_LE // (i + 1) for i in range(runs)), torch.zeros(1, dtype=torch.int64)))
    damaged = json.loads(usage.to_json())
    for bad in ([1], {"law": 3}, {"law": {"tokens": 1, "counts": [[1]], "weights": [[1]]}}):
        with pytest.raises(DataError, match="not what to_json writes"):
            ExpertUsage.from_json(json.dumps(damaged | {"adapters": bad}))


def test_nothing_is_done_where_no_adapter_is_loaded(served: Callable[..., Served], monkeypatch: Any) -> None:
    """Modules are the base's own; and with adapters, a step that has none of their rows takes the native layers."""
    own = served("whole panels")
    assert not any(isinstance(module, Adapted) for module in LLM(own.plain).model.modules())
    llm, ran = own.llm(), []
    monkeypatch.setattr(AdaptedLinear, "forward", lambda self, x: ran.append(self.names) or self.base(x))
    llm.generate([[5, 6, 7]], params())
    assert [list(names) for names in ran if names] == [["med"]] * 6 or native is None  # lm_head, outside the layers


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_names_that_there_are_not(served: Callable[..., Served]) -> None:
    own = served()
    llm = own.llm(own.plain, "law", "med")
    assert re.search(r"adapters beside it: law \(0\.\d MiB\), med \(0\.\d MiB\)", repr(llm))
    for ask in (llm.generate, llm.mix):
        with pytest.raises(RequestError, match="adapter = 'tax': is no adapter that was loaded; there are law, med"):
            ask([[5]], params=params(), adapter="tax")
        with pytest.raises(RequestError, match="adapter has 2 entries: must be one for all or one for each of the 1"):
            ask([[5]], params=params(), adapter=["law", "med"])
    with pytest.raises(RequestError, match="there are none"):
        own.alone("law", own.plain).generate([[5]], params(), adapter="law")
    with pytest.raises(ConfigError, match=r"adapter 'a=b': a name must be 1 to 128 visible ASCII characters"):
        LLM(own.plain, adapters={"a=b": own.adapters["law"]})
    with pytest.raises(ConfigError, match="adapters: plain is the base's own name"):
        LLM(own.plain, adapters={"plain": own.adapters["law"]})
    with pytest.raises(ConfigError, match="without a name it stands for the whole model: must have one beside med"):
        LLM(own.plain, adapter=own.adapters["law"], adapters={"med": own.adapters["med"]})
    with pytest.raises(NotFoundError, match="nowhere"):
        LLM(own.plain, adapters={"law": "nowhere"})


def test_adapters_of_another_base_are_refused_before_any_is_put_in(
        served: Callable[..., Served], tiny_config: Callable, random_model: Callable, tmp_path: Path) -> None:
    own, other = served(), random_model(tiny_config(vocab_size=300, max_position_embeddings=512), seed=9)
    save_model(other, tmp_path / "other", tokenizer=TOKENIZER)
    with pytest.raises(CheckpointError, match="law: made for another base: its hash is"):
        LLM(tmp_path / "other", adapters={"law": own.adapters["law"]})
    wide = random_model(tiny_config(vocab_size=300, hidden_size=48))
    save_model(wide, tmp_path / "wide", tokenizer=TOKENIZER)
    with pytest.raises(CheckpointError, match="law: made for a base of other sizes"):
        LLM(tmp_path / "wide", adapters={"law": own.adapters["law"]})
    dense = save_adapter(own.plain, tmp_path / "dense", r=2, target_modules=["gate_proj"])
    assert LLM(own.plain, adapters={"dense": dense}).generate([[5]], params(), adapter="dense")
    with pytest.raises(CheckpointError, match="inside a packed MLP of this quantized base and takes no LoRA adapter"):
        LLM(own.four, adapters={"dense": dense})
    with pytest.raises(CheckpointError, match="stands beside this model and would not be written"):
        save_model(own.llm(own.plain).model, tmp_path / "written")


def test_a_delta_without_a_name_is_part_of_the_model(served: Callable[..., Served], tmp_path: Path) -> None:
    own = served()
    model = load_model(own.plain)
    base = fingerprint(tensor_hashes(model), model.config)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    save_delta(tmp_path / "delta", {name: base_tensors(model)[name] * 2}, base, {})
    with pytest.raises(ConfigError, match="a delta goes into a checkpoint, not a model in memory"):
        LLM(model, adapter=tmp_path / "delta")
    with pytest.raises(CheckpointError, match="made for another base"):  # it is another base with the delta in it
        LLM(own.plain, adapter=tmp_path / "delta", adapters={"law": own.adapters["law"]})
    assert LLM(own.plain, adapter=tmp_path / "delta").adapters == ()


def test_a_model_in_memory_takes_adapters_once(served: Callable[..., Served]) -> None:
    own, prompt = served(), [5, 6, 7]
    model = load_model(own.plain)
    llm = LLM(model, adapters={"law": own.adapters["law"]})
    assert llm.generate([prompt], params(), adapter="law")[0].token_ids == own.alone("law", own.plain).generate(
        [prompt], params())[0].token_ids
    with pytest.raises(ConfigError, match="adapter law: the model has an adapter of this name already"):
        LLM(model, adapters={"law": own.adapters["law"]})
    with pytest.raises(ConfigError, match="are not trained there"):
        model.train()


def test_spans_of_neighbours_are_one() -> None:
    parts = [(None, 2), ("a", 3), ("a", 1), ("b", 0), ("b", 2), (None, 1), ("a", 1)]
    assert side_by_side(parts) == (("a", slice(2, 6)), ("b", slice(6, 8)), ("a", slice(9, 10)))
    assert side_by_side([(None, 5)]) == ()
