"""Names that were renamed: the old one works for one release and warns."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def warn(message: str) -> None:
    """Warn of the line that calls this package, be it from below torch, whose modules call ours."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("deepseek", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) that finds old names. names: old -> new, a name in `module`, or
    "deepseek.room.name". Assign it under `if not TYPE_CHECKING:`, or mypy takes every name for one of the module."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, _, new = names[name].rpartition(".")
        warn(f"{module}.{name} is deprecated: use {where or module}.{new}")
        return getattr(import_module(where or module), new)

    return find
