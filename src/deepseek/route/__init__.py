"""What serves a request: members of a pool that fit it, and knowledge bases that answer it with passages.

Nothing here needs torch. The public names are loaded when first used (PEP 562): a worker that reads a document needs
no numpy, whose threads' memory would count against its limit.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .composite import Segment as Segment
    from .composite import route_segments as route_segments
    from .composite import split as split
    from .grounding import Citation as Citation
    from .grounding import Grounded as Grounded
    from .grounding import ground as ground
    from .grounding import question as question
    from .knowledge import KnowledgeBase as KnowledgeBase
    from .knowledge import Passage as Passage
    from .member import PoolMember as PoolMember
    from .pool import ExpertPool as ExpertPool
    from .routing import BASE as BASE
    from .routing import Fusion as Fusion
    from .routing import RoutedPart as RoutedPart
    from .routing import RoutingDecision as RoutingDecision
    from .routing import calculate_relevance as calculate_relevance
    from .routing import dynamic_routing as dynamic_routing
    from .routing import extract_keywords as extract_keywords
    from .routing import fuse_expert_outputs as fuse_expert_outputs

_WHERE = {
    "BASE": "routing",
    "Citation": "grounding",
    "ExpertPool": "pool",
    "Fusion": "routing",
    "Grounded": "grounding",
    "KnowledgeBase": "knowledge",
    "Passage": "knowledge",
    "PoolMember": "member",
    "RoutedPart": "routing",
    "RoutingDecision": "routing",
    "Segment": "composite",
    "calculate_relevance": "routing",
    "dynamic_routing": "routing",
    "extract_keywords": "routing",
    "fuse_expert_outputs": "routing",
    "ground": "grounding",
    "question": "grounding",
    "route_segments": "composite",
    "split": "composite",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
