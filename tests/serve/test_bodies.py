"""Large bodies are counted before they are parsed, parsed beside the event loop, and told of their first fault."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from deepseek.engine import LLM
from deepseek.engine.sampler import Adjustment
from deepseek.engine.sampling_params import SamplingParams
from deepseek.serve import bodies, connections, service
from deepseek.serve.bodies import parse
from deepseek.serve.middleware import ServeError
from deepseek.serve.options import ServeOptions
from deepseek.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from tests.helpers.servers import AUTH, Running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "fox", "max_tokens": 2}
MANY = [{"role": "user", "content": "x"}] * 60_000


def marks(value: Any) -> int:
    """Objects, lists and members."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(marks, value.values()))
    return 1 + sum(map(marks, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize("piece", [1, 7, 1 << 15])
def test_marks_are_counted_outside_of_strings(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PIECE", piece)
    draw = random.Random(piece)

    def text() -> str:
        return "".join(draw.choice('\\"{[:,]}a\n') for _ in range(draw.randrange(8)))

    def value(depth: int) -> Any:
        kind = draw.randrange(5 if depth < 5 else 2)
        if kind < 2:
            return text() if kind else draw.randrange(100)
        return ({text(): value(depth + 1) for _ in range(draw.randrange(4))} if kind == 2
                else [value(depth + 1) for _ in range(draw.randrange(5))])

    for _ in range(500):
        made = value(0)
        count, raw = marks(made), json.dumps(made).encode()
        assert bodies.count_marks(raw, b"{[:", b"") == [count, 0]


@pytest.mark.parametrize(("form", "body"), [
    (ChatRequest, CHAT | {"messages": MANY}), (ResponsesRequest, {"model": "tiny", "input": MANY}),
    (TokenizeRequest, {"messages": MANY}), (ChatRequest, CHAT | {"metadata": {"a": [[]] * 300_000}}),
    (ChatRequest, CHAT | {"chat_template_kwargs": {f"v{i}": i for i in range(100_000)}}),
    (CompletionRequest, TEXT | {"prompt": [1] * 600_000}), (CompletionRequest, TEXT | {"prompt": ["x"] * 600_000}),
], ids=lambda value: str(value)[:60])
def test_too_much_is_refused_before_it_is_parsed(form: Any, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps(body).encode()
    assert len(raw) < 4 << 20
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ServeError, match=r"the body has more than [0-9,]+ (objects|items)") as raised:
        parse(raw, form)
    assert raised.value.status == 400


def test_what_is_written_in_strings_counts_as_text() -> None:
    code = '{"a": [1, 2]}\\' * 60_000
    assert parse(json.dumps(TEXT | {"prompt": code}).encode(), CompletionRequest).prompt == code


@pytest.mark.parametrize(("form", "body", "where"), [
    (ChatRequest, CHAT | {"messages": [{"role": "usr", "content": 1}] * 4000}, "messages.0"),
    (ChatRequest, CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}] * 4000}]},
     "messages.0.content.0.text"),
    (ChatRequest, CHAT | {f"v{i}": i for i in range(50_000)}, "v0"),
    (ChatRequest, CHAT | {"deepseek": {f"v{i}": None for i in range(50_000)}}, "deepseek.v0"),
    (ChatRequest, CHAT | {"logit_bias": {f"a{i}": i for i in range(50_000)}}, "logit_bias"),
    (ChatRequest, CHAT | {"logit_bias": {"5": 1, "6": "1"}}, "logit_bias"),
    (ChatRequest, CHAT | {"deepseek": {"experts": {"bias": {f"a{i}": None for i in range(50_000)}}}},
     "deepseek.experts.bias"),
    (ChatRequest, CHAT | {"tools": [7] * 50_000}, "tools.0"),
    (ChatRequest, CHAT | {"stop": [7] * 50}, "stop.0"), (ChatRequest, CHAT | {"stop": ["x"] * 65}, "stop"),
    (ChatRequest, CHAT | {"stop": "x" * 2000}, "stop"), (ChatRequest, CHAT | {"stop_token_ids": [-1] * 50_000},
                                                         "stop_token_ids.0"),
    (CompletionRequest, TEXT | {"prompt": [None] * 50_000}, "prompt"),
    (CompletionRequest, TEXT | {"prompt": [1] * 50_000 + ["x"]}, "prompt"),
    (EmbeddingRequest, {"model": "tiny", "input": ["x"] * 20_000}, "input"),
    (ResponsesRequest, {"model": "tiny", "input": [{"type": "reasoning"}] * 9 + [{"type": 1}] * 9000}, "input"),
    (DetokenizeRequest, {"tokens": ["a"] * 50_000}, "tokens.0"),
], ids=lambda value: str(value)[:60])
def test_of_many_faults_few_are_told(form: type[BaseModel], body: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as raised:
        form.model_validate(body)
    assert raised.value.error_count() <= 6
    with pytest.raises(ServeError) as told:
        parse(json.dumps(body).encode(), form)  # type: ignore[type-var]
    assert told.value.status == 400 and str(told.value.body["error"]["param"]).startswith(where)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize("raw", [
    b"{", b"\xff{}", json.dumps(CHAT).encode("utf-16"), b'{"a": 1' + b"0" * 5000 + b"}", b'{"model": NaN}',
    b'{"a":' * 5000 + b"0" + b"}" * 5000], ids=lambda raw: repr(raw[:12]))
def test_what_is_no_json(raw: bytes) -> None:
    with pytest.raises(ServeError, match=r"not JSON|nested too deeply") as raised:
        parse(raw, ChatRequest)
    assert raised.value.status == 400


@pytest.mark.parametrize(("kind", "status"), [
    ("application/json", 200), ("application/json; charset=utf-8", 200), ("application/vnd.x+json", 200),
    ("text/plain", 400), ("application/x-www-form-urlencoded", 400), ("", 400)])
def test_types_that_any_page_may_send_are_refused(running: Running, kind: str, status: int) -> None:
    headers = AUTH | ({"content-type": kind} if kind else {})
    answer = httpx.post(f"{running.url}/v1/completions", content=json.dumps(TEXT), headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    if status == 400:
        assert "content-type" in answer.json()["error"]["message"]


def test_large_bodies_are_parsed_beside_the_event_loop(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []

    def spied(raw: bytes, form: Any) -> Any:
        where.append(threading.current_thread().name)
        return parse(raw, form)

    monkeypatch.setattr(service, "parse", spied)
    for size in (10, 100_000):
        body = CHAT | {"metadata": {"a": "x" * size}}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=AUTH, timeout=60).status_code == 200
    assert not where[0].startswith("prepare") and where[1].startswith("prepare-large")


def test_the_document_defines_the_bodies(running: Running) -> None:
    document = running.app.openapi()
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings", "/tokenize",
                 "/detokenize", "/v1/deepseek/warm", "/v1/feedback"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    assert all(reference.split('"')[0] in document["components"]["schemas"]
               for reference in json.dumps(document).split("#/components/schemas/")[1:])


@pytest.mark.parametrize("more", [
    {"tools": [{"type": "function", "function": {"name": "f", "description": "fox " * 50_000}}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "c", "function": {
        "name": "f", "arguments": "fox " * 50_000}}]}, *CHAT["messages"]]},
], ids=["tools", "calls"])
def test_a_conversation_that_is_rendered_too_long_is_not_encoded(running: Running, more: dict[str, Any],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = running.llm.tokenizer
    assert tokenizer is not None
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | more, headers=AUTH, timeout=60)
    assert answer.status_code == 400 and "must leave room" in answer.json()["error"]["message"], answer.text


