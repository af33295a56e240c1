"""Prompts -> texts: the engine with a tokenizer in front."""

from __future__ import annotations

import asyncio
import contextlib
import math
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor

from ..atlas.usage import ExpertUsage
from ..checkpoint import UNNAMED, Dtype, expert_spans, load_model, put_beside, read_several, resolve, sort_out
from ..checkpoint.ready import is_folder, with_bits
from ..conversation import normalize
from ..deprecation import warn
from ..domain import DomainClassifier, KeywordRules
from ..errors import ConfigError, DataError, RequestError, shown
from ..model import CausalLM, describe
from ..model.adapters import Adapter, bytes_on
from ..quant.linear import QuantConfig, is_quantized
from ..tokenizer import Tokenizer
from . import adapter_choice
from .constraint import Constraints
from .driver import EngineDriver
from .engine import Engine, atlas_beside, check_atlas
from .options import EngineOptions, EngineSettings
from .request import AdapterChoice, Ensemble, Message, Prompt, Request, RequestOutput
from .residency import Residency
from .routing import JOINT, Answer, GateReader, Router, Routing, RoutingChoice, fusion_of
from .sampling_params import SamplingOptions, SamplingParams
from .warmup import Warmup, warm_up

MIN_CONFIDENCE = 0.6  # as in `deepseek data label`
Tools = Sequence[Mapping[str, Any]]


