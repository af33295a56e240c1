"""Every name has held-out documents: at least a few, at most half, the same whatever the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import cli
from deepseek.data import Document, TokenShards, pack, stages
from deepseek.data import held_out as module
from deepseek.data.held_out import LEAST, LONG, Held, count_held, held_out_place, hold_out, notes
from deepseek.data.records import read_tables
from deepseek.data.settings import PackSettings, SplitSettings
from deepseek.tokenizer import Tokenizer
from tests.helpers.jsonl import write_jsonl

TOKENIZER = Tokenizer.train(["some words of a law, and code"] * 9, 300)


DOCUMENT = st.tuples(st.integers(0, 30), st.integers(0, 3), st.sampled_from([10, 10, 10, LONG + 1]))


@given(st.lists(DOCUMENT, min_size=1, max_size=60), st.sampled_from([0.01, 0.1, 0.5, 0.99]), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_rule(documents: list[tuple[int, int, int]], fraction: float, draw: object) -> None:
    place_N = np.array([held_out_place(str(text), b"0") for text, _, _ in documents])
    name_N, size_N = (np.array([document[i] for document in documents]) for i in (1, 2))
    held_N, cuts = hold_out(place_N, name_N, size_N, fraction)
    sides = {place: set(held_N[place_N == place].tolist()) for place in set(place_N.tolist())}
    assert all(len(side) == 1 for side in sides.values()), "equal texts are on one side"
    for name in set(name_N.tolist()):
        mine = name_N == name
        count, held, below = int(mine.sum()), int(held_N[mine].sum()), int((place_N[mine] < fraction).sum())
        own = [p for p in set(place_N[mine].tolist()) if set(name_N[place_N == p].tolist()) == {name}]
        short = all(size_N[place_N == p].max() <= LONG and (place_N == p).sum() == 1 for p in own)
        if len(own) == count and short:  # nothing is said twice
            assert held >= min(LEAST, count // 2) and (held <= max(below, count // 2)) and held < count
        assert any(mine[row] for row in cuts) == (held == 0)
    order = np.arange(len(documents))
    draw.shuffle(order)  # type: ignore[attr-defined]
    again, _ = hold_out(place_N[order], name_N[order], size_N[order], fraction)
    assert (again == held_N[order]).all()
    assert not hold_out(place_N, name_N, size_N, 0.0)[0].any()


def documents(name: str | None, count: int, words: int = 30, first: int = 0) -> list[Document]:
    return [Document(f"{name} {i} " + "words of law " * words, name or "", expert=name)
            for i in range(first, first + count)]


def texts(shards: TokenShards, side: str) -> list[str]:
    ids = np.fromfile(shards.folder / f"{side}.bin", shards.about["dtype"]).tolist()
    return [part.removesuffix("<|end_of_sentence|>")
            for part in TOKENIZER.decode(ids, skip_special=False).split("<|begin_of_sentence|>")[1:]]


def test_450_documents_of_three_names(tmp_path: Path) -> None:
    """As it was found: 150 documents a name and one in a hundred held out left two of three names with none."""
    names = ("law_expert", "code_expert", "text_expert")
    given = [document for name in names for document in documents(name, 150, first=2700)]
    shards = pack(given, TOKENIZER, tmp_path / "t", valid_fraction=0.01, experts=names)
    train, valid = texts(shards, "train"), texts(shards, "valid")
    assert sorted(train + valid) == sorted(document.text for document in given)
    found = {name: sum(text.startswith(name) for text in valid) for name in names}
    by_hash = {name: sum(held_out_place(d.text, b"0") < 0.01 for d in given if d.expert == name) for name in names}
    assert by_hash == {"law_expert": 0, "code_expert": 1, "text_expert": 0} and set(found.values()) == {2}
    # the labels moved with their tokens
    for side in ("train", "valid"):
        ids = np.fromfile(shards.folder / f"{side}.bin", shards.about["dtype"])
        labels = np.fromfile(shards.folder / f"{side}.experts.bin", np.uint8)
        assert len(ids) == len(labels) == shards.about[f"{side}_tokens"]
        for number, name in enumerate(names):
            said = TOKENIZER.decode(ids[labels == number].tolist(), skip_special=True)
            assert name in said and not any(other in said for other in names if other != name)
    assert shards.notes() == [
        f"warning: valid_fraction = 0.01 holds out {count} of 150 documents of {name}; 2 are held out, so that it is "
        "both learnt and measured" for name, count in sorted(by_hash.items()) if count < 2]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_a_single_document_and_long_ones_give_their_end(
    fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONG", 5000)
    given = [*documents("one_expert", 1), *documents("long_expert", 3, 500), *documents(None, 12)]
    shards = pack(given, TOKENIZER, tmp_path / "t", valid_fraction=fraction, experts=("one_expert", "long_expert"))
    sides = {side: (np.fromfile(shards.folder / f"{side}.bin", shards.about["dtype"]),
                    np.fromfile(shards.folder / f"{side}.experts.bin", np.uint8)) for side in ("train", "valid")}
    for number, name in enumerate(("one_expert", "long_expert")):
        ids = {side: tokens[labels == number].tolist() for side, (tokens, labels) in sides.items()}
        whole = [i for d in given if d.expert == name for i in [0, *TOKENIZER.encode(d.text), 1]]
        assert sorted(ids["train"] + ids["valid"]) == sorted(whole) and len(ids["train"]) and len(ids["valid"]) >= 2
        if number == 0:
            assert ids["train"] + ids["valid"] == whole
            assert len(ids["valid"]) == max(2, min(len(whole) - 1, round(len(whole) * fraction)))
    if fraction == 0.01:
        assert ("warning: valid_fraction = 0.01 holds out 0 of 1 documents of one_expert; the end of one is held out, "
                "so that it is both learnt and measured") in shards.notes()


def test_split_and_pack_hold_out_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": d.text, "expert": d.expert} for name, count in (("law_expert", 40), ("code_expert", 9),
                                                                      ("text_expert", 3), (None, 5))
             for d in documents(name, count)]
    write_jsonl(tmp_path / "in.jsonl", lines)
    stages.validate([tmp_path / "in.jsonl"], tmp_path / "validate")
    done = stages.split(tmp_path / "validate", tmp_path / "split", SplitSettings(valid_fraction=0.01))
    sides = done.counts["by_expert"]
    assert {name: (one["train"], one["valid"]) for name, one in sides.items()} == {
        "law_expert": (38, 2), "code_expert": (7, 2), "text_expert": (2, 1), "unlabelled": (3, 2)}
    TOKENIZER.save(tmp_path / "words")
    packed = stages.pack(tmp_path / "split", tmp_path / "pack", PackSettings(tokenizer=str(tmp_path / "words")),
                        held_out=SplitSettings(valid_fraction=0.01))
    held = {text for table in read_tables(tmp_path / "split") for text in table["text"]} & set(
        texts(TokenShards.open(tmp_path / "pack"), "valid"))
    wanted = {text for name in sides for table in read_tables(tmp_path / "split" / name / "valid")
              for text in table["text"]}
    assert held == wanted and len(packed.counts["notes"]) == len(done.counts["notes"]) == 4
    assert cli.main(["data", "split", str(tmp_path / "validate"), "--out", str(tmp_path / "again")]) == 0
    assert "warning: valid_fraction = 0.01 holds out 1 of 9 records of code_expert; 2 are" in capsys.readouterr().out
    assert cli.main(["data", "report", str(tmp_path / "split"), "--out", str(tmp_path / "report")]) == 0
    assert "holds out 0 of 3 records of text_expert; 1 is held out" in capsys.readouterr().out


def test_what_the_notes_say() -> None:
    held = {"a": Held(100, 2, 2), "b": Held(100, 0, 2), "c": Held(1, 0, 0, True), "d": Held(3, 3, 2),
            "e": Held(1, 0, 0)}
    said = notes(held, 0.01)
    assert [line.partition(" holds out ")[2].partition(",")[0] for line in said] == [
        "0 of 100 documents of b; 2 are held out", "0 of 1 documents of c; the end of one is held out",
        "3 of 3 documents of d; 2 are held out", "0 of 1 documents of e"]
    assert said[3].endswith("there is nothing to hold out instead: it cannot be measured")
    assert notes(held, 0.0) == []
    assert notes({f"n{i}": Held(9, 0, 2) for i in range(50)}, 0.1)[20:] == ["… and so for 30 more names"]
    place_N, name_N = np.array([0.0, 0.5, 0.7]), np.array([1, 1, 3])
    assert count_held(place_N, name_N, place_N < 0.1, [2], 0.1, {1: "x", 2: "y", 3: "z"}) == {
        "x": Held(2, 1, 1, False), "z": Held(1, 0, 0, True)}
