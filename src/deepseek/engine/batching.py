"""Tasks -> batches of one expert type each, for callers outside the engine (scheduler.py forms those inside)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError


@dataclass(frozen=True)
class Batch:
    """Tasks that run together; expert_type: what they have in common, None for those of which nothing is said."""

    expert_type: str | None
    tasks: tuple[Any, ...]


def dynamic_batching(tasks: Iterable[Any], batch_size: int = 32) -> list[Batch]:
    """Group tasks by `expert_type` (an attribute or a key) and cut every group into batches, in the order to run them.

    The size of a group's batches adapts to its queue: with `batch_size` tasks a round in all, n of N tasks waiting get
    batch_size * n / N of a round's places, at least one; so no group waits for the end of another, and within one the
    order stays. Batches of a round stand together, the group whose task came first leading.
    Raises RequestError for a task without expert_type, and for a batch_size below 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise RequestError(f"batch_size = {batch_size!r}: must be an integer >= 1")
    groups: dict[str | None, list[Any]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_type_of(task, i), []).append(task)
    total = sum(map(len, groups.values()))
    sizes = {name: min(batch_size, max(1, -(-batch_size * len(own) // total))) for name, own in groups.items()}
    batches: list[Batch] = []
    start = dict.fromkeys(groups, 0)
    while any(start[name] < len(own) for name, own in groups.items()):
        for name, own in groups.items():
            if part := own[start[name] : start[name] + sizes[name]]:
                batches.append(Batch(name, tuple(part)))
                start[name] += len(part)
    return batches


def _type_of(task: Any, number: int) -> str | None:
    if isinstance(task, Mapping) and "expert_type" in task:
        found = task["expert_type"]
    elif hasattr(task, "expert_type"):
        found = task.expert_type
    else:
        raise RequestError(f"task {number} ({type(task).__name__}) has no expert_type")
    if found is not None and not isinstance(found, str):
        raise RequestError(f"task {number}: expert_type = {found!r}: must be a name or None")
    return found
