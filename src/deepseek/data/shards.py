"""Documents -> token shards, and windows of them in an order that needs no memory.

    FOLDER/train.bin, valid.bin   token ids end to end, little-endian uint16 (uint32 where the vocabulary is larger)
    FOLDER/train.experts.bin, …   where documents have expert names: a byte a token, its place among them (255: no name)
    FOLDER/shards.json            counts, dtype, the tokenizer's fingerprint, the sources, the expert names

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, NotFoundError, RequestError
from ..files import replace_folder, sha256, write_json
from ..tokenizer import Tokenizer
from .reader import Document, Named, ReadReport, list_files, read_documents
from .step import in_order

FORMAT = 1
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 2048
NO_EXPERT = 255

Progress = Callable[[int, int], None]


class Batch(NamedTuple):
    """Windows, int64. labels_BT: the ids one further, -100 for none; expert_BT: place of the name of each input token's
    document among `TokenShards.experts`, -1 for none; real_BT: False for padding, None where there is none."""

    ids_BT: Tensor
    labels_BT: Tensor
    expert_BT: Tensor
    real_BT: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


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
            self.experts: tuple[str, ...] = tuple(self.about.get("experts", ()))
            self._train_experts, self._valid_experts = (
                self._map(split, ".experts") if self.experts else None for split in ("train", "valid"))
        except FileNotFoundError as error:
            raise NotFoundError(f"{error.filename}: no such file") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a description of token shards: {error!r}") from None
        self._order = lru_cache(maxsize=2)(self._draw_order)  # a batch may straddle two epochs

    @classmethod
    def open(cls, folder: str | Path) -> TokenShards:
        """What `pack` wrote to `folder`."""
        return cls(folder)

    def _map(self, split: str, what: str = "") -> np.ndarray:
        path, count = self.folder / f"{split}{what}.bin", self.about[f"{split}_tokens"]
        dtype = np.dtype(np.uint8 if what else self.about["dtype"])
        if (size := path.stat().st_size) != count * dtype.itemsize:
            raise DataError(f"{path}: truncated or altered: {size} bytes, shards.json says {count * dtype.itemsize}")
        return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)

    @property
    def fingerprint(self) -> str:
        """Hash of the training tokens and their labels: equal data, equal fingerprint, wherever it lies."""
        tokens = sha256(self.folder / "train.bin")
        return f"{tokens} {sha256(self.folder / 'train.experts.bin')}" if self.experts else tokens

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

    def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int) -> Batch:
        """The windows of a step. The last windows of an epoch and the first of the next may share a batch."""
        windows, first = self.windows(seq_len), step * batch_size
        starts = [int(self._order(seed, i // windows, seq_len)[i % windows]) for i in range(first, first + batch_size)]
        return _cut(self._train, self._train_experts, starts, seq_len)

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out windows in order; where that is more than `limit` batches, so many windows evenly spread. The
        last batch may be smaller; the end of its last window is padding (id 0, label -100)."""
        starts: Sequence[int] = range(0, self.valid_tokens - 1, seq_len)
        if limit is not None and (kept := limit * batch_size) < len(starts):
            starts = [starts[i * len(starts) // kept] for i in range(kept)]
        for i in range(0, len(starts), batch_size):
            yield _cut(self._valid, self._valid_experts, starts[i : i + batch_size], seq_len)


def _cut(tokens: np.ndarray, experts: np.ndarray | None, starts: Sequence[int], seq_len: int) -> Batch:
    rows = np.full((len(starts), seq_len + 1), -100, dtype=np.int64)
    names = np.full((len(starts), seq_len), -1, dtype=np.int64)
    for row, name, start in zip(rows, names, starts, strict=True):
        piece = tokens[start : start + seq_len + 1]
        row[: len(piece)] = piece
        if experts is not None:
            piece = experts[start : start + seq_len]
            name[: len(piece)] = np.where(piece == NO_EXPERT, -1, piece.astype(np.int64))
    both = torch.from_numpy(rows)
    return Batch(both[:, :-1].clamp(min=0), both[:, 1:].contiguous(), torch.from_numpy(names))


# ---- packing ----------------------------------------------------------------------------------------------------


def pack_cached(paths: Sequence[str | Path] | Named, tokenizer: Tokenizer, folder: str | Path, *,
                valid_fraction: float = 0.01, seed: int = 0, strict: bool = False,
                progress: Progress | None = None) -> tuple[TokenShards, ReadReport | None]:
    """Read and pack `paths`, unless `folder` holds the same: equal paths, sizes, times, names, tokenizer and split.

    Returns the shards and what was read, None where nothing had to be. Raises as `read_documents` and `pack` do.
    """
    named: Named = paths if isinstance(paths, Mapping) else {"": paths}
    files = [(name, str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
             for name, places in named.items() for file in list_files(places)]
    parts = [FORMAT, files, tokenizer.fingerprint, valid_fraction, seed]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if (Path(folder) / "shards.json").is_file():
        shards = TokenShards.open(folder)
        if shards.about.get("fingerprint") == fingerprint:
            return shards, None
    report = ReadReport(strict=strict)
    shards = pack(read_documents(paths, report), tokenizer, folder, valid_fraction=valid_fraction, seed=seed,
                  progress=progress, report=report, fingerprint=fingerprint,
                  experts=tuple(filter(None, named)))
    return shards, report


def pack(documents: Iterable[Document], tokenizer: Tokenizer, folder: str | Path, *, valid_fraction: float = 0.01,
         seed: int = 0, progress: Progress | None = None, report: ReadReport | None = None,
         fingerprint: str | None = None, experts: Sequence[str] = ()) -> TokenShards:
    """Tokenise `documents` into `folder`, which appears whole or not at all; memory stays at one batch of documents.

    valid_fraction: share to hold out, in [0, 1). seed: another one holds out other documents. progress: called with
    (documents, tokens) so far. report: takes conversations that the chat template refuses; without it they raise
    DataError, as does an input without a token. experts: the names that documents bear, in the order that counts.
    """
    if not 0 <= valid_fraction < 1:
        raise ConfigError(f"valid_fraction = {valid_fraction}: must be at least 0 and below 1")
    if len(experts) >= NO_EXPERT:
        raise ConfigError(f"{len(experts)} expert names: must be fewer than {NO_EXPERT}")
    place = {name: number for number, name in enumerate(experts)}
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with replace_folder(folder) as staging, (staging / "train.bin").open("wb") as train, \
            (staging / "valid.bin").open("wb") as valid, ThreadPoolExecutor(1) as pool:
        splits = _Splits(train, valid, valid_fraction, seed)
        sources: dict[str, int] = {}
        # the tokenizer leaves the interpreter to others: what it has done is written meanwhile
        encoded = in_order(pool, lambda batch: list(encode_documents(batch, tokenizer, report)), _batches(documents), 2)
        for batch in encoded:
            for document, ids in batch:
                if document.expert and experts and document.expert not in place:
                    raise DataError(f"{document.source}: expert = {document.expert!r}: must be one of "
                                    f"{', '.join(experts)}")
                splits.add(document.text, np.array(ids, dtype), place.get(document.expert or "", NO_EXPERT))
                sources[document.source] = sources.get(document.source, 0) + 1
            if progress is not None:
                progress(sum(sources.values()), splits.tokens)
        if not splits.tokens:
            raise DataError("there is no text to pack")
        splits.finish()
        for split, runs in (("train", splits.runs[0]), ("valid", splits.runs[1])):
            if experts:
                names = np.repeat(np.array([name for name, _ in runs], np.uint8), [count for _, count in runs])
                (staging / f"{split}.experts.bin").write_bytes(names.tobytes())
        about = {"format": FORMAT, "dtype": dtype.str, "train_tokens": train.tell() // dtype.itemsize,
                 "valid_tokens": valid.tell() // dtype.itemsize, "documents": sum(sources.values()),
                 "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint, "seed": seed,
                 "valid_fraction": valid_fraction, "fingerprint": fingerprint, "sources": sources,
                 "experts": list(experts)}
        train.flush()
        valid.flush()
        write_json(staging / "shards.json", about)
    return TokenShards.open(folder)


class _Splits:
    """Sends documents to one of two files by hash. The one with the highest hash waits until the end: it is the least
    likely to be held out, and stands in for whichever side got nothing."""

    def __init__(self, train: BinaryIO, valid: BinaryIO, fraction: float, seed: int) -> None:
        self.files, self.fraction = (train, valid), fraction
        self.runs: tuple[list[tuple[int, int]], ...] = ([], [])  # (expert, tokens) of each file, in its order
        self.key = f"{seed}".encode()
        self.tokens = 0
        self.waiting: tuple[float, np.ndarray, int] | None = None

    def add(self, text: str, ids: np.ndarray, expert: int = NO_EXPERT) -> None:
        new = held_out_place(text, self.key), ids, expert
        self.tokens += len(ids)
        if self.waiting is None:
            self.waiting = new
            return
        (place, ids, expert), self.waiting = sorted((self.waiting, new), key=itemgetter(0))
        self._write(place < self.fraction, ids, expert)

    def finish(self) -> None:
        assert self.waiting is not None
        _, ids, expert = self.waiting
        held = 0
        train, valid = self.files
        if self.fraction and not valid.tell():
            most = len(ids) if train.tell() else len(ids) - 1
            held = min(max(2, round(self.tokens * self.fraction)), most)
        self._write(False, ids[: len(ids) - held], expert)
        self._write(True, ids[len(ids) - held :], expert)

    def _write(self, held_out: bool, ids: np.ndarray, expert: int) -> None:
        self.files[held_out].write(ids.tobytes())
        runs = self.runs[held_out]
        before = runs.pop()[1] if runs and runs[-1][0] == expert else 0
        runs.append((expert, before + len(ids)))


def held_out_place(text: str, key: bytes) -> float:
    """Where a text falls in [0, 1): those below the held-out share are held out. A pure function of text and seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") / (1 << 64)


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


def encode_documents(
    batch: list[Document], tokenizer: Tokenizer, report: ReadReport | None = None
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
