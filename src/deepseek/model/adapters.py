"""Several adapters beside one base: each row of a pass goes through its own low-rank adapter, or through none.

    AdaptedLinear    W x, and + s B A x for the rows of an adapter that has A and B here
    AdaptedExperts   the same on gate, up and down of the experts that a row's adapter has. The adapter sits inside
                     their nonlinearity, so such pairs are computed here, all others in the one call

They stand in the places of those they hold as `base` and are for inference alone: no parameters, nothing to train or to
merge (model/adapter.py does that). Whose rows are whose is said around a pass (`rows_of`); without it, and for rows of
none, a module is its base.

Where the native kernels compute in FP32, A and B are panels, whose products give a row the same bits in any company.

Shape letters: T tokens, K experts a token (of a matrix: columns), R rank, O rows of a matrix, N heads, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError
from .gate import Route

Spans = tuple[tuple[str, slice], ...]  # an adapter and rows of it; a name may come several times, rows once
EVERYTHING = slice(None)
_rows: ContextVar[Spans] = ContextVar("rows", default=())


@contextmanager
def rows_of(spans: Spans) -> Iterator[None]:
    """Within, the rows of every adapted module's input are these adapters'."""
    token = _rows.set(spans)
    try:
        yield
    finally:
        _rows.reset(token)


def whole(adapter: str | None) -> Spans:
    """All rows are one adapter's, or the base's."""
    return () if adapter is None else ((adapter, EVERYTHING),)


def side_by_side(parts: Iterable[tuple[str | None, int]]) -> Spans:
    """Spans of rows that stand side by side: (adapter, how many) of each part."""
    spans: list[tuple[str, slice]] = []
    start = 0
    for adapter, count in parts:
        stop = start + count
        if adapter is not None and count:
            if spans and spans[-1][0] == adapter and spans[-1][1].stop == start:
                spans[-1] = adapter, slice(spans[-1][1].start, stop)
            else:
                spans.append((adapter, slice(start, stop)))
        start = stop
    return tuple(spans)


def current() -> Spans:
    return _rows.get()


def of_all_rows() -> str | None:
    """The adapter of every row of this pass, None where it is the base, or differs."""
    spans = _rows.get()
    return spans[0][0] if len(spans) == 1 and spans[0][1] == EVERYTHING else None


class LowRank(nn.Module):
    """x -> s B A x, [T, O] in the dtype of x. a: A [R, K], b: s B [O, R] in FP32."""

    a: Tensor
    b: Tensor

    def __init__(self, a_RK: Tensor, b_OR: Tensor, scale: float, exact: bool) -> None:
        """exact: a token's bits are the same in any company."""
        super().__init__()
        self.out_features, (self.rank, self.in_features) = len(b_OR), a_RK.shape
        self.exact = exact
        self.register_buffer("a", a_RK.detach().float().contiguous(), persistent=False)
        self.register_buffer("b", (b_OR.detach().float() * scale).contiguous(), persistent=False)

    def forward(self, x_TK: Tensor) -> Tensor:
        product = ops.plain_linear if self.exact and x_TK.dtype == torch.float32 else ops.linear
        return product(product(x_TK, self.a), self.b)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [R, K] and s B [O, R] in FP32."""
        return self.a, self.b


class Adapted(nn.Module):
    """Holds `base`, and the LoRA matrices of adapters by name, which may hold any characters."""

    base: Any

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.names: dict[str, int] = {}
        self.paths = nn.ModuleList()
        self.training = False

    def add(self, name: str, path: nn.Module) -> None:
        assert name not in self.names
        self.names[name] = len(self.paths)
        self.paths.append(path)

    def path(self, name: str | None) -> Any:
        """The matrices of an adapter, None where it has none here."""
        return None if name is None or name not in self.names else self.paths[self.names[name]]

    def here(self) -> list[tuple[Any, slice]]:
        """The matrices of this pass, and their rows."""
        return [(self.paths[self.names[name]], rows) for name, rows in _rows.get() if name in self.names]

    def train(self, mode: bool = True) -> Adapted:
        if mode:
            raise ConfigError("adapters that are served beside a base are not trained there: MoEFineTuner trains one")
        return super().train(False)


class AdaptedLinear(Adapted):
    """A linear module, plain or quantized, with LoRA adapters."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """The base's."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y, here = self.base(x), self.here()
        if here:
            x_TK, y_TO = x.flatten(0, -2), y.view(-1, self.out_features)
            for path, rows in here:
                y_TO[rows] += path(x_TK[rows])
        return y


