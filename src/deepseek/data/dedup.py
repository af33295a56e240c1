"""Finds exact and near duplicates among records.

Texts are compared after normalisation: NFKC, lower case, runs of white space as one space, none at the ends.

Exact. Equal 128-bit hashes of the normalised text; the first in reading order stays.

Near. Two texts are near-duplicates when the Jaccard similarity of their sets of SHINGLE-character sequences is at least
the threshold (0.8 unless told otherwise). Candidates come from MinHash by one-permutation hashing: every sequence is
hashed once, the upper half of the hash chooses one of CELLS cells, each cell keeps the least lower half; an empty cell
borrows the value of the next filled one. Records that agree in all ROWS cells of one of BANDS bands meet. At similarity
0.8 a pair meets with probability 1 - (1 - 0.8^5)^12 = 99 %, at 0.33 with 5 %. Of those that meet, pairs whose cells
agree clearly less often than the threshold are put aside, and the true similarity of the rest is computed from the sets
themselves, so nothing is dropped on an estimate.

Which stays. Records are visited in reading order; one is dropped when it is a near-duplicate of an earlier record that
stays, and the most similar of these (the earliest, if several) is named as its reason. So every dropped record lies
within the threshold of one that is still there, which connected clusters do not promise. Within a bucket of many a
record is compared with the WINDOW before it and with the first of the bucket. Texts shorter than SHINGLE characters
are compared exactly only.

Everything runs on blocks of BLOCK records, on several threads: numpy and polars release the interpreter. In memory
stay, per record, 16 bytes of hash, 96 of bands and 60 of cells.

Shape letters: N records, C characters of a block laid end to end, M cells, B bands, P pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import ConfigError
from .encode import spread
from .records import read_tables
from .stage import ordered_map

if TYPE_CHECKING:
    import polars

SHINGLE = 5
CELLS, BANDS, ROWS = 60, 12, 5
WINDOW = 8
BLOCK = 1 << 12
EMPTY = np.uint32(0xFFFFFFFF)
MARGIN = 0.16  # three standard deviations of the estimate over CELLS cells, at similarity 0.8
PAIRS = 1 << 15  # whose sets are compared at a time
SET_CHARACTERS = 1 << 28  # of texts whose sets are in memory at a time


class Duplicates(NamedTuple):
    """kept_N: the number of the record that stands for each (itself, where it stays). similarity_N: 1 for exact ones,
    the Jaccard similarity to the kept one for near ones, NaN for what stays. exact_N: dropped as an exact duplicate."""

    kept_N: np.ndarray
    similarity_N: np.ndarray
    exact_N: np.ndarray

    @property
    def stays(self) -> np.ndarray:
        """bool, N."""
        return self.kept_N == np.arange(len(self.kept_N))


def find_duplicates(
    folder: str | Path, *, near: bool = True, threshold: float = 0.8, workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Duplicates:
    """Find the duplicates among all records of a stage's folder. progress: called with the number of records so far."""
    if not 0.5 <= threshold <= 1:
        raise ConfigError(f"threshold = {threshold}: must be between 0.5 and 1")
    digests, bands, cells = [], [], []
    seen = 0
    with ThreadPoolExecutor(workers) as pool:
        for digest_N2, band_NB, cell_NM in ordered_map(pool, lambda t: _block(t, near), _texts(folder), workers):
            digests.append(digest_N2)
            bands.append(band_NB)
            cells.append(cell_NM)
            seen += len(digest_N2)
            if progress is not None:
                progress(seen)
        first_N = _first_equal(np.concatenate(digests))
        digests.clear()
        kept_N = first_N.copy()
        exact_N = first_N != np.arange(len(first_N))
        similarity_N = np.where(exact_N, np.float32(1), np.float32(np.nan))
        if near:
            band_NB, cell_NM = np.concatenate(bands), np.concatenate(cells)
            bands.clear()
            cells.clear()
            pairs_P2 = _candidates(np.flatnonzero(~exact_N & (band_NB[:, 0] != 0)), band_NB, cell_NM, threshold)
            del band_NB, cell_NM
            similarity_P = _similarities(folder, pairs_P2, pool, workers)
            close_P = similarity_P >= threshold
            _greedy(kept_N, similarity_N, pairs_P2[close_P], similarity_P[close_P])
    copy_N = exact_N & (kept_N[first_N] != first_N)  # of a text that was dropped: as near to what stays as that was
    kept_N[copy_N], similarity_N[copy_N] = kept_N[first_N[copy_N]], similarity_N[first_N[copy_N]]
    return Duplicates(kept_N, similarity_N, exact_N & ~copy_N)


def normalise(text: polars.Series) -> polars.Series:
    """Normalise texts for comparison."""
    return (text.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars())


