"""POST /v1/chat/completions: messages -> prompt ids and sampling parameters -> engine -> messages or deltas."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from ..conversation import THINK, THOUGHT
from ..engine import LLM, SamplingParams
from ..engine.request import AdapterChoice, Message
from ..engine.request import Request as Generation
from ..engine.routing import JOINT
from ..engine.sampler import Logprob
from ..errors import DataError, RequestError
from ..model.cache import PAGE
from .output_parser import OutputParser, forced_schema
from .protocol import ChatRequest, TokenizeRequest, Tool
from .service import Server, event, floored, usage


def conversation(llm: LLM, body: ChatRequest | TokenizeRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, tools and variables of the template: what `chat_prompt` takes). Raises RequestError for too long ones,
    before they are rendered."""
    if llm.tokenizer is None:
        raise RequestError("a conversation needs a tokenizer, and this model was given without one")
    llm.check_length("".join(message.text for message in body.messages or ()))
    messages = [message.model_dump(exclude_none=True) for message in body.messages or ()]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if isinstance(body, ChatRequest) and body.tool_choice == "none":
        tools = []
    variables = body.variables
    if body.reasoning_effort is not None and llm.tokenizer.template_knows("reasoning_effort"):
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return messages, {"tools": tools, "chat_template_kwargs": variables}


def chat_prompt(llm: LLM, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]],
                chat_template_kwargs: Mapping[str, Any]) -> list[int]:
    """The prompt ids of a conversation. Raises RequestError for messages that the template refuses."""
    assert llm.tokenizer is not None
    try:
        return llm.tokenizer.encode_chat(messages, llm.max_length, tools=tools, **chat_template_kwargs)
    except DataError as error:  # half a surrogate pair, say
        raise RequestError(f"a message is not text: {error}") from None


class Chat:
    """One request to /v1/chat/completions."""

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
        self.max_tokens = body.max_completion_tokens or body.max_tokens
        params = server.params(body, max_tokens=self.max_tokens or server.llm.max_length,
                               json_schema=json.dumps(schema) if schema is not None else None,
                               logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        self.question = next((m for m in reversed(body.messages) if m.role == "user"), body.messages[-1]).text
        self.constrained = schema is not None and not forced
        self.parsers = [OutputParser(tools=self.tools, forced=forced, parallel=body.parallel_tool_calls)
                        for _ in range(body.n)]
        messages, asked = conversation(server.llm, body)
        self.answer = server.answer(body, messages, params, make=partial(self._make, http), **asked)

    def _make(self, http: Request, messages: Sequence[Message], params: SamplingParams, *, domain: str | None,
              adapter: AdapterChoice | None, **asked: Any) -> list[Generation]:
        """The requests of a part of the answer."""
        llm = self.server.llm
        ids = chat_prompt(llm, messages, **asked)
        if self.max_tokens is None:  # what there is room for: a cache may be smaller than the context
            room = llm.engine.block_manager.count * PAGE - len(ids)
            params = replace(params, max_tokens=max(min(params.max_tokens, room), 1))
        thinking = self.server.tokenizer.decode(ids[-16:], skip_special=False).rstrip().endswith(THINK)
        requests = llm.requests(ids, params, domain=domain or llm.domain_of(self.question), adapter=adapter,
                                constraint_after=THOUGHT if thinking else None)
        self.server.watch.begin(self.id, http, self.body.user, self.question, requests)
        for parser in self.parsers:
            parser.begin(thinking, JOINT)
        self.sent = [0] * len(requests)
        self.place = {request.request_id: i for i, request in enumerate(requests)}
        return requests

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
        return "tool_calls" if self.parsers[i].answer.calls else str(self.answer.finish_reason(i))

    def record_outcome(self) -> None:
        """Count tool calls and schema answers, now that the answers are complete."""
        counters = self.server.watch.counters
        for request, parser in zip(self.answer.requests, self.parsers, strict=True):
            if request.finish_reason not in ("stop", "length"):
                continue
            if self.tools and (parser.answer.calls or not parser.answer.valid):
                counters.count("tool_calls_total", request.domain, "right" if parser.answer.valid else "wrong")
            if self.constrained:
                counters.count("schema_answers_total", request.domain,
                               "valid" if request.finish_reason == "stop" else "invalid")

    def logprobs(self, found: Iterable[Logprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        tokenizer = self.server.tokenizer

        def one(token: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.token_text(token)
            return {"token": text, "logprob": floored(logprob), "bytes": list(tokenizer.token_bytes(token))}

        return {"content": [one(p.token, p.logprob) | {"top_logprobs": [one(*pair) for pair in p.top]}
                            for p in found], "refusal": None}

    def prompt_logprobs(self) -> dict[str, Any]:
        """The key of an answer where vLLM puts them; empty if not asked for."""
        if self.body.sampling.get("prompt_logprobs") is None:
            return {}
        return {"prompt_logprobs": self.server.prompt_logprobs(self.answer.requests[0])}

    async def complete(self, http: Request) -> JSONResponse:
        async for request in self.server.run_answers(http, [self.answer]):
            self.advance(request)
        self.record_outcome()
        choices = [{"index": i, "message": parser.answer.message(), "finish_reason": self.reason(i),
                    "logprobs": self.logprobs(p for group in self.answer.groups for p in group[i].logprobs)}
                   for i, parser in enumerate(self.parsers)]
        return JSONResponse({"id": self.id, "object": "chat.completion", "created": self.created,
                             "model": self.body.model, "choices": choices, "usage": usage([self.answer])}
                            | self.prompt_logprobs() | self.server.extra(self.body, [self.answer]))

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        def chunk(i: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": i, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            return event(self.head() | {"choices": [choice]} | self.blank())

        reported: Counter[int] = Counter()  # log-probabilities, by request
        for i in range(self.body.n):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for request in self.server.run_answers(http, [self.answer]):
            i, own = self.place[request.request_id], request.request_id
            ended = request.finish_reason is not None
            if delta := self.advance(request):
                count = len(request.logprobs)
                yield chunk(i, delta, None, self.logprobs(request.logprobs[reported[own] : count]))
                reported[own] = count
            if ended and (self.body.logprobs or not self.answer.more):
                yield chunk(i, {}, None if self.answer.more else self.reason(i),
                            self.logprobs(request.logprobs[reported[own] :]))
        if self.answer.cut:
            yield chunk(0, {}, self.reason(0))
        self.record_outcome()
        if last := self.server.last(self.body, [self.answer], usage([self.answer])):
            yield event(self.head() | last)

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.body.model}

    def blank(self) -> dict[str, Any]:
        options = self.body.stream_options
        return {"usage": None} if options is not None and options.include_usage else {}
