"""Decisions of a pool, run: adapters, named groups, passages, and parts one after the other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import KnowledgeBase
from deepseek.atlas.atlas import Atlas, NamedGroup, Shape
from deepseek.engine import LLM, ExpertControl
from deepseek.engine.routing import JOINT, Answer, GateReader
from deepseek.engine.run_batch import run_file
from deepseek.errors import ConfigError, MoEDRError, RequestError
from deepseek.ids import ExpertSet
from deepseek.model import CausalLM
from deepseek.ops.native import native
from deepseek.route import BASE, ExpertPool, Fusion, PoolMember, fuse_expert_outputs
from deepseek.route.routing import RoutedPart, RoutingDecision
from deepseek.route.scorers import make_scorer
from tests.engine.test_adapters import Served, served  # noqa: F401 - a fixture
from tests.helpers.chat_templates import with_template
from tests.helpers.engines import nf4, params
from tests.helpers.jsonl import write_jsonl
from tests.helpers.planted import LETTERS, plant, text

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
TOKENIZER = with_template(TEMPLATE)
NAMES = ["law_expert", "code_expert", "med_expert", "math_expert"]


def member(name: str, kind: Any = "experts", **more: Any) -> PoolMember:
    return PoolMember(name, {"law": "law contracts courts", "med": "fever disease doctor"}.get(
        name.partition("_")[0], f"only {name}"), kind, **more)


@dataclass
class Parts:
    """A router for which every line after the first is a part, served by the member of its first word; the first is the
    context of all."""

    pool: ExpertPool
    asked: list[str] = field(default_factory=list)

    @property
    def adapters(self) -> Mapping[str, Any]:
        return self.pool.adapters

    @property
    def groups(self) -> Sequence[str]:
        return self.pool.groups

    def route(self, text: str) -> RoutingDecision:
        self.asked.append(text)
        return RoutingDecision(self.pool.only(text.split()[0]))

    def parts(self, text: str) -> list[RoutedPart]:
        context, *lines = text.splitlines()
        return [RoutedPart(line, self.route(line), context=context) for line in lines]


@pytest.fixture(scope="module")
def model(tiny_config: Callable, random_model: Callable) -> CausalLM:
    config = tiny_config(vocab_size=TOKENIZER.vocab_size, num_hidden_layers=4, n_routed_experts=16, n_group=4,
                         topk_group=2, num_experts_per_tok=3, max_position_embeddings=1024, qk_nope_head_dim=16,
                         v_head_dim=16)
    return random_model(config)


@pytest.fixture(scope="module")
def folder(model: CausalLM, tmp_path_factory: Any) -> Path:
    """A quantized model with a chat template and an atlas of four names."""
    folder = nf4(model, tmp_path_factory.mktemp("routing"), TOKENIZER)
    Atlas.built_in(model.config, NAMES).save(folder)
    return folder


@pytest.fixture(scope="module")
def books(tmp_path_factory: Any) -> KnowledgeBase:
    place = tmp_path_factory.mktemp("books")
    (place / "law.md").write_text("# Ends of contracts\n\nA contract ends with notice of seven weeks.\n")
    (place / "med.md").write_text("# Fever\n\nA fever of two days wants a doctor.\n")
    base = KnowledgeBase(place / "books.knowledge")
    base.add([place / "law.md", place / "med.md"])
    return base


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_adapters_of_a_decision_answer_as_the_mixture_of_their_weights(
        served: Callable[..., Served]) -> None:  # noqa: F811
    own, prompt = served(), list(range(5, 60))
    asked = params(max_tokens=4, logprobs=1)
    here = {name: PoolMember(name, name, "adapter", path) for name, path in own.adapters.items()}
    fusion = fuse_expert_outputs({here["law"]: 0.6, here["med"]: 0.2, here["code"]: 0.05, member("x"): 0.0})
    assert fusion.names == ("law", "med")
    llm = own.llm()
    got, = llm.generate([prompt], asked, routing=fusion)
    want, = llm.generate([prompt], asked, adapter={"law": 0.75, "med": 0.25})
    assert got.token_ids == want.token_ids and got.logprobs == want.logprobs
    base, through = llm.generate([prompt] * 2, asked, routing=[False, RoutingDecision(fusion)])
    assert base.logprobs != through.logprobs == want.logprobs
    assert base.routing is None and through.routing is not None
    assert [one["weight"] for one in through.routing[0]["members"]] == [0.75, 0.25]


def test_a_pool_decides_where_nothing_else_is_said(served: Callable[..., Served]) -> None:  # noqa: F811
    own, asked = served(), params(max_tokens=4, logprobs=1)
    pool = ExpertPool([replace(member("law", "adapter", path=own.adapters["law"])),
                       replace(member("med", "adapter", path=own.adapters["med"]))])
    llm = LLM(own.four, pool=pool)
    assert llm.adapters == ("law", "med")
    texts = ["contracts of the law", "0123456789", "a doctor for the fever"]
    got = llm.generate(texts, asked)
    want = llm.generate(texts, asked, adapter=["law", None, "med"], routing=[None, False, None])
    assert [one.logprobs for one in got] == [one.logprobs for one in want]
    assert [one.routing and one.routing[0]["members"][0]["name"] for one in got] == ["law", "base", "med"]
    assert all(one.routing is None for one in want)
    ids = llm.encode(texts[0])
    assert llm.generate([ids], asked)[0].routing is None, "token ids are not read"
    assert "".join(llm.stream(texts[0], asked)) == got[0].text
    with pytest.raises(RequestError, match="adapter = 'law': must not stand beside routing"):
        llm.generate(texts, asked, adapter="law", routing=pool.only("med"))


def test_members_answer_as_an_ensemble_whose_weights_follow_the_text(
        served: Callable[..., Served]) -> None:  # noqa: F811
    own, prompt = served(), list(range(5, 40))
    here = {name: PoolMember(name, name, "adapter", path) for name, path in own.adapters.items()}
    fusion, llm = fuse_expert_outputs({here["law"]: 0.7, here["med"]: 0.3}), own.llm(own.plain)
    asked = params(max_tokens=3, logprobs=0, ignore_eos=True)
    for posterior in (False, True):
        got = llm.generate_ensemble([prompt], params=asked, routing=fusion, posterior=posterior)
        weight, ids = torch.tensor([0.7, 0.3], dtype=torch.float64), list(prompt)
        for token, said in zip(got.token_ids, got.logprobs or (), strict=True):
            alone = [llm.generate([ids], params(max_tokens=1, logit_bias={token: 100.0}, logprobs=0), adapter=name)[0]
                     for name in ("law", "med")]
            p = torch.tensor([one.logprobs[0].logprob for one in alone], dtype=torch.float64).exp()
            assert said.logprob == pytest.approx(float((weight * p).sum().log()), abs=1e-4)
            weight = weight * p / (weight * p).sum() if posterior else weight
            ids.append(token)
        assert not posterior or abs(float(weight[0]) - 0.7) > 1e-3
    with pytest.raises(RequestError, match="must be with one prompt in a list and without weights"):
        llm.generate_ensemble([prompt, prompt], routing=fusion)


# ---- named groups ---------------------------------------------------------------------------------------------------


def test_named_groups_are_a_hint_and_with_a_bias_a_preference(folder: Path) -> None:
    members = [member(name) for name in NAMES]
    llm, asked = LLM(folder, pool=ExpertPool(members)), params(max_tokens=3, logprobs=1, routed=True)
    exact, base = llm.generate(["law contracts"] * 2, asked, routing=[None, False])
    assert exact.routing is not None and exact.routing[0]["kind"] == "experts"
    assert exact.logprobs == base.logprobs and torch.equal(exact.routed, base.routed)
    request, = Answer(llm, "law contracts", asked).requests
    assert (request.domain, request.ahead) == ("law_expert", ("law_expert",))
    biased = LLM(folder, pool=ExpertPool(members, bias=5.0)).generate("law contracts", asked)[0]
    asked = replace(asked, experts=ExpertControl(bias={"law_expert": 5.0}))
    want = llm.generate("law contracts", asked, routing=False)[0]
    assert biased.logprobs == want.logprobs != base.logprobs
    assert want.routed is not None and (want.routed < 4).sum() > (base.routed < 4).sum()


@pytest.mark.skipif(native is None, reason="experts are left on disk by the native kernels")
def test_experts_of_a_decision_are_read_ahead(folder: Path) -> None:
    llm = LLM(folder, pool=ExpertPool([member(name) for name in NAMES]), expert_memory="1MiB")
    own = llm.engine.residency
    assert own is not None and not own.stats.prefetched
    answer = Answer(llm, "fever", params(max_tokens=0))
    assert answer.requests[0].ahead == ("med_expert",)
    with llm.engine.lock:
        llm.engine.add(*answer.requests)
    assert own.stats.prefetched == 3 * 4
    with own._changed:
        assert own._changed.wait_for(lambda: not any(layer.in_flight for layer in own.layers), 10)
    assert own.loaded(0).nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_the_gates_themselves_may_decide(tmp_path: Path) -> None:
    planted, names = plant(tmp_path), list(LETTERS)
    folder = planted.folder
    Atlas(Shape.of(planted.model.config),
          [NamedGroup(name, "measured", ExpertSet(planted.experts[name])) for name in names]).save(folder)
    for samples in (12, 0):
        pool = ExpertPool([PoolMember(name, f"only {name}", samples=[one.text for one in text(name, samples, seed=3)])
                           for name in names], "gate")
        with pytest.raises(ConfigError, match="must be used with one"):
            pool.route("abc")
        llm = LLM(folder, pool=pool)
        for name in names:
            decision = pool.route(text(name, 1, 80, seed=4)[0].text)
            assert decision.fusion.names[0] == name and decision.scorer == "gate", (samples, decision)
        spent = llm.engine.stats.routing_tokens
        answer, = llm.generate("abcdefgh", params(max_tokens=1))
        assert answer.routing is not None and answer.routing[0]["members"][0]["name"] == "early"
        assert llm.engine.stats.routing_tokens - spent == answer.prompt_tokens and llm.engine.stats.routing_seconds > 0
        with pytest.raises(ConfigError, match="each model must have its own"):
            LLM(folder, pool=pool)
        share_LE = GateReader(llm).histogram("abcdefgh" * 4).reshape(2, 16)
        assert {*share_LE[0].nonzero()[0]} == {e.index for e in planted.experts["early"] if e.layer == 1}
        assert share_LE.sum(1) == pytest.approx(1.0)
    del llm
    with pytest.raises(ConfigError, match="the model that used the pool is gone"):
        pool.route("abc")
    llm = LLM(folder, pool=pool)
    assert pool.route(text(names[0], 1, 80, seed=4)[0].text).fusion.names[0] == names[0]
    with pytest.raises(ConfigError, match="other: must have samples, or be a named group"):
        make_scorer([PoolMember("other", "x", "adapter", folder)], "gate", gates=GateReader(llm))


# ---- knowledge ------------------------------------------------------------------------------------------------------


def test_passages_stand_in_the_prompt_and_are_cited(folder: Path, books: KnowledgeBase) -> None:
    knows = PoolMember("books", "contracts, notice, fever", "knowledge", books.path)
    llm, asked = LLM(folder, pool=ExpertPool([knows])), params(max_tokens=2, logprobs=1)
    asks = "what notice has a contract?"
    for prompt in (asks, user(asks)):
        got, without = llm.generate([prompt, prompt], asked, routing=[None, False])
        assert got.routing is not None and got.prompt_tokens > without.prompt_tokens + 40
        first = got.routing[0]["passages"][0]
        assert first["number"] == 1 and "seven weeks" in first["text"] and first["file"].endswith("law.md")
        decoded = llm.tokenizer.decode(Answer(llm, prompt, asked).requests[0].prompt_ids)
        assert "> A contract ends with notice of seven weeks." in decoded
    empty = Fusion((knows,), (1.0,), "knowledge")
    with pytest.raises(RequestError, match="not token ids"):
        llm.generate([[5, 6]], asked, routing=empty)


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_parts_are_answered_one_after_the_other(folder: Path) -> None:
    pool = Parts(ExpertPool([member(name) for name in NAMES]))
    llm, asked = LLM(folder, pool=pool), params(max_tokens=400, stop=("a", "e", "o", "i", "u", "0", "1"))
    text = "our clause\nlaw_expert contracts\nmed_expert 发烧怎么办\ncode_expert c"
    got, = llm.generate([user(text)], asked)
    assert got.routing is not None
    assert [one["text"] for one in got.routing] == text.splitlines()[1:]
    assert [one["members"][0]["name"] for one in got.routing] == ["law_expert", "med_expert", "code_expert"]
    answer = Answer(llm, user(text), asked)
    said = []
    while requests := answer.requests if not said else answer.advance():
        llm.driver.generate(*requests)
        said.append(requests[0].text)
    assert got.text == JOINT.join(said) == answer.output().text and len(said) == 3
    seen = [llm.tokenizer.decode(group[0].prompt_ids) for group in answer.groups]
    assert seen[0].endswith("[user] our clause\n\nlaw_expert contracts\n[assistant] ")
    for number in (1, 2):
        line = text.splitlines()[number + 1]
        assert seen[number] == f"{seen[number - 1]}{said[number - 1]}\n[user] {line}\n[assistant] "
    assert [group[0].domain for group in answer.groups] == ["law_expert", "med_expert", "code_expert"]
    assert answer.groups[1][0].sequence.cached_tokens > 0, "they share the conversation"
    assert got.prompt_tokens == sum(len(group[0].prompt_ids) for group in answer.groups)
    assert "".join(llm.stream(user(text), asked)) == got.text
    prompts: list[Any] = [user(text), "law_expert", user("med_expert x")]
    many = llm.generate(prompts, asked)
    assert many[0].text == got.text and [len(one.routing or ()) for one in many] == [3, 1, 1]


@pytest.mark.parametrize("changes", [dict(n=2), dict(regex="a"), dict(routed=True), dict(prompt_logprobs=0)], ids=str)
def test_what_asks_for_one_text_is_answered_whole(folder: Path, changes: dict[str, Any]) -> None:
    llm = LLM(folder, pool=Parts(ExpertPool([member(name) for name in NAMES])))
    got = Answer(llm, user("law_expert a\nmed_expert b"), params(max_tokens=2, **changes))
    assert len(got.trace) == 1 and got.trace[0]["members"][0]["name"] == "law_expert"
    assert not Answer(llm, [*user("x"), {"role": "assistant", "content": "y"}], params(), routing=False)._divisible


def test_parts_share_max_tokens_and_end_where_the_context_does(folder: Path) -> None:
    pool = Parts(ExpertPool([member(name) for name in NAMES]))
    llm = LLM(folder, pool=pool)
    text = "law_expert\nlaw_expert\nmed_expert"
    got, = llm.generate([user(text)], params(max_tokens=9, ignore_eos=True))
    assert (got.finish_reason, len(got.token_ids), len(got.routing or ())) == ("length", 9, 2)
    assert got.routing is not None and not any("error" in part for part in got.routing)
    answer = Answer(llm, user("x\nlaw_expert a\nmed_expert b\ncode_expert c"), params(max_tokens=8, ignore_eos=True))
    while requests := answer.requests if not answer.requests[0].done.is_set() else answer.advance():
        llm.driver.generate(*requests)
    assert [len(group[0].token_ids) for group in answer.groups] == [3, 3, 2] and answer.finish_reason() == "length"
    long = "x7\nlaw_expert\nmed_expert " + "x7" * 500
    got, = llm.generate([user(long)], params(max_tokens=300, stop_token_ids=tuple(range(llm.model.config.vocab_size))))
    assert got.finish_reason == "length" and got.routing is not None and len(got.routing) == 2
    assert "must leave room" in got.routing[1]["error"] and got.routing[1]["text"].startswith("med_expert")


def test_log_probabilities_of_parts_stand_where_the_text_does(folder: Path) -> None:
    llm = LLM(folder, pool=Parts(ExpertPool([member(name) for name in NAMES])))
    asked = params(max_tokens=400, logprobs=0, stop=("a", "e", "o", "i", "u", "0", "1"))
    answer = Answer(llm, user("x\nlaw_expert a\nmed_expert b"), asked)
    while requests := answer.requests if not answer.requests[0].done.is_set() else answer.advance():
        llm.driver.generate(*requests)
    first, second = answer.groups
    got = answer.output()
    assert got.logprobs is not None and len(got.logprobs) == len(got.token_ids)
    after = len(first[0].text) + len(JOINT)
    assert [one.offset for one in got.logprobs[len(first[0].token_ids):]] == [
        after + one.offset for one in second[0].logprobs]


def test_no_part_follows_where_max_tokens_are_used_up(folder: Path) -> None:
    llm = LLM(folder, pool=Parts(ExpertPool([member(name) for name in NAMES])))
    every = tuple(range(llm.model.config.vocab_size))
    got, = llm.generate([user("x\nlaw_expert a\nmed_expert b")], params(max_tokens=1, stop_token_ids=every))
    assert (got.finish_reason, got.text, len(got.token_ids)) == ("length", "", 1)
    assert got.routing is not None and "max_tokens = 1: the parts before have used all" in got.routing[1]["error"]


def test_all_parts_are_checked_before_one_runs(folder: Path) -> None:
    llm = LLM(folder)
    pool = Parts(ExpertPool([member("law_expert"), member("poet_expert")]))
    with pytest.raises(RequestError, match="poet_expert: must be a named group"):
        llm.generate([user("x\nlaw_expert a\npoet_expert b")], params(max_tokens=2), routing=pool)
    assert not llm.engine.stats.computed


def test_a_fusion_is_told_in_the_output_with_its_bias(folder: Path) -> None:
    llm = LLM(folder)
    fusion = ExpertPool([member("law_expert")], bias=0.5).only("law_expert")
    got, = llm.generate(["x"], params(max_tokens=1), routing=fusion)
    assert got.routing == ({"members": [{"name": "law_expert", "kind": "experts", "weight": 1.0}], "kind": "experts",
                            "bias": 0.5},)


def test_passages_do_not_stand_among_control_tokens(folder: Path, books: KnowledgeBase) -> None:
    llm = LLM(folder, pool=ExpertPool([PoolMember("books", "contracts, notice, fever", "knowledge", books.path)]))
    with pytest.raises(RequestError, match="parse_special: must not be with passages"):
        llm.generate(["what notice has a contract?"], params(), parse_special=True)


def test_the_pool_decides_for_stream_async(folder: Path) -> None:
    llm = LLM(folder, pool=Parts(ExpertPool([member(name) for name in NAMES])))
    asked = params(max_tokens=400, stop=("a", "e", "o", "i", "u", "0", "1"))
    prompt, answers = user("x\nlaw_expert a\nmed_expert b"), list[Answer]()

    async def texts() -> list[str]:
        found: dict[int, str] = {}
        async for request in llm.stream_async(prompt, asked, on_answer=answers.append):
            found[request.request_id] = request.text
        return [*found.values()]

    assert JOINT.join(asyncio.run(texts())) == llm.generate([prompt], asked)[0].text
    assert [part["members"][0]["name"] for part in answers[0].trace] == ["law_expert", "med_expert"]


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("routing", "said"), [
    (Fusion((member("none", "adapter", path=Path("x")),)), "adapter = 'none': is no adapter that was loaded"),
    (Fusion((member("poet_expert"),)), "poet_expert: must be a named group of the model's atlas, which has law_expert"),
    (Fusion((print,), (1.0,), "callable"), "must be of kind base, experts, adapter, knowledge"),
    (Fusion((member("law_expert"),), (0.0,)), "law_expert: weight = 0.0: must be a positive number"),
    (Fusion((member("law_expert"),), (0.5, 0.5)), "2 weights for 1 members"),
    ({"law": 1.0}, "must be a Fusion or a decision"), (True, "this LLM has no pool")], ids=str)
def test_wrong_decisions_are_refused(folder: Path, routing: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        LLM(folder).generate("x", params(), routing=routing)
    with pytest.raises(RequestError, match="must be a Fusion or a decision"):
        LLM(folder).generate_ensemble(["x"], routing=ExpertPool())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="routing has 3 entries"):
        LLM(folder).generate(["x", "y"], params(), routing=[False, False, None])


def test_a_pool_that_does_not_fit_the_model_is_refused_at_the_start(
        folder: Path, model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.engine.llm.load_model", None)  # said before weights are read
    with pytest.raises(ConfigError, match="pool: poet_expert: is no named group of the model's atlas, which has law"):
        LLM(folder, pool=ExpertPool([member("poet_expert"), member("law_expert")]))
    with pytest.raises(ConfigError, match="atlas, which has none"):
        LLM(model, pool=ExpertPool([member("law_expert")]))
    with pytest.raises(ConfigError, match=r"pool = 'pool.yaml': must be a pool"):
        LLM(folder, pool="pool.yaml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adapters: a: the pool has an adapter of that name"):
        LLM(folder, adapters={"a": folder}, pool=ExpertPool([member("a", "adapter", path=folder)]))


def test_the_base_alone_is_the_base(folder: Path) -> None:
    llm = LLM(folder, pool=ExpertPool())
    alone, pooled = llm.generate(["x law"] * 2, params(logprobs=0), routing=[False, None])
    assert alone.logprobs == pooled.logprobs and pooled.routing is not None
    assert pooled.routing[0]["members"][0]["name"] == BASE.name
    assert pooled.routing[0]["abstained"] == "the pool is empty"


def test_a_file_of_prompts_is_routed_line_by_line(folder: Path, tmp_path: Path) -> None:
    llm, asked = LLM(folder, pool=Parts(ExpertPool([member(name) for name in NAMES]))), params(max_tokens=3)
    parts: dict[str, Any] = {"max_tokens": 400, "stop": ("a", "e", "o", "i", "u", "0", "1")}
    composite = user("law_expert a\nmed_expert b\ncode_expert c")
    lines: list[dict[str, Any]] = [
        {"prompt": "law_expert a"}, {"messages": composite, **parts},
        {"prompt": "law_expert a", "pool": False}, {"prompt": "x", "pool": "no"}, {"prompt": "x", "model": "poet"}]
    write_jsonl(tmp_path / "in.jsonl", lines)
    assert run_file(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", asked) == (5, 2)
    one, two, base, *wrong = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert one["routing"][0]["members"][0]["name"] == "law_expert" and "routing" not in base
    assert [part["members"][0]["name"] for part in two["routing"]] == ["med_expert", "code_expert"]
    assert two["text"] == llm.generate([composite], params(**parts))[0].text
    assert "pool = 'no': must be true or false" in wrong[0]["error"] and "poet" in wrong[1]["error"]


def test_a_line_that_asks_for_the_pool_does_not_get_the_adapter_of_the_others(
        served: Callable[..., Served], tmp_path: Path) -> None:  # noqa: F811
    own = served()
    llm = LLM(own.four, pool=ExpertPool([member("law", "adapter", path=own.adapters["law"])]))
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": "law"}, {"prompt": "law", "pool": True}])
    run_file(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", params(max_tokens=1), adapter="law")
    given, asked = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert "routing" not in given and asked["routing"][0]["members"][0]["name"] == "law"


def test_an_adapter_of_another_base_is_refused_at_the_start(
        folder: Path, served: Callable[..., Served]) -> None:  # noqa: F811
    pool = ExpertPool([PoolMember("law", "law", "adapter", served().adapters["law"])])
    with pytest.raises(MoEDRError, match="law: made for a base of other sizes"):
        LLM(folder, pool=pool)