class LLM:
    """A model and its tokenizer, ready to continue prompts.

    path_or_model: a ready model (`mini`), a checkpoint folder, a known name, a hub id, or a CausalLM (used as it is, in
    evaluation mode; `dtype` and `device` then do not apply). bits: of a ready model, where its name does not say them.
    tokenizer: instead of the one beside the checkpoint; a CausalLM without one takes token ids only and gives no text.
    adapter: a folder that tuning left, a delta or a LoRA adapter: the model is then the base with it. adapters:
    name -> folder of a LoRA adapter or a delta of experts; they stand beside the base, and the `adapter` of a prompt
    says which of them it goes through, none if it does not say. pool: an ExpertPool, which decides who answers a prompt
    that does not say; its adapters are loaded, too. chat_template_kwargs: variables of the chat template, such as
    V3.1's `{"thinking": True}`, for conversations that do not say otherwise. engine_options: those of EngineOptions.
    Raises what `load_model` and `Tokenizer.load` raise, and ConfigError for an impossible option.
    """

    def __init__(
        self, path_or_model: str | Path | CausalLM, *, tokenizer: Tokenizer | None = None, dtype: Dtype = "auto",
        device: torch.device | str = "cpu", bits: Literal[4, 8, 16] | None = None, adapter: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None, pool: Router | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, **engine_options: Unpack[EngineSettings],
    ) -> None:
        options = EngineOptions.of(engine_options)
        atlas = folder = None
        if not isinstance(path_or_model, CausalLM):
            path_or_model = with_bits(path_or_model, bits)
        elif bits is not None:
            raise ConfigError(f"bits = {bits!r}: has a meaning only with a ready model, not with a model in memory")
        if pool is not None and not isinstance(pool, Router):
            raise ConfigError(f"pool = {shown(pool)}: must be a pool, such as ExpertPool.load(FILE)")
        if twice := set(adapters or ()) & set(pool.adapters if pool is not None else ()):
            raise ConfigError(f"adapters: {min(twice)}: the pool has an adapter of that name: must have another")
        delta, beside = sort_out(adapter, {**(pool.adapters if pool is not None else {}), **(adapters or {})})
        self.names = ("model",) if isinstance(path_or_model, CausalLM) else names_of(path_or_model)
        if taken := set(self.names) & set(beside):
            raise ConfigError(f"adapters: {min(taken)} is the base's own name: must have another")
        if isinstance(path_or_model, CausalLM):
            if delta is not None:
                raise ConfigError(f"adapter = {str(delta)!r}: a delta goes into a checkpoint, not a model in memory")
            _check_groups(pool, ())
            self.model = path_or_model.eval()
            put_beside(self.model, read_several(self.model, beside))
            tokenizer = _with_variables(tokenizer, chat_template_kwargs)
        else:
            folder = resolve(path_or_model)
            tokenizer = _with_variables(tokenizer or Tokenizer.load(folder), chat_template_kwargs)
            _check_groups(pool, atlas := atlas_beside(folder))
            self.model = load_model(folder, dtype, device, adapter=delta, adapters=beside)
            check_atlas(atlas, folder, self.model.config)
        residency = None
        if options.expert_memory is not None:
            if folder is None:
                raise ConfigError("expert_memory: needs a checkpoint to read experts from, not a model in memory")
            residency = Residency(self.model, expert_spans(folder), int(options.expert_memory),
                                  prefetch=options.prefetch)
        self.warmup: Warmup | None = None
        if options.warmup_experts:
            self.warmup = warm_up(self.model, residency, tuple(options.warmup_experts), atlas, folder)
        self.engine = Engine(self.model, options, atlas=atlas, residency=residency)
        self.driver = EngineDriver(self.engine)
        weakref.finalize(self, self.driver.release)
        self.pool = pool
        if pool is not None and hasattr(pool, "bind"):
            pool.bind(GateReader(self))
        there = self.engine.adapters
        self.adapters = tuple(name for name in dict.fromkeys([*beside, *there]) if name != UNNAMED)
        self.default_adapter = UNNAMED if UNNAMED in there else None
        self.tokenizer, self._folder, self._adapter = tokenizer, folder, adapter
        config = self.model.config
        self.max_length = config.max_position_embeddings
        self.bos_id = config.bos_token_id if tokenizer is None else tokenizer.bos_id
        self.eos_ids = frozenset(config.eos_token_ids) | frozenset(() if tokenizer is None else tokenizer.eos_ids)
        self._constraints = Constraints(tokenizer, config.vocab_size, self.eos_ids)
        self._rules = KeywordRules()
        self.classifier: DomainClassifier | None = None  # asked where the keyword rules say nothing

    def __repr__(self) -> str:
        """What it holds: the model and its format, the context, the tokenizer, the experts by name, the adapters."""
        model, tokenizer, atlas = self.model, self.tokenizer, self.engine.atlas
        quant = QuantConfig.of(model.config, "the model") if is_quantized(model) else None
        stored = quant.format if quant else str(model.lm_head.weight.dtype).removeprefix("torch.")
        chat = "with" if tokenizer is not None and tokenizer.has_chat_template else "without"
        lines = [f"LLM of {self._folder or 'a model in memory'}: {describe(model.config)}; {stored} on {model.device}",
                 f"  context: {self.max_length:,} tokens",
                 "  tokenizer: none, so prompts are token ids" if tokenizer is None else
                 f"  tokenizer: {tokenizer.vocab_size:,} tokens, {chat} a chat template",
                 f"  experts by name: {', '.join(atlas or ()) or 'none'}"]
        if self._adapter is not None:
            lines.append(f"  adapter: {self._adapter}")
        if self.adapters:
            sizes = bytes_on(model)
            beside = [f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in self.adapters]
            lines.append(f"  adapters beside it: {', '.join(beside)}")
        if self.engine.residency is not None:
            lines.append(f"  expert memory: {self.engine.options.expert_memory} bytes, the other experts on disk")
        return "\n".join([*lines, *(["  closed"] if self.driver.closed else [])])

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        usage: ExpertUsage | None = None, domains: Sequence[str | None] | None = None, parse_special: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None, tools: Tools | None = None,
        adapter: AdapterChoice | Sequence[AdapterChoice | None] | None = None,
        routing: RoutingChoice | Sequence[RoutingChoice] = None, **sampling: Unpack[SamplingOptions],
    ) -> list[RequestOutput]:
        """Continue every prompt; one result a prompt, in order.

        prompts: each a text, a list of token ids, or a list of chat messages `{"role", "content"}`; or one such prompt.
        params: for all, or one a prompt. sampling: SamplingParams by name, over `params`. usage: counts the experts
        that the tokens visit as they run (what the prefix cache serves does not run). domains: names that say what a
        prompt is about, for batching by expert; keyword rules guess the missing ones. parse_special: control tokens
        spelled out in a text count as such (a prompt from a template of one's own, FIM); else they are ordinary text.
        chat_template_kwargs: variables of the chat template for the conversations among the prompts, beside and over
        those of this LLM. tools: OpenAI's, for them too. adapter: the name of the one that answers, or weights of
        several that answer together (their terms add up: W x + sum_i w_i s_i B_i A_i x), for all or one a prompt; None
        is the base. routing: who answers, as `dynamic_routing` or `pool.route` returns it, or a pool that decides,
        such as `pool.among(NAMES)`, for all or one a prompt; None leaves it to the LLM's pool, if it has one and no
        adapter is given; False is the base.
        `RequestOutput.routing` says what was decided.
        Raises RequestError, before any prompt runs, for a prompt that is empty, too long or of another kind.
        """
        if isinstance(prompts, str) or (prompts and all(isinstance(part, int | Mapping) for part in prompts)):
            every: Sequence[Prompt] = [cast(Prompt, prompts)]
        else:
            every = cast(Sequence[Prompt], prompts)
        if params is None or isinstance(params, SamplingParams):
            params = self._params(params, sampling)
        else:
            params = [self._params(one, sampling) for one in params]
        each = zip(every, _for_each("params", params, every), _for_each("domains", domains, every),
                   _for_each("adapter", adapter, every), _for_each("routing", routing, every), strict=True)
        answers = []
        for i, (prompt, one, domain, name, way) in enumerate(each):
            try:
                answers.append(Answer(self, prompt, one, routing=way, adapter=name, usage=usage, domain=domain,
                                      parse_special=parse_special, tools=tools,
                                      chat_template_kwargs=chat_template_kwargs))
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
        requests = [request for answer in answers for request in answer.requests]
        while requests:
            self.driver.generate(*requests)
            requests = [request for answer in answers for request in answer.advance()]
        return [answer.output() for answer in answers]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, usage: ExpertUsage | None = None,
        parse_special: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None, tools: Tools | None = None,
        adapter: AdapterChoice | None = None, routing: RoutingChoice = None,
        on_answer: Callable[[Answer], None] | None = None, **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the text of one prompt piece by piece; the pieces together are what `generate` returns.

        The prompt is checked at once, and run when the first piece is asked for; closing the iterator aborts it.
        on_answer: gets the Answer, whose `trace` says who of a pool answers. The other keywords as in `generate`.
        """
        answer = Answer(self, prompt, replace(self._params(params, sampling), n=1), usage=usage, routing=routing,
                        parse_special=parse_special, chat_template_kwargs=chat_template_kwargs, tools=tools,
                        adapter=adapter)
        if on_answer is not None:
            on_answer(answer)

        def pieces() -> Iterator[str]:
            requests, joint = answer.requests, ""
            while requests:
                yield from filter(None, (joint,))
                yield from self._pieces(requests[0])
                requests, joint = answer.advance(), JOINT

        return pieces()

    def _pieces(self, request: Request) -> Iterator[str]:
        """The text of a request, piece by piece."""
        news, sent = SimpleQueue[bool](), 0  # whether the request has ended, when it has, and when its text has grown

        def tell(one: Request) -> None:
            if (ended := one.done.is_set()) or len(one.text) > sent:
                one.paused = True  # it runs only as far as it is read
                news.put(ended)

        request.on_token = tell

        try:
            self.driver.submit(request)
            ended = False
            while not ended:
                ended = news.get()
                if len(text := request.text) > sent:
                    start, sent = sent, len(text)
                    yield text[start:]
                self.driver.resume(request)
            if request.error is not None:
                raise request.error
        finally:
            self.driver.abort(request)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, usage: ExpertUsage | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, tools: Tools | None = None,
        adapter: AdapterChoice | None = None, routing: RoutingChoice = None, **sampling: Unpack[SamplingOptions],
    ) -> RequestOutput:
        """The assistant's answer to a conversation of messages, as OpenAI's clients write them, and so its tools. The
        output is the text as it is; the server reads calls out of it."""
        return self.generate([messages], params, usage=usage, chat_template_kwargs=chat_template_kwargs, tools=tools,
                             adapter=adapter, routing=routing, **sampling)[0]

    def generate_ensemble(
        self, prompts: Sequence[Prompt], weights: Sequence[float] | None = None, params: SamplingParams | None = None,
        *, parse_special: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None, adapter: AdapterChoice | Sequence[AdapterChoice | None] | None = None,
        routing: Routing | None = None, posterior: bool = False, **sampling: Unpack[SamplingOptions],
    ) -> RequestOutput:
        """Continue several prompts with one text: they advance together, and each token is drawn from the weighted mean
        of their distributions (weights: positive, all equal if not given). The output is the first prompt's.

        routing: one prompt is then answered by each member of a Fusion or decision on its own, with its weights.
        posterior: weigh members anew after each token, by how likely it was to them. The other keywords as in
        `generate`. Raises RequestError, before anything runs, for what cannot.
        """
        ways: Sequence[Routing | bool] = [False] * len(prompts)
        if routing is not None:
            fusion = fusion_of(routing)
            if isinstance(prompts, str) or len(prompts) != 1 or weights is not None:
                raise RequestError("routing: must be with one prompt in a list and without weights, got "
                                   f"{len(prompts)}")
            ways, weights, prompts = fusion.each(), fusion.weights, [*prompts] * len(fusion.members)
        weights = [1.0] * len(prompts) if weights is None else list(weights)
        if not prompts or len(weights) != len(prompts) or not all(
                isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights):
            raise RequestError(f"weights = {weights}: must be positive numbers, one for each of {len(prompts)} "
                               "prompts, one at least")
        params = replace(self._params(params, sampling), n=1)
        answers = [Answer(self, prompt, params, parse_special=parse_special, tools=tools, adapter=own, routing=way,
                          chat_template_kwargs=chat_template_kwargs)
                   for prompt, own, way in zip(prompts, _for_each("adapter", adapter, prompts), ways, strict=True)]
        requests = [answer.requests[0] for answer in answers]
        shortest = min(request.max_new_tokens for request in requests)
        ensemble = Ensemble(weights, posterior)
        for request in requests:
            request.ensemble, request.max_new_tokens = ensemble, shortest
            ensemble.members.append(request)
        if len(requests) > self.engine.options.max_num_seqs:
            raise RequestError(f"{len(requests)} prompts of an ensemble: must be max_num_seqs "
                               f"({self.engine.options.max_num_seqs}) at most")
        self.engine.check(*requests)
        self.driver.generate(*requests)
        return replace(requests[0].output(), routing=tuple(part for one in answers for part in one.trace) or None)

    def mix(self, *args: Any, **kwargs: Any) -> RequestOutput:
        """The old name of `generate_ensemble`."""
        warn("LLM.mix is deprecated: use LLM.generate_ensemble")
        return self.generate_ensemble(*args, **kwargs)

    async def stream_async(
        self, prompt: Prompt, params: SamplingParams | None = None, *, domain: str | None = None,
        parse_special: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None, tools: Tools | None = None,
        adapter: AdapterChoice | None = None, routing: RoutingChoice = None,
        on_answer: Callable[[Answer], None] | None = None, **sampling: Unpack[SamplingOptions],
    ) -> AsyncIterator[Request]:
        """Yields the request whenever it has new tokens, until it has ended; its `text` and `token_ids` grow. Of a
        prompt that is answered in parts, the request of each, one after the other. Any number may run at once. Leaving
        the iteration aborts the request. Raises what went wrong with it on the way. on_answer: as in `stream`. The
        other keywords as in `generate`."""
        answer = await asyncio.to_thread(  # the scorer `gate` waits for the engine
            Answer, self, prompt, replace(self._params(params, sampling), n=1), domain=domain, tools=tools,
            parse_special=parse_special, chat_template_kwargs=chat_template_kwargs, adapter=adapter, routing=routing)
        if on_answer is not None:
            on_answer(answer)
        requests = answer.requests
        while requests:
            async with contextlib.aclosing(self._progress(requests[0])) as progress:
                async for request in progress:
                    yield request
            requests = await asyncio.to_thread(answer.advance)

    async def _progress(self, request: Request) -> AsyncGenerator[Request]:
        """The request, whenever it has new tokens."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: Request) -> None:
            loop.call_soon_threadsafe(arrived.set)

        request.on_token = tell
        try:
            await asyncio.to_thread(self.submit, request)  # a step in progress must not hold up the loop
            while True:
                await arrived.wait()
                arrived.clear()
                ended = request.done.is_set()
                if request.error is not None:
                    raise request.error
                yield request
                if ended:
                    return
        finally:
            if not request.done.is_set():
                await asyncio.shield(asyncio.to_thread(self.driver.abort, request))

    # ---- running ------------------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> None:
        """Queue requests; the engine's thread, which the first one starts, runs them."""
        self.driver.submit(*requests)

    def preload(self) -> None:
        """Load what the first chat and the first JSON schema would wait for: the template, the tokenizer's tables, the
        pool's scorer."""
        if self.tokenizer is not None and self.tokenizer.has_chat_template:
            with contextlib.suppress(RequestError):  # of a template that wants more than one turn of a user
                self.tokenizer.chat([{"role": "user", "content": ""}])
        with contextlib.suppress(RequestError):  # without a byte-level tokenizer there are no constraints
            self._constraints.load()
        if self.pool is not None:
            self.pool.route("?")

    def close(self) -> None:
        """End what runs, and the threads behind it."""
        self.driver.close()
        if self.engine.residency is not None:
            self.engine.residency.close()

    def embed(self, prompts: Sequence[Prompt], adapter: AdapterChoice | None = None) -> tuple[list[Tensor], int]:
        """(the mean of the last hidden states of each prompt, FP32 [H]; tokens in all). adapter: as in `generate`."""
        requests = [self.pooling_request(prompt, adapter) for prompt in prompts]
        self.driver.generate(*requests)
        return [request.mean_H for request in requests], sum(len(request.prompt_ids) for request in requests)

    def pooling_request(self, prompt: Prompt, adapter: AdapterChoice | None = None) -> Request:
        """The request that `embed` makes of a prompt. Raises RequestError for a prompt that cannot be run."""
        return Request(self.encode(prompt), SamplingParams(max_tokens=1), max_new_tokens=0,
                       adapter=self.find_adapter(adapter), pooling=True)

    # ---- beside the engine's steps ------------------------------------------------------------------------------

    def warm_up(self, names: Sequence[str]) -> Warmup:
        """Get the experts of some names into memory now. Raises RequestError for an unknown name."""
        return self.driver.between_steps(
            lambda: warm_up(self.model, self.engine.residency, tuple(names), self.engine.atlas, self._folder))

    def domain_of(self, text: str) -> str | None:
        """What a text is about: by keyword rules, else by the classifier if there is one, and sure (domain.py)."""
        found = self._rules.predict(text)
        if found is None and self.classifier is not None and text.strip():
            (name,), (confidence,) = self.classifier.predict([text])
            found = name if confidence >= MIN_CONFIDENCE else None
        return found

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _params(self, params: SamplingParams | None, sampling: SamplingOptions) -> SamplingParams:
        """Warns of more tokens than the model has positions for: the text ends there, whatever was asked for."""
        given = replace(params or SamplingParams(), **sampling)  # type: ignore[arg-type]
        if given.max_tokens >= self.max_length and given.max_tokens != SamplingParams.max_tokens:
            warnings.warn(f"max_tokens = {given.max_tokens}: prompt and text end at the model's context of "
                          f"{self.max_length} tokens (max_position_embeddings)", stacklevel=3)
        return given

    def requests(
        self, prompt: Prompt, params: SamplingParams, *, domain: str | None = None, parse_special: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None, constraint_after: str | None = None,
        adapter: AdapterChoice | None = None, **chat: Any,
    ) -> list[Request]:
        """The prompt as `params.n` requests for the engine, checked. constraint_after: a schema, regex or grammar
        applies to the text after this marker. adapter: as in `generate`. The other keywords as in `encode`."""
        if params.stop:
            self._need_tokenizer("a stop string")
        found = self.find_adapter(adapter)
        ids = self.encode(prompt, parse_special=parse_special, chat_template_kwargs=chat_template_kwargs, **chat)
        if domain is None and (text := _routing_text(prompt)):
            domain = self.domain_of(text)
        out: list[Request] = []
        for i in range(params.n):
            own = params if not i else replace(
                params, prompt_logprobs=None,  # the first one's are those of all
                seed=None if params.seed is None else _next_seed(params.seed, i))
            request = Request(
                ids, own, max_new_tokens=min(params.max_tokens, self.max_length - len(ids)), eos_ids=self.eos_ids,
                tokenizer=self.tokenizer, vocabulary=self.model.config.vocab_size, domain=domain,
                constraint=self._constraints.of(params), constraint_after=constraint_after, adapter=found)
            request.prefill_leader = out[0] if out else None
            self.engine.check(request)
            out.append(request)
        return out

    def encode(
        self, prompt: Prompt, *, parse_special: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None,
        **chat: Any,
    ) -> list[int]:
        """Token ids of a prompt, as `generate` would run it: a text after the tokenizer's begin-of-sequence token, a
        conversation through its chat template, ids as they are; an empty prompt is the begin token alone.

        parse_special, chat_template_kwargs: as in `generate`. chat: further keywords of `Tokenizer.encode_chat`.
        Raises RequestError for a prompt that cannot be run.
        """
        if chat_template_kwargs is not None:
            self._need_tokenizer("a conversation").check_variables(chat_template_kwargs)
        try:
            ids = self._ids(prompt, parse_special, {**chat, **(chat_template_kwargs or {})})
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

    def find_adapter(self, choice: AdapterChoice | None) -> Adapter | None:
        """As the engine knows it: a name, weights of several, or several among which tokens choose. Raises RequestError
        for a name that there is not, listing those there are, and for what is no such choice."""
        if choice is None:
            return self.default_adapter
        return adapter_choice.find(choice, self.adapters, self.engine.adapters)

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a `model` of clients means, None for the base's own name.

        Raises RequestError for another, listing those there are.
        """
        if model in self.adapters:
            return model
        if model not in self.names:
            raise RequestError(f"model = {model!r}: there are {', '.join((self.names[0], *self.adapters))}")
        return None

    def check_length(self, text: str) -> None:
        """Raises RequestError for a text that is much too long, before all of it is encoded."""
        if self.tokenizer is not None:
            self.tokenizer.check_length(text, self.max_length)

    def _ids(self, prompt: Prompt, parse_special: bool, chat: Mapping[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            self.check_length(prompt)
            tokenizer = self._need_tokenizer("a text")
            if not parse_special:
                tokenizer.warn_of_control(prompt, "a prompt")
            return tokenizer.encode_prompt(prompt, parse_special=parse_special)
        if isinstance(prompt, Sequence) and all(type(part) is int for part in prompt):
            return list(prompt)  # type: ignore[arg-type]
        if isinstance(prompt, Sequence) and all(isinstance(part, Mapping) for part in prompt):
            tokenizer = self._need_tokenizer("a conversation")
            return tokenizer.encode_chat(prompt, self.max_length, **chat)  # type: ignore[arg-type]
        raise RequestError(f"{prompt!r:.80}: must be a text, a list of token ids or a list of messages")

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and this model was given without one")
        return self.tokenizer


def _check_groups(pool: Router | None, names: Iterable[str] | None) -> None:
    """Raises ConfigError for a pool's named group that is not among those of a model's atlas."""
    names = list(names or ())
    if pool is not None and (missing := set(pool.groups) - set(names)):
        raise ConfigError(f"pool: {min(missing)}: is no named group of the model's atlas, which has "
                          f"{', '.join(names) or 'none'}")


def names_of(model: str | Path) -> tuple[str, ...]:
    """What a model may be called: the name of its folder, or of the hub, and what it was loaded as."""
    folder = Path(model).expanduser()
    return (folder.resolve().name, str(model)) if is_folder(model) else (str(model), str(model).rpartition("/")[2])


def _for_each(what: str, given: Any, prompts: Sequence[Any]) -> Sequence[Any]:
    """What was given for each prompt, or for all of them. Raises RequestError where the numbers differ."""
    if given is None or isinstance(given, str | bool | Mapping | SamplingParams) or not isinstance(given, Sequence):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise RequestError(f"{what} has {len(given)} entries: must be one for all or one for each of the "
                           f"{len(prompts)} prompts")
    return given


def _next_seed(seed: int, i: int) -> int:
    """seed + i within 64 bits."""
    return (seed + i + (1 << 63)) % (1 << 64) - (1 << 63)


def _routing_text(prompt: Prompt) -> str:
    """The text that says what a prompt is about: the prompt, or what was said last in a conversation."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if prompt else None
    try:
        return normalize([last])[0]["content"] or "" if isinstance(last, Mapping) else ""
    except RequestError:  # a role that only its template knows
        return ""


def _with_variables(tokenizer: Tokenizer | None, variables: Mapping[str, Any] | None) -> Tokenizer | None:
    if variables and tokenizer is None:
        raise ConfigError("chat_template_kwargs: needs a tokenizer, and this model was given without one")
    try:
        return None if tokenizer is None else tokenizer.with_variables(variables)
    except RequestError as error:
        raise ConfigError(str(error)) from None
