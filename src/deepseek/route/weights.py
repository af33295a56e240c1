"""Weights of terms for the members of a pool, of samples, of given keywords and of the glossary (deepseek.glossary),
and what a text's terms say with them.

Of term t and member m

    weight_tm = max(0, logit(share of m's samples with t) - logit(mean share of the other members')), of samples in t's
                language; 0 for function words
                + GIVEN * (the weight that is given, or the inverse frequency of t among the members' keywords and
                           descriptions, for the terms of these)
    logit_m   = sum over t in the text of weight_tm * n_t / (n_t + K1), / sqrt(number of these terms)

(Robertson and Sparck Jones' relevance weight where there are samples, plain TF-IDF where there are none). The
glossary's logits are such sums as well, of weights that are GLOSSARY times inverse frequencies among the members. What
a text says is

    (1 - s) logits + s glossary's logits,    s = share * exp(-number of known terms / SHORT), 0 beyond LONG * SHORT

share is SAMPLED where a member has samples, GIVEN_ALONE where the pool knows its members by what was written of them,
which is meant to say what they are about.
A text of many terms shows by itself what it is about. Of a short one samples know the manner rather than the matter,
and where a member has none in its language, nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ..glossary import GLOSSARY as DOMAINS
from .routing import READ
from .terms import is_chinese, is_common, terms

if TYPE_CHECKING:
    from .member import PoolMember

K1 = 1.2  # BM25's
GIVEN, GLOSSARY = 7.0, 15.0
SAMPLED, GIVEN_ALONE, SHORT, LONG = 0.8, 0.4, 15, 6  # SHORT: in known terms of a text; LONG: in SHORTs
SPOKEN, FEW = 0.1, 0.01  # of a text's terms, for it to be in a language; of a member's texts, for it to have that
SOME = 2  # words of a domain that a description must have to be of it
MANY = 64  # members of a domain, of which its words tell none from the others


class TermWeights:
    """Weights of terms, {term: weight} of every member. Shape letters: P (term, member) pairs, V terms."""

    def __init__(self, weights: Sequence[Mapping[str, float]]) -> None:
        postings: dict[str, list[tuple[int, float]]] = {}
        for m, of_member in enumerate(weights):
            for term, weight in of_member.items():
                postings.setdefault(term, []).append((m, weight))
        self.members = len(weights)
        self.words = list(postings)
        self.vocabulary = {term: i for i, term in enumerate(self.words)}
        pairs = [pair for own in postings.values() for pair in own]
        self.member_P = np.array([m for m, _ in pairs], np.int64)
        self.weight_P = np.array([weight for _, weight in pairs], np.float32)
        self.first_V = np.cumsum([0, *map(len, postings.values())])

    def _found(self, counts: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the known terms, what their counts make of their weights)."""
        known = list(filter(self.vocabulary.__contains__, counts))
        n_T = np.fromiter(map(counts.__getitem__, known), np.float32, len(known))
        return np.fromiter(map(self.vocabulary.__getitem__, known), np.int64, len(known)), n_T / (n_T + K1)

    def logits(self, counts: Mapping[str, int]) -> tuple[np.ndarray, int]:
        """(logits of the members for a text with these terms, how many of them are known)."""
        id_T, saturated_T = self._found(counts)
        if not len(id_T):
            return np.zeros(self.members), 0
        at_P, size_T = self._pairs(id_T)
        value_P = self.weight_P[at_P] * np.repeat(saturated_T, size_T)
        return np.bincount(self.member_P[at_P], value_P, self.members) / math.sqrt(len(id_T)), len(id_T)

    def _pairs(self, id_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places of the pairs of some terms, how many each has)."""
        first_T = self.first_V[id_T]
        size_T = self.first_V[id_T + 1] - first_T
        return np.arange(size_T.sum()) + np.repeat(first_T - (np.cumsum(size_T) - size_T), size_T), size_T

    def keywords(self, counts: Mapping[str, int], member: int) -> dict[str, float]:
        """The terms that speak more for a member than for the mean of all, with what they add to its logit."""
        id_T, saturated_T = self._found(counts)
        at_P, size_T = self._pairs(id_T)
        more_P = self.weight_P[at_P] * ((self.member_P[at_P] == member) - 1 / self.members)
        more_T = np.bincount(np.repeat(np.arange(len(id_T)), size_T), more_P, len(id_T))
        value_T = more_T * saturated_T / math.sqrt(max(1, len(id_T)))
        return {self.words[i]: value for i, value in zip(id_T.tolist(), value_T.tolist(), strict=True) if value > 0}


class Terms:
    """The keywords' evidence. own: weights of the members' samples, keywords and descriptions. glossary: of the
    glossary, None where it is not asked or knows no member."""

    def __init__(self, members: Sequence[PoolMember], samples: Sequence[Sequence[str]], glossary: bool = True) -> None:
        """samples: of every member, those that may be looked at."""
        self.own = TermWeights(_own_weights(members, samples))
        known = _glossary_weights(members) if glossary else []
        self.glossary = TermWeights(known) if any(known) else None
        self.share = SAMPLED if any(samples) else GIVEN_ALONE
        self._last: tuple[str, Counter[str]] = "", Counter()  # the keywords of a text are asked for after its logits

    def logits(self, text: str) -> tuple[np.ndarray, bool]:
        counts = Counter(terms(text[:READ]))
        self._last = text, counts
        logits_M, known = self.own.logits(counts)
        share = self._glossary_share(known)
        if self.glossary is None or not share:
            return logits_M, known > 0
        more_M, also = self.glossary.logits(counts)
        return (1 - share) * logits_M + share * more_M, known + also > 0

    def keywords(self, text: str, member: int, most: int = 10) -> dict[str, float]:
        """The terms that speak most for a member against the mean of all, with what they add to its logit."""
        last, counts = self._last
        if last != text:
            counts = Counter(terms(text[:READ]))
        found = self.own.keywords(counts, member)
        if self.glossary is not None and (share := self._glossary_share(self.own.logits(counts)[1])):
            more = self.glossary.keywords(counts, member)
            found = {word: (1 - share) * found.get(word, 0.0) + share * more.get(word, 0.0) for word in found | more}
        return dict(sorted(found.items(), key=lambda one: (-one[1], one[0]))[:most])

    def _glossary_share(self, known: int) -> float:
        """In what a text with so many known terms says: none of a long one, which saves its time."""
        return self.share * math.exp(-known / SHORT) if known < LONG * SHORT else 0.0


def _inverse(shared: int, members: int) -> float:
    """BM25's inverse frequency of a term that so many members share, at most 1."""
    return math.log(1 + (members - shared + 0.5) / (shared + 0.5)) / math.log(1 + (members - 0.5) / 1.5)


