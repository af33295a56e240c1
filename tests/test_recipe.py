"""The recipe of `mini`: what becomes of its sources, without the sources."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import records as recipe
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


def test_gates_learn_from_texts_that_experts_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": f"book {n} " + "of many words " * 20}) + "\n"
                                                  for n in range(40)), "utf-8")

    def answered(asked: list[tuple[str, str]], base: Path, file: Path, tokens: int) -> list[dict[str, Any]]:
        return [{"name": name, "question": question, "answer": f"{file.stem} {i}"}
                for i, (name, question) in enumerate(asked)]

    monkeypatch.setattr(recipe, "SOURCES", {"law_expert": ("books.jsonl",)})
    monkeypatch.setattr(recipe, "answered", answered)
    monkeypatch.setattr(recipe, "write_calibration", lambda *_: None)
    recipe.write_records(tmp_path, tmp_path, out := tmp_path / "out")
    read = {side: (out / side / "law_expert.jsonl").read_text("utf-8").splitlines()
            for side in ("train", "held_out", "gates")}
    assert set(read["train"]) < set(read["gates"]) and not set(read["held_out"]) & set(read["gates"])
    assert [side for side, lines in read.items() if any('"texts ' in line for line in lines)] == ["gates"]
    assert all(any('"answers ' in line for line in lines) for lines in read.values())
