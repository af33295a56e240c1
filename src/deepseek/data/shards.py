"""Documents -> token shards, and windows of them in an order that needs no memory.

    FOLDER/train.bin, valid.bin   token ids end to end, little-endian uint16 (uint32 where the vocabulary is larger)
    FOLDER/shards.json            counts, dtype, the tokenizer's fingerprint, the sources

Every document stands between bos and eos. A hash of its text decides whether it is held out, so the split does not
change when files are added or reordered. Where no document falls to the held-out side, the end of one is cut off for
it.

Windows of S + 1 tokens (S inputs, and S labels that are the same tokens one further) lie end to end with stride S. An
epoch is a permutation of them, drawn from (seed, epoch), on a grid that starts at a new random offset below S, so that
the cuts fall elsewhere each time. Which windows step s gets is a pure function of (seed, s): resuming needs no state.

Shape letters: B windows a batch, T = S tokens a window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, NotFoundError, RequestError
from ..files import replace_folder, sha256, write_json
from ..tokenizer import Tokenizer
from .reader import Document, ReadReport, list_files, read_documents

FORMAT = 1
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 512

Progress = Callable[[int, int], None]


class TokenShards:
    """A packed folder, memory-mapped. Raises NotFoundError or DataError (naming the file) when it is not whole."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "shards.json"
        try:
            self.about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.about["format"] != FORMAT:
                raise DataError(f"{path}: format = {self.about['format']!r}: must be {FORMAT}")
            self._train, self._valid = (self._map(split) for split in ("train", "valid"))
        except FileNotFoundError as error:
            raise NotFoundError(f"{error.filename}: no such file") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a description of token shards: {error!r}") from None
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a batch may straddle two epochs

    @classmethod
    def open(cls, folder: str | Path) -> TokenShards:
        """What `pack` wrote to `folder`."""
        return cls(folder)

    def _map(self, split: str) -> np.ndarray:
        path, dtype, count = self.folder / f"{split}.bin", np.dtype(self.about["dtype"]), self.about[f"{split}_tokens"]
        if (size := path.stat().st_size) != count * dtype.itemsize:
            raise DataError(f"{path}: truncated or altered: {size} bytes, shards.json says {count * dtype.itemsize}")
        return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)

    @property
    def fingerprint(self) -> str:
        """Hash of the training tokens: equal data, equal fingerprint, wherever it lies."""
        return sha256(self.folder / "train.bin")

    @property
    def train_tokens(self) -> int:
        return len(self._train)

    @property
    def valid_tokens(self) -> int:
        return len(self._valid)

    def windows(self, seq_len: int) -> int:
        """Training windows in an epoch; the same for every offset of the grid. Raises DataError when not one fits."""
        if seq_len < 1:
            raise ConfigError(f"seq_len = {seq_len}: must be a positive integer")
        if self.train_tokens <= seq_len:
            raise DataError(f"{self.folder}: too little data: a window of seq_len {seq_len} needs {seq_len + 1} "
                            f"training tokens, there are {self.train_tokens}")
        return max(1, self.train_tokens // seq_len - 1)

    def epochs(self, step: int, batch_size: int, seq_len: int) -> float:
        """How often the training data has been seen before `step`."""
        return step * batch_size / self.windows(seq_len)

    def _draw_order(self, seed: int, epoch: int, seq_len: int) -> Tensor:
        """First token of each window, in the order of this epoch."""
        key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        windows = self.windows(seq_len)
        room = min(seq_len, self.train_tokens - windows * seq_len)
        offset = torch.randint(room, (), generator=generator)
        return torch.randperm(windows, generator=generator) * seq_len + offset

    def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """(ids_BT, labels_BT) of a step, int64; labels are the ids one further. The last windows of an epoch and the
        first of the next may share a batch."""
        windows, first = self.windows(seq_len), step * batch_size
        starts = [int(self._order(seed, i // windows, seq_len)[i % windows]) for i in range(first, first + batch_size)]
        return _cut(self._train, starts, seq_len)

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out windows in order, at most `limit` batches. The last batch may be smaller; the end of its last
        window is padding (id 0, label -100)."""
        starts = range(0, self.valid_tokens - 1, seq_len)
        for i in list(range(0, len(starts), batch_size))[:limit]:
            yield _cut(self._valid, starts[i : i + batch_size], seq_len)


def _cut(tokens: np.ndarray, starts: Sequence[int], seq_len: int) -> tuple[Tensor, Tensor]:
    rows = np.full((len(starts), seq_len + 1), -100, dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        piece = tokens[start : start + seq_len + 1]
        row[: len(piece)] = piece
    both = torch.from_numpy(rows)
    return both[:, :-1].clamp(min=0), both[:, 1:].contiguous()


# ---- packing ----------------------------------------------------------------------------------------------------


def pack_cached(paths: Sequence[str | Path], tokenizer: Tokenizer, folder: str | Path, *, valid_fraction: float = 0.01,
                seed: int = 0, strict: bool = False,
                progress: Progress | None = None) -> tuple[TokenShards, ReadReport | None]:
    """Read and pack `paths`, unless `folder` holds the same: equal paths, sizes, times, tokenizer and split.

    Returns the shards and what was read, None where nothing had to be. Raises as `read_documents` and `pack` do.
    """
    files = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in list_files(paths)]
    parts = [FORMAT, files, tokenizer.fingerprint, valid_fraction, seed]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if (Path(folder) / "shards.json").is_file():
        shards = TokenShards.open(folder)
        if shards.about.get("fingerprint") == fingerprint:
            return shards, None
    report = ReadReport(strict=strict)
    shards = pack(read_documents(paths, report), tokenizer, folder, valid_fraction=valid_fraction, seed=seed,
                  progress=progress, report=report, fingerprint=fingerprint)
    return shards, report


def pack(documents: Iterable[Document], tokenizer: Tokenizer, folder: str | Path, *, valid_fraction: float = 0.01,
         seed: int = 0, progress: Progress | None = None, report: ReadReport | None = None,
         fingerprint: str | None = None) -> TokenShards:
    """Tokenise `documents` into `folder`, which appears whole or not at all; memory stays at one batch of documents.

    valid_fraction: share to hold out, in [0, 1). seed: another one holds out other documents. progress: called with
    (documents, tokens) so far. report: takes conversations that the chat template refuses; without it they raise
    DataError, as does an input without a token.
    """
    if not 0 <= valid_fraction < 1:
        raise ConfigError(f"valid_fraction = {valid_fraction}: must be at least 0 and below 1")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with replace_folder(folder) as staging, (staging / "train.bin").open("wb") as train, \
            (staging / "valid.bin").open("wb") as valid:
        splits = _Splits(train, valid, valid_fraction, seed)
        sources: dict[str, int] = {}
        for batch in _batches(documents):
            for document, ids in _encode(batch, tokenizer, report):
                splits.add(document.text, np.array(ids, dtype))
                sources[document.source] = sources.get(document.source, 0) + 1
            if progress is not None:
                progress(sum(sources.values()), splits.tokens)
        if not splits.tokens:
            raise DataError("there is no text to pack")
        splits.finish()
        about = {"format": FORMAT, "dtype": dtype.str, "train_tokens": train.tell() // dtype.itemsize,
                 "valid_tokens": valid.tell() // dtype.itemsize, "documents": sum(sources.values()),
                 "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint, "seed": seed,
                 "valid_fraction": valid_fraction, "fingerprint": fingerprint, "sources": sources}
        train.flush()
        valid.flush()
        write_json(staging / "shards.json", about)
    return TokenShards.open(folder)


class _Splits:
    """Sends documents to one of two files by hash. The one with the highest hash waits until the end: it is the least
    likely to be held out, and stands in for whichever side got nothing."""

    def __init__(self, train: BinaryIO, valid: BinaryIO, fraction: float, seed: int) -> None:
        self.train, self.valid, self.fraction = train, valid, fraction
        self.key = f"{seed}".encode()
        self.tokens = 0
        self.waiting: tuple[float, np.ndarray] | None = None

    def add(self, text: str, ids: np.ndarray) -> None:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=self.key).digest()
        place = int.from_bytes(digest, "little") / (1 << 64)  # uniform in [0, 1)
        self.tokens += len(ids)
        if self.waiting is None:
            self.waiting = place, ids
            return
        (place, ids), self.waiting = sorted((self.waiting, (place, ids)), key=itemgetter(0))
        (self.valid if place < self.fraction else self.train).write(ids.tobytes())

    def finish(self) -> None:
        assert self.waiting is not None
        ids, held = self.waiting[1], 0
        if self.fraction and not self.valid.tell():
            most = len(ids) if self.train.tell() else len(ids) - 1
            held = min(max(2, round(self.tokens * self.fraction)), most)
        self.train.write(ids[: len(ids) - held].tobytes())
        self.valid.write(ids[len(ids) - held :].tobytes())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[Document], tokenizer: Tokenizer, report: ReadReport | None
) -> Iterator[tuple[Document, list[int]]]:
    """Ids of each document between bos and eos; conversations go through the chat template where there is one."""
    spoken = [bool(document.turns) and tokenizer.has_chat_template for document in batch]
    plain = iter(tokenizer.encode_batch([d.text for d, chat in zip(batch, spoken, strict=True) if not chat]))
    for document, chat in zip(batch, spoken, strict=True):
        if not chat:
            ids = next(plain)
        else:
            messages = [{"role": role, "content": text} for role, text in document.turns]
            try:
                ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
            except RequestError as error:
                if report is None:
                    raise DataError(f"{document.source}: {error}") from None
                report.problem(document.source, document.line, "refused conversation", str(error))
                continue
        begin, end = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
        yield document, (begin if ids[:1] != begin else []) + ids + (end if ids[-1:] != end else [])
