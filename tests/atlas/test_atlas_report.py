"""What people see of an atlas: the text, the map, the page."""

from __future__ import annotations

import struct
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from deepseek.atlas import Atlas, NamedGroup
from deepseek.atlas.atlas import Measurement, RejectedGroup, Shape
from deepseek.atlas.plot import colours, expert_owners, save_group_map
from deepseek.atlas.report import page, table
from deepseek.config import ModelConfig
from deepseek.ids import ExpertId, ExpertSet

HOW = Measurement("token", 0.2, 5000, (("law/a.jsonl", "ab" * 32), ("b.txt", None)), ("code_expert",), 512, 0)
EVIDENCE = {"coverage_slots": 0.31, "coverage_slots_others": 0.12, "coverage_uniform": 0.0625, "p_adjusted": 0.0004,
            "stability_jaccard": 0.75}


@pytest.fixture
def atlas(tiny_config: Callable[..., ModelConfig]) -> Atlas:
    def ids(*pairs: tuple[int, int]) -> ExpertSet:
        return ExpertSet(ExpertId(*pair) for pair in pairs)

    return Atlas(Shape.of(tiny_config()), [
        NamedGroup("law_expert", "measured", ids((1, 3), (2, 0), (1, 4)), (0.4, 0.3, 0.2), EVIDENCE, HOW),
        NamedGroup("<b>&", "measured", ids((2, 0), (1, 5)), (0.6, 0.1), EVIDENCE, HOW),
        NamedGroup("text_expert", "built-in", ids((1, 0), (2, 1)), evidence={"routing_accuracy": 0.875}),
    ], [RejectedGroup("odd_expert", "no better than chance: <p>", EVIDENCE, HOW)])


def test_table(atlas: Atlas) -> None:
    shown = table(atlas)
    assert "3 named groups over 2 layers x 16 experts, 4 a token, 4 routing groups" in shown
    [law] = [line for line in shown.splitlines() if line.startswith("law_expert") and "measured" in line]
    assert law.split()[1:] == ["measured", "3", "1-2", "31.0%", "12.0%", "-", "-", "6.2%", "0.75", "-", "0.0004"]
    assert "text_expert: routing_accuracy 0.875" in shown
    assert "refused: odd_expert: no better than chance" in shown
    overlap = shown[shown.index("overlap"):].splitlines()[2].split()
    assert overlap == ["law_expert", "1.00", "0.25", "0.00"]


def test_claims_by_strength(atlas: Atlas) -> None:
    found = expert_owners(atlas)
    assert len(found) == 6
    assert found[ExpertId(1, 3)] == [(0, 1.0)] and found[ExpertId(1, 4)] == [(0, pytest.approx(0.35 + 0.65 / 2))]
    assert [place for place, _ in found[ExpertId(2, 0)]] == [0, 1]
    assert found[ExpertId(1, 0)] == [(2, 1.0)]


def test_colours_are_distinct() -> None:
    for count in (0, 1, 8, 30):
        assert len(set(colours(count))) == count


def test_the_map_shows_each_group_in_its_colour(atlas: Atlas, tmp_path: Path) -> None:
    save_group_map(atlas, tmp_path / "map.png")
    pixels = (imread(tmp_path / "map.png")[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()
    seen = {tuple(pixel) for pixel in pixels}
    for colour in colours(3):
        assert tuple(bytes.fromhex(colour[1:])) in seen
    assert list(tmp_path.iterdir()) == [tmp_path / "map.png"]


def test_the_map_of_a_large_model_keeps_its_size(tmp_path: Path) -> None:
    save_group_map(Atlas.built_in(ModelConfig.preset("deepseek-v3"), [f"n{i}" for i in range(8)]), tmp_path / "m.png")
    width, height = struct.unpack(">II", (tmp_path / "m.png").read_bytes()[16:24])
    assert 600 <= width <= 2000 and 200 <= height <= 1600


class Reader(HTMLParser):
    """Collects tags and checks that what is opened is closed in order."""

    VOID = {"meta"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(atlas: Atlas) -> None:
    written = page(atlas)
    reader = Reader()
    reader.feed(written)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe"} & set(reader.count)
    assert not [value for _, value in reader.attributes if value and ("://" in value or "url(" in value)]
    assert "@import" not in written and "url(" not in written and "prefers-color-scheme: dark" in written
    assert reader.count["rect"] == 2 * 16 + 1  # every expert, and one more for the one that two names share
    assert "&lt;b&gt;&amp;" in written and "<b>&" not in written.replace("<b>&lt;b&gt;&amp;", "")
    assert "layer 2, expert 0: law_expert 0.3000, &lt;b&gt;&amp; 0.6000" in written
    assert "no better than chance: &lt;p&gt;" in written and "ab" * 32 in written


def test_an_empty_atlas_can_be_shown(tiny_config: Callable[..., ModelConfig]) -> None:
    empty = Atlas(Shape.of(tiny_config()), [], [RejectedGroup("x", "chance")])
    assert "refused: x: chance" in table(empty) and "<b>x</b>: chance" in page(empty)
