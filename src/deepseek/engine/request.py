"""One request: what was asked, and what became of it. Its tokens are a SequenceState, its text is a TextStream."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import MoEDRError
from ..model.adapters import Adapter
from ..tokenizer import Tokenizer
from .sampler import Adjustment, Logprob, finite, logprobs, penalise, sample
from .sampling_params import SamplingParams
from .sequence import SequenceState
from .text_stream import TextStream

if TYPE_CHECKING:
    from ..atlas.usage import ExpertUsage
    from .constraint import Constraint
    from .routing_override import RoutingOverride

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
AdapterChoice = str | Mapping[str, Any]  # a name, weights by name, or {"arrow": names, "top": 2}
FinishReason = Literal["stop", "length", "abort", "error"]
_ids = count()


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt.

    token_ids: every sampled token, the one that ended the text included. finish_reason: "stop" (end of sequence or a
    stop string), "length" (max_tokens, or the end of the model's context), "abort" or "error". logprobs: one entry a
    token, where they were asked for.
    prompt_logprobs: one entry a token of the prompt, None for the first. routed: the experts each token of prompt and
    output visited, int64 [tokens, MoE layers, K], where asked for; the last token, which was never run, is not among
    them. choices: all `n` continuations, this one first. cached_tokens: of the prompt, found in the prefix cache.
    routing: how a pool's members were chosen, and the passages that were quoted, an entry for each part of the request;
    None where none was asked.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[Logprob, ...] | None = None
    routed: Tensor | None = field(default=None, compare=False)
    cached_tokens: int = field(default=0, compare=False)
    others: tuple[RequestOutput, ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    routing: tuple[Mapping[str, Any], ...] | None = field(default=None, compare=False)

    @property
    def choices(self) -> tuple[RequestOutput, ...]:
        return (self, *self.others)

    @property
    def usage(self) -> dict[str, int]:
        """Token counts under OpenAI's names; of all choices."""
        new = sum(len(one.token_ids) for one in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}


class Ensemble:
    """Requests that advance together: each step one token is drawn from the weighted mean of their distributions and
    goes to all of them. The first one's parameters and random numbers are used.

    For prompts that put one question in several ways, or to several experts. Mixtures of experts' opinions by the
    arithmetic mean of probabilities, as in the product's linear opinion pool (Stone 1961). posterior: weights are those
    that Bayes' rule gives after each token, w_i p_i(token) scaled to a sum of 1 (as in DEMix, arXiv 2108.05036).
    """

    def __init__(self, weights: Sequence[float], posterior: bool = False) -> None:
        total = sum(weights)
        self.weights, self.posterior = [weight / total for weight in weights], posterior
        self.members: list[Request] = []
        self._alive: list[Request] = []
        self._parts_MV: Tensor | None = None  # log-probabilities of those alive in this step
        self.waiting: dict[int, Tensor] = {}  # logits of members that have reached the step

    def offer(self, request: Request, logits_V: Tensor) -> Tensor | None:
        """The mixture's logits once all members are there."""
        self.waiting[request.request_id] = logits_V
        alive = [member for member in self.members if member.finish_reason is None]
        if any(member.request_id not in self.waiting for member in alive):
            return None
        weight_M = torch.tensor([w for w, m in zip(self.weights, self.members, strict=True) if m in alive])
        parts_MV = torch.stack([self.waiting[member.request_id].double().log_softmax(-1) for member in alive])
        self.waiting, self._alive, self._parts_MV = {}, alive, parts_MV
        return (parts_MV + weight_M.double().log().unsqueeze(1)).logsumexp(0).float()

    def drew(self, token: int) -> None:
        """Weigh the members anew by the token that was drawn."""
        if not self.posterior:
            return
        assert self._parts_MV is not None
        log_p = dict(zip(self._alive, self._parts_MV[:, token].tolist(), strict=True))
        new = [weight * math.exp(log_p.get(member, -math.inf)) for weight, member in zip(
            self.weights, self.members, strict=True)]
        if (total := math.fsum(new)) > 0:  # else the token has no chance with any, by a constraint or a bias
            self.weights = [weight / total for weight in new]


