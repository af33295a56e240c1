"""Which experts the tokens of a run visited: counts, shares, a table and a heat map.

Definitions, per layer, over T counted tokens that visit K of E experts each:

    share      tokens that visited the expert / T; under uniform routing K/E
    slots      of a named group: visits of its experts / all visits, over all layers; under uniform routing the share
               that its experts are of all
    weight     the sum of the gate's weights for the expert / T; of a named group: the sum for its experts / the sum for
               all, over all layers
    MaxVio     (largest count - mean count) / mean count (arXiv 2408.15664); 0 is perfect balance
    diversity  exp(H) / E with H the entropy (nats) of the counts as a distribution: 1 when all experts are used
               equally, 1/E when a single one is
    dead       experts that no token visited

Shape letters: L layers with routed experts, E experts, K experts a token, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError, DataError
from ..files import to_json
from ..model import RoutingRecord, max_violation
from .atlas import Atlas
from .evidence import members
from .plot import frame, save_png

FORMAT = 1
WIDTH = 100  # columns of the table
DEEPEST = 4.0  # the heat map's colours end at this multiple of the uniform share


@dataclass(frozen=True)
class NamedUse:
    """A named group's share of the slots, what uniform routing would give it of them, and its share of the weight."""

    slots: float
    even: float
    weight: float


