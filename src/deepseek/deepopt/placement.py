"""Which device has which experts, by their loads. `place` is the hierarchical form of EPLB (DeepSeek's expert-parallel
load balancer; arXiv 2412.19437, section 3.4.1, and https://github.com/deepseek-ai/EPLB).

    nodes      groups of experts are packed to nodes, so that a token that is limited to some groups goes to few nodes
    replicas   within a node the expert with the most load a replica gets another one, until all slots are taken
    devices    the replicas of a node are packed to its devices

Packing: the heaviest first, each into the lightest bin that has room; all bins get equally many. Loads of bins then
differ by at most the heaviest item. Of equals the first counts, so that the same loads give the same placement.

`move` does so while experts are somewhere: where that makes the busiest rank of a layer lighter, and with as many of
them as can be where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError

GAIN = 0.05  # by which the busiest rank of a layer must become lighter


def place(load_LE: Tensor, devices: int, *, replicas: int | None = None, groups: int = 1, nodes: int = 1) -> Tensor:
    """Return the expert in every slot, [L, replicas] int64, for loads of L layers' experts, [L, E].

    A device has replicas / devices slots, one after another, a node devices / nodes devices. replicas: E where it is
    not given. groups: of consecutive experts; those of a group lie on one node. groups = nodes = 1 is EPLB's global
    form. Raises ConfigError naming what must divide what.
    """
    experts = load_LE.shape[1]
    slots = experts if replicas is None else replicas
    for name, value, what, count in (("groups", groups, "the number of experts", experts),
                                     ("nodes", nodes, "groups", groups), ("nodes", nodes, "devices", devices),
                                     ("devices", devices, "replicas", slots)):
        if value < 1 or count % value:
            raise ConfigError(f"{name} = {value}: must divide {what} ({count})")
    if slots < experts:
        raise ConfigError(f"replicas = {slots}: must be at least the number of experts ({experts})")
    found = [_slots(load_E, slots // nodes, groups, nodes, devices // nodes) for load_E in load_LE.double().tolist()]
    return torch.tensor(found, dtype=torch.int64).view(len(load_LE), slots)


def pack(loads: Sequence[float], bins: int) -> list[list[int]]:
    """Return the items of each bin, equally many, in the order in which they were put there."""
    room = len(loads) // bins
    packed, total = [list[int]() for _ in range(bins)], [0.0] * bins
    order = sorted(range(len(loads)), key=lambda item: -loads[item])
    for item in order if room > 1 else range(bins):  # alone in a bin, any is as good as another
        lightest = min((i for i in range(bins) if len(packed[i]) < room), key=total.__getitem__)
        packed[lightest].append(item)
        total[lightest] += loads[item]
    return packed


def replicate(loads: Sequence[float], count: int) -> list[int]:
    """Return the item of each of `count` replicas, every item's first one in their order, then further ones: the
    largest load of a replica is as small as can be."""
    copies = [1] * len(loads)
    further = []
    for _ in range(count - len(loads)):
        most = max(range(len(loads)), key=lambda item: loads[item] / copies[item])
        further.append(most)
        copies[most] += 1
    return [*range(len(loads)), *further]


def _slots(load_E: list[float], slots: int, groups: int, nodes: int, devices: int) -> list[int]:
    """Of one layer; `slots` and `devices` of a node."""
    size = len(load_E) // groups
    found = []
    for here in pack([sum(load_E[first : first + size]) for first in range(0, len(load_E), size)], nodes):
        experts = [group * size + i for group in here for i in range(size)]
        owners = [experts[i] for i in replicate([load_E[expert] for expert in experts], slots)]
        each = pack([load_E[owner] / owners.count(owner) for owner in owners], devices)
        found += [owners[i] for device in each for i in device]
    return found


def rank_loads(load_LE: Tensor, slot_LE: Tensor, ranks: int) -> Tensor:
    """Return the load of every rank, [L, ranks], where the experts are in the slots `slot_LE` [L, E]."""
    rank_LE = slot_LE // (load_LE.shape[1] // ranks)
    return load_LE.new_zeros(len(load_LE), ranks).scatter_add_(1, rank_LE, load_LE)


def imbalance(load_LE: Tensor, slot_LE: Tensor, ranks: int) -> float:
    """Return how many times the mean load the busiest rank has, on the average over the layers that have any."""
    load_LR = rank_loads(load_LE, slot_LE, ranks).double()
    return float((load_LR.amax(1) / load_LR.mean(1))[load_LR.any(1)].mean())


def move(load_LE: Tensor, slot_LE: Tensor, ranks: int) -> Tensor:
    """Return the slots that experts should have, [L, E], where they have loads `load_LE` and now the slots `slot_LE`.
    Layers whose busiest rank would not become lighter by GAIN stay as they are."""
    count = load_LE.shape[1] // ranks
    found_LE = place(load_LE, ranks).argsort(1)
    for found_E, slot_E in zip(found_LE, slot_LE, strict=True):
        rank_R = torch.tensor(_most_stay((found_E // count).tolist(), (slot_E // count).tolist(), ranks))
        found_E.copy_(rank_R[found_E // count] * count + found_E % count)
    new_L, old_L = (rank_loads(load_LE, at_LE, ranks).amax(1) for at_LE in (found_LE, slot_LE))
    return torch.where((new_L < (1 - GAIN) * old_L)[:, None], found_LE, slot_LE)


def _most_stay(bins: Sequence[int], ranks: Sequence[int], count: int) -> list[int]:
    """The rank for each bin; `bins` and `ranks` are of the experts. Those that have most in common come together
    first."""
    found: dict[int, int] = {}
    common = Counter(zip(bins, ranks, strict=True)).most_common()
    for bin_, rank in (*(pair for pair, _ in common), *((i, j) for i in range(count) for j in range(count))):
        if bin_ not in found and rank not in found.values():
            found[bin_] = rank
    return [found[i] for i in range(count)]
