"""How ranks in step sum their gradients.

    none      one fused all-reduce of float32, in buckets
    bf16      a rank sums one part of the gradient for all: each sends it that part coded (all-to-all), it adds in
    int8      float32 and sends the sum back, coded again (all-gather)
    powersgd  two all-reduces of low-rank factors (powersgd.py)

All but the first have error feedback: what coding took from a value is added to the next step's, at the sender of
either message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .compress import CODECS, Codec, ErrorFeedback
from .powersgd import PowerSGD
from .ranks import Ranks, even
from .settings import TrainConfig


class GradientSum(Protocol):
    """Sums gradients over ranks, and keeps what it needs for the next time."""

    def sum_(self, gradients: Mapping[str, Tensor], extra: Tensor) -> None:
        """Replace each gradient, and `extra`, which is never coded, by the sum over all ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's own state."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore it."""


class PlainSum:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def sum_(self, gradients: Mapping[str, Tensor], extra: Tensor) -> None:
        self.ranks.sum_([*sorted(gradients.values(), key=lambda g: g.dtype == torch.float32), extra])  # fewer buckets

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class CodedSum:
    def __init__(self, ranks: Ranks, code: Codec) -> None:
        self.ranks, self.code, self.feedback = ranks, code, ErrorFeedback(code)
        self.state_dict, self.load_state_dict = self.feedback.state_dict, self.feedback.load_state_dict

    @torch.no_grad()
    def sum_(self, gradients: Mapping[str, Tensor], extra: Tensor) -> None:
        self.ranks.sum_([extra])
        flat = torch.cat([gradient.flatten().float() for gradient in gradients.values()])
        sizes = even(len(flat), self.ranks.size)
        payloads = [self.feedback.encode(f"gradients for rank {rank}", part)
                    for rank, part in enumerate(flat.split(sizes))]
        total = torch.zeros(sizes[self.ranks.rank], device=flat.device)
        for payload in self.ranks.exchange(payloads):  # in the order of the ranks
            total += self.code.decode(payload, total.shape)
        payload = self.feedback.encode("sum of gradients", total)
        found = self.ranks.all(payload, [self.code.nbytes((size,)) for size in sizes])
        flat = torch.cat([self.code.decode(payload, (size,)) for payload, size in zip(found, sizes, strict=True)])
        for gradient, part in zip(gradients.values(), flat.split([g.numel() for g in gradients.values()]), strict=True):
            gradient.copy_(part.view_as(gradient))


class LowRankSum:
    def __init__(self, ranks: Ranks, rank: int, seed: int) -> None:
        self.ranks, self.powersgd = ranks, PowerSGD(rank, seed=seed)
        self.state_dict, self.load_state_dict = self.powersgd.state_dict, self.powersgd.load_state_dict

    @torch.no_grad()
    def sum_(self, gradients: Mapping[str, Tensor], extra: Tensor) -> None:
        self.ranks.sum_([first := self.powersgd.project(gradients), extra])
        self.ranks.sum_([second := self.powersgd.turn(first)])
        for name, found in self.powersgd.decode(second).items():
            gradients[name].copy_(found)


def gradient_sum(config: TrainConfig, ranks: Ranks) -> GradientSum:
    """What `compress` asks for."""
    if ranks.size == 1 or config.compress == "none":
        return PlainSum(ranks)
    if config.compress == "powersgd":
        assert config.powersgd_rank is not None
        return LowRankSum(ranks, config.powersgd_rank, config.seed)
    return CodedSum(ranks, CODECS[config.compress])
