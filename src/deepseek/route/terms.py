"""Text -> terms for retrieval, in English and Chinese.

English words in lower case without their endings. Chinese in pairs of neighbouring characters: against jieba's words
they find more and cost a quarter of the time (docs/log.md). Numbers of clauses in digits, so that `第二百六十四条` and
`第264条` are one term. Words that stand in every text are left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from operator import add

STOP = frozenset(
    "a an and are as at be by can do does for from had has have how i if in into is it its may not of on or such that "
    "the their them then there these they this to was were what when where which who why will with would you your "
    "什么 哪些 如何 怎么 多少 是否 的是".split())
_COMMON = (  # words of any English text, whatever it is about
    "about above after again against all also am another any anyone anything because been before being below between "
    "both but cannot come could did doing down during each else ever every everyone everything few first further get "
    "give given go good great he her here hers herself him himself his just know last let like made make me mine more "
    "most must my myself need never new no nobody nor nothing now off once one only other our ours ourselves out over "
    "own perhaps please put quite rather really same say see shall she should since so some someone something still "
    "such take tell than thank that these think those three through thus too toward two under until up upon us use "
    "very via want we well went whether while whom whose within without yet yours").split()
_COMMON_CHINESE = frozenset(
    "的了是在我有和就不都也很到要去你会着这那么吗呢吧啊呀怎什哪谁几个为与及或而且但又还被"
    "把对从以于之其此该它他她们您请给让能可想")
_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10_000}
_CLAUSE = re.compile(r"第([零〇一二两三四五六七八九十百千万]{1,12}|\d{1,6})条(?:之([一二三四五六七八九十]))?"
                     r"|\b(?:article|section|§) ?(\d{1,6})(?![\w.])")
_MARK = "clause"  # 264clause
ENDINGS = ("ements", "ement", "ments", "ment", "ations", "ation", "ings", "ions", "ing", "ion", "ed",
            "es", "is", "e", "s")
_CHARACTERS = r"㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f"
PIECE = rf"([{_CHARACTERS}]+)|[^\W_{_CHARACTERS}]+"  # Chinese characters, or a word of others
_PIECE = re.compile(PIECE)


def terms(text: str) -> list[str]:
    """The terms of a text in their order, repeated ones as often as they stand there."""
    text = _CLAUSE.sub(_clause, unicodedata.normalize("NFKC", text).lower())
    found: list[str] = []
    for piece in _PIECE.finditer(text):
        if chinese := piece[1]:
            found += map(add, chinese, chinese[1:]) if len(chinese) > 1 else chinese
        else:
            found.append(_stem(piece[0]))
    return [term for term in found if term not in STOP]


def clauses(found: Iterable[str]) -> list[str]:
    """Those of some terms that are numbers of clauses."""
    return [term for term in found if term.endswith(_MARK)]


def _clause(found: re.Match[str]) -> str:
    more = f"z{_value(found[2])}" if found[2] else ""
    return f" {_value(found[1] or found[3])}{more}{_MARK} "


def _value(number: str) -> int:
    """A number in digits or in Chinese below 100 million."""
    if number.isdigit():
        return int(number)
    total = part = digit = 0
    for c in number:
        if c in _DIGITS:
            digit = digit * 10 + _DIGITS[c]
        elif (unit := _UNITS[c]) == 10_000:
            total, part, digit = (total + part + digit) * unit, 0, 0
        else:
            part, digit = part + (digit or 1) * unit, 0
    return total + part + digit


@lru_cache(1 << 16)
def _stem(word: str) -> str:
    """Without the first of a few English endings that leaves four letters: diagnosis and diagnosed become diagnos."""
    if not word.isascii() or not word.isalpha():
        return word
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4 and not (ending == "s" and word[-2] in "su"):
            return word[: -len(ending)]
    return word


_COMMON_STEMS = frozenset(map(_stem, _COMMON))


def is_common(term: str) -> bool:
    """Whether a term is a function word, or a pair of Chinese characters of which one is."""
    return term in _COMMON_STEMS or term[0] in _COMMON_CHINESE or term[-1] in _COMMON_CHINESE


def is_chinese(term: str) -> bool:
    """Whether a term is of Chinese characters."""
    found = _PIECE.fullmatch(term)
    return found is not None and found[1] is not None
