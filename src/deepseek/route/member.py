"""A member of a pool, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ..errors import ConfigError, nearest, shown
from ..settings import is_number
from .knowledge import KnowledgeBase, Passage
from .routing import BASE

MemberKind = Literal["experts", "adapter", "knowledge"]
KINDS = get_args(MemberKind)
MOST_WEIGHT = 1e6  # of a keyword; sums of them are FP32


@dataclass(frozen=True)
class PoolMember:
    """An expert of a pool. kind: `experts` (a named group of the model's atlas, by its name), `adapter` (a LoRA adapter
    or an expert delta) or `knowledge` (a knowledge base); the last two lie at `path`. domain: what it is for, in words.
    keywords: {keyword: weight}, or those of weight None, which follows from how many members share them. samples: texts
    as requests of its domain look. Raises ConfigError naming key, rule and value."""

    name: str
    domain: str
    kind: MemberKind = "experts"
    path: Path | None = None
    keywords: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    samples: Sequence[str] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        for key in ("name", "domain"):
            if not isinstance(value := getattr(self, key), str) or not value.strip():
                raise ConfigError(f"{key} = {shown(value)}: must be a text that is not empty")
        if not self.name.isprintable() or self.name == BASE.name:
            raise ConfigError(f"name = {self.name!r}: must be printable, and not {BASE.name!r}, the model "
                              "itself")
        if self.kind not in KINDS:
            raise ConfigError(f"kind = {shown(self.kind)}: must be {', '.join(KINDS[:-1])} or {KINDS[-1]}"
                              f"{nearest(str(self.kind), KINDS)}")
        if self.kind == "experts" and self.path is not None:
            raise ConfigError(f"path = {shown(str(self.path))}: must not be given with kind experts, which the model "
                              "itself holds")
        if self.kind != "experts" and self.path is None:
            raise ConfigError(f"path: must be given with kind {self.kind}")
        words = self.keywords
        if not isinstance(words, Mapping | list | tuple):
            raise ConfigError(f"keywords = {shown(words)}: must be a list of texts, or of texts with weights")
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise ConfigError(f"keywords: {shown(word)}: must be a text that is not empty")
        words = words if isinstance(words, Mapping) else dict.fromkeys(words)
        for word, weight in words.items():
            if weight is not None and (not is_number(weight) or not 0 < weight <= MOST_WEIGHT):
                raise ConfigError(f"keywords: {word} = {shown(weight)}: must be a positive number, at most "
                                  f"{MOST_WEIGHT:g}")
        object.__setattr__(self, "keywords", words)
        if not isinstance(self.samples, list | tuple) or not all(isinstance(text, str) for text in self.samples):
            raise ConfigError(f"samples = {shown(self.samples)}: must be a list of texts")
        if self.kind == "knowledge":
            object.__setattr__(self, "_base", KnowledgeBase(Path(self.path or "")))

    def passages(self, text: str, top_k: int = 3) -> list[Passage]:
        """What a member of kind knowledge has to say to a text: the passages that fit it best, the best first, none
        where no term of it stands in the base. The base is opened by the first call; what is added to it or removed
        from it later counts. Threads may call it. Raises ConfigError for a member of another kind, NotFoundError where
        there is no base (any more)."""
        base: KnowledgeBase | None = getattr(self, "_base", None)
        if base is None:
            raise ConfigError(f"member = {self.name!r}: has no passages: its kind is {self.kind}, must be knowledge")
        return base.search(text, top_k)
