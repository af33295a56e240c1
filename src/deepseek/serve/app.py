"""The routes. A request's life: body -> prompt ids and SamplingParams -> the engine's background thread -> deltas.

The engine says through `on_token` that a request has moved; the event loop wakes, reads what is new and sends it. A
client that leaves, a time-out and a shutdown abort the requests, whose pages go back at once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..engine import LLM, ExpertControl, SamplingParams
from ..engine.request import Request as Generation
from ..errors import DataError, MoEDRError, RequestError
from ..model.cache import PAGE
from ..watch.monitor import WatchOptions
from .answers import THINK, AnswerText, forced_schema, written
from .guard import Guard, ServeError
from .protocol import ChatRequest, Common, CompletionRequest, EmbeddingRequest, Extension, Message, Tool, WarmRequest
from .watching import Watch, add_routes

LOOK = 0.25  # seconds between two looks whether the client is still there
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class ServeOptions:
    """name: what clients call the model. keys: empty lets everybody in. waiting: requests that may queue. body: bytes.
    timeout: seconds that an answer may take. log_texts: prompts and answers go to the log. watch: how it is watched."""

    name: str
    keys: tuple[str, ...] = ()
    waiting: int = 256
    body: int = 4 << 20
    timeout: float = 600.0
    log_texts: bool = False
    watch: WatchOptions = field(default_factory=WatchOptions)


class Server:
    """Answers on one LLM."""

    def __init__(self, llm: LLM, options: ServeOptions) -> None:
        self.llm, self.options = llm, options
        self.watch = Watch(llm, options.name, options.watch, texts=options.log_texts)
        self.began = int(time.time())
        self.closing = False
        self.open = 0  # answers under way

    # ---- requests -----------------------------------------------------------------------------------------------

    def admit(self, body: Common | EmbeddingRequest, count: int = 1) -> None:
        """Raises ServeError for another model, and where the queue is full."""
        if body.model != self.options.name:
            raise ServeError(404, f"model = {body.model!r}: there is {self.options.name!r}", param="model",
                             code="model_not_found")
        if self.closing:
            raise ServeError(503, "the server is shutting down", kind="server_error", headers={"retry-after": "10"})
        waiting = len(self.llm.engine.scheduler.waiting)
        if waiting + count > self.options.waiting:
            raise ServeError(429, f"{waiting} requests are waiting: {self.options.waiting} may",
                             kind="rate_limit_error", code="queue_full", headers={"retry-after": "1"})

    def params(self, body: Common, **more: Any) -> SamplingParams:
        own: Extension = body.deepseek
        experts = None if own.experts is None else ExpertControl(**own.experts.model_dump())
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        fields: dict[str, Any] = {
            "max_tokens": body.max_tokens or self.llm.max_length, "temperature": body.temperature,
            "top_p": body.top_p, "n": body.n, "stop": tuple(stop), "seed": body.seed, "top_k": own.top_k,
            "min_p": own.min_p, "repetition_penalty": own.repetition_penalty, "ignore_eos": own.ignore_eos,
            "regex": own.regex, "grammar": own.grammar, "routed": own.routed, "experts": experts}
        return SamplingParams(**(fields | {key: value for key, value in more.items() if value is not None}))

    def chat_prompt(self, body: ChatRequest) -> tuple[list[int], str]:
        """(ids, the rendered text). Tools go through the template, or in front where it knows none."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ServeError(400, "this model has no tokenizer")
        messages = [_plain(message) for message in body.messages]
        if not tokenizer.template_knows("tool_calls"):
            messages = [_said_of_tools(message) for message in messages]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        if body.tool_choice == "none":
            tools = []
        extra: dict[str, Any] = {}
        if tools and tokenizer.template_knows("tools"):
            extra["tools"] = tools
        elif tools:
            messages.insert(0, {"role": "system", "content": "Tools:\n" + "\n".join(
                json.dumps(tool["function"], ensure_ascii=False) for tool in tools)})
        try:
            return tokenizer.encode_chat(messages, **extra), tokenizer.chat(messages, **extra)
        except DataError as error:  # half a surrogate pair, say
            raise RequestError(f"a message is not text: {error}") from None

    async def run(self, http: Request, requests: Sequence[Generation]) -> AsyncIterator[Generation]:
        """Yields a request whenever it has moved, until all have ended. Leaving aborts them."""
        loop, moved = asyncio.get_running_loop(), asyncio.Queue[Generation]()

        def tell(one: Generation) -> None:
            loop.call_soon_threadsafe(moved.put_nowait, one)

        for request in requests:
            request.on_token = tell
        late = False
        deadline, look = loop.time() + self.options.timeout, loop.time() + LOOK
        left = {request.number for request in requests}
        self.open += 1
        try:
            await asyncio.to_thread(self.llm.submit, *requests)
            while left:
                if late := loop.time() >= deadline:
                    raise ServeError(504, f"the answer took longer than {self.options.timeout:g} seconds",
                                     kind="server_error", code="timeout")
                if loop.time() >= look:
                    look = loop.time() + LOOK
                    if await http.is_disconnected():
                        return
                try:
                    one = await asyncio.wait_for(moved.get(), LOOK)
                except TimeoutError:
                    continue
                if one.finish_reason is not None:
                    left.discard(one.number)
                if one.error is not None:
                    raise one.error
                yield one
        finally:
            self.open -= 1
            # begun at once: where the client has left, every await is cancelled, again and again
            await asyncio.shield(loop.run_in_executor(None, self._leave, requests, late))

    def _leave(self, requests: Sequence[Generation], late: bool) -> None:
        for request in requests:
            whole = request.finish_reason is not None
            self.llm.engine.abort(request)
            self.watch.end(request, late and not whole)

    async def shut(self, seconds: float = 30.0) -> None:
        """Let open answers end, for a while; then end them."""
        self.closing = True
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.llm.close)
        await asyncio.to_thread(self.watch.close)

    def extra(self, body: Common, requests: Sequence[Generation]) -> dict[str, Any]:
        """What comes back under our own key."""
        if not body.deepseek.routed:
            return {}
        layers, experts = self.llm.model.config.moe_layers, self.llm.model.config.n_routed_experts
        choices = []
        for request in requests:
            if not request.routed:  # its client has left
                return {}
            index_TLK = torch.cat(request.routed)
            choices.append({str(layer): torch.bincount(index_TLK[:, row].flatten().clamp(min=-1) + 1,
                                                       minlength=experts + 1)[1:].tolist()
                            for row, layer in enumerate(layers)})
        return {"deepseek": {"routed": choices}}


