"""Which device has which experts, by their loads: the hierarchical form of EPLB (DeepSeek's expert-parallel load
balancer; arXiv 2412.19437, section 3.4.1, and https://github.com/deepseek-ai/EPLB).

    nodes      groups of experts are packed to nodes, so that a token that is limited to some groups goes to few nodes
    replicas   within a node the expert with the most load a replica gets another one, until all slots are taken
    devices    the replicas of a node are packed to its devices

Packing: the heaviest first, each into the lightest bin that has room; all bins get equally many. Loads of bins then
differ by at most the heaviest item. Of equals the first counts, so that the same loads give the same placement.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError


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
