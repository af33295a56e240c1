"""The recipe of `mini`: what becomes of its sources, without the sources."""

from __future__ import annotations

import json
import random

from prompts import FORMS, TEXTS, prompts, texts
from records import NAMES, PIECE, chosen, clean, pieces, records

from deepseek.data import Document


def test_every_name_has_questions_and_they_do_not_change() -> None:
    assert set(FORMS) == set(NAMES)
    for name in NAMES:
        asked = prompts(name)
        assert len(asked) > 50 and asked == prompts(name) and not any("{" in question for question in asked)
    for name in TEXTS:
        asked = texts(name)
        assert len(asked) == len(set(asked)) >= 10 and not any("{" in request for request in asked)
        assert not set(asked) & set(prompts(name))
    assert set(TEXTS) < set(NAMES) and not texts("dialogue_expert")


def test_prose_is_cut_between_paragraphs_and_nothing_long_is_left() -> None:
    text = "\n\n".join(f"{n} " + "word " * 80 for n in range(30))
    found = list(pieces(text))
    assert all(200 < len(piece) <= PIECE for piece in found) and "".join(found).count("word") == 2400
    assert [piece.split()[0] for piece in found] == sorted((piece.split()[0] for piece in found), key=int)
    assert all(len(piece) <= PIECE for piece in pieces("x" * 5000))


def test_a_document_comes_in_both_forms() -> None:
    prose = Document("\n\n".join("a line of some words\n" * 12 for _ in range(40)), "book")
    asked = Document("What?\nThat, <<1+1=2>>2.\n#### 2", "qa", response_start=6)
    for document in (prose, asked):
        draw = random.Random(0)
        found = [record for _ in range(20) for record in records(document, draw)]
        assert {*map(tuple, found)} == {("text",), ("messages",)}
    answer = next(record["messages"][1]["content"] for _ in range(20) for record in records(asked, draw)
                  if "messages" in record)
    assert answer == clean("That, <<1+1=2>>2.\n#### 2") == "That, 2.\nThe answer is 2."


def test_sources_share_the_room_and_a_small_one_leaves_its_rest() -> None:
    small, large = [{"text": "s" * 90}] * 3, [{"text": "l" * 90}] * 1000
    taken = chosen([large, small], 20_000, random.Random(0))
    assert sum("s" in record["text"] for record in taken) == 3
    assert 19_000 < sum(len(json.dumps(record)) for record in taken) < 20_300