def test_variables_that_the_template_does_not_read_cost_nothing(running: Running) -> None:
    given = {"thinking": "x" * 500_000, "at_most": 1, "self": 2} | {f"v{i}": i for i in range(10_000)}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"chat_template_kwargs": given}, headers=AUTH,
                        timeout=60)
    assert answer.status_code == 200, answer.text


def test_a_body_of_a_refused_request_does_not_end_its_connection(running: Running) -> None:
    """What is still to come of it is read in turns, and the next request after it."""
    with httpx.Client(timeout=30) as client:
        for _ in range(2):
            assert client.post(f"{running.url}/v1/completions", content=b"x" * (1 << 20), headers={
                "content-type": "application/json"}).status_code == 401
            assert client.post(f"{running.url}/v1/completions", json=TEXT, headers=AUTH).status_code == 200


def test_turns_come_one_after_another() -> None:
    async def run() -> tuple[list[int], list[int]]:
        turns, loop, said = connections.Turns(), asyncio.get_running_loop(), list[int]()
        for i in range(3):
            turns.take(loop, partial(said.append, i))
        first = [*said]
        while len(said) < 3:
            await asyncio.sleep(connections.TURN)
        return first, said

    assert asyncio.run(run()) == ([0], [0, 1, 2])


def test_an_answer_that_does_not_end_does_not_keep_the_server(tiny_llm: Callable[..., LLM],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SHUTDOWN_GRACE", 0.1)
    llm = tiny_llm()
    server = service.Server(llm, ServeOptions("tiny"))
    server.open = 1
    asyncio.run(asyncio.wait_for(server.shutdown(0.1), 60))
    assert llm.driver.closed


def test_biases_and_ends_are_tensors_once() -> None:
    import torch

    bias = {i: float(i % 7) for i in range(500)}
    adjustment = Adjustment(SamplingParams(logit_bias=bias, min_tokens=2), frozenset((3, 9000)), 1000)
    given_V = torch.zeros(1000)
    out_V = adjustment.apply(given_V, 0)
    want_V = torch.tensor([bias.get(i, 0.0) for i in range(1000)])
    want_V[3] = -torch.inf
    assert torch.equal(out_V, want_V) and not given_V.any()
    assert torch.equal(Adjustment(SamplingParams(), frozenset((3,)), 1000).apply(given_V, 0), given_V)
