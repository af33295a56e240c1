"""Several adapters beside one base: each row of a pass goes through its own adapter, through a mixture of several, or
through none.

    AdaptedLinear    W x + sum_i w_i s_i B_i A_i x, the sum over the adapters of a row that have A and B here
    AdaptedExperts   the same on gate, up and down of the experts that a row's adapters have; of a delta the term is
                     w_i (W_i - W) x. The adapters sit inside their nonlinearity, so such pairs are computed here, all
                     others in the one call

Or each token chooses among several, in each matrix anew (`Arrow`, `ArrowPath`).

A pass adds the terms of all adapters to all of its rows in one call (`ops.add_low_rank`), whatever mixtures these
belong to; a row's terms are summed in the order of the adapters' names. So neither cost nor bits depend on how many
mixtures there are in a batch.

They stand in the places of those they hold as `base` and are for inference alone: no parameters, nothing to train or to
merge (model/adapter.py does that). Whose rows are whose is said around a pass (`rows_of`); without it, and for rows of
none, a module is its base.

Where the native kernels compute in FP32, a row gets the same bits in any company.

Shape letters: T tokens, K experts a token (of a matrix: columns), O rows of a matrix, N adapters, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError
from .adapter_paths import ArrowExperts, ArrowPath, ExpertMatrices, ExpertPaths, LowRank
from .gate import Route


class Mixture(NamedTuple):
    """Adapters that rows go through side by side. parts: (adapter, weight), in the order of the names."""

    parts: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Mixture:
        return cls(tuple(sorted((name, float(weight)) for name, weight in weights.items())))

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in self.parts)


class Arrow(NamedTuple):
    """Adapters of which every token takes, in every matrix, the `top` that answer it most (`ArrowPath`)."""

    names: tuple[str, ...]
    top: int

    def __str__(self) -> str:
        return f"arrow top {self.top} of {', '.join(self.names)}"


Member = str | Arrow  # what has one path through a matrix
Adapter = Member | Mixture
Spans = tuple[tuple[Adapter, slice], ...]  # an adapter and rows of it; it may come several times, a row once
EVERYTHING = slice(None)


class Share(NamedTuple):
    """The rows that an adapter has a part in, in a pass, and its weight: of all of them, or of each, [rows, 1]."""

    rows: slice | Tensor
    weight: float | Tensor

    @classmethod
    def of(cls, weight_T: Tensor) -> Share:
        """Of an adapter that counts so much in each row."""
        rows = weight_T.nonzero().squeeze(1)
        return cls(rows, weight_T[rows].unsqueeze(1))

    def add(self, y: Tensor, term: Tensor) -> None:
        """Add a term of each of the rows, weighted, to theirs of y."""
        if isinstance(self.weight, Tensor):
            weight = self.weight.to(term.device).view(-1, *[1] * (term.dim() - 1))
            term = (term * weight).to(term.dtype)
        elif self.weight != 1:
            term = term * self.weight
        y[self.rows] += term


class Pass:
    """Whose the rows of a pass are."""

    def __init__(self, spans: Spans) -> None:
        self.spans, self.shares = spans, shares(spans)
        self._weights: dict[tuple[tuple[Member, ...], int], Tensor] = {}

    def weights(self, members: Sequence[Member], tokens: int) -> Tensor:
        """What each of these counts in each row, [T, N] float32 on the CPU; 0 where it has no part in a row."""
        key = tuple(members), tokens
        if key not in self._weights:
            weight_TN = self._weights[key] = torch.zeros(tokens, len(members))
            for i, member in enumerate(members):
                rows, weight = self.shares[member]
                weight_TN[rows, i] = weight.squeeze(1) if isinstance(weight, Tensor) else weight
        return self._weights[key]


_pass: ContextVar[Pass | None] = ContextVar("pass", default=None)


def parts_of(adapter: Adapter | None) -> tuple[tuple[Member, float], ...]:
    """(adapter, weight) of each member of a mixture."""
    if adapter is None:
        return ()
    return adapter.parts if isinstance(adapter, Mixture) else ((adapter, 1.0),)


def names_in(adapter: Adapter | None) -> tuple[str, ...]:
    """The adapters that may answer."""
    return adapter.names if isinstance(adapter, Arrow) else tuple(str(member) for member, _ in parts_of(adapter))


def shares(spans: Spans) -> dict[Member, Share]:
    """The rows of each adapter, in the order of the names."""
    found: dict[Member, list[tuple[slice, float]]] = {}
    for adapter, rows in spans:
        for name, weight in parts_of(adapter):
            found.setdefault(name, []).append((rows, weight))
    out: dict[Member, Share] = {}
    for name, own in sorted(found.items(), key=lambda each: str(each[0])):
        if len(own) == 1:
            out[name] = Share(*own[0])
            continue
        index = torch.cat([torch.arange(rows.start, rows.stop) for rows, _ in own])
        weights = [weight for rows, weight in own for _ in range(rows.start, rows.stop)]
        out[name] = Share(index, weights[0] if len({*weights}) == 1 else torch.tensor(weights).unsqueeze(1))
    return out


@contextmanager
def rows_of(spans: Spans) -> Iterator[None]:
    """Within, the rows of every adapted module's input are these adapters'."""
    token = _pass.set(Pass(spans) if spans else None)
    try:
        yield
    finally:
        _pass.reset(token)


def whole(adapter: Adapter | None) -> Spans:
    """All rows are one adapter's, or the base's."""
    return () if adapter is None else ((adapter, EVERYTHING),)


def side_by_side(parts: Iterable[tuple[Adapter | None, int]]) -> Spans:
    """Spans of rows that stand side by side: (adapter, how many) of each part."""
    spans: list[tuple[Adapter, slice]] = []
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


def current() -> Pass | None:
    """Of adapted rows; None where all are the base's."""
    return _pass.get()


