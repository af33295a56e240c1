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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import MoEDRError
from .sampling_params import SamplingParams


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


class Adjustment:
    """What a request's bias, min_tokens and output penalties do to its logits, token after token."""

    def __init__(self, params: SamplingParams, ends: frozenset[int], vocabulary: int) -> None:
        """ends: ids that end the text."""
        self._params, self._counts = params, dict[int, int]()
        bias = params.logit_bias or {}  # a client may have one for every token, so they are made into tensors once
        self._biased, self._bias = torch.tensor([*bias]), torch.tensor([*map(float, bias.values())])
        self._ends = torch.tensor(sorted(i for i in ends if i < vocabulary) if params.min_tokens else [])

    def add(self, token: int) -> None:
        """Append `token` to the output."""
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
        logits_V = nucleus(logits_V, top_p)
    if min_p > 0:
        logits_V = logits_V.masked_fill(logits_V < logits_V.max() + math.log(min_p), -torch.inf)
    return logits_V


CANDIDATES = 1024  # of a large vocabulary, tokens that are sorted at first


def nucleus(logits_V: Tensor, top_p: float, candidates: int = CANDIDATES) -> Tensor:
    """Logits with -inf for all but the likeliest tokens whose probabilities sum to top_p. To sort a whole vocabulary
    takes longer than a small model's layers, so the likeliest are tried first, with all their ties."""
    probs_V = logits_V.softmax(-1, dtype=torch.float64)
    index_C = None
    if candidates < len(logits_V):
        index_C = (logits_V >= logits_V.topk(candidates).values[-1]).nonzero().squeeze(1)
        if float(probs_V[index_C].sum()) < top_p:
            index_C = None
    among_C = logits_V if index_C is None else logits_V[index_C]
    order_C = among_C.sort(descending=True, stable=True).indices
    order_C = order_C if index_C is None else index_C[order_C]
    probs_C = probs_V[order_C]
    before_C = probs_C.cumsum(-1) - probs_C  # a token stays while the likelier ones have not reached p
    before_C[0] = 0.0  # whatever p is, the likeliest stays
    kept_C = order_C[before_C < top_p]
    return torch.full_like(logits_V, -torch.inf).index_copy_(0, kept_C, logits_V[kept_C])


def draw(logits_V: Tensor, generator: torch.Generator) -> int:
    """One token from softmax(logits) by inversion; one number leaves the generator.

    Sums run in FP64: over a large vocabulary FP32 sums would be off by more than the rarest tokens' probabilities.
    """
    kept = logits_V.isfinite().nonzero().squeeze(1)
    cumulative = logits_V[kept].softmax(-1, dtype=torch.float64).cumsum(-1)
    threshold = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    place = torch.searchsorted(cumulative, threshold, right=True).clamp(max=len(kept) - 1)
    return int(kept[place])
