"""A request -> its sub-tasks, by rules: lists of tasks, several questions, code blocks, changes of language, and chains
("first …, then …, finally …").

    for segment in split("1. Explain clause 4.\\n2. What is 15 % of 2,340?"):
        segment.text, segment.context            # request[segment.start : segment.end] == segment.text

Quoted text and code are hidden first, so that nothing inside them is taken for a task. The rest is cut into sentences,
and sentences into clauses where these chain tasks. Sentences that do not ask (asking.py) are details of a neighbour, or
context of all parts: what comes first, a document, the last line. A list is tasks only where its items, or the line
above it, ask: recipes, statutes and logs have lists too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from .asking import (
    COLON,
    asks_of,
    goes_on,
    has_order,
    is_chinese,
    is_elsewhere,
    is_label,
    is_new,
    is_question,
    length,
    matter,
    takes_more,
)
from .outline import CODE, ENDS, clauses, hide, sentences, task_list
from .routing import RoutedPart, Router

MOST = 8  # segments; what follows stays in the last
CONTEXT = 300  # characters of it that are looked at with a segment that does not suffice
DETAIL = 400  # characters between two tasks that are still details of one; more are a document


@dataclass(frozen=True)
class Segment:
    """A part of a request that can be answered by itself. text: request[start:end]. context: what of the request
    belongs to all parts (what introduces them, a shared document or code, a closing instruction), in its order. reason:
    why it is a part: `numbered list`, `bulleted list`, `questions`, `tasks`, `code block` or `language`; "" where the
    request is one."""

    text: str
    start: int
    end: int
    context: str = ""
    reason: str = ""


def route_segments(pool: Router, text: str) -> list[RoutedPart]:
    """The segments of a request, each routed by itself; where its own text does not suffice, with the beginning of the
    context. Neighbours with the same member stay apart."""
    found = []
    segments = split(text)
    for segment in segments:
        own = matter(segment.text) if len(segments) > 1 else text  # "hi" and "please" are about no part
        decision = pool.route(own)
        if decision.abstained and segment.context:
            more = pool.route(f"{own}\n\n{segment.context[:CONTEXT]}")
            decision = decision if more.abstained else more
        found.append(RoutedPart(segment.text, decision, segment.start, segment.context, segment.reason))
    return found


class _Part(NamedTuple):
    """A sentence, clause or item. reason: "" for what does not ask. chained: a clause of a chain, not its first."""

    start: int
    end: int
    reason: str
    chained: bool = False


_CODE_WORDS = re.compile(r"\b(?:code|function|loop|script|handler|snippet|program|class|method|query)\b|"
                         r"代码|函数|程序|脚本", re.IGNORECASE)
_POINTS = re.compile(r":\s*$|：\s*$|\b(?:it|this|that|these|above|below|errors?|crash\w*|exception|fails?|bugs?)\b|"
                     r"这|报错|[上下]面", re.IGNORECASE)
_OF_PREVIOUS = re.compile(r"\W{0,3}(?:it|this|that|they|these|use|using|make sure|keep|don't|do not|no|not|include|"
                          r"with|without|about|around|at least|at most)\b|"
                          r"\W{0,3}(?:要求|字数|不要|不超过|大约|用|格式|注意)", re.IGNORECASE)
_OF_NEXT = re.compile(r"\W{0,3}(?:i|i'm|i've|my|we|our)\b|\W{0,3}[我本]", re.IGNORECASE)
_TRIM = " \t\r\n\f\v,，;；、"
_AND = re.compile(r"and\s+(?!then|also|finally|lastly)", re.IGNORECASE)


def split(text: str) -> list[Segment]:
    """The sub-tasks of a request in their order, at most MOST; one segment of the whole text where there are not
    several. Ranges do not overlap. What lies outside of them is context, or joins them: marks of lists, "and"."""
    hidden = hide(text)
    parts, shared = _parts(hidden)
    segments: list[_Part] = []
    tiny = False  # the first
    for part in (_trimmed(hidden, one) for one in parts):
        own = hidden[part.start : part.end]
        if segments and (tiny or len(segments) == MOST or (length(own) < 2 and CODE not in own)):
            segments[-1] = segments[-1]._replace(end=part.end)
            tiny = False
        else:
            segments.append(part)
            tiny = len(segments) == 1 and length(own) < 2 and CODE not in own
    if len(segments) < 2:
        return [Segment(text, 0, len(text))]
    context = "\n\n".join(piece for a, b in shared if (piece := text[a:b].strip()))
    language: bool | None = None
    found: list[Segment] = []
    for part in segments:
        own, before = hidden[part.start : part.end], language
        language, reason = is_chinese(own), part.reason
        if not reason.endswith("list"):
            reason = "language" if before not in (None, language) else "code block" if CODE in own else reason
        found.append(Segment(text[part.start : part.end], part.start, part.end, context, reason))
    return found


def _parts(text: str) -> tuple[list[_Part], list[tuple[int, int]]]:
    """(what asks, ranges of what belongs to all of it) of a hidden text."""
    if found := task_list(text):
        stop = min(len(text), found.end + ENDS)
        below = [_Part(a, b, "tasks" if asks_of(text, a, b) and (
            is_question(text[max(a, b - 20) : b]) or has_order(text[a:b])) else "")
            for a, b in (*sentences(text, found.end, stop), *([(stop, len(text))] if stop < len(text) else ()))]
        more, shared = _grouped(text, below) if any(part.reason for part in below) else ([], [(found.end, len(text))])
        return [_Part(a, b, found.reason) for a, b in found.items] + more, [(0, found.start), *shared]
    ranges = [*sentences(text, 0, len(text))] if len(text) <= 2 * ENDS else [
        *sentences(text, 0, ENDS), (ENDS, len(text) - ENDS), *sentences(text, len(text) - ENDS, len(text))]
    units: list[_Part] = []
    for a, b in ranges:
        if units and not text[a:b].strip():
            units[-1] = units[-1]._replace(end=b)
        elif b - a > ENDS or text[a] == CODE:
            units.append(_Part(a, b, ""))
        else:
            reason = "questions" if is_question(text[max(a, b - 20) : b]) else "tasks"
            if units and not units[-1].reason and text[units[-1].start : units[-1].end].rstrip().endswith(";"):
                a = units.pop().start
            own = clauses(text, a, b)
            units += [_Part(c, d, reason if len(own) == 1 else "tasks", c > a) for c, d in own] if (
                len(own) > 1 or asks_of(text, a, b)) else [_Part(a, b, "")]
    return _grouped(text, units)


def _grouped(text: str, units: Sequence[_Part]) -> tuple[list[_Part], list[tuple[int, int]]]:
    """Sentences that ask for something new, each with those that belong to it, and the rest, which is shared."""
    owner = _asking(text, units)
    asking = [i for i, one in enumerate(owner) if one is not None]
    heads = {i: text[units[i].start : min(units[i].end, units[i].start + 300)] for i in asking}
    about_code = {i for i, head in heads.items() if _CODE_WORDS.search(head) or (
        _POINTS.search(head) and any(units[j].chained for j in (i, i + 1) if j in heads))}
    for before, after in zip([None, *asking], [*asking, None], strict=True):
        _details(text, units, owner, before, after, about_code)
    if len(asking) > 1 and (lead := units[: owner.index(asking[0])]) and lead[-1].end - lead[0].start <= DETAIL:
        second = units[owner.index(asking[1])]
        if is_elsewhere(text[second.start : second.end]):
            owner[: len(lead)] = [asking[0]] * len(lead)
    parts: dict[int, _Part] = {}
    shared: list[tuple[int, int]] = []
    for unit, one in zip(units, owner, strict=True):
        if one is not None:
            parts[one] = parts[one]._replace(end=unit.end) if one in parts else (
                unit._replace(reason=units[one].reason))
        elif shared and shared[-1][1] == unit.start:
            shared[-1] = shared[-1][0], unit.end
        else:
            shared.append((unit.start, unit.end))
    return list(parts.values()), shared


def _asking(text: str, units: Sequence[_Part]) -> list[int | None]:
    """[i at i] for what asks for something new, None for others: details, what goes on about the same, and what a task
    is about ("Summarize the text below.", "Translate: …")."""
    owner: list[int | None] = [None] * len(units)
    last, material = None, False
    for i, unit in enumerate(units):
        own = text[unit.start : unit.end]
        if last is not None and not material:
            before = text[units[i - 1].start : units[i - 1].end]
            asked = text[units[last].start : units[last].end]
            material = (is_label(own) and ("\n" in before[-2:] or takes_more(asked))) or (
                last == i - 1 and takes_more(before) and ("\n" in before[-2:] or before.rstrip().endswith(COLON)))
        if material and not is_new(own) and not unit.chained:
            continue
        material = False
        between: list[str] = [] if last is None else [
            text[units[j].start : units[j].end] for j in range(last + 1, i) if owner[j] is None]
        anew = owner[i - 1] is None and bool(between) and (
            bool(_OF_NEXT.match(between[-1])) or any(map(is_new, between)))
        if unit.reason and (last is None or unit.chained or not goes_on(own, anew)):
            last = owner[i] = i
    return owner


def _details(text: str, units: Sequence[_Part], owner: list[int | None], before: int | None, after: int | None,
             about_code: Set[int]) -> None:
    """Whom the sentences between two that ask belong to: some to the one before, the others to the one after; None: to
    all. about_code: those that ask and speak of code; where there are several, a block of it belongs to all."""
    at, stop = 0 if before is None else before + 1, len(units) if after is None else after
    if at == stop:
        return
    below = False  # a colon
    while before is not None and at < stop:
        own, said = text[units[at].start : units[at].end], text[units[at - 1].start : units[at - 1].end]
        below = (below and "\n\n" not in said) or said.rstrip().endswith(COLON)
        if not (units[at].reason or below) and (
                not _about_code(said) or len(about_code) > 1 if own[0] == CODE else
                units[stop - 1].end - units[at].start > DETAIL or "\n" in said
                or (after is not None and not _OF_PREVIOUS.match(own)
                    and (is_question(said.rstrip()) or is_new(own) or (
                        bool(_OF_NEXT.match(own)) and not is_new(text[units[after].start : units[after].end]))))):
            break
        owner[at] = before
        at += 1
    if after is None or at == stop:
        return
    if before is None:  # what comes first belongs to all, but for code, and the line that introduces it
        code = next((i for i in range(at, stop) if text[units[i].start] == CODE), None)
        if code is None or about_code - {after}:
            return
        at = code - (code > at and _about_code(text[units[code - 1].start : units[code - 1].end]))
    elif units[stop - 1].end - units[at].start > DETAIL or (
            len(about_code) > 1 and any(text[one.start] == CODE for one in units[at:stop])):
        return
    owner[at:stop] = [after] * (stop - at)


def _about_code(text: str) -> bool:
    return bool(_CODE_WORDS.search(text) or _POINTS.search(text))


def _trimmed(text: str, part: _Part) -> _Part:
    """Without space and marks around it, and "and" before it."""
    own = text[part.start : part.end]
    start, end = part.start + len(own) - len(own.lstrip(_TRIM)), part.start + len(own.rstrip(_TRIM))
    joined = _AND.match(text, start, part.end)
    return part._replace(start=joined.end() if joined else start, end=max(start, end))