def jaccard(a: str, b: str) -> float:
    """Compute the similarity of two normalised texts; the reference for `find_duplicates`."""
    one, two = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (a, b))
    return len(one & two) / max(1, len(one | two))


def _texts(folder: str | Path) -> Iterator[polars.Series]:
    for table in read_tables(folder, ["text"], BLOCK):
        yield table["text"]


def _block(texts: polars.Series, near: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(digest_N2 uint64, bands_NB uint64, cells_NM uint8) of a block; bands are 0 where a text is too short."""
    clean = normalise(texts)
    said = clean.to_list()
    digest = b"".join([hashlib.blake2b(text.encode(), digest_size=16).digest() for text in said])
    digest_N2 = np.frombuffer(digest, np.uint64).reshape(-1, 2)
    if not near:
        return digest_N2, np.zeros((len(said), 0), np.uint64), np.zeros((len(said), 0), np.uint8)
    hash_S, owner_S = _shingles(said, clean.str.len_chars().to_numpy().astype(np.int64))
    cell_S = (hash_S >> np.uint64(32)) * np.uint64(CELLS) >> np.uint64(32)
    cell_S += owner_S * np.uint64(CELLS)
    cell_S <<= np.uint64(32)
    cell_S |= hash_S & np.uint64(EMPTY)
    cell_S.sort()  # by record, cell, value: the first of each (record, cell) is its minimum
    place_S = (cell_S >> np.uint64(32)).astype(np.int64)
    first = np.flatnonzero(np.diff(place_S, prepend=-1))
    least_NM = np.full((len(said), CELLS), EMPTY)
    least_NM.reshape(-1)[place_S[first]] = cell_S[first].astype(np.uint32)
    none_N = (least_NM == EMPTY).all(1)
    least_NM = _filled(least_NM)
    band_NB = np.zeros((len(said), BANDS), np.uint64)
    for row in range(ROWS):
        band_NB = (band_NB ^ least_NM[:, row * BANDS : (row + 1) * BANDS]) * np.uint64(0x9E3779B97F4A7C15)
        band_NB ^= band_NB >> np.uint64(29)
    band_NB |= np.uint64(1)
    band_NB[none_N] = 0
    return digest_N2, band_NB, least_NM.astype(np.uint8)


def _shingles(texts: list[str], size_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash of every SHINGLE-character sequence, number of its text), both uint64, text after text."""
    codes_C = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    count = max(0, len(codes_C) - SHINGLE + 1)
    hash_C = np.zeros(count, np.uint64)
    for step in range(SHINGLE):
        hash_C *= np.uint64(0x9E3779B97F4A7C15)
        hash_C += codes_C[step : step + count]
    hash_C ^= hash_C >> np.uint64(29)
    hash_C *= np.uint64(0xBF58476D1CE4E5B9)
    hash_C ^= hash_C >> np.uint64(32)
    within_C = np.ones(len(codes_C), bool)  # a sequence must not reach into the next text
    begin_N = np.cumsum(size_N) - size_N
    for back in range(1, SHINGLE):
        within_C[begin_N[size_N >= back] + size_N[size_N >= back] - back] = False
    owner_C = np.repeat(np.arange(len(texts), dtype=np.uint64), size_N)
    return hash_C[within_C[:count]], owner_C[:count][within_C[:count]]


def _filled(least_NM: np.ndarray) -> np.ndarray:
    """Fill empty cells with the next filled one to the right (cyclic), changed by the distance."""
    rows = np.flatnonzero((least_NM == EMPTY).any(1) & (least_NM != EMPTY).any(1))
    some = np.tile(least_NM[rows], 2)
    at = np.where(some != EMPTY, np.arange(2 * CELLS), 2 * CELLS)
    at = np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1][:, :CELLS]
    distance = (at - np.arange(CELLS)).astype(np.uint32)
    least_NM[rows] = np.take_along_axis(some, at, 1) + distance * np.uint32(0x85EBCA77)
    return least_NM


def _first_equal(digest_N2: np.ndarray) -> np.ndarray:
    """Return, for each row, the index of the first row equal to it."""
    order = np.lexsort((digest_N2[:, 1], digest_N2[:, 0]))  # stable: equal rows stay in reading order
    rows = digest_N2[order]
    new = np.concatenate([[True], (rows[1:] != rows[:-1]).any(1)])
    first_N = np.empty(len(order), np.int64)
    first_N[order] = order[new][np.cumsum(new) - 1]
    return first_N


