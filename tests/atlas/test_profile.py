"""Profiling finds what was planted, refuses what is chance, and gives the numbers that a plain loop gives."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek import convert
from deepseek.atlas import Atlas, NamedGroup, profile
from deepseek.atlas.atlas import Measurement, Shape
from deepseek.atlas.evidence import Routed
from deepseek.atlas.profile import doubts, judge, verdict
from deepseek.atlas.sample import Window, draw, route
from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig
from deepseek.data import Document
from deepseek.errors import ConfigError, DataError
from deepseek.ids import ExpertId, ExpertSet
from deepseek.model import CausalLM, RoutingRecord
from tests.helpers.planted import LETTERS, K, Planted, text

SMALL: dict[str, Any] = dict(threshold=0.9, seq_len=32, tokens=1500)


def everything() -> dict[str, list[Document]]:
    return {name: text(name) for name in LETTERS}


@pytest.mark.parametrize("score", ["token", "gate"])
def test_exactly_the_planted_experts_are_found(planted: Planted, score: Any) -> None:
    atlas = profile(planted.model, planted.tokenizer, everything(), score=score, **SMALL)
    assert atlas.names == tuple(LETTERS) and not atlas.refused
    for name in LETTERS:
        group = atlas.group(name)
        assert set(group.experts) == planted.experts[name]
        assert list(group.scores) == sorted(group.scores, reverse=True)
        assert group.evidence["coverage_slots"] > 0.95 and group.evidence["coverage_weight"] > 0.95
        assert group.evidence["coverage_slots_others"] < 0.05
        assert group.evidence["coverage_uniform"] == K / 16
        assert group.evidence["stability_jaccard"] == 1.0 and group.evidence["stability_rank"] > 0.3
        assert group.evidence["p"] <= group.evidence["p_adjusted"] < 0.05
        assert group.measured is not None and group.measured.compared_with == tuple(n for n in LETTERS if n != name)
        assert group.measured.files == ((f"{name}.txt", None),)
    assert atlas.overlap()["early"]["late"] == 0.0 and atlas.overlap()["early"]["early"] == 1.0


def test_shuffled_labels_are_refused(planted: Planted) -> None:
    documents = [document for found in everything().values() for document in found]
    random.Random(3).shuffle(documents)
    atlas = profile(planted.model, planted.tokenizer,
                    {name: documents[place::3] for place, name in enumerate(LETTERS)}, **SMALL)
    assert not atlas.names and [refusal.name for refusal in atlas.refused] == list(LETTERS)
    for refusal in atlas.refused:
        assert "no better than chance: its " in refusal.reason and "% of the other names'" in refusal.reason
        assert refusal.evidence["p_adjusted"] >= 0.05


def test_one_name_of_mixed_text_beside_two_true_ones(planted: Planted) -> None:
    """A name that stands does not carry one that does not."""
    mixed = [document for name in LETTERS for document in text(name, 8, seed=2)]
    data = {"early": text("early"), "late": text("late"), "mixed": mixed}
    atlas = profile(planted.model, planted.tokenizer, data, **SMALL)
    assert atlas.names == ("early", "late") and [refusal.name for refusal in atlas.refused] == ["mixed"]


def test_the_false_refusals_and_acceptances_are_as_rare_as_promised() -> None:
    """Documents whose routes know nothing of their name: hardly one family of three names in twenty has a name that
    stands; with a real preference none falls."""
    config = ModelConfig.preset("nano")
    how = Measurement("token", 0.2, 0, (), (), 64, 0)

    def family(strength: float, seed: int) -> int:
        generator = np.random.default_rng(seed)
        routed = {}
        for place in range(3):
            share_E = np.full(16, 1 / 16)
            share_E[place * 4 : place * 4 + 4] += strength
            habit_UE = generator.dirichlet(8 * share_E / share_E.sum(), 16)  # documents differ among themselves
            slots_ULE = np.stack([generator.multinomial(256, habit_UE) for _ in config.moe_layers], 1).astype(float)
            routed[f"n{place}"] = Routed(np.full(16, 64.0), slots_ULE, slots_ULE / 4)
        return len(judge(config, routed, dict.fromkeys(routed, how), dict.fromkeys(routed, 16)))

    false = sum(family(0.0, seed) > 0 for seed in range(40))
    assert false <= 6  # 2 expected; more than 6 of 40 at 5 % each has a chance of 0.3 %
    assert [family(0.15, seed) for seed in range(5)] == [3] * 5


def test_a_single_name_is_held_against_random_experts(planted: Planted) -> None:
    atlas = profile(planted.model, planted.tokenizer, {"early": text("early")}, **SMALL)
    assert set(atlas["early"]) == planted.experts["early"]
    assert "coverage_slots_others" not in atlas.group("early").evidence
    config = ModelConfig.preset("nano")
    even = np.random.default_rng(0).multinomial(256, [1 / 16] * 16, (16, len(config.moe_layers))).astype(float)
    chance = judge(config, {"even": Routed(np.full(16, 64.0), even, even)},
                   {"even": Measurement("token", 0.2, 1024, (), (), 64, 0)}, {"even": 16})
    assert [refusal.name for refusal in chance.refused] == ["even"]
    assert "other names" not in chance.refused[0].reason


def built_in(planted: Planted, *names: str, as_name: str = "") -> Atlas:
    """An atlas whose names training built in, as it were."""
    return Atlas(Shape.of(planted.model.config), [
        NamedGroup(as_name or name, "built-in", ExpertSet(sorted(planted.experts[name])),
                   evidence={"routing_accuracy": 0.9, "coverage_slots_others": 0.77}) for name in names])


@pytest.mark.parametrize("score", ["token", "gate"])
def test_a_name_of_training_gets_evidence_and_keeps_its_experts(planted: Planted, score: Any) -> None:
    known = built_in(planted, "early", "late")
    data = {name: text(name) for name in ("late", "middle", "early")}
    found = profile(planted.model, planted.tokenizer, data, score=score, atlas=known, **SMALL)
    assert {name: found.group(name).kind for name in found} == {
        "late": "built-in", "middle": "measured", "early": "built-in"}
    for name in ("early", "late"):
        group = found.group(name)
        assert group.experts == known.group(name).experts, "in the same order"
        assert group.evidence["routing_accuracy"] == 0.9, "what training said stays"
        assert group.evidence["coverage_slots"] > 0.95 and group.evidence["coverage_slots_others"] < 0.05
        assert group.evidence["coverage_uniform"] == K / 16 and group.evidence["p_adjusted"] < 0.05
        assert group.evidence["documents"] == 24 and group.evidence["tokens"] == group.measured.tokens > 500
        assert "stability_jaccard" not in group.evidence, "nothing was selected"
        kind = "slots" if score == "token" else "weight"  # of all documents, none of which chose the experts
        assert sum(group.scores) / 2 == pytest.approx(group.evidence[f"coverage_{kind}"], rel=1e-6)
    both = known.updated(found)
    assert both.names == ("early", "late", "middle") and not doubts(both)
    alone = profile(planted.model, planted.tokenizer, {"early": text("early")}, atlas=both, **SMALL).group("early")
    assert "coverage_slots_others" not in alone.evidence, "nothing is left of an earlier measurement"


def test_a_name_of_training_stays_whatever_its_text_does(planted: Planted) -> None:
    """Its text visits others' experts; one of the data's other names stands all the same."""
    known = built_in(planted, "early", as_name="odd")
    data = {"odd": text("late"), "middle": text("middle")}
    found = profile(planted.model, planted.tokenizer, data, atlas=known, **SMALL)
    assert found.names == ("odd", "middle") and not found.refused
    assert found.group("odd").evidence["coverage_slots"] < 0.05 and found.group("odd").evidence["p_adjusted"] > 0.5
    [line] = doubts(found)
    assert line.startswith("odd is no better than chance: its 8 experts carry ") and "it stays, since training" in line
    few = profile(planted.model, planted.tokenizer, {"odd": text("late", 3, 900), "middle": text("middle")},
                  atlas=known, **SMALL)
    assert doubts(few)[0].startswith("odd has too little evidence (3 documents): ")
    other = Atlas.built_in(planted.model.config.with_(n_routed_experts=32), ["odd"])
    with pytest.raises(ConfigError, match="the atlas was made for another shape: 2 layers x 32 experts"):
        profile(planted.model, planted.tokenizer, data, atlas=other, **SMALL)


def test_a_refusal_says_whether_more_text_may_help(planted: Planted) -> None:
    def mixed(documents: int, characters: int) -> list[Document]:
        return [document for own in zip(*(text(name, 10, characters, seed=5) for name in LETTERS), strict=True)
                for document in own][:documents]

    data = {"early": text("early"), "late": text("late")}
    few, many = (profile(planted.model, planted.tokenizer, data | {"mixed": documents}, **SMALL).refused
                 for documents in (mixed(7, 900), mixed(30, 120)))
    assert [r.name for r in few] == [r.name for r in many] == ["mixed"]
    assert few[0].reason.startswith("too little evidence (7 documents): its ") and "chance: its" not in few[0].reason
    assert many[0].reason.startswith("no better than chance: its ") and "too little" not in many[0].reason
    assert verdict("x", few[0].reason).startswith("x has too") and verdict("x", many[0].reason).startswith("x is no")


@pytest.mark.parametrize(("documents", "spread", "reason"), [
    (40, 0.02, "no better than chance"), (40, 0.2, "no better than chance"), (8, 0.4, "too little evidence (8 doc"),
    (7, 0.02, "too little evidence (7 documents)"), (1, 0.02, "too little evidence (1 document)")])
def test_evidence_is_too_little_where_a_large_lead_could_be_chance(documents: int, spread: float, reason: str) -> None:
    """Eight documents that differ wildly among themselves cannot say that nothing is there; forty can."""
    config = ModelConfig.preset("nano")

    def drawn(units: int, seed: int) -> Routed:
        generator = np.random.default_rng(seed)
        habit_UE = generator.dirichlet(np.full(16, 1 / (16 * spread**2)), units)
        slots = [generator.multinomial(256, habit_UE) for _ in config.moe_layers]
        return Routed(np.full(units, 64.0), np.stack(slots, 1).astype(float), np.stack(slots, 1) / 4.0)

    refused = 0
    for seed in range(6):
        routed = {"own": drawn(max(8, documents), seed), "other": drawn(40, seed + 99)}
        how = Measurement("token", 0.2, 0, (), (), 64, seed)
        found = judge(config, routed, dict.fromkeys(routed, how), {"own": documents, "other": 40})
        own = [r for r in found.refused if r.name == "own"]
        refused += len(own)
        assert all(r.reason.startswith(reason) for r in own), own
    assert refused >= 4


def test_scores_are_those_of_a_loop_without_the_beginning_padding_and_scaling(planted: Planted) -> None:
    config, model, tokenizer = planted.model.config, planted.model, planted.tokenizer
    assert config.routed_scaling_factor == 2.5
    documents = [Document(d.text[: 10 + 5 * i], d.source) for i, d in enumerate(text("early", 10))]
    atlas = profile(model, tokenizer, {"early": documents}, score="gate", threshold=1, seq_len=256, tokens=10**6)
    found: Any = atlas.groups[0] if atlas.groups else atlas.refused[0]
    assert found.name == "early"
    order = np.random.default_rng([0, 0]).permutation(10)[:5]
    sample = draw("early", documents, tokenizer, seq_len=256, tokens=10**6, seed=0)
    expected: Counter[ExpertId] = Counter()
    tokens = 0
    for window in sample.windows:
        if window.unit not in order:
            continue
        record = RoutingRecord()
        with torch.no_grad():
            model(torch.tensor([window.ids]), routing=record)
        tokens += len(window.ids) - 1
        for layer, routes in record.routes.items():
            for experts, weights in zip(routes.index_TK[1:].tolist(), routes.weight_TK[1:].tolist(), strict=True):
                for index, weight in zip(experts, weights, strict=True):
                    expected[ExpertId(layer, index)] += weight / 2.5
    group = atlas.group("early")
    assert found is group and sum(group.scores) == pytest.approx(len(config.moe_layers), abs=1e-3)
    for expert, score in zip(group.experts, group.scores, strict=True):
        assert score == pytest.approx(expected[expert] / tokens, abs=1e-6)


def test_a_quantized_model_and_one_of_the_second_generation(
    planted: Planted, tmp_path: Path
) -> None:
    convert.quantize(planted.folder, tmp_path / "nf4", "nf4")
    atlas = profile(load_model(tmp_path / "nf4"), planted.tokenizer, everything(), **SMALL)
    assert {name: set(atlas[name]) for name in atlas} == {name: set(ids) for name, ids in planted.experts.items()}
    second = CausalLM(planted.model.config.with_(
        model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
        routed_scaling_factor=16.0)).eval()
    second.load_state_dict({name: value for name, value in planted.model.state_dict().items() if "bias" not in name})
    atlas = profile(second, planted.tokenizer, everything(), score="gate", threshold=0.1, seq_len=32, tokens=1500)
    for name in LETTERS:
        assert set(atlas[name]) <= planted.experts[name]
        assert max(atlas.group(name).scores) <= 1


def test_the_same_arguments_give_the_same_atlas_and_another_seed_other_halves(planted: Planted, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        profile(planted.model, planted.tokenizer, everything(), seed=seed, **SMALL).save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_progress_ends_at_all_tokens(planted: Planted) -> None:
    calls: list[tuple[int, int]] = []
    profile(planted.model, planted.tokenizer, everything(), progress=lambda *call: calls.append(call), **SMALL)
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] > calls[0][0]


# ---- the sample ---------------------------------------------------------------------------------------------------


def test_a_sample_keeps_to_its_budget_and_takes_from_everywhere(planted: Planted) -> None:
    documents = [Document("ab" * 400, "long.txt"), *text("late", 200, 60)]
    sample = draw("x", iter(documents), planted.tokenizer, seq_len=16, tokens=600, seed=0)
    assert 600 <= sample.tokens < 600 + 16
    assert all(len(window.ids) <= 16 and window.ids[0] == planted.tokenizer.bos_id for window in sample.windows)
    assert sample.tokens == sum(len(window.ids) - 1 for window in sample.windows)
    assert 20 < sample.documents == sample.units < 200
    assert max(Counter(window.unit for window in sample.windows).values()) > 1  # the long one, several times
    assert sample == draw("x", documents, planted.tokenizer, seq_len=16, tokens=600, seed=0)
    assert sample != draw("x", documents, planted.tokenizer, seq_len=16, tokens=600, seed=1)


def test_windows_stand_for_documents_where_there_are_few(planted: Planted) -> None:
    [document] = text("early", 1, 4000)
    sample = draw("x", [document], planted.tokenizer, seq_len=32, tokens=10**6, seed=0)
    assert sample.documents == 1 and sample.units == len(sample.windows) >= 30


def test_files_are_named_by_hash_and_not_by_machine(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    file = tmp_path / "notes" / "a.txt"
    file.write_text("abc" * 100)
    sample = draw("x", [Document("abc" * 100, str(file))], planted.tokenizer, seq_len=32, tokens=10**6, seed=0)
    [(name, digest)] = sample.files
    assert name == "notes/a.txt" and digest is not None and len(digest) == 64


def test_conversations_come_in_the_words_of_the_template(planted: Planted) -> None:
    turns = (("user", "abab"), ("assistant", "cdcd"))
    [window] = draw("x", [Document("User: abab", "c", turns=turns)], planted.tokenizer, seq_len=64, tokens=99,
                    seed=0).windows
    messages = [{"role": role, "content": said} for role, said in turns]
    assert window.ids == planted.tokenizer.encode_chat(messages, add_generation_prompt=False)[:64]


def test_every_window_is_routed_once(planted: Planted) -> None:
    windows = [Window(i, [0, *range(10, 10 + length)]) for i, length in enumerate((3, 9, 1, 5))]
    seen = [i for batch in route(planted.model, windows, planted.tokenizer) for i in batch.windows]
    assert sorted(seen) == [0, 1, 2, 3]
    [batch] = route(planted.model, windows, planted.tokenizer)
    assert batch.counted_BT.sum(1).tolist() == [9, 5, 3, 1] and not batch.counted_BT[:, 0].any()


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"score": "weight"}, "score = 'weight': must be token or gate"),
    ({"threshold": 0}, "threshold = 0: must lie above 0"),
    ({"threshold": 1.5}, "threshold = 1.5"),
    ({"seq_len": 257}, r"seq_len = 257: must lie in 2..256"),
    ({"seq_len": 1}, "seq_len = 1: must"),
    ({"tokens": 0}, "tokens = 0: must be an integer >= 1"),
])
def test_impossible_settings(planted: Planted, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile(planted.model, planted.tokenizer, everything(), **options)


def test_no_names_no_experts_no_text_and_too_little(planted: Planted) -> None:
    with pytest.raises(ConfigError, match="at least one name"):
        profile(planted.model, planted.tokenizer, {})
    dense = CausalLM(planted.model.config.with_(first_k_dense_replace=3))
    with pytest.raises(ConfigError, match="no routed experts"):
        profile(dense, planted.tokenizer, everything())
    with pytest.raises(DataError, match="late: there is no text"):
        profile(planted.model, planted.tokenizer, everything() | {"late": []})
    with pytest.raises(DataError, match=r"late: too little evidence \(1 document\): too little text: 1 windows of at "
                                        "most 256 tokens, must be at least 8"):
        profile(planted.model, planted.tokenizer, everything() | {"late": text("late", 1, 30)})
