"""Who holds which page of the latent pool, and which pages may serve again: a tree of prefixes.

A page (PAGE positions) is in one of three states:

    free      nobody's
    held      by one sequence or several, which then share a prefix
    kept      held by nobody, but in the tree: its latents are right for whoever comes with the same tokens; the page
              that was held longest ago is given out first, leaves before what they hang on

A node of the tree is a page with its tokens; its parent is the page before it. Each adapter has a tree of its own: what
was computed with it serves no other, nor the base. The last page of a prefix may be shared
in part: its first positions are copied. What a latent is depends on the tokens before it and on the order of MLA's
products in which they were computed (model/mla.py), so a token of the tree is a pair (id, in naive order): a prompt is
served from what was computed as prompt, and no request can tell whether it was served.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..model.cache import PAGE, LatentPool

Token = tuple[int, bool]


@dataclass(eq=False)
class Node:
    page: int
    tokens: tuple[Token, ...]  # PAGE of them, or fewer at the end of a prefix
    parent: Node | None
    children: dict[Token, list[Node]] = field(default_factory=dict)  # by their first token


class PageTable:
    """The pages of one sequence: `pages` in the order of its positions; the first `filed` of them are in the tree."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.nodes: list[Node] = []

    @property
    def filed(self) -> int:
        return len(self.nodes)


class Pages:
    """Gives pages out and takes them back. prefix_cache: whether pages are kept for their prefix."""

    def __init__(self, pool: LatentPool, *, prefix_cache: bool = True) -> None:
        self.pool, self.prefix_cache = pool, prefix_cache
        self.count = pool.data.shape[1]
        self.free = list(range(self.count - 1, -1, -1))
        self.holders = [0] * self.count
        self.roots: dict[str | None, Node] = {}  # by adapter
        self.filed: dict[int, Node] = {}
        self.kept: OrderedDict[int, None] = OrderedDict()  # pages in the tree that nobody holds, longest ago first

    @property
    def available(self) -> int:
        return len(self.free) + len(self.kept)

    # ---- give and take ------------------------------------------------------------------------------------------

    def extend(self, table: PageTable, positions: int) -> bool:
        """Give the table room for `positions` in all; False, and nothing given, where there are too few pages."""
        need = -(-positions // PAGE) - len(table.pages)
        if need > self.available:
            return False
        for _ in range(need):
            page = self._take()
            self.holders[page] = 1
            table.pages.append(page)
        return True

    def release(self, table: PageTable) -> None:
        """Take all pages of a table back. The last first, so that ends of prefixes are given out before beginnings."""
        for page in reversed(table.pages):
            self.holders[page] -= 1
            if self.holders[page] == 0:
                if page in self.filed:
                    self.kept[page] = None
                else:
                    self.free.append(page)
        table.pages, table.nodes = [], []

    def _take(self) -> int:
        if self.free:
            return self.free.pop()
        page = next(page for page in self.kept if not self.filed[page].children)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        node = self.filed.pop(page)
        self.kept.pop(page, None)
        assert node.parent is not None
        siblings = node.parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del node.parent.children[node.tokens[0]]

    # ---- prefixes -----------------------------------------------------------------------------------------------

    def root(self, adapter: str | None) -> Node:
        return self.roots.setdefault(adapter, Node(-1, (), None))

    def serve(self, table: PageTable, tokens: Sequence[Token], adapter: str | None = None) -> int:
        """Fill an empty table with what is known of a prefix of `tokens`; how many positions that is."""
        assert not table.pages
        if not self.prefix_cache:
            return 0
        node, at = self.root(adapter), 0
        while at < len(tokens):
            child, common = self._nearest(node, tokens, at)
            if child is None:
                break
            if common < PAGE:
                if not self.free and not self.kept:
                    break
                self._hold(child.page)  # so that it is not the one given out
                at += common if self._copy(table, child.page, common) else 0
                self._drop(child.page)
                break
            self._hold(child.page)
            table.pages.append(child.page)
            table.nodes.append(child)
            node, at = child, at + PAGE
        return at

    def _copy(self, table: PageTable, source: int, positions: int) -> bool:
        if not self.extend(table, (len(table.pages) + 1) * PAGE):
            return False
        self.pool.copy(source, table.pages[-1], positions)
        return True

    def _hold(self, page: int) -> None:
        self.holders[page] += 1
        self.kept.pop(page, None)

    def _drop(self, page: int) -> None:
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.kept[page] = None

    def _nearest(self, node: Node, tokens: Sequence[Token], at: int) -> tuple[Node | None, int]:
        """The child that shares most of tokens[at:], and how much."""
        best, most = None, 0
        for child in node.children.get(tokens[at], ()):
            common = _common(child.tokens, tokens, at)
            if common > most:
                best, most = child, common
        return best, most

    def file(self, table: PageTable, tokens: Sequence[Token], adapter: str | None = None) -> None:
        """Put the pages of `tokens`, all of them computed, into the tree; a page that is there already is taken in the
        place of the table's own, which holds the same numbers."""
        if not self.prefix_cache:
            return
        while table.filed * PAGE < len(tokens):
            at, index = table.filed * PAGE, table.filed
            mine = tuple(tokens[at : at + PAGE])
            parent = table.nodes[-1] if table.nodes else self.root(adapter)
            page = table.pages[index]
            if page in self.filed:  # filed when it was not full yet
                node = self.filed[page]
                node.tokens = mine if len(mine) > len(node.tokens) else node.tokens
                if len(mine) < PAGE:
                    return
                table.nodes.append(node)
                continue
            twin, common = self._nearest(parent, tokens, at)
            if twin is not None and common == len(mine):
                if common < PAGE:
                    return
                self._hold(twin.page)
                table.pages[index] = twin.page
                table.nodes.append(twin)
                self.holders[page] -= 1
                self.free.append(page)
                continue
            node = Node(page, mine, parent)
            self.filed[page] = node
            parent.children.setdefault(mine[0], []).append(node)
            if len(mine) < PAGE:
                return
            table.nodes.append(node)

    # ---- invariants ---------------------------------------------------------------------------------------------

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError where a page is lost, held by the wrong number, or in two states."""
        held: dict[int, int] = {}
        for table in tables:
            assert len(set(table.pages)) == len(table.pages)
            for page in table.pages:
                held[page] = held.get(page, 0) + 1
        free, kept = set(self.free), set(self.kept)
        assert len(free) == len(self.free)
        assert not free & kept and not free & set(held) and not kept & set(held)
        assert free | kept | set(held) == set(range(self.count))
        assert all(self.holders[page] == held.get(page, 0) for page in range(self.count))
        assert kept <= set(self.filed) and not free & set(self.filed)
        for page, node in self.filed.items():
            assert node.page == page and node.parent is not None
            assert node in node.parent.children[node.tokens[0]]
            assert node.parent in self.roots.values() or (self.filed[node.parent.page] is node.parent
                                                and len(node.parent.tokens) == PAGE)


def _common(ours: Sequence[Token], tokens: Sequence[Token], at: int) -> int:
    limit = min(len(ours), len(tokens) - at)
    if tuple(tokens[at : at + limit]) == tuple(ours[:limit]):
        return limit
    return next(i for i in range(limit) if ours[i] != tokens[at + i])
