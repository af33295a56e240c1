"""Prompts -> texts: the engine with a tokenizer in front."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..atlas.usage import ExpertUsage
from ..checkpoint import Dtype, expert_spans, load_model, resolve
from ..domain import KeywordRules
from ..errors import ConfigError, DataError, RequestError
from ..model import CausalLM
from ..tokenizer import Tokenizer
from .constraint import Constraints
from .engine import Engine, EngineOptions, atlas_beside
from .request import Coupling, Request, RequestOutput
from .residency import Residency
from .sampler import SamplingParams
from .warmup import Warmup, warm_up

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


class LLM:
    """A model and its tokenizer, ready to continue prompts.

    path_or_model: a checkpoint folder, a known name, a hub id, or a CausalLM (used as it is, in evaluation mode;
    `dtype` and `device` then do not apply). tokenizer: instead of the one beside the checkpoint; a CausalLM without
    one takes token ids only and gives no text. adapter: as in `load_model`. engine_options: those of EngineOptions.
    Raises what `load_model` and `Tokenizer.load` raise, and ConfigError for an impossible option.
    """

    def __init__(
        self, path_or_model: str | Path | CausalLM, *, tokenizer: Tokenizer | None = None, dtype: Dtype = "auto",
        device: torch.device | str = "cpu", adapter: str | Path | None = None, **engine_options: Any,
    ) -> None:
        options = EngineOptions.of(engine_options)
        atlas = folder = None
        if isinstance(path_or_model, CausalLM):
            self.model = path_or_model.eval()
        else:
            folder = resolve(path_or_model)
            tokenizer = tokenizer or Tokenizer.load(folder)
            self.model = load_model(folder, dtype, device, adapter=adapter)
            atlas = atlas_beside(folder)
        residency = None
        if options.expert_memory is not None:
            if folder is None:
                raise ConfigError("expert_memory: needs a checkpoint to read experts from, not a model in memory")
            residency = Residency(self.model, expert_spans(folder), int(options.expert_memory),
                                  prefetch=options.prefetch)
        self.warmup: Warmup | None = None
        if options.warmup_experts:
            self.warmup = warm_up(self.model, residency, tuple(options.warmup_experts), atlas, folder)
        self.tokenizer = tokenizer
        self.engine = Engine(self.model, options, atlas=atlas, residency=residency)
        config = self.model.config
        self.max_length = config.max_position_embeddings
        self.bos_id = config.bos_token_id if tokenizer is None else tokenizer.bos_id
        self.eos_ids = frozenset(config.eos_token_ids) | frozenset(() if tokenizer is None else tokenizer.eos_ids)
        self._rules = KeywordRules()
        self._constraints = Constraints(tokenizer, config.vocab_size, self.eos_ids)
        self._loop = threading.Condition(self.engine.lock)
        self._thread: threading.Thread | None = None

    # ---- the verbs ----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        usage: ExpertUsage | None = None, domains: Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; one result a prompt, in order.

        prompts: each a text, a list of token ids, or a list of chat messages `{"role", "content"}`.
        params: for all, or one a prompt. usage: counts the experts that prompt and output tokens visit. domains: names
        that say what a prompt is about, for batching by expert; keyword rules guess the missing ones.
        Raises RequestError, before any prompt runs, for a prompt that is empty, too long or of another kind.
        """
        if isinstance(prompts, str):
            raise RequestError(f"prompts = {prompts!r}: must be a list of prompts, not one text")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        for what, given in (("params", params), ("domains", domains)):
            if given is not None and len(given) != len(prompts):
                raise RequestError(f"{what} has {len(given)} entries: must be one for all or one for each of "
                                   f"the {len(prompts)} prompts")
        groups = []
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            try:
                groups.append(self.requests(prompt, one, domain=None if domains is None else domains[i]))
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
        everyone = [request for group in groups for request in group]
        self._run(everyone, usage)
        return [outcome(group) for group in groups]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, usage: ExpertUsage | None = None
    ) -> Iterator[str]:
        """Yield the text of one prompt piece by piece; the pieces together are what `generate` returns.

        The prompt is checked at once, and run when the first piece is asked for; closing the iterator aborts it.
        """
        request, *_ = self.requests(prompt, replace(params or SamplingParams(), n=1))

        def pieces() -> Iterator[str]:
            sent = 0
            self.engine.add(request)
            try:
                while request.finish_reason is None or len(request.text) > sent:
                    if len(request.text) > sent:
                        yield request.text[sent:]
                        sent = len(request.text)
                    else:
                        self._step(usage)
            finally:
                self.engine.abort(request)

        return pieces()

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, usage: ExpertUsage | None = None
    ) -> RequestOutput:
        """The assistant's answer to a conversation of `{"role", "content"}` messages."""
        return self.generate([messages], params, usage=usage)[0]

    def mix(
        self, prompts: Sequence[Prompt], weights: Sequence[float] | None = None, params: SamplingParams | None = None
    ) -> RequestOutput:
        """One continuation of several prompts at once: they advance together, and each token is drawn from the weighted
        mean of their distributions (weights: positive, all equal if not given). The output is the first prompt's."""
        weights = [1.0] * len(prompts) if weights is None else list(weights)
        if not prompts or len(weights) != len(prompts) or min(weights) <= 0:
            raise RequestError(f"weights = {weights}: must be positive, one for each of {len(prompts)} prompts, one at "
                               "least")
        params = replace(params or SamplingParams(), n=1)
        requests = [self.requests(prompt, params)[0] for prompt in prompts]
        shortest = min(request.limit for request in requests)
        coupling = Coupling(weights)
        for request in requests:
            request.coupling, request.limit = coupling, shortest
            coupling.members.append(request)
        if len(requests) > self.engine.options.batch_size:
            raise RequestError(f"{len(requests)} prompts are coupled: must be batch_size "
                               f"({self.engine.options.batch_size}) at most")
        self._run(requests, None)
        return requests[0].output()

    async def stream_async(
        self, prompt: Prompt, params: SamplingParams | None = None, *, domain: str | None = None
    ) -> AsyncIterator[Request]:
        """Yields the request after every token, until it has ended; its `text` and `token_ids` grow. Any number may run
        at once. Leaving the iteration aborts the request."""
        request, *_ = self.requests(prompt, replace(params or SamplingParams(), n=1), domain=domain)
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: Request) -> None:
            loop.call_soon_threadsafe(arrived.set)

        request.on_token = tell
        self.submit(request)
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                ended = request.finish_reason is not None
                yield request
                if ended:
                    return
        finally:
            self.engine.abort(request)

    # ---- running ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Hand a request to the background thread, which is started by the first one."""
        with self._loop:
            self.engine.add(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
            self._loop.notify()

    def _work(self) -> None:
        while True:
            with self._loop:
                while self.engine.idle:
                    self._loop.wait()
            self.engine.step()

    def _run(self, requests: Sequence[Request], usage: ExpertUsage | None) -> None:
        try:
            for request in requests:
                self.engine.add(request)
            while any(request.finish_reason is None for request in requests):
                self._step(usage)
        finally:
            for request in requests:
                self.engine.abort(request)

    def _step(self, usage: ExpertUsage | None) -> None:
        with self.engine.lock:
            self.engine.usage = usage
            self.engine.step()
            self.engine.usage = None

    # ---- prompts ------------------------------------------------------------------------------------------------

    def requests(self, prompt: Prompt, params: SamplingParams, *, domain: str | None = None) -> list[Request]:
        """The prompt as `params.n` requests for the engine, checked."""
        if params.stop:
            self._need_tokenizer("a stop string")
        ids = self.encode(prompt)
        if domain is None and (text := _said(prompt)):
            domain = self._rules.predict(text)
        out: list[Request] = []
        for i in range(params.n):
            own = params if params.seed is None or not i else replace(params, seed=params.seed + i)
            request = Request(
                ids, own, limit=min(params.max_tokens, self.max_length - len(ids)), eos_ids=self.eos_ids,
                tokenizer=self.tokenizer, vocabulary=self.model.config.vocab_size, domain=domain,
                constraint=self._constraints.of(params))
            request.after = out[0] if out else None
            out.append(request)
        return out

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as `generate` would run it: a text after the tokenizer's begin-of-sequence token, a
        conversation through its chat template, ids as they are; an empty prompt is the begin token alone.

        Raises RequestError for a prompt that cannot be run.
        """
        try:
            ids = self._ids(prompt)
        except DataError as error:  # half a surrogate pair, say
            raise RequestError(f"the prompt is not text: {error}") from None
        if not ids:
            if self.bos_id is None:
                raise RequestError("the prompt is empty and the tokenizer has no begin-of-sequence token to start from")
            ids = [self.bos_id]
        vocabulary = self.model.config.vocab_size
        if outside := [i for i in ids if not 0 <= i < vocabulary]:
            raise RequestError(f"token id {outside[0]}: must lie in the vocabulary 0..{vocabulary - 1}")
        if len(ids) >= self.max_length:
            raise RequestError(f"the prompt has {len(ids)} tokens: must leave room for a new one within the model's "
                               f"context (max_position_embeddings = {self.max_length})")
        return ids

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._need_tokenizer("a text").encode(prompt, bos=self.bos_id is not None)
        if isinstance(prompt, Sequence) and all(type(part) is int for part in prompt):
            return list(prompt)  # type: ignore[arg-type]
        if isinstance(prompt, Sequence) and all(isinstance(part, Mapping) for part in prompt):
            return self._need_tokenizer("a conversation").encode_chat(prompt)  # type: ignore[arg-type]
        raise RequestError(f"{prompt!r:.80}: must be a text, a list of token ids or a list of messages")

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and this model was given without one")
        return self.tokenizer


def _said(prompt: Prompt) -> str:
    """The text that says what a prompt is about: the prompt, or what was said last in a conversation."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if prompt else None
    content = last.get("content") if isinstance(last, Mapping) else None
    return content if isinstance(content, str) else ""


def outcome(group: Sequence[Request]) -> RequestOutput:
    """The output of a prompt's continuations."""
    first, *others = (request.output() for request in group)
    return replace(first, others=tuple(others)) if others else first
