"""Two rankings of passages and their fusion, in numpy.

BM25 (Robertson; Lucene's variant, k1 = 0.8, b = 0.75) over postings with the weights computed beforehand:

    weight(t, d) = idf(t) f / (f + k1 (1 - b + b |d| / mean |d|)),  idf(t) = ln(1 + (N - n + 1/2) / (n + 1/2))

Latent semantic analysis: rows (1 + ln f) idf, of unit length, through the first 256 right singular vectors, which a
randomized SVD finds (Halko, Martinsson and Tropp 2011).

The two are joined as a sum: BM25 over its highest score, a fraction of the cosine, and one for each passage with a
clause that the query names by its number; the sum is lowered for passages of a section that has a better one.
Reciprocal rank fusion (Cormack et al. 2009), the sum of 1 / (60 + rank), is here too; it finds less than BM25 alone
where the vectors are the weaker of the two (docs/log.md).

Letters: passages N, terms V, postings P, dimensions D.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

K1, B, FUSION = 0.8, 0.75, 60
DIMENSIONS, FEATURES, SAMPLE = 256, 1 << 15, 1 << 13
_SPARE, _ROUNDS = 16, 2  # of the randomized SVD: dimensions beyond those wanted, power iterations
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Counts:
    """How often which terms stand in which passages: passage i has terms[ends[i-1]:ends[i]], each once."""

    terms: Ints
    counts: Ints
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, terms: Sequence[bytes], counts: Sequence[bytes]) -> Counts:
        """Of what is stored of each passage: int32 ids, and int32 counts."""
        ends = np.cumsum([len(one) // 4 for one in terms], dtype=np.int64)
        return cls(np.frombuffer(b"".join(terms), np.int32), np.frombuffer(b"".join(counts), np.int32), ends)

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[int, bytes, bytes, bytes | None]]) -> Counts:
        """Of what `Store.rows` gives."""
        return cls.of([row[1] for row in rows], [row[2] for row in rows])

    def __len__(self) -> int:
        return len(self.ends)

    def every(self, step: int) -> Counts:
        """Every `step`-th passage."""
        if step == 1:
            return self
        sizes = np.diff(self.ends, prepend=0)
        kept = np.arange(len(self)) % step == 0
        there = np.repeat(kept, sizes)
        return Counts(self.terms[there], self.counts[there], np.cumsum(sizes[kept]))


class BM25:
    """Postings by term: docs[starts[t]:starts[t+1]] and their weights."""

    def __init__(self, rows: Counts) -> None:
        self.passages = len(rows)
        sizes = np.diff(rows.ends, prepend=0)
        docs_P = np.repeat(np.arange(self.passages, dtype=np.int64), sizes)
        lengths_N = np.bincount(docs_P, rows.counts, self.passages)
        order = np.sort(rows.terms.astype(np.int64) << 32 | np.arange(len(rows.terms))) & 0xFFFFFFFF
        self.docs, terms_P, f_P = docs_P[order].astype(np.int32), rows.terms[order], rows.counts[order]
        n_V = np.bincount(terms_P)
        self.starts = np.concatenate([[0], np.cumsum(n_V)])
        idf_V = np.log1p((self.passages - n_V + 0.5) / (n_V + 0.5))
        norm_N = K1 * (1 - B + B * lengths_N / max(lengths_N.mean(), 1) if self.passages else lengths_N)
        self.weights: Floats = (idf_V[terms_P] * f_P / (f_P + norm_N[self.docs])).astype(np.float32)

    def has(self, terms: Iterable[int]) -> NDArray[np.bool_]:
        """Of every passage, whether one of some terms stands in it."""
        found = np.zeros(self.passages, bool)
        for term in terms:
            found[self.docs[self._posted(term)]] = True
        return found

    def scores(self, query: Sequence[int]) -> Floats:
        """Of every passage for the ids of a query's terms, one that comes twice counting twice."""
        total = np.zeros(self.passages, np.float32)
        for term in query:
            posted = self._posted(term)
            total[self.docs[posted]] += self.weights[posted]
        return total

    def _posted(self, term: int) -> slice:
        """Nothing for a term that came into the vocabulary since."""
        return slice(*self.starts[term : term + 2]) if term + 1 < len(self.starts) else slice(0)


