"""Against brute force: nothing is dropped that is not near what stays, and little that is near stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.data import Document
from deepseek.data import dedup as module
from deepseek.data.dedup import find_duplicates, jaccard, normalise
from deepseek.data.records import to_table
from deepseek.errors import ConfigError

POOL = [f"{a} {b} {c}." for a in ("The court", "A patient", "这个函数", "Our revenue", "三角形") for b in (
    "decided to leave the matter", "was seen again on Friday", "计算了所有的结果", "returned without any value")
    for c in ("because of the rain", "for the second time", "而没有说明原因", "as the statute says", "before noon")]


def folder(path: Path, texts: list[str]) -> Path:
    path.mkdir(exist_ok=True)
    to_table(Document(text, "a.jsonl", line) for line, text in enumerate(texts, 1)).write_parquet(path / "part.parquet")
    return path


def clean(texts: list[str]) -> list[str]:
    import polars as pl

    return normalise(pl.Series(texts)).to_list()


def damaged(text: str, draw: random.Random, changes: int) -> str:
    letters = list(text)
    for _ in range(changes):
        letters[draw.randrange(len(letters))] = draw.choice("xyzq的了")
    return "".join(letters)


def mixture(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        kind = draw.random()
        if texts and kind < 0.2:
            texts.append(draw.choice(texts))
        elif texts and kind < 0.5:
            texts.append(damaged(draw.choice(texts), draw, draw.randint(1, 12)))
        else:
            texts.append(" ".join(draw.sample(POOL, draw.randint(1, 4))))
    return texts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_against_brute_force(threshold: float, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 37)
    monkeypatch.setattr(module, "PAIRS", 11)
    monkeypatch.setattr(module, "SET_CHARACTERS", 5000)
    texts = mixture(150, seed)
    found, said = find_duplicates(folder(tmp_path / "in", texts), threshold=threshold), clean(texts)
    missed = near = 0
    for i, text in enumerate(said):
        k = int(found.kept_N[i])
        assert found.stays[k]
        if found.exact_N[i]:
            assert (said[k], found.similarity_N[i]) == (text, 1)
        elif not found.stays[i]:
            assert k < i
            assert jaccard(said[k], text) == pytest.approx(found.similarity_N[i])
            assert found.similarity_N[i] >= threshold
        best = max((jaccard(said[j], text) for j in range(i) if found.stays[j]), default=0.0)
        near += best >= threshold
        missed += found.stays[i] and best >= threshold
        assert not (found.stays[i] and text in said[:i])
    assert near > 10 and found.exact_N.any()
    assert missed <= 0.1 * near, "the bands find nearly all"


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_any_text_may_come(texts: list[str]) -> None:
    import tempfile

    texts = [*texts, "", "ab", texts[0] + " ", "  AB"]
    with tempfile.TemporaryDirectory() as place:
        found = find_duplicates(folder(Path(place) / "in", texts), workers=1)
    said = clean(texts)
    for i, k in enumerate(found.kept_N.tolist()):
        assert k <= i
        assert found.stays[k]
        assert (said[i] == said[k]) or jaccard(said[i], said[k]) >= 0.8
    assert len({text for text, stays in zip(said, found.stays, strict=True) if stays}) == found.stays.sum()


def test_white_space_and_case_do_not_matter(tmp_path: Path) -> None:
    found = find_duplicates(folder(tmp_path / "in", ["Ｈｅｌｌｏ  World", "hello\nworld ", "hello, world"]), near=False)
    assert found.kept_N.tolist() == [0, 0, 2]
    assert found.exact_N.tolist() == [False, True, False]


def test_workers_and_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "in", mixture(200, 7))
    first = find_duplicates(place, workers=1)
    monkeypatch.setattr(module, "BLOCK", 23)
    for workers in (1, 3):
        again = find_duplicates(place, workers=workers)
        assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(first, again, strict=True))


def test_a_chain_does_not_pull_distant_texts_together(tmp_path: Path) -> None:
    base = "The quick brown fox jumps over the lazy dog near the river bank while seven large geese watch it from afar"
    chain = [base, base[:-9] + "from a boat", base[6:-9] + "from a boat and go",
             base[30:] + " and then they all go home"]
    found = find_duplicates(folder(tmp_path / "in", chain), threshold=0.8)
    said = clean(chain)
    assert jaccard(said[0], said[1]) >= 0.8 > jaccard(said[0], said[3])
    assert found.stays[0] and not found.stays[1] and found.stays[3]


def test_thresholds_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"threshold = 0\.2: must be between 0\.5 and 1"):
        find_duplicates(tmp_path, threshold=0.2)
