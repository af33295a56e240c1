"""Encodes blocks of texts with the ids of `Tokenizer.encode`, about ten times as fast where words repeat.

The tokenizer library spends most of its time on cutting a text and keeping track of where each piece came from. Here
polars cuts a block of texts, the different pieces of the block are looked up in a table, and only those that are new
are given to the library. The table is emptied when it holds PIECES.

Where this holds. The tokenizer must cut as DeepSeek-V3's does and do nothing else to a text (`Tokenizer.pieces`). The
cuts are SPLIT of tokenizer.py without its look-aheads, which polars' regular expressions do not have. The first of
them concerns two unassigned code points, which are not in PLAIN. The other leaves the last of several blanks to the
word that follows; a mark put before that blank beforehand does the same. Texts with characters outside PLAIN take the
library's own way: the two engines come with Unicode tables of their own, and PLAIN has only what was assigned, and is
letter, mark, number, punctuation, symbol or white space, in all of them (tests/data/test_encode.py tries each one).

Shape letters: N texts, P pieces, U different pieces, T tokens.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    import polars

PIECES = 1 << 19
MARK = "\ufdd0"  # a noncharacter: not in PLAIN
_ZH = "一-龥\u3041-\u3096\u3099-\u30ff"
PLAIN = (
    "\\t-\\r -~\u00a0-\u00ac\u00ae-\u024f\u0300-\u036f\u0391-\u03a1\u03a3-\u03ff\u0400-\u0482\u048a-\u0527"  # Latin, …
    "\u2010-\u2027\u2030-\u205e\u2070\u2071\u2074-\u208e\u20a0-\u20b9\u2100-\u2189\u2190-\u23f3\u2460-\u27bf"  # signs
    "\u3000-\u303f\u3041-\u3096\u3099-\u30ff\u3400-\u4db5\u4e00-\u9fcb\ufe0f\uff01-\uff9f\U0001f300-\U0001f320"
    "\U0001f400-\U0001f43e\U0001f600-\U0001f640"
)
ODD = f"^$|[^{PLAIN}]"
BLANKS = rf"(\s)([^\S\r\n][^\s\p{{N}}{_ZH}])"
CUT = (
    rf"\p{{N}}{{1,3}}|[{_ZH}&&[\p{{L}}\p{{M}}]]+|[{_ZH}&&[\p{{P}}\p{{S}}]]+"
    r"""|[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}{MARK}]?[\p{{L}}\p{{M}}&&[^{_ZH}]]+| ?[\p{{P}}\p{{S}}&&[^{_ZH}]]+[\r\n]*"
    r"|\s*[\r\n]+|\s+"
)


class Encoder:
    """Ids of texts in blocks; several threads may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._lock = Lock()
        self._empty()

    def _empty(self) -> None:
        self.numbers: dict[str, int] = {}
        self._begin_U = self._count_U = np.zeros(0, np.int64)
        self._ids = np.zeros(0, np.uint32)

    def encode(self, texts: polars.Series) -> tuple[np.ndarray, np.ndarray]:
        """(ids_T uint32, text after text; count_N): of each text what `Tokenizer.encode` gives."""
        if self.tokenizer.pieces is None:
            return flat(self.tokenizer.encode_batch(texts.to_list()))
        odd_N = texts.str.contains(ODD)
        if not odd_N.any():
            return self._by_pieces(texts)
        odd = flat(self.tokenizer.encode_batch(texts.filter(odd_N).to_list()))
        return join(~odd_N.to_numpy(), self._by_pieces(texts.filter(~odd_N)), odd)

    def _by_pieces(self, texts: polars.Series) -> tuple[np.ndarray, np.ndarray]:
        import polars as pl

        if not len(texts):
            return flat([])
        cut = texts.str.replace_all(BLANKS, f"${{1}}{MARK}${{2}}").str.extract_all(CUT)
        size_N = cut.list.len().to_numpy().astype(np.int64)
        piece_P = cut.explode()
        found = pl.DataFrame({"piece": piece_P}).with_row_index().group_by("piece").agg("index")
        begin_U, count_U, ids = self._look_up(found["piece"].to_list())
        number_P = np.empty(len(piece_P), np.int64)
        number_P[found["index"].explode().to_numpy()] = np.repeat(
            np.arange(len(found)), found["index"].list.len().to_numpy())
        count_P = count_U[number_P]
        return ids[spread(begin_U[number_P], count_P)], np.add.reduceat(count_P, np.cumsum(size_N) - size_N)

    def _look_up(self, pieces: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(begin_U, count_U, ids): the ids of piece u are ids[begin_U[u] :][: count_U[u]]."""
        with self._lock:
            if len(self.numbers) > PIECES:
                self._empty()
            if new := [piece for piece in pieces if piece not in self.numbers]:
                self._learn(new)
            at = np.fromiter(map(self.numbers.__getitem__, pieces), np.int64, len(pieces))
            return self._begin_U[at], self._count_U[at], self._ids

    def _learn(self, new: list[str]) -> None:
        assert self.tokenizer.pieces is not None
        found = self.tokenizer.pieces.encode_batch_fast(new, add_special_tokens=False)
        ids, count = flat([one.ids for one in found])
        self.numbers.update(zip(new, range(len(self.numbers), len(self.numbers) + len(new)), strict=True))
        self._begin_U = np.concatenate([self._begin_U, len(self._ids) + np.cumsum(count) - count])
        self._count_U = np.concatenate([self._count_U, count])
        self._ids = np.concatenate([self._ids, ids])


def flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids_T uint32, count_N) of lists of ids."""
    count_N = np.array([len(ids) for ids in lists], np.int64)
    return np.fromiter((i for ids in lists for i in ids), np.uint32, int(count_N.sum())), count_N


def join(
    first_N: np.ndarray, first: tuple[np.ndarray, np.ndarray], rest: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids_T, count_N) of texts of which those marked in first_N are in `first` and the others in `rest`, in order."""
    ids_T, count_N = (np.concatenate(both) for both in zip(first, rest, strict=True))
    begin_N = np.cumsum(count_N) - count_N
    at_N = np.argsort(np.argsort(~first_N, kind="stable"))
    return ids_T[spread(begin_N[at_N], count_N[at_N])], count_N[at_N]


def spread(begin_N: np.ndarray, count_N: np.ndarray) -> np.ndarray:
    """Indices of runs laid end to end: begin, begin + 1, … count of them, for each."""
    ends_N = np.cumsum(count_N)
    return np.arange(ends_N[-1] if len(ends_N) else 0) + np.repeat(begin_N - (ends_N - count_N), count_N)
