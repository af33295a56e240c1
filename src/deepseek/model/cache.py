"""What attention remembers: the latents and rotary keys of past positions, R + rope numbers each.

    LatentPool    pages; who holds which is the caller's affair (engine/block_manager.py)
    PackedBatch   one call over a pool: pieces of many sequences side by side, prompts and single tokens
    BatchCache    a pool of its own for a batch of sequences that advance together

Shape letters: T tokens, S positions, G chunks that are alike, C = R + rope.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from operator import add
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from ..deprecation import renamed
from ..ops.latent import BLOCK, Sequences
from .adapters import Adapter, Member, Share, Spans, shares, side_by_side
from .gate import Route

Impl = Literal["naive", "absorbed"]  # of attention (model/mla.py)
PAGE = BLOCK  # positions of a page: what the attention kernels read in one piece

# (layer, what its gate decided for the tokens of the pack) -> what is to be done instead
Control = Callable[[int, Route], Route]


class LatentPool:
    """`pages` pages of PAGE positions for `layers` layers: [layers, pages, PAGE, R + rope]. Memory of pages that were
    never written is not touched."""

    def __init__(self, config: ModelConfig, pages: int, *, layers: int | None = None,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        shape = (config.num_hidden_layers if layers is None else layers, pages, PAGE, config.latent_dim)
        with torch.inference_mode(False):  # its pages are written in other modes than that in which it is made
            if torch.device(device).type == "cpu":  # torch.zeros writes; the system hands out zeros as they are touched
                blank = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
                self.data = torch.frombuffer(blank, dtype=dtype, count=math.prod(shape)).view(shape)
            else:
                self.data = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def page_bytes(config: ModelConfig, layers: int | None = None, dtype: torch.dtype = torch.float32) -> int:
        layers = config.num_hidden_layers if layers is None else layers
        return layers * PAGE * config.latent_dim * dtype.itemsize

    def copy(self, source: int, target: int, positions: int) -> None:
        """The first positions of a page into another, in all layers."""
        self.data[:, target, :positions] = self.data[:, source, :positions]


@dataclass(frozen=True)
class Chunk:
    """The next `tokens` tokens of a sequence of which `past` positions are in its pages; the pages have room for both.

    attn_impl: naive for a prompt's tokens, absorbed for generated ones; a token's bits depend on it (model/mla.py).
    adapter: the LoRA adapter of its tokens, or a mixture (model/adapters.py), None for the base alone.
    """

    tokens: int
    past: int
    pages: Sequence[int]
    attn_impl: Impl
    adapter: Adapter | None = None


class PackedBatch:
    """Chunks side by side, naive attention first. control: changes what gates decide, None for exact routing.

    Raises ValueError for absorbed chunks before naive ones, and for chunks whose pages have no room for them.
    """

    def __init__(self, pool: LatentPool, chunks: Sequence[Chunk], control: Control | None = None) -> None:
        self.pool, self.chunks, self.control = pool, tuple(chunks), control
        self.naive = sum(chunk.attn_impl == "naive" for chunk in self.chunks)
        if any(chunk.attn_impl == "naive" for chunk in self.chunks[self.naive :]):
            raise ValueError("chunks of naive attention must come first")
        for chunk in self.chunks:
            if chunk.tokens < 1 or chunk.past + chunk.tokens > len(chunk.pages) * PAGE:
                raise ValueError(f"{chunk.past} + {chunk.tokens} positions do not fit {len(chunk.pages)} pages")

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @cached_property
    def spans(self) -> Spans:
        """The tokens of each adapter."""
        return side_by_side((chunk.adapter, chunk.tokens) for chunk in self.chunks)

    @cached_property
    def absorbed_shares(self) -> dict[Member, Share]:
        """The rows of each adapter among the tokens of absorbed attention."""
        return shares(side_by_side((chunk.adapter, chunk.tokens) for chunk in self.chunks[self.naive :]))

    @cached_property
    def positions(self) -> Tensor:
        positions = [i for chunk in self.chunks for i in range(chunk.past, chunk.past + chunk.tokens)]
        return torch.tensor(positions, device=self.pool.data.device)

    @cached_property
    def _rows(self) -> Tensor:
        """Where each token's row lies among a layer's rows, pages one after the other."""
        rows = []
        for chunk in self.chunks:
            at = torch.arange(chunk.past, chunk.past + chunk.tokens)
            rows.append(torch.tensor(chunk.pages)[at // PAGE] * PAGE + at % PAGE)
        return torch.cat(rows).to(self.pool.data.device)

    @cached_property
    def sequences(self) -> Sequences:
        """For the native kernels."""
        used = [-(-(chunk.past + chunk.tokens) // PAGE) for chunk in self.chunks]
        pages = torch.tensor([page for chunk, n in zip(self.chunks, used, strict=True) for page in chunk.pages[:n]])
        return Sequences(
            torch.tensor([*accumulate((chunk.tokens for chunk in self.chunks), initial=0)]),
            torch.tensor([chunk.past for chunk in self.chunks]), torch.tensor([*accumulate(used, initial=0)]),
            pages * self.pool.data.stride(1))

    def write(self, layer: int, latent_TC: Tensor) -> None:
        """The tokens' rows of one layer."""
        self.pool.data[layer].flatten(0, 1).index_copy_(0, self._rows, latent_TC.detach().to(self.pool.data.dtype))

    @cached_property
    def _groups(self) -> list[list[Chunk]]:
        """Chunks that can be read in one piece: alike but for their pages, which are ranges one after the other."""
        groups: list[list[Chunk]] = []
        for chunk in self.chunks:
            last = groups[-1][-1] if groups else None
            if last is not None and isinstance(last.pages, range) and replace(chunk, pages=last.pages) == last and (
                    chunk.pages == range(last.pages.stop, last.pages.stop + len(last.pages))):
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
        return groups

    def read(self, layer: int) -> Iterator[tuple[Chunk, slice, Tensor]]:
        """(chunk, place, rows): all positions' rows of one layer, [G, S, C], of G chunks like this one, whose place
        among the tokens this is. A view where their pages are ranges, else a copy."""
        data, start = self.pool.data[layer], 0
        for alike in self._groups:
            chunk, length = alike[0], alike[0].past + alike[0].tokens
            if isinstance(chunk.pages, range):
                rows = data.as_strided(
                    (len(alike), length, data.shape[2]), (len(chunk.pages) * data.stride(0), *data.stride()[1:]),
                    data.storage_offset() + chunk.pages[0] * data.stride(0))
            else:
                pages = torch.tensor(chunk.pages[: -(-length // PAGE)], device=data.device)
                rows = data[pages].flatten(0, 1)[None, :length]
            stop = start + len(alike) * chunk.tokens
            yield chunk, slice(start, stop), rows
            start = stop


class BatchCache:
    """A pool for a batch of sequences that advance together: the pages of each are a range. Grows by doubling.

    lengths: positions of each sequence; padding takes none. Made by `CausalLM.new_cache`.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int = 256, *, layers: int | None = None,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.lengths = [0] * batch
        self._new_pool = partial(LatentPool, config, layers=layers, dtype=dtype, device=device)
        self._pages = -(-capacity // PAGE)  # of a sequence
        self.pool = self._new_pool(batch * self._pages)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Positions of the longest sequence."""
        return max(self.lengths, default=0)

    def pack(self, counts: Sequence[int], attn_impl: Impl, adapter: Adapter | None) -> PackedBatch:
        """The sequences' next tokens, `counts` of each; one without any has no chunk. `advance` counts them in."""
        need = -(-max(map(add, self.lengths, counts)) // PAGE)
        if need > self._pages:
            self._move(range(self.batch), max(need, 2 * self._pages))
        return PackedBatch(self.pool, [
            Chunk(count, past, range(b * self._pages, (b + 1) * self._pages), attn_impl, adapter)
            for b, (count, past) in enumerate(zip(counts, self.lengths, strict=True)) if count])

    def advance(self, counts: Sequence[int]) -> None:
        self.lengths = list(map(add, self.lengths, counts))

    def select(self, rows: Tensor) -> None:
        """Keep, and reorder to, the sequences given by an index or a mask."""
        kept = torch.arange(self.batch)[rows.cpu()].tolist()
        self._move(kept, self._pages)
        self.lengths = [self.lengths[b] for b in kept]

    def _move(self, rows: Sequence[int], pages: int) -> None:
        """Lay the pages of these sequences in a new pool, `pages` of each."""
        old, used = self.pool.data.unflatten(1, (-1, self._pages)), -(-self.length // PAGE)
        self.pool, self._pages = self._new_pool(len(rows) * pages), pages
        self.pool.data.unflatten(1, (-1, pages))[:, :, :used] = old[:, list(rows), :used]


if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"LatentCache": "BatchCache"})
