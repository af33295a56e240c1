"""What serves a request: members of a pool that fit it, and knowledge bases that answer it with passages.

Nothing here needs torch.
"""

from .composite import Segment, route_segments, split
from .grounding import Citation, Grounded, ground, question
from .knowledge import KnowledgeBase, Passage
from .member import PoolMember
from .pool import ExpertPool
from .routing import (
    BASE,
    Fusion,
    RoutedPart,
    RoutingDecision,
    calculate_relevance,
    dynamic_routing,
    extract_keywords,
    fuse_expert_outputs,
)

__all__ = [
    "BASE", "Citation", "ExpertPool", "Fusion", "Grounded", "KnowledgeBase", "Passage", "PoolMember",
    "RoutedPart", "RoutingDecision", "Segment", "calculate_relevance", "dynamic_routing", "extract_keywords",
    "fuse_expert_outputs", "ground", "question", "route_segments", "split",
]
