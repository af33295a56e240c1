"""The form of a request: what of it is quoted or code, its lists, its sentences and their clauses.

Positions are those of the request itself: hidden text is as long. Linear time: no pattern has two open repetitions that
match the same character, and all look at most a few words ahead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from .asking import COLON, asks, asks_of, commands, has_order, introduces, is_question, length, wants, wonders

READ = 100_000  # characters at either end of a request that are looked at
ENDS = 2000  # characters at either end of a longer request that may ask; its middle is a document
NEAR = 300  # characters of a request before a list whose items ask for nothing by themselves
SENTENCES = 8  # of an item that may ask
LISTS = 32  # that are looked at, and of each as many items
CODE, QUOTE, CLOSED = "\x02", "\x01", "\x03"  # of hidden text; CLOSED: the end of a quote that may end a sentence
_OWN = str.maketrans(dict.fromkeys((CODE, QUOTE, CLOSED), " "))
_FENCE = re.compile(r"^[ \t]{0,9}(```|~~~)[^\n]*$", re.MULTILINE)
_QUOTED = re.compile(r"“[^“”]*”|「[^「」]*」|『[^『』]*』|《[^《》]*》|`[^`\n]*`|(?<!\w)\"[^\"]*\"(?!\w)"
                     r"|^[ \t]{0,9}>[^\n]*", re.MULTILINE)


def hide(text: str) -> str:
    """The text with code (its newlines too) and quotes hidden, so that nothing inside is taken for a task. A block that
    is not closed reaches to the end. Of a text of more than 2 READ characters the middle is hidden, too."""
    if len(text) > 2 * READ:
        ends = hide(text[:READ] + text[-READ:])
        middle = CODE if ends[READ - 1 : READ + 1] == 2 * CODE else QUOTE
        return ends[:READ] + middle * (len(text) - 2 * READ) + ends[READ:]
    text = text.translate(_OWN)
    parts, at, opening = [], 0, None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1] == opening[1]:
            parts += [text[at : opening.start()], CODE * (fence.end() - opening.start())]
            at, opening = fence.end(), None
    if opening is not None:
        parts += [text[at : opening.start()], CODE * (len(text) - opening.start())]
        at = len(text)
    return _QUOTED.sub(_hidden_quote, "".join(parts) + text[at:])


def _hidden_quote(found: re.Match[str]) -> str:
    after = found.string[found.end() : found.end() + 2].strip()[:1]
    ends = found[0][-2:-1] in (*".!?。！？…",) and not after.islower() and after not in (*",，;；)）",)
    return QUOTE * (len(found[0]) - 1) + (CLOSED if ends else QUOTE)


# ---- lists

_NUMBER = "[一二三四五六七八九十]{1,3}"
_BRACKETS = rf"[(（](?:\d{{1,5}}|[a-z]|[ivx]{{1,4}}|{_NUMBER})[)）]"
_ITEM = re.compile(
    rf"^(?P<indent>[ \t]{{0,40}})(?:(?P<n>(?:Q|Question |Task |Part |任务|问题)?\d{{1,5}} ?[.)、．:：）](?!\d))"
    rf"|(?P<p>{_BRACKETS})|(?P<l>[A-Za-z][.)](?=[ \t]))|(?P<z>(?:问题|任务)?{_NUMBER}[、.．:：])"
    rf"|(?P<d>第{_NUMBER}(?:个问题|个|条)?[,，、:：])|(?P<c>[①-⑳])"
    rf"|(?P<b>(?:[-*+–—](?=[ \t])|[•·●▪])(?:[ \t]?\[[ x]?\])?|\[[ x]?\](?=[ \t])))[ \t]*(?=\S)",
    re.MULTILINE | re.IGNORECASE)
_INLINE = re.compile(
    rf"(?<![^\s,，;；:：。.?？!！、和与])(?:(?P<n>\d{{1,2}}[.)、．）](?!\d))|(?P<p>{_BRACKETS})|(?P<c>[①-⑳])"
    rf"|(?P<d>第{_NUMBER}(?:个问题|个)?[,，、:：]|其{_NUMBER}[,，:：]?|{_NUMBER}是))[ \t]*(?=\S)")
_VALUE = re.compile(rf"\d+|{_NUMBER}|[①-⑳]|[a-z]+(?=\W*$)", re.IGNORECASE)


class TaskList(NamedTuple):
    """A list whose items are tasks: its range, theirs without their marks, and which kind it is."""

    start: int
    end: int
    items: list[tuple[int, int]]
    reason: str


def task_list(text: str) -> TaskList | None:
    """The first list of a hidden text whose items are tasks: lines with marks of one kind, else marks within a line."""
    for family, run in islice(_lists(text), LISTS):
        end = _end_of_last(text, run)
        starts = [found.start() for found in run] + [end]
        items = [(found.end(), stop) for found, stop in zip(run, starts[1:], strict=True)]
        if _are_tasks(text, starts[0], items):
            return TaskList(starts[0], end, items, "bulleted list" if family == "b" else "numbered list")
    return None


def _lists(text: str) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """(kind of mark, items) of what has at least two. Deeper lines belong to the item above them."""
    found_lists: list[tuple[str, list[re.Match[str]]]] = []
    for pattern in (_ITEM, _INLINE) if len(text) <= 4 * ENDS else (_ITEM,):
        last: dict[str, list[re.Match[str]]] = {}
        for found in pattern.finditer(text):
            family = str(found.lastgroup)
            run, first = last.get(family), family == "b" or _is_first(found[family])
            if run and pattern is _ITEM and len(found["indent"]) > len(run[0]["indent"]):
                continue
            if (first and family != "b") or (run is None and (first or pattern is _ITEM)):
                run = last[family] = []
                found_lists.append((family, run))
            if run is not None:
                run.append(found)
    return ((family, run) for family, run in found_lists if len(run) > 1)


def _is_first(mark: str) -> bool:
    value = _VALUE.search(mark)
    return value is not None and value[0].lower() in ("1", "a", "i", "一", "①")


def _end_of_last(text: str, run: Sequence[re.Match[str]]) -> int:
    """Where the last item ends: with its line, and the deeper lines and code below it; with its paragraph where items
    before it have several lines."""
    long = any("\n" in text[a.start() : b.start()].strip() for a, b in pairwise(run))
    at = _line_end(text, run[-1].end())
    while at < len(text):
        line = text[at + 1 : _line_end(text, at + 1)]
        if not line.strip() or (not long and not line.startswith((" ", "\t", CODE))):
            break
        at += 1 + len(line)
    return at


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _are_tasks(text: str, start: int, items: Sequence[tuple[int, int]]) -> bool:
    """Whether the items of a list are asked for: most are questions; or most ask, or the line above says that they are
    tasks, and nothing else in the request asks: then the list is what that is about."""
    end = items[-1][1]
    if start > ENDS and end < len(text) - ENDS:
        return False  # in the middle of a document
    items = items[:LISTS]
    if 2 * sum(is_question(text[max(a, b - 20) : b]) for a, b in items) >= len(items):
        return True
    above = [one for one in sentences(text, max(0, start - ENDS), start) if text[slice(*one)].strip()]
    below = sentences(text, end, min(len(text), end + ENDS))
    if any(asks_of(text, a, b) for a, b in (*above[:-1], *below)):
        return False
    asking = sum(any(asks_of(text, *one) for one in islice(sentences(text, a, b), SENTENCES)) or wonders(text[a:b])
                 for a, b in items)
    said = text[slice(*above[-1])].rstrip() if above else ""
    if introduces(said) or wants(said):
        return 2 * asking >= len(items) or (start <= NEAR and said.endswith((*COLON, "?", "？")))
    return asking > 1 and 3 * asking >= 2 * len(items) and not asks(said)


# ---- sentences and clauses

_END = re.compile(rf"[。！？!?；]+[”’」』)）\]\"]*|[;:](?=\s)|\.(?=\s|$|[㐀-鿿])|\n+|：|{CLOSED}|{CODE}+")
_SHORT = re.compile(r"(?:^\s*\d{1,3}|(?:^|\W)(?:[A-Za-z]|e\.g|i\.e|etc|dr|mr|mrs|ms|prof|vs|no|art|sec|fig|st|inc|ltd|"
                    r"approx))$", re.IGNORECASE)
_MARK = re.compile(r"[,，、。.;；!！?？]")
_CLAUSE = re.compile(r"[,，、](?P<comma>)\s*|(?<=\s)(?=(?<!and )then\b|and \w)", re.IGNORECASE)
_CHANGE = re.compile(r"(?<=[㐀-鿿])[，, ]*(?=(?:[A-Za-z']{1,20},? ){3})|(?<=[a-z])[,，]? ?(?=[㐀-鿿]{6})")
_WORDS = re.compile(r"(?:[A-Za-z']{1,20}[,.?!]? ){2}[A-Za-z']{1,20}")
_WRAPPED = 60  # characters of a line that is continued in the next


def sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of the sentences between two positions. A code block is one."""
    at = start
    for found in _END.finditer(text, start, end):
        stop, mark = found.end(), found[0][0]
        if mark == "." and _SHORT.search(text[max(at, found.start() - 8) : found.start()]):
            continue
        if mark == CODE and found.start() > at:
            yield at, found.start()
            at = found.start()
        if found[0] == "\n" and text[stop : stop + 1].islower() and found.start() - at >= _WRAPPED:
            continue
        if stop > at:
            yield at, stop
            at = stop
    if at < end:
        yield at, end


