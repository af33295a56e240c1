"""PowerSGD (arXiv 1905.13727, algorithm 1): of a gradient matrix, a product P Q' of low rank goes over the wire.

    M_i = gradient_i + e_i       on rank i
    P   = basis of sum_i M_i Q   Q: of the step before; at first random, the same on all ranks
    Q_i = M_i' P                 what rank i sends of its matrix
    e_i = M_i - P Q_i'           what it has not sent, for the next step
    P sum_i Q_i'                 what all get in place of the sum of gradients; sum_i Q_i is the next step's Q

So a step has two sums over the ranks, each of one flat tensor. An expert of a stacked tensor [E, N, M] is a matrix of
its own, where one matrix of all experts would spend its rank on those with most tokens.

Ranks get equal bits where their CPUs or GPUs are alike: each finds the basis P by itself. In what ranks have exactly
opposite, the errors grow without being sent: their sum is zero.

Shape letters: E experts (1 of a plain matrix), N rows, M columns, R rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError

RATE = 2  # a matrix that this does not make so many times smaller goes whole


class _Step(NamedTuple):
    """What is under way. matrix: M_i by name; basis and sent, after the first sum: P and Q_i."""

    shapes: dict[str, torch.Size]
    matrix: dict[str, Tensor]
    basis: dict[str, Tensor]
    sent: dict[str, Tensor]
    whole: dict[str, Tensor]


class PowerSGD:
    """The part of one rank: `project`, a sum over ranks, `turn`, another sum, `decode`. Nothing that the next step
    depends on changes before `decode`, so a step whose sums fail can be taken again.

    rank: columns of P and Q. seed: of the first Q. decay: the share of the error that counts in the next step.
    Raises ConfigError where a gradient is not finite.
    """

    def __init__(self, rank: int = 4, *, seed: int = 0, decay: float = 1.0) -> None:
        if rank < 1:
            raise ConfigError(f"rank = {rank}: must be at least 1")
        self.rank, self.seed, self.decay = rank, seed, decay
        self.q: dict[str, Tensor] = {}  # [E, M, R]
        self.error: dict[str, Tensor] = {}  # [E, N, M]
        self._step: _Step | None = None

    def matrices(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """(E, N, M) of a tensor; None where it goes whole."""
        if len(shape) < 2:
            return None
        rows, columns = shape[-2:]
        small = (rows + columns) * self.rank * RATE <= rows * columns
        return (math.prod(shape[:-2]), rows, columns) if small and math.prod(shape) > 0 else None

    def nbytes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Of a tensor in the first sum and in the second."""
        if (found := self.matrices(shape)) is None:
            return 4 * math.prod(shape), 0
        experts, rows, columns = found
        return 4 * experts * rows * self.rank, 4 * experts * columns * self.rank

    @torch.no_grad()
    def project(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients by name -> what is summed first, float32: every M_i Q, and the tensors that go whole."""
        self._step = step = _Step({}, {}, {}, {}, {})
        parts = []
        for name, gradient in gradients.items():
            step.shapes[name] = gradient.shape
            found, values = self.matrices(gradient.shape), gradient.detach().float()
            if found is not None:
                values = values.reshape(found)
                if name in self.error:
                    values = values + self.decay * self.error[name]
            if not bool(torch.isfinite(values).all()):
                raise ConfigError(f"{name}: has values that are not finite, which cannot be sent; a lower lr may help")
            if found is not None:
                # a copy: the caller puts the sum where the gradient is
                step.matrix[name] = values if name in self.error else values.clone()
                values = values @ self._q(name, found).to(values.device)
            parts.append(values.flatten())
        return torch.cat(parts)

    @torch.no_grad()
    def turn(self, total: Tensor) -> Tensor:
        """The first sum -> what is summed next, float32: every Q_i."""
        step = self._taken()
        sizes = [self.nbytes(shape)[0] // 4 for shape in step.shapes.values()]
        for (name, shape), part in zip(step.shapes.items(), total.split(sizes), strict=True):
            if name not in step.matrix:
                step.whole[name] = part.view(shape)
                continue
            matrix_ENM = step.matrix[name]
            step.basis[name] = basis_ENR = torch.linalg.qr(part.view(*matrix_ENM.shape[:2], self.rank)).Q
            step.sent[name] = matrix_ENM.mT @ basis_ENR
        return torch.cat([total[:0], *(sent.flatten() for sent in step.sent.values())])

    @torch.no_grad()
    def decode(self, total: Tensor) -> dict[str, Tensor]:
        """The second sum -> what all get in place of the summed gradients, float32 by name."""
        step, out = self._taken(), {}
        self._step = None
        parts = iter(total.split([sent.numel() for sent in step.sent.values()]) if step.sent else [])
        for name, shape in step.shapes.items():
            if name in step.whole:
                out[name] = step.whole[name]
                continue
            basis_ENR, sent_EMR = step.basis[name], step.sent[name]
            self.error[name] = step.matrix[name] - basis_ENR @ sent_EMR.mT
            sum_EMR = next(parts).view(sent_EMR.shape)
            out[name] = (basis_ENR @ sum_EMR.mT).view(shape)
            # an expert that no token chose sends zeros, from which no further step would find a direction
            there_E1R = sum_EMR.abs().amax(1, keepdim=True) > 0
            self.q[name] = torch.where(there_E1R, sum_EMR, self._q(name, step.matrix[name].shape).to(sum_EMR.device))
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """By `q.NAME`, which is the same on all ranks, and `error.NAME`, which is this rank's."""
        return {**{f"q.{name}": q for name, q in self.q.items()},
                **{f"error.{name}": error for name, error in self.error.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for part, own in (("q.", self.q), ("error.", self.error)):
            own.clear()
            own.update({key.removeprefix(part): value for key, value in state.items() if key.startswith(part)})

    def _taken(self) -> _Step:
        assert self._step is not None, "project comes first"
        return self._step

    def _q(self, name: str, shape: Sequence[int]) -> Tensor:
        """The Q of the step before; the first one depends on seed and name alone."""
        if name in self.q:
            return self.q[name]
        generator = torch.Generator().manual_seed(self.seed << 32 | zlib.crc32(name.encode()))
        return torch.randn(shape[0], shape[2], self.rank, generator=generator)
