"""AdamW's second moments on ranks in rounds, as gradients that are summed in every step would have them.

A rank's own second moment v_i is the mean square of its gradient g_i. In step the gradient is sum_i w_i g_i, with w_i a
rank's share of the tokens. Where ranks differ by noise, or a token occurs on one of them alone, its mean square is

    sum_i w_i^2 v_i = v / n      v = sum_i w_i v_i, n = 1 / sum_i w_i^2 (of equal ranks their number)

for shares that are nearly equal. So a rank divides by the root of v / n, and v comes from all: with each merge ranks
send the mean of each row in BF16, and a row moves to their weighted mean, by a factor where it falls, by a number where
it rises. With v_i alone rows of rare tokens would move by 1 / n of a step, others by 1 / sqrt(n).

docs/log.md has what it brings. Nearest in the literature: moments averaged at intervals (DES-LOC, arXiv 2505.22549).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .optimizers import MuonAdamW


class SecondMoments:
    """Of the parameters `shared`, which all ranks train, those that AdamW moves; in the same order on all ranks."""

    def __init__(self, optimizer: MuonAdamW, shared: Collection[Tensor]) -> None:
        self.optimizer = optimizer
        by_adamw = {p for group in optimizer.param_groups if not group["parts"] for p in group["params"]}
        self.parameters = [p for p in shared if p in by_adamw]
        self.sizes = [p.shape[:-1].numel() if p.ndim > 1 else 1 for p in self.parameters]

    @property
    def nbytes(self) -> int:
        """Of what a rank sends."""
        return 2 * sum(self.sizes)

    def divide(self, batches: Sequence[int]) -> None:
        """Steps from now on count as one rank's among several, which take so many batches each."""
        ranks = sum(batches) ** 2 / sum(count * count for count in batches)
        self.optimizer.summed = dict.fromkeys(self.parameters, ranks)

    @torch.no_grad()
    def rows(self) -> Tensor:
        """The mean of each row, bfloat16; 0 where nothing was learnt."""
        parts = []
        for p, size in zip(self.parameters, self.sizes, strict=True):
            v = self.optimizer.second(p)
            parts.append(torch.zeros(size, device=p.device) if v is None else v.view(size, -1).mean(1))
        return torch.cat(parts).bfloat16() if parts else torch.zeros(0, dtype=torch.bfloat16)

    @torch.no_grad()
    def merge(self, sent: Mapping[int, Tensor], tokens: Mapping[int, int], own: Tensor) -> None:
        """Move the rows to the mean of what ranks have sent, weighted by tokens. own: what this one had then."""
        total, own = sum(tokens[rank] for rank in sent), own.float()
        wanted = sum((rows.float() * (tokens[rank] / total) for rank, rows in sent.items()), torch.zeros_like(own))
        factor, more = (wanted / own).clamp(max=1).nan_to_num(1.0), (wanted - own).clamp(min=0)
        for p, by, plus in zip(self.parameters, factor.split(self.sizes), more.split(self.sizes), strict=True):
            if (v := self.optimizer.second(p)) is not None:
                rows = v.view(len(by), -1)
                self.optimizer.set_second(p, (rows * by[:, None] + plus[:, None]).view_as(v))
