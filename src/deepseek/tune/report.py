"""What a run of tuning did: gained, forgotten, and the proof that nothing else moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TuneReport:
    """What a run did. Losses are nats per token; *_bytes are bytes; frozen_unchanged counts tensors of the base;
    seconds are those of all processes that worked on the run, of a killed one up to its last checkpoint."""

    mode: str
    steps: int
    examples: int
    learnt_tokens: int
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

    @property
    def gained(self) -> float:
        """Fall of the loss on held-out records; above 0 is better."""
        return self.domain_before - self.domain_after

    @property
    def forgotten(self) -> float:
        """Rise of the loss on general text; above 0 is worse."""
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
        """The forgetting report, for people."""
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
            f"{self.mode}: {self.trained_parameters:,} of {self.all_parameters:,} parameters trained ({share:.2%}), "
            f"{self.optimizer_bytes / 1e6:.1f} MB of optimiser state",
            f"{self.frozen_tensors:,} frozen tensors: {proof}; {self.changed_tensors:,} tensors changed",
            f"{self.examples:,} examples with {self.learnt_tokens:,} tokens to learn, {self.steps:,} steps, "
            f"{self.seconds:.0f} s",
            *([f"{len(self.rounds)} rounds: backward transfer {self.backward_transfer:+.4f}, forgetting "
               f"{self.forgetting:.4f} nats a token"] if len(self.rounds) > 1 else []),
            f"result: {self.result} ({self.result_bytes / 1e6:.1f} MB)"])


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50))
