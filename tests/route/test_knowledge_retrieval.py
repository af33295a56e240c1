"""The two rankings beside others' and dense forms."""

from __future__ import annotations

from collections import Counter

import bm25s
import numpy as np
import pytest

from deepseek.route import retrieval
from deepseek.route.retrieval import BM25, Counts, Projection, Sparse, best, fuse, spread
from deepseek.route.terms import clauses, terms


def corpus(passages: int, vocabulary: int, seed: int = 0) -> tuple[list[list[int]], Counts]:
    draw = np.random.default_rng(seed)
    texts = [list(map(int, vocabulary * draw.random(draw.integers(1, 60)) ** 3)) for _ in range(passages)]
    counted = [sorted(Counter(text).items()) for text in texts]
    return texts, Counts.of([np.array([t for t, _ in one], np.int32).tobytes() for one in counted],
                            [np.array([n for _, n in one], np.int32).tobytes() for one in counted])


def test_bm25_equals_bm25s() -> None:
    texts, counts = corpus(300, 500)
    theirs = bm25s.BM25(method="lucene", k1=retrieval.K1, b=retrieval.B)
    theirs.index([[f"t{term}" for term in text] for text in texts], show_progress=False)
    ours = BM25(counts)
    there = {term for text in texts for term in text}
    for query in ([3], [0, 1, 2, 40], [7, 7, 300], [1]):
        query = [term for term in query if term in there]
        scores = theirs.get_scores([f"t{term}" for term in query])
        np.testing.assert_allclose(ours.scores(query), scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(ours.has(query), [bool(set(query) & set(text)) for text in texts])
    assert not ours.has([10_000]).any()
    assert not ours.scores([10_000]).any() and not ours.scores([]).any()


def test_a_sparse_product_equals_the_dense_one() -> None:
    draw = np.random.default_rng(0)
    dense = draw.standard_normal((40, 30)).astype(np.float32) * (draw.random((40, 30)) < 0.1)
    rows, columns = np.nonzero(dense)
    sparse = Sparse(np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=40))]), columns, dense[rows, columns])
    matrix, other = draw.standard_normal((30, 5)).astype(np.float32), draw.standard_normal((40, 5)).astype(np.float32)
    np.testing.assert_allclose(sparse @ matrix, dense @ matrix, atol=1e-5)
    np.testing.assert_allclose(sparse.transposed(30) @ other, dense.T @ other, atol=1e-5)


def test_the_projection_is_that_of_a_whole_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "DIMENSIONS", 20)
    _, counts = corpus(400, 120)
    fitted = Projection.fit(counts)
    weighted = fitted.weighted(counts) @ np.eye(len(fitted.features), dtype=np.float32)
    _, values, whole = np.linalg.svd(weighted, full_matrices=False)
    kept = np.linalg.norm(weighted @ fitted.vectors) ** 2
    assert kept >= 0.98 * (values[:20] ** 2).sum(), "of what the best 20 directions keep"
    np.testing.assert_allclose(fitted.vectors.T @ fitted.vectors, np.eye(20), atol=1e-4)
    projected = fitted.project(counts)
    np.testing.assert_allclose(np.linalg.norm(projected, axis=1), 1, atol=1e-4)
    assert whole.shape[1] == fitted.vectors.shape[0]


@pytest.mark.parametrize("passages", [1, 2, 5])
def test_small_bases_have_fewer_dimensions(passages: int) -> None:
    _, counts = corpus(passages, 30)
    fitted = Projection.fit(counts)
    assert 1 <= fitted.vectors.shape[1] <= passages
    assert fitted.project(counts).shape == (passages, fitted.vectors.shape[1])


def test_a_sample_is_every_nth() -> None:
    _, counts = corpus(50, 40)
    every = counts.every(7)
    for n, i in enumerate(range(0, 50, 7)):
        mine, theirs = (slice(one.ends[k - 1] if k else 0, one.ends[k]) for one, k in ((every, n), (counts, i)))
        np.testing.assert_array_equal(every.terms[mine], counts.terms[theirs])


def test_best_and_fuse() -> None:
    scores = np.array([0, 3, 1, 3, -1, 2], np.float32)
    assert best(scores, 3).tolist() == [1, 3, 5] and best(scores, 10).tolist() == [1, 3, 5, 2]
    assert best(np.zeros(0, np.float32), 3).tolist() == []
    fused = fuse([np.array([2, 0]), np.array([0, 1])], 4)
    np.testing.assert_allclose(fused, [1 / 62 + 1 / 61, 1 / 62, 1 / 61, 0], rtol=1e-5)


def test_spread_lowers_what_is_like_better_ones() -> None:
    scores = np.array([0.99, 1.0, 0.97, 0.5, 0.985], np.float32)
    places = best(scores, 5)
    groups = {1: "a", 0: "a", 4: "b", 3: "c"}  # 2 has none
    assert [place for place, _ in spread(places, scores, groups, 1)] == [1, 0, 4, 3]
    assert [place for place, _ in spread(places, scores, groups, 0.98)] == [1, 4, 0, 3]
    np.testing.assert_allclose([score for _, score in spread(places, scores, groups, 0.5)], [1, 0.985, 0.5, 0.495],
                               rtol=1e-6)


@pytest.mark.parametrize(("text", "found"), [
    ("The Treatments were diagnosed; diagnosis", ["treat", "diagnos", "diagnos"]),
    ("合同法第二百六十四条之一", ["合同", "同法", "264z1clause"]), ("第264条", ["264clause"]),
    ("Ａrticle 12", ["12clause"]), ("第一千零一十八条", ["1018clause"]), ("第二十万零三条", ["200003clause"]),
    ("第十条", ["10clause"]), ("人", ["人"]),
    ("IPv6 3.14 C++", ["ipv6", "3", "14", "c"]), ("", []), ("the of 什么", []),
    ("用Python写函数v2版", ["用", "python", "写函", "函数", "v2", "版"])])
def test_terms(text: str, found: list[str]) -> None:
    assert terms(text) == found
    assert clauses(found) == [term for term in found if term.endswith("clause")]
