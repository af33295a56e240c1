"""Logits -> the next token.

    bias       l <- l + logit_bias; before min_tokens what would end the text is left out
    penalise   l <- l / r if l > 0 else l * r, for every token already in the prompt or the output (arXiv 1909.05858)
    discourage l <- l - frequency_penalty * count - presence_penalty * (count > 0), counted over the output alone
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..errors import MoEDRError, RequestError
from .routing_override import ExpertControl


class SamplingOptions(TypedDict, total=False):
    """SamplingParams as keyword arguments, for type checkers and editors."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    skip_special_tokens: bool
    ignore_eos: bool
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    experts: ExpertControl | None
    routed: bool


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. Names are those of the OpenAI and vLLM interfaces; temperature and top_p default to
    what DeepSeek recommends for its models (the server's to OpenAI's, which are 1).

    max_tokens: new tokens at most; 0 runs the prompt alone. temperature: 0 is greedy. top_k: 0 is off. top_p,
    repetition_penalty: 1 is off. min_p: 0 is off. seed: None draws a fresh one. stop: strings that end the text and are
    not part of it (one string may be given bare). stop_token_ids: tokens that do so. ignore_eos: go on past the
    end-of-sequence token. min_tokens: new tokens before which neither end of sequence nor stop strings and ids end the
    text (a constraint that allows nothing else still does). presence_penalty, frequency_penalty: -2 to 2, 0 is off; of
    tokens in the output. logit_bias: token id -> -100 to 100, added to its logit. skip_special_tokens: leave special
    tokens out of the text. prompt_logprobs: as logprobs, of the prompt's own tokens. n: continuations of the prompt,
    with seeds seed, seed + 1, …. logprobs: report each token's log-probability and those of so many likeliest ones,
    before temperature, top_k, top_p, min_p, logit_bias and penalties. json_schema, regex, grammar (Lark): one of them,
    which the text then matches. experts: changes what the gates decide, inexact. routed: report the experts that every
    token visited.
    Raises RequestError naming field, value and rule.
    """

    max_tokens: int = 256
    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    experts: ExpertControl | None = None
    routed: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, list) else stop)
        self._need("max_tokens", "must be an integer >= 0", _is_int(self.max_tokens) and self.max_tokens >= 0)
        self._need("temperature", "must be a number >= 0", _is_number(self.temperature) and self.temperature >= 0)
        self._need("top_k", "must be an integer >= 0 (0 is off)", _is_int(self.top_k) and self.top_k >= 0)
        self._need("top_p", "must lie in (0, 1]", _is_number(self.top_p) and 0 < self.top_p <= 1)
        self._need("min_p", "must lie in [0, 1]", _is_number(self.min_p) and 0 <= self.min_p <= 1)
        self._need("repetition_penalty", "must be a number > 0",
                   _is_number(self.repetition_penalty) and self.repetition_penalty > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._need(name, "must lie in [-2, 2]", _is_number(value) and -2 <= value <= 2)
        if isinstance(self.logit_bias, Mapping):  # JSON has no keys but texts
            object.__setattr__(self, "logit_bias", {_id(key): value for key, value in self.logit_bias.items()})
        self._need("logit_bias", "must be null or token ids with numbers from -100 to 100", self.logit_bias is None or (
            isinstance(self.logit_bias, Mapping) and all(
                _is_int(key) and key >= 0 and _is_number(value) and -100 <= value <= 100
                for key, value in self.logit_bias.items())))
        if isinstance(self.stop_token_ids, list):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._need("stop_token_ids", "must be token ids, integers >= 0", isinstance(self.stop_token_ids, tuple) and all(
            _is_int(token) and token >= 0 for token in self.stop_token_ids))
        self._need("min_tokens", f"must be an integer from 0 to max_tokens ({self.max_tokens})",
                   _is_int(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens)
        self._need("skip_special_tokens", "must be true or false", isinstance(self.skip_special_tokens, bool))
        self._need("seed", "must be null or an integer of 64 bits",
                   self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63))
        self._need("stop", "must be strings, none of them empty",
                   isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop))
        self._need("ignore_eos", "must be true or false", isinstance(self.ignore_eos, bool))
        self._need("n", "must be an integer from 1 to 128", _is_int(self.n) and 1 <= self.n <= 128)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._need(name, "must be null or an integer from 0 to 100",
                       value is None or (_is_int(value) and 0 <= value <= 100))
        self._need("json_schema", "must be null, a JSON text or an object",
                   self.json_schema is None or isinstance(self.json_schema, str | Mapping))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            self._need(name, "must be null or a text", value is None or isinstance(value, str))
        self._need("experts", "must be null or an ExpertControl",
                   self.experts is None or isinstance(self.experts, ExpertControl))
        self._need("routed", "must be true or false", isinstance(self.routed, bool))
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
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
    """Of one token: natural logarithm of its probability, and the likeliest tokens with theirs, descending.

    offset: where in the text its own begins, in characters; of a sampled token.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = field(default=0, compare=False)