class ExpertUsage:
    """Counts routed (token, expert) pairs of the model that `config` describes.

    `layers` are the model's own layer indices; row i of every tensor belongs to layers[i]. MTP layers are not counted.
    `adapters`: of the same counts, those of tokens that went through an adapter with a name.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._start(config.moe_layers, config.n_routed_experts, config.num_experts_per_tok)

    def _start(self, layers: tuple[int, ...], experts: int, top_k: int) -> None:
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.tokens = 0
        self.counts_LE = torch.zeros(len(layers), experts, dtype=torch.int64)
        self.weights_LE = torch.zeros(len(layers), experts, dtype=torch.float64)
        self.adapters: dict[str, ExpertUsage] = {}

    def part(self, adapter: str) -> ExpertUsage:
        """The counts of an adapter's tokens, which are counted here as well."""
        if adapter not in self.adapters:
            self.adapters[adapter] = own = ExpertUsage.__new__(ExpertUsage)
            own._start(self.layers, self.experts, self.top_k)
        return self.adapters[adapter]

    def add_aged(self, older: ExpertUsage) -> None:
        """Add the half of what was counted before, so that old habits fade. Both are of one shape."""
        self.counts_LE += older.counts_LE // 2
        self.weights_LE += older.weights_LE / 2
        self.tokens += older.tokens // 2
        for adapter, part in older.adapters.items():
            if part.tokens > 1:
                self.part(adapter).add_aged(part)

    def renumbered(self, old: Sequence[int | None]) -> ExpertUsage:
        """The same counts where expert i is the former one of number old[i], or new (None)."""
        out = ExpertUsage.__new__(ExpertUsage)
        out._start(self.layers, len(old), self.top_k)
        now = [i for i, before in enumerate(old) if before is not None]
        before = [i for i in old if i is not None]
        out.tokens = self.tokens
        out.counts_LE[:, now], out.weights_LE[:, now] = self.counts_LE[:, before], self.weights_LE[:, before]
        out.adapters = {name: part.renumbered(old) for name, part in self.adapters.items()}
        return out

    def shares(self, atlas: Atlas) -> dict[str, float]:
        """Each named group's share of the gates' weight, the largest first. Raises ConfigError as `by_name` does."""
        return dict(sorted(((name, use.weight) for name, use in self.by_name(atlas).items()), key=lambda one: -one[1]))

    def add(self, routing: RoutingRecord, mask_T: Tensor | None = None) -> None:
        """Count one call's routes. mask_T: False for tokens that are padding.

        Raises ConfigError if the record comes from a model of another shape.
        """
        if set(routing.routes) != set(self.layers):
            raise ConfigError(f"the routing record has layers {sorted(routing.routes)}: must be those counted here, "
                              f"{list(self.layers)}")
        tokens = 0
        for row, layer in enumerate(self.layers):
            route = routing.routes[layer]
            if route.scores_TE.shape[1] != self.experts:
                raise ConfigError(f"layer {layer} has {route.scores_TE.shape[1]} experts: must be {self.experts}")
            index_TK, weight_TK = route.index_TK, route.weight_TK.detach()
            if mask_T is not None:
                index_TK, weight_TK = index_TK[mask_T.bool()], weight_TK[mask_T.bool()]
            place = index_TK.flatten() + 1  # 0 where a token has fewer experts than others of its batch
            self.counts_LE[row] += torch.bincount(place, minlength=self.experts + 1)[1:].cpu()
            self.weights_LE[row] += torch.bincount(
                place, weight_TK.flatten().double(), minlength=self.experts + 1)[1:].cpu()
            tokens = index_TK.shape[0]
        self.tokens += tokens

    # ---- figures ----------------------------------------------------------------------------------------------

    @property
    def uniform_share(self) -> float:
        """K/E, every expert's share if tokens were spread evenly."""
        return self.top_k / self.experts

    def share(self) -> Tensor:
        """Share of the tokens that visited each expert, FP64 [L, E]; zeros before the first token."""
        return self.counts_LE.double() / max(self.tokens, 1)

    def weight(self) -> Tensor:
        """Mean gate weight per token, FP64 [L, E]."""
        return self.weights_LE / max(self.tokens, 1)

    def max_vio(self) -> Tensor:
        """MaxVio per layer, FP32 [L]."""
        return max_violation(self.counts_LE)

    def diversity(self) -> Tensor:
        """exp(entropy) / E per layer, FP64 [L]; 0 before the first token."""
        p_LE = self.counts_LE.double() / self.counts_LE.sum(1, keepdim=True).clamp(min=1)
        entropy_L = -torch.special.xlogy(p_LE, p_LE).sum(1)
        return torch.where(self.counts_LE.sum(1) > 0, entropy_L.exp() / self.experts, 0.0)

    def dead(self) -> Tensor:
        """Experts of each layer that no token visited, int64 [L]."""
        return (self.counts_LE == 0).sum(1)

    # ---- for people -------------------------------------------------------------------------------------------

    def table(self) -> str:
        """One line a layer, at most 100 columns: balance, and the busiest experts with their shares."""
        title = (f"Expert usage: {self.tokens:,} tokens, {len(self.layers)} layers x {self.experts} experts, "
                 f"{self.top_k} a token; uniform share {self.uniform_share:.1%}")
        if not self.layers or not self.tokens:
            return f"{title}\n(nothing counted)"
        digits = len(str(self.experts - 1))
        head = f"{'layer':>5}  {'MaxVio':>6}  {'diversity':>9}  {'dead':>4}  busiest experts, share of tokens"
        fits = (WIDTH - head.index("busiest") + 2) // (digits + 9)
        lines = [title, head]
        shares_LE, order_LE = self.share().sort(dim=1, descending=True, stable=True)
        rows = zip(self.layers, self.max_vio().tolist(), self.diversity().tolist(), self.dead().tolist(),
                   order_LE.tolist(), shares_LE.tolist(), strict=True)
        for layer, vio, diversity, dead, order, shares in rows:
            cells = [f"{e:>{digits}} {share:>6.1%}" for e, share in zip(order, shares, strict=True) if share]
            lines.append(f"{layer:>5}  {vio:>6.2f}  {diversity:>9.2f}  {dead:>4}  {'  '.join(cells[:fits])}")
        if len(self.layers) > 1:
            vio, diversity = float(self.max_vio().mean()), float(self.diversity().mean())
            lines.append(f"{'mean':>5}  {vio:>6.2f}  {diversity:>9.2f}  {float(self.dead().double().mean()):>4.1f}")
        return "\n".join(lines)

    def by_name(self, atlas: Atlas) -> dict[str, NamedUse]:
        """What each named group got, in the atlas's order; empty before the first token.

        Raises ConfigError for an atlas of a model of another shape.
        """
        if (atlas.shape.layers, atlas.shape.experts) != (self.layers, self.experts):
            raise ConfigError(f"the atlas was made for another shape: {atlas.shape}; counted were {len(self.layers)} "
                              f"layers x {self.experts} experts")
        slots_L, weight = self.counts_LE.sum(1).double(), float(self.weights_LE.sum())
        slots, out = float(slots_L.sum()), dict[str, NamedUse]()
        for group in atlas.groups if slots else ():
            member_LE = torch.from_numpy(members(group.experts, self.layers, self.experts))
            even, found = float((slots_L * member_LE.double().mean(1)).sum()), float(self.counts_LE[member_LE].sum())
            own = float(self.weights_LE[member_LE].sum()) / weight if weight else 0.0
            out[group.name] = NamedUse(found / slots, even / slots, own)
        return out

    def named(self, atlas: Atlas) -> str:
        """One line a name, those of training first and the most favoured of each kind first: its share of the slots,
        and how many times that is of uniform routing's; empty before the first token. Raises as `by_name`."""
        rows = [(atlas.group(name).kind != "built-in", -use.slots / use.even if use.even else 0.0, name, use.slots)
                for name, use in self.by_name(atlas).items()]
        width = max(map(len, atlas), default=0)
        return "\n".join(f"{name:{width}}  {100 * share:3.0f} % of the slots, {-less:.1f} times even routing"
                         for _, less, name, share in sorted(rows))

    def save_heat_map(self, path: str | Path) -> None:
        """Draw layers x experts as a PNG; the colour is share / uniform share, white at 1. The file appears whole.

        Raises DataError if nothing was counted.
        """
        if not self.layers or not self.tokens:
            raise DataError("no expert usage to draw: no token was counted")
        from matplotlib.colors import TwoSlopeNorm

        rows, columns = len(self.layers), self.experts
        ratio_LE = (self.share() / self.uniform_share).numpy()
        deepest = min(max(2.0, float(ratio_LE.max())), DEEPEST)
        figure, axis = frame(self.layers, columns)
        image = axis.imshow(ratio_LE, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, deepest), aspect="auto",
                            interpolation="nearest")
        axis.set_title(f"Share of tokens that visit each expert, against uniform routing\n{self.tokens:,} tokens, "
                       f"{self.top_k} of {columns} experts a token", fontsize=11)
        if columns <= 32 and rows <= 16:
            for row in range(rows):
                for e in range(columns):
                    value = ratio_LE[row, e]
                    dark = value > 1 + 0.6 * (deepest - 1) or value < 0.25
                    axis.text(e, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                              color="white" if dark else "black")
        beyond = float(ratio_LE.max()) > deepest
        bar = figure.colorbar(image, ax=axis, extend="max" if beyond else "neither", pad=0.01)
        bar.set_label(f"share / uniform share ({self.uniform_share:.1%})")
        bar.set_ticks([t for t in ((0, 0.5, 1, 1.5, 2) if deepest < 3 else (0, 0.5, 1, 2, 3, 4)) if t <= deepest])
        save_png(figure, path)

    # ---- for files --------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The counts as one JSON object; `from_json` reads it back."""
        return to_json({"format": FORMAT, "layers": list(self.layers), "experts": self.experts, "top_k": self.top_k,
                        **self._counts(), "adapters": {name: own._counts() for name, own in self.adapters.items()}})

    def _counts(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "counts": self.counts_LE.tolist(), "weights": self.weights_LE.tolist()}

    def _read(self, keys: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for counts that cannot be."""
        if type(keys["tokens"]) is not int or keys["tokens"] < 0:
            raise ValueError("layers, experts, top_k and tokens must be integers >= 0")
        counts_LE = torch.tensor(keys["counts"], dtype=torch.int64)
        weights_LE = torch.tensor(keys["weights"], dtype=torch.float64)
        if not counts_LE.shape == weights_LE.shape == (len(self.layers), self.experts):
            raise ValueError(f"counts and weights must be tables of {len(self.layers)} x {self.experts}")
        if not (bool((counts_LE >= 0).all()) and bool(weights_LE.isfinite().all())):
            raise ValueError("counts and weights must be numbers >= 0")
        self.tokens, self.counts_LE, self.weights_LE = keys["tokens"], counts_LE, weights_LE

    @classmethod
    def from_json(cls, text: str) -> ExpertUsage:
        """Read `to_json`'s text. Raises DataError if it is not that."""
        usage = cls.__new__(cls)
        try:
            keys: dict[str, Any] = json.loads(text)
            if keys["format"] != FORMAT:
                raise ValueError(f"format = {keys['format']!r:.60}: must be {FORMAT}")
            layers, experts, top_k = (keys[key] for key in ("layers", "experts", "top_k"))
            if not all(type(number) is int and number >= 0 for number in (*layers, experts, top_k)):
                raise ValueError("layers, experts, top_k and tokens must be integers >= 0")
            usage._start(tuple(layers), 0, top_k)  # no table is made of a size that the counts may not have
            usage.experts = experts
            usage._read(keys)
            for name, own in dict(keys.get("adapters", {})).items():
                part = usage.adapters[name] = cls.__new__(cls)
                part._start(usage.layers, 0, top_k)
                part.experts = experts
                part._read(own)
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
            raise DataError(f"expert usage: not what to_json writes: {error!r:.200}") from None
        return usage
