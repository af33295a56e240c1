"""Is a group of experts better than chance? The statistics behind a name; docs/experts.md argues for each.

    coverage    share of the routed slots (or of the gate's weight) that a group carries, the mean over layers; of a
                domain, the mean over its units, each counting as many times as it has tokens
    uniform     the coverage that even routing gives: mean over layers of |group in the layer| / E
    lift        coverage of the own domain minus the mean of the coverages of the other domains
    p           how often shuffled labels give such a lift (`shuffled_lifts`); for a single domain, how often random
                experts give such a coverage (`random_experts_p`)
    stability   two selections from random halves: Jaccard index, and Spearman's correlation of the scores

The unit of everything random is the document: tokens of one document are no independent witnesses.

Shape letters: U units, L layers, E experts, P permutations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..ids import ExpertId, ExpertSet
from .selection import select_experts

PERMUTATIONS = 4999
CHUNK = 500  # permutations at a time
LEVEL = 0.05
ULP = 1e-12  # sums in another order are equal


@dataclass(frozen=True)
class Routed:
    """What the units of a domain were routed to. tokens_U; slots_ULE: visits; weight_ULE: the gate's weight, summed."""

    tokens_U: np.ndarray
    slots_ULE: np.ndarray
    weight_ULE: np.ndarray

    def part(self, units: np.ndarray) -> Routed:
        return Routed(self.tokens_U[units], self.slots_ULE[units], self.weight_ULE[units])

    def scores(self, score: str) -> np.ndarray:
        """ESFT's token or gate scores over all units, [L, E]."""
        if score == "gate":
            return self.weight_ULE.sum(0) / self.tokens_U.sum()
        slots_LE = self.slots_ULE.sum(0)
        return slots_LE / slots_LE.sum(1, keepdims=True)


def select(scores_LE: np.ndarray, layers: Sequence[int], threshold: float) -> tuple[ExpertSet, tuple[float, ...]]:
    """The experts that ESFT's rule selects in every layer, all by descending score, and those scores."""
    rows = select_experts(dict(enumerate(scores_LE)), threshold)
    chosen = sorted((-float(scores_LE[row, e]), layers[row], e) for row, experts in rows.items() for e in experts)
    return ExpertSet(ExpertId(layer, e) for _, layer, e in chosen), tuple(-score for score, _, _ in chosen)


def members(experts: ExpertSet, layers: Sequence[int], count: int) -> np.ndarray:
    """The set as a mask, boolean [L, E]."""
    mask_LE = np.zeros((len(layers), count), dtype=bool)
    for layer, index in experts:
        mask_LE[layers.index(layer), index] = True
    return mask_LE


def unit_coverage(amount_ULE: np.ndarray, mask_LE: np.ndarray) -> np.ndarray:
    """Coverage of each unit, [U]; amount_ULE: slots or weight."""
    return ((amount_ULE * mask_LE).sum(2) / amount_ULE.sum(2)).mean(1)


def coverage(amount_ULE: np.ndarray, tokens_U: np.ndarray, mask_LE: np.ndarray) -> float:
    """Coverage of a domain."""
    return float(np.average(unit_coverage(amount_ULE, mask_LE), weights=tokens_U))


def shuffled_lifts(
    coverage_U: np.ndarray, tokens_U: np.ndarray, sizes: Sequence[int], own: int, seed: int
) -> tuple[float, np.ndarray]:
    """(the lift of domain `own`, those of PERMUTATIONS random assignments of the labels, ascending): a one-sided
    permutation test, with the p of `share_as_large`.

    Units lie domain by domain, `sizes` of each. If a unit's domain says nothing about how much of it the group carries,
    every assignment of the labels to the units is as likely as the one seen.
    """
    starts = np.cumsum([0, *sizes[:-1]])

    def lifts(order_PU: np.ndarray) -> np.ndarray:
        tokens_PU = tokens_U[order_PU]
        carried_PD = np.add.reduceat(coverage_U[order_PU] * tokens_PU, starts, 1)
        found_PD = carried_PD / np.add.reduceat(tokens_PU, starts, 1)
        return found_PD[:, own] - np.delete(found_PD, own, 1).mean(1)

    generator = np.random.default_rng(seed)
    drawn = [lifts(generator.random((min(CHUNK, PERMUTATIONS - begin), len(tokens_U))).argsort(1))
             for begin in range(0, PERMUTATIONS, CHUNK)]
    return float(lifts(np.arange(len(tokens_U))[None])[0]), np.sort(np.concatenate(drawn))


def share_as_large(seen: float, drawn_P: np.ndarray) -> float:
    """p of a lift: (1 + the random ones at least as large) / (1 + PERMUTATIONS)."""
    return (1 + int((drawn_P >= seen - ULP).sum())) / (1 + PERMUTATIONS)


def lift_needed(drawn_P: np.ndarray, level: float) -> float:
    """The lift above which p is below `level`, or as low as it can be."""
    spared = max(0, math.ceil(level * (1 + PERMUTATIONS)) - 2)  # so many may be as large
    return float(drawn_P[-1 - spared])


def random_experts_p(share_LE: np.ndarray, mask_LE: np.ndarray, seed: int) -> float:
    """One-sided test of a group's coverage against groups of as many random experts in each layer.

    share_LE: each expert's share of the held-out routing of its layer. This shows that the selection holds on text that
    it was not made from; whether other text would go there too, a single domain cannot say.
    """
    generator = np.random.default_rng(seed)
    seen = (share_LE * mask_LE).sum(1).mean()
    found_P = np.zeros(PERMUTATIONS)
    for share_E, size in zip(share_LE, mask_LE.sum(1), strict=True):
        for begin in range(0, PERMUTATIONS, CHUNK):
            draws = min(CHUNK, PERMUTATIONS - begin)
            order_PE = generator.random((draws, len(share_E))).argsort(1)
            found_P[begin : begin + draws] += share_E[order_PE[:, :size]].sum(1) / len(share_LE)
    return (1 + int((found_P >= seen - ULP).sum())) / (1 + PERMUTATIONS)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests made at once, adjusted by Holm's step-down rule (Scand. J. Statist. 6, 1979)."""
    adjusted = [0.0] * len(p)
    running = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        running = max(running, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = running
    return adjusted


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing their mean; 0 where a side is constant."""
    a, b = (_ranks(x) - (len(x) - 1) / 2 for x in (a, b))
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]
