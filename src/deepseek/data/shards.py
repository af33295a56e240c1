"""Documents -> token shards, and windows of them in an order that needs no memory.

    FOLDER/train.bin, valid.bin   token ids end to end, little-endian uint16 (uint32 where the vocabulary is larger)
    FOLDER/train.experts.bin, …   where documents have expert names: a byte a token, its place among them (255: no name)
    FOLDER/shards.json            counts, dtype, the tokenizer's fingerprint, the sources, the expert names

Every document stands between bos and eos. A hash of its text decides whether it is held out; of every name a few are
(held_out.py).

Windows of S + 1 tokens (S inputs, and S labels that are the same tokens one further) lie end to end with stride S. An
epoch is a permutation of them, drawn from (seed, epoch), on a grid that starts at a new random offset below S, so that
the cuts fall elsewhere each time. Which windows step s gets is a pure function of (seed, s): resuming needs no state.

Shape letters: B windows a batch, T = S tokens a window.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..conversation import of_turns
from ..errors import ConfigError, DataError, NotFoundError, RequestError
from ..files import replace_folder, sha256, to_json, write_json
from ..spoken import encode_conversation
from ..tokenizer import Tokenizer
from .encode import Encoder, flat, join, spread
from .held_out import Held, count_held, held_out_place, hold_out, notes
from .mapping import RecordMap
from .reader import Document, Named, ReadReport, list_files, read_documents
from .records import COLUMNS
from .stage import ordered_map

if TYPE_CHECKING:
    import polars

FORMAT = 1
BATCH_CHARACTERS = 1 << 21
BATCH_DOCUMENTS = 1 << 14
PACKED = ("text", "turns", "source", "line", "expert")  # columns of a table that is packed
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
        """Open a folder that `pack` wrote."""
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

    def notes(self) -> list[str]:
        """Return warnings about the held-out documents, a line each."""
        held = {name: Held(**one) for name, one in self.about.get("held_out", {}).items()}
        return notes(held, self.about.get("valid_fraction", 0))

    @property
    def present(self) -> tuple[str, ...]:
        """The expert names of which there is text."""
        return tuple(name for name in self.experts if self.about["held_out"].get(name, {}).get("documents"))

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
                            f"training tokens, there are {self.train_tokens}: give more text, or a smaller seq_len")
        return max(1, self.train_tokens // seq_len - 1)

    def epochs(self, step: int, batch_size: int, seq_len: int) -> float:
        """Return how often the training data was seen before `step`."""
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
                valid_fraction: float = 0.01, seed: int = 0, strict: bool = False, progress: Progress | None = None,
                names: Sequence[str] = (), expect: str | None = None, mapping: RecordMap | None = None
                ) -> tuple[TokenShards, ReadReport | None]:
    """Read and pack `paths`, unless `folder` holds the same: equal paths, sizes, times, map, names, tokenizer, split.

    Returns the shards and what was read, None where nothing had to be. names: the expert names in the order that
    counts, some perhaps without text; else those of `paths`. Raises as `read_documents` and `pack` do.
    """
    named: Named = paths if isinstance(paths, Mapping) else {"": paths}
    files = [(name, str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
             for name, places in named.items() for file in list_files(places)]
    names = names or tuple(filter(None, named))
    parts = [FORMAT, files, tokenizer.fingerprint, valid_fraction, seed,
             *([names] if [*names] != [*filter(None, named)] else []), *([asdict(mapping)] if mapping else [])]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if (Path(folder) / "shards.json").is_file():
        shards = TokenShards.open(folder)
        if shards.about.get("fingerprint") == fingerprint:
            return shards, None
    report = ReadReport(strict=strict)
    shards = pack(read_documents(paths, report, mapping), tokenizer, folder, valid_fraction=valid_fraction, seed=seed,
                  progress=progress, report=report, fingerprint=fingerprint, experts=names, expect=expect)
    return shards, report


def pack(documents: Iterable[Document], tokenizer: Tokenizer, folder: str | Path, *, valid_fraction: float = 0.01,
         seed: int = 0, progress: Progress | None = None, report: ReadReport | None = None,
         fingerprint: str | None = None, experts: Sequence[str] = (), expect: str | None = None) -> TokenShards:
    """Tokenize `documents` into `folder`, which is written atomically; a few batches of them are in memory.

    valid_fraction: share to hold out, in [0, 1). seed: another one holds out other documents. progress: called with
    (documents, tokens) so far. report: takes conversations that the chat template refuses; without it they raise
    DataError, as does an input without a token. experts: the names that documents bear, in the order that counts.
    expect: the fingerprint that the shards must have; others are a ConfigError, which leaves `folder` as it was.
    """
    return pack_tables(document_tables(documents), tokenizer, folder, valid_fraction=valid_fraction, seed=seed,
                       progress=progress, report=report, fingerprint=fingerprint, experts=experts, expect=expect)


def pack_tables(tables: Iterable[polars.DataFrame], tokenizer: Tokenizer, folder: str | Path, *,
                valid_fraction: float = 0.01, seed: int = 0, progress: Progress | None = None,
                report: ReadReport | None = None, fingerprint: str | None = None,
                experts: Sequence[str] = (), expect: str | None = None) -> TokenShards:
    """As `pack`, from tables of records with the columns PACKED (records.py)."""
    if not 0 <= valid_fraction < 1:
        raise ConfigError(f"valid_fraction = {valid_fraction}: must be at least 0 and below 1")
    if len(experts) >= NO_EXPERT:
        raise ConfigError(f"{len(experts)} expert names: must be fewer than {NO_EXPERT}")
    place = {name: number for number, name in enumerate(experts)}
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    encoder, workers = Encoder(tokenizer), min(8, len(os.sched_getaffinity(0)))
    with replace_folder(folder) as staging, ExitStack() as stack:
        tokens, names = ([stack.enter_context((staging / f"{split}{what}.bin").open("w+b"))
                          for split in ("train", "valid") if experts or not what] for what in ("", ".experts"))
        splits = _Splits(tokens, names, dtype, valid_fraction, seed)
        sources: dict[str, int] = {}
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        for found in ordered_map(pool, lambda table: _encode(table, encoder), blocks(tables), workers):
            _tell(found, report)
            named = found.table["expert"].to_list()
            if experts and (unknown := [i for i, name in enumerate(named) if name and name not in place]):
                raise DataError(f"{found.table['source'][unknown[0]]}: expert = {named[unknown[0]]!r}: must be one of "
                                f"{', '.join(experts)}")
            splits.add(found.table["text"].to_list(), found.ids_T, found.count_N,
                       np.array([place.get(name or "", NO_EXPERT) for name in named], np.uint8))
            for source, count in found.table.group_by("source", maintain_order=True).len().iter_rows():
                sources[source] = sources.get(source, 0) + count
            if progress is not None:
                progress(sum(sources.values()), splits.tokens)
        if not splits.tokens:
            raise DataError("there is no text to pack")
        held = splits.finish({**{number: name for name, number in place.items()}, NO_EXPERT: ""})
        about = {"format": FORMAT, "dtype": dtype.str, "train_tokens": tokens[0].seek(0, os.SEEK_END) // dtype.itemsize,
                 "valid_tokens": tokens[1].seek(0, os.SEEK_END) // dtype.itemsize, "documents": sum(sources.values()),
                 "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint, "seed": seed,
                 "valid_fraction": valid_fraction, "fingerprint": fingerprint, "sources": sources,
                 "experts": list(experts), "held_out": {name: one._asdict() for name, one in held.items()}}
        for file in (*tokens, *names):
            file.flush()
        write_json(staging / "shards.json", about)
        if expect is not None and (packed := TokenShards.open(staging).fingerprint) != expect:
            raise ConfigError(f"{Path(folder).parent} holds a run on other data (the tokens' fingerprint is "
                              f"{expect[:16]}…, here {packed[:16]}…); choose another --out or remove the folder")
    return TokenShards.open(folder)


class _Splits:
    """Sends documents to one of two files by hash, and at the end those that `hold_out` wants elsewhere. names: the
    files of expert labels, if any."""

    def __init__(self, tokens: Sequence[BinaryIO], names: Sequence[BinaryIO], dtype: np.dtype[Any], fraction: float,
                 seed: int) -> None:
        self.files, self.names, self.dtype, self.fraction = tokens, names, dtype, fraction
        self.key = f"{seed}".encode()
        self.tokens = 0
        # of every document: hash, tokens, expert, characters
        self.seen: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, texts: Sequence[str], ids_T: np.ndarray, count_N: np.ndarray, expert_N: np.ndarray) -> None:
        if not texts:
            return
        self.tokens += len(ids_T)
        place_N = np.array([held_out_place(text, self.key) for text in texts])
        self.seen.append((place_N, count_N, expert_N, np.array([len(text) for text in texts])))
        begin_N = np.cumsum(count_N) - count_N
        for held_out in (False, True):
            rows = np.flatnonzero((place_N < self.fraction) == held_out)
            self.files[held_out].write(ids_T[spread(begin_N[rows], count_N[rows])].astype(self.dtype).tobytes())
            if self.names:
                self.names[held_out].write(np.repeat(expert_N[rows], count_N[rows]).tobytes())

    def finish(self, names: Mapping[int, str]) -> dict[str, Held]:
        """Move what is on the wrong side; what is held out now, by name."""
        place_N, count_N, expert_N, size_N = (np.concatenate(column) for column in zip(*self.seen, strict=True))
        held_N, cuts = hold_out(place_N, expert_N, size_N, self.fraction)
        was_N = place_N < self.fraction
        cut = {row: min(max(2, round(count_N[expert_N == expert_N[row]].sum() * self.fraction)), count_N[row] - 1)
               for row in cuts}  # tokens at the end
        for out in (False, True):  # what leaves the training side, then what leaves the other
            rows = np.flatnonzero(was_N == out)
            end_N = np.cumsum(count_N[rows])
            gone = [(end - count + (0 if out else count - cut.get(row, count)), end - (cut.get(row, 0) if out else 0))
                    for row, count, end in zip(rows.tolist(), count_N[rows].tolist(), end_N.tolist(), strict=True)
                    if held_N[row] != out or row in cut]
            for files, size in ((self.files, self.dtype.itemsize), (self.names, 1)):
                if files and gone:
                    _move(files[out], files[not out], [(start * size, end * size) for start, end in gone])
        return count_held(place_N, expert_N, held_N, cuts, self.fraction, names)


def _move(source: BinaryIO, target: BinaryIO, ranges: Sequence[tuple[int, int]]) -> None:
    """Take byte ranges, in their order, out of one file and append them to another."""
    to = ranges[0][0]
    for number, (start, end) in enumerate(ranges):
        source.seek(start)
        target.seek(0, os.SEEK_END)
        target.write(source.read(end - start))
        following = ranges[number + 1][0] if number + 1 < len(ranges) else source.seek(0, os.SEEK_END)
        while end < following:  # what stays moves up
            source.seek(end)
            block = source.read(min(1 << 20, following - end))
            source.seek(to)
            source.write(block)
            end, to = end + len(block), to + len(block)
    source.truncate(to)


def document_tables(documents: Iterable[Document]) -> Iterator[polars.DataFrame]:
    """Collect documents into tables with the columns PACKED."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield as_table(batch)
            batch, size = [], 0
    if batch:
        yield as_table(batch)


