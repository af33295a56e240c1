"""Runs requests of HTTP clients on the engine: admission, sampling parameters, waiting, shutdown.

The engine calls `on_token` when a request has new tokens; the event loop wakes up and sends them. A client that leaves,
a timeout and a shutdown abort the requests, whose pages are freed at once.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import Request
from torch import Tensor

from ..atlas import ExpertUsage
from ..domain import DomainClassifier
from ..engine import LLM, ExpertControl, SamplingParams
from ..engine.request import Prompt
from ..engine.request import Request as Generation
from ..engine.routing import Answer
from ..errors import ConfigError, MoEDRError, RequestError, shown
from ..files import to_json
from ..route import ExpertPool, PoolMember, RoutingDecision
from ..tokenizer import Tokenizer
from .bodies import SMALL, B, parse
from .bodies import read as read_body
from .middleware import ServeError, busy, to_serve_error
from .monitoring import BY_NAME, Watch
from .options import ServeOptions
from .protocol import Common, DeepseekOptions, EmbeddingRequest, GenerationRequest

T = TypeVar("T")
POLL_SECONDS = 0.25  # seconds between two checks that the client is still connected
MAX_AHEAD = 16  # tokens that are generated ahead of a slow client
SHOWN_NAMES = 20  # in an error
EMBED_BATCH = 8  # prompts of one request for embeddings that run at once
SHUTDOWN_GRACE = 5.0  # seconds for answers that were told to end
DONE = b"data: [DONE]\n\n"


class Server:
    """Serves one LLM."""

    def __init__(self, llm: LLM, options: ServeOptions) -> None:
        self.llm, self.options = llm, options
        if llm.pool is not None and not isinstance(llm.pool, ExpertPool):
            raise ConfigError(f"pool = {shown(llm.pool)}: must be an ExpertPool to be served")
        if options.pool_on_request and llm.pool is None:
            raise ConfigError("pool_on_request: the LLM must have a pool")
        self.pool: ExpertPool | None = llm.pool
        self.members: dict[str, PoolMember] = {one.name: one for one in self.pool.members} if self.pool else {}
        for kind, names in (("adapter", llm.adapters), ("member", self.members)):
            if options.name in names:
                raise ConfigError(f"{kind} {options.name}: is what the base is called: must have another name")
        if options.classifier is not None:
            llm.classifier = DomainClassifier.load(options.classifier)
        kinds = {"base": "base"} | {name: member.kind for name, member in self.members.items()}
        self.watch = Watch(llm, options.name, options.watch, texts=options.log_texts,
                           members=None if self.pool is None else kinds)
        self.began = int(time.time())
        self.closing = False  # new requests are refused
        self.ending = False  # open answers end now
        self.open = 0  # answers under way
        self._moved = deque[tuple[asyncio.Queue[Generation | None], Generation]]()  # new tokens that `run` has not seen
        # pools of their own: the default one also submits and aborts, which must not wait behind megabytes of text
        self.large = ThreadPoolExecutor(1, "prepare-large")
        self.preparing = ThreadPoolExecutor(2, "prepare")

    # ---- requests -----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        if self.llm.tokenizer is None:
            raise ServeError(400, "this model has no tokenizer")
        return self.llm.tokenizer

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the base model, of its adapters, and of the pool's other members."""
        return self.options.name, *dict.fromkeys([*self.llm.adapters, *self.members])

    def check_model(self, model: str) -> None:
        """Raises ServeError for a name that no model has."""
        if model != self.options.name and model not in self.members and model not in self.llm.adapters:
            names = self.models
            there = ", ".join(map(repr, names[:SHOWN_NAMES])) + (", …" if len(names) > SHOWN_NAMES else "")
            raise ServeError(404, f"model = {model!r}: there {'are' if len(names) > 1 else 'is'} {there}",
                             param="model", code="model_not_found")

    def admit(self, body: GenerationRequest | EmbeddingRequest, count: int = 1) -> None:
        """Raises ServeError for an unknown model, and where the queue has no room for `count` answers."""
        self.check_model(body.model)
        if self.closing:
            raise ServeError(503, "the server is shutting down", kind="server_error", headers={"retry-after": "10"})
        waiting = len(self.llm.engine.scheduler.waiting)
        if waiting + count > self.options.max_waiting:
            raise busy(f"{waiting} requests are waiting: {self.options.max_waiting} may")

    async def read(self, http: Request, form: type[B]) -> B:
        """Read and check the body of a request. Large ones are parsed one at a time, in a thread."""
        raw = await read_body(http)
        http.state.large = len(raw) > SMALL
        return await self.prepare(http, parse, raw, form) if http.state.large else parse(raw, form)

    async def prepare(self, http: Request, work: Callable[..., T], *args: Any) -> T:
        """Run in a thread what comes before the engine (templates, tokenizing), within the request's timeout.

        Large requests run one at a time, so that small ones do not wait for them.
        """
        left = http.state.arrived + self.options.timeout - time.monotonic()
        pool = self.large if http.state.large else self.preparing
        future = asyncio.get_running_loop().run_in_executor(pool, work, *args)
        try:
            return await asyncio.wait_for(future, max(left, 0.001))
        except TimeoutError:
            raise self._timeout_error() from None

    def _timeout_error(self) -> ServeError:
        return ServeError(504, f"the answer took longer than {self.options.timeout:g} seconds", kind="server_error",
                          code="timeout")

    async def embed(self, http: Request, prompts: Sequence[str | list[int]], adapter: str | None
                    ) -> tuple[list[Tensor], int]:
        """(embeddings, number of tokens) as by LLM.embed; EMBED_BATCH prompts at a time, so that other requests run."""
        vectors, tokens = [], 0
        for first in range(0, len(prompts), EMBED_BATCH):
            some = prompts[first : first + EMBED_BATCH]
            requests = await self.prepare(http, self._pooling_requests, some, adapter)
            async for _ in self.run(http, requests):
                pass
            vectors += [request.mean_H for request in requests]
            tokens += sum(len(request.prompt_ids) for request in requests)
        return vectors, tokens

    def _pooling_requests(self, prompts: Sequence[str | list[int]], adapter: str | None) -> list[Generation]:
        return [self.llm.pooling_request(prompt, adapter) for prompt in prompts]

    def params(self, body: Common, **more: Any) -> SamplingParams:
        own: DeepseekOptions = body.deepseek
        experts = None if own.experts is None else ExpertControl(**own.experts.model_dump())
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        fields: dict[str, Any] = {
            "max_tokens": body.max_tokens or self.llm.max_length, "temperature": body.temperature,
            "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
            "logit_bias": body.logit_bias or None,
            "top_p": body.top_p, "n": body.n, "stop": tuple(stop), "seed": body.seed, "regex": own.regex,
            "grammar": own.grammar, "routed": own.routed, "experts": experts} | body.sampling
        return SamplingParams(**(fields | {key: value for key, value in more.items() if value is not None}))

    def answer(self, body: Common, prompt: Prompt, params: SamplingParams, **more: Any) -> Answer:
        """The Answer to a prompt, by whom the body asks for. Raises RequestError for named experts where no expert has
        a name, and for what cannot be run."""
        own, atlas = body.deepseek, self.llm.engine.atlas
        if own.show_experts and not atlas:
            raise RequestError("show_experts = true: this model has no atlas, so none of its experts has a name")
        usage = [ExpertUsage(self.llm.model.config) for _ in range(body.n)] if own.show_experts or (
            own.trace and atlas) else None
        answer = Answer(self.llm, prompt, params, usage=usage, domain=own.domain, **self._chosen(body), **more)
        if answer.trace:
            self.watch.routed(answer, own.domain, answer.seconds)
        return answer

    def _chosen(self, body: Common) -> dict[str, Any]:
        """Who answers, as Answer takes it: the model by its name, adapters, or those that the pool chooses."""
        own, pool = body.deepseek, self.pool
        if pool is None and (own.pool or own.trace):
            raise RequestError(f"deepseek.{'pool' if own.pool else 'trace'}: this server has no pool (--pool)")
        model = None if body.model == self.options.name else body.model
        ways = {"model": model, "deepseek.adapter": own.adapter, "deepseek.pool": own.pool or None}
        given = [f"{key} = {shown(value)}" for key, value in ways.items() if value is not None]
        if len(given) > 1:
            raise RequestError(f"{given[0]} and {given[1]}: each says who answers: must be one of them")
        if pool is not None and model in self.members:
            return {"routing": RoutingDecision(pool.only(model), scorer=BY_NAME)}
        if model is not None or own.adapter is not None:
            return {"adapter": model if own.adapter is None else own.adapter}
        if isinstance(own.pool, list):
            assert pool is not None
            try:
                return {"routing": pool.among(own.pool)}
            except ConfigError as error:
                raise RequestError(f"deepseek.pool: {error}") from None
        if own.pool is None:
            return {"routing": False if self.options.pool_on_request else None}
        return {"routing": own.pool}

    def prompt_logprobs(self, request: Generation) -> list[dict[str, Any] | None]:
        """Log-probabilities of the prompt, in vLLM's form. Only the likeliest tokens have a rank."""
        def one(token: int, value: float, rank: int | None) -> dict[str, Any]:
            tokenizer = self.llm.tokenizer
            name = None if tokenizer is None else tokenizer.token_text(token)
            return {"logprob": floored(value), "rank": rank, "decoded_token": name}

        return [None if p is None else {str(p.token): one(p.token, p.logprob, None)} | {
            str(token): one(token, value, rank) for rank, (token, value) in enumerate(p.top, 1)}
            for p in request.prompt_logprobs]

    async def run_answers(self, http: Request, answers: Sequence[Answer]) -> AsyncIterator[Generation]:
        """As `run`, with the requests of all parts of the answers, part after part."""
        requests = [request for answer in answers for request in answer.requests]
        self.open += 1
        try:
            while requests:
                async with aclosing(self.run(http, requests)) as moved:
                    async for request in moved:
                        yield request
                requests = await self.prepare(http, self._advance, answers) if any(
                    answer.divided for answer in answers) else []
        finally:
            self.open -= 1

    def _advance(self, answers: Sequence[Answer]) -> list[Generation]:
        requests = []
        for answer in answers:
            before = answer.seconds
            if more := answer.advance():
                self.watch.routed(answer, None, answer.seconds - before)
            requests += more
        return requests

    async def run(self, http: Request, requests: Sequence[Generation]) -> AsyncGenerator[Generation]:
        """Yield a request whenever it has new tokens, until all have ended. Closing the generator aborts them."""
        loop, moved = asyncio.get_running_loop(), asyncio.Queue[Generation | None]()
        known = {request.request_id: 0 for request in requests}  # tokens that have been yielded
        clock: asyncio.TimerHandle | None = None

        def poll() -> None:
            nonlocal clock
            moved.put_nowait(None)
            clock = loop.call_later(POLL_SECONDS, poll)

        for request in requests:
            request.on_token = functools.partial(self._notify, loop, moved, known)
        late = False
        deadline = http.state.arrived + self.options.timeout
        left = {request.request_id for request in requests}
        poll()
        self.open += 1
        try:
            await asyncio.to_thread(self.llm.submit, *requests)
            while left:
                if late := time.monotonic() >= deadline:
                    raise self._timeout_error()
                if self.ending:
                    raise ServeError(503, "the server is shutting down", kind="server_error", code="shutting_down")
                one = await moved.get()
                if one is None:
                    if await http.is_disconnected():
                        return
                    continue
                if one.request_id not in left:  # woken once more after its end
                    continue
                known[one.request_id], one.paused = len(one.token_ids), False
                if one.finish_reason is not None:
                    left.discard(one.request_id)
                if one.error is not None:
                    raise one.error
                yield one
        finally:
            self.open -= 1
            if clock is not None:
                clock.cancel()
            # begun at once: where the client has left, every await is cancelled, again and again
            await asyncio.shield(loop.run_in_executor(None, self._finish, requests, late))

    def _notify(self, loop: asyncio.AbstractEventLoop, moved: asyncio.Queue[Generation | None],
                known: Mapping[int, int], one: Generation) -> None:
        """Take the engine's call that a request has new tokens; wake the event loop once a step.

        A request whose client does not read is paused.
        """
        one.paused = len(one.token_ids) - known[one.request_id] > MAX_AHEAD  # until this is read
        self._moved.append((moved, one))
        if len(self._moved) == 1:
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._moved:
            moved, one = self._moved[0]
            moved.put_nowait(one)
            self._moved.popleft()

    def _finish(self, requests: Sequence[Generation], late: bool) -> None:
        for request in requests:
            whole = request.finish_reason is not None
            self.llm.driver.abort(request)
            if request.pooled is None:
                self.watch.end(request, late and not whole)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and let open answers end for `seconds`; then end them."""
        self.closing = True
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.ending = True

    async def shutdown(self, seconds: float = 30.0) -> None:
        if not self.ending:  # else it has drained already
            await self.drain(seconds)
        until = time.monotonic() + SHUTDOWN_GRACE
        while self.open and time.monotonic() < until:  # they check every POLL_SECONDS
            await asyncio.sleep(0.05)
        for pool in (self.large, self.preparing):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.llm.close)
        await asyncio.to_thread(self.watch.close)

    def extra(self, body: Common, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answers' `deepseek` key: what was asked for, with an entry a choice, and the passages that were quoted;
        no key where there is neither."""
        out: dict[str, Any] = {}
        if body.deepseek.routed:
            out["routed"] = self._routed([request for answer in answers for request in answer.requests])
        usages = [usage for answer in answers if isinstance(answer.usage, list) for usage in answer.usage]
        experts = {"experts": [self._named_experts(usage) for usage in usages]} if usages else {}
        if body.deepseek.show_experts:
            out |= experts
        parts = [({"prompt": i} if len(answers) > 1 else {}) | _without_folders(part)
                 for i, answer in enumerate(answers) for part in answer.trace]
        if body.deepseek.trace:
            out["routing"] = {"parts": parts} | experts
        if cited := [{"part": i} | passage for i, part in enumerate(parts) for passage in part.get("passages", ())]:
            out["citations"] = cited
        return {"deepseek": out} if out else {}

    def last(self, body: Common, answers: Sequence[Answer], counts: Mapping[str, int]) -> dict[str, Any]:
        """What a stream's last chunk holds beside its head: usage and the `deepseek` key; empty where neither was asked
        for."""
        asked = body.stream_options is not None and body.stream_options.include_usage
        out = ({"usage": counts} if asked else {}) | self.extra(body, answers)
        return {"choices": []} | out if out else {}

    def _named_experts(self, usage: ExpertUsage) -> dict[str, float]:
        """Each named group's share of the gate's weight, the largest first, over the tokens that ran."""
        atlas = self.llm.engine.atlas
        assert atlas is not None
        return {name: round(share, 4) for name, share in usage.shares(atlas).items()}

    def _routed(self, requests: Sequence[Generation]) -> list[dict[str, list[int]]]:
        """How many of each request's tokens visited each expert, by layer; empty where the client has left."""
        layers, experts = self.llm.model.config.moe_layers, self.llm.model.config.n_routed_experts
        choices = []
        for request in requests:
            if not request.routes:
                return []
            index_TLK = torch.cat(request.routes)
            choices.append({str(layer): torch.bincount(index_TLK[:, row].flatten().clamp(min=-1) + 1,
                                                       minlength=experts + 1)[1:].tolist()
                            for row, layer in enumerate(layers)})
        return choices


def _without_folders(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a trace that names files without their folders, which are the server's own."""
    passages = [passage | {"file": Path(passage["file"]).name} for passage in part.get("passages", ())]
    return {**part, **({"passages": passages} if passages else {})}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens of the answers, all parts together."""
    groups = [group for answer in answers for group in answer.groups]
    prompt, new, cached = (sum(counts) for counts in zip(*(
        (len(group[0].prompt_ids), sum(len(request.token_ids) for request in group), group[0].sequence.cached_tokens)
        for group in groups), strict=True))
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached}}


def floored(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, -9999.0)


def event(body: Mapping[str, Any]) -> bytes:
    return f"data: {to_json(body, ensure_ascii=False)}\n\n".encode()


async def sse(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """End a stream with [DONE], or with an error event where it fails: its status has been sent."""
    try:
        async for part in stream:
            yield part
        yield DONE
    except (ServeError, MoEDRError, OSError) as error:
        yield event(to_serve_error(error).body)
