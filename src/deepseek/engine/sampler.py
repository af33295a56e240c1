"""Logits -> the next token.

    penalise   l <- l / r if l > 0 else l * r, for every token already in the prompt or the output (arXiv 1909.05858)
    greedy     temperature 0: the largest logit, ties to the lowest id; nothing below applies
    soften     l <- l / temperature
    top_k      keep the k largest, and whatever equals the k-th
    top_p      keep the smallest set of the likeliest tokens whose probability reaches p
    min_p      keep what has at least min_p times the probability of the likeliest token
    draw       one uniform number from the request's own generator, looked up in the cumulative distribution

Every request draws exactly once a token from a generator of its own, so its tokens do not depend on the company it
keeps. Kept sets and logits agree with transformers' processors of the same names, in the same order.

Shape letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MoEDRError, RequestError
from .control import ExpertControl


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. Names and defaults are those of the OpenAI and vLLM interfaces.

    max_tokens: new tokens at most. temperature: 0 is greedy. top_k: 0 is off. top_p, repetition_penalty: 1 is off.
    min_p: 0 is off. seed: None draws a fresh one. stop: strings that end the text and are not part of it (one string
    may be given bare). ignore_eos: go on past the end-of-sequence token. n: continuations of the prompt, with seeds
    seed, seed + 1, …. logprobs: report each token's log-probability and those of so many likeliest ones, before
    temperature, top_k, top_p, min_p and penalties. json_schema, regex, grammar (Lark): one of them, which the text then
    matches. experts: changes what the gates decide, inexact. routed: report the experts that every token visited.
    Raises RequestError naming field, value and rule.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    experts: ExpertControl | None = None
    routed: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, list) else stop)
        self._need("max_tokens", "must be an integer >= 1", _is_int(self.max_tokens) and self.max_tokens >= 1)
        self._need("temperature", "must be a number >= 0", _is_number(self.temperature) and self.temperature >= 0)
        self._need("top_k", "must be an integer >= 0 (0 is off)", _is_int(self.top_k) and self.top_k >= 0)
        self._need("top_p", "must lie in (0, 1]", _is_number(self.top_p) and 0 < self.top_p <= 1)
        self._need("min_p", "must lie in [0, 1]", _is_number(self.min_p) and 0 <= self.min_p <= 1)
        self._need("repetition_penalty", "must be a number > 0",
                   _is_number(self.repetition_penalty) and self.repetition_penalty > 0)
        self._need("seed", "must be null or an integer of 64 bits",
                   self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63))
        self._need("stop", "must be strings, none of them empty",
                   isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop))
        self._need("ignore_eos", "must be true or false", isinstance(self.ignore_eos, bool))
        self._need("n", "must be an integer from 1 to 128", _is_int(self.n) and 1 <= self.n <= 128)
        self._need("logprobs", "must be null or an integer from 0 to 100",
                   self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= 100))
        self._need("json_schema", "must be null, a JSON text or an object",
                   self.json_schema is None or isinstance(self.json_schema, str | Mapping))
        for field in ("regex", "grammar"):
            self._need(field, "must be null or a text", getattr(self, field) is None
                       or isinstance(getattr(self, field), str))
        self._need("experts", "must be null or an ExpertControl",
                   self.experts is None or isinstance(self.experts, ExpertControl))
        self._need("routed", "must be true or false", isinstance(self.routed, bool))
        given = [field for field in ("json_schema", "regex", "grammar") if getattr(self, field) is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} are given: must be one of them at most")

    def _need(self, field: str, rule: str, holds: bool) -> None:
        if not holds:
            raise RequestError(f"{field} = {getattr(self, field)!r}: {rule}")

    def generator(self) -> torch.Generator:
        """A generator for one request: seeded with `seed`, or from the system's entropy."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class Logprob:
    """Of one sampled token: natural logarithm of its probability, and the likeliest tokens with theirs, descending."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits_V: Tensor, token: int, top: int) -> Logprob:
    """From the logits that the token was drawn from; tokens that a constraint rules out are not among the likeliest."""
    log_V = logits_V.double().log_softmax(-1)
    best = log_V.topk(min(top, int(log_V.isfinite().sum())))
    return Logprob(token, float(log_V[token]),
                   tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sample(logits_V: Tensor, params: SamplingParams, generator: torch.Generator, seen_V: Tensor | None = None) -> int:
    """The next token's id.

    logits_V: FP32 on the CPU, left as it is. seen_V: boolean, True for tokens of the prompt and the output; only a
    repetition penalty reads it. Raises MoEDRError if the logits are not numbers.
    """
    best = int(logits_V.argmax())
    if math.isnan(logits_V[best]):  # what is no number counts as the largest
        raise MoEDRError("the model's logits are not numbers (NaN): its weights are damaged or overflow their dtype")
    if params.repetition_penalty != 1.0 and seen_V is not None:
        logits_V = penalise(logits_V, params.repetition_penalty, seen_V)
        best = int(logits_V.argmax())
    if params.temperature == 0:
        return best
    # the largest becomes 0 first: a division by a tiny temperature then underflows instead of overflowing
    logits_V = (logits_V - logits_V[best]) / params.temperature
    return draw(restrict(logits_V, params.top_k, params.top_p, params.min_p), generator)


def penalise(logits_V: Tensor, penalty: float, seen_V: Tensor) -> Tensor:
    """Make seen tokens less likely (penalty > 1): positive logits are divided, negative ones multiplied."""
    return torch.where(seen_V, torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)


def restrict(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Logits with -inf for every token that top_k, top_p and min_p, in this order, leave out; at least one stays."""
    if 0 < top_k < logits_V.shape[0]:
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True, stable=True)
        probs_V = sorted_V.softmax(-1, dtype=torch.float64)
        before_V = probs_V.cumsum(-1) - probs_V  # a token stays while the likelier ones have not reached p
        before_V[0] = 0.0  # whatever p is, the likeliest stays
        drop_V = torch.empty_like(order_V, dtype=torch.bool).scatter_(0, order_V, before_V >= top_p)
        logits_V = logits_V.masked_fill(drop_V, -torch.inf)
    if min_p > 0:
        logits_V = logits_V.masked_fill(logits_V < logits_V.max() + math.log(min_p), -torch.inf)
    return logits_V


def draw(logits_V: Tensor, generator: torch.Generator) -> int:
    """One token from softmax(logits) by inversion; one number leaves the generator.

    Sums run in FP64: over a large vocabulary FP32 sums would be off by more than the rarest tokens' probabilities.
    """
    kept = logits_V.isfinite().nonzero().squeeze(1)
    cumulative = logits_V[kept].softmax(-1, dtype=torch.float64).cumsum(-1)
    threshold = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    place = torch.searchsorted(cumulative, threshold, right=True).clamp(max=len(kept) - 1)
    return int(kept[place])
