"""Figures of two models, their paired differences, and the answers that differ."""

from __future__ import annotations

import math
from statistics import stdev
from typing import Any

import pytest

from deepseek.evaluate.comparison import compare


def choice(question: int, values: list[float], right: int) -> dict[str, Any]:
    return {"doc_id": question, "filter": "none", "target": right, "acc": float(values.index(max(values)) == right),
            "arguments": [("Which?", f" {letter}") for letter in "ABC"],
            "filtered_resps": [(one, False) for one in values]}


def page(question: int, logprob: float, words: int) -> dict[str, Any]:
    return {"doc_id": question, "filter": "none", "target": "", "arguments": [("text",)], "filtered_resps": [logprob],
            "word_perplexity": (logprob, words), "bits_per_byte": (logprob, words * 5)}


def text(question: int, answer: str) -> dict[str, Any]:
    return {"doc_id": question, "filter": "strict", "target": "5", "arguments": [("2 + 3", {})],
            "filtered_resps": [answer], "exact_match": float(answer == "5")}


def results(choices: list[dict[str, Any]], pages: list[dict[str, Any]], texts: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy = sum(one["acc"] for one in choices) / len(choices)
    mean = sum(one["word_perplexity"][0] for one in pages) / sum(one["word_perplexity"][1] for one in pages)
    return {"samples": {"one": choices[:2], "two": choices[2:], "wiki": pages, "sums": texts},
            "group_subtasks": {"all": ["part"], "part": ["one", "two"]},
            "results": {
                "all": {"alias": "all", "acc,none": accuracy, "acc_stderr,none": 0.25, "sample_len": 4},
                "wiki": {"word_perplexity,none": math.exp(-mean), "word_perplexity_stderr,none": "N/A",
                         "bits_per_byte,none": -mean / 5 / math.log(2)},
                "sums": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5, "bypass,strict": 999}}}


@pytest.fixture
def both() -> tuple[dict[str, Any], dict[str, Any]]:
    ours = results(
        [choice(0, [-1, -2, -3], 0), choice(1, [-2.5, -2, -3], 1), choice(0, [-1, -2, -3], 2),
         choice(1, [-4, -5, -3], 2)],
        [page(0, -30, 10), page(1, -80, 20), page(2, -50, 15)], [text(0, "5"), text(1, "6")])
    theirs = results(
        [choice(0, [-1, -2, -3], 0), choice(1, [-2, -2.25, -3], 1), choice(0, [-1, -2, -3], 2),
         choice(1, [-4, -5, -3], 2)],
        [page(2, -51, 15), page(0, -31, 10), page(1, -79, 20)], [text(1, "6"), text(0, "5")])
    return ours, theirs


def test_figures_and_paired_errors(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    figures = {(one.task, one.metric): one for one in compare(*both).figures}
    accuracy = figures["all", "acc"]
    assert (accuracy.value, accuracy.other, accuracy.difference, accuracy.questions) == (0.75, 0.5, 0.25, 4)
    assert accuracy.value_error == 0.25 and accuracy.difference_error == pytest.approx(stdev([0, 1, 0, 0]) / 2)
    words = figures["wiki", "word_perplexity"]
    assert words.value_error is None and words.difference == pytest.approx(math.exp(160 / 45) - math.exp(161 / 45))
    rest = [-1 + 10 / 45, 1 + 20 / 45, -1 + 15 / 45]
    assert words.difference_error == pytest.approx(
        math.sqrt(3) * stdev(rest) / 45 * math.sqrt(words.value * words.other), rel=1e-9)
    bits = figures["wiki", "bits_per_byte"]
    assert bits.difference_error == pytest.approx(math.sqrt(3) * stdev(rest) / 225 / math.log(2))
    assert ("sums", "bypass (strict)") not in figures and figures["sums", "exact_match (strict)"].difference == 0


def test_answers_that_differ_are_listed_with_their_margins(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found = compare(*both)
    (one,) = found.differing
    assert (one.task, one.question, one.answer, one.other, one.target) == ("one", 1, "B", "A", "B")
    assert (one.margin, one.other_margin) == (0.5, 0.25) and found.answers == 6
    said = str(found)
    assert "1 of 6 answers differ" in said
    assert "one 1: 'B' (margin 0.5), the other 'A' (margin 0.25); right: 'B'" in said
    assert "| 0.75 ± 0.25" in said
    assert found.to_dict()["differing"][0]["margin"] == 0.5
    assert not compare(both[0], both[0]).differing


def test_choices_are_told_apart_by_their_number(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Where the choice stands in the question, as in WinoGrande, the same text follows all of them."""
    ours, theirs = both
    for one, values in ((ours, [-1, -2, -3]), (theirs, [-2, -1, -3])):
        sample = one["samples"]["one"][0]
        sample |= {"arguments": [(f"It is {letter}", " again.") for letter in "ABC"],
                   "filtered_resps": [(value, False) for value in values]}
    first = next(one for one in compare(ours, theirs).differing if (one.task, one.question) == ("one", 0))
    assert (first.answer, first.other, first.target) == ("…It is A", "…It is B", "…It is A")


def test_what_is_no_mean_of_its_questions_has_no_error(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for one in both:
        one["results"]["all"]["acc,none"] += 0.1  # as a mean over tasks of other sizes
        for sample in one["samples"]["wiki"]:
            sample["perplexity"] = sample["word_perplexity"][0]
        one["results"]["wiki"]["perplexity,none"] = 150.0  # exp of their negated mean, say
    errors = {(one.task, one.metric): one.difference_error for one in compare(*both).figures}
    assert errors["all", "acc"] is None and errors["wiki", "perplexity"] is None
    assert errors["sums", "exact_match (strict)"] is not None and errors["wiki", "word_perplexity"] is not None
