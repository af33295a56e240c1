"""Log-probabilities of given continuations. What prompts have in common is run once: they run in the order of their
ids, and one that begins like the one before it for half of its length or more, such as another continuation of the same
prompt, waits for it and then takes the beginning from the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import RequestError
from .llm import LLM
from .request import AdapterChoice, Request
from .sampling_params import SamplingParams

WINDOW = 1 << 14  # tokens that are queued together, about
Pair = tuple[Sequence[int], Sequence[int]]  # (ids of the context, ids of the continuation)


@dataclass(frozen=True)
class Score:
    """Of one continuation. logprob: the sum over its tokens, natural logarithm. greedy: whether each of them is the
    likeliest one."""

    logprob: float
    greedy: bool


def score(
    llm: LLM, pairs: Sequence[Pair], *, adapter: AdapterChoice | None = None,
    on_score: Callable[[int, Score], None] | None = None,
) -> list[Score]:
    """The score of each pair, in order. on_score: called with a pair's place and its score as soon as it is known.

    Raises RequestError for an empty context or continuation, an id outside of the vocabulary, or a pair longer than the
    model's context and one token (the last token is scored, not run).
    """
    for place, pair in enumerate(pairs):
        _check(llm, place, pair)
    name, params = llm.find_adapter(adapter), SamplingParams(max_tokens=0, prompt_logprobs=1)
    scores: dict[int, Score] = {}
    for places in _windows(pairs):
        requests: list[Request] = []
        for place in places:
            context, continuation = map(list, pairs[place])
            request = Request([*context, *continuation][:-1], params, max_new_tokens=0, adapter=name,
                              scored=continuation)
            if requests and 2 * _common(requests[-1].prompt_ids, context) >= len(context):
                before, leader = requests[-1], requests[-1].prefill_leader
                more = leader is None or _common(before.prompt_ids, context) > _common(leader.prompt_ids, context)
                request.prefill_leader = before if more else leader
            requests.append(request)
        llm.driver.generate(*requests)
        for place, request in zip(places, requests, strict=True):
            own = [one for one in request.prompt_logprobs if one is not None]
            scores[place] = Score(sum(one.logprob for one in own), all(one.top[0][0] == one.token for one in own))
            if on_score is not None:
                on_score(place, scores[place])
    return [scores[place] for place in range(len(pairs))]


def _common(ids: Sequence[int], context: Sequence[int]) -> int:
    """Tokens at the beginning that both have."""
    return next((i for i, (a, b) in enumerate(zip(ids, context, strict=False)) if a != b), min(len(ids), len(context)))


def _windows(pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """The places of the pairs in the order of their ids, cut into parts of WINDOW tokens."""
    window, tokens = list[int](), 0
    for place in sorted(range(len(pairs)), key=lambda place: [*map(list, pairs[place])]):
        window.append(place)
        tokens += sum(map(len, pairs[place]))
        if tokens >= WINDOW:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _check(llm: LLM, place: int, pair: Pair) -> None:
    context, continuation = pair
    if not context or not continuation:
        raise RequestError(f"pair {place}: {'continuation' if context else 'context'}: must have one token at least")
    if len(context) + len(continuation) > llm.max_length + 1:
        raise RequestError(f"pair {place}: has {len(context) + len(continuation)} tokens: must be at most "
                           f"{llm.max_length + 1}, the model's context (max_position_embeddings) and one")
    vocabulary = llm.model.config.vocab_size
    if outside := [i for i in (*context, *continuation) if not 0 <= i < vocabulary]:
        raise RequestError(f"pair {place}: token id {outside[0]}: must lie in the vocabulary 0..{vocabulary - 1}")
