"""ids -> logits."""

from .cache import LatentCache
from .gate import Gate, Route, expert_load, group_weight, max_violation
from .transformer import CausalLM, RoutingRecord, TrainingLoss

__all__ = ["CausalLM", "Gate", "LatentCache", "Route", "RoutingRecord", "TrainingLoss", "expert_load", "group_weight",
           "max_violation"]
