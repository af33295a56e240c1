"""Text -> expert-labelled records -> token shards. The names are loaded when first used: reading needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mapping import RecordMap as RecordMap
    from .reader import Problem as Problem
    from .reader import ReadReport as ReadReport
    from .reader import list_files as list_files
    from .reader import read_documents as read_documents
    from .records import Document as Document
    from .shards import TokenShards as TokenShards
    from .shards import pack as pack
    from .shards import pack_cached as pack_cached

_WHERE = {"Document": "records", "Problem": "reader", "ReadReport": "reader", "RecordMap": "mapping",
          "TokenShards": "shards", "list_files": "reader", "pack": "shards", "pack_cached": "shards",
          "read_documents": "reader"}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
