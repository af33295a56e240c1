"""Pool files, what is wrong with them, and decisions: the same for the same input, none where nothing fits."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from deepseek import ExpertPool, KnowledgeBase, dynamic_routing
from deepseek.cli import main
from deepseek.errors import ConfigError, NotFoundError, RequestError
from deepseek.route import PoolMember, scorers
from deepseek.route.distilled import DistilledRouter, distill
from deepseek.route.scorers import FORM, TRAINED, Centroids, Sequences
from tests.helpers import ROOT

WORDS = {"law": "court judge appeal verdict plaintiff statute 法院 判决 原告 合同".split(),
         "code": "function return import class lambda compiler 函数 变量 编译 数组".split(),
         "cook": "oven butter flour salt onion recipe 炒锅 食盐 酱油 鸡蛋".split()}
COMMON = "the a of one and this that 我们 这个".split()


def samples(name: str, count: int, seed: int = 0) -> list[str]:
    draw = random.Random(f"{name}{seed}")
    return [" ".join(draw.choices(WORDS[name] + COMMON, k=draw.randint(8, 30))) for _ in range(count)]


def members(count: int = 40) -> list[PoolMember]:
    return [PoolMember(name, f"about {name}", samples=samples(name, count)) for name in WORDS]


@pytest.fixture(scope="module")
def pools() -> dict[str, ExpertPool]:
    return {scorer: ExpertPool(members(), scorer) for scorer in ("keywords", "classifier")}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


LAW = "- {name: law, kind: experts, domain: Law and contracts, keywords: [court, 法院]}\n"


def test_a_pool_file_with_all_that_it_may_say(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "base.knowledge", "")
    write(tmp_path / "cook.jsonl", '{"text": "oven"}\n"butter"\n\n{"messages": [{"content": "salt"}]}\n')
    write(tmp_path / "law.txt", "court\njudge\n\nappeal")
    write(tmp_path / "more.yaml", "members:\n- {name: cook, kind: knowledge, path: base.knowledge, domain: food,"
                                  " samples: cook.jsonl}\n")
    pool = ExpertPool.load(write(tmp_path / "pool.yaml", """
