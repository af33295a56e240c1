"""A text and a pool -> who serves it: keywords, relevance, the best three, their fusion.

    fusion = dynamic_routing("Who may end a contract?", pool)   # an ExpertPool, or any objects with `.domain`
    fusion.members, fusion.weights                              # weights sum to 1; the base alone where nothing fits
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Literal, Protocol, runtime_checkable

from ..errors import ConfigError, RequestError, shown
from .grounding import MOST, Grounded, ground
from .grounding import question as last_question
from .terms import PIECE, STOP, terms

TOP = 3  # members that are fused at most
MIN_WEIGHT = 0.15  # a member with less takes no part
READ = 2000  # characters of a text that are looked at
KEYWORDS = 20
Kind = Literal["base", "experts", "adapter", "knowledge", "mixed", "callable"]
_WORD = re.compile(PIECE)


@dataclass(frozen=True)
class Base:
    """The model itself, without a member of a pool."""

    name: str = "base"
    kind: Kind = "base"
    domain: str = ""


BASE = Base()


@dataclass(frozen=True)
class Fusion:
    """Who answers, and with which weight. members: of a pool, or the objects that were given; BASE alone where none
    fits. weights: as many, the largest first, with sum 1. kind: of the members, `mixed` where they differ, `callable`
    where they are objects that answer themselves, `base` for the base alone. bias: added to the gates' choice of a
    named group's experts, times its weight; 0 is exact."""

    members: tuple[Any, ...] = (BASE,)
    weights: tuple[float, ...] = (1.0,)
    kind: Kind = "base"
    bias: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name_of(member) for member in self.members)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values. bias: where it makes the answer inexact."""
        inexact = self.bias > 0 and any(getattr(member, "kind", "") == "experts" for member in self.members)
        return {"members": [{"name": name, "kind": getattr(member, "kind", "callable"), "weight": round(weight, 4)}
                            for name, member, weight in zip(self.names, self.members, self.weights, strict=True)],
                "kind": self.kind} | ({"bias": self.bias} if inexact else {})

    def each(self) -> list[Fusion]:
        """A fusion for each member alone, such as `LLM.generate_ensemble` answers with."""
        return [replace(fuse_expert_outputs([member]), bias=self.bias) for member in self.members]

    def ground(self, messages: Sequence[Mapping[str, Any]], most: int = MOST, question: str | None = None) -> Grounded:
        """The messages with passages of the members' knowledge bases quoted in front of the user's last one, `most`
        characters at most, and what they quote. question: what is searched for, in place of that message. Each base
        gives its best, the heaviest first."""
        asked = last_question(messages) if question is None else question
        found = [member.passages(asked) for member in self.members if getattr(member, "kind", "") == "knowledge"]
        ranks = zip_longest(*found)  # the best of every base, then the second
        return ground(messages, [one for rank in ranks for one in rank if one is not None], most=most)

    def outputs(self, prompt: str) -> list[tuple[Any, float, Any]]:
        """(member, weight, what it returns for the prompt), of members that are callable or have `.generate`. Raises
        ConfigError for one that is neither, before any is run."""
        for member in self.members:
            if not (callable(member) or callable(getattr(member, "generate", None))):
                what = "the base alone" if member is BASE else f"member {name_of(member)}"
                raise ConfigError(f"{what}: is not callable and has no .generate; LLM.generate runs members of a pool")
        return [(member, weight, member(prompt) if callable(member) else member.generate(prompt))
                for member, weight in zip(self.members, self.weights, strict=True)]

    def text(self, prompt: str) -> str:
        """The members' answer to a prompt: the text with the largest sum of weights, which is the first member's unless
        others agree. An answer is a text, an object with `.text`, or a list of one of these. Raises ConfigError as
        `outputs` does, and for another kind of answer."""
        votes: dict[str, float] = {}
        for member, weight, output in self.outputs(prompt):
            text = output[0] if isinstance(output, list | tuple) and len(output) == 1 else output
            text = getattr(text, "text", text)
            if not isinstance(text, str):
                raise ConfigError(f"member {name_of(member)}: returned {shown(output)}: must be a text")
            votes[text] = votes.get(text, 0.0) + weight
        return max(votes, key=votes.__getitem__)


@dataclass(frozen=True)
class RoutingDecision:
    """How a text was routed. fusion: the result. keywords: {term: weight in the decision}, the strongest first. scores:
    {member: probability}, the best first. threshold: what the best had to reach. abstained: why the base answers alone,
    or ""."""

    fusion: Fusion
    keywords: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    threshold: float = 0.0
    scorer: str = "keywords"
    abstained: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return self.fusion.to_dict() | {
                "abstained": self.abstained, "scorer": self.scorer,
                "threshold": round(self.threshold, 4),
                "scores": {name: round(score, 4) for name, score in self.scores.items()},
                "keywords": {word: round(weight, 4) for word, weight in self.keywords.items()}}


@dataclass(frozen=True)
class RoutedPart:
    """A part of a request, and who serves it. start, context, reason: as of a Segment (deepseek.route.split)."""

    text: str
    decision: RoutingDecision
    start: int = 0
    context: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the context."""
        about = {"text": self.text, "start": self.start, "end": self.start + len(self.text), "reason": self.reason}
        return about | self.decision.to_dict()


@runtime_checkable
class Router(Protocol):
    """What decides for itself who serves a text: an ExpertPool."""

    def route(self, text: str) -> RoutingDecision: ...


