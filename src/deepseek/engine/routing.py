"""A routing decision, run: who of a pool answers a prompt, or each part of it.

    adapters       the decision's weights over them, scaled to a sum of 1: one mixture beside the base
    named groups   requests of a name run together (batching by expert), and its experts are read ahead where not all
                   are in memory; with a bias, gates prefer them, which is inexact
    knowledge      passages in front of the question, as quoted text
    parts          of a composite request: answered in their order, each by its own decision, as the turns of one
                   conversation, so that each knows the answers before it and parts that run alike share the prefix

Pools and decisions are known by their form alone (`Router`, `Decision`, `Fusion`); route/ has those that decide.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch

from ..conversation import normalize
from ..errors import ConfigError, RequestError, shown
from ..settings import is_number
from .request import AdapterChoice, FinishReason, Message, Prompt, Request, RequestOutput, to_output
from .routing_override import ExpertControl
from .sampler import Logprob
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..atlas.usage import ExpertUsage
    from .driver import EngineDriver
    from .engine import Engine

JOINT = "\n\n"  # between the answers to the parts
PASSAGES = 6000  # characters of passages in a prompt at most, and half as many as the context has tokens


class Fusion(Protocol):
    """Who answers. members: each with `name` and `kind` (base, experts, adapter, knowledge); weights: as many, with sum
    1; bias: added to the gates' choice of the experts of named groups, times the weight."""

    @property
    def members(self) -> Sequence[Any]: ...

    @property
    def weights(self) -> Sequence[float]: ...

    @property
    def bias(self) -> float: ...

    def each(self) -> Sequence[Fusion]:
        """A fusion for each member alone."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""

    def ground(self, messages: Sequence[Message], most: int, question: str | None = None) -> Any:
        """(the messages with passages of the members' knowledge in them, `most` characters at most; citations)."""


class Decision(Protocol):
    """A fusion, and how it came about."""

    @property
    def fusion(self) -> Fusion: ...

    def to_dict(self) -> dict[str, Any]: ...


class Part(Protocol):
    """A part of a request that is answered on its own. context: what it and other parts are about."""

    @property
    def text(self) -> str: ...

    @property
    def context(self) -> str: ...

    @property
    def decision(self) -> Decision: ...

    def to_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class Router(Protocol):
    """A pool. adapters: name -> folder of those among its members; groups: names of the atlas among them."""

    @property
    def adapters(self) -> Mapping[str, str | Path]: ...

    @property
    def groups(self) -> Sequence[str]: ...

    def route(self, text: str) -> Decision: ...

    def parts(self, text: str) -> Sequence[Part]: ...


Routing = Fusion | Decision
RoutingChoice = Routing | Router | bool | None


class Model(Protocol):
    """What answers: an LLM."""

    engine: Engine
    driver: EngineDriver
    max_length: int
    pool: Router | None

    def find_adapter(self, choice: AdapterChoice | None) -> Any: ...

    def requests(self, prompt: Prompt, params: SamplingParams, **asked: Any) -> list[Request]: ...


class Routed(NamedTuple):
    """A prompt, ready to run by a decision. names: of groups, the heaviest first."""

    prompt: Prompt
    adapter: AdapterChoice | None
    names: tuple[str, ...]
    bias: Mapping[str, float]
    citations: tuple[Any, ...]


def apply(llm: Model, prompt: Prompt, routing: Routing, question: str | None = None) -> Routed:
    """Raises what `check` raises, and RequestError for passages in a prompt of token ids."""
    fusion = fusion_of(routing)
    weights, adapter = check(llm, fusion)
    prompt, citations = _grounded(llm, prompt, fusion, question) if weights["knowledge"] else (prompt, ())
    bias = {name: weight * fusion.bias for name, weight in weights["experts"].items()} if fusion.bias else {}
    return Routed(prompt, adapter, tuple(weights["experts"]), bias, citations)


def fusion_of(routing: Routing) -> Fusion:
    """Raises RequestError for what is neither a Fusion nor a decision."""
    fusion: Fusion = getattr(routing, "fusion", routing)  # type: ignore[arg-type]
    if not hasattr(fusion, "members") or not hasattr(fusion, "weights"):
        raise RequestError(f"routing = {shown(routing)}: must be a Fusion or a decision of a pool")
    return fusion


def check(llm: Model, fusion: Fusion) -> tuple[dict[str, dict[str, float]], AdapterChoice | None]:
    """(kind -> member -> weight, the adapters that answer). Raises RequestError for a member that this LLM cannot run,
    and for weights that are none."""
    weights: dict[str, dict[str, float]] = {"base": {}, "experts": {}, "adapter": {}, "knowledge": {}}
    if len(fusion.weights) != len(fusion.members):
        raise RequestError(f"routing: {len(fusion.weights)} weights for {len(fusion.members)} members: must be as many")
    for member, weight in zip(fusion.members, fusion.weights, strict=True):
        if (own := weights.get(getattr(member, "kind", ""))) is None:
            raise RequestError(f"routing: member {shown(getattr(member, 'name', member))}: must be of kind "
                               f"{', '.join(weights)}; fusion.text(prompt) runs what is callable")
        if not is_number(weight) or weight <= 0:
            raise RequestError(f"routing: {member.name}: weight = {shown(weight)}: must be a positive number")
        own[member.name] = own.get(member.name, 0.0) + weight
    total, atlas = sum(weights["adapter"].values()), llm.engine.atlas
    for name in weights["experts"]:
        if atlas is None or name not in atlas:
            raise RequestError(f"routing: {name}: must be a named group of the model's atlas, which has "
                               f"{', '.join(atlas or ()) or 'none'}")
    adapter = {name: weight / total for name, weight in weights["adapter"].items()} or None
    llm.find_adapter(adapter)  # said before passages are looked for
    return weights, adapter


def _grounded(llm: Model, prompt: Prompt, fusion: Fusion, question: str | None) -> tuple[Prompt, tuple[Any, ...]]:
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise RequestError("routing: passages of a knowledge base go into a text or a conversation, not token ids")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages, citations = fusion.ground(
        cast(Sequence[Message], turns), min(PASSAGES, llm.max_length // 2), question)
    return messages[0]["content"] if isinstance(prompt, str) else messages, tuple(citations)


def _is_conversation(prompt: Any) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def question_of(prompt: Prompt) -> str:
    """The text that a prompt is routed by: itself, or the last message of the user; empty where there is none."""
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt) if _is_conversation(prompt) else ():
        if isinstance(message, Mapping) and message.get("role") == "user":
            return normalize([message])[0]["content"] or ""
    return ""


class GateReader:
    """What a model's gates do with a text: a prefill for each, which `stats` counts apart from what answers."""

    def __init__(self, llm: Model) -> None:
        self._llm = weakref.ref(llm)  # the LLM holds the pool that holds this

    @property
    def llm(self) -> Model:
        """Raises ConfigError where it has been deleted."""
        if (llm := self._llm()) is None:
            raise ConfigError("scorer = gate: the model that used the pool is gone: give the pool to another LLM")
        return llm

    @property
    def alive(self) -> bool:
        """Whether the model is still there."""
        return self._llm() is not None

    def histogram(self, text: str) -> np.ndarray:
        """The share of each (MoE layer, expert) in the choices of its layer, over the text's tokens: [L E]."""
        llm, began = self.llm, time.perf_counter()
        request, = llm.requests(text, SamplingParams(max_tokens=0, routed=True))
        llm.driver.generate(request)
        counts_LE = self._zeros()
        for row, index_TK in enumerate(torch.cat(request.routes).unbind(1)):
            counts_LE[row] += np.bincount(index_TK[index_TK >= 0].flatten().numpy(), minlength=counts_LE.shape[1])
        stats = llm.engine.stats
        stats.routing_tokens += len(request.prompt_ids)
        stats.routing_seconds += time.perf_counter() - began
        return (counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1)).ravel()

    def group(self, name: str) -> np.ndarray | None:
        """The same of a named group, all of its experts alike; None where the atlas has none of that name."""
        atlas, share_LE = self.llm.engine.atlas, self._zeros()
        if atlas is None or name not in atlas:
            return None
        rows = {layer: row for row, layer in enumerate(self.llm.engine.model.config.moe_layers)}
        for layer, experts in atlas[name].by_layer().items():
            share_LE[rows[layer], experts] = 1 / len(experts)
        return share_LE.ravel()

    def _zeros(self) -> np.ndarray:
        config = self.llm.engine.model.config
        return np.zeros((len(config.moe_layers), config.n_routed_experts), np.float32)


class Answer:
    """The answer to a prompt: its requests, part by part, each made when those before have ended.

    routing: who answers, or a pool that decides; None leaves it to the LLM's pool, if it has one and no adapter is
    chosen, and False to the base. usage: counts the experts, of all continuations together or of each. make: makes a
    part's requests, as LLM.requests does. seconds: spent on decisions and passages so far. Raises RequestError for
    what cannot run, before anything does.
    """

    def __init__(self, llm: Model, prompt: Prompt, params: SamplingParams, *, routing: RoutingChoice = None,
                 adapter: AdapterChoice | None = None,
                 usage: ExpertUsage | Sequence[ExpertUsage] | None = None,
                 make: Callable[..., list[Request]] | None = None, **asked: Any) -> None:
        if routing not in (None, False) and adapter is not None:
            raise RequestError(f"adapter = {shown(adapter)}: must not stand beside routing, which chooses adapters")
        pool = llm.pool
        if routing is True:
            if pool is None:
                raise RequestError("routing = True: this LLM has no pool")
            routing = pool
        if isinstance(routing, Router):
            if not isinstance(prompt, str) and not _is_conversation(prompt):
                raise RequestError("routing by a pool: must be a text or a conversation: token ids are not read")
            pool, routing = routing, None
        self.llm, self.prompt, self.params, self.adapter, self.usage, self.asked = (
            llm, prompt, params, adapter, usage, asked)
        self.make = make or llm.requests
        self.groups: list[list[Request]] = []
        self.trace: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._parts: Sequence[Part] = ()
        self._routing: Routing | None = routing or None  # of the whole prompt
        began = time.perf_counter()
        if routing is None and adapter is None and pool is not None and (text := question_of(prompt)):
            self._parts = pool.parts(text) if self._divisible else ()
            if len(self._parts) < 2:
                self._parts, self._routing = (), pool.route(text)
            for part in self._parts:
                check(llm, part.decision.fusion)
        self.seconds += time.perf_counter() - began
        self._turns: list[Message] = []  # the conversation so far, of several parts
        self.cut = False  # parts are left for which there is no room
        self._begin()

    @property
    def _divisible(self) -> bool:
        """Whether it may be answered in parts: a conversation whose user spoke last, answered by one free text."""
        one, asked = self.params, {**self.asked, **(self.asked.get("chat_template_kwargs") or {})}
        return (_is_conversation(self.prompt) and cast(Any, self.prompt)[-1].get("role") == "user" and one.n == 1
                and not any((one.json_schema, one.regex, one.grammar, one.routed, one.experts, asked.get("tools")))
                and one.prompt_logprobs is None and not asked.get("continue_final_message")
                and asked.get("add_generation_prompt") is not False)

    @property
    def divided(self) -> bool:
        """Whether it is given in parts."""
        return bool(self._parts)

    @property
    def more(self) -> bool:
        """Whether a part follows on the one under way, which has ended."""
        return self.requests[0].finish_reason in ("stop", "length") and len(self.groups) < len(self._parts)

    def finish_reason(self, i: int = 0) -> FinishReason | None:
        """Of a continuation: `length` where any part came to the end of its tokens."""
        cut = self.cut or any(group[i].finish_reason == "length" for group in self.groups)
        return "length" if cut else self.requests[i].finish_reason

    @property
    def requests(self) -> list[Request]:
        """Those of the part that is under way."""
        return self.groups[-1]

    @property
    def text(self) -> str:
        """So far, of the first continuation."""
        return JOINT.join(group[0].text for group in self.groups)

    def advance(self) -> list[Request]:
        """The requests of the next part, once those of the last have ended; none where the answer is complete, out of
        tokens, or broken off."""
        if not self.more:
            return []
        self._turns.append({"role": "assistant", "content": self.requests[0].text})
        self._begin()
        return [] if self.cut else self.requests

    def _begin(self) -> None:
        prompt, routing, params, question = self.prompt, self._routing, self.params, None
        about: dict[str, Any] = {}
        if self._parts:
            part = self._parts[len(self.groups)]
            routing, question, about = part.decision, part.text, part.to_dict()
            spent = sum(len(group[0].token_ids) for group in self.groups)
            if spent >= params.max_tokens > 0:
                self.cut = True
                return self._leave(f"max_tokens = {params.max_tokens}: the parts before have used all of them")
            share = -(-(params.max_tokens - spent) // (len(self._parts) - len(self.groups)))
            params = replace(params, max_tokens=share, min_tokens=min(share, max(0, params.min_tokens - spent)))
            prompt = self._next_turn(part)
        adapter, asked = self.adapter, self.asked
        names, citations = tuple[str, ...](), tuple[Any, ...]()
        if routing is not None:
            began = time.perf_counter()
            prompt, adapter, names, bias, citations = apply(self.llm, prompt, routing, question)
            about = about or (routing.to_dict() if hasattr(routing, "to_dict") else {})
            self.seconds += time.perf_counter() - began
            if citations and isinstance(prompt, str) and asked.get("parse_special"):
                raise RequestError("parse_special: must not be with passages of a knowledge base, whose control tokens "
                                   "are text: give a conversation, or routing=False")
            if bias and params.experts is None:
                params = replace(params, experts=ExpertControl(bias=bias))
            if names and asked.get("domain") is None:
                asked = asked | {"domain": names[0]}
        try:
            group = self.make(prompt, params, adapter=adapter, **asked)
        except RequestError as error:
            if not self.groups:
                raise
            self.cut = True
            return self._leave(str(error))  # the conversation has become too long
        usages = self.usage if isinstance(self.usage, Sequence) else [self.usage] * len(group)
        for request, usage in zip(group, usages, strict=True):
            request.ahead, request.usage = names, usage
        if self._parts:
            self._turns = list(cast(Sequence[Message], prompt))
        self.groups.append(group)
        if routing is not None:
            if citations:
                about["passages"] = [one.to_json() for one in citations]
            self.trace.append(about)

    def _leave(self, why: str) -> None:
        """Leave the parts that follow without an answer."""
        self.trace += [{"text": part.text, "error": why} for part in self._parts[len(self.groups):]]
        self._parts = self._parts[: len(self.groups)]

    def _next_turn(self, part: Part) -> list[Message]:
        """The conversation up to a part, which stands with its context, unless that stood there before."""
        known = any(one.context == part.context for one in self._parts[: len(self.groups)])
        said = {"role": "user", "content": JOINT.join(filter(None, ("" if known else part.context, part.text)))}
        return [*(self._turns or cast(Sequence[Message], self.prompt)[:-1]), said]

    def output(self) -> RequestOutput:
        """Of all parts. prompt_tokens, cached_tokens: of what ran, all parts together."""
        outputs = [to_output(group) for group in self.groups]
        trace = tuple(self.trace) or None
        if len(outputs) == 1:
            return replace(outputs[0], routing=trace, finish_reason="length" if self.cut else outputs[0].finish_reason)
        reason = self.finish_reason() or outputs[-1].finish_reason
        logprobs, start = list[Logprob](), 0
        for one in outputs:
            logprobs += [replace(each, offset=start + each.offset) for each in one.logprobs or ()]
            start += len(one.text) + len(JOINT)
        return RequestOutput(
            self.text, tuple(token for one in outputs for token in one.token_ids), reason,
            sum(one.prompt_tokens for one in outputs),
            None if outputs[0].logprobs is None else tuple(logprobs),
            cached_tokens=sum(one.cached_tokens for one in outputs), routing=trace)
