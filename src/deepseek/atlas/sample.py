"""Documents -> a bounded random sample of windows, each with the document it came from.

A text is cut into pieces of about a window; every piece draws a random number, and those with the lowest are kept while
the budget of characters lasts. So each token of the data has the same chance, wherever it stands, in one pass and in
memory bounded by the budget. A conversation is one piece, in the words of the chat template.

`units` are what tests and splits shuffle: documents, or the pieces themselves where there are too few documents.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig
from ..conversation import of_turns
from ..data import Document
from ..errors import ConfigError, DataError, RequestError
from ..files import sha256
from ..model import CausalLM, RoutingRecord
from ..spoken import encode_conversation
from ..tokenizer import Tokenizer

SEQ_LEN = 512
CHARACTERS = 4  # a token, to cut pieces; a longer piece loses its end
BUDGET = 2 * CHARACTERS  # characters kept for each token wanted: text with long tokens must suffice too
LEAST_DOCUMENTS = 8
BATCH_TOKENS = 4096


class Window(NamedTuple):
    """Token ids, from the beginning of text (where the tokenizer has one) on, and the unit they belong to."""

    unit: int
    ids: list[int]


@dataclass(frozen=True)
class Sample:
    """Windows of one name. tokens: those that count (the beginning of text does not); files: (name, SHA-256)."""

    windows: list[Window]
    units: int
    documents: int
    tokens: int
    files: tuple[tuple[str, str | None], ...]


def window_length(config: ModelConfig, seq_len: int | None) -> int:
    """The length given, or the usual one; raises ConfigError for one that the model does not take."""
    most = config.max_position_embeddings
    if seq_len is None:
        return min(SEQ_LEN, most)
    if not 2 <= seq_len <= most:
        raise ConfigError(f"seq_len = {seq_len}: must lie in 2..{most} (max_position_embeddings)")
    return seq_len


def draw(name: str, documents: Iterable[Document], tokenizer: Tokenizer, *, seq_len: int, tokens: int,
         seed: int) -> Sample:
    """A random sample of about `tokens` tokens in windows of at most `seq_len`; the same for the same arguments.

    Raises ConfigError for no tokens, DataError, naming `name`, when there is no text.
    """
    if tokens < 1:
        raise ConfigError(f"tokens = {tokens}: must be an integer >= 1")
    generator = random.Random(f"{seed}/{name}")
    kept: list[tuple[float, int, int, Document]] = []  # a heap, the highest key on top: (-key, order, document, piece)
    sources: dict[str, None] = {}
    characters = order = 0
    for number, document in enumerate(documents):
        sources[document.source] = None
        for piece in _pieces(document, seq_len * CHARACTERS):
            order += 1
            heapq.heappush(kept, (-generator.random(), order, number, piece))
            characters += len(piece.text)
            while characters - len(kept[0][3].text) >= tokens * BUDGET:
                characters -= len(heapq.heappop(kept)[3].text)
    kept.sort(reverse=True)
    texts = [piece for *_, piece in kept]
    begin = 0 if tokenizer.bos_id is None else 1
    found: list[tuple[int, list[int]]] = []
    total = 0
    for (_, _, number, _), ids in zip(kept, _encode(name, texts, tokenizer), strict=True):
        if total >= tokens:
            break
        if len(ids := ids[:seq_len]) > begin:
            found.append((number, ids))
            total += len(ids) - begin
    if not found:
        raise DataError(f"{name}: there is no text to measure" if name else "there is no text to measure")
    numbers = dict.fromkeys(number for number, _ in found)
    few = len(numbers) < LEAST_DOCUMENTS
    place = {number: i for i, number in enumerate(numbers)}
    windows = [Window(i if few else place[number], ids) for i, (number, ids) in enumerate(found)]
    files = tuple((_label(path), sha256(path) if path.is_file() else None) for path in map(Path, sources))
    return Sample(windows, len(windows) if few else len(numbers), len(numbers), total, files)


def _pieces(document: Document, characters: int) -> Iterator[Document]:
    if document.turns or len(document.text) <= characters:
        yield document
        return
    for begin in range(0, len(document.text), characters):
        yield replace(document, text=document.text[begin : begin + characters])


def _encode(name: str, texts: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    plain = iter(tokenizer.encode_batch([d.text for d in texts if not _spoken(d, tokenizer)], bos=True))
    for document in texts:
        if not _spoken(document, tokenizer):
            yield next(plain)
            continue
        messages, tools, variables = of_turns(document.turns)
        try:
            tokenizer.check_variables(variables)
            ids = encode_conversation(messages, tokenizer, tools=tools, **variables)
        except RequestError as error:
            raise DataError(f"{name}: {document.source}: {error}") from None
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        yield ids if ids[:1] == begin else begin + ids


def _spoken(document: Document, tokenizer: Tokenizer) -> bool:
    return bool(document.turns) and tokenizer.has_chat_template


def _label(source: Path) -> str:
    """Enough to recognise a file by, and nothing of the machine it lay on."""
    return "/".join(source.parts[-2:])


# ---- through the model ------------------------------------------------------------------------------------------


class RoutedBatch(NamedTuple):
    """Windows that went through the model together. counted_BT: False for padding and the beginning of text."""

    windows: list[int]
    routing: RoutingRecord
    counted_BT: Tensor


@torch.no_grad()
def route(model: CausalLM, windows: Sequence[Window], tokenizer: Tokenizer) -> Iterator[RoutedBatch]:
    """Run all windows through the layers, not the head, the longest first. A batch names its places in `windows`."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    while order:
        length = len(windows[order[0]].ids)
        size = max(1, BATCH_TOKENS // length)
        chosen, order = order[:size], order[size:]
        ids_BT = torch.zeros(len(chosen), length, dtype=torch.int64)
        mask_BT = torch.zeros(len(chosen), length, dtype=torch.bool)
        for row, i in enumerate(chosen):
            ids_BT[row, : len(windows[i].ids)] = torch.tensor(windows[i].ids)
            mask_BT[row, : len(windows[i].ids)] = True
        routing = RoutingRecord()
        model.hidden(ids_BT.to(model.device), mask_BT.to(model.device), routing=routing)
        counted_BT = mask_BT.clone()
        if tokenizer.bos_id is not None:
            counted_BT[:, 0] = False
        yield RoutedBatch(chosen, routing, counted_BT)
