"""Expert identifiers.

An expert is one feed-forward network of one layer. Code never passes a bare int for it: `ExpertId(3, 17)` prints as
`3.17` and sorts by layer, then index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class ExpertId(NamedTuple):
    """One routed expert: `layer` counts from 0 over all layers (dense ones included), `index` within the layer."""

    layer: int
    index: int  # type: ignore[assignment]  # shadows tuple.index on purpose

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"

    @classmethod
    def parse(cls, text: str) -> ExpertId:
        """`"3.17"` -> `ExpertId(3, 17)`. Raises ValueError for anything else."""
        layer, dot, index = text.partition(".")
        if not (dot and layer.isdecimal() and index.isdecimal()):
            raise ValueError(f"expert id must read LAYER.INDEX (for example 3.17), got {text!r}")
        return cls(int(layer), int(index))


class ExpertSet:
    """An immutable set of ExpertId that keeps its order (descending score, where there is one)."""

    __slots__ = ("_ids",)

    def __init__(self, ids: Iterable[ExpertId] = ()) -> None:
        self._ids: dict[ExpertId, None] = dict.fromkeys(ExpertId(*i) for i in ids)

    def __iter__(self) -> Iterator[ExpertId]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, expert: object) -> bool:
        return expert in self._ids

    def __eq__(self, other: object) -> bool:
        """Equal as ordered sets."""
        return isinstance(other, ExpertSet) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self._ids))

    def __or__(self, other: ExpertSet) -> ExpertSet:
        return ExpertSet([*self, *other])

    def __and__(self, other: ExpertSet) -> ExpertSet:
        return ExpertSet(i for i in self if i in other)

    def __sub__(self, other: ExpertSet) -> ExpertSet:
        return ExpertSet(i for i in self if i not in other)

    def by_layer(self) -> dict[int, list[int]]:
        """`{layer: [expert index, …]}`, layers ascending, experts in the order of the set."""
        out: dict[int, list[int]] = {}
        for layer, index in self:
            out.setdefault(layer, []).append(index)
        return dict(sorted(out.items()))

    def __repr__(self) -> str:
        return f"ExpertSet({', '.join(map(str, self))})"