class ExpertPaths(nn.Module):
    """The matrices of one adapter on some experts of a layer: gate, up, down of each, in the order of `chosen`."""

    place_E: Tensor

    def __init__(self, experts: int, paths: Mapping[int, Mapping[str, LowRank]], device: torch.device) -> None:
        super().__init__()
        self.chosen = tuple(paths)
        self.parts = nn.ModuleList(nn.ModuleDict(dict(own)) for own in paths.values())
        place_E = torch.full((experts,), -1, device=device)
        place_E[list(self.chosen)] = torch.arange(len(self.chosen), device=device)
        self.register_buffer("place_E", place_E, persistent=False)


class AdaptedExperts(Adapted):
    """The experts of a layer, plain or quantized, with LoRA adapters."""

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        here = self.here()
        if not here:
            return self.base(x_TH, route)
        index_TK, places = route.index_TK.clone(), []
        for paths, rows in here:
            own_TK = index_TK[rows]
            place_TK = torch.where(own_TK < 0, -1, paths.place_E[own_TK])
            index_TK[rows] = torch.where(place_TK < 0, own_TK, -1)
            places.append(place_TK)
        out_TH = self.base(x_TH, route._replace(index_TK=index_TK))
        for (paths, rows), place_TK in zip(here, places, strict=True):
            x, weight_TK, out = x_TH[rows], route.weight_TK[rows], out_TH[rows]
            for place in torch.unique(place_TK[place_TK >= 0]).tolist():
                token_P, k_P = (place_TK == place).nonzero(as_tuple=True)
                y_PH = self._expert(paths.chosen[place], paths.parts[place], x[token_P])
                out.index_add_(0, token_P, y_PH * weight_TK[token_P, k_P].unsqueeze(1).to(y_PH.dtype))
        return out_TH

    def _expert(self, expert: int, side: Any, x_PH: Tensor) -> Tensor:
        gate, up = self.base.gate_up(expert, x_PH)
        h = ops.swiglu_rows(gate + side["gate"](x_PH), up + side["up"](x_PH))
        return self.base.down(expert, h) + side["down"](h)


def bare(module: Any) -> Any:
    """The module without the adapters beside it."""
    return module.base if isinstance(module, Adapted) else module


def names_on(model: nn.Module) -> dict[str, list[str]]:
    """Adapter -> the modules that it adapts."""
    found: dict[str, list[str]] = {}
    for target, module in model.named_modules():
        for name in module.names if isinstance(module, Adapted) else ():
            found.setdefault(name, []).append(target)
    return found


def path_of(module: Any, adapter: str | None) -> LowRank | None:
    """An adapter's matrices on a linear module, None where it has none."""
    return module.path(adapter) if isinstance(module, AdaptedLinear) else None


def add(model: Any, name: str, linears: Mapping[str, LowRank],
        experts: Mapping[str, Mapping[int, Mapping[str, LowRank]]]) -> None:
    """Add an adapter to the model, in place. linears: module -> matrices; experts: module of a layer's experts ->
    expert -> "gate", "up", "down" -> matrices."""
    for target, path in linears.items():
        _wrapped(model, target, AdaptedLinear).add(name, path)
    for target, own in experts.items():
        _wrapped(model, target, AdaptedExperts).add(name, ExpertPaths(model.config.n_routed_experts, own, model.device))


def _wrapped(model: Any, target: str, kind: type[Adapted]) -> Adapted:
    module = model.get_submodule(target)
    if not isinstance(module, Adapted):
        module = kind(module)
        model.set_submodule(target, module)
    return module
