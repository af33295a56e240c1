"""Weights of terms, and the glossary: the formula, the domains of members, both languages without a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepseek import ExpertPool
from deepseek.glossary import GLOSSARY
from deepseek.route import PoolMember
from deepseek.route.weights import MANY, TermWeights, domains


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_logits_of_the_sparse_weights_equal_the_formula() -> None:
    words = {"law": "court judge appeal", "code": "function import lambda", "cook": "oven butter salt"}
    members = [PoolMember(name, f"about {name}", samples=[f"{own} {i}" for i in range(20)])
               for name, own in words.items()]
    found = ExpertPool(members).scorer.terms
    assert found.glossary is not None

    def dense(weights: TermWeights, term: str) -> np.ndarray:
        row = np.zeros(3)
        if (v := weights.vocabulary.get(term)) is not None:
            for p in range(weights.first_V[v], weights.first_V[v + 1]):
                row[weights.member_P[p]] = weights.weight_P[p]
        return row

    a, b = (dense(found.own, term) for term in ("court", "oven"))
    own = (a * 2 / (2 + 1.2) + b * 1 / (1 + 1.2)) / 2**0.5
    glossary = dense(found.glossary, "court") * 2 / (2 + 1.2)  # of the two it knows this one, for law
    share = 0.8 * np.exp(-2 / 15)
    assert glossary.argmax() == 0 and glossary[0] > 0 and not dense(found.glossary, "oven").any()
    assert found.logits("court oven court zzzz")[0] == pytest.approx((1 - share) * own + share * glossary, rel=1e-5)


def test_every_domain_has_words_in_both_languages_and_none_twice() -> None:
    for name, domain in GLOSSARY.items():
        for words, least in zip((domain.english, domain.chinese), (80, 100), strict=True):
            found = words.split("|")
            assert len(found) >= least and len({*found}) == len(found) and all(map(str.strip, found)), name
        assert domain.english.isascii() and not any(word.isascii() for word in domain.chinese.split("|")), name


@pytest.mark.parametrize("scorer", ["keywords", "classifier"])
def test_the_glossary_knows_both_languages_and_is_an_option(scorer: str, tmp_path: Path) -> None:
    said = (f"scorer: {scorer}\nmembers:\n- {{name: law_expert, kind: experts, domain: Statutes}}\n"
            "- {name: ward, kind: experts, domain: 临床与护理}\n- {name: zoo, kind: experts, domain: Zebras}\n")
    pool = ExpertPool.load(_write(tmp_path / "pool.yaml", said))
    for text, name in (("原告可以上诉吗？", "law_expert"), ("Can the plaintiff appeal?", "law_expert"),
                       ("咳嗽吃什么药物？", "ward"), ("What helps against asthma?", "ward"), ("zebras", "zoo")):
        assert pool.route(text).fusion.names[0] == name, text
    assert {"原告", "上诉"} <= {*pool.route("原告可以上诉吗？").keywords}
    without = ExpertPool.load(_write(tmp_path / "without.yaml", f"glossary: false\n{said}"))
    assert without.scorer.terms.glossary is None and pool.scorer.terms.glossary is not None
    if scorer == "keywords":
        assert without.route("原告可以上诉吗？").abstained and without.route("asthma").abstained


def test_the_domains_of_members() -> None:
    for member, names in (
            (PoolMember("law_expert", "Everything about medicine"), ["law_expert"]),  # the name comes first
            (PoolMember("north", "Medicine and mathematics"), ["math_expert", "medical_expert"]),
            (PoolMember("north", "刑法与民法"), ["law_expert"]),
            (PoolMember("north", "Asthma, gout and insulin"), ["medical_expert"]),  # not named, but spoken of
            (PoolMember("north", "Songs", keywords=dict.fromkeys(["原告", "判决"])), ["law_expert"]),
            (PoolMember("flaw", "The town of Northgate"), [])):
        assert sorted(domains(member)) == sorted(names), member
    alike = [PoolMember(f"law {i}", f"about w{i}x") for i in range(MANY + 1)]
    assert ExpertPool(alike).scorer.terms.glossary is None  # it tells none of them from the others
    assert ExpertPool(alike[1:]).scorer.terms.glossary is not None
