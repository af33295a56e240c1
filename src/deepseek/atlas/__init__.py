"""Measures which experts serve which domain, and gives them names."""

from .accuracy import RoutingAccuracy
from .atlas import Atlas, NamedGroup
from .profile import profile
from .selection import select_experts
from .usage import ExpertUsage

__all__ = ["Atlas", "ExpertUsage", "NamedGroup", "RoutingAccuracy", "profile", "select_experts"]
