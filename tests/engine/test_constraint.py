"""Constrained output against independent judges: json and jsonschema, re, and a list of all texts that match."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.config import ModelConfig
from deepseek.engine import LLM, SamplingParams
from deepseek.engine.constraint import GRAMMARS, Constraint, Constraints
from deepseek.engine.request import Request
from deepseek.errors import RequestError
from deepseek.grammars import LIMITS
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from tests.helpers.engines import finish

jsonschema = pytest.importorskip("jsonschema", reason="needs the test extra (jsonschema)")
pytest.importorskip("llguidance", reason="needs the test extra (llguidance)")

PADDING = 13  # ids of the model that the tokenizer does not have
EOS = 1
SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["name", "kind", "size"],
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["expert", "gate", "世界", None]},
        "size": {"type": "integer", "minimum": -5, "maximum": 4000},
        "id": {"type": "string", "pattern": "^[a-f]{2}-[0-9]{1,9}$"},
        "tags": {"type": "array", "maxItems": 3, "items": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/pair"}]}}},
    "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "number"}, {"const": "<|User|>"}], "items": False,
                       "minItems": 2}},
    "x-guidance": {"whitespace_pattern": "[ \\n]?"}}
NESTED = 'start: "a" start "b" | /[c-h]/ | "(" start ")"'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = '{"name": "expert", "kind": "gate", "size": 12, "tags": [true, false, null]}\n 世界'
    return Tokenizer.train([text] * 3, 330)


@pytest.fixture(scope="module")
def llm(tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM], tokenizer: Tokenizer) -> LLM:
    config = tiny_config(vocab_size=size(tokenizer), bos_token_id=0, eos_token_id=EOS,
                         max_position_embeddings=1024)
    return LLM(random_model(config), tokenizer=tokenizer, cache_tokens=40_000)


@pytest.fixture
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, size(tokenizer), frozenset({EOS}))


def hot(seeds: int, **params: Any) -> list[SamplingParams]:
    """One a seed, temperatures from 1 to 2."""
    return [SamplingParams(**{"max_tokens": 900, "temperature": 1 + seed / seeds, "seed": seed} | params)
            for seed in range(seeds)]


def of(constraints: Constraints, **params: Any) -> Constraint:
    constraint = constraints.of(SamplingParams(**params))
    assert constraint is not None
    return constraint


def size(tokenizer: Tokenizer) -> int:
    return tokenizer.vocab_size + PADDING


def allowed(constraint: Constraint) -> set[int]:
    logits_V = torch.randn(len(constraint.allowed_V))
    out_V = constraint.allow(logits_V)
    ids = out_V.isfinite().nonzero()[:, 0].tolist()
    assert torch.equal(out_V[ids], logits_V[ids])
    return set(ids)


# ---- what is sampled matches ----------------------------------------------------------------------------------------


def test_json_follows_its_schema(llm: LLM, tokenizer: Tokenizer) -> None:
    params = [replace(one, json_schema=json.dumps(SCHEMA) if i % 2 else SCHEMA) for i, one in enumerate(hot(20))]
    outputs = llm.generate(["x"] * 20, params)
    values = [json.loads(output.text) for output in outputs]
    for value, output in zip(values, outputs, strict=True):
        jsonschema.validate(value, SCHEMA)
        assert output.finish_reason == "stop"
        assert all(5 <= token < tokenizer.vocab_size for token in output.token_ids[:-1])
    assert len({json.dumps(value) for value in values}) > 16 and any("tags" in value for value in values)


@pytest.mark.parametrize("pattern", [
    r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]", r"(true|false|null){1,9}", r"[^a-z]{1,9}", r"^(expert|gate)? ?size$",
    r"世{1,9}界|🙂{3}", r"(?i)expert\.", r"(<\|User\|>)?<\|end_of_sentence\|>"])
def test_text_matches_a_regular_expression(llm: LLM, pattern: str) -> None:
    outputs = llm.generate(["x"] * 20, hot(20, regex=pattern))
    assert len(outputs) == 20
    for output in outputs:
        assert output.finish_reason == "stop" and re.fullmatch(pattern, output.text)
        assert not {0, 2, 3, 4} & {*output.token_ids}


def test_text_follows_a_grammar(llm: LLM) -> None:
    """One that no regular expression describes: taken apart from the inside until only the core is left."""
    outputs = llm.generate(["x"] * 20, hot(20, grammar=NESTED, max_tokens=60))
    whole = [output.text for output in outputs if output.finish_reason == "stop"]
    assert len(whole) >= 15 and max(map(len, whole)) > 4
    for text in whole:
        while len(text) > 1:
            shorter = re.sub(r"a([c-h])b|\(([c-h])\)", r"\1\2", text)
            assert len(shorter) < len(text)
            text = shorter
        assert text in "cdefgh"


def test_what_may_come_next_against_a_list_of_all_that_matches(constraints: Constraints, tokenizer: Tokenizer) -> None:
    """Where several characters may follow, exactly the tokens that begin a rest; where one must, the library insists on
    the usual way to cut the text into tokens. The end exactly where a text is complete."""
    texts = ["true", "trust", "tr", "expert", "expert, true", '{"name": 1}', '{"size": 1}', "<|User|>", "a" * 9]
    spelt = {i: tokenizer.decode([i]) for i in range(5, tokenizer.vocab_size)}
    reached, rng = set(), random.Random(0)
    for _ in range(60):
        constraint, done = of(constraints, regex="|".join(map(re.escape, texts))), ""
        while not constraint.finished:
            rests = [text[len(done):] for text in texts if text.startswith(done)]
            expected = {i for i, piece in spelt.items() if any(rest.startswith(piece) for rest in rests)}
            found = allowed(constraint)
            assert (EOS in found) == ("" in rests)
            found -= {EOS}
            assert found <= expected and found
            assert found == expected or len({rest[:1] for rest in rests}) == 1
            token = rng.choice(sorted(found))
            constraint.accept(token)
            done += spelt[token]
        assert done in texts
        reached.add(done)
    assert reached == {*texts} - {"tr", "expert"}  # after these one may go on, so the walk does


def test_white_space_is_bounded_and_a_schema_may_set_it(constraints: Constraints, tokenizer: Tokenizer) -> None:
    spaces = tokenizer.encode(" \n\t") * 14
    for options, bound in (({}, 40), ({"whitespace_pattern": " "}, 1)):
        constraint = of(constraints, json_schema={"type": "array", "items": False, "x-guidance": options})
        constraint.accept(*tokenizer.encode("["))
        taken = 0
        while spaces[taken] in allowed(constraint):
            constraint.accept(spaces[taken])
            taken += 1
        assert taken == bound


# ---- where it ends --------------------------------------------------------------------------------------------------


def test_it_ends_where_nothing_can_follow_or_where_it_may_and_the_model_wants_to(llm: LLM) -> None:
    params = [SamplingParams(regex="ab?", ignore_eos=True), SamplingParams(regex="x{200}", max_tokens=5),
              SamplingParams(regex="a+", ignore_eos=True, max_tokens=7, temperature=0), SamplingParams(regex="")]
    forced, cut, unending, empty = llm.generate(["x"] * 4, params)
    assert (forced.text, forced.finish_reason) == ("ab", "stop") and EOS not in forced.token_ids
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5) and re.fullmatch("x{5,}", cut.text)
    assert unending.finish_reason == "length" and re.fullmatch("a+", unending.text)
    assert (empty.text, empty.token_ids, empty.finish_reason) == ("", (EOS,), "stop")
    willing = llm.generate(["x"] * 20, hot(20, regex="a*"))
    assert all(output.token_ids[-1] == EOS and set(output.text) <= {"a"} for output in willing)


def test_a_dead_end_ends_the_text(tokenizer: Tokenizer) -> None:
    """The model's vocabulary may be smaller than the tokenizer's: here it has no z."""
    [a], [z] = tokenizer.encode("a"), tokenizer.encode("z")
    constraint = of(Constraints(tokenizer, z, frozenset({EOS})), regex="[ab]{2}z")
    constraint.accept(a)
    assert not constraint.finished and len(allowed(constraint)) == 2
    constraint.accept(a)
    assert constraint.finished and not allowed(constraint)


def test_ids_that_are_no_text_never_come(constraints: Constraints, tokenizer: Tokenizer) -> None:
    """Even where everything may: no control token, no padding; several ids may end a text, if the model has them."""
    no_text = {*range(5), *range(tokenizer.vocab_size, size(tokenizer))}
    assert allowed(of(constraints, regex="(?s:.)*")) & no_text == {EOS}
    [last] = tokenizer.encode("z")
    two = of(Constraints(tokenizer, size(tokenizer), frozenset({EOS, last, 10**6})), regex="[a-z]?")
    assert {EOS, last} <= allowed(two)
    none = of(Constraints(tokenizer, size(tokenizer), frozenset()), regex="a{2,3}")
    assert len(allowed(none)) >= 1 and EOS not in allowed(none)


# ---- beside everything else -----------------------------------------------------------------------------------------


def test_requests_of_a_batch_do_not_touch_one_another(llm: LLM) -> None:
    """Constrained, unconstrained, greedy and sampled, in one batch and each alone."""
    kinds: list[dict[str, Any]] = [{}, {"json_schema": SCHEMA}, {"regex": "[a-z]{5,20}"}, {"grammar": NESTED}]
    params = [SamplingParams(max_tokens=25, temperature=t, seed=7, **kind) for t in (0, 1.5) for kind in kinds]
    prompts = [f"prompt {i}" for i in range(len(params))]
    together = llm.generate(prompts, params)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        alone = llm.generate([prompt], one)[0]
        assert replace(alone, cached_tokens=output.cached_tokens) == output
        assert one.regex is None or re.fullmatch(one.regex, output.text)
    assert not together[0].text.isalnum()


def test_stop_strings_logprobs_streams_choices_and_mixtures(llm: LLM) -> None:
    stopped = llm.generate(["x"] * 8, hot(8, regex="[ab]{3}c[ab]{3}", stop=("c",)))
    assert all(re.fullmatch("[ab]{3}", output.text) and output.finish_reason == "stop" for output in stopped)
    params = SamplingParams(regex="[ab]{3}-", logprobs=2, seed=1, n=3)
    outputs = llm.generate(["x"], params)[0].choices
    for output in outputs:
        assert re.fullmatch("[ab]{3}-", output.text) and output.logprobs is not None
        assert [one.token for one in output.logprobs] == [*output.token_ids]
        assert output.logprobs[-1].logprob == 0.0 and all(one.logprob > -20 for one in output.logprobs)
    assert "".join(llm.stream("x", params)) == outputs[0].text
    assert re.fullmatch("[ab]{3}-", llm.generate_ensemble(["x", "y"], [1, 2], params).text)


# ---- errors and laziness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "message"), [
    ({"json_schema": '{"type":'}, r"json_schema = '{\"type\":': Expecting value: line 1"),
    ({"json_schema": "[]"}, r"json_schema = '\[\]': must be a JSON object"),
    ({"json_schema": {"type": "blah"}}, "Invalid type: blah"),
    ({"json_schema": {"const": {1}}}, "not JSON serializable"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ."uniqueItems"'),
    ({"json_schema": {"const": "\ud800"}}, "json_schema"),
    ({"json_schema": {"x-guidance": {"no": 1}}}, "unknown field `no`"),
    ({"json_schema": '{"a":' * 20_000 + "1" + "}" * 20_000}, "recursion"),
    ({"regex": "(a"}, r"regex = '\(a': .*unclosed group"), ({"regex": "(?=a)b"}, "look-around.* not supported"),
    ({"regex": r"[^\x00-\x{10ffff}]"}, "no token can begin a text that matches"), ({"regex": "\ud800"}, "surrogate"),
    ({"grammar": "start: foo"}, 'grammar = .*unknown name: "foo"'), ({"grammar": ""}, "Empty grammar"),
    ({"grammar": "start: <|User|>"}, "unknown special token"), ({"grammar": "start: <[3]>"}, "no token can begin")])
def test_errors_are_one_line_with_the_reason(llm: LLM, params: dict[str, Any], message: str) -> None:
    for _ in range(2):  # nothing that failed is kept
        with pytest.raises(RequestError, match=f"^prompt 1: .*{message}") as error:
            llm.generate(["x", "x"], [SamplingParams(), SamplingParams(**params)])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert llm.generate(["x"], SamplingParams(regex="abc"))[0].text == "abc"


def test_what_is_missing_is_named(llm: LLM, constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=3, regex="a")
    with pytest.raises(RequestError, match="constrained output needs a tokenizer"):
        LLM(llm.model, cache_tokens=1024).generate([[7]], params)
    words = Tokenizer(json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    with pytest.raises(RequestError, match="needs a byte-level tokenizer"):
        Constraints(words, 5, frozenset()).of(params)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert constraints.of(replace(params, regex=None)) is None
    with pytest.raises(RequestError, match=r"pip install 'moe-dr\[llguidance\]'"):
        constraints.of(params)


def test_a_grammar_is_compiled_once_and_requests_walk_alone(constraints: Constraints, tokenizer: Tokenizer) -> None:
    [a], [b] = tokenizer.encode("a"), tokenizer.encode("b")
    one = of(constraints, json_schema=SCHEMA)
    first, again = of(constraints, regex="[ab]{2}"), of(constraints, regex="[ab]{2}")
    first.accept(a)
    first.accept(b)
    assert first.finished and not again.finished and {a, b} <= allowed(again) and not allowed(one) & {a, b}
    of(constraints, json_schema=dict(SCHEMA))
    of(constraints, json_schema=json.dumps(SCHEMA))
    assert constraints.compiled.cache_info()[:2] == (3, 2)  # hits, misses
    for i in range(GRAMMARS + 5):
        of(constraints, regex=f"a{{{i + 1}}}")
    assert constraints.compiled.cache_info().currsize == GRAMMARS


def test_reasoning_is_free_before_a_constraint(llm: LLM) -> None:
    """As with a template that opens `<think>`: any text up to the marker, from there on what matches."""
    ids = llm.encode("the expert")
    params = SamplingParams(max_tokens=200, seed=0, regex="[ab]{3}", logit_bias={EOS: -100})
    request, = llm.requests(ids, params, constraint_after="e")
    finish(llm, request)
    free, marker, answer = request.text.partition("e")
    assert marker and not re.fullmatch("[ab]*", free)
    assert re.search("[ab]{3}$", answer) and request.finish_reason == "stop"


def chain(count: int, link: Callable[[int], Any]) -> dict[str, Any]:
    return {"$ref": "#/$defs/d0", "$defs": {f"d{i}": link(i + 1) for i in range(count)} | {f"d{count}": {"const": 1}}}


@pytest.mark.parametrize("params", [
    {"json_schema": json.dumps(chain(1000, lambda i: {"type": "object", "properties": {
        "x": {"$ref": f"#/$defs/d{i}"}}}))},
    {"json_schema": json.dumps(chain(1000, lambda i: {"$ref": f"#/$defs/d{i}"}))},
    {"json_schema": json.dumps(chain(1000, lambda i: {"anyOf": [{"$ref": f"#/$defs/d{i}"}, {"const": 2}]}))},
    {"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000},
    {"json_schema": json.dumps({"enum": ["x" * 9 + str(i) for i in range(40_000)]})},
    {"json_schema": json.dumps({"type": "string", "pattern": "a?" * 20_000})},
    {"json_schema": json.dumps({"type": "array", "maxItems": 10**9, "items": {"type": "string", "maxLength": 10**9}})},
    {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1} \"x\"?\n" for i in range(2700)) + 'r2700: "y"'},
    {"grammar": "start: s\ns: s s s | s s | /[a-z ]/"},
    {"grammar": "start: A\nA: /" + "a?" * 20_000 + "/"},
    {"grammar": 'start: "a"' + ' "b"?' * 10_000},
    {"regex": "a?" * 100_000}, {"regex": "a?" * 4_000}, {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(a|b|ab)*c{1000000}"}, {"regex": "(" * 4000 + "a" + ")" * 4000},
], ids=lambda params: f"{next(iter(params))} {str(next(iter(params.values())))[:24]}")
def test_no_grammar_ends_the_process(llm: LLM, params: dict[str, Any]) -> None:
    """It is refused, or runs, or ends its own request with an error; another request beside it has its usual text."""
    alone = llm.generate(["the expert"], SamplingParams(max_tokens=12, temperature=0))[0].text
    other, = llm.requests("the expert", SamplingParams(max_tokens=12, temperature=0))
    try:
        group = llm.requests("x", SamplingParams(max_tokens=40, seed=0, **params))
    except RequestError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        group = []
    finish(llm, other, *group)
    assert other.text == alone
    for request in group:
        assert request.finish_reason is not None
        assert request.error is None or isinstance(request.error, RequestError)


def test_a_limit_on_the_way_is_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of a text that looks as if it were whole."""
    monkeypatch.setitem(LIMITS, "max_items_in_row", 60)
    request, = llm.requests("x", SamplingParams(max_tokens=200, seed=0, ignore_eos=True,
                                                grammar="start: s\ns: s s s | s s | /[a-z]/"))
    finish(llm, request)
    assert isinstance(request.error, RequestError) and "outgrew its limits" in str(request.error)


