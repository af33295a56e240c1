"""The tokens of a request, and how far the model has run over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..model.adapters import Adapter
from ..model.cache import Chunk
from .block_manager import BlockTable
from .prefix_tree import Token


class SequenceState:
    """A prompt's tokens, then the sampled ones. The latents of the first `num_computed_tokens` positions are in the
    pages of `block_table`; later ones are still to be run."""

    def __init__(self, prompt_ids: Sequence[int], adapter: Adapter | None) -> None:
        self.prompt_ids, self.adapter = list(prompt_ids), adapter
        self.token_ids: list[int] = []
        self.attn_impl: Literal["naive", "absorbed"] = "naive"  # of its prompt's tokens (model/mla.py)
        self.block_table = BlockTable()
        self.num_computed_tokens = 0
        self.num_drafted_tokens = 0  # positions that the MTP module has run over
        self.draft_token: int | None = None  # a guess at the token after the last
        self.cached_tokens = 0  # of the prompt, found in the prefix cache
        self.last_step = 0  # the step that ran it last

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def prefilling(self) -> bool:
        return self.num_computed_tokens < len(self.prompt_ids)

    def token(self, position: int) -> int:
        prompt = len(self.prompt_ids)
        return self.prompt_ids[position] if position < prompt else self.token_ids[position - prompt]

    def tokens(self, start: int, stop: int) -> list[int]:
        return [self.token(i) for i in range(start, stop)]

    def prefix_key(self, stop: int) -> list[Token]:
        """The first `stop` tokens as the prefix tree names them."""
        prompt = len(self.prompt_ids) if self.attn_impl == "naive" else 0
        return [(self.token(i), i < prompt) for i in range(stop)]

    def chunk(self, most: int) -> Chunk:
        """The next tokens to run, at most `most`, all in one order; a draft is one of them."""
        end = len(self.prompt_ids) if self.prefilling else self.length + (self.draft_token is not None)
        return Chunk(min(most, end - self.num_computed_tokens), self.num_computed_tokens, self.block_table.pages,
                     self.attn_impl if self.prefilling else "absorbed", self.adapter)

    def restart(self, computed: int = 0) -> None:
        """Only the first `computed` positions are in the pages."""
        self.num_computed_tokens = self.num_drafted_tokens = computed
        self.draft_token = None