def of_all_rows() -> Adapter | None:
    """The adapter of every row of this pass, None where it is the base, or differs."""
    spans = () if (own := current()) is None else own.spans
    return spans[0][0] if len(spans) == 1 and spans[0][1] == EVERYTHING else None


class Adapted(nn.Module):
    """Holds `base`, and the matrices of adapters by name, which may hold any characters."""

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

    def path(self, member: Member) -> Any:
        """The matrices of an adapter, None where it has none here."""
        if isinstance(member, Arrow):
            own = [self.path(name) for name in member.names if name in self.names]
            return self.chosen(own, member.top) if own else None
        return self.paths[self.names[member]] if member in self.names else None

    def chosen(self, paths: list[Any], top: int) -> Any:
        """The path of tokens that choose among several."""
        raise NotImplementedError

    def here(self, own: Pass) -> dict[Member, Any]:
        """The matrices of a pass, in the order of the names."""
        found = ((member, self.path(member)) for member in own.shares)
        return {member: path for member, path in found if path is not None}

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

    def chosen(self, paths: list[Any], top: int) -> Any:
        return ArrowPath(paths, top)

    def forward(self, x: Tensor) -> Tensor:
        y, own = self.base(x), current()
        if own is not None and (here := self.here(own)):
            x_TK, y_TO = x.flatten(0, -2), y.view(-1, self.out_features)
            weight_TN = own.weights(tuple(here), len(x_TK))
            _add_terms([*here.values()], weight_TN, x_TK, y_TO, lambda i: own.shares[[*here][i]])
        return y


