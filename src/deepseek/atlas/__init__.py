"""Which experts serve what."""

from .usage import ExpertUsage

__all__ = ["ExpertUsage"]