def usage(requests: Sequence[Generation]) -> dict[str, Any]:
    prompt, new = len(requests[0].prompt_ids), sum(len(request.token_ids) for request in requests)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": requests[0].cached_tokens}}


def event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content one text, arguments as they were sent."""
    out = message.model_dump(exclude_none=True)
    content = message.content
    out["content"] = content if isinstance(content, str) or content is None else "".join(part.text for part in content)
    if out["role"] == "developer":
        out["role"] = "system"
    return out


def _said_of_tools(message: dict[str, Any]) -> dict[str, Any]:
    """Calls and results as text, for a template that knows neither."""
    if calls := message.get("tool_calls"):
        text = (message["content"] or "") + written([call["function"] for call in calls])
        return {"role": "assistant", "content": text}
    return {"role": "user", "content": message["content"]} if message["role"] == "tool" else message


# ---- chat ----------------------------------------------------------------------------------------------------------


class Chat:
    """One /v1/chat/completions."""

    def __init__(self, server: Server, http: Request, body: ChatRequest) -> None:
        self.server, self.body = server, body
        self.id, self.created = f"chatcmpl-{secrets.token_hex(14)}", int(time.time())
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
        ids, text = server.chat_prompt(body)
        params = server.params(body, max_tokens=body.max_completion_tokens or body.max_tokens,
                               json_schema=json.dumps(schema) if schema is not None else None,
                               logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        said = next((m for m in reversed(body.messages) if m.role == "user"), body.messages[-1])
        question = str(_plain(said)["content"] or "")
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
        tokenizer = self.server.llm.tokenizer
        assert tokenizer is not None

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


# ---- completions ---------------------------------------------------------------------------------------------------


class Completion:
    """One /v1/completions, of one prompt or several."""

    def __init__(self, server: Server, http: Request, body: CompletionRequest) -> None:
        self.server, self.body = server, body
        self.id, self.created = f"cmpl-{secrets.token_hex(14)}", int(time.time())
        params = server.params(body, max_tokens=body.max_tokens or 16, logprobs=body.logprobs)
        self.groups = []
        for i, prompt in enumerate(body.prompts):
            try:
                self.groups.append(server.llm.requests(prompt, params, domain=body.deepseek.domain))
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}" if len(body.prompts) > 1 else str(error)) from None
            server.watch.begin(self.id, http, body.user, prompt if isinstance(prompt, str) else "", self.groups[-1])
        self.requests = [request for group in self.groups for request in group]
        self.place = {request.number: i for i, request in enumerate(self.requests)}

    def logprobs(self, i: int, start: int = 0, offset: int = 0) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        tokenizer = self.server.llm.tokenizer
        name = (lambda token: tokenizer.decode([token], skip_special=False)) if tokenizer is not None else str
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for p in self.requests[i].logprobs[start:]:
            out["tokens"].append(name(p.token))
            out["token_logprobs"].append(p.logprob)
            out["top_logprobs"].append({name(token): value for token, value in p.top})
            out["text_offset"].append(offset)
            offset += len(out["tokens"][-1])
        return out

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.body.model}

    def usage(self) -> dict[str, Any]:
        parts = [usage(group) for group in self.groups]
        return {key: sum(part[key] for part in parts) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}

    async def whole(self, http: Request) -> JSONResponse:
        async for _ in self.server.run(http, self.requests):
            pass
        choices = [{"index": i, "text": request.text, "finish_reason": request.finish_reason,
                    "logprobs": self.logprobs(i)} for i, request in enumerate(self.requests)]
        return JSONResponse(self.head() | {"choices": choices, "usage": self.usage()}
                            | self.server.extra(self.body, self.requests))

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        sent, told = [0] * len(self.requests), [0] * len(self.requests)
        done = [False] * len(self.requests)
        async for request in self.server.run(http, self.requests):
            i = self.place[request.number]
            ended, text, count = request.finish_reason is not None, request.text, len(request.logprobs)
            if done[i] or (not ended and len(text) == sent[i]):
                continue
            done[i] = ended
            yield event(self.head() | {"choices": [{
                "index": i, "text": text[sent[i] :], "finish_reason": request.finish_reason if ended else None,
                "logprobs": self.logprobs(i, told[i], sent[i])}]})
            sent[i], told[i] = len(text), count
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event(self.head() | {"choices": [], "usage": self.usage()})


async def _sse(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream that has begun can only say in words that it failed."""
    try:
        async for part in stream:
            yield part
        yield DONE
    except (ServeError, MoEDRError, OSError) as error:
        body = error.body if isinstance(error, ServeError) else ServeError(500, str(error), kind="server_error").body
        yield event(body)


