"""Requests -> tokens. The names are loaded when first used: the command line's flags need no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batching import Batch as Batch
    from .batching import dynamic_batching as dynamic_batching
    from .engine import Engine as Engine
    from .llm import LLM as LLM
    from .options import EngineOptions as EngineOptions
    from .request import RequestOutput as RequestOutput
    from .routing_override import ExpertControl as ExpertControl
    from .sampling_params import SamplingParams as SamplingParams

_WHERE = {"LLM": "llm", "Batch": "batching", "Engine": "engine", "EngineOptions": "options",
          "ExpertControl": "routing_override", "RequestOutput": "request", "SamplingParams": "sampling_params",
          "dynamic_batching": "batching"}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
