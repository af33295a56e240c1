"""OpenAI's own Python client."""

from __future__ import annotations

import asyncio
import json
from enum import StrEnum
from typing import Any

import openai
from pydantic import BaseModel

from tests.helpers.client_cases import HELLO, KEY, MODEL, PARAMETERS, URL, WEATHER, Cases

case = Cases("openai (Python)")
client = openai.OpenAI(max_retries=0, timeout=120)
chat: Any = client.chat.completions
FORCED: Any = {"type": "function", "function": {"name": "weather"}}


class City(StrEnum):
    paris = "Paris"
    oslo = "Oslo"


class Trip(BaseModel):
    city: City
    again: bool


def ask(**more: Any) -> Any:
    return chat.create(**({"model": MODEL, "messages": HELLO, "max_tokens": 8} | more))


def called() -> Any:
    return ask(tools=[WEATHER], tool_choice=FORCED, max_tokens=1000).choices[0].message


@case("chat")
def _() -> None:
    done = ask(temperature=0)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.choices[0].message.role == "assistant"


@case("chat stream equals the answer")
def _() -> None:
    text = "".join(c.choices[0].delta.content or "" for c in ask(temperature=0, stream=True) if c.choices)
    assert text == ask(temperature=0).choices[0].message.content


@case("n with a seed, twice the same")
def _() -> None:
    one, two = ([c.message.content for c in ask(n=3, seed=5).choices] for _ in range(2))
    assert one == two and len(one) == 3


@case("null means not given, all fields")
def _() -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stream", "stop", "seed", "logprobs", "top_logprobs", "user",
                           "presence_penalty", "frequency_penalty", "logit_bias", "response_format", "tools",
                           "tool_choice", "parallel_tool_calls", "stream_options", "max_completion_tokens", "store",
                           "metadata", "service_tier", "modalities", "audio", "prediction", "reasoning_effort",
                           "verbosity", "functions", "function_call", "web_search_options", "prompt_cache_key"))
    ask(extra_body=nulls)


@case("OpenAI's own fields at harmless values")
def _() -> None:
    ask(store=True, metadata={"a": "b"}, service_tier="auto", modalities=["text"], prompt_cache_key="k",
        safety_identifier="s", verbosity="low", reasoning_effort="low", user="u" * 500)
    list(ask(stream=True, stream_options={"include_usage": True, "include_obfuscation": False}))


@case("penalties, logit_bias")
def _() -> None:
    done = ask(presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"70": 100}, temperature=0, logprobs=True)
    assert len({p.token for p in done.choices[0].logprobs.content}) >= 1


@case("fields of vLLM at the top level")
def _() -> None:
    done = ask(extra_body={"top_k": 4, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 4,
                           "stop_token_ids": [5], "skip_special_tokens": False, "chat_template_kwargs": {
                               "thinking": False}, "add_generation_prompt": True})
    assert done.usage.completion_tokens >= 4


@case("continue_final_message")
def _() -> None:
    ask(messages=[*HELLO, {"role": "assistant", "content": "fox"}],
        extra_body={"continue_final_message": True, "add_generation_prompt": False})


@case("log-probabilities with bytes")
def _() -> None:
    done = ask(logprobs=True, top_logprobs=3, temperature=0)
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens and all(len(p.top_logprobs) == 3 for p in content)
    assert all(isinstance(p.bytes, list) for p in content)


@case("usage in streams")
def _() -> None:
    *_, last = ask(stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens > 0


@case("tools: the answer's model_dump() goes back")
def _() -> None:
    message = called()
    call, = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    ask(tools=[WEATHER], messages=[*HELLO, message.model_dump(), {
        "role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny"}]}])


