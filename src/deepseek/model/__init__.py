"""ids -> logits."""

from .cache import LatentCache
from .gate import Gate, Route, expert_load, group_weight, max_violation
from .transformer import CausalLM, RoutingRecord, TrainingLoss, describe

__all__ = ["CausalLM", "Gate", "LatentCache", "Route", "RoutingRecord", "TrainingLoss", "describe", "expert_load",
           "group_weight", "max_violation"]
