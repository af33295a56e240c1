"""Two models on the same questions: each figure of both with its standard error, their difference, and the answers that
differ.

A difference is paired: d_i is what question i adds to it.

    means         sum d_i / n, error sqrt(var(d) / n)
    perplexities  a figure is exp(-r), r = sum of log-probabilities / sum of words w_i; the error of the difference of
                  both r, a ratio d too, is sqrt(n var(d_i - d w_i)) / sum w_i, and goes through exp's derivative

Other figures have no error here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import variance
from typing import Any

NAMES = ("alias", "name", "sample_len", "sample_count")  # entries of the harness' results that are no figures


@dataclass(frozen=True)
class Figure:
    """One metric of a task or group. error: standard error of one model's value, of the paired difference (ours - the
    other's); None where there is none."""

    task: str
    metric: str
    questions: int
    value: float
    value_error: float | None
    other: float
    other_error: float | None
    difference: float
    difference_error: float | None

    @property
    def row(self) -> list[str]:
        return [self.task, self.metric, f"{self.questions:,}", _with_error(self.value, self.value_error),
                _with_error(self.other, self.other_error), _with_error(self.difference, self.difference_error)]


@dataclass(frozen=True)
class Differing:
    """A question that the models answer differently. margins: of multiple choice, by how much the log-probability of a
    model's choice exceeds that of its next best one."""

    task: str
    question: int
    answer: str
    other: str
    target: str
    margin: float | None = None
    other_margin: float | None = None

    def __str__(self) -> str:
        ours, theirs = ("" if margin is None else f" (margin {margin:.2g})"
                        for margin in (self.margin, self.other_margin))
        return (f"{self.task} {self.question}: {self.answer!r:.60}{ours}, the other {self.other!r:.60}{theirs}; "
                f"right: {self.target!r:.60}")


@dataclass(frozen=True)
class Comparison:
    """answers: how many questions with an answer there are, of which `differing` differ."""

    figures: tuple[Figure, ...]
    differing: tuple[Differing, ...]
    answers: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = ["task", "metric", "questions", "model", "other", "difference"]
        rows = [head, *(figure.row for figure in self.figures)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
                 for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        lines += ["", f"{len(self.differing):,} of {self.answers:,} answers differ", *map(str, self.differing)]
        return "\n".join(lines)


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Comparison:
    """Of two results of the harness on the same tasks, with their samples."""
    figures = [figure for task in ours["results"] for figure in _figures(ours, theirs, task)]
    differing, answers = [], 0
    for task, samples in ours["samples"].items():
        others = {(one["doc_id"], one["filter"]): one for one in theirs["samples"][task]}
        first = samples[0]["filter"] if samples else None
        for sample in (one for one in samples if one["filter"] == first):
            mine, other = _answer(sample), _answer(others[sample["doc_id"], first])
            if mine is None or other is None:
                continue
            answers += 1
            if mine[0] != other[0]:
                ours_said, theirs_said, right = (_said(sample, one) for one in (mine[0], other[0], sample["target"]))
                differing.append(Differing(task, sample["doc_id"], ours_said, theirs_said, right, mine[1], other[1]))
    return Comparison(tuple(figures), tuple(differing), answers)


def _answer(sample: Mapping[str, Any]) -> tuple[str | int, float | None] | None:
    """(text, or number of the choice; margin) of a question's answer; None where nothing is answered."""
    given = sample["filtered_resps"]
    if all(isinstance(one, str) for one in given):
        return given[0], None
    if len(given) < 2 or not all(isinstance(one, Sequence) and len(one) == 2 for one in given):
        return None
    values = [float(one[0]) for one in given]
    best = max(range(len(values)), key=values.__getitem__)
    second = max(value for i, value in enumerate(values) if i != best)
    return best, values[best] - second


def _said(sample: Mapping[str, Any], answer: Any) -> str:
    """An answer, or the right one, as text: of a choice what follows the question, or, where the same follows several
    of them, the end of the question."""
    choices = sample["arguments"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return str(answer)
    several = len({one[1] for one in choices}) > 1
    return str(choices[answer][1]).strip() if several else f"…{str(choices[answer][0])[-40:]}"


def _figures(ours: Mapping[str, Any], theirs: Mapping[str, Any], task: str) -> Iterator[Figure]:
    mine, other = ours["results"][task], theirs["results"][task]
    for key, value in mine.items():
        metric, _, chosen = key.partition(",")
        if key in NAMES or metric.endswith("_stderr") or metric == "bypass" or not isinstance(value, int | float):
            continue
        pairs = [(a[metric], b[metric]) for leaf in _leaves(ours, task)
                 for a, b in zip(*(_samples(one, leaf, chosen) for one in (ours, theirs)), strict=True) if metric in a]
        yield Figure(
            mine.get("alias", task).strip(" -") if task not in ours["samples"] else task,
            metric if chosen == "none" else f"{metric} ({chosen})", len(pairs), float(value),
            _number(mine.get(f"{metric}_stderr,{chosen}")), float(other[key]),
            _number(other.get(f"{metric}_stderr,{chosen}")), float(value - other[key]),
            _paired_error(metric, pairs, float(value), float(other[key])))


def _samples(results: Mapping[str, Any], task: str, chosen: str) -> list[Mapping[str, Any]]:
    return sorted((one for one in results["samples"][task] if one["filter"] == chosen), key=lambda one: one["doc_id"])


def _leaves(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks that a group is made of; of a task itself."""
    if task in results["samples"]:
        return [task]
    return [leaf for child in results["group_subtasks"].get(task, ()) for leaf in _leaves(results, child)]


def _paired_error(metric: str, pairs: Sequence[tuple[Any, Any]], value: float, other: float) -> float | None:
    if len(pairs) < 2:
        return None
    if all(isinstance(one, int | float) for pair in pairs for one in pair):
        for figure, values in ((value, [a for a, _ in pairs]), (other, [b for _, b in pairs])):
            if not math.isclose(figure, sum(values) / len(values), rel_tol=1e-6, abs_tol=1e-9):
                return None  # not their mean: a median, a perplexity, a mean over tasks of other sizes
        return math.sqrt(variance(float(a) - float(b) for a, b in pairs) / len(pairs))
    if not all(isinstance(one, Sequence) and len(one) == 2 for pair in pairs for one in pair) or not (
            metric.endswith("perplexity") or metric == "bits_per_byte"):
        return None
    lost = [float(b[0]) - float(a[0]) for a, b in pairs]
    weights = [float(a[1]) for a, _ in pairs]
    ratio = sum(lost) / sum(weights)
    error = math.sqrt(len(pairs) * variance(
        one - ratio * weight for one, weight in zip(lost, weights, strict=True))) / sum(weights)
    return error / math.log(2) if metric == "bits_per_byte" else error * math.sqrt(value * other)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5g}" if error is None else f"{value:.5g} ± {error:.2g}"
