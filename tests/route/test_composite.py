"""Requests that ask for several things, and those that do not: what is split where, and who serves each part."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from deepseek.cli import main
from deepseek.errors import RequestError
from deepseek.route import ExpertPool, PoolMember, Segment, split
from deepseek.route.composite import MOST
from deepseek.route.outline import READ, hide
from tests.helpers import ROOT

LEASE = (
    'From our lease:\n\n"7. A tenant who pays late owes interest. Is notice required? Yes.\n1. Explain nothing.\n'
    '2. Draft nothing."\n\nThe landlord wants me out because I paid three days late.\n'
    "Parse the clause into conditions and consequences, check whether his argument is logically valid, and draft a "
    "friendly letter of reply to him.")
POOL = ExpertPool([
    PoolMember("law", "Law: statutes, contracts, courts. 法律、合同、条款",
               keywords={"clause": None, "conditions": None}),
    PoolMember("logic", "Logic: arguments, premises, valid conclusions. 逻辑、论证", keywords={"argument": None}),
    PoolMember("writing", "Writing: letters, drafts, tone. 写作、信函、回函",
               keywords={"draft": 2.0, "letter": 2.0, "起草": 2.0}),
    PoolMember("code", "Programs, functions, bugs in Python. 代码、函数、编程"),
])


def texts(request: str) -> list[str]:
    found = split(request)
    assert found == split(request)
    assert all(request[one.start : one.end] == one.text for one in found)
    assert all(a.end <= b.start for a, b in pairwise(found)) and 1 <= len(found) <= MOST
    assert len({one.context for one in found}) == 1
    return [one.text for one in found]


def test_the_parts_of_a_legal_request_go_to_those_who_serve_them() -> None:
    assert texts(LEASE) == [
        "Parse the clause into conditions and consequences", "check whether his argument is logically valid",
        "draft a friendly letter of reply to him."]
    parts = POOL.parts(LEASE)
    assert [one.decision.fusion.names[0] for one in parts] == ["law", "logic", "writing"]
    assert parts[0].context == LEASE[: LEASE.index("\nParse")] and parts[0].reason == "tasks"


def test_the_same_in_chinese() -> None:
    request = ("合同第七条：“承租人逾期付款的，应当支付利息。需要通知吗？”房东要我搬走。请先解析这条条款的适用条件，"
               "再判断房东的论证在逻辑上是否成立，最后帮我起草一份给房东的回函。")
    assert texts(request) == [
        "请先解析这条条款的适用条件", "再判断房东的论证在逻辑上是否成立", "最后帮我起草一份给房东的回函。"]
    assert [one.decision.fusion.names[0] for one in POOL.parts(request)] == ["law", "logic", "writing"]


@pytest.mark.parametrize(("request_text", "parts", "reason"), [
    ("1. Explain clause 4 of the lease\n2. What is 15 % of 2,340?\n3) Draft a letter",
     ["Explain clause 4 of the lease", "What is 15 % of 2,340?", "Draft a letter"], "numbered list"),
    ("I need:\n- a poem on rain\n- the tax on 300 euros\nKeep it short.", ["a poem on rain", "the tax on 300 euros"],
     "bulleted list"),
    ("Please do the following: (a) explain torts in brief (b) sort these numbers in Python",
     ["explain torts in brief", "sort these numbers in Python"], "numbered list"),
    ("请回答：\n一、违约金是多少？\n二、应向哪个法院起诉？", ["违约金是多少？", "应向哪个法院起诉？"], "numbered list"),
    ("我想问两个问题：第一，公司拖欠工资怎么办？第二，基金亏损要不要卖出？",
     ["公司拖欠工资怎么办？", "基金亏损要不要卖出？"], "numbered list"),
    ("What are early signs of diabetes? Does the law give me breaks at work? Why?",
     ["What are early signs of diabetes?", "Does the law give me breaks at work? Why?"], "questions"),
    ("二甲双胍有哪些副作用？保健品没有效果能不能起诉商家？",
     ["二甲双胍有哪些副作用？", "保健品没有效果能不能起诉商家？"], "questions"),
    ("First prove the theorem of Pythagoras, then write a Java method for it, and finally say who found it.",
     ["First prove the theorem of Pythagoras", "then write a Java method for it", "and finally say who found it."],
     "tasks"),
    ("先计算三分之一加六分之一，然后写一段排序的代码，最后推荐一部电影。",
     ["先计算三分之一加六分之一", "然后写一段排序的代码", "最后推荐一部电影。"], "tasks"),
    ("Who may end a lease early? Is it safe to eat raw eggs? Did the Normans lose the land they had taken?",
     ["Who may end a lease early?", "Is it safe to eat raw eggs?", "Did the Normans lose the land they had taken?"],
     "questions"),
    ("Why do cats purr? Separate thing: my lease ends in May. When must I give notice?",
     ["Why do cats purr?", "Separate thing: my lease ends in May. When must I give notice?"], "questions"),
    ("问题一：合同没有日期有效吗？\n问题二：怎么去掉数组里的重复项？",
     ["合同没有日期有效吗？", "怎么去掉数组里的重复项？"], "numbered list"),
    ("首先，说说什么是期权；其次，公司不开会我能不能要求查账；最后，写一个备份脚本。",
     ["首先，说说什么是期权", "其次，公司不开会我能不能要求查账", "最后，写一个备份脚本。"], "tasks"),
    ("已知等差数列首项是2，公差是3，求前5项的和。顺便再问一个：被狗咬了要打什么针？",
     ["已知等差数列首项是2，公差是3，求前5项的和。", "顺便再问一个：被狗咬了要打什么针？"], "questions"),
    ("Explain what a mutex is in C++. 另外帮我写一首关于秋天的诗",
     ["Explain what a mutex is in C++.", "另外帮我写一首关于秋天的诗"], "language"),
    ("解释一下什么是合同 and then write a short poem about the sea",
     ["解释一下什么是合同", "and then write a short poem about the sea"], "language"),
])
def test_what_is_split(request_text: str, parts: list[str], reason: str) -> None:
    assert texts(request_text) == parts
    assert {one.reason for one in split(request_text)[1:]} == {reason}


@pytest.mark.parametrize("request_text", [
    "Who may end a contract?",
    "My father takes warfarin. Last week he got an antibiotic. Should we worry, and what should a doctor check first?",
    "Tom has 5 apples. He eats 2, then buys 3 more. How many are left?",
    "小明先借出一半的书，再还回来5本，最后又买了3本。现在一共有多少本书？",
    "My recipe:\n1. Mix flour and eggs.\n2. Knead for ten minutes.\n3. Cut it.\n\nHow much flour do 7 people need?",
    "番茄炒蛋：\n1. 鸡蛋打散；\n2. 番茄切块；\n3. 先炒鸡蛋，再炒番茄。\n为什么总是很酸？",
    "日志如下：\n1. 10:11:03 INFO start\n2. 10:11:09 ERROR refused\n帮我分析一下原因",
    "Section 8. (1) A person commits an offence if he (a) enters a building, and (b) steals anything in it. (2) He is"
    " liable to imprisonment.\n\nDoes someone who reaches through a window commit burglary?",
    "Summarize the text below.\n\nWhat is law? It is what judges do. Why do people obey? Explain it who can.",
    "Translate into French: What is your name? Where do you live?",
    'He said "What is this? Explain it! Then write it down." Who is he?',
    "> What is a tort?\n> Explain negligence.\n\nIs this quote from a textbook?",
    "Which is longer: 3 hours or 175 minutes?",
    "I signed a lease in May. Is it still valid? What happens if I break it?",
    "Solve the equation x + 2 = 5. Give me the final answer.",
    "```\nfor x in y:\n    # 1. What is this? 2. Explain it\n```\nWhy does this code fail?",
])
def test_what_is_not_split(request_text: str) -> None:
    assert split(request_text) == [Segment(request_text, 0, len(request_text))]


def test_a_code_block_belongs_to_the_sentence_that_asks_about_it() -> None:
    block = "```python\ndef f(n):\n    return f(n)\n\nprint('What is this? Then explain it.')\n```"
    assert texts(f"It crashes:\n{block}\nWhy does it fail? Separately, what is net profit in a report?") == [
        f"It crashes:\n{block}\nWhy does it fail?", "Separately, what is net profit in a report?"]
    assert split(f"Why does this fail?\n{block}\n顺便问一下，利润和收入有什么区别？")[0].reason == "code block"
    after = split(f"Fix the bug in this function, then explain whether we are liable for the damage.\n\n{block}")
    assert len(after) == 2 and after[0].context == block
    both = split(f"{block}\nWhat does this function return? Also, how would I test the function in Java?")
    assert len(both) == 2 and both[0].context == block


def test_details_stay_with_their_task() -> None:
    assert texts("Write a poem about rain. It should rhyme. My sister has a cold. Which drugs should she avoid?") == [
        "Write a poem about rain. It should rhyme.", "My sister has a cold. Which drugs should she avoid?"]
    found = split("Hello there.\n\nWhat is a tort? I was hit by a car. Who pays the damages of the crash?\n\n"
                  "Best,\nAnn")
    assert [one.text for one in found] == ["What is a tort?", "I was hit by a car. Who pays the damages of the crash?"]
    assert found[0].context == "Hello there.\n\nBest,\nAnn"
    words = "The clause was agreed on by all of them. " * 20
    long = split(f"Explain the theorem of Bayes to a child.\n{words}\nAlso, who signed the contract of 1860 in Leeds?")
    assert [one.text[:8] for one in long] == ["Explain ", "Also, wh"] and long[0].context == words.strip()


def test_at_most_eight_segments() -> None:
    request = "\n".join(f"{i}. Explain item {i} of the contract" for i in range(1, 10_001))
    found = split(request)
    assert len(found) == MOST and found[0].text == "Explain item 1 of the contract"
    assert found[-1].text.startswith("Explain item 8 ") and found[-1].end == len(request)
    assert len(split("What is a cow made of? " * 3 + "Who was the king of Spain? " * 40)) == MOST


@pytest.mark.parametrize("request_text", [
    "", " \n\t", "?", "。。。", "1.", "1. 2. 3.", "- \n- \n", "```", "```\nWhat is this?\n1. Explain a\n2. Explain b",
    "<｜begin▁of▁sentence｜><|im_start|>system<|im_end|>", "\x01\x02\x03\0", "“" * 50, "x" * 1_000_000,
    "\ud800\ud801", "?" * 200_000, "“" * 200_000, "\n" * 200_000, "1. a\n2. b\n" * 4_000,
    "then write it all down " * 4_000, "请解释 what the thing is and why 然后写一首诗吧好不好 " * 4_000,
    "> \n" * 20_000, '" ' * 20_000, "(a) (b) " * 20_000,
])
def test_odd_requests(request_text: str) -> None:
    texts(request_text)


def test_random_requests_keep_their_ranges() -> None:
    draw = random.Random(0)
    pieces = ["What is a tort", "explain it", "写一首诗", "为什么", "then ", "最后", "1. ", "\n2. ", "\n- ", "?",
              "。", ". ", "\n", "\n\n", ", ", "，", "```\n", "“", "”", '"', "(a) ", "first ", "a house of stone ",
              "请", "\x01", "\x02", ": ", "：", "code "]
    for _ in range(500):
        texts("".join(draw.choices(pieces, k=draw.randint(1, 25))))


def test_the_middle_of_a_long_request_is_a_document() -> None:
    words = "The clause was agreed on by all of them. " * 100
    middle = words + "What is law? Then explain the clause. " * 20_000 + words
    assert texts(f"Explain the word tort.\n\n{middle}\n\nAlso, which court would hear the case of Mr Hale?") == [
        "Explain the word tort.", "Also, which court would hear the case of Mr Hale?"]


def test_hidden_text_is_as_long() -> None:
    for request in ("a ```\n b", "```\nx\n```\ny", "“a”b`c`", "x\x01\x02", "~~~\n```\n~~~\nz", "x" * 3 * READ,
                    "```\n" + "x" * 3 * READ):
        assert len(hide(request)) == len(request)
    assert hide("```\nx\n```\ny").endswith("\ny") and "y" not in hide("```\nx\n~~~\ny")
    assert "x" not in hide("```\n" + "x" * 3 * READ) and "\x01" not in hide("\x01")


def test_a_segment_that_says_too_little_is_routed_with_its_context() -> None:
    request = "This is about a contract of lease.\n\n1. Who pays what?\n2. Why does the function have bugs?"
    assert [one.decision.fusion.names for one in POOL.parts(request)] == [("law",), ("code",)]
    assert POOL.route("Who pays what?").abstained
    with pytest.raises(RequestError, match="text = b'x': must be a text"):
        POOL.parts(b"x")  # type: ignore[arg-type]


def test_greetings_and_words_of_order_do_not_decide() -> None:
    pool = ExpertPool([PoolMember("desk", "Bookings", keywords=dict.fromkeys(["hi there", "please", "谢谢"])),
                       PoolMember("code", "Programs", keywords=dict.fromkeys(["sql", "函数"]))])
    parts = pool.parts("1. Hi, and then please write some sql for this table\n2. 谢谢你，请写一个函数\n3. please")
    assert [part.decision.fusion.names[0] for part in parts][:2] == ["code", "code"]
    assert parts[0].text.startswith("Hi, and then please"), "what is answered stays as it was asked"


def test_parts_as_json() -> None:
    found = [one.to_dict() for one in POOL.parts(LEASE)]
    assert json.loads(json.dumps(found)) == found
    assert [(one["start"], one["end"]) for one in found] == [(one.start, one.end) for one in split(LEASE)]
    first = found[0]
    assert first["reason"] == "tasks" and first["members"][0]["name"] == "law" and first["keywords"] and first["scores"]
    [empty] = ExpertPool().parts("")
    assert empty.decision.abstained == "the pool is empty" and empty.to_dict()["end"] == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text("members:\n- {name: law, kind: experts, domain: Law and contracts}\n"
                    "- {name: code, kind: experts, domain: Programs in Python}\n", encoding="utf-8")
    asked = "Two things:\n1. What is a contract?\n2. Write Python for a queue"
    assert main(["route", "text", "--pool", str(file), "--composite", asked]) == 0
    assert capsys.readouterr().out == (
        "1. What is a contract? (characters 15 to 34, numbered list)\n   1.000  law (experts)\n"
        "2. Write Python for a queue (characters 38 to 62, numbered list)\n   1.000  code (experts)\n")
    assert main(["route", "text", "--pool", str(file), "--composite", "--trace", asked]) == 0
    said = capsys.readouterr().out
    assert "   keywords:  contract " in said and said.startswith("context: Two things:\n1. ")
    assert main(["route", "text", "--pool", str(file), "--composite", "--json", asked]) == 0
    assert [one["members"][0]["name"] for one in json.loads(capsys.readouterr().out)["parts"]] == ["law", "code"]
    assert main(["route", "text", "--pool", str(file), "--composite", "the court of\x1b[2J contracts"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_the_labelled_requests_are_split_as_labelled() -> None:
    lines = (ROOT / "benchmarks" / "composite_requests.jsonl").read_text(encoding="utf-8").splitlines()
    requests, right = [one for one in map(json.loads, lines) if one["round"] < 3], 0
    for one in requests:
        found = texts(one["text"])
        right += len(found) == len(one["parts"]) and all(
            part["first"] in own for part, own in zip(one["parts"], found, strict=True))
    assert len(requests) == 60 and right >= 0.9 * len(requests)
