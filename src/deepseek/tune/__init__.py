"""Checkpoint + records -> adapted experts. The names are loaded when first used: settings need no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora import LoRAAdapter as LoRAAdapter
    from .report import TuneReport as TuneReport
    from .tuner import MoEFineTuner as MoEFineTuner

_WHERE = {"LoRAAdapter": "lora", "MoEFineTuner": "tuner", "TuneReport": "report"}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
