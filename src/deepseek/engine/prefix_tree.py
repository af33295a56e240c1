"""A tree of prefixes whose latents are cached: a node is a page with its tokens, its parent is the page before it.

Each adapter has a tree of its own: what was computed with it serves no other, nor the base. What a latent is depends on
the tokens before it and on the order of MLA's products in which they were computed (model/mla.py), so a token of the
tree is a pair (id, naive): a prompt is served from what was computed as prompt, and no request can tell
whether it was served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..model.adapters import Adapter
from ..model.cache import PAGE

Token = tuple[int, bool]


@dataclass(eq=False)
class PrefixNode:
    page: int
    tokens: tuple[Token, ...]  # PAGE of them, or fewer at the end of a prefix
    parent: PrefixNode | None
    children: dict[Token, list[PrefixNode]] = field(default_factory=dict)  # by their first token


class PrefixTree:
    def __init__(self) -> None:
        self.roots: dict[Adapter | None, PrefixNode] = {}  # by adapter
        self.nodes: dict[int, PrefixNode] = {}  # by page

    def __contains__(self, page: int) -> bool:
        return page in self.nodes

    def root(self, adapter: Adapter | None) -> PrefixNode:
        return self.roots.setdefault(adapter, PrefixNode(-1, (), None))

    def is_leaf(self, page: int) -> bool:
        return not self.nodes[page].children

    def nearest_child(self, node: PrefixNode, tokens: Sequence[Token], at: int) -> tuple[PrefixNode | None, int]:
        """The child that shares most of tokens[at:], and how many."""
        best, most = None, 0
        for child in node.children.get(tokens[at], ()):
            common = _common_length(child.tokens, tokens, at)
            if common > most:
                best, most = child, common
        return best, most

    def insert(self, page: int, tokens: Sequence[Token], at: int, parent: PrefixNode) -> PrefixNode:
        """Insert a page that holds tokens[at:], PAGE of them at most; returns the node of these tokens, which is that
        of another page if they are in the tree already. A page that was inserted before it was full grows."""
        own = tuple(tokens[at : at + PAGE])
        if (node := self.nodes.get(page)) is not None:
            node.tokens = own if len(own) > len(node.tokens) else node.tokens
            return node
        twin, common = self.nearest_child(parent, tokens, at)
        if twin is not None and common == len(own):
            return twin
        node = self.nodes[page] = PrefixNode(page, own, parent)
        parent.children.setdefault(own[0], []).append(node)
        return node

    def remove(self, page: int) -> None:
        node = self.nodes.pop(page)
        assert node.parent is not None
        siblings = node.parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del node.parent.children[node.tokens[0]]

    def check_integrity(self) -> None:
        """Raises AssertionError where a node and its parent disagree."""
        for page, node in self.nodes.items():
            assert node.page == page and node.parent is not None
            assert node in node.parent.children[node.tokens[0]]
            assert node.parent in self.roots.values() or (self.nodes[node.parent.page] is node.parent
                                                          and len(node.parent.tokens) == PAGE)


def _common_length(ours: Sequence[Token], tokens: Sequence[Token], at: int) -> int:
    limit = min(len(ours), len(tokens) - at)
    if tuple(tokens[at : at + limit]) == tuple(ours[:limit]):
        return limit
    return next(i for i in range(limit) if ours[i] != tokens[at + i])