def name_of(member: Any) -> str:
    """What messages call a member: its name, else its domain, else its type; a text is its own."""
    return member if isinstance(member, str) else str(
        getattr(member, "name", None) or getattr(member, "domain", None) or type(member).__name__)


def extract_keywords(text: str, most: int = KEYWORDS) -> dict[str, float]:
    """Keywords of a text with weights that sum to 1, the heaviest first, `most` at most.

    Chinese words by jieba with its inverse frequencies; words of other languages by the logarithm of their count, those
    longer than three letters twice. An empty text has none. Raises RequestError for what is not a text.
    """
    if not isinstance(text, str):
        raise RequestError(f"text = {shown(text)}: must be a text")
    weights: dict[str, float] = {}
    text = text[:READ]
    words = Counter(match[0].lower() for match in _WORD.finditer(text) if not match[1])
    for word, count in words.items():
        if word not in STOP and not word.isdigit() and len(word) > 1:
            weights[word] = (1 + math.log(count)) * (2 if len(word) > 3 else 1)
    if chinese := "".join(match[1] or "，" for match in _WORD.finditer(text)).strip("，"):
        inverse, usual = _jieba_frequencies()
        for word, count in Counter(_jieba().lcut(chinese)).items():
            if len(word) > 1 and word not in STOP:
                weights[word] = (1 + math.log(count)) * inverse.get(word, usual) / 4
    best = sorted(weights.items(), key=lambda one: (-one[1], one[0]))[:most]
    total = sum(weight for _, weight in best)
    return {word: weight / total for word, weight in best}


@functools.cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it reports on stderr that it reads its dictionary
    return jieba


@functools.cache
def _jieba_frequencies() -> tuple[Mapping[str, float], float]:
    """({word: inverse frequency}, that of a word that is not among them)."""
    _jieba()
    import jieba.analyse

    frequencies, usual = jieba.analyse.TFIDF().idf_loader.get_idf()
    return frequencies, usual


def calculate_relevance(keywords: Mapping[str, float] | Iterable[str], domain: Any) -> float:
    """The share, in [0, 1], of keywords (by weight, where they have one) that a domain's description bears out.

    domain: a text, or an object with `.domain`. English words count by their stems, Chinese ones by pairs of
    characters. Raises ConfigError for a domain that is no text.
    """
    weights = dict(keywords) if isinstance(keywords, Mapping) else dict.fromkeys(keywords, 1.0)
    own, total = _terms_of(_domain(domain)), sum(weights.values())
    found = 0.0
    for word, weight in weights.items():
        if parts := terms(word):
            found += weight * sum(part in own for part in parts) / len(parts)
    return found / total if total > 0 else 0.0


def _domain(member: Any) -> str:
    domain = member if isinstance(member, str) else getattr(member, "domain", None)
    if not isinstance(domain, str):
        raise ConfigError(f"{name_of(member)}: domain = {shown(domain)}: must be a text")
    return domain


@lru_cache(4096)
def _terms_of(domain: str) -> frozenset[str]:
    return frozenset(terms(domain))


def fuse_expert_outputs(experts: Mapping[Any, float] | Sequence[Any],
                        weights: Sequence[float] | None = None, *, min_weight: float = MIN_WEIGHT) -> Fusion:
    """The best three of some experts with their scores, as a Fusion: scores that sum to 1, those below `min_weight`
    dropped, and the rest scaled again.

    experts: {expert: score}, (expert, score) pairs, or experts with `weights` beside them; without any, all count the
    same. None at all, or scores that are all zero, give the base alone. Raises ConfigError for a score that is negative
    or not finite, and for as many weights as there are no experts.
    """
    if isinstance(experts, Mapping):
        pairs = list(experts.items())
    elif weights is not None:
        if len(weights) != len(experts):
            raise ConfigError(f"weights: {len(weights)} for {len(experts)} experts: must be as many")
        pairs = list(zip(experts, weights, strict=True))
    elif all(isinstance(one, tuple) and len(one) == 2 for one in experts):
        pairs = list(experts)
    else:
        pairs = [(one, 1.0) for one in experts]
    for expert, score in pairs:
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score < math.inf:
            raise ConfigError(f"{name_of(expert)}: weight = {shown(score)}: must be a finite number >= 0")
    best = [pair for pair in sorted(pairs, key=lambda pair: -pair[1])[:TOP] if pair[1] > 0]
    total = math.fsum(score for _, score in best)
    best = [pair for pair in best if pair[1] >= min_weight * total] or best[:1]
    if not best:
        return Fusion()
    total = math.fsum(score for _, score in best)
    kinds: set[Any] = {getattr(expert, "kind", "callable") for expert, _ in best}
    return Fusion(tuple(expert for expert, _ in best), tuple(score / total for _, score in best),
                  kinds.pop() if len(kinds) == 1 else "mixed")


def dynamic_routing(input_text: str, expert_pool: Router | Sequence[Any]) -> Fusion:
    """Who serves a text: keywords -> relevance of each expert -> the best three -> their weighted fusion.

    expert_pool: an ExpertPool, which routes by its scorer (`expert_pool.route` also tells why), or objects with
    `.domain`, whose relevance is that of `calculate_relevance`. An empty pool, an empty text and scores that are all
    zero give the base alone. Raises RequestError for what is not a text, ConfigError for an expert without a domain.
    """
    if isinstance(expert_pool, Router):
        return expert_pool.route(input_text).fusion
    keywords = extract_keywords(input_text)
    scores = [calculate_relevance(keywords, expert) for expert in expert_pool]
    return fuse_expert_outputs(list(expert_pool), scores)
