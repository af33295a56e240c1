"""The atlas as a value and as a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek import Atlas, ExpertId
from deepseek.atlas import NamedGroup, profile
from deepseek.atlas.atlas import RejectedGroup, Shape
from deepseek.checkpoint import load_model, save_model
from deepseek.config import ModelConfig
from deepseek.errors import ConfigError, DataError, NotFoundError, RequestError
from deepseek.ids import ExpertSet
from tests.helpers.planted import LETTERS, Planted, text

Config = Callable[..., ModelConfig]


def group(name: str, *ids: str, kind: Any = "measured") -> NamedGroup:
    return NamedGroup(name, kind, ExpertSet(map(ExpertId.parse, ids)), tuple(0.5 / i for i, _ in enumerate(ids, 1)))


@pytest.fixture
def measured(planted: Planted) -> Atlas:
    data = {name: text(name) for name in LETTERS}
    data["mixed"] = [document for name in LETTERS for document in text(name, 8, seed=2)]
    return profile(planted.model, planted.tokenizer, data, threshold=0.9, seq_len=32, tokens=1500)


def test_names_are_a_mapping_to_ordered_sets(tiny_config: Config) -> None:
    atlas = Atlas(Shape.of(tiny_config()), [group("law_expert", "2.3", "1.7"), group("code_expert", "1.0")])
    assert list(atlas["law_expert"]) == [ExpertId(2, 3), ExpertId(1, 7)]
    assert atlas.names == tuple(atlas) == ("law_expert", "code_expert")
    assert len(atlas) == 2 and "law_expert" in atlas and "math_expert" not in atlas
    assert atlas.group("law_expert").scores == (0.5, 0.25)
    with pytest.raises(RequestError, match="no experts are named 'math_expert'; there are law_expert, code_expert"):
        atlas["math_expert"]
    refused = Atlas(atlas.shape, [], [RejectedGroup("math_expert", "chance")])
    with pytest.raises(RequestError, match=r"\(math_expert was refused: chance\); there are none"):
        refused["math_expert"]


def test_built_in_names_are_the_routing_groups(tiny_config: Config) -> None:
    config = tiny_config(num_nextn_predict_layers=1)
    atlas = Atlas.built_in(config, ["a", "b", "c"], {"b": {"routing_accuracy": 0.9}})
    assert list(atlas["b"]) == [ExpertId(layer, e) for layer in (1, 2) for e in (4, 5, 6, 7)]
    assert atlas.group("b").kind == "built-in" and atlas.group("b").evidence == {"routing_accuracy": 0.9}
    assert atlas.shape == Shape((1, 2), 16, 4, 4)
    with pytest.raises(ConfigError, match=r"n_group = 4: must be at least 5, one for each name \(a, b, c, d, e\)"):
        Atlas.built_in(config, list("abcde"))
    with pytest.raises(ConfigError, match="'a' comes twice"):
        Atlas.built_in(config, ["a", "a"])


def test_a_file_and_back_is_the_same(measured: Atlas, tiny_config: Config, tmp_path: Path) -> None:
    for number, atlas in enumerate((measured, Atlas.built_in(tiny_config(), ["x", "数学"], {"x": {"accuracy": 1}}))):
        file = tmp_path / f"{number}.json"
        atlas.save(file)
        again = Atlas.load(file)
        assert again.groups == atlas.groups and again.refused == atlas.refused and again.shape == atlas.shape
    assert [refusal.name for refusal in measured.refused] == ["mixed"]
    written = json.loads((tmp_path / "0.json").read_text())
    assert written["overlap"]["early"] == {"early": 1.0, "middle": 0.0, "late": 0.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


def test_beside_a_checkpoint(planted: Planted, measured: Atlas, tmp_path: Path) -> None:
    folder = save_model(planted.model, tmp_path / "model", add=measured.save)
    assert Atlas.load(folder).groups == measured.groups
    measured.updated(Atlas(measured.shape, [group("late", "1.0")])).save(folder)
    assert list(Atlas.load(folder)["late"]) == [ExpertId(1, 0)]
    load_model(folder)  # the manifest does not vouch for what may change


def test_a_newer_measurement_replaces_what_it_speaks_of(tiny_config: Config) -> None:
    shape = Shape.of(tiny_config())
    old = Atlas(shape, [group("a", "1.0"), group("b", "1.1")], [RejectedGroup("c", "old"), RejectedGroup("d", "old")])
    new = Atlas(shape, [group("c", "1.2")], [RejectedGroup("a", "new")])
    both = old.updated(new)
    assert both.names == ("b", "c") and [(r.name, r.reason) for r in both.refused] == [("d", "old"), ("a", "new")]
    with pytest.raises(ConfigError, match="different shapes: 2 layers x 16 experts, 4 a token, 4 routing groups; 2"):
        old.updated(Atlas(Shape.of(tiny_config(n_group=8)), []))


def test_what_training_built_in_keeps_its_place_and_its_experts(tiny_config: Config) -> None:
    shape = Shape.of(tiny_config())
    old = Atlas(shape, [group("a", "1.0", kind="built-in"), group("b", "1.1"), group("c", "1.2", kind="built-in")])
    more = NamedGroup("a", "built-in", old["a"], evidence={"coverage_slots": 0.5})
    assert old.updated(Atlas(shape, [group("d", "1.4"), more])).names == ("a", "b", "c", "d")
    assert old.updated(Atlas(shape, [more])).group("a").evidence == {"coverage_slots": 0.5}
    for newer in (Atlas(shape, [group("a", "1.0")]), Atlas(shape, [group("c", "1.3", kind="built-in")]),
                  Atlas(shape, [], [RejectedGroup("a", "chance")])):
        with pytest.raises(ConfigError, match=r"[ac]: is built into the model, so its experts stay"):
            old.updated(newer)


def test_an_atlas_says_what_it_holds(tiny_config: Config, measured: Atlas) -> None:
    built = Atlas.built_in(tiny_config(), ["law_expert", "x"], {"x": {"routing_accuracy": 0.875}})
    assert str(built).splitlines() == [
        "Atlas of 2 names over 2 layers x 16 experts, 4 a token, 4 routing groups",
        "  law_expert  built-in, 8 experts in 2 layers; no evidence",
        "  x           built-in, 8 experts in 2 layers; routing_accuracy 0.875"]
    lines = repr(measured).splitlines()
    assert lines[0].startswith("Atlas of 3 names over 2 layers x 16 experts") and len(lines) == 5
    assert lines[1].startswith("  early   measured, 8 experts in 2 layers; ")
    assert "% of its own text's slots, " in lines[1] and "25.0% if routing were even, 24 documents, 7" in lines[1]
    assert lines[4].startswith("  refused: mixed: no better than chance")
    assert str(Atlas(built.shape, [group("a", "1.0")])).splitlines()[0].startswith("Atlas of 1 name over")


def test_the_file_keeps_its_words(tmp_path: Path, tiny_config: Config) -> None:
    """An atlas.json of an earlier version is read, and written again as it was."""
    how = {"score": "token", "threshold": 0.2, "tokens": 9, "files": [["a", None]], "beside": ["y"], "seq_len": 8,
           "seed": 1}
    atlas = Atlas(Shape.of(tiny_config()), [group("x", "1.0")], [RejectedGroup("z", "chance")])
    atlas.save(path := tmp_path / "atlas.json")
    keys = json.loads(path.read_text())
    keys["groups"]["x"]["measured"] = keys["refused"]["z"]["measured"] = how
    path.write_text(json.dumps(keys))
    again = Atlas.load(path)
    for measured in (again.group("x").measured, again.refused[0].measured):
        assert measured is not None and measured.compared_with == ("y",)
    again.save(path)
    assert json.loads(path.read_text()) == keys


def test_experts_that_do_not_exist(tiny_config: Config) -> None:
    config = tiny_config()
    for bad in ("0.3", "3.0", "1.16"):
        with pytest.raises(ConfigError, match=f"x names expert {bad}, which a model with 16 experts"):
            Atlas(Shape.of(config), [group("x", bad)])
    with pytest.raises(ConfigError, match="x has no experts"):
        Atlas(Shape.of(config), [group("x")])
    atlas = Atlas(Shape.of(config), [group("x", "2.15")])
    atlas.check_fits(config)
    atlas.check_fits(tiny_config(num_hidden_layers=9, n_routed_experts=32))
    with pytest.raises(ConfigError, match=r"expert 2.15 \(x\), which the model does not have: its layers 1..2 have "
                                          "experts 0..7"):
        atlas.check_fits(tiny_config(n_routed_experts=8))
    with pytest.raises(ConfigError, match=r"expert 2\.15"):
        atlas.check_fits(tiny_config(num_hidden_layers=2))


def test_no_atlas_says_how_to_make_one(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "atlas.json", tmp_path / "nowhere"):
        with pytest.raises(NotFoundError, match="`deepseek atlas profile MODEL --data NAME=FILE …` measures an atlas"):
            Atlas.load(place)


@pytest.mark.parametrize(("change", "reason"), [
    ({"format": 2}, "format = 2: must be 1"),
    ({"groups": []}, "AttributeError"),
    ({"model": {}}, "KeyError"),
    ({"groups": {"x": {"kind": "guessed"}}}, "kind = 'guessed'"),
    ({"groups": {"x": {"kind": "measured", "experts": ["1.99"], "scores": [], "evidence": {}, "measured": None}}},
     "x names expert 1.99"),
    ({"groups": {"x": {"kind": "measured", "experts": ["17"], "scores": [], "evidence": {}, "measured": None}}},
     "LAYER.INDEX"),
    ({"groups": {"x": {"kind": "measured", "experts": ["1.1"], "scores": [1, 2], "evidence": {}, "measured": None}}},
     "2 scores for 1 experts"),
    ({"groups": {"x": {"kind": "measured", "experts": ["1.1"], "scores": [1], "evidence": {"p": "low"},
                       "measured": None}}}, "evidence p = 'low'"),
    ({"groups": {"x": {"kind": "measured", "experts": ["1.1"], "scores": [1], "evidence": {},
                       "measured": {"files": [], "beside": []}}}}, "TypeError"),
])
def test_a_damaged_file_is_named(change: dict[str, object], reason: str, tiny_config: Config, tmp_path: Path) -> None:
    file = tmp_path / "atlas.json"
    Atlas(Shape.of(tiny_config()), [group("a", "1.0")]).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=rf"atlas\.json: not an atlas: .*{reason}"):
        Atlas.load(file)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"{}"])
def test_a_file_that_is_no_atlas(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "atlas.json").write_bytes(content)
    with pytest.raises(DataError, match=r"atlas\.json: not an atlas"):
        Atlas.load(tmp_path)


def test_a_run_stands_for_its_model(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    atlas = Atlas.built_in(tiny_config(), ["law_expert", "code_expert"])
    atlas.save(tmp_path / "model")
    assert Atlas.load(tmp_path).names == atlas.names
