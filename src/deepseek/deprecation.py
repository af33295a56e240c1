"""Names that were renamed: the old one works for one release and warns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) that finds old names. names: old -> new, a name in `module`, or
    "deepseek.room.name". Assign it under `if not TYPE_CHECKING:`, or mypy takes every name for one of the module."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, _, new = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is deprecated: use {where or module}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(where or module), new)

    return find