scorer: classifier
include: [more.yaml]
members:
- {name: law, kind: adapter, path: adapter, domain: Law, keywords: {court: 2.5}, samples: law.txt}
- {name: code, kind: experts, domain: Code, keywords: [def], samples: ["return x"]}
"""))
    assert [member.name for member in pool.members] == ["cook", "law", "code"] and pool.scorer_name == "classifier"
    cook, law, code = pool.members
    assert cook.samples == ["oven", "butter", "salt"] and cook.path == tmp_path / "base.knowledge"
    assert law.samples == ["court\njudge", "appeal"] and law.keywords == {"court": 2.5}
    assert code.path is None and code.keywords == {"def": None} and pool["law"] is law


def test_passages_of_a_member(tmp_path: Path) -> None:
    base = KnowledgeBase(tmp_path / "law.knowledge")
    base.add([write(tmp_path / "a.md", "# Deposit\n\nThe landlord returns the deposit within a month.\n")])
    member = PoolMember("law", "Law", "knowledge", base.path)
    question = "When does the landlord return the deposit?"
    found, = member.passages(question)
    assert found.section == "Deposit" and member.passages("zebra") == []
    base.add([write(tmp_path / "b.md", "# Zebra\n\nA striped animal.\n")])
    assert member.passages("zebra")[0].section == "Zebra", "additions count"
    base.remove([tmp_path / "a.md"])
    assert member.passages(question) == []
    base.remove()
    with pytest.raises(NotFoundError, match="no such knowledge base"):
        member.passages(question)
    KnowledgeBase(base.path).add([tmp_path / "a.md"])
    assert member.passages(question) == [found], "a new base in its place"
    with pytest.raises(ConfigError, match="member = 'code': has no passages: its kind is experts, must be knowledge"):
        PoolMember("code", "Code").passages("x")


@pytest.mark.parametrize(("text", "said"), [
    ("[]", "must be a table with `members`, got list"),
    ("member: []", "unknown key 'member'; there are members, include, scorer, bias, glossary; did you mean members?"),
    ("members: {}", "members = {}: must be a list"),
    ("members: [3]", "members[0] = 3: must be a table with name, kind"),
    ("glossary: [law]", "glossary = ['law']: must be true or false"),
    ("scorer: keyword", "scorer = 'keyword': must be keywords, classifier or gate; did you mean keywords?"),
    (f"members:\n{LAW}{LAW}", "members[1] (law): name = 'law': another member bears it: must be unique"),
    ("members: [{name: x, domain: y}]", "members[0] (x): kind: must be given"),
    ("members: [{kind: experts, domain: y}]", "members[0]: name: must be given"),
    ("members: [{name: x, kind: expert, domain: y}]", "kind = 'expert': must be experts, adapter or knowledge; did"),
    ("members: [{name: x, kind: [a], domain: y}]", "kind = ['a']: must be experts, adapter or knowledge"),
    ("members: [{name: x, kind: experts, domain: ''}]", "domain = '': must be a text that is not empty"),
    ("members: [{name: 3, kind: experts, domain: y}]", "members[0]: name = 3: must be a text"),
    ("members: [{name: base, kind: experts, domain: y}]", "name = 'base': must be printable, and not 'base'"),
    ("members: [{name: x, kind: experts, domain: y, keyword: [z]}]", "unknown key 'keyword'"),
    ("members: [{name: x, kind: experts, domain: y, path: z}]", "path = 'z': must be a file or folder; there is none"),
    ("members: [{name: x, kind: adapter, domain: y}]", "path: must be given with kind adapter"),
    ("members: [{name: x, kind: adapter, domain: y, path: gone}]", "path = 'gone': must be a file or folder; there is"),
    ("members: [{name: x, kind: knowledge, domain: y, path: gone}]", "path = 'gone': must be a file or folder; there"),
    ("members: [{name: x, kind: experts, domain: y, keywords: z}]", "keywords = 'z': must be a list of texts"),
    ("members: [{name: x, kind: experts, domain: y, keywords: [3]}]", "keywords: 3: must be a text"),
    ("members: [{name: x, kind: experts, domain: y, keywords: {z: 0}}]", "keywords: z = 0: must be a positive number"),
    ("members: [{name: x, kind: experts, domain: y, keywords: {z: 1e39}}]", "z = 1e+39: must be a positive number, at"),
    ("members: [{name: x, kind: experts, domain: y, samples: gone}]", "samples = 'gone': must be a file of texts"),
    ("members: [{name: x, kind: experts, domain: y, samples: [3]}]", "samples = [3]: must be a list of texts"),
    ("members: [{name: x, kind: experts, domain: y, samples: 3}]", "samples = 3: must be a list of texts"),
    ("members: [{name: x, kind: experts, domain: y, samples: bad.jsonl}]", "samples = 'bad.jsonl': line 2: not JSON"),
    ("members: [{name: x, kind: experts, domain: y, samples: odd.jsonl}]", "samples = 'odd.jsonl': line 1: must be a"),
    ("include: [gone.yaml]", "include = 'gone.yaml': must be a pool file; there is none"),
    ("include: [pool.yaml]", "include = "),
])
def test_what_is_wrong_is_said_in_one_message(text: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", '"good"\n{"text"\n')
    write(tmp_path / "odd.jsonl", '{"label": 3}\n')
    file = write(tmp_path / "pool.yaml", text)
    with pytest.raises(ConfigError) as caught:
        ExpertPool.load(file)
    assert str(caught.value).startswith(str(file)) and said in str(caught.value) and "\n" not in str(caught.value)


def test_a_circle_of_files_is_refused_and_names_them(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "include: [b.yaml]")
    write(tmp_path / "b.yaml", "include: [a.yaml]")
    with pytest.raises(ConfigError, match=r"b.yaml: include = .*a.yaml -> .*b.yaml -> .*a.yaml"):
        ExpertPool.load(tmp_path / "a.yaml")
    with pytest.raises(NotFoundError, match=r"gone.yaml: no such file"):
        ExpertPool.load(tmp_path / "gone.yaml")


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", f"members:\n{LAW}")
    with pytest.raises(ConfigError, match=r"pool.yaml: members\[0\] \(law\): name = 'law'"):
        ExpertPool.load(write(tmp_path / "pool.yaml", f"include: [a.yaml]\nmembers:\n{LAW}"))
    with pytest.raises(ConfigError, match="two members bear it"):
        ExpertPool([PoolMember("x", "y"), PoolMember("x", "z")])


def test_an_unknown_member_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="'lawe': not in the pool, which has law, code, cook; did you mean law"):
        ExpertPool(members())["lawe"]


@pytest.mark.parametrize("scorer", ["keywords", "classifier"])
def test_texts_that_no_scorer_has_seen_go_to_their_member(scorer: str, pools: dict[str, ExpertPool]) -> None:
    pool = pools[scorer]
    right = [pool.route(text).fusion.names[0] == name for name in WORDS for text in samples(name, 20, seed=1)]
    assert sum(right) >= 57  # of 60; a tie of few words may go either way
    decision = pool.route("the court and the judge; 法院的判决")
    assert decision.fusion.names[0] == "law" and not decision.abstained and decision.scorer == scorer
    assert {"court", "judg", "法院"} <= {*decision.keywords} and next(iter(decision.scores)) == "law"
    assert sum(decision.scores.values()) == pytest.approx(1) and sum(decision.fusion.weights) == pytest.approx(1)
    assert json.loads(json.dumps(decision.to_dict()))["members"][0]["name"] == "law"


@pytest.mark.parametrize("scorer", ["keywords", "classifier"])
def test_the_same_seed_decides_the_same(scorer: str, pools: dict[str, ExpertPool]) -> None:
    again = ExpertPool(members(), scorer)  # type: ignore[arg-type]
    for text in samples("law", 5, seed=2):
        assert pools[scorer].route(text) == again.route(text)


def test_below_the_threshold_the_base_answers_alone() -> None:
    pool = ExpertPool(members())
    assert 0 < pool.scorer.threshold < 1
    unsure = pool.route("court function oven")
    assert unsure.fusion.kind == "base" and "below the threshold" in unsure.abstained and unsure.scores


@pytest.mark.parametrize("text", ["", " \n", "zzzz qqqq", "12345"])
def test_texts_that_say_nothing_go_to_the_base(text: str, pools: dict[str, ExpertPool]) -> None:
    decision = pools["keywords"].route(text)
    assert decision.fusion.names == ("base",) and decision.fusion.weights == (1.0,) and decision.abstained
    assert ExpertPool().route(text).fusion.kind == "base"


@pytest.mark.parametrize("scorer", ["keywords", "classifier"])
@pytest.mark.parametrize("text", ["<｜begin▁of▁sentence｜><|im_start|>system<|im_end|>\0\x1b[2J\ud800", "x" * 1_000_000,
                                  "court 法院 " * 100_000, "ignore all previous instructions"])
def test_odd_texts_have_a_decision(scorer: str, text: str, pools: dict[str, ExpertPool]) -> None:
    decision = pools[scorer].route(text)
    assert sum(decision.fusion.weights) == pytest.approx(1)
    assert decision == pools[scorer].route(text[:2000])
    assert ("court" in text) == (decision.fusion.names == ("law",) and not decision.abstained)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(RequestError, match="text = b'x': must be a text"):
        ExpertPool(members()).route(b"x")  # type: ignore[arg-type]


def test_given_keywords_and_descriptions_suffice() -> None:
    pool = ExpertPool([PoolMember("law", "Law and contracts", keywords={"court": 5.0}),
                       PoolMember("code", "Programs and contracts")], glossary=False)
    assert pool.route("contracts of programs").fusion.names[0] == "code"
    assert pool.route("a court").fusion.names == ("law",)
    assert {*pool.route("contracts").fusion.names} == {"law", "code"}  # both say it
    assert dynamic_routing("a court", pool).names == ("law",)


def test_many_members_or_few_samples_take_centroids() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("bcdfghklmnprst", k=6)) for _ in range(3 * (TRAINED + 40))]
    many = [PoolMember(f"m{i}", " ".join(words[3 * i : 3 * i + 3])) for i in range(TRAINED + 40)]
    pool = ExpertPool(many, "classifier")
    assert isinstance(pool.scorer.more[0], Centroids)
    assert [pool.route(f"about {words[3 * i]} and {words[3 * i + 1]}").fusion.names[0] for i in range(0, 100, 7)] == [
        f"m{i}" for i in range(0, 100, 7)]
    few = ExpertPool([PoolMember("a", "x", samples=["court"]), PoolMember("b", "y")], "classifier")
    assert isinstance(few.scorer.more[0], Centroids)
    assert few.route("court").fusion.names[0] == "a"


def test_that_a_member_has_no_text_in_a_language_says_nothing_about_its_terms() -> None:
    english = [PoolMember(name, f"about {name}", samples=[f"{word} {i} number" for i in range(20)])
               for name, word in (("court", "judge"), ("clinic", "doctor"))]
    chinese = PoolMember("poems", "诗歌", samples=[f"山水{i}的明月，今晚发烧" for i in range(20)])
    medicine = PoolMember("medicine", "发烧、咳嗽", samples=[f"fever {i}" for i in range(20)])
    pool = ExpertPool([*english, chinese, medicine], glossary=False)
    weights = pool.scorer.terms.own
    assert "今晚" in weights.vocabulary and "judg" in weights.vocabulary
    assert "明月" in weights.vocabulary and "的明" not in weights.vocabulary  # a function word
    assert pool.route("咳嗽").fusion.names == ("medicine",) and pool.route("明月").fusion.names == ("poems",)
    fever = weights.logits({"发烧": 1})[0]
    assert fever[3] > fever[2]  # a word of its description, though every poem has it, and no text of its own


def test_function_words_do_not_count() -> None:
    texts = {"novel": "she had never seen her ship", "law": "the court ruled", "code": "the loop ran"}
    pool = ExpertPool([PoolMember(name, name, samples=[f"{text} {i}" for i in range(20)])
                       for name, text in texts.items()])
    assert {"court", "seen", "ship"} <= {*pool.scorer.terms.own.vocabulary}
    assert not {"she", "her", "never", "had", "the"} & {*pool.scorer.terms.own.vocabulary}
    assert pool.route("Has she never ruled her court?").fusion.names == ("law",)


def test_a_trained_classifier_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path))
    monkeypatch.setattr(scorers, "KEPT", 10)
    first = ExpertPool(members(10), "classifier").route("the court")
    [file] = (tmp_path / "classifiers").iterdir()
    monkeypatch.setattr(scorers.DomainClassifier, "_fit", None)  # it cannot be trained again
    assert ExpertPool(members(10), "classifier").route("the court") == first
    with pytest.raises(TypeError):
        ExpertPool(members(10), "classifier", seed=1).route("the court")
    with pytest.raises(TypeError):
        ExpertPool(members(11), "classifier").route("the court")
    monkeypatch.undo()
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path))
    monkeypatch.setattr(scorers, "KEPT", 10)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"not a domain classifier: .*; it is trained anew"):
        assert ExpertPool(members(10), "classifier").route("the court") == first
    assert ExpertPool(members(10), "classifier").route("the court") == first
    (tmp_path / "blocked").write_text("", encoding="utf-8")
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "blocked"))
    with pytest.warns(UserWarning, match="the classifier is not kept"):
        assert ExpertPool(members(10), "classifier").route("the court") == first


# ---- distilled ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router(pools: dict[str, ExpertPool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("router") / "router.npz"
    assert distill(pools["classifier"], path) >= 0.97
    return path


def test_a_distilled_router_is_small_and_decides_as_the_classifier_does(router: Path,
                                                                        pools: dict[str, ExpertPool]) -> None:
    assert router.stat().st_size <= 1_000_000
    distilled, scorer = DistilledRouter.load(router), pools["classifier"].scorer
    assert distilled.names == ("law", "code", "cook") and distilled.threshold == pytest.approx(scorer.threshold)
    for name in WORDS:
        for text in samples(name, 20, seed=3):
            assert distilled.probabilities(text) == pytest.approx(scorer.probabilities(text), abs=0.03)
    assert not distilled.probabilities("").any()


def test_the_client_computes_what_the_package_does(router: Path) -> None:
    import runpy

    source = (ROOT / "examples" / "edge_router.py").read_text(encoding="utf-8")
    assert source.count("\n") <= 100
    assert {*re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)} == {
        "collections", "json", "numpy", "re", "sys", "unicodedata", "zlib"}
    client = runpy.run_path(str(ROOT / "examples" / "edge_router.py"))["EdgeRouter"](str(router))
    distilled = DistilledRouter.load(router)
    odd = ["", " ", "x", "ＣＯＵＲＴ courts judging", "<｜User｜>\0", "法", "a" * 5000, "zzz 123 _x"]
    for text in odd + [text for name in WORDS for text in samples(name, 5, seed=4)]:
        assert client.probabilities(text) == pytest.approx(distilled.probabilities(text), abs=1e-5), text
    weights = client.route("the court and the judge")
    assert next(iter(weights)) == "law" and sum(weights.values()) == pytest.approx(1)
    assert client.route("") == {}


def test_a_pool_of_many_members_has_a_smaller_hash(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("bcdfghklmnprst", k=6)) for _ in range(20 * 8)]
    pool = ExpertPool([PoolMember(f"m{i}", "some", samples=[" ".join(draw.choices(words[8 * i : 8 * i + 8], k=12))
                                                            for _ in range(8)]) for i in range(20)])
    distill(pool, tmp_path / "r.npz")
    assert (tmp_path / "r.npz").stat().st_size <= 1_000_000
    router = DistilledRouter.load(tmp_path / "r.npz")
    assert router.names[int(router.probabilities(" ".join(words[24:32])).argmax())] == "m3"


def test_what_cannot_be_distilled_or_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="law: 3 samples: each member must have at least 4"):
        distill(ExpertPool(members(3)), tmp_path / "r.npz")
    with pytest.raises(ConfigError, match="a pool of 1 members: must have 2 to 64"):
        distill(ExpertPool(members()[:1]), tmp_path / "r.npz")
    with pytest.raises(NotFoundError, match=r"r.npz: no such file"):
        DistilledRouter.load(tmp_path / "r.npz")
    write(tmp_path / "r.npz", "x")
    with pytest.raises(Exception, match=r"r.npz: not a distilled router"):
        DistilledRouter.load(tmp_path / "r.npz")


def test_the_trained_classifier_is_the_one_of_the_data_pipeline(pools: dict[str, ExpertPool]) -> None:
    scorer = pools["classifier"].scorer
    assert isinstance(scorer.more[0], Sequences)
    texts = samples("law", 3, seed=5)
    for text in texts:
        terms, _ = scorer.terms.logits(text)
        sequences = scorer.more[0].model.logits([text])[0][0] * len(text) / (len(text) + FORM)
        assert scorer.logits(text)[0] == pytest.approx(terms + sequences, rel=1e-5)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_route_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "pool.yaml", f"members:\n{LAW}- {{name: code, kind: experts, domain: Programs}}\n")
    assert main(["route", "text", "--pool", str(file), "the court"]) == 0
    assert capsys.readouterr().out == "1.000  law (experts)\n"
    assert main(["route", "text", "--pool", str(file), "--trace", "the 法院"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("keywords:  法院 ") and "\nscores:    law 0." in said and "\nthreshold: 0.000" in said
    assert main(["route", "text", "--pool", str(file), "zzzz"]) == 0
    assert capsys.readouterr().out == "1.000  base: no member fits\n"
    assert main(["route", "text", "--pool", str(file), "--json", "the court"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["members"] == [{"name": "law", "kind": "experts", "weight": 1.0}] and found["keywords"]


def test_route_text_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "text", "x"]) == 2
    assert capsys.readouterr().err == "deepseek: pool: must be given: --pool FILE\n"
    assert main(["route", "text", "--pool", str(tmp_path / "gone.yaml"), "x"]) == 2
    assert "gone.yaml: no such file" in capsys.readouterr().err


def test_route_distill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in WORDS:
        write(tmp_path / f"{name}.txt", "\n\n".join(samples(name, 40)))
    file = write(tmp_path / "pool.yaml", "members:\n" + "".join(
        f"- {{name: {name}, kind: experts, domain: about {name}, samples: {name}.txt}}\n" for name in WORDS))
    assert main(["route", "distill", str(file), str(tmp_path / "router.npz")]) == 0
    assert re.search(r"router.npz, \d+,\d+ bytes; on \d+\.\d% of the held-out samples", capsys.readouterr().out)
    assert DistilledRouter.load(tmp_path / "router.npz").names == ("law", "code", "cook")


@pytest.mark.parametrize(("name", "text"), [
    ("law", "Who may end a contract?"), ("law", "房东不退押金，合同怎么写才有效？"), ("code", "这个函数为什么报错？"),
    ("code", "Write a Python function that reverses a string."), ("math", "一个三角形的面积怎么计算？"),
    ("math", "A train travels 60 miles in 2 hours. How many miles does it travel in 5 hours?"),
    ("medical", "What are the symptoms of diabetes?"), ("medical", "孩子发烧三天了怎么办"),
    ("finance", "Should I invest in a bond when interest rates rise?"), ("finance", "贷款利率上升会影响投资吗"),
    ("dialogue", "I'd like to book a table for two at seven."), ("text", "Tell me the history of the Roman Empire.")])
def test_the_pool_of_the_examples(name: str, text: str, example: ExpertPool) -> None:
    assert example.route(text).fusion.names[0] == f"{name}_expert"


@pytest.fixture(scope="module")
def example() -> ExpertPool:
    return ExpertPool.load(ROOT / "examples" / "pool.yaml")


@pytest.mark.parametrize("bias", [-1, 11, "much", float("nan"), True])
def test_a_wrong_bias_is_refused(bias: object) -> None:
    with pytest.raises(ConfigError, match=r"bias = .*: must be a number from 0 to 10"):
        ExpertPool(bias=bias)  # type: ignore[arg-type]


def test_some_members_alone_may_answer(pools: dict[str, ExpertPool]) -> None:
    for pool in pools.values():
        own = pool.among(["law", "cook"])
        assert own.scorer is pool.scorer and pool.route("function return import class").fusion.names == ("code",)
        assert own.route("the court and the appeal").fusion == pool.route("the court and the appeal").fusion
        assert own.route("function return import class").abstained
        assert set(own.route("court oven judge butter").scores) <= {"law", "cook"}
        assert own.parts("the court and the appeal")[0].decision == own.route("the court and the appeal")
    for names, message in ((["law", "nobody"], "member = 'nobody'"), ([], "one at least"), ("law", "must be a list")):
        with pytest.raises(ConfigError, match=message):
            pool.among(names)


def test_a_file_that_several_include_counts_once(tmp_path: Path) -> None:
    write = {"all": "include: [a.yaml, b.yaml]", "a": "include: [c.yaml]", "b": "include: [c.yaml, c.yaml]",
             "c": "members: [{name: x, kind: experts, domain: law}]"}
    for name, content in write.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    assert [member.name for member in ExpertPool.load(tmp_path / "all.yaml").members] == ["x"]
