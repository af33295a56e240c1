"""Batches of one expert type each: nothing lost, order kept, sizes that follow the queues."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek import dynamic_batching
from deepseek.errors import RequestError


@given(st.lists(st.sampled_from(["law", "code", None]), max_size=90), st.integers(1, 40))
def test_every_task_once_in_its_order_and_no_group_waits_for_another(kinds: list[str | None], size: int) -> None:
    tasks = [SimpleNamespace(expert_type=kind, number=i) for i, kind in enumerate(kinds)]
    batches = dynamic_batching(tasks, size)
    for kind in set(kinds):
        own = [task.number for batch in batches if batch.expert_type == kind for task in batch.tasks]
        assert own == [i for i, other in enumerate(kinds) if other == kind]
    assert all(1 <= len(batch.tasks) <= size for batch in batches)
    assert all(task.expert_type == batch.expert_type for batch in batches for task in batch.tasks)
    groups = len(set(kinds))
    first_round = [batch.expert_type for batch in batches[:groups]]
    assert len(set(first_round)) == groups  # all are served before any is served twice


def test_sizes_follow_the_queues() -> None:
    tasks = [{"expert_type": "code"}] * 40 + [{"expert_type": "law"}] * 8
    sizes = [(batch.expert_type, len(batch.tasks)) for batch in dynamic_batching(tasks, 24)]
    assert sizes == [("code", 20), ("law", 4), ("code", 20), ("law", 4)]


def test_bad_tasks() -> None:
    assert dynamic_batching([]) == []
    with pytest.raises(RequestError, match=r"task 1 \(dict\) has no expert_type"):
        dynamic_batching([{"expert_type": "a"}, {"type": "a"}])
    with pytest.raises(RequestError, match="task 0: expert_type = 3: must be a name"):
        dynamic_batching([{"expert_type": 3}])
    with pytest.raises(RequestError, match="batch_size = 0: must be an integer >= 1"):
        dynamic_batching([], 0)
