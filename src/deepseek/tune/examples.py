"""Training examples as token ids in a few flat arrays, which hold millions of them, and batches of examples.

Shape letters: B records of a batch, T tokens, N records of a set.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.shards import Batch
from ..ops.loss import IGNORE


class Example(NamedTuple):
    """Token ids of one example, and the [start, end) spans of them that count in the loss."""

    ids: tuple[int, ...]
    loss_spans: tuple[tuple[int, int], ...]


class Examples:
    """A sequence of examples in flat arrays, about four bytes per token: ids, spans, and where those of each end."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._ids, self._ends = array("i"), array("q", [0])
        self._spans, self._span_ends = array("i"), array("q", [0])
        self.extend(examples)

    def extend(self, examples: Iterable[Example]) -> None:
        for example in examples:
            self._ids.extend(example.ids)
            self._ends.append(len(self._ids))
            for span in example.loss_spans:
                self._spans.extend(span)
            self._span_ends.append(len(self._spans))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Example]:
        return (self[n] for n in range(len(self)))

    def __getitem__(self, n: int) -> Example:
        assert 0 <= n < len(self)
        spans = iter(self._spans[self._span_ends[n] : self._span_ends[n + 1]])
        return Example(tuple(self._ids[self._ends[n] : self._ends[n + 1]]), tuple(zip(spans, spans, strict=True)))

    def lengths(self) -> np.ndarray:
        """Token counts of the examples, [N]."""
        return np.diff(np.frombuffer(self._ends, np.int64))

    @property
    def loss_tokens(self) -> int:
        """Count of the tokens that count in the loss."""
        spans = np.frombuffer(self._spans, np.int32).reshape(-1, 2)
        return int((spans[:, 1] - spans[:, 0]).sum(dtype=np.int64))

    def add_to(self, digest: Any) -> None:
        """Update a hash with all ids and spans."""
        for part in (self._ends, self._ids, self._span_ends, self._spans):
            digest.update(f"{len(part)} ".encode())
            digest.update(part)


def pad(examples: Sequence[Example]) -> Batch:
    """Batch examples into right-padded inputs and labels; tokens outside the loss have label -100."""
    longest = max(len(e.ids) for e in examples)
    ids_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    label_BT = torch.full((len(examples), longest), IGNORE)
    real_BT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        ids_BT[row, : len(ids)] = ids
        real_BT[row, : len(ids)] = True
        for start, end in example.loss_spans:
            label_BT[row, start:end] = ids[start:end]
    expert_BT = torch.full((len(examples), longest - 1), -1)
    real = real_BT[:, :-1]
    return Batch(ids_BT[:, :-1], label_BT[:, 1:], expert_BT, None if bool(real.all()) else real)
