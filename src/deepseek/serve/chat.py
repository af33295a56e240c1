"""POST /v1/chat/completions: messages -> prompt ids and SamplingParams -> the engine -> messages, or deltas."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from ..engine.request import Request as Generation
from ..errors import DataError, RequestError
from ..tokenizer import Tokenizer
from .answers import THINK, AnswerText, forced_schema, written
from .protocol import ChatRequest, ContentPart, Message, TokenizeRequest, Tool, ToolCall
from .service import Server, event, usage


def chat_prompt(tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest) -> tuple[list[int], str]:
    """(ids, the rendered text). Tools go through the template, or in front where it knows none."""
    messages = [_plain(message) for message in body.messages or ()]
    if not tokenizer.template_knows("tool_calls"):
        messages = [_said_of_tools(message) for message in messages]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if isinstance(body, ChatRequest) and body.tool_choice == "none":
        tools = []
    extra = body.variables
    if tools and tokenizer.template_knows("tools"):
        extra["tools"] = tools
    elif tools:
        messages.insert(0, {"role": "system", "content": "Tools:\n" + "\n".join(
            json.dumps(tool["function"], ensure_ascii=False) for tool in tools)})
    try:
        return tokenizer.encode_chat(messages, **extra), tokenizer.chat(messages, **extra)
    except DataError as error:  # half a surrogate pair, say
        raise RequestError(f"a message is not text: {error}") from None


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content one text, arguments as they were sent."""
    out: dict[str, Any] = {"role": message.role, "content": said(message)}
    if message.role == "developer":
        out["role"] = "system"
    if message.role == "function":
        out["role"] = "tool"
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if thoughts := message.reasoning_content or message.reasoning:
        out["reasoning_content"] = thoughts
    calls = message.tool_calls or ([] if message.function_call is None else [ToolCall(function=message.function_call)])
    if calls:
        out["tool_calls"] = [call.model_dump(exclude_none=True) for call in calls]
        for call in out["tool_calls"]:
            if not isinstance(arguments := call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return out


def said(message: Message) -> str:
    """The text of a message, its parts joined."""
    return joined(message.content)


def joined(content: str | Sequence[ContentPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text or part.refusal for part in content or ())


def _said_of_tools(message: dict[str, Any]) -> dict[str, Any]:
    """Calls and results as text, for a template that knows neither."""
    if calls := message.get("tool_calls"):
        text = (message["content"] or "") + written([call["function"] for call in calls])
        return {"role": "assistant", "content": text}
    return {"role": "user", "content": message["content"]} if message["role"] == "tool" else message


class Chat:
    """One /v1/chat/completions."""

    def __init__(self, server: Server, http: Request, body: ChatRequest, name: str | None = None) -> None:
        self.server, self.body = server, body
        self.id, self.created = name or f"chatcmpl-{secrets.token_hex(14)}", int(time.time())
        choice = body.tool_choice or ("auto" if body.tools else "none")
        self.tools: list[Tool] = [] if choice == "none" else body.tools or []
        forced = choice not in ("none", "auto")
        schema: Any = None
        if forced:
            schema = forced_schema(self.tools, choice)
        elif body.response_format is not None and body.response_format.type == "json_schema":
            assert body.response_format.json_schema is not None
            schema = body.response_format.json_schema.json_schema
        elif body.response_format is not None and body.response_format.type == "json_object":
            schema = {"type": "object"}
        ids, text = chat_prompt(server.tokenizer, body)
        params = server.params(body, max_tokens=body.max_completion_tokens or body.max_tokens,
                               json_schema=json.dumps(schema) if schema is not None else None,
                               logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        question = said(next((m for m in reversed(body.messages) if m.role == "user"), body.messages[-1]))
        domain = body.deepseek.domain or server.llm.domain_of(question)
        self.requests = server.llm.requests(ids, params, domain=domain)
        server.watch.begin(self.id, http, body.user, question, self.requests)
        self.constrained = schema is not None and not forced
        thinking = text.rstrip().endswith(THINK) and schema is None
        self.texts = [AnswerText(thinking=thinking, tools=self.tools, forced=forced, parallel=body.parallel_tool_calls)
                      for _ in self.requests]
        self.sent = [0] * len(self.requests)
        self.place = {request.number: i for i, request in enumerate(self.requests)}

    def advance(self, request: Generation) -> dict[str, Any]:
        """What is new of a choice, as a delta."""
        i = self.place[request.number]
        ended, text = request.finish_reason is not None, request.text
        delta = self.texts[i].push(text[self.sent[i] :])
        self.sent[i] = len(text)
        if ended:
            for key, value in self.texts[i].flush().items():
                delta[key] = delta[key] + value if isinstance(value, str) and key in delta else value
        return delta

    def reason(self, i: int) -> str:
        return "tool_calls" if self.texts[i].answer.calls else str(self.requests[i].finish_reason)

    def judge(self) -> None:
        """Count what can be told of the answers now that they are whole."""
        counters = self.server.watch.counters
        for request, text in zip(self.requests, self.texts, strict=True):
            if request.finish_reason not in ("stop", "length"):
                continue
            if self.tools and (text.answer.calls or not text.answer.valid):
                counters.count("tool_calls_total", request.domain, "right" if text.answer.valid else "wrong")
            if self.constrained:
                counters.count("schema_answers_total", request.domain,
                               "valid" if request.finish_reason == "stop" else "invalid")

    def logprobs(self, i: int, start: int = 0) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        tokenizer = self.server.tokenizer

        def one(token: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.decode([token], skip_special=False)
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        return {"content": [one(p.token, p.logprob) | {"top_logprobs": [one(*pair) for pair in p.top]}
                            for p in self.requests[i].logprobs[start:]], "refusal": None}

    async def whole(self, http: Request) -> JSONResponse:
        async for request in self.server.run(http, self.requests):
            self.advance(request)
        self.judge()
        choices = [{"index": i, "message": text.answer.message(), "finish_reason": self.reason(i),
                    "logprobs": self.logprobs(i)} for i, text in enumerate(self.texts)]
        return JSONResponse({"id": self.id, "object": "chat.completion", "created": self.created,
                             "model": self.body.model, "choices": choices, "usage": usage(self.requests)}
                            | self.server.extra(self.body, self.requests))

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        def chunk(i: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": i, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            return event(self.head() | {"choices": [choice]} | self.blank())

        told = [0] * len(self.requests)
        done = [False] * len(self.requests)
        for i in range(len(self.requests)):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for request in self.server.run(http, self.requests):
            i = self.place[request.number]
            if done[i]:
                continue
            ended = request.finish_reason is not None
            if delta := self.advance(request):
                count = len(request.logprobs)
                yield chunk(i, delta, None, self.logprobs(i, told[i]))
                told[i] = count
            if ended:
                done[i] = True
                yield chunk(i, {}, self.reason(i), self.logprobs(i, told[i]) if self.body.logprobs else None)
        self.judge()
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event(self.head() | {"choices": [], "usage": usage(self.requests)}
                        | self.server.extra(self.body, self.requests))

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.body.model}

    def blank(self) -> dict[str, Any]:
        options = self.body.stream_options
        return {"usage": None} if options is not None and options.include_usage else {}
