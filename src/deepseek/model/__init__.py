"""ids -> logits."""

from typing import TYPE_CHECKING

from ..deprecation import renamed
from .gate import Gate, Route, expert_load, group_weight, max_violation
from .transformer import CausalLM, RoutingRecord, TrainingLoss, describe

__all__ = ["CausalLM", "Gate", "Route", "RoutingRecord", "TrainingLoss", "describe", "expert_load",
           "group_weight", "max_violation"]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"LatentCache": "deepseek.model.cache.BatchCache"})
