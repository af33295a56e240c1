"""How ranks in step sum their gradients.

    none    one fused all-reduce of float32, in buckets
    bf16    a rank sums one part of the gradient for all: each sends it that part in BF16 (all-to-all), it adds in
    int8    float32 and sends the sum back, encoded again (all-gather). int8 has error feedback: what rounding took from
            a value is added to the next step's, at the sender of either message
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomically
from .compress import CODECS, Codec
from .ranks import Ranks, even
from .settings import TrainConfig

STATES = "rank-{:04d}"
KEEP = 3  # states of checkpoints: more of these than of checkpoints, so that one that is there has its states


class GradientSum(Protocol):
    """Sums gradients over ranks, and keeps what it needs for the next time."""

    def sum_(self, gradients: Mapping[str, Tensor], extra: Tensor) -> None:
        """Replace each gradient, and `extra`, which is never compressed, by the sum over all ranks."""

    def save(self, out: Path, step: int) -> None:
        """Write this rank's state."""

    def load(self, out: Path, step: int) -> None:
        """Restore it."""


class PlainSum:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def sum_(self, gradients: Mapping[str, Tensor], extra: Tensor) -> None:
        self.ranks.sum_([*gradients.values(), extra])

    def save(self, out: Path, step: int) -> None: ...

    def load(self, out: Path, step: int) -> None: ...


class CodedSum:
    """feedback: keep what coding loses for the next step."""

    def __init__(self, ranks: Ranks, code: Codec, feedback: bool, device: torch.device) -> None:
        self.ranks, self.code, self.feedback = ranks, code, feedback
        self.error: dict[str, Tensor] = {}
        self.device = device

    @torch.no_grad()
    def sum_(self, gradients: Mapping[str, Tensor], extra: Tensor) -> None:
        self.ranks.sum_([extra])
        flat = torch.cat([gradient.flatten().float() for gradient in gradients.values()])
        sizes = even(len(flat), self.ranks.size)
        own = sizes[self.ranks.rank]
        parts = list(self._corrected("sent", flat).split(sizes))
        payloads = [self.code.encode(part) for part in parts]
        self._lost("sent", flat, torch.cat([self.code.decode(payload, part.shape)
                                            for payload, part in zip(payloads, parts, strict=True)]))
        total = torch.zeros(own, device=flat.device)
        for payload in self.ranks.exchange(payloads):  # in the order of the ranks
            total += self.code.decode(payload, total.shape)
        payload = self.code.encode(self._corrected("returned", total))
        self._lost("returned", total, self.code.decode(payload, total.shape))
        found = self.ranks.all(payload, [self.code.nbytes((size,)) for size in sizes])
        flat = torch.cat([self.code.decode(payload, (size,)) for payload, size in zip(found, sizes, strict=True)])
        for gradient, part in zip(gradients.values(), flat.split([g.numel() for g in gradients.values()]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _corrected(self, key: str, values: Tensor) -> Tensor:
        """`values`, in place, with what was lost before."""
        return values.add_(self.error[key]) if key in self.error else values

    def _lost(self, key: str, wanted: Tensor, sent: Tensor) -> None:
        if self.feedback:
            self.error[key] = wanted - sent

    def save(self, out: Path, step: int) -> None:
        if not self.error:
            return
        folder = out / STATES.format(self.ranks.rank)
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{step:06d}.safetensors", save(
            {key: error.cpu() for key, error in self.error.items()}, {"ranks": str(self.ranks.size)}))
        for old in sorted(folder.glob("*.safetensors"))[:-KEEP]:
            old.unlink()

    def load(self, out: Path, step: int) -> None:
        """A rank that was not there, or another number of ranks, begins without an error to make up for."""
        path = out / STATES.format(self.ranks.rank) / f"{step:06d}.safetensors"
        if not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            if file.metadata()["ranks"] == str(self.ranks.size):
                self.error = {key: file.get_tensor(key).to(self.device) for key in file.keys()}  # noqa: SIM118


def gradient_sum(config: TrainConfig, ranks: Ranks, trained: Mapping[str, Tensor]) -> GradientSum:
    """What `compress` asks for."""
    if ranks.size == 1 or config.compress == "none":
        return PlainSum(ranks)
    device = next(iter(trained.values())).device
    return CodedSum(ranks, CODECS[config.compress], config.compress == "int8", device)