def as_table(documents: Sequence[Document]) -> polars.DataFrame:
    import polars as pl

    rows = [(d.text, to_json(d.turns) if d.turns else None, d.source, d.line, d.expert) for d in documents]
    try:
        return pl.DataFrame(rows, {name: getattr(pl, COLUMNS[name]) for name in PACKED}, orient="row")
    except UnicodeEncodeError as error:
        lone = error.object[error.start]
        raise DataError(f"a text has the lone surrogate {lone!r}, which UTF-8 cannot hold") from None


def blocks(tables: Iterable[polars.DataFrame]) -> Iterator[polars.DataFrame]:
    """The rows of tables, cut into batches."""
    for table in tables:
        size_N = np.cumsum(table["text"].str.len_chars().to_numpy()) // BATCH_CHARACTERS
        ends = [*(np.flatnonzero(np.diff(size_N)) + 1).tolist(), len(table)]
        for start, end in zip([0, *ends], ends, strict=False):
            yield from table[start:end].iter_slices(BATCH_DOCUMENTS)


class _Encoded(NamedTuple):
    """Ids of the documents of `table`, between bos and eos. refused: (row, source, line, why) of what is left out."""

    table: polars.DataFrame
    ids_T: np.ndarray
    count_N: np.ndarray
    refused: list[tuple[int, str, int | None, str]]


