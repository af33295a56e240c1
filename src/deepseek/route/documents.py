"""Files -> text with its sections: plain text, Markdown, HTML and PDF.

A document is its text and its blocks, the pieces that belong together: a paragraph, a heading, a list, a fenced code
block. Each block knows the section that it stands in. The text of a plain or Markdown file is the file's own, with \\n
for every end of a line, so that a range of characters means the same in both.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import ConfigError, DataError, MoEDRError, shown
from ..files import not_utf8

KINDS = {".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".xhtml": "html", ".pdf": "pdf"}
INSTALL = "pip install 'moe-dr[knowledge]'"
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_NUMBER = "[零〇一二两三四五六七八九十百千万0-9０-９]{1,12}"
_CHAPTER = rf"第{_NUMBER}[编章节篇](?=[\s\u3000])"
CLAUSE = re.compile(rf"[ \t\u3000]*(第{_NUMBER}条(?:之{_NUMBER})?"
                    r"|(?:Article|Section|ARTICLE|SECTION|§) ?\d[\d.]{0,12})(?!\w)")
_BREAK = re.compile(rf"\n(?:[^\S\n]*\n)+|\n(?={CLAUSE.pattern}|[ \t\u3000]*{_CHAPTER})")
_CHAPTER_LINE = re.compile(rf"[ \t\u3000]*({_CHAPTER}[^\n。；]{{0,60}})\n?$")
_CHAPTERS = "篇编章节"  # from the widest to the narrowest
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?([\w-]{1,40})""", re.IGNORECASE)
_BLOCKS = frozenset(
    "address article aside blockquote body caption center dd details div dl dt fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hr html legend li main ol p pre section summary table tbody tfoot thead tr ul".split())
_UNSEEN = frozenset("head iframe nav noscript object script select style svg template textarea".split())


class Block(NamedTuple):
    """A piece of the text. titles: of the section that it stands in, the widest first. heading: it is the section's
    title itself."""

    start: int
    end: int
    titles: tuple[str, ...] = ()
    heading: bool = False


class Document(NamedTuple):
    """What was read of a file. kind: text, markdown, html or pdf."""

    kind: str
    text: str
    blocks: list[Block]


def is_pdf(data: bytes) -> bool:
    """Whatever the file is called."""
    return data.startswith(b"%PDF-")


def parse(data: bytes, kind: str, name: str, encoding: str = "utf-8") -> Document:
    """A document of a file's bytes. name: what messages call it. Raises as `read_document` (reading.py) does."""
    kind = "pdf" if is_pdf(data) else kind
    try:
        text, blocks = _PARSERS[kind](data, encoding)
    except UnicodeDecodeError as error:
        said = not_utf8(error) if error.encoding == "utf-8" else (
            f"not {error.encoding}: {error.reason} at {error.start}")
        raise DataError(f"{name}: {said}; another encoding is named with encoding, such as gb18030") from None
    except ValueError as error:
        raise error.__class__(f"{name}: {error}") if isinstance(error, MoEDRError) else DataError(
            f"{name}: {error}") from None
    text = text.encode("utf-8", "replace").decode()  # lone surrogates, which a broken font of a PDF may give
    if not any(text[block.start : block.end].strip() for block in blocks):
        raise DataError(f"{name}: holds no text" + (" (pages that are pictures need text recognition first)"
                                                    if kind == "pdf" else ""))
    return Document(kind, text, blocks)


def _decode(data: bytes, encoding: str) -> str:
    encoding = next((said for mark, said in _MARKS if data.startswith(mark)), encoding)
    if b"\0" in data and not encoding.startswith(("utf-16", "utf-32")):
        raise DataError("a binary file: text, Markdown, HTML and PDF can be read")
    try:
        text = data.decode(encoding)
    except LookupError:
        raise ConfigError(f"encoding = {encoding!r}: no such encoding") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


# ---- text and Markdown ----------------------------------------------------------------------------------------------


def _plain(data: bytes, encoding: str) -> tuple[str, list[Block]]:
    text = _decode(data, encoding)
    return text, list(_paragraphs(text, 0, len(text), ()))


def _paragraphs(text: str, start: int, end: int, titles: tuple[str, ...]) -> Iterator[Block]:
    """Blocks between two places. Lines such as `第三章 合同的履行` are headings below `titles`."""
    chapters: dict[str, str] = {}
    while start < end:
        found = _BREAK.search(text, start, end)
        stop, then = (found.start(), found.end()) if found else (end, end)
        if text[start:stop].strip():
            heading = _CHAPTER_LINE.match(text, start, stop)
            if heading:
                rank = next(c for c in heading[1] if c in _CHAPTERS)
                chapters = {one: title for one, title in chapters.items()
                            if _CHAPTERS.index(one) < _CHAPTERS.index(rank)} | {rank: _line(heading[1])}
            yield Block(start, stop, (*titles, *chapters.values()), heading is not None)
        start = then


