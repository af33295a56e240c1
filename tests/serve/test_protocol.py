"""Request bodies as clients really send them: nulls, fields that ask for nothing, and answers sent back."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, ValidationError

from deepseek.conversation import normalize
from deepseek.engine import SamplingParams
from deepseek.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    FeedbackRequest,
    Message,
    TokenizeRequest,
    WarmRequest,
)
from tests.helpers.servers import KEY, Running

USER = {"role": "user", "content": "the quick brown"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [USER]}
BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatRequest, CHAT), (CompletionRequest, {"model": "tiny", "prompt": "x"}),
    (EmbeddingRequest, {"model": "tiny", "input": "x"}), (TokenizeRequest, {"prompt": "x"}),
    (DetokenizeRequest, {"tokens": [1]}), (WarmRequest, {"experts": ["law"]}),
    (FeedbackRequest, {"id": "x", "rating": "up"})]


@pytest.mark.parametrize(("body", "least"), BODIES, ids=[body.__name__ for body, _ in BODIES])
def test_null_is_not_given_for_every_field_that_may_be_left_out(body: type[BaseModel], least: dict[str, Any]) -> None:
    optional = [name for name, field in body.model_fields.items() if not field.is_required() and name not in least]
    assert body.model_validate(least | dict.fromkeys(optional)) == body.model_validate(least)
    with pytest.raises(ValidationError, match="bananas"):
        body.model_validate(least | {"bananas": None})
    for required in (name for name, field in body.model_fields.items() if field.is_required()):
        with pytest.raises(ValidationError, match=required):
            body.model_validate(least | {required: None})


@pytest.mark.parametrize("more", [
    {"deepseek": {"experts": None, "top_k": None, "routed": None}}, {"deepseek": {"experts": {"mask": None}}},
    {"stream_options": {"include_usage": None}}, {"response_format": {"type": "text", "json_schema": None}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"store": False}, {"store": True}, {"metadata": {"run": "7"}}, {"service_tier": "auto"},
    {"service_tier": "default"}, {"modalities": ["text"]}, {"prompt_cache_key": "k"}, {"safety_identifier": "s"},
    {"verbosity": "low"}, {"reasoning_effort": "high"}, {"user": "u" * 500}, {"logprobs": False, "top_logprobs": 0},
    {"max_tokens": 5, "max_completion_tokens": 5}, {"top_k": -1}, {"top_k": 4, "deepseek": {"top_k": 4}},
    {"logit_bias": {}}, {"tools": []}, {"tool_choice": "auto"},
    {"tools": [{"type": "function", "cache_control": {}, "function": {
        "name": "f", "description": None, "parameters": None, "strict": None, "returns": 1}}]},
], ids=str)
def test_what_asks_for_nothing_is_taken(more: dict[str, Any]) -> None:
    """Without an effect on what is sampled; two names of one setting, or one in both places, say it once."""
    asked = ChatRequest.model_validate(CHAT | more)
    assert SamplingParams(**asked.sampling) == SamplingParams(top_k=max(more.get("top_k", 0), 0))
    assert asked.max_tokens == more.get("max_tokens")


@pytest.mark.parametrize(("more", "message"), [
    ({"modalities": ["text", "audio"]}, "modalities"), ({"audio": {"voice": "a"}}, "audio"),
    ({"service_tier": "flex"}, "service_tier"), ({"functions": [{"name": "f"}]}, "(?s)functions.*tools"),
    ({"function_call": "auto"}, "(?s)function_call.*tool_choice"), ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"), ({"temprature": 0}, "temprature"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "must be given once"),
    ({"top_k": 4, "deepseek": {"top_k": 5}}, "top_k: is 4, and 5 under deepseek"),
    ({"ignore_eos": False, "deepseek": {"ignore_eos": True}}, "ignore_eos"), ({"top_k": -2}, "top_k"),
    ({"chat_template_kwargs": {"messages": []}}, "must not hold 'messages'"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "must not stand beside"),
    ({"messages": [{"role": "user", "content": None}]}, "content: must be given"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "part 0 is of type 'image_url': must be text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "part 0 is of type 'str'"),
], ids=str)
def test_what_asks_for_something_else_is_refused_by_name(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ChatRequest.model_validate(CHAT | more)


CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(("message", "plain"), [
    ({"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "function_call": None,
      "tool_calls": None, "parsed": None}, {"role": "assistant", "content": "Hi"}),
    ({"role": "assistant", "content": "Hi", "tool_calls": []}, {"role": "assistant", "content": "Hi"}),
    ({"role": "assistant", "content": "Hi", "reasoning": "hm", "reasoning_details": []},
     {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}),
    ({"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0, "function": CALL["function"] | {
        "parsed_arguments": {"a": 1}}}]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
    ({"role": "assistant", "content": "", "tool_calls": [CALL | {"type": None}]},
     {"role": "assistant", "content": None, "tool_calls": [CALL]}),
    ({"role": "user", "content": [{"type": "text", "text": "a ", "cache_control": {"type": "ephemeral"}},
                                  {"type": "text", "text": "b", "annotations": []}]},
     {"role": "user", "content": "a b"}),
    ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, {"role": "assistant", "content": "no"}),
    ({"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
     {"role": "assistant", "content": None, "tool_calls": [{k: v for k, v in CALL.items() if k != "id"}]}),
    ({"role": "function", "name": "f", "content": "1"}, {"role": "tool", "name": "f", "content": "1"}),
    ({"role": "developer", "content": "be short"}, {"role": "system", "content": "be short"}),
], ids=str)
def test_messages_are_taken_as_clients_hold_them(message: dict[str, Any], plain: dict[str, Any]) -> None:
    assert normalize([Message.model_validate(message).model_dump(exclude_none=True)]) == [plain]


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def test_an_answer_can_be_sent_back_as_the_client_dumps_it(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
        "additionalProperties": False}}}]
    ask: Any = dict(model="tiny", max_tokens=60, seed=4, messages=[USER], extra_body={"top_k": -1, "min_p": 0.001})
    with client.chat.completions.stream(**ask | {"max_tokens": 400}, tools=tools, tool_choice="required") as stream:
        final = stream.get_final_completion().choices[0].message
    answers = [client.chat.completions.create(**ask).choices[0].message, final]
    for answer in answers:
        back: list[Any] = [USER, answer.model_dump()]
        back += [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in answer.tool_calls or ()]
        client.chat.completions.create(**ask | {"messages": [*back, USER], "max_tokens": 1}, tools=tools)


def test_tokenize_and_detokenize(running: Running) -> None:
    def ask(path: str, body: dict[str, Any], status: int = 200) -> Any:
        answer = httpx.post(running.url + path, content=json.dumps(body), headers={
            "authorization": f"Bearer {KEY}", "content-type": "application/json"})
        assert answer.status_code == status, answer.text
        return answer.json()

    tokenizer = running.llm.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("the fox", bos=True)
    assert ask("/tokenize", {"model": "tiny", "prompt": "the fox"}) == {
        "count": len(ids), "max_model_len": 2048, "tokens": ids, "token_strs": None}
    plain = ask("/tokenize", {"prompt": "the fox", "add_special_tokens": False, "return_token_strs": True})
    assert plain["tokens"] == ids[1:] and "".join(plain["token_strs"]) == "the fox"
    assert ask("/detokenize", {"tokens": ids[1:]}) == {"prompt": "the fox"}
    chat = ask("/tokenize", {"messages": [USER], "add_generation_prompt": False})
    assert chat["tokens"] == tokenizer.encode_chat([USER], add_generation_prompt=False)
    begun = {"role": "assistant", "content": "fox"}
    chat = ask("/tokenize", {"messages": [USER, begun], "continue_final_message": True})
    assert chat["tokens"] == tokenizer.encode_chat([USER]) + tokenizer.encode("fox")
    for body, message in (({"prompt": "x", "messages": [USER]}, "not both"), ({}, "must be given"),
                          ({"prompt": "\ud800"}, "surrogate")):
        assert message in ask("/tokenize", body, 400)["error"]["message"]
    ask("/tokenize", {"prompt": "x", "model": "other"}, 404)
    assert "must lie in the vocabulary" in ask("/detokenize", {"tokens": [10**6]}, 400)["error"]["message"]
