"""POST /v1/completions: texts or token ids -> the engine -> texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from ..errors import RequestError
from .protocol import CompletionRequest
from .service import Server, event, usage


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