@dataclass(frozen=True)
class Projection:
    """TF-IDF and the singular vectors. features: ids of terms, ascending; idf and vectors (V, D) are theirs."""

    features: Ints
    idf: Floats
    vectors: Floats

    @classmethod
    def fit(cls, rows: Counts) -> Projection:
        """Of the passages, or of every n-th where there are many more than 8,192."""
        n_V = np.bincount(rows.terms, minlength=1)
        common = np.sort(np.argsort(-n_V, kind="stable")[:FEATURES])
        features = common[n_V[common] >= min(2, n_V.max())].astype(np.int32)
        idf = np.log1p(len(rows) / np.maximum(n_V[features], 1)).astype(np.float32)
        bare = cls(features, idf, np.zeros((len(features), 0), np.float32))
        sample = bare.weighted(rows.every(max(1, len(rows) // SAMPLE)))
        turned = sample.transposed(len(features))
        dims = min(DIMENSIONS, len(sample.starts) - 1, len(features))
        wide = min(dims + _SPARE, len(sample.starts) - 1, len(features))
        Y = np.random.default_rng(0).standard_normal((len(features), wide), np.float32)
        for _ in range(_ROUNDS):
            Y, _ = np.linalg.qr(turned @ (sample @ Y))
        Q, _ = np.linalg.qr(sample @ Y)
        _, _, V = np.linalg.svd((turned @ Q).T, full_matrices=False)
        return cls(features, idf, np.ascontiguousarray(V[:dims].T))

    def weighted(self, rows: Counts) -> Sparse:
        """TF-IDF of the features in each passage, of unit length."""
        places = np.searchsorted(self.features, rows.terms)
        there = places < len(self.features)
        there[there] = self.features[places[there]] == rows.terms[there]
        places = places[there]
        weights = (1 + np.log(rows.counts[there])).astype(np.float32) * self.idf[places]
        starts = np.concatenate([[0], np.cumsum(there)])[np.concatenate([[0], rows.ends])]
        sizes = np.diff(starts)
        squares = np.bincount(np.repeat(np.arange(len(rows)), sizes), weights**2, len(rows))
        norms = np.repeat(np.sqrt(squares), sizes).astype(np.float32)
        return Sparse(starts, places, np.divide(weights, norms, dtype=np.float32))

    def project(self, rows: Counts) -> Floats:
        """(N, D), of unit length; zeros for a passage without features."""
        vectors = self.weighted(rows) @ self.vectors
        return vectors / np.maximum(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), 1e-9)[:, None]


class Sparse(NamedTuple):
    """A sparse matrix by rows: row i has values[starts[i]:starts[i+1]] in columns[...]."""

    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: Floats

    def transposed(self, columns: int) -> Sparse:
        rows = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        order = np.argsort(self.columns, kind="stable")
        counts = np.bincount(self.columns, minlength=columns)
        return Sparse(np.concatenate([[0], np.cumsum(counts)]), rows[order], self.values[order])

    def __matmul__(self, matrix: Floats) -> Floats:
        out = np.zeros((len(self.starts) - 1, matrix.shape[1]), np.float32)
        for row, (start, end) in enumerate(pairwise(self.starts.tolist())):
            if start < end:
                np.dot(self.values[start:end], matrix[self.columns[start:end]], out=out[row])
        return out


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def alone() -> AbstractContextManager[Any]:
    """Products on this thread alone: BLAS wakes others for rows of a few thousand numbers, and waits for them, which on
    busy cores takes ten times as long as the product."""
    return _blas().limit(limits=1, user_api="blas")


def best(scores: Floats, most: int) -> NDArray[np.int64]:
    """Places of the highest scores above zero, the highest first, equal ones in their order."""
    most = min(most, len(scores))
    found = np.argpartition(-scores, most - 1)[:most] if most else np.zeros(0, np.int64)
    found = found[scores[found] > 0]
    return found[np.lexsort((found, -scores[found]))]


def spread(places: NDArray[np.int64], scores: Floats, groups: Mapping[int, Hashable], lowered: float,
           ) -> Iterator[tuple[int, float]]:
    """(place, score) of some places, the best first; a score is multiplied by `lowered` for each place of its group
    that came before. places: the highest scores first; those without a group are left out."""
    taken = Counter[Hashable]()
    left = [(-float(scores[place]), rank, int(place)) for rank, place in enumerate(places) if int(place) in groups]
    while left:  # a list in order is a heap
        score, rank, place = heapq.heappop(left)
        group = groups[place]
        now = -float(scores[place]) * lowered ** taken[group]
        if now > score:
            heapq.heappush(left, (now, rank, place))
        else:
            taken[group] += 1
            yield place, -score


def fuse(rankings: Sequence[NDArray[np.int64]], passages: int) -> Floats:
    """Scores of reciprocal rank fusion of every passage."""
    total = np.zeros(passages, np.float32)
    for ranking in rankings:
        total[ranking] += 1 / (FUSION + 1 + np.arange(len(ranking), dtype=np.float32))
    return total
