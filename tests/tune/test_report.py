"""What a report says of a gain: its error, whether it is noise, and which rate to try next."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek.deepopt.evaluation import HeldOut
from deepseek.tune.report import TuneReport, higher, lower, paired, student


def report(gained: float, error: float | None, documents: int, lr: float = 3e-4) -> TuneReport:
    return TuneReport("experts", 1, 1, 1, 2.0 + gained, 2.0, 1.0, 1.0, "", 1, 2, 0, 1, 1, 0, {}, 0.0, "", 0,
                      lr=lr, standard_error=error, held_out=documents)


def test_the_error_is_that_of_the_mean_over_documents() -> None:
    draw = np.random.default_rng(0)
    spread = []
    for _ in range(2000):  # what repeated draws of documents give is what one of them estimates
        count = draw.integers(5, 40, 30).astype(float)
        before = 3.0 * count + draw.normal(0, 5, 30)
        after = before - (0.1 + draw.normal(0, 0.05, 30)) * count
        error, documents = paired(HeldOut(before, count.astype(int)), HeldOut(after, count.astype(int)), np.arange(30))
        assert documents == 30 and error is not None
        spread.append(((before - after).sum() / count.sum(), error))
    gains, errors = np.array(spread).T
    assert errors.mean() == pytest.approx(gains.std(), rel=0.1)


def test_windows_of_one_document_are_one_document() -> None:
    before, counts = np.array([10.0, 11.0, 12.0, 13.0]), np.array([5, 5, 5, 5])
    after = before - np.array([1.0, 1.0, 2.0, 2.0])
    error, documents = paired(HeldOut(before, counts), HeldOut(after, counts), np.array([7, 7, 9, 9]))
    assert documents == 2 and error == pytest.approx(np.sqrt(2 * 2 * 1.0**2) / 20)
    assert paired(HeldOut(before, counts), HeldOut(after, counts), np.array([3, 3, 3, 3])) == (None, 1)


@pytest.mark.parametrize(("gained", "error", "documents", "said"), [
    (0.30, 0.01, 40, "±0.0202 at 95 % over 40 held-out documents"),
    (0.01, 0.01, 40, "no more than noise; a higher rate may help (--lr 0.001, this was 0.0003), or more epochs"),
    (-0.01, 0.01, 40, "no more than noise; a higher rate may help (--lr 0.001"),
    (-0.30, 0.01, 40, "worse by more than noise; a lower rate may help (--lr 0.0001), or fewer steps"),
    (0.30, 0.10, 3, "with so few documents only a large gain shows (--valid_fraction)"),
    (0.30, None, 1, "1 held-out document: too few to tell whether this is more than noise (--valid_fraction)"),
])
def test_what_is_said(gained: float, error: float | None, documents: int, said: str) -> None:
    told = report(gained, error, documents)
    assert said in told.verdict and f"gained: {told.verdict}" in told.table() and "lr 0.0003" in told.table()
    assert ("noise" in told.verdict) == (said[0] != "±")


def test_a_report_of_an_old_run_says_nothing_of_noise() -> None:
    assert report(0.3, None, 2).verdict == ""


def test_the_next_rate() -> None:
    assert [higher(lr) for lr in (1e-6, 1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 1e-3)] == [
        1e-5, 1e-4, 3e-4, 3e-4, 1e-3, 1e-3, 3e-3]
    assert [lower(lr) for lr in (1e-5, 1e-4, 2e-4, 3e-4, 1e-3)] == [3e-6, 3e-5, 3e-5, 1e-4, 3e-4]
    assert student(1) == 12.71 and student(11) == pytest.approx(2.201, rel=0.02) and student(500) < 1.97


def test_former_names_of_a_report_still_work() -> None:
    with pytest.warns(DeprecationWarning, match="learnt_tokens is called loss_tokens now"):
        assert report(0.1, 0.01, 8).learnt_tokens == 1
