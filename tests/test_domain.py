"""Rules speak only when sure; the classifier learns, says how sure it is, and comes back from disk as it was."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from deepseek.domain import (
    KEYWORDS,
    NAMES,
    DomainClassifier,
    HeldOutReport,
    KeywordRules,
    coincidences,
    sequences,
)
from deepseek.errors import ConfigError, DataError, NotFoundError

WORDS = {"law": "court judge appeal verdict plaintiff 法院 判决 原告".split(),
         "code": "def return import class lambda 函数 变量 编译".split(),
         "cook": "oven butter flour salt onion 油 盐 酱油".split()}


def corpus(count: int = 120, seed: int = 1) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    names = [draw.choice(list(WORDS)) for _ in range(count)]
    return [" ".join(draw.choices([*WORDS[name], "the", "and", "的"], k=40)) for name in names], names


# ---- rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "name"), [
    ("The defendant appealed; the court held the contract void.", "law_expert"),
    ("原告向法院起诉，请求判决被告赔偿。", "law_expert"),
    ("def f(x):\n    return self.x + lambda y: y", "code_expert"),
    ("The patient had a chronic infection and needed surgery.", "medical_expert"),
    ("解方程：已知三角形的周长与面积。", "math_expert"),
    ("Net income and dividends rose; shareholders' equity fell.", "finance_expert"),
    ("老师布置了作业，学生在课堂上做练习题。", "teaching_expert"),
    ("User: hello\n\nAssistant: you're welcome, anything else?", "dialogue_expert"),
])
def test_keywords_of_both_languages_name_a_domain(text: str, name: str) -> None:
    assert KeywordRules().predict(text) == name


@pytest.mark.parametrize("text", [
    "", "  \n", "The weather was fine.", "courtyard contractor statutes", "一二三四五",
    "The court heard the patient; the statute names no disease.",  # as much law as medicine
    "one court",  # a single keyword
])
def test_rules_that_are_unsure_say_nothing(text: str) -> None:
    assert KeywordRules().predict(text) is None


def test_keywords_stand_as_words() -> None:
    counts = KeywordRules({"a": ["art", "def ", "法院", "#include"], "b": ["party time"]}).counts
    assert counts("art, ART and art") == {"a": 1}, "different keywords count, not repetitions"
    assert counts("party smart artful") == {}
    assert counts("it is party time; 最高法院 #include <x>") == {"a": 2, "b": 1}


def test_every_built_in_name_has_keywords() -> None:
    assert set(NAMES) == {f"{name}_expert" for name in "text code math law finance medical teaching dialogue".split()}
    for words in KEYWORDS.values():
        assert all(word == word.lower() for word in words.split("|"))
        assert any(not word.isascii() for word in words.split("|")), "Chinese ones too"


def test_rules_are_extended_by_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("cook_expert: [oven, butter, 酱油]\nlaw_expert: [witness]\n", encoding="utf-8")
    rules = KeywordRules.load(path)
    assert rules.predict("butter in the oven") == "cook_expert"
    assert rules.predict("the witness came to court") == "law_expert"
    assert KeywordRules().predict("the witness came to court") is None
    path.write_text(json.dumps({"x": ["a b", "c d"]}))
    assert KeywordRules.load(path).predict("a b and c d") == "x"
    for bad, why in (("- a\n", "must be an object"), ("a: [", "not YAML"),
                     ("a: []", "must be a list of keywords"), ("a: [1]", "must be a list of keywords")):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=rf"rules\.yaml: .*{why}"):
            KeywordRules.load(path)
    with pytest.raises(NotFoundError, match="no such file"):
        KeywordRules.load(tmp_path / "none.yaml")


# ---- the classifier ---------------------------------------------------------------------------------------------


def test_it_learns_and_says_how_sure_it_is() -> None:
    texts, names = corpus()
    classifier, report = DomainClassifier.train(texts, names, bits=12, epochs=6)
    assert classifier.names == report.names == ("code", "cook", "law")
    assert report.macro > 0.9
    assert sum(map(sum, report.confusion)) < len(texts) / 5, "half of the held-out texts fit the temperature"
    said, sure = classifier.predict(["the plaintiff went to court", "酱油 盐 butter", "import lambda", "", "?"])
    assert said[:3] == ["law", "cook", "code"]
    assert sure.dtype == np.float32
    assert (sure[:3] > 0.5).all()
    assert sure[3] == 0, "nothing was said"
    assert np.allclose(classifier.probabilities(texts[:5])[0].sum(1), 1)
    assert classifier.predict([])[0] == []


ENGLISH = "the judge and the jury of that old town went home when it was all over and done with".split()
FRENCH = "le juge et les jurés de cette vieille ville sont rentrés chez eux quand tout était fini".split()
CHINESE = "这座 古老 城镇 的 法官 和 陪审团 在 一切 结束 之后 都 回家 了 我们 也 走 吧".split()


def in_language(words: list[str], count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=40)) for _ in range(count)]


@pytest.mark.parametrize(("spoken", "coincide"), [
    ({"law": [CHINESE], "code": [ENGLISH]}, {"en": "code", "zh": "law"}),
    ({"law": [FRENCH], "code": [ENGLISH]}, {"en": "code", "fr": "law"}),
    ({"law": [CHINESE], "code": [ENGLISH], "cook": [ENGLISH]}, {"zh": "law"}),
    ({"law": [CHINESE, ENGLISH], "code": [ENGLISH]}, {"zh": "law"}),
    ({"law": [CHINESE, ENGLISH], "code": [ENGLISH, CHINESE]}, {}),
    ({"law": [ENGLISH], "code": [ENGLISH]}, {}),
    ({"law": [CHINESE] * 20 + [ENGLISH], "code": [ENGLISH] * 20 + [CHINESE]}, {"en": "code", "zh": "law"}),
    ({"law": [ENGLISH] * 12 + [CHINESE], "code": [ENGLISH]}, {}),  # too few to be what law is known by
])
def test_a_name_that_is_a_language_is_warned_of(spoken: dict[str, list[list[str]]], coincide: dict[str, str]) -> None:
    texts: list[str] = []
    names: list[str] = []
    for name, parts in spoken.items():
        for i, words in enumerate(parts):
            texts += in_language(words, 84 // len(parts), i)
        names += [name] * (len(texts) - len(names))
    assert coincidences({name: [t for t, own in zip(texts, names, strict=True) if own == name]
                         for name in spoken}) == coincide
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, report = DomainClassifier.train(texts, names, bits=10, epochs=1)
    assert report.coincide == coincide and len(told) == bool(coincide)
    for code, name in coincide.items():
        for said in (str(told[0].message), report.table()):
            assert f"nearly all texts in {code} are {name}" in said and "may learn the language instead" in said
    assert ("coincide" in report.table()) == bool(coincide)


def test_equal_texts_give_equal_bytes(tmp_path: Path) -> None:
    texts, names = corpus()
    for file, seed in (("a", 0), ("b", 0), ("c", 1)):
        DomainClassifier.train(texts, names, bits=10, epochs=1, seed=seed)[0].save(tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    texts, names = corpus()
    classifier, _ = DomainClassifier.train(texts, names, bits=10, epochs=2)
    classifier.save(tmp_path / "c.npz")
    again = DomainClassifier.load(tmp_path / "c.npz")
    assert (again.names, again.temperature) == (classifier.names, classifier.temperature)
    assert again.predict(texts)[0] == classifier.predict(texts)[0]
    assert np.abs(again.predict(texts)[1] - classifier.predict(texts)[1]).max() < 0.01  # weights lie in half precision
    (tmp_path / "c.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:-300])
    with pytest.raises(DataError, match=r"c\.npz: not a domain classifier"):
        DomainClassifier.load(tmp_path / "c.npz")
    with pytest.raises(NotFoundError, match="no such file"):
        DomainClassifier.load(tmp_path / "none.npz")


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", about=np.array([{"format": 1}], dtype=object))
    with pytest.raises(DataError, match="not a domain classifier"):
        DomainClassifier.load(tmp_path / "evil.npz")


@pytest.mark.parametrize(("texts", "names", "message"), [
    (["a"], ["x", "y"], "1 texts and 2 names"), (["a"] * 9, ["x"] * 9, "at least two names, got x"),
    (["a"] * 9, ["x"] * 8 + ["y"], "y: has 1 texts"), ([], [], "got none")])
def test_too_little_to_learn_from(texts: list[str], names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DomainClassifier.train(texts, names)


def test_sequences_do_not_reach_into_the_next_text() -> None:
    texts = ["abcdef", "ab", "", "法院判决书的内容"]
    together = sequences(texts, 14)
    ends = [*together[1][1:].tolist(), len(together[0])]
    for number, text in enumerate(texts):
        alone = sequences([text], 14)
        part = together[0][together[1][number] : ends[number]]
        assert sorted(part.tolist()) == sorted(alone[0].tolist())
        assert together[2][number] == alone[2][0]
    assert together[2][2] == 0


def test_a_report_reads_well() -> None:
    report = HeldOutReport(("a_expert", "b_expert"), ((3, 1), (0, 4)), {0.5: (0.9, 0.95)}, 0.02)
    assert report.accuracy == {"a_expert": 0.75, "b_expert": 1.0}
    assert report.macro == 0.875
    assert "a_expert              75.0%" in report.table()
    assert "confidence >= 0.50: 90.0% of the texts, 95.0% of them right" in report.table()
