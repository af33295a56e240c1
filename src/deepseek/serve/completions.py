"""POST /v1/completions: texts or token ids -> engine -> texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from ..engine.request import Request as Generation
from ..engine.routing import Answer
from ..engine.sampler import Logprob
from ..errors import RequestError
from .protocol import CompletionRequest
from .service import Server, event, floored, usage


class Completion:
    """One request to /v1/completions, with one prompt or several."""

    def __init__(self, server: Server, http: Request, body: CompletionRequest) -> None:
        self.server, self.body = server, body
        self.id, self.created = f"cmpl-{secrets.token_hex(14)}", int(time.time())
        asked = body.sampling.get("prompt_logprobs")
        if body.echo and body.logprobs is not None:
            asked = max(asked or 0, body.logprobs)
        params = server.params(body, max_tokens=16 if body.max_tokens is None else body.max_tokens,
                               logprobs=body.logprobs, prompt_logprobs=asked)
        self.answers: list[Answer] = []
        self.echoes: list[tuple[str, list[int]]] = []  # of each request
        for i, prompt in enumerate(body.prompts):
            try:
                self.answers.append(server.answer(body, prompt, params, parse_special=body.parse_special))
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}" if len(body.prompts) > 1 else str(error)) from None
            requests, quoted = self.answers[-1].requests, any("passages" in part for part in self.answers[-1].trace)
            server.watch.begin(self.id, http, body.user, prompt if isinstance(prompt, str) else "", requests)
            ids = requests[0].prompt_ids
            echo = self._echo(ids if quoted else prompt, ids, params.skip_special_tokens) if body.echo else ("", [])
            self.echoes += [echo] * body.n
        self.requests = [request for answer in self.answers for request in answer.requests]
        self.place = {request.request_id: i for i, request in enumerate(self.requests)}

    def _echo(self, prompt: str | list[int], ids: Sequence[int], skip_special: bool) -> tuple[str, list[int]]:
        """(the prompt as text, where the text of each token begins in it). A begin token that we added has no text."""
        tokenizer, text = self.server.tokenizer, ""
        pieces = tokenizer.stream(skip_special=skip_special and not isinstance(prompt, str))
        ours = isinstance(prompt, str) and ids[0] == self.server.llm.bos_id and not (
            prompt.startswith(tokenizer.decode(ids[:1], skip_special=False)))
        offsets = []
        for n, token in enumerate(ids):
            offsets.append(len(text))
            text += "" if ours and not n else pieces.push(token)
        return prompt if isinstance(prompt, str) else text + pieces.flush(), offsets

    def name(self, token: int) -> str:
        """A token as text; part of a character in OpenAI's notation, `bytes:\\xf0\\x9f`."""
        tokenizer = self.server.llm.tokenizer
        if tokenizer is None:
            return str(token)
        text = tokenizer.token_text(token)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))

    def logprobs(self, i: int, start: int = 0) -> dict[str, Any] | None:
        """Log-probabilities of the tokens from `start` on; start = 0 includes those of an echoed prompt."""
        if self.body.logprobs is None:
            return None
        text, offsets = self.echoes[i]
        request, most = self.requests[i], self.body.logprobs
        said: list[tuple[int, Logprob | None, int]] = [
            (p.token, p, len(text) + p.offset) for p in request.logprobs[start:]]
        if self.body.echo and not start:
            said[:0] = zip(request.prompt_ids, self.first(request).prompt_logprobs, offsets, strict=True)
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, p, offset in said:
            out["tokens"].append(self.name(token))
            out["token_logprobs"].append(None if p is None else floored(p.logprob))
            out["top_logprobs"].append(None if p is None else {
                self.name(other): floored(value) for other, value in p.top[:most]})
            out["text_offset"].append(offset)
        return out

    def choice(self, i: int, text: str, start: int = 0) -> dict[str, Any]:
        request = self.requests[i]
        out = {"index": i, "text": text, "finish_reason": request.finish_reason, "logprobs": self.logprobs(i, start)}
        if self.body.sampling.get("prompt_logprobs") is not None and request.finish_reason is not None:
            out["prompt_logprobs"] = self.server.prompt_logprobs(self.first(request))
        return out

    def first(self, request: Generation) -> Generation:
        """The first of the continuations of a request's prompt, which has the prompt's log-probabilities."""
        return next(answer.requests[0] for answer in self.answers if request in answer.requests)

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.body.model}

    async def complete(self, http: Request) -> JSONResponse:
        async for _ in self.server.run_answers(http, self.answers):
            pass
        choices = [self.choice(i, self.echoes[i][0] + request.text) for i, request in enumerate(self.requests)]
        return JSONResponse(self.head() | {"choices": choices, "usage": usage(self.answers)}
                            | self.server.extra(self.body, self.answers))

    async def stream(self, http: Request) -> AsyncIterator[bytes]:
        sent, reported = [0] * len(self.requests), [0] * len(self.requests)
        async for request in self.server.run_answers(http, self.answers):
            i = self.place[request.request_id]
            ended, text = request.finish_reason is not None, self.echoes[i][0] + request.text
            count = len(request.logprobs)
            if not ended and len(text) == sent[i]:
                continue
            choice = self.choice(i, text[sent[i] :], reported[i])
            yield event(self.head() | {"choices": [choice | ({} if ended else {"finish_reason": None})]})
            sent[i], reported[i] = len(text), count
        if last := self.server.last(self.body, self.answers, usage(self.answers)):
            yield event(self.head() | last)
