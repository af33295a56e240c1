"""What serves a request: knowledge bases that answer it with passages."""

from .grounding import Citation, Grounded, ground, question
from .knowledge import KnowledgeBase, Passage

__all__ = ["Citation", "Grounded", "KnowledgeBase", "Passage", "ground", "question"]