def _own_weights(members: Sequence[PoolMember], samples: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    weights = _sample_weights(samples)
    given: list[dict[str, float | None]] = []
    for member in members:
        own: dict[str, float | None] = dict.fromkeys(terms(member.domain))
        for word, weight in member.keywords.items():
            own.update(dict.fromkeys(terms(word), weight))
        given.append(own)
    shared = Counter(term for own in given for term in own)
    for own, of_member in zip(given, weights, strict=True):
        for term, weight in own.items():
            weight = _inverse(shared[term], len(members)) if weight is None else weight
            of_member[term] = of_member.get(term, 0.0) + GIVEN * weight
    return weights


def _sample_weights(samples: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """{term: relevance weight} of each member, of the terms in its samples that are rarer elsewhere, function words
    left out. Chinese terms are counted among the texts of which they are at least SPOKEN, others among theirs, and
    among the members that have some: that a member has no text in a language says nothing about its terms."""
    counts_LM = [[Counter[str]() for _ in samples] for _ in range(2)]
    size_LM = [[0] * len(samples) for _ in range(2)]
    for m, own in enumerate(samples):
        for text in own:
            found = set(terms(text[:READ]))
            chinese = set(filter(is_chinese, found))
            for language, some in enumerate((found - chinese, chinese)):
                if some and len(some) >= SPOKEN * len(found):
                    size_LM[language][m] += 1
                    counts_LM[language][m].update(term for term in some if not is_common(term))
    out: list[dict[str, float]] = [{} for _ in samples]
    for counts_M, size_M in zip(counts_LM, size_LM, strict=True):
        there = [m for m, own in enumerate(samples) if size_M[m] > FEW * len(own)]
        shares: dict[str, float] = {}  # summed over the members
        for m in there:
            for term, n in counts_M[m].items():
                shares[term] = shares.get(term, 0.0) + n / size_M[m]
        texts = sum(size_M[m] for m in there)
        for m in there:
            size = size_M[m]
            for term, n in counts_M[m].items():
                elsewhere = max(shares[term] - n / size, 0.0) / max(1, len(there) - 1) + 0.5 / (texts - size + 1)
                if (weight := _logit((n + 0.1) / (size + 0.2)) - _logit(elsewhere)) > 0:
                    out[m][term] = weight
    return out


def _logit(share: float) -> float:
    share = min(share, 0.999)
    return math.log(share / (1 - share))


def _glossary_weights(members: Sequence[PoolMember]) -> list[dict[str, float]]:
    """{term: weight} of each member, of the domains of the glossary that it is of."""
    of = [domains(member) for member in members]
    sizes = Counter(name for own in of for name in own)
    found: list[dict[str, float]] = []
    for names in of:
        own: dict[str, float] = {}
        for name in (one for one in names if sizes[one] <= MANY):
            for term, weight in _domain_terms(name).items():
                own[term] = max(own.get(term, 0.0), weight)
        found.append(own)
    shared = Counter(term for own in found for term in own)
    return [{term: GLOSSARY * weight * _inverse(shared[term], len(members)) for term, weight in own.items()}
            for own in found]


def domains(member: PoolMember) -> list[str]:
    """The domains of the glossary that a member is of: those that its name names; if it names none, those that its
    description names; if that names none either, the one of which most terms, SOME at least, stand in its description
    and keywords."""
    for said in (member.name.replace("_", " "), member.domain):
        if named := [name for name, pattern in _named().items() if pattern.search(said)]:
            return named
    found = set(terms(f"{member.domain} {' '.join(member.keywords)}"))
    counts = {name: len(found & _domain_terms(name).keys()) for name in DOMAINS}
    best = max(counts, key=counts.__getitem__)
    return [best] if counts[best] >= SOME else []


@cache
def _named() -> dict[str, re.Pattern[str]]:
    """What names each domain: whole words of English, Chinese ones anywhere."""
    return {name: re.compile("|".join(rf"\b{word}\b" if word.isascii() else word for word in domain.names.split("|")),
                             re.IGNORECASE | re.ASCII) for name, domain in DOMAINS.items()}


@cache
def _domain_terms(name: str) -> dict[str, float]:
    """{term: weight} of a domain of the glossary. Each of several terms of a word says less than the word."""
    out: dict[str, float] = {}
    for words in DOMAINS[name]:
        for word in words.split("|"):
            own = [term for term in terms(word) if not is_common(term)]
            for term in own:
                out[term] = max(out.get(term, 0.0), len(own) ** -0.5)
    return out