def _markdown(data: bytes, encoding: str) -> tuple[str, list[Block]]:
    text = _decode(data, encoding)
    blocks: list[Block] = []
    titles: dict[float, str] = {}
    fence, start, at = "", 0, 0  # start: of what is in no block yet
    blank, before = True, ""  # whether the line before ended a paragraph; the line before, where it is one's first
    for line in text.split("\n"):
        end = min(at + len(line) + 1, len(text))
        mark = _FENCE.match(line)
        level, title, since = 0.0, "", at
        if fence:
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
                blocks.append(Block(start, end, tuple(titles.values())))
                start = end
        elif mark:
            blocks += _paragraphs(text, start, at, tuple(titles.values()))
            fence, start = mark[1], at
        elif heading := _HEADING.match(line):
            level, title = len(heading[1]), heading[2].rstrip()
            bare = title.rstrip("#")
            title = bare if bare[-1:] in ("", " ", "\t") else title
        elif before and (underline := _UNDERLINE.match(line)):
            level, title, since = 1 if underline[1][0] == "=" else 2, before, at - len(before) - 1
        if level:
            blocks += _paragraphs(text, start, since, tuple(titles.values()))
            if level == 1 and 1 in titles and blocks[-1].heading:  # directly below another: a second line of the title
                level = 1.5
            titles = {one: said for one, said in titles.items() if one < level} | {level: _line(title)}
            blocks.append(Block(since, end, tuple(titles.values()), True))
            start = end
        before = line if blank and line.strip() and not level and not fence else ""
        blank = not line.strip() or level > 0
        at = end
    blocks += _paragraphs(text, start, len(text), tuple(titles.values()))
    return text, blocks


# ---- HTML -----------------------------------------------------------------------------------------------------------


class _Writer:
    """A text that grows block by block."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.blocks: list[Block] = []
        self.titles: dict[int, str] = {}
        self.length = 0
        self.open: list[str] = []  # of the block that is not finished

    def end_block(self, level: int = 0, keep: bool = False) -> None:
        """level: of a heading. keep: white space stays as it is."""
        said, self.open = "".join(self.open), []
        said = said.strip("\n").rstrip() if keep else "\n".join(
            " ".join(line.split()) for line in said.split("\n")).strip()
        if not said:
            return
        if level:
            self.titles = {one: title for one, title in self.titles.items() if one < level} | {level: _line(said)}
        self.blocks.append(Block(self.length, self.length + len(said), tuple(self.titles.values()), level > 0))
        self.parts += [said, "\n\n"]
        self.length += len(said) + 2


def _html(data: bytes, encoding: str) -> tuple[str, list[Block]]:
    try:
        from lxml import etree, html
    except ImportError:
        raise ConfigError(f"reading HTML takes lxml: {INSTALL}") from None
    said = _CHARSET.search(data[:4096])
    text = _decode(data, said[1].decode() if said else encoding)
    writer = _Writer()
    if not text.strip():
        return "", []
    parser = html.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        root = html.document_fromstring(text.encode(errors="replace"), parser=parser)
    except (etree.LxmlError, ValueError):  # nothing but comments, say
        root = None
    if lost := next((error for error in parser.error_log if error.type == etree.ErrorTypes.ERR_RESOURCE_LIMIT), None):
        raise DataError(f"HTML beyond the parser's limits: {lost.message.partition(',')[0]}")
    if root is None:
        return "", []
    title = root.findtext(".//title")
    if title and title.strip():
        writer.titles[0] = _line(title)
    unseen = keep = 0
    for event, node in etree.iterwalk(root, events=("start", "end")):
        tag = str(node.tag)
        hidden = tag in _UNSEEN or node.get("hidden") is not None
        if event == "start":
            unseen += hidden
            if tag in _BLOCKS:
                writer.end_block(keep=keep > 0)
            keep += tag == "pre"
            said_here = node.text
        else:
            unseen -= hidden
            if tag in _BLOCKS:
                level = int(tag[1]) if re.fullmatch("h[1-6]", tag) else 0
                if level == 1:
                    writer.titles.pop(0, None)  # the page's title says the same once more
                writer.end_block(level, keep > 0)
            keep -= tag == "pre"
            if not unseen and tag in ("br", "td", "th"):
                writer.open.append("\n" if tag == "br" else " ")
            said_here = node.tail
        if said_here and not unseen:
            writer.open.append(said_here if keep else said_here.replace("\n", " "))
    writer.end_block()
    return "".join(writer.parts), writer.blocks


# ---- PDF ------------------------------------------------------------------------------------------------------------


def _pdf(data: bytes, encoding: str) -> tuple[str, list[Block]]:
    try:
        import pypdf
    except ImportError:
        raise ConfigError(f"reading PDF takes pypdf: {INSTALL}") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it says what it mends
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError("is encrypted: save a copy without the password")
        pages = [page.extract_text() for page in reader.pages]
        outline = {} if reader.is_encrypted else _outline(reader)
    except (MoEDRError, MemoryError):
        raise
    except Exception as error:  # of a broken file pypdf raises whatever its parts do
        raise DataError(f"not a PDF that can be read: {type(error).__name__}: {shown(str(error), 120)}") from None
    parts: list[str] = []
    blocks: list[Block] = []
    length, title = 0, ""
    for number, page in enumerate(pages, 1):
        page = "".join(c for c in page.replace("\r", "\n") if c in "\n\t" or c.isprintable())
        title = outline.get(number, title)
        titles = (*((title,) if title else ()), f"page {number}")
        blocks += [block._replace(start=block.start + length, end=block.end + length)
                   for block in _paragraphs(page, 0, len(page), titles)]
        parts += [page, "\n\n"]
        length += len(page) + 2
    return "".join(parts), blocks


def _outline(reader: Any) -> dict[int, str]:
    """Page number -> the title that begins there last, where the file has an outline."""
    found, todo = dict[int, str](), list(reader.outline)
    for entry in todo:  # grows: an entry may be a list of those below the one before
        if isinstance(entry, list):
            todo += entry
        elif (page := reader.get_destination_page_number(entry)) is not None and len(found) < 10_000:
            found.setdefault(page + 1, _line(str(entry.title)))
    return found


def _line(text: str) -> str:
    """A title on one line, of bounded length."""
    return " ".join(text.split())[:120]


_PARSERS: dict[str, Callable[[bytes, str], tuple[str, list[Block]]]] = {
    "text": _plain, "markdown": _markdown, "html": _html, "pdf": _pdf}
