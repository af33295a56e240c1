"""Which request holds which page of the latent pool, and which pages are kept for their prefix.

A page (PAGE positions) is in one of three states:

    free       ref_count 0, its contents are not needed
    held       by one request or several, which then share a prefix
    evictable  ref_count 0, but in the prefix tree (prefix_tree.py): it serves requests that begin with the same tokens.
               The one released longest ago is evicted first, leaves before their parents

Of a prefix's last page the first positions may match alone: they are copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ..model.adapters import Adapter
from ..model.cache import PAGE, LatentPool
from .prefix_tree import PrefixNode, PrefixTree, Token


class BlockTable:
    """The pages of one sequence, in the order of its positions; `nodes` are the tree's for the first of them."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.nodes: list[PrefixNode] = []

    @property
    def num_inserted(self) -> int:
        """How many of the pages are in the prefix tree, full ones."""
        return len(self.nodes)


class BlockManager:
    """Allocates and frees the pages of a pool. prefix_cache: whether pages are kept for their prefix."""

    def __init__(self, pool: LatentPool, *, prefix_cache: bool = True) -> None:
        self.pool, self.prefix_cache = pool, prefix_cache
        self.count = pool.data.shape[1]
        self.free_pages = list(range(self.count - 1, -1, -1))
        self.ref_count = [0] * self.count
        self.tree = PrefixTree()
        self.evictable: OrderedDict[int, None] = OrderedDict()  # the one released longest ago first

    @property
    def available(self) -> int:
        return len(self.free_pages) + len(self.evictable)

    def allocate(self, table: BlockTable, positions: int) -> bool:
        """Give the table room for `positions` in all; False, and nothing allocated, if there are too few pages."""
        need = pages_needed(positions) - len(table.pages)
        if need > self.available:
            return False
        for _ in range(need):
            page = self._allocate_page()
            self.ref_count[page] = 1
            table.pages.append(page)
        return True

    def free(self, table: BlockTable) -> None:
        """Release all pages of a table. The last first, so that ends of prefixes are evicted before beginnings."""
        for page in reversed(table.pages):
            self.ref_count[page] -= 1
            if self.ref_count[page] == 0:
                if page in self.tree:
                    self.evictable[page] = None
                else:
                    self.free_pages.append(page)
        table.pages, table.nodes = [], []

    def _allocate_page(self) -> int:
        if self.free_pages:
            return self.free_pages.pop()
        page = next(page for page in self.evictable if self.tree.is_leaf(page))
        self.tree.remove(page)
        del self.evictable[page]
        return page

    def match_prefix(self, table: BlockTable, tokens: Sequence[Token], adapter: Adapter | None = None) -> int:
        """Fill an empty table with the cached pages of the longest known prefix of `tokens`; returns its positions."""
        assert not table.pages
        if not self.prefix_cache:
            return 0
        node, at = self.tree.root(adapter), 0
        while at < len(tokens):
            child, common = self.tree.nearest_child(node, tokens, at)
            if child is None:
                break
            if common < PAGE:
                if not self.available:
                    break
                self._acquire(child.page)  # so that it is not the one evicted
                at += common if self._copy(table, child.page, common) else 0
                self._release(child.page)
                break
            self._acquire(child.page)
            table.pages.append(child.page)
            table.nodes.append(child)
            node, at = child, at + PAGE
        return at

    def insert_prefix(self, table: BlockTable, tokens: Sequence[Token], adapter: Adapter | None = None) -> None:
        """Insert computed pages; on a duplicate, switch to the cached page, which holds the same numbers, and free
        ours."""
        if not self.prefix_cache:
            return
        while table.num_inserted * PAGE < len(tokens):
            index = table.num_inserted
            at, page = index * PAGE, table.pages[index]
            full = len(tokens) - at >= PAGE
            node = self.tree.insert(page, tokens, at, table.nodes[-1] if table.nodes else self.tree.root(adapter))
            if not full:
                return
            if node.page != page:
                self._acquire(node.page)
                table.pages[index] = node.page
                self.ref_count[page] -= 1
                self.free_pages.append(page)
            table.nodes.append(node)

    def _copy(self, table: BlockTable, source: int, positions: int) -> bool:
        if not self.allocate(table, (len(table.pages) + 1) * PAGE):
            return False
        self.pool.copy(source, table.pages[-1], positions)
        return True

    def _acquire(self, page: int) -> None:
        self.ref_count[page] += 1
        self.evictable.pop(page, None)

    def _release(self, page: int) -> None:
        self.ref_count[page] -= 1
        if self.ref_count[page] == 0:
            self.evictable[page] = None

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raises AssertionError where a page is lost, held by the wrong number, or in two states."""
        held: dict[int, int] = {}
        for table in tables:
            assert len(set(table.pages)) == len(table.pages)
            for page in table.pages:
                held[page] = held.get(page, 0) + 1
        free, evictable = set(self.free_pages), set(self.evictable)
        assert len(free) == len(self.free_pages)
        assert not free & evictable and not free & set(held) and not evictable & set(held)
        assert free | evictable | set(held) == set(range(self.count))
        assert all(self.ref_count[page] == held.get(page, 0) for page in range(self.count))
        assert evictable <= set(self.tree.nodes) and not free & set(self.tree.nodes)
        self.tree.check_integrity()


def pages_needed(positions: int) -> int:
    return -(-positions // PAGE)
