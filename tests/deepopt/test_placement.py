"""Placement of experts by load: EPLB's published example, what holds of any loads, and how far it is from the best."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.deepopt.placement import GAIN, imbalance, move, pack, place, rank_loads, replicate
from deepseek.errors import ConfigError

LOADS = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                      [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
PUBLISHED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
             [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]

small = st.integers(0, 40)


def test_the_published_example_of_eplb_gives_the_published_placement() -> None:
    assert place(LOADS, 8, replicas=16, groups=4, nodes=2).tolist() == PUBLISHED


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_every_expert_is_somewhere_and_groups_are_whole(
        data: st.DataObject, nodes: int, per_node: int, size: int, devices: int, layers: int) -> None:
    groups, devices = nodes * per_node, nodes * devices
    experts = groups * size
    replicas = devices * data.draw(st.integers(-(-experts // devices), 2 * experts))
    load_LE = torch.tensor(data.draw(st.lists(
        st.lists(small, min_size=experts, max_size=experts), min_size=layers, max_size=layers)))
    slots_LP = place(load_LE, devices, replicas=replicas, groups=groups, nodes=nodes)
    assert slots_LP.shape == (layers, replicas)
    for slots_P in slots_LP:
        assert {*slots_P.tolist()} == {*range(experts)}
        homes = [{expert // size for expert in node.tolist()} for node in slots_P.chunk(nodes)]
        assert all(len(home) == per_node for home in homes)  # so no group is on two nodes


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=24), st.integers(1, 6))
def test_bins_get_equally_many_and_differ_by_at_most_the_heaviest(loads: list[int], bins: int) -> None:
    loads += [0] * (-len(loads) % bins)
    packed = pack(loads, bins)
    assert sorted(item for items in packed for item in items) == [*range(len(loads))]
    assert {len(items) for items in packed} == {len(loads) // bins}
    totals = [sum(loads[item] for item in items) for items in packed]
    assert max(totals) - min(totals) <= max(loads)


@settings(deadline=None)
@given(st.lists(small, min_size=8, max_size=8), st.sampled_from([2, 4]))
def test_packing_is_near_the_best(loads: list[int], bins: int) -> None:
    most = max(sum(loads[item] for item in items) for items in pack(loads, bins))
    assert most <= lightest(tuple(sorted(loads)), bins) * (2 - 1 / bins)


@cache
def lightest(loads: tuple[int, ...], bins: int) -> int:
    """The least load of the heaviest bin, by trying all."""
    if bins == 1:
        return sum(loads)
    found = sum(loads)
    for others in combinations(range(1, len(loads)), len(loads) // bins - 1):
        rest = tuple(load for i, load in enumerate(loads) if i and i not in others)
        found = min(found, max(loads[0] + sum(loads[i] for i in others), lightest(rest, bins - 1)))
    return found


@given(st.lists(small, min_size=1, max_size=4), st.integers(0, 4))
def test_replicas_are_as_light_as_can_be(loads: list[int], further: int) -> None:
    found = replicate(loads, len(loads) + further)
    heaviest = max(load / found.count(item) for item, load in enumerate(loads))
    assert found[: len(loads)] == [*range(len(loads))] and heaviest == shared_best(loads, len(found))


def shared_best(loads: list[int], count: int) -> float:
    if len(loads) == 1:
        return loads[0] / count
    return min(max(loads[0] / n, shared_best(loads[1:], count - n)) for n in range(1, count - len(loads) + 2))


@settings(deadline=None)
@given(st.lists(st.lists(small, min_size=12, max_size=12), min_size=1, max_size=3),
       st.sampled_from([1, 2, 3, 4, 6, 12]), st.randoms(use_true_random=False))
def test_experts_move_only_where_that_helps(loads: list[list[int]], ranks: int, random: Random) -> None:
    load_LE = torch.tensor(loads)
    slot_LE = torch.tensor([random.sample(range(12), 12) for _ in loads])
    moved_LE = move(load_LE, slot_LE, ranks)
    assert torch.equal(moved_LE.sort(1).values, torch.arange(12).expand_as(slot_LE))
    before_L, after_L = (rank_loads(load_LE, at_LE, ranks).amax(1) for at_LE in (slot_LE, moved_LE))
    stays_L = (moved_LE == slot_LE).all(1)
    assert (stays_L | (after_L < (1 - GAIN) * before_L)).all()
    assert torch.equal(move(load_LE, moved_LE, ranks), moved_LE)


def test_most_experts_stay_where_they_are() -> None:
    load_LE, slot_LE = torch.tensor([[1, 1, 4, 9, 5, 1]]), torch.arange(6)[None]
    moved_LE = move(load_LE, slot_LE, 2)
    assert (moved_LE // 3).tolist() == [[1, 0, 0, 1, 0, 1]]  # experts 0 and 4 have changed places
    assert imbalance(load_LE, slot_LE, 2) == pytest.approx(15 / 10.5)
    assert imbalance(load_LE, moved_LE, 2) == pytest.approx(11 / 10.5)


def test_layers_without_load_stay_and_do_not_count() -> None:
    load_LE, slot_LE = torch.tensor([[3, 3, 1, 1], [0, 0, 0, 0]]), torch.arange(4).repeat(2, 1)
    assert imbalance(load_LE, slot_LE, 2) == 1.5
    assert torch.equal(move(load_LE, slot_LE, 2)[1], slot_LE[1])


@pytest.mark.parametrize(("settings", "message"), [
    ({"devices": 5}, r"devices = 5: must divide replicas \(12\)"),
    ({"devices": 4, "groups": 5}, r"groups = 5: must divide the number of experts \(12\)"),
    ({"devices": 4, "groups": 3, "nodes": 2}, r"nodes = 2: must divide groups \(3\)"),
    ({"devices": 3, "groups": 2, "nodes": 2}, r"nodes = 2: must divide devices \(3\)"),
    ({"devices": 4, "replicas": 8}, r"replicas = 8: must be at least the number of experts \(12\)")])
def test_what_does_not_divide_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(LOADS, **settings)