class AdaptedExperts(Adapted):
    """The experts of a layer, plain or quantized, with LoRA adapters and deltas."""

    def chosen(self, paths: list[Any], top: int) -> Any:
        return ArrowExperts(paths, top)

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        own = current()
        if own is None or not (here := self.here(own)):
            return self.base(x_TH, route)
        index_TK, adapted_TK = route.index_TK, torch.zeros_like(route.index_TK, dtype=torch.bool)
        for member, paths in here.items():
            rows = own.shares[member].rows
            adapted_TK[rows] |= (index_TK[rows] >= 0) & paths.has(index_TK[rows])
        out_TH = self.base(x_TH, route._replace(index_TK=torch.where(adapted_TK, -1, index_TK)))
        weight_TN, sides = own.weights(tuple(here), len(x_TH)), [*here.values()]
        for expert in torch.unique(index_TK[adapted_TK]).tolist():
            token_P, k_P = (adapted_TK & (index_TK == expert)).nonzero(as_tuple=True)
            known = [i for i, paths in enumerate(sides) if paths.has(expert)]
            y_PH = self._expert(expert, [sides[i].of(expert) for i in known], weight_TN[token_P.cpu()][:, known],
                                x_TH[token_P])
            out_TH.index_add_(0, token_P, y_PH * route.weight_TK[token_P, k_P].unsqueeze(1).to(y_PH.dtype))
        return out_TH

    def _expert(self, expert: int, sides: Sequence[Any], weight_PN: Tensor, x_PH: Tensor) -> Tensor:
        gate, up = (part.contiguous() for part in self.base.gate_up(expert, x_PH))  # as the native SwiGLU wants them
        _add_part("gate", sides, weight_PN, x_PH, gate)
        _add_part("up", sides, weight_PN, x_PH, up)
        h = ops.swiglu_rows(gate, up)
        y_PH = self.base.down(expert, h)
        _add_part("down", sides, weight_PN, h, y_PH)
        return y_PH


def _add_part(part: str, sides: Sequence[Any], weight_PN: Tensor, x_PK: Tensor, y_PO: Tensor) -> None:
    known = [i for i, side in enumerate(sides) if part in side]
    weight_PN = weight_PN[:, known]
    _add_terms([sides[i][part] for i in known], weight_PN, x_PK, y_PO, lambda i: Share.of(weight_PN[:, i]))


def _add_terms(paths: Sequence[Any], weight_TN: Tensor, x_TK: Tensor, y_TO: Tensor,
               share_of: Callable[[int], Share]) -> None:
    """Add the terms of several adapters, of which share_of gives the rows. In half precision each makes products of its
    own, on the units that the machine has for them."""
    low = [i for i, path in enumerate(paths) if isinstance(path, LowRank) and x_TK.dtype == torch.float32]
    if low:
        ops.add_low_rank(y_TO, x_TK, [paths[i].a for i in low], [paths[i].b for i in low], weight_TN[:, low])
    for i, path in enumerate(paths):
        if i not in low:
            share = share_of(i)
            share.add(y_TO, path(x_TK[share.rows]))


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


def bytes_on(model: nn.Module) -> dict[str, int]:
    """Adapter -> the bytes of its matrices."""
    def size(target: str, name: str) -> int:
        adapted: Any = model.get_submodule(target)
        return sum(tensor.nbytes for tensor in adapted.path(name).buffers())

    return {name: sum(size(target, name) for target in targets) for name, targets in names_on(model).items()}


def paths_of(module: Any, adapter: Adapter | None) -> list[tuple[str, LowRank, float]]:
    """(adapter, matrices, weight) of the members of a mixture that have matrices on a linear module."""
    if not isinstance(module, AdaptedLinear):
        return []
    return [(name, module.path(name), weight) for name, weight in parts_of(adapter)
            if isinstance(name, str) and name in module.names]


def path_of(module: Any, adapter: Adapter | None) -> LowRank | None:
    """An adapter's matrices on a linear module, those of a mixture as one of a higher rank; None where it has none."""
    found = paths_of(module, adapter)
    if len(found) == 1 and found[0][2] == 1:
        return found[0][1]
    return LowRank.joined([(path, weight) for _, path, weight in found]) if found else None


def add(model: Any, name: str, linears: Mapping[str, LowRank], experts: Mapping[str, ExpertMatrices]) -> None:
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