def _candidates(alive: np.ndarray, band_NB: np.ndarray, cell_NM: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs (earlier, later), int64 P x 2, that share a band and whose cells do not speak against it."""
    found = [np.zeros((0, 2), np.int64)]
    least = (threshold - MARGIN) * CELLS
    for band in range(BANDS):
        key = band_NB[alive, band]
        order = np.argsort(key, kind="stable")
        key, who = key[order], alive[order]
        new = np.concatenate([[True], key[1:] != key[:-1]])
        head = np.maximum.accumulate(np.where(new, np.arange(len(key)), 0))
        rank = np.arange(len(key)) - head
        for back in (*range(1, WINDOW + 1), None):
            later = np.flatnonzero(rank >= back if back else rank > WINDOW)
            pairs = np.stack([who[later - back] if back else who[head[later]], who[later]], 1)
            for start in range(0, len(pairs), 1 << 20):
                some = pairs[start : start + (1 << 20)]
                same = (cell_NM[some[:, 0]] == cell_NM[some[:, 1]]).sum(1)
                found.append(some[same >= least])
    return np.unique(np.concatenate(found), axis=0)


def _similarities(folder: str | Path, pairs_P2: np.ndarray, pool: ThreadPoolExecutor, workers: int) -> np.ndarray:
    """True similarity of each pair. Pairs are sorted by their first; their texts are read again, as many as fit."""
    out_P = np.zeros(len(pairs_P2), np.float32)
    if not len(pairs_P2):
        return out_P
    size_N = np.concatenate([texts.str.len_chars().to_numpy() for texts in _texts(folder)]).astype(np.int64)
    weight_P = np.cumsum(size_N[pairs_P2].sum(1))
    for part in np.split(np.arange(len(pairs_P2)), np.flatnonzero(np.diff(weight_P // SET_CHARACTERS)) + 1):
        wanted, inverse = np.unique(pairs_P2[part], return_inverse=True)
        pairs = inverse.reshape(-1, 2)
        hashes, sizes = _sets(folder, wanted, pool, workers)
        begins = np.cumsum(sizes) - sizes

        def compare(some: np.ndarray, hashes: np.ndarray = hashes, sizes: np.ndarray = sizes,
                    begins: np.ndarray = begins) -> np.ndarray:
            sides = [_gather(hashes, begins[side], sizes[side]) for side in some.T]
            both = np.concatenate(sides)
            both.sort()
            common = np.bincount((both[1:][both[1:] == both[:-1]] >> np.uint64(32)).astype(np.int64),
                                 minlength=len(some))
            return common / np.maximum(1, sizes[some].sum(1) - common)

        blocks = (pairs[i : i + PAIRS] for i in range(0, len(pairs), PAIRS))
        out_P[part] = np.concatenate(list(ordered_map(pool, compare, blocks, workers)))
    return out_P


def _gather(hashes: np.ndarray, begin_P: np.ndarray, size_P: np.ndarray) -> np.ndarray:
    """The sets at `begin_P` laid end to end as (number of the pair << 32 | hash)."""
    pair = np.repeat(np.arange(len(size_P), dtype=np.uint64), size_P)
    return (pair << np.uint64(32)) | hashes[spread(begin_P, size_P)]


def _sets(
    folder: str | Path, wanted: np.ndarray, pool: ThreadPoolExecutor, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """(32-bit hashes of the different sequences of each wanted record, end to end; how many each has)."""
    def blocks() -> Iterator[polars.Series]:
        at = 0
        for texts in _texts(folder):
            rows = wanted[np.searchsorted(wanted, at) : np.searchsorted(wanted, at + len(texts))] - at
            at += len(texts)
            if len(rows):
                yield texts.gather(rows)

    def unique(texts: polars.Series) -> tuple[np.ndarray, np.ndarray]:
        clean = normalise(texts)
        hash_S, owner_S = _shingles(clean.to_list(), clean.str.len_chars().to_numpy().astype(np.int64))
        both = (owner_S << np.uint64(32)) | (hash_S & np.uint64(EMPTY))
        both.sort()
        both = both[np.concatenate([[True], both[1:] != both[:-1]])]
        return both.astype(np.uint32), np.bincount((both >> np.uint64(32)).astype(np.int64), minlength=len(clean))

    hashes, sizes = zip(*ordered_map(pool, unique, blocks(), workers), strict=True)
    return np.concatenate(hashes), np.concatenate(sizes)


def _greedy(kept_N: np.ndarray, similarity_N: np.ndarray, pairs_P2: np.ndarray, similarity_P: np.ndarray) -> None:
    """Visit records in reading order; drop one that is near an earlier one that stays."""
    order = np.lexsort((pairs_P2[:, 0], -similarity_P, pairs_P2[:, 1]))  # by later, most similar, earliest
    dropped: set[int] = set()
    for at in order.tolist():
        earlier, later = pairs_P2[at].tolist()
        if later not in dropped and earlier not in dropped:
            dropped.add(later)
            kept_N[later], similarity_N[later] = earlier, similarity_P[at]
