"""Every formula on numbers worked out by hand, and the tests against full enumeration."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.atlas.atlas import jaccard
from deepseek.atlas.evidence import (
    Routed,
    coverage,
    holm,
    lift_needed,
    members,
    random_experts_p,
    rank_correlation,
    select,
    share_as_large,
    shuffled_lifts,
    unit_coverage,
)
from deepseek.ids import ExpertId, ExpertSet

LAYERS = (1, 3)
SLOTS_ULE = np.array([[[6, 2, 0, 0], [0, 4, 4, 0]], [[1, 1, 1, 1], [4, 0, 0, 0]]], dtype=float)
MASK_LE = np.array([[True, False, False, False], [False, True, True, False]])


def shuffled_p(coverage_U: np.ndarray, tokens_U: np.ndarray, sizes: tuple[int, ...], own: int, seed: int) -> float:
    return share_as_large(*shuffled_lifts(coverage_U, tokens_U, sizes, own, seed))


def test_coverage() -> None:
    assert unit_coverage(SLOTS_ULE, MASK_LE).tolist() == [(6 / 8 + 8 / 8) / 2, (1 / 4 + 0) / 2]
    assert coverage(SLOTS_ULE, np.array([4.0, 2.0]), MASK_LE) == pytest.approx((4 * 0.875 + 2 * 0.125) / 6)


def test_scores_select_and_mask() -> None:
    units = Routed(np.array([4.0, 2.0]), SLOTS_ULE, SLOTS_ULE / 8)
    assert units.scores("token").tolist() == [[7 / 12, 3 / 12, 1 / 12, 1 / 12], [4 / 12, 4 / 12, 4 / 12, 0]]
    assert units.scores("gate")[0].tolist() == [7 / 48, 3 / 48, 1 / 48, 1 / 48]
    assert units.part(np.array([1])).scores("token")[0].tolist() == [0.25] * 4
    experts, scores = select(units.scores("token"), LAYERS, 0.6)
    assert list(experts) == [(1, 0), (3, 0), (3, 1), (1, 1)] and scores == (7 / 12, 4 / 12, 4 / 12, 3 / 12)
    assert members(experts, LAYERS, 4).tolist() == [[True, True, False, False]] * 2


def test_the_permutation_test_is_the_share_of_all_assignments() -> None:
    """Three domains of two units, every assignment counted; the random ones come close."""
    generator = np.random.default_rng(5)
    found_U, tokens_U = generator.random(6), generator.integers(1, 5, 6).astype(float)
    found_U[:2] += 0.3

    def lift(order: tuple[int, ...]) -> float:
        means = [np.average(found_U[list(order[i : i + 2])], weights=tokens_U[list(order[i : i + 2])])
                 for i in (0, 2, 4)]
        return means[0] - (means[1] + means[2]) / 2

    seen = lift(tuple(range(6)))
    exact = np.mean([lift(order) >= seen - 1e-12 for order in permutations(range(6))])
    assert 0.02 < exact < 0.5
    assert shuffled_p(found_U, tokens_U, (2, 2, 2), 0, seed=0) == pytest.approx(exact, abs=0.025)


def test_nothing_to_tell_apart_gives_one_and_a_clear_lift_the_least() -> None:
    assert shuffled_p(np.full(8, 0.3), np.arange(1.0, 9), (4, 4), 0, 0) == 1.0
    clear = np.concatenate((np.full(20, 0.9), np.full(20, 0.1)))
    assert shuffled_p(clear, np.ones(40), (20, 20), 0, 0) == 1 / 5000
    assert shuffled_p(clear, np.ones(40), (20, 20), 1, 0) == 1.0  # the wrong way round


@pytest.mark.parametrize("level", [0.5, 0.05, 0.05 / 3, 1e-4, 1e-9])
def test_the_lift_that_is_needed_is_the_least_one_with_a_low_p(level: float) -> None:
    found_U = np.random.default_rng(1).random(30)
    _, drawn_P = shuffled_lifts(found_U, np.ones(30), (10, 20), 0, 0)
    needed = lift_needed(drawn_P, level)
    assert share_as_large(needed, drawn_P) >= level, "not yet"
    above = share_as_large(needed + 1e-9, drawn_P)
    assert above < level if level > 1 / 5000 else needed == drawn_P[-1]  # no lift has a p below 1 / 5000


def test_random_experts_is_the_share_of_all_groups() -> None:
    share_LE = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.25, 0.45]])
    mask_LE = np.array([[True, False, True, False], [False, False, False, True]])
    seen = (0.6 + 0.45) / 2
    all_groups = [(sum(share_LE[0, list(a)]) + sum(share_LE[1, list(b)])) / 2
                  for a in combinations(range(4), 2) for b in combinations(range(4), 1)]
    exact = np.mean([found >= seen - 1e-12 for found in all_groups])
    assert random_experts_p(share_LE, mask_LE, 0) == pytest.approx(exact, abs=0.025)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(a <= b <= min(1.0, len(p) * a) for a, b in zip(p, adjusted, strict=True))
    assert [adjusted[i] for i in sorted(range(len(p)), key=p.__getitem__)] == sorted(adjusted)


def test_rank_correlation() -> None:
    a = np.array([0.1, 0.5, 0.2, 0.9])
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    assert rank_correlation(np.array([1, 2, 3, 4, 5]), np.array([2, 1, 4, 3, 5])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # ranks 0, 1.5, 1.5, 3 against 0..3: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation(np.array([1, 2, 2, 3]), np.arange(4)) == pytest.approx(4.5 / np.sqrt(22.5))
    assert rank_correlation(np.ones(4), a) == 0.0


def test_jaccard() -> None:
    a, b = ExpertSet([ExpertId(1, 0), ExpertId(1, 1)]), ExpertSet([ExpertId(1, 1), ExpertId(2, 1), ExpertId(2, 0)])
    assert jaccard(a, b) == jaccard(b, a) == 1 / 4
    assert jaccard(a, a) == jaccard((), ()) == 1.0 and jaccard(a, ()) == 0.0
