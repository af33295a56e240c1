"""Routing accuracy of groups that bear names: does the text of a domain go to the experts of its name?

    strength   of group g at a token: its share of the gate's weights, summed over all layers with routed experts
    accuracy   labelled tokens whose strongest group is that of their label, per name; chance is 1 / groups
    settled    a token counts from the 33rd of its document (or of its window) on: before, a domain can hardly be told
    MaxVio     (largest load - mean load) / mean load: across groups, and within each group, means over layers

Shape letters: B windows, T tokens, G routing groups, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import RoutingRecord, expert_load, group_weight, max_violation

SETTLED = 32  # tokens of context before a token counts


class RoutingAccuracy:
    """Counts, for a model whose routing group i bears names[i]; groups beyond the names bear none."""

    def __init__(self, config: ModelConfig, names: Sequence[str], *, whole_rows: bool = False) -> None:
        """whole_rows: a row is one document, whatever it contains; else the token that begins documents tells where
        they begin, which some tokenizers use for every turn of a conversation."""
        self.config, self.names = config, tuple(names)
        self.bos_id = None if whole_rows else config.bos_token_id
        self.confusion_NG = torch.zeros(len(self.names), config.n_group, dtype=torch.int64)
        self.load_LE = torch.zeros(len(config.moe_layers), config.n_routed_experts, dtype=torch.int64)

    def add(self, routing: RoutingRecord, expert_BT: Tensor, ids_BT: Tensor) -> None:
        """Count one call. expert_BT: place of each token's name, -1 for none; ids_BT: to find where documents begin."""
        counted_T = (settled(ids_BT, self.bos_id) & (expert_BT >= 0)).flatten()
        routes = [routing.routes[layer] for layer in self.config.moe_layers]
        strength_TG = sum(group_weight(route, self.config.n_group) for route in routes)
        assert isinstance(strength_TG, Tensor)
        pairs = expert_BT.flatten()[counted_T] * self.config.n_group + strength_TG.argmax(1)[counted_T]
        self.confusion_NG += torch.bincount(pairs.cpu(), minlength=self.confusion_NG.numel()).view_as(self.confusion_NG)
        for row, route in enumerate(routes):
            self.load_LE[row] += expert_load(route.index_TK[counted_T], self.config.n_routed_experts).cpu()

    def merge(self, counts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the sum of several (confusion_NG, load_LE) as the counts."""
        confusions, loads = zip(*counts, strict=True)
        self.confusion_NG, self.load_LE = torch.stack(confusions).sum(0), torch.stack(loads).sum(0)

    def by_name(self) -> dict[str, float]:
        """Accuracy of each name; names without a counted token are left out."""
        totals = self.confusion_NG.sum(1)
        return {name: int(self.confusion_NG[i, i]) / int(totals[i]) for i, name in enumerate(self.names) if totals[i]}

    def macro(self) -> float:
        """Mean over the names that have text, so that a small domain counts as much as a large one."""
        found = self.by_name().values()
        return sum(found) / max(len(found), 1)

    def max_vio(self) -> tuple[float, float]:
        """(across groups, within groups), each the mean over layers; within is the mean over groups that have load."""
        load_LGE = self.load_LE.unflatten(1, (self.config.n_group, -1))
        load_LG = load_LGE.sum(-1)
        across = float(max_violation(load_LG).mean())
        within = max_violation(load_LGE)[load_LG > 0]
        return across, float(within.mean()) if within.numel() else 0.0

    def record(self) -> dict[str, object]:
        """For a log: macro accuracy, the names' own, MaxVio across and within groups."""
        across, within = self.max_vio()
        return {"routing_accuracy": self.macro(), "routing_accuracy_of": self.by_name(),
                "max_vio_across_groups": across, "max_vio_within_groups": within}

    def table(self) -> str:
        """Accuracy and confusion, one line a name; columns are groups in the order of the names."""
        width = max((len(name) for name in self.names), default=4)
        across, within = self.max_vio()
        lines = [f"routing accuracy {self.macro():.1%} (macro average; chance {1 / self.config.n_group:.1%}); "
                 f"MaxVio across groups {across:.2f}, within {within:.2f}",
                 f"{'':{width}}  {'tokens':>9}  accuracy  strongest group: " + " ".join(
                     f"{i:>5}" for i in range(self.config.n_group))]
        for name, row in zip(self.names, self.confusion_NG.tolist(), strict=True):
            total = max(sum(row), 1)
            found = self.by_name().get(name)
            lines.append(f"{name:{width}}  {sum(row):>9,}  {'-' if found is None else f'{found:.1%}':>8}"
                         f"                   " + " ".join(f"{n / total:>5.0%}" for n in row))
        return "\n".join(lines)


def settled(ids_BT: Tensor, bos_id: int | None) -> Tensor:
    """Boolean [B, T]: tokens with at least 32 before them in their document and window."""
    place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    if bos_id is None:
        return place_BT >= SETTLED
    begin_BT = torch.where(ids_BT == bos_id, place_BT, 0).cummax(1).values
    return place_BT - begin_BT >= SETTLED
