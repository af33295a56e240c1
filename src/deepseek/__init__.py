"""MoE-DR: an open implementation of the DeepSeek-V3 system. The public names, loaded when first used (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .atlas import Atlas as Atlas
    from .atlas import select_experts as select_experts
    from .checkpoint import load_model as load_model
    from .checkpoint import save_model as save_model
    from .config import ModelConfig as ModelConfig
    from .convert import quantize as quantize
    from .engine import LLM as LLM
    from .engine import SamplingParams as SamplingParams
    from .engine import dynamic_batching as dynamic_batching
    from .ids import ExpertId as ExpertId
    from .tokenizer import Tokenizer as Tokenizer
    from .tune import LoRAAdapter as LoRAAdapter
    from .tune import MoEFineTuner as MoEFineTuner

_WHERE = {
    "Atlas": "atlas",
    "ExpertId": "ids",
    "LLM": "engine",
    "LoRAAdapter": "tune",
    "MoEFineTuner": "tune",
    "ModelConfig": "config",
    "SamplingParams": "engine",
    "Tokenizer": "tokenizer",
    "dynamic_batching": "engine",
    "load_model": "checkpoint",
    "quantize": "convert",
    "save_model": "checkpoint",
    "select_experts": "atlas",
}
__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
