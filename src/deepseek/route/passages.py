"""Documents -> passages: pieces of a section, of a paragraph or more, cut where a reader would cut."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from .documents import CLAUSE, Block, Document

# where a block that is too long is cut: the first of these that is found in the second half of what fits
_CUTS = tuple(map(re.compile, (
    r"[.!?。！？…;；:：][\"'”’」』）)\]]*[^\S\n]*\n",
    r"[.!?][\"'”’)\]]*\s|[。！？…；][”’」』）]*", r"\n", r"\s|[，、]")))


class Cut(NamedTuple):
    """A passage of a document: text[start:end]. section: the titles above it, the widest first."""

    section: tuple[str, ...]
    start: int
    end: int


def passages(document: Document, size: int) -> Iterator[Cut]:
    """Cut a document. size: characters of a passage at most.

    Blocks of one section are put together while they fit; a clause (`第九条`, `Article 9`) begins a passage, and is the
    last part of the section of what follows. A block that is longer is cut at the end of a paragraph, a sentence or a
    line, at a blank, or anywhere. Together the passages are the text but for white space and headings without text
    below them.
    """
    text = document.text
    open_: Cut | None = None  # what is being put together
    lone: Block | None = None  # a heading with nothing below it yet
    clause, above = "", None
    for block in document.blocks:
        if block.heading:
            yield from _fitting(text, open_, size)
            open_ = None
            if lone and block.titles[: len(lone.titles)] != lone.titles:
                yield Cut(lone.titles, *_stripped(text, lone.start, lone.end))
            lone = block
            continue
        begins = CLAUSE.match(text, block.start, block.end)
        if begins or block.titles != above:
            clause, above = " ".join(begins[1].split()) if begins else "", block.titles
        section = (*block.titles, clause) if clause else block.titles
        if open_ and not begins and open_.section == section and block.end - open_.start <= size:
            open_ = open_._replace(end=block.end)
        else:
            yield from _fitting(text, open_, size)
            open_ = Cut(section, block.start, block.end)
        lone = None
    yield from _fitting(text, open_, size)
    if lone:
        yield Cut(lone.titles, *_stripped(text, lone.start, lone.end))


def _fitting(text: str, cut: Cut | None, size: int) -> Iterator[Cut]:
    """A passage without white space around it, in parts where it is longer than `size`."""
    if cut is None:
        return
    start, end = _stripped(text, cut.start, cut.end)
    while end - start > size:
        half, most = start + size // 2, start + size
        stop = next((last.end() for kind in _CUTS for last in [_last(kind, text, half, most)] if last), most)
        yield Cut(cut.section, *_stripped(text, start, stop))
        start, end = _stripped(text, stop, end)
    if start < end:
        yield Cut(cut.section, start, end)


def _last(kind: re.Pattern[str], text: str, start: int, end: int) -> re.Match[str] | None:
    return next(iter(deque(kind.finditer(text, start, end), maxlen=1)), None)


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
