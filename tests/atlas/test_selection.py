"""ESFT's selection: the authors' published configurations from their published logs, and the rule by itself."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek import select_experts
from deepseek.errors import ConfigError, DataError, NotFoundError
from tests.helpers import PUBLISHED
from tests.helpers.routing_logs import gate_scores, read_routing_log, token_scores

RESULTS = PUBLISHED / "esft" / "results"


@pytest.mark.parametrize("task", ["intent", "law"])
def test_the_published_configurations_follow_from_the_published_logs(task: str) -> None:
    if not RESULTS.is_dir():
        pytest.skip(f"the published logs are not at {RESULTS}")
    published = json.loads((RESULTS / "expert_configs" / f"{task}.json").read_text())["experts"]
    summary = json.loads((RESULTS / "expert_scores" / task / "summary.json").read_text())
    scores = {}
    for layer in range(1, 27):
        index_TK, weight_TK = read_routing_log(RESULTS / "expert_scores" / task / f"expert_weights_{layer}.txt.gz", 6)
        scores[layer] = token_scores(index_TK, 64)
        for kind, found in (("token", scores[layer]), ("gate", gate_scores(index_TK, weight_TK, 64))):
            theirs = summary[f"{kind}_scores"][str(layer)]
            theirs = list(theirs.values()) if isinstance(theirs, dict) else theirs
            assert found.tolist() == pytest.approx(theirs, abs=5.1e-5)
    assert select_experts(scores, 0.2) == {int(layer): experts for layer, experts in published.items()}
    assert list(published["1"]) != sorted(published["1"])  # the order says something


def test_descending_scores_until_the_threshold() -> None:
    scores = [0.1, 0.4, 0.2, 0.3]
    assert select_experts({3: scores}, 0.4) == {3: [1]}
    assert select_experts({3: scores}, 0.4001) == {3: [1, 3]}
    assert select_experts({3: scores, 1: [0.0, 1.0]}, 1) == {3: [1, 3, 2, 0], 1: [1]}


def test_equal_scores_go_to_the_lower_index() -> None:
    assert select_experts({0: [0.25] * 4}, 0.5) == {0: [0, 1]}
    assert select_experts({0: [0.30004, 0.2, 0.30001, 0.2]}, 0.3) == {0: [0]}  # equal once rounded
    assert select_experts({0: [0.30001, 0.2, 0.30004, 0.2]}, 0.3) == {0: [0]}


def test_sums_that_floating_point_would_miss() -> None:
    assert 0.1 + 0.2 - 0.3 != 0 and sum([0.1] * 8) < 0.8
    assert select_experts({0: [0.1] * 10}, 0.8) == {0: list(range(8))}
    assert select_experts({0: [0.0007] * 1000}, 0.07) == {0: list(range(100))}  # 0.07 * 10000 > 700 in binary


def test_scores_that_never_reach_the_threshold_give_all_experts() -> None:
    assert select_experts({0: [0.01, 0.0, 0.02]}, 0.5) == {0: [2, 0, 1]}


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_any_sequence_of_numbers(kind: Callable[[list[float]], Any]) -> None:
    assert select_experts({2: kind([0.125, 0.5, 0.375])}, 0.6) == {2: [1, 2]}


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, math.nan, True])
def test_a_threshold_outside_zero_to_one_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold = .*: must lie above 0 and be at most 1"):
        select_experts({0: [1.0]}, threshold)


@pytest.mark.parametrize("scores", [[], [0.5, math.nan], [0.5, -0.1], [math.inf]])
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    with pytest.raises(DataError, match="layer 7 has"):
        select_experts({7: scores}, 0.2)


@given(counts=st.lists(st.integers(0, 10_000), min_size=1, max_size=80), threshold=st.integers(1, 10_000))
def test_the_selection_is_the_shortest_run_from_the_top(counts: list[int], threshold: int) -> None:
    """Against the definition in whole numbers; a score of n ten-thousandths is n / 10000 in binary."""
    [chosen] = select_experts({0: [n / 10_000 for n in counts]}, threshold / 10_000).values()
    total = sum(counts[i] for i in chosen)
    assert len(set(chosen)) == len(chosen)
    assert [(-counts[i], i) for i in chosen] == sorted((-n, i) for i, n in enumerate(counts))[: len(chosen)]
    assert total - counts[chosen[-1]] < threshold
    assert total >= threshold or len(chosen) == len(counts)


@given(scores=st.lists(st.floats(0, 1), min_size=2, max_size=40), low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_a_higher_threshold_only_adds(scores: list[float], low: float, high: float) -> None:
    few, many = (select_experts({0: scores}, threshold)[0] for threshold in sorted((low, high)))
    assert many[: len(few)] == few


def test_scores_by_hand() -> None:
    index_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    weight_TK = torch.tensor([[0.5, 0.25], [0.75, 0.25], [0.5, 0.125]])
    assert token_scores(index_TK, 4).tolist() == pytest.approx([2 / 6, 1 / 6, 3 / 6, 0])
    assert gate_scores(index_TK, weight_TK, 4).tolist() == pytest.approx([0.625 / 3, 0.25 / 3, 1.5 / 3, 0])


def test_a_routing_log_plain_and_compressed(tmp_path: Path) -> None:
    text = "0\t3\t2\t1\t\t0.5\t0.25\t0.5\t0.125\n3\t1\t\t0.75\t0.25\n"
    (tmp_path / "log.txt").write_text(text)
    with gzip.open(tmp_path / "log.txt.gz", "wt") as file:
        file.write(text)
    for name in ("log.txt", "log.txt.gz"):
        index_TK, weight_TK = read_routing_log(tmp_path / name, 2)
        assert index_TK.tolist() == [[0, 3], [2, 1], [3, 1]]
        assert weight_TK.tolist() == [[0.5, 0.25], [0.5, 0.125], [0.75, 0.25]]


@pytest.mark.parametrize(("text", "reason"), [
    ("0\t1\t\t0.5\t0.5\n0\tx\t\t1\t1\n", "log.txt:2: not a line"),
    ("0\t1\t2\t\t0.5\t0.5\t0.1\n", "log.txt:1: 3 expert ids and 3 weights"),
    ("0\t1\t\t0.5\n", "log.txt:1: 2 expert ids and 1 weights"),
    ("0\t-1\t\t0.5\t0.5\n", "no id negative"),
    ("0\t1\n", "log.txt:1: not a line"),
    ("", "log.txt: the routing log is empty"),
])
def test_a_damaged_routing_log_is_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_routing_log(tmp_path / "log.txt", 2)


def test_a_routing_log_that_is_absent_or_no_gzip(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_routing_log(tmp_path / "log.txt", 2)
    (tmp_path / "log.txt.gz").write_text("plain")
    with pytest.raises(DataError, match="cannot be read"):
        read_routing_log(tmp_path / "log.txt.gz", 2)
