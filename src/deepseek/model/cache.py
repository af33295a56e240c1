"""What attention remembers: the latents and rotary keys of past positions, R + rope numbers each.

    LatentCache   a rectangle: the rows of a batch of sequences that advance together
    LatentPool    pages; who holds which is the caller's affair (engine/block_manager.py)

A `PackedBatch` is one call over a pool: pieces of many sequences side by side, prompts and single tokens.

Shape letters: B batch, T tokens, S positions, C = R + rope.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from ..ops.latent import BLOCK, Sequences
from .adapters import Spans, side_by_side
from .gate import Route

PAGE = BLOCK  # positions of a page: what the attention kernels read in one piece

# (layer, what its gate decided for the tokens of the pack) -> what is to be done instead
Control = Callable[[int, Route], Route]


class LatentCache:
    """Latents and rotary keys of the positions seen so far, for all layers: [layers, B, capacity, R + rope].

    Grows by doubling. `length` positions are filled; the model advances it once per forward pass. `valid_BS` marks the
    positions that are not padding (None while there has been none).
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int = 256, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        shape = (config.num_hidden_layers, batch, capacity, config.latent_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.valid_BS: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.data.shape[1]

    def reserve(self, more: int) -> None:
        """Make room for `more` positions after the current ones."""
        need, capacity = self.length + more, self.data.shape[2]
        if need > capacity:
            grown = self.data.new_empty(*self.data.shape[:2], max(need, 2 * capacity), self.data.shape[3])
            grown[:, :, : self.length] = self.data[:, :, : self.length]
            self.data = grown

    def slot(self, layer: int, tokens: int) -> Tensor:
        """One layer's rows with room for `tokens` more, [B, length + tokens, R + rope], to be written in place."""
        return self.data[layer, :, : self.length + tokens]

    def extend(self, layer: int, latent_BTC: Tensor) -> Tensor:
        """Write one layer's new positions; returns all of that layer's, [B, length + T, R + rope].

        A cache is for inference: no gradient flows through it, so it never holds on to a graph.
        """
        end = self.length + latent_BTC.shape[1]
        self.data[layer, :, self.length : end] = latent_BTC.detach()
        return self.data[layer, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep (and reorder to) the batch rows given."""
        self.data = self.data[:, rows]
        if self.valid_BS is not None:
            self.valid_BS = self.valid_BS[rows]


class LatentPool:
    """`pages` pages of PAGE positions for `layers` layers: [layers, pages, PAGE, R + rope]. Memory of pages that were
    never written is not touched."""

    def __init__(self, config: ModelConfig, pages: int, *, layers: int | None = None,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        shape = (config.num_hidden_layers if layers is None else layers, pages, PAGE, config.latent_dim)
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
    adapter: the LoRA adapter of its tokens (model/adapters.py), None for the base alone.
    """

    tokens: int
    past: int
    pages: Sequence[int]
    attn_impl: Literal["naive", "absorbed"]
    adapter: str | None = None


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

    def read(self, layer: int) -> Iterator[tuple[Chunk, slice, Tensor]]:
        """Each chunk, its place among the tokens, and all its positions' rows of one layer, a copy, [1, S, C]."""
        start = 0
        for chunk in self.chunks:
            length = chunk.past + chunk.tokens
            pages = torch.tensor(chunk.pages[: -(-length // PAGE)], device=self.pool.data.device)
            rows = self.pool.data[layer][pages].flatten(0, 1)[None, :length]
            yield chunk, slice(start, start + chunk.tokens), rows
            start += chunk.tokens