def _encode(table: polars.DataFrame, encoder: Encoder) -> _Encoded:
    """Conversations go through the chat template where there is one."""
    tokenizer = encoder.tokenizer
    refused: list[tuple[int, str, int | None, str]] = []
    if not tokenizer.has_chat_template or table["turns"].null_count() == len(table):
        ids_T, count_N = encoder.encode(table["text"])
    else:
        said: list[list[int] | None] = []
        for row, (turns, source, line) in enumerate(table.select("turns", "source", "line").iter_rows()):
            messages, tools, variables = of_turns(json.loads(turns) if turns else [])
            try:
                tokenizer.check_variables(variables)
                said.append(encode_conversation(messages, tokenizer, tools=tools, **variables) if turns else [])
            except RequestError as error:
                said.append(None)
                refused.append((row, source, line, str(error)))
        stays_N = np.array([ids is not None for ids in said], bool)
        plain_N = table["turns"].is_null().to_numpy()
        spoken = [ids for ids, plain in zip(said, plain_N, strict=True) if ids is not None and not plain]
        ids_T, count_N = join(plain_N[stays_N], encoder.encode(table["text"].filter(plain_N)), flat(spoken))
        table = table.filter(stays_N)
    begin_N = np.cumsum(count_N) - count_N
    some_N = np.flatnonzero(count_N)
    new_bos_N, new_eos_N = (np.full(len(count_N), i is not None) for i in (tokenizer.bos_id, tokenizer.eos_id))
    new_bos_N[some_N] &= ids_T[begin_N[some_N]] != tokenizer.bos_id
    new_eos_N[some_N] &= ids_T[(begin_N + count_N)[some_N] - 1] != tokenizer.eos_id
    whole_N = count_N + new_bos_N + new_eos_N
    start_N = np.cumsum(whole_N) - whole_N
    out_T = np.empty(whole_N.sum(), np.uint32)
    out_T[spread(start_N + new_bos_N, count_N)] = ids_T
    out_T[start_N[new_bos_N]] = tokenizer.bos_id
    out_T[(start_N + whole_N - 1)[new_eos_N]] = tokenizer.eos_id
    return _Encoded(table, out_T, whole_N, refused)


def _tell(found: _Encoded, report: ReadReport | None) -> None:
    for _, source, line, why in found.refused:
        if report is None:
            raise DataError(f"{source}: {why}")
        report.problem(source, line, "refused conversation", why)


def encode_documents(
    batch: list[Document], tokenizer: Tokenizer, report: ReadReport | None = None
) -> Iterator[tuple[Document, list[int]]]:
    """Ids of each document between bos and eos; conversations go through the chat template where there is one."""
    found = _encode(as_table(batch), Encoder(tokenizer))
    _tell(found, report)
    gone = {row for row, *_ in found.refused}
    ends = np.cumsum(found.count_N)
    for document, end, count in zip((d for row, d in enumerate(batch) if row not in gone), ends, found.count_N,
                                    strict=True):
        yield document, found.ids_T[end - count : end].tolist()