# ---- the app ---------------------------------------------------------------------------------------------------------


def create_app(llm: LLM, options: ServeOptions) -> FastAPI:
    """The ASGI application. The LLM is closed with it."""
    server = Server(llm, options)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await server.shut()

    app = FastAPI(title="MoE-DR", lifespan=life, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(Guard, keys=options.keys, body=options.body, told=server.watch.counters.refused)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(ServeError(400, f"{where}: {first['msg']}" if where else str(first["msg"]), param=where or None))

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return _error(ServeError(400, str(error)))

    @app.exception_handler(ServeError)
    async def served(_: Request, error: ServeError) -> JSONResponse:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _error(ServeError(error.status_code, str(error.detail)))

    @app.exception_handler(MoEDRError)
    async def broken(_: Request, error: MoEDRError) -> JSONResponse:
        return _error(ServeError(500, str(error), kind="server_error"))

    @app.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatRequest) -> Any:
        server.admit(body, body.n)
        one = await asyncio.to_thread(Chat, server, http, body)
        return StreamingResponse(_sse(one.stream(http)), media_type="text/event-stream") if body.stream else (
            await one.whole(http))

    @app.post("/v1/completions")
    async def completions(http: Request, body: CompletionRequest) -> Any:
        server.admit(body, body.n * len(body.prompts))
        one = await asyncio.to_thread(Completion, server, http, body)
        return StreamingResponse(_sse(one.stream(http)), media_type="text/event-stream") if body.stream else (
            await one.whole(http))

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        server.admit(body)
        vectors, tokens = await asyncio.to_thread(llm.embed, body.inputs)
        data = [{"object": "embedding", "index": i, "embedding": base64.b64encode(vector.numpy().tobytes()).decode()
                 if body.encoding_format == "base64" else vector.tolist()} for i, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": body.model, "usage": {
            "prompt_tokens": tokens, "total_tokens": tokens}, "deepseek": {"pooling": "mean of the last hidden states"}}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != options.name:
            raise ServeError(404, f"model = {name!r}: there is {options.name!r}", param="model", code="model_not_found")
        return _model(server)

    @app.post("/v1/deepseek/warm")
    async def warm(body: WarmRequest) -> dict[str, Any]:
        done = await asyncio.to_thread(llm.warm_up, body.experts)
        return {"experts": done.experts, "of": done.of, "bytes": done.bytes, "seconds": done.seconds,
                "expected_coverage": done.expected}

    @app.get("/health")
    async def health() -> JSONResponse:
        scheduler, pages = llm.engine.scheduler, llm.engine.pages
        return JSONResponse({"status": "closing" if server.closing else "ok", "running": len(scheduler.running),
                             "waiting": len(scheduler.waiting), "free_positions": pages.available * PAGE},
                            status_code=503 if server.closing else 200)

    add_routes(app, server.watch)
    return app


def _model(server: Server) -> dict[str, Any]:
    atlas = server.llm.engine.atlas
    return {"id": server.options.name, "object": "model", "created": server.began, "owned_by": "moe-dr",
            "max_model_len": server.llm.max_length, "deepseek": {"experts": [] if atlas is None else list(atlas)}}


def _error(error: ServeError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)