def logprobs(logits_V: Tensor, token: int, top: int, offset: int = 0) -> Logprob:
    """From the logits that the token was drawn from; tokens that a constraint rules out are not among the likeliest."""
    log_V = logits_V.double().log_softmax(-1)
    best = log_V.topk(min(top, int(log_V.isfinite().sum())))
    return Logprob(token, float(log_V[token]),
                   tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)), offset)


def _id(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Adjustment:
    """What a request's bias, min_tokens and output penalties do to its logits, token after token."""

    def __init__(self, params: SamplingParams, ends: frozenset[int], vocabulary: int) -> None:
        """ends: ids that end the text."""
        self._params, self._counts = params, dict[int, int]()
        bias = params.logit_bias or {}  # a client may have one for every token, so they are made into tensors once
        self._biased, self._bias = torch.tensor([*bias]), torch.tensor([*map(float, bias.values())])
        self._ends = torch.tensor(sorted(i for i in ends if i < vocabulary) if params.min_tokens else [])

    def add(self, token: int) -> None:
        """The output goes on with `token`."""
        self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, logits_V: Tensor, seen: int) -> Tensor:
        """The logits after `seen` tokens of output; a new tensor where anything changes."""
        if len(self._bias):
            logits_V = logits_V.index_add(0, self._biased, self._bias.to(logits_V))
        if len(self._ends) and seen < self._params.min_tokens:
            kept_V = logits_V.index_fill(0, self._ends, -torch.inf)
            logits_V = kept_V if bool((kept_V > -torch.inf).any()) else logits_V
        return logits_V

    def discourage(self, logits_V: Tensor) -> Tensor:
        """The logits less the penalties for what is in the output."""
        presence, frequency = self._params.presence_penalty, self._params.frequency_penalty
        if not self._counts or presence == frequency == 0:
            return logits_V
        less = logits_V.new_tensor([presence + frequency * count for count in self._counts.values()])
        return logits_V.index_add(0, torch.tensor(list(self._counts)), less, alpha=-1)


def finite(logits_V: Tensor) -> int:
    """The place of the largest. Raises MoEDRError if the logits are not numbers."""
    best = int(logits_V.argmax())
    if math.isnan(logits_V[best]):  # what is no number counts as the largest
        raise MoEDRError("the model's logits are not numbers (NaN): its weights are damaged or overflow their dtype")
    return best


def sample(logits_V: Tensor, params: SamplingParams, generator: torch.Generator, seen_V: Tensor | None = None) -> int:
    """The next token's id.

    logits_V: FP32 on the CPU, left as it is. seen_V: boolean, True for tokens of the prompt and the output; only a
    repetition penalty reads it. Raises MoEDRError if the logits are not numbers.
    """
    best = finite(logits_V)
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
