"""MoE-DR: an open implementation of the DeepSeek-V3 system. The public names, loaded when first used (PEP 562).

Importing it sets GOMP_SPINCOUNT, which libgomp reads when torch is imported, unless it or OMP_WAIT_POLICY is set.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .atlas import Atlas as Atlas
    from .atlas import select_experts as select_experts
    from .checkpoint import load_model as load_model
    from .checkpoint import save_model as save_model
    from .config import ModelConfig as ModelConfig
    from .convert import pull as pull
    from .convert import quantize as quantize
    from .convert import upcycle as upcycle
    from .deepopt import Trainer as Trainer
    from .engine import LLM as LLM
    from .engine import SamplingParams as SamplingParams
    from .engine import dynamic_batching as dynamic_batching
    from .ids import ExpertId as ExpertId
    from .route import ExpertPool as ExpertPool
    from .route import KnowledgeBase as KnowledgeBase
    from .route import calculate_relevance as calculate_relevance
    from .route import dynamic_routing as dynamic_routing
    from .route import extract_keywords as extract_keywords
    from .route import fuse_expert_outputs as fuse_expert_outputs
    from .tokenizer import Tokenizer as Tokenizer
    from .tune import LoRAAdapter as LoRAAdapter
    from .tune import MoEFineTuner as MoEFineTuner

_WHERE = {
    "Atlas": "atlas",
    "ExpertId": "ids",
    "ExpertPool": "route",
    "KnowledgeBase": "route",
    "LLM": "engine",
    "LoRAAdapter": "tune",
    "MoEFineTuner": "tune",
    "ModelConfig": "config",
    "SamplingParams": "engine",
    "Tokenizer": "tokenizer",
    "Trainer": "deepopt",
    "calculate_relevance": "route",
    "dynamic_batching": "engine",
    "dynamic_routing": "route",
    "extract_keywords": "route",
    "fuse_expert_outputs": "route",
    "load_model": "checkpoint",
    "pull": "convert",
    "quantize": "convert",
    "save_model": "checkpoint",
    "select_experts": "atlas",
    "upcycle": "convert",
}
__all__ = sorted(_WHERE)
__version__ = "0.1.0"

# Threads that wait for each other by spinning stall for whole time slices when a neighbor takes a core: training ran 4
# times slower than with short spins, which cost 3 % alone (docs/log.md).
_SPINS = "1000"


def _short_spins() -> None:
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    elif _libgomp_is_loaded():
        warnings.warn("torch was imported before deepseek, so its threads wait by long spinning, which is several "
                      "times slower when other programs use the cores: import deepseek first, or set "
                      f"GOMP_SPINCOUNT={_SPINS} before Python starts", RuntimeWarning, stacklevel=3)


def _libgomp_is_loaded() -> bool:
    """Whether torch's OpenMP is GNU's, the one that reads GOMP_SPINCOUNT; False where the system does not tell."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


_short_spins()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