def slow(request: Request, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let every mask of a request wait for the event that is returned."""
    assert request.constraint is not None
    gate, advance = threading.Event(), request.constraint.advance

    def wait_and_advance(token: int) -> tuple[bool, np.ndarray]:
        assert gate.wait(30)
        return advance(token)

    monkeypatch.setattr(request.constraint, "advance", wait_and_advance)
    return gate


def test_others_go_on_while_a_mask_is_computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=30, seed=3, regex="[a-c]{20,25}")
    usual = llm.generate(["x"], params)[0].text
    late, = llm.requests("x", params)
    other, = llm.requests("the expert", SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    gate = slow(late, monkeypatch)
    llm.engine.add(late, other)
    while other.finish_reason is None:
        llm.engine.step()
    assert late.finish_reason is None and late.pending and len(late.token_ids) == 1
    assert llm.engine.step() == []  # nothing to do but to wait
    gate.set()
    finish(llm)
    assert late.text == usual and late.finish_reason == "stop"


@pytest.mark.parametrize("ends", ["limit", "grammar", "error", "abort"])
def test_a_request_that_waits_for_its_mask_ends_as_any(llm: LLM, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """Its caller is told when the mask is there; its pages go back."""
    request, = llm.requests("x", SamplingParams(max_tokens=1 if ends == "limit" else 9, seed=3,
                                                regex="[ab]" if ends == "grammar" else "[ab]{9}"))
    told: list[str | None] = []
    request.on_token = lambda one: told.append(one.finish_reason)
    free, gate = llm.engine.block_manager.available, slow(request, monkeypatch)
    if ends == "error":
        monkeypatch.setattr(request.constraint, "read", lambda *_: (_ for _ in ()).throw(RequestError("outgrew")))
    llm.engine.add(request)
    for _ in range(3):
        llm.engine.step()
    assert told == [None] and request.pending
    if ends == "abort":
        llm.engine.abort(request)
    gate.set()
    finish(llm)
    assert told[-1] == request.finish_reason == {"limit": "length", "grammar": "stop"}.get(ends, ends)
    assert llm.engine.block_manager.available == free and (ends == "error") == isinstance(request.error, RequestError)


def test_a_request_steps_back_while_it_waits_for_its_mask(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=30, seed=5, regex="[a-c]{20,25}")
    usual = llm.generate(["x"], params)[0].text
    other, = llm.requests("the expert", SamplingParams(max_tokens=3, ignore_eos=True))
    request, = llm.requests("x", params)
    gate = slow(request, monkeypatch)
    llm.engine.add(other, request)
    while not request.pending:
        llm.engine.step()
    llm.engine.scheduler.preempt(request)
    while other.finish_reason is None:
        llm.engine.step()
    assert llm.engine.scheduler.waiting == [request]
    gate.set()
    finish(llm)
    assert request.text == usual


def test_late_masks_do_not_hold_up_fast_ones(llm: LLM, constraints: Constraints, tokenizer: Tokenizer) -> None:
    """Those that were late once wait for one another, on a thread of their own."""
    gate, [a] = threading.Event(), tokenizer.encode("a")
    late = [of(constraints, regex="a*") for _ in range(8)]
    for one in late:
        one.late = True
        one.advance = lambda token: (gate.wait(30), np.ones(1 << 12, bool))  # type: ignore
        one.accept(a)
    fast = of(constraints, regex="a{3}")
    for _ in range(3):
        fast.accept(a)
        assert fast.settle(30)
    assert fast.finished and all(one.pending for one in late)
    gate.set()
    assert all(one.settle(30) and not one.finished for one in late)


def test_late_masks_are_the_usual_ones(constraints: Constraints, tokenizer: Tokenizer) -> None:
    for field, text in (({"regex": "[a-c]{2,4}x?"}, "abcx"), ({"json_schema": {"type": "boolean"}}, "true"),
                        ({"grammar": 'start: "a" start | "b"'}, "aab")):
        usual, late = of(constraints, **field), of(constraints, **field)
        late.late = True
        for token in tokenizer.encode(text):
            for one in (usual, late):
                one.accept(token)
            assert torch.equal(usual.allowed_V, late.allowed_V) and usual.finished == late.finished