@case(".stream(): the final message goes back")
def _() -> None:
    with chat.stream(model=MODEL, messages=HELLO, max_tokens=1000, tools=[WEATHER], tool_choice=FORCED) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    ask(messages=[*HELLO, message.model_dump(), {
        "role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}])


@case("collected deltas go back, with their index")
def _() -> None:
    calls = [c.model_dump() for chunk in ask(tools=[WEATHER], tool_choice=FORCED, max_tokens=1000, stream=True)
             for c in chunk.choices[0].delta.tool_calls or ()]
    assert calls and "index" in calls[0]
    ask(messages=[*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}, {
        "role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"}])


@case("keys of other servers inside messages")
def _() -> None:
    plain = {"role": "assistant", "content": "fox", "tool_calls": [], "function_call": None, "annotations": [],
             "audio": None, "refusal": None, "reasoning": "because", "reasoning_content": None}
    part = {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}}
    ask(messages=[*HELLO, plain, {"role": "user", "content": [part], "name": None}])


@case("developer, tools without parameters")
def _() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": None, "strict": None}}
    ask(messages=[{"role": "developer", "content": "short"}, *HELLO], tools=[tool])


@case("functions of old clients")
def _() -> None:
    ask(messages=[*HELLO, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                  {"role": "function", "name": "f", "content": "1"}])


@case("parse() with a pydantic model")
def _() -> None:
    done = chat.parse(model=MODEL, messages=HELLO, max_tokens=1000, response_format=Trip, temperature=0)
    assert done.choices[0].message.parsed.city in City
    ask(messages=[*HELLO, done.choices[0].message.model_dump(), *HELLO])


@case("a schema, streamed")
def _() -> None:
    with chat.stream(model=MODEL, messages=HELLO, max_tokens=1000, response_format=Trip, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed.city in City


@case("a misspelt field is refused by name")
def _() -> None:
    try:
        ask(extra_body={"temprature": 1})
    except openai.BadRequestError as error:
        assert "temprature" in str(error)
    else:
        raise AssertionError("accepted")


@case("errors as exceptions of their kinds")
def _() -> None:
    for kind, change in ((openai.NotFoundError, {"model": "other"}), (openai.BadRequestError, {"temperature": -1})):
        try:
            ask(**change)
        except kind:
            continue
        raise AssertionError(kind)
    try:
        openai.OpenAI(api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("any key opens")


@case("eight at once, asynchronously")
def _() -> None:
    async def eight() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0) as own:
            return await asyncio.gather(*(own.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=8, temperature=0) for _ in range(8)))

    assert len({done.choices[0].message.content for done in asyncio.run(eight())}) == 1


@case("completions: echo, log-probabilities, no new token")
def _() -> None:
    done = client.completions.create(model=MODEL, prompt="the quick brown fox", echo=True, logprobs=2, max_tokens=0)
    logprobs = done.choices[0].logprobs
    assert done.choices[0].text == "the quick brown fox" and done.usage.completion_tokens == 0
    assert logprobs.token_logprobs[0] is None and all(p < 0 for p in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.text_offset)


@case("completions: token arrays, a stream")
def _() -> None:
    text = "".join(c.choices[0].text for c in client.completions.create(
        model=MODEL, prompt=[[70, 71, 72]], max_tokens=6, temperature=0, stream=True) if c.choices)
    assert text == client.completions.create(model=MODEL, prompt=[70, 71, 72], max_tokens=6,
                                             temperature=0).choices[0].text


@case("completions: suffix is refused, null is not")
def _() -> None:
    client.completions.create(model=MODEL, prompt="fox", max_tokens=2, extra_body={"suffix": None, "best_of": None})
    try:
        client.completions.create(model=MODEL, prompt="fox", max_tokens=2, suffix="end")
    except openai.BadRequestError as error:
        assert "suffix" in str(error)
    else:
        raise AssertionError("accepted")


@case("embeddings, as numbers and base64")
def _() -> None:
    one, two = (client.embeddings.create(model=MODEL, input=["fox"], encoding_format=form).data[0].embedding
                for form in ("float", "base64"))
    assert len(one) > 1 and isinstance(two, str | list)


@case("models")
def _() -> None:
    assert MODEL in [model.id for model in client.models.list()] and client.models.retrieve(MODEL).id == MODEL


@case("responses: text, and a turn after it")
def _() -> None:
    one = client.responses.create(model=MODEL, input="the quick", max_output_tokens=16)
    two = client.responses.create(model=MODEL, input="again", previous_response_id=one.id, max_output_tokens=16)
    assert two.previous_response_id == one.id and two.usage.input_tokens > one.usage.input_tokens
    assert client.responses.retrieve(one.id).output_text == one.output_text


@case("responses: a stream's events")
def _() -> None:
    kinds, text = [], ""
    for event in client.responses.create(model=MODEL, input="the quick", max_output_tokens=16, stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    assert event.response.output_text == text


@case("responses: tools, and their result")
def _() -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    one = client.responses.create(model=MODEL, input="the quick", tools=[tool], tool_choice="required",
                                  max_output_tokens=1000)
    call = next(item for item in one.output if item.type == "function_call")
    client.responses.create(model=MODEL, previous_response_id=one.id, tools=[tool], max_output_tokens=16, input=[
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}])


@case("responses: parse() with a pydantic model")
def _() -> None:
    done = client.responses.parse(model=MODEL, input="the quick", text_format=Trip, max_output_tokens=1000,
                                  temperature=0)
    assert done.output_parsed.city in City


if __name__ == "__main__":
    case.run()
