"""/v1/responses with OpenAI's own client: texts, events, tools, schemas, what is kept."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from deepseek.engine import SamplingParams
from deepseek.serve.middleware import ServeError
from deepseek.serve.protocol import ChatRequest, Item, Message, ResponsesRequest, Sampling
from deepseek.serve.responses import Store, to_chat, to_messages
from tests.helpers.servers import KEY, Running

ASK: dict[str, Any] = {"model": "tiny", "input": "the quick brown", "max_output_tokens": 12, "temperature": 0}
TOOL: dict[str, Any] = {"type": "function", "name": "f", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}}


class Yes(BaseModel):
    a: bool


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def greedy(running: Running, messages: list[dict[str, str]], count: int = 12) -> str:
    return running.llm.chat(messages, SamplingParams(max_tokens=count, temperature=0)).text


def test_a_text_and_its_events(running: Running, client: openai.OpenAI) -> None:
    want = greedy(running, [{"role": "system", "content": "fox"}, {"role": "user", "content": "the quick brown"}])
    done = client.responses.create(**ASK, instructions="fox")
    assert done.output_text == want and done.status in ("completed", "incomplete") and done.usage is not None
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    with client.responses.stream(**ASK, instructions="fox") as stream:
        events: list[Any] = list(stream)
    assert events[-1].response.output_text == want
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == want
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_tools_there_and_back(client: openai.OpenAI) -> None:
    ask = ASK | {"tools": [TOOL], "max_output_tokens": 400, "temperature": 1, "extra_body": {"seed": 4}}
    done = client.responses.create(**ask, tool_choice={"type": "function", "name": "f"})
    call, = done.output
    assert call.type == "function_call" and call.name == "f" and done.status == "completed"
    jsonschema.validate(json.loads(call.arguments), TOOL["parameters"])
    kinds = [event.type for event in client.responses.create(**ask, tool_choice="required", stream=True)]
    assert kinds[2:] == ["response.output_item.added", "response.function_call_arguments.delta",
                         "response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}
    short = ASK | {"tools": [TOOL], "max_output_tokens": 1}
    by_name = client.responses.create(**short | {"input": [result]}, previous_response_id=done.id)
    by_hand = client.responses.create(**short | {"input": [
        {"role": "user", "content": ASK["input"]}, *(item.model_dump() for item in done.output), result]})
    assert by_name.usage is not None and by_hand.usage is not None
    assert by_name.usage.input_tokens == by_hand.usage.input_tokens > done.usage.input_tokens


def test_a_schema(client: openai.OpenAI) -> None:
    done = client.responses.parse(**ASK | {"max_output_tokens": 400, "temperature": 1}, text_format=Yes,
                                  extra_body={"seed": 4})
    assert isinstance(done.output_parsed, Yes)


def test_what_is_kept(running: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(**ASK)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    more = client.responses.create(**ASK | {"input": [{"role": "user", "content": [
        {"type": "input_text", "text": "fox"}]}]}, previous_response_id=first.id, store=False)
    assert more.output_text == greedy(running, [
        {"role": "user", "content": "the quick brown"}, {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "fox"}])
    with pytest.raises(openai.NotFoundError, match="not stored"):
        client.responses.retrieve(more.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="is not kept"):
        client.responses.create(**ASK, previous_response_id=first.id)


def kept(store: Store) -> list[str]:
    found = []
    for name in ("0", "1", "2", "3", "large"):
        with contextlib.suppress(ServeError):
            found.append(store.find(name).body["id"])
    return found


def test_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.serve.responses.KEPT", 3)
    monkeypatch.setattr("deepseek.serve.responses.KEPT_CHARACTERS", 1000)
    store = Store()
    for i in range(4):
        store.keep({"id": str(i)}, [])
    assert kept(store) == ["1", "2", "3"]
    store.keep({"id": "large"}, [Message(role="user", content="x" * 950)])
    assert kept(store) == ["large"]
    store.delete("large")
    store.keep({"id": "0"}, [])
    store.keep({"id": "large"}, [Message(role="user", content="x" * 900)])
    assert kept(store) == ["0", "large"], "what was deleted takes no room"


@pytest.mark.parametrize(("changes", "message"), [
    ({"input": []}, "input"), ({"background": True}, "background"), ({"extra_body": {"bananas": 1}}, "bananas"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "call_id: must be given"),
    ({"tool_choice": "required"}, "needs tools"), ({"tools": [{"type": "web_search"}]}, "Input should be 'function'"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"), ({"truncation": "auto"}, "truncation"),
    ({"previous_response_id": "resp_0"}, "is not kept"), ({"temperature": -1}, "temperature"),
], ids=str)
def test_errors_name_the_field(client: openai.OpenAI, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**ASK | changes)


def test_an_assistants_items_are_one_message() -> None:
    items = [Item.model_validate(item) for item in (
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        {"type": "reasoning", "summary": []}, {"type": "message", "role": "assistant", "content": "c"})]
    said = [message.model_dump(exclude_none=True) for message in to_messages(items)]
    assert [{key: value for key, value in message.items() if value != []} for message in said] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "x"}, {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "assistant", "content": "c", "reasoning_content": ""}]


def test_every_sampling_field_reaches_the_chat_which_needs_no_second_check() -> None:
    given = {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2,
             "stop_token_ids": [5], "skip_special_tokens": False, "prompt_logprobs": 1}
    assert given.keys() == Sampling.model_fields.keys()
    body = ResponsesRequest.model_validate({"model": "tiny", "input": "x", "tools": [TOOL], "instructions": "y",
                                            "tool_choice": {"type": "function", "name": "f"}} | given)
    chat = to_chat(body, to_messages(body.input))
    assert chat.sampling == given and [message.text for message in chat.messages] == ["y", "x"]
    again = ChatRequest.model_validate(chat.model_dump(by_alias=True, exclude_none=True))
    assert again.model_dump() == chat.model_dump()


def test_a_conversation_is_bounded(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    first = client.responses.create(**ASK)
    monkeypatch.setattr("deepseek.serve.responses.MESSAGES", 2)
    with pytest.raises(openai.BadRequestError, match="the conversation has 3 messages: at most 2"):
        client.responses.create(**ASK, previous_response_id=first.id)
