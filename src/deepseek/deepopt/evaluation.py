"""The loss on held-out data, by rows, and how well routing follows names there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..atlas import RoutingAccuracy
from ..data.shards import Batch
from ..model import CausalLM, RoutingRecord
from ..ops.loss import IGNORE
from ..progress import ProgressBar
from .ranks import Ranks
from .settings import TrainConfig


class HeldOutBatches(Protocol):
    """Data to evaluate on."""

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]: ...


class HeldOut(NamedTuple):
    """The main loss over held-out data: sum_N of each row (a window or a record), count_N the labels that it has."""

    sum_N: np.ndarray
    count_N: np.ndarray

    @property
    def mean(self) -> float | None:
        """Per label; None where nothing is held out."""
        return float(self.sum_N.sum() / count) if (count := self.count_N.sum()) else None


@torch.no_grad()
def held_out_loss(
    model: CausalLM, data: HeldOutBatches, config: TrainConfig, accuracy: RoutingAccuracy | None = None,
    batches: int | None = None, desc: str | None = None, ranks: Ranks | None = None, together: bool = False,
) -> HeldOut:
    """Over `batches` (eval_batches) held-out batches at most; `accuracy` counts their routes too. desc: shows a bar.
    ranks: divide the batches among them. together: all run equally many, as the model of one needs the others."""
    model.eval()
    ranks = Ranks() if ranks is None else ranks
    every = list(data.valid_batches(config.batch_size, config.seq_len, batches or config.eval_batches))
    found = [every[i] for i in ranks.part(len(every))]
    sums, counts = [np.zeros(0)], [np.zeros(0, np.int64)]
    for batch in ProgressBar(found, desc=desc, unit="batch", leave=False, disable=desc is None):
        batch, routing = batch.to(model.device), RoutingRecord()
        sums.append(model.row_losses(batch.ids_BT, batch.labels_BT, mask_BT=batch.real_BT, routing=routing)
                    .double().cpu().numpy())
        counts.append((batch.labels_BT != IGNORE).sum(1).cpu().numpy())
        if accuracy is not None:
            accuracy.add(routing, batch.expert_BT, batch.ids_BT)
    for batch in every[: -(-len(every) // ranks.size) - len(found)] if together else ():  # counts for nothing
        batch = batch.to(model.device)
        model.row_losses(batch.ids_BT, batch.labels_BT, mask_BT=batch.real_BT)
    parts = ranks.gather((np.concatenate(sums), np.concatenate(counts)))
    if accuracy is not None:
        accuracy.merge(ranks.gather((accuracy.confusion_NG, accuracy.load_LE)))
    return HeldOut(*(np.concatenate(part) for part in zip(*parts, strict=True)))
