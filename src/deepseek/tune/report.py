"""The report of a tuning run: what was gained and forgotten, and the proof that nothing else changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..deepopt.evaluation import HeldOut
from ..deprecation import warn


@dataclass(frozen=True)
class TuneReport:
    """Figures of a run. Losses are nats per token; *_bytes are bytes; frozen_unchanged counts tensors of the base;
    seconds sum over all processes of the run, each up to its last checkpoint where it was killed."""

    mode: str
    steps: int
    examples: int
    loss_tokens: int
    domain_before: float
    domain_after: float
    general_before: float
    general_after: float
    general_text: str
    trained_parameters: int
    all_parameters: int
    optimizer_bytes: int
    frozen_tensors: int
    frozen_unchanged: int
    changed_tensors: int
    experts: Mapping[str, Sequence[int]]
    seconds: float
    result: str
    result_bytes: int
    rounds: Sequence[Sequence[float]] = ()  # of a stream: [t][i], loss on round i's held-out records after round t
    notes: Sequence[str] = ()  # about the records: keys that were not used, some that were left out
    lr: float = 0.0  # the highest learning rate
    standard_error: float | None = None  # of `gained`, paired over held-out documents; None for one document
    held_out: int = 0  # documents that it rests on

    @property
    def learnt_tokens(self) -> int:
        """Deprecated name of `loss_tokens`."""
        warn("TuneReport.learnt_tokens is called loss_tokens now")
        return self.loss_tokens

    @property
    def gained(self) -> float:
        """Decrease of the loss on held-out records; above 0 is better."""
        return self.domain_before - self.domain_after

    @property
    def verdict(self) -> str:
        """Say whether the gain exceeds noise, and what may help where it does not. Noise: the 95 % interval of
        Student's t."""
        if self.standard_error is None:
            return (f"{self.held_out} held-out document{'' if self.held_out == 1 else 's'}: too few to tell whether "
                    "this is more than noise (--valid_fraction)" if self.held_out < 2 else "")
        width = student(self.held_out - 1) * self.standard_error
        over = f"±{width:.4f} at 95 % over {self.held_out:,} held-out documents"
        if self.gained > width:
            return over
        if self.gained < -width:
            return f"{over}: worse by more than noise; a lower rate may help (--lr {lower(self.lr):g}), or fewer steps"
        few = "; with so few documents only a large gain shows (--valid_fraction)" if self.held_out < 8 else ""
        return (f"{over}: no more than noise; a higher rate may help (--lr {higher(self.lr):g}, this was {self.lr:g}), "
                f"or more epochs{few}")

    @property
    def forgotten(self) -> float:
        """Increase of the loss on general text; above 0 is worse."""
        return self.general_after - self.general_before

    @property
    def backward_transfer(self) -> float | None:
        """Mean over earlier rounds of their change in log-likelihood since their turn: below 0 is forgetting."""
        if len(self.rounds) < 2:
            return None
        last = self.rounds[-1]
        return sum(self.rounds[i][i] - last[i] for i in range(len(last) - 1)) / (len(last) - 1)

    @property
    def forgetting(self) -> float | None:
        """Mean over earlier rounds of their best log-likelihood less the last one; at least 0 up to its sign."""
        if len(self.rounds) < 2:
            return None
        last = self.rounds[-1]
        best = [min(row[i] for row in self.rounds[i:]) for i in range(len(last) - 1)]
        return sum(end - least for end, least in zip(last, best, strict=False)) / len(best)

    def table(self) -> str:
        """Format the report as text."""
        def row(name: str, before: float, after: float) -> str:
            return (f"{name:16} {before:8.4f} {after:8.4f}  {after - before:+8.4f}   "
                    f"{_perplexity(before):10.2f} {_perplexity(after):10.2f}")

        share = self.trained_parameters / self.all_parameters
        proof = ("all unchanged, by SHA-256" if self.frozen_unchanged == self.frozen_tensors
                 else f"{self.frozen_tensors - self.frozen_unchanged} CHANGED")
        return "\n".join([
            f"{'':16} {'before':>8} {'after':>8}  {'change':>8}   {'perplexity':>10} {'after':>10}",
            row("held-out records", self.domain_before, self.domain_after),
            row("general text", self.general_before, self.general_after) + f"   ({self.general_text})",
            f"gained {self.gained:+.4f}, forgotten {self.forgotten:+.4f} nats a token",
            *([f"gained: {self.verdict}"] if self.verdict else []),
            f"{self.mode}: {self.trained_parameters:,} of {self.all_parameters:,} parameters trained ({share:.2%}), "
            f"{self.optimizer_bytes / 1e6:.1f} MB of optimizer state, lr {self.lr:g}",
            f"{self.frozen_tensors:,} frozen tensors: {proof}; {self.changed_tensors:,} tensors changed",
            f"{self.examples:,} examples with {self.loss_tokens:,} tokens to learn, {self.steps:,} steps, "
            f"{self.seconds:.0f} s",
            *([f"{len(self.rounds)} rounds: backward transfer {self.backward_transfer:+.4f}, forgetting "
               f"{self.forgetting:.4f} nats a token"] if len(self.rounds) > 1 else []),
            f"result: {self.result} ({self.result_bytes / 1e6:.1f} MB)"])


def paired(before: HeldOut, after: HeldOut, document_N: np.ndarray) -> tuple[float | None, int]:
    """(standard error of the fall of the mean loss, documents), from the losses of the same rows before and after.

    document_N: of each row; rows of one document are not independent. The fall is a ratio of sums over documents, the
    error that of a ratio estimator. None for a single document.
    """
    _, document_N = np.unique(document_N, return_inverse=True)
    fall_D, count_D = (np.bincount(document_N, weights=rows_N)
                       for rows_N in (before.sum_N - after.sum_N, before.count_N.astype(float)))
    documents, labels = len(count_D), count_D.sum()
    if documents < 2 or not labels:
        return None, documents
    rest_D = fall_D - fall_D.sum() / labels * count_D
    return float(math.sqrt(documents / (documents - 1) * (rest_D**2).sum()) / labels), documents


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 2 %."""
    exact = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    return exact[freedom - 1] if freedom <= len(exact) else 1.96 + 2.37 / freedom


def higher(lr: float) -> float:
    """A rate to try next where this one did too little: of 1, 3, 10, 30 …, three times as high at least; ten times, of
    a rate that moves little."""
    return _step(math.ceil, lr * (10 if lr < 5e-5 else 3) * 0.999)


def lower(lr: float) -> float:
    """A rate to try next where this one did harm: of 1, 3, 10, 30 …, a third of it at most."""
    return _step(math.floor, lr / 3 * 1.001)


def _step(round_off: Callable[[float], int], lr: float) -> float:
    """The rate on the ladder 1, 3, 10 … next to `lr`."""
    half = round_off(2 * math.log10(lr))
    return float(f"{3 if half % 2 else 1}e{half // 2}")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50))
