"""Text -> documents -> token shards."""

from __future__ import annotations

from .reader import Document, Problem, ReadReport, list_files, read_documents
from .shards import TokenShards, pack, pack_cached

__all__ = ["Document", "Problem", "ReadReport", "TokenShards", "list_files", "pack", "pack_cached", "read_documents"]
