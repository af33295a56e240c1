"""Chooses held-out documents: by a hash of their text, and at least a few of every name.

A document whose hash lies below the share is held out, whatever else there is: the split does not change when files are
added or reordered. Where that leaves a name with fewer than LEAST documents, those of its documents with the lowest
hashes follow, up to half of them: the next ones that a larger share would hold out. Long texts (books, the pieces of a
large file) are not taken whole for that; of a name that has nothing else, or a single document, the end of one is cut
off instead.

N: documents of a set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

LEAST = 2  # documents of every name
LONG = 100_000  # characters from which a document is not held out whole for that
_LINES = 20  # of notes
_TRIES = 100  # documents of a name that are looked at for that


def held_out_place(text: str, key: bytes) -> float:
    """Where a text falls in [0, 1): those below the held-out share are held out. A pure function of text and seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") / (1 << 64)


class Held(NamedTuple):
    """The documents of a name: all, those below the share, those that are held out. cut: a piece of one is."""

    documents: int
    by_hash: int
    held_out: int
    cut: bool = False


def hold_out(
    place_N: np.ndarray, name_N: np.ndarray, size_N: np.ndarray, fraction: float
) -> tuple[np.ndarray, list[int]]:
    """(which documents are held out, rows of those of which the end is). place_N: of `held_out_place`; name_N: numbers
    of names; size_N: characters. Equal texts are on one side; one that two names share is held out by its hash alone.
    """
    held_N = place_N < fraction
    cuts: list[int] = []
    if not fraction or not len(place_N):
        return held_N, cuts
    order = np.argsort(name_N, kind="stable")
    names = np.split(order, np.flatnonzero(np.diff(name_N[order])) + 1)  # the rows of each
    by_place = np.argsort(place_N, kind="stable")

    def rows_of(place: float) -> np.ndarray:
        start, end = np.searchsorted(place_N, [place, np.nextafter(place, 2)], sorter=by_place)
        return by_place[start:end]

    for rows in names:
        if held_N[rows].all():  # the least likely one is learnt
            held_N[rows_of(place_N[rows].max())] = False
    for rows in names:
        most, have = len(rows) // 2, int(held_N[rows].sum())
        wanted = min(LEAST, most)
        free = rows[~held_N[rows] & (size_N[rows] <= LONG)] if have < wanted else rows[:0]
        for place in np.unique(place_N[free])[:_TRIES]:
            same = rows_of(place)
            if have < wanted and have + len(same) <= most and (name_N[same] == name_N[rows[0]]).all():
                held_N[same] = True
                have += len(same)
        if not have:
            cuts.append(int(rows[place_N[rows].argmax()]))
    return held_N, cuts


def count_held(
    place_N: np.ndarray, name_N: np.ndarray, held_N: np.ndarray, cuts: list[int], fraction: float,
    names: Mapping[int, str],
) -> dict[str, Held]:
    """Count what `hold_out` chose, by name."""
    every, below, held, cut = (np.bincount(name_N[rows], minlength=max(names, default=0) + 1).tolist()
                               for rows in (slice(None), place_N < fraction, held_N, cuts))
    return {name: Held(every[number], below[number], held[number], bool(cut[number]))
            for number, name in sorted(names.items(), key=lambda item: item[1]) if every[number]}


def notes(held: Mapping[str, Held], fraction: float, what: str = "documents") -> list[str]:
    """Return a warning for every name of which the share alone holds out too little, or all."""
    lines = []
    for name, one in held.items() if fraction else ():
        short = one.by_hash < min(LEAST, one.documents // 2) or one.cut or not one.held_out
        if short or one.by_hash == one.documents:
            now = "the end of one is" if one.cut else "1 is" if one.held_out == 1 else f"{one.held_out} are"
            lines.append(
                f"warning: valid_fraction = {fraction:g} holds out {one.by_hash} of {one.documents:,} {what}"
                + (f" of {name}" if name else "")
                + (f"; {now} held out, so that it is both learnt and measured" if one.held_out or one.cut
                   else ", and there is nothing to hold out instead: it cannot be measured"))
    return lines if len(lines) <= _LINES else [*lines[:_LINES], f"… and so for {len(lines) - _LINES:,} more names"]
