"""POST /v1/chat/completions: messages -> prompt ids and sampling parameters -> engine -> messages or deltas."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from ..conversation import THINK, THOUGHT
from ..engine import LLM
from ..engine.request import Request as Generation
from ..errors import DataError, RequestError
from ..model.cache import PAGE
from .output_parser import OutputParser, forced_schema
from .protocol import ChatRequest, TokenizeRequest, Tool
from .service import Server, event, floored, usage


def chat_prompt(llm: LLM, body: ChatRequest | TokenizeRequest) -> list[int]:
    """The prompt ids of a conversation.

    Raises RequestError for messages that the template refuses, and for too long ones before they are rendered.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise RequestError("a conversation needs a tokenizer, and this model was given without one")
    llm.check_length("".join(message.text for message in body.messages or ()))
    messages = [message.model_dump(exclude_none=True) for message in body.messages or ()]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if isinstance(body, ChatRequest) and body.tool_choice == "none":
        tools = []
    variables = body.variables
    if body.reasoning_effort is not None and tokenizer.template_knows("reasoning_effort"):
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    try:
        return tokenizer.encode_chat(messages, llm.max_length, tools=tools, **variables)
    except DataError as error:  # half a surrogate pair, say
        raise RequestError(f"a message is not text: {error}") from None


class Chat:
    """One request to /v1/chat/completions."""

    def __init__(self, server: Server, http: Request, body: ChatRequest, adapter: str | None,
                 name: str | None = None) -> None:
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
        ids = chat_prompt(server.llm, body)
        room = server.llm.engine.block_manager.count * PAGE - len(ids)  # a cache may be smaller than the context
        params = server.params(body, max_tokens=body.max_completion_tokens or body.max_tokens or max(room, 1),
                               json_schema=json.dumps(schema) if schema is not None else None,
                               logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        question = next((m for m in reversed(body.messages) if m.role == "user"), body.messages[-1]).text
        domain = body.deepseek.domain or server.llm.domain_of(question)
        end = server.tokenizer.decode(ids[-16:], skip_special=False)
        thinking = end.rstrip().endswith(THINK)
        self.requests = server.requests(body, ids, params, domain=domain, adapter=adapter,
                                        constraint_after=THOUGHT if thinking else None)
        server.watch.begin(self.id, http, body.user, question, self.requests)
        self.constrained = schema is not None and not forced
        self.parsers = [OutputParser(thinking=thinking, tools=self.tools, forced=forced,
                                     parallel=body.parallel_tool_calls) for _ in self.requests]
        self.sent = [0] * len(self.requests)
        self.place = {request.request_id: i for i, request in enumerate(self.requests)}

    def advance(self, request: Generation) -> dict[str, Any]:
        """The delta of a choice since the last call."""
        i = self.place[request.request_id]
        ended, text = request.finish_reason is not None, request.text
        delta = self.parsers[i].push(text[self.sent[i] :])
        self.sent[i] = len(text)
        if ended:
            for key, value in self.parsers[i].flush().items():
                delta[key] = delta[key] + value if isinstance(value, str) and key in delta else value
        return delta

    def reason(self, i: int) -> str:
        return "tool_calls" if self.parsers[i].answer.calls else str(self.requests[i].finish_reason)

    def record_outcome(self) -> None:
        """Count tool calls and schema answers, now that the answers are complete."""
        counters = self.server.watch.counters
        for request, parser in zip(self.requests, self.parsers, strict=True):
            if request.finish_reason not in ("stop", "length"):
                continue
            if self.tools and (parser.answer.calls or not parser.answer.valid):
                counters.count("tool_calls_total", request.domain, "right" if parser.answer.valid else "wrong")
            if self.constrained:
                counters.count("schema_answers_total", request.domain,
                               "valid" if request.finish_reason == "stop" else "invalid")

    def logprobs(self, i: int, start: int = 0) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        tokenizer = self.server.tokenizer

        def one(token: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.token_text(token)
            return {"token": text, "logprob": floored(logprob), "bytes": list(tokenizer.token_bytes(token))}

        return {"content": [one(p.token, p.logprob) | {"top_logprobs": [one(*pair) for pair in p.top]}
                            for p in self.requests[i].logprobs[start:]], "refusal": None}

    def prompt_logprobs(self) -> dict[str, Any]:
        """The key of an answer where vLLM puts them; empty if not asked for."""
        if self.body.sampling.get("prompt_logprobs") is None:
            return {}
        return {"prompt_logprobs": self.server.prompt_logprobs(self.requests[0])}

    async def complete(self, http: Request) -> JSONResponse:
        async for request in self.server.run(http, self.requests):
            self.advance(request)
        self.record_outcome()
        choices = [{"index": i, "message": parser.answer.message(), "finish_reason": self.reason(i),
                    "logprobs": self.logprobs(i)} for i, parser in enumerate(self.parsers)]
        return JSONResponse({"id": self.id, "object": "chat.completion", "created": self.created,
                             "model": self.body.model, "choices": choices, "usage": usage(self.requests)}
                            | self.prompt_logprobs() | self.server.extra(self.body, self.requests))

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        def chunk(i: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": i, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            return event(self.head() | {"choices": [choice]} | self.blank())

        reported = [0] * len(self.requests)
        for i in range(len(self.requests)):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for request in self.server.run(http, self.requests):
            i = self.place[request.request_id]
            ended = request.finish_reason is not None
            if delta := self.advance(request):
                count = len(request.logprobs)
                yield chunk(i, delta, None, self.logprobs(i, reported[i]))
                reported[i] = count
            if ended:
                yield chunk(i, {}, self.reason(i), self.logprobs(i, reported[i]) if self.body.logprobs else None)
        self.record_outcome()
        if last := self.server.last(self.body, self.requests, usage(self.requests)):
            yield event(self.head() | last)

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.body.model}

    def blank(self) -> dict[str, Any]:
        options = self.body.stream_options
        return {"usage": None} if options is not None and options.include_usage else {}
