"""What an adapter adds to the product of one matrix: two matrices of low rank, one of full rank, or the choice of each
token among several adapters.

Shape letters: T tokens, K columns of a matrix, O its rows, R rank, N adapters, P pairs, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


class AdapterPath(nn.Module):
    """x [T, K] -> what an adapter adds to W x, [T, O] in the dtype of x. exact: a token's bits are the same in any
    company."""

    def __init__(self, exact: bool, out_features: int, **matrices: Tensor) -> None:
        super().__init__()
        self.exact, self.out_features = exact, out_features
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix.detach().float().contiguous(), persistent=False)

    def product(self, x_TK: Tensor, w_OK: Tensor) -> Tensor:
        return (ops.plain_linear if self.exact and x_TK.dtype == torch.float32 else ops.linear)(x_TK, w_OK)

    @cached_property
    def direction(self) -> Tensor:
        """The top right singular vector of the whole matrix, [K]: the unit x for which most is added."""
        with torch.inference_mode(False), torch.no_grad():
            return torch.linalg.svd(self._reduced(), full_matrices=False).Vh[0].contiguous()

    def _reduced(self) -> Tensor:
        """A matrix with the same right singular vectors, as small as there is."""
        raise NotImplementedError


class LowRank(AdapterPath):
    """x -> s B A x. a: A [R, K], b: s B turned round, [R, O], in FP32."""

    a: Tensor
    b: Tensor

    def __init__(self, a_RK: Tensor, b_OR: Tensor, scale: float, exact: bool) -> None:
        super().__init__(exact, len(b_OR), a=a_RK, b=(b_OR.detach().float() * scale).t())
        self.rank = len(a_RK)

    def forward(self, x_TK: Tensor) -> Tensor:
        if x_TK.dtype == torch.float32:
            y_TO = x_TK.new_zeros(len(x_TK), self.out_features)
            ops.add_low_rank(y_TO, x_TK, [self.a], [self.b], torch.ones(len(x_TK), 1))
            return y_TO
        return ops.linear(ops.linear(x_TK, self.a), self.b.t())

    def _reduced(self) -> Tensor:
        return torch.linalg.qr(self.b.t()).R @ self.a

    @classmethod
    def joined(cls, paths: list[tuple[LowRank, float]]) -> LowRank:
        """The weighted sum of several: their ranks stacked."""
        a_RK = torch.cat([path.a for path, _ in paths])
        b_RO = torch.cat([path.b * weight for path, weight in paths])
        return cls(a_RK, b_RO.t(), 1.0, all(path.exact for path, _ in paths))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [R, K] and s B [O, R] in FP32."""
        return self.a, self.b.t()


class FullRank(AdapterPath):
    """x -> (W' - W) x, of a matrix W' that a delta has in place of W. d: W' - W [O, K] in FP32."""

    d: Tensor

    def __init__(self, tuned_OK: Tensor, base_OK: Tensor, exact: bool) -> None:
        super().__init__(exact, len(tuned_OK), d=tuned_OK.float() - base_OK.detach().float())

    def forward(self, x_TK: Tensor) -> Tensor:
        return self.product(x_TK, self.d)

    def _reduced(self) -> Tensor:
        return self.d


class ArrowPath:
    """x -> sum_i w_i path_i(x), the weights each token's own: the softmax of |v_i . x| over the `top` highest, v_i the
    direction in which path_i adds most (arXiv 2405.11157). Of equal ones the first counts."""

    def __init__(self, paths: Sequence[AdapterPath], top: int) -> None:
        self.paths, self.top = paths, top

    def __call__(self, x_TK: Tensor) -> Tensor:
        first = self.paths[0]
        score_TN = first.product(x_TK, torch.stack([path.direction for path in self.paths])).abs()
        score_TN, order_TN = (part[:, : self.top] for part in score_TN.sort(dim=-1, descending=True, stable=True))
        weight_TN = score_TN.float().softmax(-1)
        y_TO = x_TK.new_zeros(len(x_TK), first.out_features)
        for i, path in enumerate(self.paths):
            token_P, place_P = (order_TN == i).nonzero(as_tuple=True)
            y_TO[token_P] += (path(x_TK[token_P]) * weight_TN[token_P, place_P].unsqueeze(1)).to(y_TO.dtype)
        return y_TO


ExpertMatrices = Mapping[int, Mapping[str, AdapterPath]]  # expert -> "gate", "up", "down" -> matrices


class ExpertPaths(nn.Module):
    """The matrices of one adapter on some experts of a layer: gate, up, down of each, of a delta those that it has; in
    the order of `chosen`."""

    place_E: Tensor

    def __init__(self, experts: int, paths: ExpertMatrices, device: torch.device) -> None:
        super().__init__()
        self.chosen = tuple(paths)
        self.parts = nn.ModuleList(nn.ModuleDict(dict(own)) for own in paths.values())
        place_E = torch.full((experts,), -1, device=device)
        place_E[list(self.chosen)] = torch.arange(len(self.chosen), device=device)
        self.register_buffer("place_E", place_E, persistent=False)

    def has(self, expert: int | Tensor) -> Tensor:
        """Whether it has matrices on an expert, of each of some."""
        return self.place_E[expert] >= 0

    def of(self, expert: int) -> Any:
        """The matrices on an expert that it has."""
        return self.parts[int(self.place_E[expert])]


class ArrowExperts:
    """The same of several adapters among which tokens choose, in gate, up and down each."""

    def __init__(self, paths: Sequence[ExpertPaths], top: int) -> None:
        self.paths, self.top = paths, top

    def has(self, expert: int | Tensor) -> Tensor:
        return torch.stack([paths.has(expert) for paths in self.paths]).any(0)

    def of(self, expert: int) -> dict[str, ArrowPath]:
        sides = [paths.of(expert) for paths in self.paths if paths.has(expert)]
        own = {part: [side[part] for side in sides if part in side] for part in ("gate", "up", "down")}
        return {part: ArrowPath(paths, self.top) for part, paths in own.items() if paths}