def clauses(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """A sentence, or its clauses where these chain tasks: in an order (then, finally), at least three, or where the
    language changes."""
    cuts: list[tuple[int, bool, bool]] = []  # (where, whether its place in an order is said, whether after a comma)
    for found in _CLAUSE.finditer(text, start, end):
        if cuts and cuts[-1][0] == found.end():
            continue
        clause = text[found.end() : min(end, found.end() + 80)]
        ordered = has_order(clause)
        if commands(clause) and length(_MARK.split(clause, maxsplit=1)[0]) > 3 and (ordered or clause[0] not in "用把"):
            cuts.append((found.end(), ordered, found["comma"] is not None))
    # "When you have time, first explain …, then …": what comes before belongs to the first task
    cuts = cuts[next((i for i, (at, _, _) in enumerate(cuts) if asks_of(text, start, at)), len(cuts)):]
    if len(cuts) < 2 or not any(comma for _, _, comma in cuts):
        cuts = [cut for cut in cuts if cut[1]]
    edges = {at for at, _, _ in cuts}
    edges |= {found.end() for found in _CHANGE.finditer(text, start, end)
              if asks_of(text, found.end(), end) and asks_of(text, start, found.start())
              and (text[found.end()].isascii() or _WORDS.search(text, start, found.start() + 1))}
    return list(pairwise([start, *sorted(edges - {start}), end]))
