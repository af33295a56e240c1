"""Records by name -> batches for growing experts.

Training rows are full: the examples of a name, shuffled anew every epoch, stand one behind the other and are cut into
rows of seq_len tokens. Rows come from the names in turn, and every so often from text of no name (`others`), of which
nothing counts in the loss: it only says where groups are to stay out. Held-out records stand alone, padded.

Batches are a pure function of (seed, step), so that a killed run resumes with the batch that was next.

Shape letters: B rows, T tokens, N records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..data.shards import Batch
from ..errors import DataError
from ..ops.loss import IGNORE
from ..tune.examples import Examples
from ..tune.records import RecordSet


class Packed:
    """The training examples of one set as rows."""

    def __init__(self, examples: Examples, key: str) -> None:
        self.examples, self.key = examples, key
        self.tokens = int(examples.lengths().sum())
        self._epoch = lru_cache(maxsize=1)(self._draw)

    def rows(self, seq_len: int) -> int:
        """Rows of an epoch."""
        return (self.tokens - 1) // seq_len

    def row(self, number: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
        """(ids, labels), [T] each, of the row of that number, counted through the epochs."""
        epoch, row = divmod(number, self.rows(seq_len))
        ids, learnt = self._epoch(seed, epoch)
        part = slice(row * seq_len, row * seq_len + seq_len + 1)
        ids_T, learnt_T = torch.from_numpy(ids[part]), torch.from_numpy(learnt[part])
        return ids_T[:-1], torch.where(learnt_T, ids_T, IGNORE)[1:]

    def _draw(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether they count in the loss) of all examples, in the order of an epoch."""
        key = hashlib.blake2b(f"{self.key}/{seed}/{epoch}".encode(), digest_size=8).digest()
        order = np.random.default_rng(int.from_bytes(key, "little")).permutation(len(self.examples))
        ids, learnt = np.empty(self.tokens, np.int64), np.zeros(self.tokens, bool)
        at = 0
        for n in order.tolist():
            example = self.examples[n]
            ids[at : at + len(example.ids)] = example.ids
            for start, end in example.loss_spans:
                learnt[at + start : at + end] = True
            at += len(example.ids)
        return ids, learnt


class NamedText:
    """Records of several names, and others of none, as the training loop wants them."""

    def __init__(self, names: Mapping[str, RecordSet], others: RecordSet | None, seq_len: int) -> None:
        """Raises DataError for a set with less text than one row."""
        self.names, self.others, self.experts = dict(names), others, tuple(names)
        sets = [*names.items(), *([("others", others)] if others else [])]
        self._packed = [Packed(data.train, name) for name, data in sets]
        for packed in self._packed:
            if not packed.rows(seq_len):
                raise DataError(f"{packed.key}: {packed.tokens:,} tokens to train on: fewer than one row of {seq_len}")
        # of three rows one at least is of no name: a group that sees nothing else opens to everything
        count = len(names)
        self._turns = [*range(count)] * (2 if count == 1 and others else 1) + ([count] if others else [])

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, data in (*self.names.items(), *([("", self.others)] if self.others else [])):
            digest.update(f"{name} {data.fingerprint} ".encode())
        return digest.hexdigest()

    def tokens(self, steps: int, rows: int, seq_len: int) -> dict[str, int]:
        """Name -> tokens of its text that so many steps show; others under the name ''."""
        turns = [self._turns[i % len(self._turns)] for i in range(steps * rows)]
        names = [*self.experts, *([""] if self.others else [])]
        return {name: turns.count(place) * seq_len for place, name in enumerate(names)}

    def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int) -> Batch:
        ids, labels, places = [], [], []
        turns = self._turns
        for i in range(step * batch_size, (step + 1) * batch_size):
            place = turns[i % len(turns)]
            number = i // len(turns) * turns.count(place) + turns[: i % len(turns)].count(place)
            row_T, labels_T = self._packed[place].row(number, seq_len, seed)
            named = place < len(self.experts)
            ids.append(row_T)
            labels.append(labels_T if named else torch.full_like(labels_T, IGNORE))
            places.append(place)  # that behind the last name: of none of them
        expert_BT = torch.tensor(places).unsqueeze(1).expand(-1, seq_len)
        return Batch(torch.stack(ids), torch.stack(labels), expert_BT.contiguous())

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        """Of every name `limit` batches of held-out records at most."""
        for place in range(len(self.experts)):
            yield from self.valid_of(place, batch_size, limit)

    def valid_of(self, place: int, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        for batch in self.names[self.experts[place]].valid_batches(batch_size, 0, limit):
            expert_BT = torch.full_like(batch.ids_BT, place)
            if batch.real_BT is not None:
                expert_BT[~batch.real_BT] = -1
            yield batch._replace(expert_BT=expert_BT)
