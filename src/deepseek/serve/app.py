"""The routes, and the form of errors. What a route does is in the module of its name."""

from __future__ import annotations

import asyncio
import base64
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.responses import Response as Plain
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .. import grammars, templates
from ..engine import LLM
from ..errors import DataError, MoEDRError
from ..files import to_json
from ..model.cache import PAGE
from .bodies import describe, takes
from .chat import Chat, chat_prompt, conversation
from .completions import Completion
from .middleware import Guard, ServeError, to_serve_error
from .monitoring import add_routes
from .options import ServeOptions
from .pages import page
from .protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    ResponsesRequest,
    TokenizeRequest,
    WarmRequest,
)
from .responses import Response, Store
from .service import Server, sse


def create_app(llm: LLM, options: ServeOptions) -> FastAPI:
    """The ASGI application. The LLM is closed with it."""
    server = Server(llm, options)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        for workers in (templates.WORKERS, grammars.WORKERS):  # so that the first request does not wait for them
            await asyncio.to_thread(workers.start)
        await asyncio.to_thread(llm.preload)
        yield
        await server.shutdown()

    app = FastAPI(title="MoE-DR", lifespan=life, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(Guard, keys=options.api_key, body=options.max_body, on_refused=server.watch.counters.refused,
                       hosts=options.allowed_host, bound=options.host,
                       requests=options.max_waiting + llm.engine.options.max_num_seqs)
    if options.cors_origin:  # around the guard, since a browser asks first, without the key
        app.add_middleware(CORSMiddleware, allow_origins=options.cors_origin, allow_methods=["*"], allow_headers=["*"],
                           expose_headers=["x-request-id", "retry-after"])

    async def fail(_: Request, error: Exception) -> JSONResponse:
        return to_serve_error(error).response

    for kind in (ServeError, RequestValidationError, HTTPException, RecursionError, MoEDRError):
        app.add_exception_handler(kind, fail)

    _add_answers(app, server)
    _add_embeddings(app, server)
    _add_tokens(app, server)
    _add_models(app, server)
    add_routes(app, server.watch)
    describe(app)
    return app


def _add_answers(app: FastAPI, server: Server) -> None:
    responses = Store()

    async def answer(http: Request, body: GenerationRequest, make: Callable[..., Chat | Completion | Response],
                     count: int = 1) -> Any:
        server.admit(body, count)
        one = await server.prepare(http, make, server, http, body)
        if not body.stream:
            return await one.complete(http)
        stream = one.stream(http)
        return StreamingResponse(stream if isinstance(one, Response) else sse(stream), media_type="text/event-stream")

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat(http: Request) -> Any:
        body = await server.read(http, ChatRequest)
        return await answer(http, body, Chat, body.n)

    @app.post("/v1/responses", openapi_extra=takes(ResponsesRequest))
    async def respond(http: Request) -> Any:
        body = await server.read(http, ResponsesRequest)
        return await answer(http, body, functools.partial(Response, responses))

    @app.get("/v1/responses/{name}")
    async def response(name: str) -> dict[str, Any]:
        return responses.find(name).body

    @app.delete("/v1/responses/{name}")
    async def forget(name: str) -> dict[str, Any]:
        responses.delete(name)
        return {"id": name, "object": "response", "deleted": True}

    @app.post("/v1/completions", openapi_extra=takes(CompletionRequest))
    async def completions(http: Request) -> Any:
        body = await server.read(http, CompletionRequest)
        return await answer(http, body, Completion, body.n * len(body.prompts))


def _add_embeddings(app: FastAPI, server: Server) -> None:
    @app.post("/v1/embeddings", openapi_extra=takes(EmbeddingRequest))
    async def embeddings(http: Request) -> Plain:
        body = await server.read(http, EmbeddingRequest)
        server.admit(body)
        if body.model not in (server.options.name, *server.llm.adapters):
            raise ServeError(400, f"model = {body.model!r}: must be the base or an adapter, to embed with",
                             param="model")
        if body.dimensions not in (None, size := server.llm.model.config.hidden_size):
            raise ServeError(400, f"dimensions = {body.dimensions}: must be {size}, what the model has",
                             param="dimensions")
        vectors, tokens = await server.embed(
            http, body.inputs, None if body.model == server.options.name else body.model)

        def write() -> bytes:  # one by one: a text of megabytes made at once holds up everybody
            data = (to_json({"object": "embedding", "index": i, "embedding": vector.tolist() if (
                body.encoding_format == "float") else base64.b64encode(vector.numpy().tobytes()).decode()})
                for i, vector in enumerate(vectors))
            rest = {"object": "list", "model": body.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                    "deepseek": {"pooling": "mean of the last hidden states"}}
            return f'{{"data": [{", ".join(data)}], {to_json(rest)[1:]}'.encode()

        return Plain(await server.prepare(http, write), media_type="application/json")


def _add_tokens(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize", openapi_extra=takes(TokenizeRequest))
    async def tokenize(http: Request) -> dict[str, Any]:
        body = await server.read(http, TokenizeRequest)
        server.check_model(body.model if body.model is not None else server.options.name)
        tokenizer, prompt = server.tokenizer, body.prompt

        def work() -> dict[str, Any]:
            if prompt is None:
                messages, asked = conversation(server.llm, body)
                ids = chat_prompt(server.llm, messages, **asked)
            else:
                server.llm.check_length(prompt)
                ids = tokenizer.encode(prompt, bos=body.add_special_tokens, special=body.parse_special)
            names = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
            return {"count": len(ids), "max_model_len": server.llm.max_length, "tokens": ids, "token_strs": names}

        try:
            return await server.prepare(http, work)
        except DataError as error:  # half a surrogate pair, say
            raise ServeError(400, f"prompt: {error}", param="prompt") from None

    @app.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
    async def detokenize(http: Request) -> dict[str, Any]:
        body = await server.read(http, DetokenizeRequest)
        server.check_model(body.model if body.model is not None else server.options.name)
        tokenizer = server.tokenizer

        def work() -> dict[str, Any]:
            if (most := max(body.tokens, default=0)) >= (size := tokenizer.vocab_size):
                raise ServeError(400, f"token id {most}: must lie in the vocabulary 0..{size - 1}", param="tokens")
            return {"prompt": tokenizer.decode(body.tokens, skip_special=False)}

        return await server.prepare(http, work)


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server, name) for name in server.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return _model(server, name)

    @app.post("/v1/deepseek/warm", openapi_extra=takes(WarmRequest))
    async def warm(http: Request) -> dict[str, Any]:
        body = await server.read(http, WarmRequest)
        done = await asyncio.to_thread(server.llm.warm_up, body.experts)
        return {"experts": done.experts, "of": done.of, "bytes": done.bytes, "seconds": done.seconds,
                "expected_coverage": done.expected}

    chat = page("serve", "page.html")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def start() -> HTMLResponse:
        return chat()

    @app.get("/health")
    async def health() -> JSONResponse:
        scheduler, pages = server.llm.engine.scheduler, server.llm.engine.block_manager
        return JSONResponse({"status": "closing" if server.closing else "ok", "running": len(scheduler.running),
                             "waiting": len(scheduler.waiting), "free_positions": pages.available * PAGE},
                            status_code=503 if server.closing else 200)


def _model(server: Server, name: str) -> dict[str, Any]:
    """An entry of /v1/models in vLLM's form: an adapter, or another member of the pool, has a parent."""
    atlas, member, base = server.llm.engine.atlas, server.members.get(name), server.options.name
    kind = {"kind": "base" if name == base else "adapter"} if member is None else {
        "kind": member.kind, "domain": member.domain}
    return {"id": name, "object": "model", "created": server.began, "owned_by": "moe-dr",
            "parent": None if name == base else base, "max_model_len": server.llm.max_length,
            "deepseek": {"experts": [] if atlas is None else list(atlas), **kind}}
