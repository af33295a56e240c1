"""Expert identifiers print, parse and sort; sets of them keep their order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.ids import ExpertId, ExpertSet

experts = st.builds(ExpertId, st.integers(0, 99), st.integers(0, 255))
lists = st.lists(experts, max_size=12)


@given(experts)
def test_text_and_back(expert: ExpertId) -> None:
    assert ExpertId.parse(str(expert)) == expert


@pytest.mark.parametrize("text", ["", "3", "3.", ".3", "3.x", "-1.2", "3.17.2", " 3.17", "3,17", "3.+1"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"LAYER.INDEX .*got") as caught:
        ExpertId.parse(text)
    assert repr(text) in str(caught.value)


def test_order_is_layer_then_index() -> None:
    assert sorted([ExpertId(10, 0), ExpertId(2, 9), ExpertId(2, 10)]) == [(2, 9), (2, 10), (10, 0)]


@given(lists, lists)
def test_set_algebra_keeps_the_order_of_the_left(a: list[ExpertId], b: list[ExpertId]) -> None:
    left, right = ExpertSet(a), ExpertSet(b)
    assert list(left) == list(dict.fromkeys(a)) and len(left) == len(set(a))
    assert list(left | right) == list(dict.fromkeys(a + b))
    assert list(left & right) == [i for i in left if i in b]
    assert list(left - right) == [i for i in left if i not in b]
    assert all(i in left for i in a) and ExpertId(1000, 0) not in left


@given(lists)
def test_equality_and_hash_see_the_order(a: list[ExpertId]) -> None:
    one, two = ExpertSet(a), ExpertSet(list(dict.fromkeys(a)))
    assert one == two and hash(one) == hash(two)
    backwards = ExpertSet(reversed(list(one)))
    assert (one == backwards) == (len(one) < 2)
    assert one != set(a)


def test_by_layer_sorts_layers_and_keeps_the_order_inside() -> None:
    group = ExpertSet([ExpertId(3, 7), ExpertId(1, 2), ExpertId(3, 1)])
    assert group.by_layer() == {1: [2], 3: [7, 1]} and list(group.by_layer()) == [1, 3]
    assert repr(group) == "ExpertSet(3.7, 1.2, 3.1)"
    assert all(isinstance(i, ExpertId) for i in ExpertSet([(1, 2)]))  # type: ignore[list-item]
