"""The fast way to ids is held to the slow one: the library's cuts, its ids, and packing a document at a time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from deepseek.data import Document, ReadReport, encode, pack, read_documents, shards
from deepseek.data.encode import Encoder
from deepseek.data.held_out import held_out_place
from deepseek.domain import KEYWORDS, KeywordRules
from deepseek.errors import DataError
from deepseek.tokenizer import CHAT_TEMPLATE, SPLIT, Tokenizer
from tests.helpers import PUBLISHED
from tests.helpers.jsonl import write_jsonl

BITS = [*"aZé中文がー。！3٣¹ \t\n\r.!'_€\u3000\u00a0\u0301\ufe0f\u2009\u200d\x00\u3097😀🧑", "  ", "\n\n", " the ",
        "<|User|>", "of "]
TEXTS = st.lists(st.lists(st.sampled_from(BITS), max_size=12).map("".join) | st.text(max_size=15), max_size=9)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the end of the end, 一些字一些\n  return 12345 of it's" * 9], 320)


def ids(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    flat, count = encoder.encode(pl.Series("text", texts, pl.String))
    assert flat.dtype == np.uint32
    return [part.tolist() for part in np.split(flat, np.cumsum(count)[:-1])] if texts else []


# ---- ids --------------------------------------------------------------------------------------------------------


def test_both_engines_cut_alike_around_every_plain_character() -> None:
    every = pl.Series([chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000])
    plain = every.filter(~every.str.contains(encode.ODD)).to_list()
    assert len(plain) > 30_000
    texts = [text for c in plain for text in (f"{c}{c}a{c}  {c} .{c}1{c}中{c}", f"中 {c}!{c} {c}\n {c}a{c}  1")]
    marked = pl.Series(texts).str.replace_all(encode.BLANKS, f"${{1}}{encode.MARK}${{2}}")
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    for text, cuts in zip(texts, marked.str.extract_all(encode.CUT).to_list(), strict=True):
        assert cuts == [text[a:b] for _, (a, b) in split.pre_tokenize_str(text)], repr(text)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_ids_are_those_of_the_tokenizer(batches: list[list[str]]) -> None:
    encoder = Encoder(tokenizer())
    assert tokenizer().pieces is not None
    for texts in batches:
        assert ids(encoder, texts) == [tokenizer().encode(text) for text in texts]


def test_so_they_are_when_the_table_is_emptied_and_threads_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECES", 40)
    texts = [f"the end of {i}, the {'abcdefgh'[i % 7:]}  of 一些{chr(0x4e00 + i % 50)}" for i in range(900)]
    encoder, want = Encoder(tokenizer()), [tokenizer().encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: ids(encoder, texts[i : i + 20]), range(0, len(texts), 20))
        assert [one for part in found for one in part] == want
    assert len(encoder.numbers) < 200


def test_published_tokenizer_on_real_text() -> None:
    if not (PUBLISHED / "tokenizer" / "deepseek_v3").is_dir():
        pytest.skip("DeepSeek-V3's tokenizer.json is not beside the repository (../shared/data/tokenizer)")
    published = Tokenizer.load(PUBLISHED / "tokenizer" / "deepseek_v3")
    assert published.pieces is not None
    for folder in ("chinese/d2l_zh", "code/code_other", "medicine/medicine_medquad"):
        first = min((PUBLISHED / folder).glob("*.jsonl"))
        lines = first.read_text(encoding="utf-8")[:20_000].replace("\\n", "\n")
        texts = [lines[i : i + 211] for i in range(0, len(lines), 211)]
        assert ids(Encoder(published), texts) == published.encode_batch(texts)


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}},
    {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}},
    {"added_tokens": [{"id": 319, "content": "the end", "single_word": False, "lstrip": False, "rstrip": False,
                       "normalized": False, "special": False}]},
])
def test_other_tokenizers_go_their_own_way(change: dict[str, Any]) -> None:
    other = Tokenizer(json.dumps(json.loads(tokenizer().definition) | change))
    texts = ["The End of the end", "  a  b", "中 文 123456"]
    assert other.pieces is None
    assert ids(Encoder(other), texts) == other.encode_batch(texts) != tokenizer().encode_batch(texts)


# ---- packing ----------------------------------------------------------------------------------------------------


def packed_slowly(documents: list[Document], fraction: float, experts: tuple[str, ...]) -> dict[str, bytes]:
    """Files of shards, a document at a time."""
    out: dict[str, list[tuple[list[int], int]]] = {"train": [], "valid": []}
    for document in documents:
        if document.turns:
            said = tokenizer().encode_chat([{"role": r, "content": t} for r, t in document.turns],
                                           add_generation_prompt=False)
        else:
            said = [0, *tokenizer().encode(document.text)]
        said = said if said[-1] == 1 else [*said, 1]
        name = experts.index(document.expert) if document.expert else 255
        out["valid" if held_out_place(document.text, b"0") < fraction else "train"].append((said, name))
    return {f"{side}{what}.bin": b"".join(np.array(part, kind).tobytes() for part in parts)
            for side, rows in out.items()
            for what, kind, parts in (("", "<u2", [said for said, _ in rows]),
                                      (".experts", "u1", [[name] * len(said) for said, name in rows]))}


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_shards_are_those_of_packing_one_by_one(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_DOCUMENTS", size)
    documents = [Document(f"{i % 83} the end of  {i * i}\u2009" + "of " * (i % 5), "s", i,
                          (("user", f"{i}"), ("assistant", "the end")) if i % 9 == 4 else (),
                          [None, "a_expert", "b_expert"][i % 3]) for i in range(200)]
    made = pack(documents, tokenizer(), tmp_path / "t", valid_fraction=0.2, experts=("a_expert", "b_expert"))
    want = packed_slowly(documents, 0.2, ("a_expert", "b_expert"))
    assert {name: (made.folder / name).read_bytes() for name in want} == want
    assert len(want["valid.bin"]) > 100


def test_tables_are_cut_by_characters_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 50)
    texts = ["a" * 10, "b" * 200, "", "c" * 20, "d" * 20, "e" * 20]
    table = shards.as_table([Document(text, "s") for text in texts])
    found = list(shards.blocks([table, table[:0]]))
    assert pl.concat(found)["text"].to_list() == texts
    assert len(found) > 2


def test_tools_are_packed_through_the_template(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "tools": tools}))
    [(_, ids)] = shards.encode_documents(list(read_documents([tmp_path / "a.jsonl"], ReadReport())), tokenizer())
    want = tokenizer().encode_chat(turns, tools=tools, add_generation_prompt=False)
    assert ids == want != tokenizer().encode_chat(turns, add_generation_prompt=False)


def test_reasoning_is_packed_where_the_template_leaves_it_out(tmp_path: Path) -> None:
    cuts = ("{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
            "{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}")
    rows: Any = [[("the", None), ("end", "of")],
                 [("the", None), ("<think>of</think>end", None), ("it", None), ("is", None)]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": ("user", "assistant")[n % 2], "content": said, "reasoning_content": thought}
        for n, (said, thought) in enumerate(row)]}) + "\n" for row in rows))
    documents = list(read_documents([tmp_path / "a.jsonl"], ReadReport(strict=True)))
    for template in (cuts, CHAT_TEMPLATE, None):
        takes = Tokenizer(tokenizer().definition, {}, template)
        said = [takes.decode(ids, skip_special=True) for _, ids in shards.encode_documents(documents, takes)]
        assert [text.count("of") for text in said] == [1, 1] and "<think>\nof\n</think>\n\nend" in said[0]
        assert "<think>of</think>end" in said[1] and said[1].endswith("is")
    report = ReadReport()
    short = Tokenizer(tokenizer().definition, {}, "{% for m in messages %}{{ m.content[:2] }}{% endfor %}")
    assert list(shards.encode_documents(documents, short, report)) == []
    assert [problem.detail for problem in report.problems] == ["the chat template leaves out the content of turn 2"] * 2


def test_variables_of_a_record_are_used_when_it_is_packed(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    takes = Tokenizer(tokenizer().definition, {}, "{{ tone }}{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = [{"messages": turns, "chat_template_kwargs": variables} for variables in (
        {"tone": "soft"}, json.dumps({"tone": "loud"}), None, {"tune": 1})]
    write_jsonl(tmp_path / "a.jsonl", rows)
    documents, report = list(read_documents([tmp_path / "a.jsonl"], ReadReport(strict=True))), ReadReport()
    said = [takes.decode(ids) for _, ids in shards.encode_documents(documents, takes, report)]
    assert said == ["softhiyou", "loudhiyou", "hiyou"]
    assert [(problem.line, "'tune' is no variable" in problem.detail) for problem in report.problems] == [(4, True)]


def test_a_refused_conversation_leaves_its_neighbours(tmp_path: Path) -> None:
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}<|User|>"
    strict = Tokenizer(tokenizer().definition, {}, template)
    documents = [Document(text, "c", line, (("user", text),) if text in ("no", "yes") else ())
                 for line, text in enumerate(["the", "no", "of", "yes", "no", "end"])]
    report = ReadReport()
    found = [(d.text, said) for d, said in shards.encode_documents(documents, strict, report)]
    assert found == [(d.text, [0, 3, 1] if d.turns else [0, *strict.encode(d.text), 1])
                     for d in documents if d.text != "no"]
    assert [problem.line for problem in report.problems] == [1, 4]


def test_a_lone_surrogate_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lone surrogate '\\ud800', which UTF-8 cannot hold"):
        pack([Document("a\ud800", "s")], tokenizer(), tmp_path / "t")


# ---- rules ------------------------------------------------------------------------------------------------------

RULES = KeywordRules(), KeywordRules({"only": ["the", "a b", "法"]}), KeywordRules({"one": ["é"], "two": ["x"]})
SAID = [word for words in KEYWORDS.values() for word in words.split("|")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([*SAID, "x", " ", "İ", "zz"]), max_size=8).map(" ".join) | st.text(max_size=9),
                max_size=6))
def test_rules_say_the_same_of_many_texts(texts: list[str]) -> None:
    texts = [text.upper() if len(text) % 2 else text for text in texts]
    for rules in RULES:
        assert rules.predict_batch(texts) == [rules.predict(text) for text in texts]


def test_rules_on_real_text() -> None:
    path = PUBLISHED / "law" / "laws_zh" / "text.jsonl"
    if not path.is_file():
        pytest.skip("the real data is not beside the repository (../shared/data)")
    text = path.read_text(encoding="utf-8")[:100_000]
    texts = [text[i : i + 211] for i in range(0, len(text), 211)]
    said = RULES[0].predict_batch(texts)
    assert said == [RULES[0].predict(text) for text in texts]
    assert said.count("law_expert") > len(texts) / 3
