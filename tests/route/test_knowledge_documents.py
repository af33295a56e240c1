"""Files -> text, sections and passages."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from deepseek.errors import ConfigError, DataError
from deepseek.route.documents import parse
from deepseek.route.passages import passages
from deepseek.route.reading import read_document

MARKDOWN = """Before.

Big Title
=========

Text of it.

Part
---
More, in two
lines.

```python
# no heading
```

### Deep ###

| a | b |
| - | - |

# Second

# Its second line

## Empty

## Last
End.
"""
HTML = """<html><head><title>Page</title><style>p { color: red }</style></head><body><nav>Menu</nav>
<h1>Big <b>Title</b></h1><p>One
  two<br>three&nbsp;<i>fo</i>ur</p><div hidden>Ignore this</div><script>alert(1)</script>
<h2>Part</h2><table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table><ul><li>x</li><li>y</li></ul>
<pre> keep
   this</pre>tail</body></html>"""
CHINESE = """　　第三章　合同的履行

第一条　甲方应当付款。
甲方逾期的，应当支付违约金。
第二条　乙方应当交货。

第三节 其他
第二条之一　另有约定的除外。第三条第二款的规定不适用。
"""


def cut(text: str, kind: str, size: int = 1000) -> list[tuple[tuple[str, ...], str]]:
    document = parse(text.encode(), kind, "file")
    return [(one.section, document.text[one.start : one.end]) for one in passages(document, size)]


def test_markdown() -> None:
    assert cut(MARKDOWN, "markdown") == [
        ((), "Before."), (("Big Title",), "Text of it."),
        (("Big Title", "Part"), "More, in two\nlines.\n\n```python\n# no heading\n```"),
        (("Big Title", "Part", "Deep"), "| a | b |\n| - | - |"),
        (("Second", "Its second line", "Empty"), "## Empty"), (("Second", "Its second line", "Last"), "End.")]


def test_html() -> None:
    assert cut(HTML, "html") == [(("Big Title",), "One two\nthree four"),
                                 (("Big Title", "Part"), "a b\n\nc\n\nx\n\ny\n\n keep\n   this\n\ntail")]
    assert cut("<title>Page</title><p>only", "html") == [(("Page",), "only")]


def test_clauses_and_chapters_of_plain_text() -> None:
    chapter = "第三章 合同的履行"
    assert cut(CHINESE, "text") == [
        ((chapter, "第一条"), "第一条　甲方应当付款。\n甲方逾期的，应当支付违约金。"),
        ((chapter, "第二条"), "第二条　乙方应当交货。"),
        ((chapter, "第三节 其他", "第二条之一"), "第二条之一　另有约定的除外。第三条第二款的规定不适用。")]
    assert [section for section, _ in cut("Article 1. A\n\nmore\n\nArticle 2\nB\n\nSection 3.4 C", "text")] == [
        ("Article 1.",), ("Article 2",), ("Section 3.4",)]


def test_long_blocks_are_cut_where_a_reader_would() -> None:
    sentences = "".join(f"Sentence number {i} is here. " for i in range(50))
    for _, text in cut(sentences, "text", 100):
        assert len(text) <= 100 and text.startswith("Sentence") and text.endswith("here.")
    assert [text[-1] for _, text in cut("这是一句很长的话。" * 50, "text", 100)] == ["。"] * 5
    assert [len(text) for _, text in cut("x" * 250, "text", 100)] == [100, 100, 50]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab1 .。\n#=`~-第一条章　<p>/h", max_size=300), st.sampled_from(["text", "markdown", "html"]),
       st.integers(1, 40))
def test_passages_are_pieces_in_order_and_nothing_is_lost(text: str, kind: str, size: int) -> None:
    try:
        document = parse(text.encode(), kind, "file")
    except DataError as error:
        assert "holds no text" in str(error)
        return
    at, covered = 0, [False] * len(document.text)
    for one in passages(document, size):
        assert at <= one.start < one.end <= len(document.text)
        inside = document.text[one.start : one.end]
        assert inside == inside.strip() and (len(inside) <= size or any(
            block.heading and block.start <= one.start < block.end for block in document.blocks))
        covered[one.start : one.end] = [True] * (one.end - one.start)
        at = one.end
    for block in document.blocks:
        covered[block.start : block.end] = [True] * (block.end - block.start) if block.heading else (
            covered[block.start : block.end])
    assert not "".join(c for c, there in zip(document.text, covered, strict=True) if not there).strip()


def pdf(*pages: str, password: str | None = None, outline: dict[int, str] | None = None) -> bytes:
    writer = pypdf.PdfWriter()
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
                             NameObject("/BaseFont"): NameObject("/Helvetica")})
    for text in pages:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject(
            {NameObject("/F1"): font})})
        stream = DecodedStreamObject()
        stream.set_data(b"BT /F1 12 Tf 10 200 Td " + b" 0 -40 Td ".join(
            b"(" + line.encode() + b") Tj" for line in text.split("\n")) + b" ET")
        page[NameObject("/Contents")] = stream
    for number, title in (outline or {}).items():
        writer.add_outline_item(title=title, page_number=number - 1)
    if password is not None:
        writer.encrypt(password)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_pdf(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("First page.\nIts second line.", "Second page.", outline={2: "Part two"}))
    document = read_document(tmp_path / "a.pdf")
    found = [(one.section, document.text[one.start : one.end]) for one in passages(document, 1000)]
    assert document.kind == "pdf" and [section for section, _ in found] == [("page 1",), ("Part two", "page 2")]
    assert found[0][1].split() == ["First", "page.", "Its", "second", "line."] and found[1][1] == "Second page."


@pytest.mark.parametrize(("data", "message"), [
    (pdf(""), r"holds no text \(pages that are pictures need text recognition first\)"),
    (pdf("secret", password="word"), "is encrypted"), (pdf("text")[:200], "not a PDF that can be read"),
    (pdf("text").replace(b"/Pages", b"/Paged"), "holds no text|not a PDF that can be read")])
def test_pdfs_that_cannot_be_read(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"file.pdf: (?:{message})"):
        parse(data, "pdf", "file.pdf")


def test_a_pdf_of_another_name_is_one() -> None:
    assert parse(pdf("text"), "text", "file").kind == "pdf"
    assert parse(pdf("text", password=""), "text", "file").text.strip() == "text"


@pytest.mark.parametrize(("library", "kind"), [("lxml", "html"), ("pypdf", "pdf")])
def test_a_library_that_is_not_installed_is_named(library: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"takes {library}: pip install 'moe-dr\[knowledge\]'"):
        parse(b"<p>x", kind, "file")


@pytest.mark.parametrize("text", ["<div>" * 50_000 + "deep", "<a" * 300_000, "<!--" * 100_000 + "x", "&amp;" * 200_000])
def test_hostile_html_ends(text: str) -> None:
    try:
        assert parse(text.encode(), "html", "file").blocks
    except DataError as error:
        assert "holds no text" in str(error) or "HTML beyond the parser's limits" in str(error)


def test_lone_surrogates_do_not_pass() -> None:
    assert parse(b"<p>a&#xD800;b</p>", "html", "file").text.encode()
    with pytest.raises(DataError, match=r"not utf-16.*: illegal .* at 2"):
        parse(b"\xff\xfe\x00\xd8a\x00", "text", "file")