class Request:
    """A continuation in the making.

    max_new_tokens: 0 runs the prompt alone. constraint_after: the text up to and with this marker is free, such as the
    reasoning before an answer. adapter: the one that its tokens go through, or a mixture. pooling: the mean of the
    prompt's last hidden states is wanted. scored: the last ids of the prompt and the one that follows it, whose
    log-probabilities alone are wanted (one id at least is before them, which the prefix cache may then serve).
    """

    def __init__(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, max_new_tokens: int,
        eos_ids: frozenset[int] = frozenset(), tokenizer: Tokenizer | None = None, vocabulary: int = 0,
        domain: str | None = None, constraint: Constraint | None = None, constraint_after: str | None = None,
        adapter: Adapter | None = None, pooling: bool = False, scored: Sequence[int] = (),
    ) -> None:
        self.request_id = next(_ids)
        self.params, self.eos_ids, self.max_new_tokens = params, eos_ids, max_new_tokens
        self.domain, self.constraint, self.adapter = domain, constraint, adapter
        self.metric_labels: dict[str, str] = {}  # labels that monitoring counts it under
        self.usage: ExpertUsage | None = None  # counts the experts of what runs
        self.ahead: Sequence[str] = ()  # named groups whose experts are read ahead, where not all are in memory
        self.routing_override: RoutingOverride | None = None
        self.ensemble: Ensemble | None = None
        self.prefill_leader: Request | None = None  # of one prompt's continuations the first, whose pages serve all
        self.on_token: Callable[[Request], None] | None = None
        self.checked = False  # by the engine, which does it once
        self.done = threading.Event()  # it has ended, and holds nothing any more
        self.paused = False  # its reader is behind: set by the reader, at any time

        self.sequence = SequenceState(prompt_ids, adapter)
        self.text_stream = TextStream(tokenizer, params)
        self.arrived = time.monotonic()
        self.first_token: float | None = None
        self.finished: float | None = None
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # why it ended, if that is it
        self.routes: list[Tensor] = []  # [tokens, layers, K] a chunk
        self.logprobs: list[Logprob] = []
        self.targets = [*prompt_ids, *scored[-1:]]  # ids whose log-probabilities `prompt_logprobs` are
        self.prompt_logprobs: list[Logprob | None] = [None] * (len(self.targets) - len(scored) if scored else 1)
        self.pooled = 0 if pooling else None  # positions whose hidden states are in the sum
        self._sum_H: Tensor | None = None

        self.generator = params.generator()
        self._free: str | None = None if constraint_after is None else ""  # the text so far, while it is free
        self._marker = constraint_after or ""
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self._adjustment = Adjustment(params, self._ends, vocabulary)
        self._seen_V: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen_V = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen_V[self.prompt_ids] = True

    @property
    def prompt_ids(self) -> list[int]:
        return self.sequence.prompt_ids

    @property
    def token_ids(self) -> list[int]:
        """Every token sampled so far."""
        return self.sequence.token_ids

    @property
    def text(self) -> str:
        """The text so far."""
        return self.text_stream.text

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and not known yet."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.targets)

    @property
    def pending(self) -> bool:
        """Whether it has to wait for its constraint before it can run."""
        return self.constraint is not None and self.constraint.pending

    @property
    def held(self) -> bool:
        """Whether it cannot run now."""
        return self.paused or self.pending

    @property
    def mates(self) -> list[Request]:
        """Those that advance with it, itself among them."""
        return [self] if self.ensemble is None else self.ensemble.members

    def sample(self, logits_V: Tensor) -> int:
        """Draw the next token from the logits after everything so far."""
        if self.constraint is not None and self._free is None:
            logits_V = self.constraint.allow(logits_V)
        adjusted_V = self._adjustment.apply(logits_V, len(self.token_ids))
        if adjusted_V is not logits_V:  # where NaN may have been left out; `sample` looks at its own logits
            finite(logits_V)
        if self._seen_V is not None:
            adjusted_V = penalise(adjusted_V, self.params.repetition_penalty, self._seen_V)
        token = sample(self._adjustment.discourage(adjusted_V), self.params, self.generator, None)
        if self.params.logprobs is not None:
            self.logprobs.append(logprobs(logits_V, token, self.params.logprobs, self.text_stream.length))
        return token

    def score(self, first: int, logits_SV: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens that follow positions first, …; known ones stay."""
        assert self.params.prompt_logprobs is not None
        for position, logits_V in enumerate(logits_SV, first + 1):
            if position == len(self.prompt_logprobs) < len(self.targets):
                finite(logits_V)
                self.prompt_logprobs.append(logprobs(logits_V, self.targets[position], self.params.prompt_logprobs))

    def pool(self, first: int, hidden_TH: Tensor) -> None:
        """Add the hidden states of positions first, …; known ones stay. In FP64, so that pieces hardly matter."""
        assert self.pooled is not None
        new_TH = hidden_TH[max(0, self.pooled - first) :]
        if len(new_TH):
            sum_H = new_TH.double().sum(0).cpu()
            self._sum_H = sum_H if self._sum_H is None else self._sum_H + sum_H
            self.pooled += len(new_TH)

    @property
    def mean_H(self) -> Tensor:  # noqa: N802
        """The mean of the prompt's last hidden states, FP32 [H]. Raises MoEDRError for NaN and infinity."""
        assert self._sum_H is not None and self.pooled == len(self.prompt_ids)
        mean_H = (self._sum_H / self.pooled).float()
        if not mean_H.isfinite().all():
            raise MoEDRError("the model's hidden states are not numbers (NaN or infinite): its weights are damaged or "
                             "overflow their dtype")
        return mean_H

    def append(self, token: int) -> None:
        """One more token: extend the text; decide whether this was the last, or leave that to `settle`."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.token_ids.append(token)
        if self._seen_V is not None:
            self._seen_V[token] = True
        self._adjustment.add(token)
        ended = token in self._ends
        match = len(self.token_ids) > self.params.min_tokens
        piece = "" if ended else self.text_stream.push(token, match=match)
        if ended or self.text_stream.stopped:
            self.end("stop")
            return
        if self._free is not None:
            self._free += piece
            if self._marker in self._free:
                self._free = None
        elif self.constraint is not None:
            self.constraint.accept(token)
        self.settle(0.0)

    def settle(self, seconds: float | None = None) -> bool:
        """Wait `seconds` at most for what the constraint says of the last token; whether it is known if it ended.

        Raises RequestError where the grammar outgrew its limits.
        """
        if self.constraint is not None and not self.constraint.settle(seconds):
            return False
        if self.constraint is not None and self.constraint.finished:
            self.end("stop")
        elif len(self.token_ids) >= self.max_new_tokens:
            self.end("length")
        return True

    def end(self, reason: FinishReason) -> None:
        """The reason is set last: a reader in another thread then reads the whole text."""
        self.finished = time.monotonic()
        self.text_stream.flush()
        if self.text_stream.stopped and reason == "length":
            reason = "stop"
        self.finish_reason = reason

    def output(self) -> RequestOutput:
        assert self.finish_reason is not None
        return RequestOutput(
            self.text, tuple(self.token_ids), self.finish_reason, len(self.prompt_ids),
            tuple(self.logprobs) if self.params.logprobs is not None else None,
            torch.cat(self.routes) if self.routes else None, self.sequence.cached_tokens,
            prompt_logprobs=None if self.params.prompt_logprobs is None else tuple(self.prompt_logprobs))


def to_output(group: Sequence[Request]) -> RequestOutput:
    """The output of a prompt's continuations."""
    first, *others = (request.output() for request in group)
    return replace(first, others=tuple(others)) if others else first
