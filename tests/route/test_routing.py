"""Keywords, relevance, fusion; the user's function with any objects that have `.domain`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek import calculate_relevance, dynamic_routing, extract_keywords, fuse_expert_outputs
from deepseek.errors import ConfigError, RequestError
from deepseek.route import BASE, Fusion


@dataclass
class Expert:
    domain: str
    answer: Any = "yes"

    def __call__(self, prompt: str) -> Any:
        return self.answer


def test_keywords_are_words_in_both_languages_and_their_weights_sum_to_one() -> None:
    words = extract_keywords("The contract of sale ends; 买卖合同的解除权由谁行使？ 12 34")
    assert {"contract", "sale", "买卖合同", "解除权"} <= {*words}
    assert not {"the", "of", "的", "12", "34"} & {*words}
    assert math.isclose(sum(words.values()), 1) and list(words.values()) == sorted(words.values(), reverse=True)
    assert list(extract_keywords("contract contract sale", most=1)) == ["contract"]


@pytest.mark.parametrize("text", ["", "  \n", "!?", "1 2 3"])
def test_a_text_without_words_has_no_keywords(text: str) -> None:
    assert extract_keywords(text) == {}


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(RequestError, match="text = 3: must be a text"):
        extract_keywords(3)  # type: ignore[arg-type]


def test_relevance_is_the_share_of_the_keywords_that_a_domain_bears_out() -> None:
    assert calculate_relevance(["contract", "kidney"], "Law of contracts") == 0.5
    assert calculate_relevance({"contract": 3.0, "kidney": 1.0}, Expert("Law of contracts")) == 0.75
    assert calculate_relevance(["合同"], "法律与合同") == 1 and calculate_relevance(["合同"], "医学") == 0
    assert calculate_relevance({}, "law") == 0
    with pytest.raises(ConfigError, match="domain = None: must be a text"):
        calculate_relevance(["law"], SimpleNamespace(name="x"))


def test_the_best_three_are_fused_and_small_weights_dropped() -> None:
    fusion = fuse_expert_outputs({"a": 0.5, "b": 0.1, "c": 0.3, "d": 0.2})
    assert fusion.members == ("a", "c", "d") and math.isclose(sum(fusion.weights), 1)
    assert fusion.weights == pytest.approx((0.5, 0.3, 0.2))
    fusion = fuse_expert_outputs(["a", "b", "c"], [0.6, 0.3, 0.1])
    assert fusion.members == ("a", "b") and fusion.weights == pytest.approx((2 / 3, 1 / 3))
    assert fuse_expert_outputs([("a", 1), ("b", 1)]).weights == (0.5, 0.5)
    assert fuse_expert_outputs(["a", "b", "c", "d"]).members == ("a", "b", "c")


@pytest.mark.parametrize(("experts", "weights"), [([], None), ({}, None), (["a", "b"], [0.0, 0.0])])
def test_nothing_to_fuse_is_the_base_alone(experts: Any, weights: Any) -> None:
    assert fuse_expert_outputs(experts, weights) == Fusion((BASE,), (1.0,), "base")


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "1", True])
def test_impossible_weights_are_refused(weight: Any) -> None:
    with pytest.raises(ConfigError, match=r"a: weight = .*: must be a finite number >= 0"):
        fuse_expert_outputs(["a"], [weight])


def test_weights_beside_experts_must_be_as_many() -> None:
    with pytest.raises(ConfigError, match="weights: 1 for 2 experts: must be as many"):
        fuse_expert_outputs(["a", "b"], [1.0])


def test_the_users_function_with_experts_that_have_a_domain() -> None:
    law, medicine = Expert("Law, contracts, 合同", "law says"), Expert("Medicine and disease", "medicine says")
    fusion = dynamic_routing("Who may end a contract?", [medicine, law])
    assert fusion.members == (law,) and fusion.weights == (1.0,) and fusion.kind == "callable"
    assert fusion.text("Who may end a contract?") == "law says"
    assert {member.answer for member in dynamic_routing("a contract about a disease", [law, medicine]).members} == {
        "law says", "medicine says"}
    for pool, text in (([], "contract"), ([law], "kidney"), ([law], "")):
        assert dynamic_routing(text, pool).kind == "base"


def test_answers_are_voted_on_by_weight() -> None:
    votes = fuse_expert_outputs([Expert("", "a"), Expert("", "b"), Expert("", ["b"])], [0.4, 0.3, 0.3])
    assert votes.text("?") == "b"
    generate = SimpleNamespace(domain="x", generate=lambda prompt: [SimpleNamespace(text=prompt.upper())])
    assert fuse_expert_outputs([generate]).text("hi") == "HI"
    assert [weight for _, weight, _ in votes.outputs("?")] == [0.4, 0.3, 0.3]


def test_members_that_cannot_answer_are_named() -> None:
    with pytest.raises(ConfigError, match="the base alone: is not callable"):
        Fusion().text("?")
    with pytest.raises(ConfigError, match="member law: is not callable"):
        fuse_expert_outputs([SimpleNamespace(name="law")]).text("?")
    with pytest.raises(ConfigError, match="member x: returned 3: must be a text"):
        fuse_expert_outputs([Expert("x", 3)]).text("?")
