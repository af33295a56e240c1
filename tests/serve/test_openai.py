"""OpenAI's own client as the judge: chat, streams, tools, schemas, log-probabilities, embeddings, errors."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import jsonschema
import openai
import pytest

from deepseek.engine import SamplingParams
from deepseek.templates import render
from tests.helpers import ROOT
from tests.helpers.servers import KEY, Running

HELLO: list[Any] = [{"role": "user", "content": "the quick brown"}]
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
    "required": ["city", "days"], "additionalProperties": False}}}
SCHEMA = {"type": "object", "required": ["name", "age"], "additionalProperties": False, "properties": {
    "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}}


@pytest.fixture(scope="session")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def greedy(running: Running, count: int) -> str:
    return running.llm.chat(HELLO, SamplingParams(max_tokens=count, temperature=0)).text


def test_chat(running: Running, client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, temperature=0)
    choice, = done.choices
    assert choice.message.content == greedy(running, 12) and choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length") and done.usage.completion_tokens <= 12
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.id.startswith("chatcmpl-") and done.model == "tiny"


def test_a_stream_adds_up_to_the_answer(running: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, temperature=0, stream=True,
                                            stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == greedy(running, 30)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens > 0
    assert len({c.id for c in chunks}) == 1


def test_several_choices_and_seeds(client: openai.OpenAI) -> None:
    ask: Any = dict(model="tiny", messages=HELLO, max_tokens=10, n=3, seed=5, temperature=1.3)
    one, two = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices] and len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**ask, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_strings(running: Running, client: openai.OpenAI) -> None:
    text = greedy(running, 30)
    stop = text[5:7]
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, temperature=0, stop=stop)
    assert done.choices[0].message.content == text[: text.find(stop)] and done.choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True,
                                          top_logprobs=3)
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens
    assert all(p.logprob == max(t.logprob for t in p.top_logprobs) and len(p.top_logprobs) == 3 for p in content)
    streamed = [p for chunk in client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3, stream=True)
        for p in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())]
    assert [p.logprob for p in streamed] == pytest.approx([p.logprob for p in content], abs=1e-4)  # plain weights


@pytest.mark.parametrize("seed", range(3))
def test_json_schema(client: openai.OpenAI, seed: int) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=600, seed=seed,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}})
    assert done.choices[0].finish_reason == "stop", "the longest answer is far below max_tokens"
    jsonschema.validate(json.loads(done.choices[0].message.content), SCHEMA)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_tools(client: openai.OpenAI, choice: Any) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=400, seed=4, tools=[WEATHER],
                                          tool_choice=choice)
    message = done.choices[0].message
    assert done.choices[0].finish_reason == "tool_calls" and message.content is None
    call, = message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    again = client.chat.completions.create(  # the whole round
        model="tiny", max_tokens=5, tools=[WEATHER],
        messages=[*HELLO, cast(Any, message.model_dump(exclude_none=True)),
                  {"role": "tool", "tool_call_id": call.id, "content": "sunny"}])
    assert again.usage.prompt_tokens > done.usage.prompt_tokens
    streamed = list(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=400, seed=4,
                                                   tools=[WEATHER], tool_choice=choice, stream=True))
    calls = [c for chunk in streamed for c in chunk.choices[0].delta.tool_calls or ()]
    assert [c.function.arguments for c in calls] == [call.function.arguments]
    assert streamed[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("route", ["chat", "stream", "responses", "tokenize"])
def test_a_request_is_rendered_and_checked_once(running: Running, client: openai.OpenAI, route: str,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []
    checked: list[Any] = []
    engine = running.llm.engine
    check = engine.check

    def counting(*args: Any, **more: Any) -> str:
        rendered.append(args)
        return render(*args, **more)

    def checking(*requests: Any) -> None:
        checked.extend(requests)
        check(*requests)

    monkeypatch.setattr(engine, "check", checking)
    monkeypatch.setattr("deepseek.tokenizer.render", counting)
    if route == "tokenize":
        client.post(f"{running.url}/tokenize", cast_to=object, body={"messages": HELLO})
    elif route == "responses":
        client.responses.create(model="tiny", input="the quick brown", max_output_tokens=2)
    else:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, n=3, tools=[WEATHER],
                                                stream=route == "stream")
        assert route == "chat" or list(answer)
    assert len(rendered) == 1
    assert len(checked) == len(set(map(id, checked))) == {"chat": 3, "stream": 3, "responses": 1, "tokenize": 0}[route]


def test_completions(running: Running, client: openai.OpenAI) -> None:
    params = SamplingParams(max_tokens=8, temperature=0)
    want = [output.text for output in running.llm.generate(["the quick", "fox"], params)]
    done = client.completions.create(model="tiny", prompt=["the quick", "fox"], max_tokens=8, temperature=0, logprobs=2)
    assert [choice.text for choice in done.choices] == want
    assert len(done.choices[0].logprobs.tokens) == len(done.choices[0].logprobs.top_logprobs)
    streamed = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=["the quick", "fox"], max_tokens=8, temperature=0,
                                           stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == want
    ids = running.llm.encode("the quick")
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0).choices[0].text == want[0]


def test_embeddings(running: Running, client: openai.OpenAI) -> None:
    done = client.embeddings.create(model="tiny", input=["the quick", "brown fox"])
    assert len(done.data) == 2 and len(done.data[0].embedding) == running.llm.model.config.hidden_size
    assert done.data[0].embedding != done.data[1].embedding and done.usage.prompt_tokens > 3


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_our_own_key(client: openai.OpenAI, running: Running) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, extra_body={
        "deepseek": {"routed": True, "domain": "law", "ignore_eos": True}})
    counts = done.model_dump()["deepseek"]["routed"][0]
    config = running.llm.model.config
    tokens = done.usage.total_tokens - 1
    assert set(counts) == set(map(str, config.moe_layers))
    assert all(sum(own) == tokens * config.num_experts_per_tok for own in counts.values())
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0, extra_body={
        "deepseek": {"experts": {"top_k": 1}, "routed": True, "ignore_eos": True}})
    assert sum(done.model_dump()["deepseek"]["routed"][0]["1"]) == done.usage.total_tokens - 1


@pytest.mark.parametrize(("changes", "status", "message"), [
    ({"model": "other"}, 404, "there is 'tiny'"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 7}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x" * 20_000}]}, 400, "tokens"),
    ({"n": 99}, 400, "n"),
    ({"frequency_penalty": 3}, 400, "frequency_penalty"),
    ({"tool_choice": "required"}, 400, "needs tools"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}}, 400,
     "json_schema"),
    ({"extra_body": {"bananas": 1}}, 400, "bananas"),
    ({"extra_body": {"deepseek": {"experts": {"mask": ["law_expert"]}}}}, 400, "no atlas beside the model"),
    ({"top_logprobs": 3}, 400, "needs logprobs"),
])
def test_errors_are_openais(client: openai.OpenAI, changes: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(openai.APIStatusError) as failure:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 3, **changes})
    assert failure.value.status_code == status and message in str(failure.value.body)
    assert cast(dict[str, Any], failure.value.body).keys() == {"message", "type", "param", "code"}
    assert failure.value.response.headers["x-request-id"].startswith("req_")


def test_a_wrong_key(running: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_manual_names_files_that_exist() -> None:
    """The walk of a request, in numbered steps."""
    walk = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("step by step")[2]
    named = re.findall(r"`((?:\w+/)?\w+\.py)`", walk)
    assert len(named) > 15 and [name for name in named if not (ROOT / "src" / "deepseek" / name).is_file()] == []
    assert [int(n) for n in re.findall(r"^(\d+)\.", walk, re.MULTILINE)] == list(range(1, 16))
