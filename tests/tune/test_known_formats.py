"""Records of all known formats: what is learnt of each, decoded; what is refused, by key and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.data import Document, ReadReport, RecordMap
from deepseek.data.records import to_documents, to_table
from deepseek.errors import ConfigError, DataError
from deepseek.tokenizer import EOS
from deepseek.tune.records import RecordSet, encode, read_records
from deepseek.tune.show import pieces
from tests.helpers.chat_templates import CHATML, R1, V3, V31, with_template

E = EOS
TOOL = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
CALLED = ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{"zone": "UTC"}<｜tool▁call▁end｜>'
          f"<｜tool▁calls▁end｜>{E}")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# name, record, template, what is learnt, what is in the prompt
KNOWN: list[tuple[str, Any, str, list[str], list[str]]] = [
    ("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"}, V3, [f"2{E}"], ["<｜User｜>Add.\n1 1"]),
    ("alpaca with system and history",
     {"instruction": "And 2?", "input": "", "output": "4", "system": "Be brief.", "history": [["1 1?", "2"]]},
     V3, [f"2{E}", f"4{E}"], ["Be brief.<｜User｜>1 1?", "<｜User｜>And 2?"]),
    ("alpaca with system alone", {"instruction": "Add.", "output": "2", "system": "Be brief.", "history": []}, V3,
     [f"2{E}"], ["Be brief.<｜User｜>Add."]),
    ("OpenOrca", {"id": "x", "system_prompt": "Be brief.", "question": "1 1?", "response": "2"}, CHATML,
     ["2<|im_end|>\n"], ["system\nBe brief.<|im_end|>"]),
    ("ShareGPT", {"conversations": [{"from": "human", "value": "1 1?"}, {"from": "gpt", "value": "2"}],
                  "system": "Be brief."}, V3, [f"2{E}"], ["Be brief.<｜User｜>1 1?"]),
    ("ShareGPT with tools", {
        "conversations": [{"from": "human", "value": "now?"},
                          {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
                          {"from": "observation", "value": "12:00"}, {"from": "gpt", "value": "Noon."}],
        "tools": json.dumps([TOOL["function"]])}, V31, [CALLED, f"Noon.{E}"], ['{"name": "clock"', "12:00"]),
    ("OpenAI, weights", {"messages": [user("1 1?"), says("3", weight=0), user("no"), says("2", weight=1)]}, V3,
     [f"2{E}"], [f"3{E}<｜User｜>no"]),
    ("OpenAI, tools", {"messages": [user("now?"), says(None, tool_calls=[CALL]),
                                    {"role": "tool", "tool_call_id": "c1", "content": "12:00"}, says("Noon.")],
                       "tools": [TOOL], "parallel_tool_calls": False}, V31, [CALLED, f"Noon.{E}"],
     ['{"name": "clock"', "12:00"]),
    ("OpenAI, functions", {"messages": [user("now?"), says(None, function_call=CALL["function"]),
                                        {"role": "function", "name": "clock", "content": "12:00"}, says("Noon.")],
                           "functions": [TOOL["function"]]}, V31, [CALLED, f"Noon.{E}"], ['{"name": "clock"']),
    ("axolotl, train", {"conversations": [{"from": "human", "value": "1 1?"}, {"from": "gpt", "value": "3",
                                                                               "train": False},
                                          {"from": "human", "value": "no"}, {"from": "gpt", "value": "2"}]}, V3,
     [f"2{E}"], [f"3{E}<｜User｜>no"]),
    ("TRL, texts", {"prompt": "1 1?", "completion": "2"}, V3, [f"2{E}"], ["<｜User｜>1 1?"]),
    ("TRL, messages", {"prompt": [user("a"), says("b"), user("1 1?")], "completion": [says("2")], "tools": [TOOL]}, V3,
     [f"2{E}"], [f"b{E}", '{"name": "clock"']),
    ("TRL, a message", {"prompt": user("1 1?"), "completion": says("2")}, V3, [f"2{E}"], ["<｜User｜>1 1?"]),
    ("TRL, variables", {"messages": [user("1 1?"), says("2", reasoning_content="Hm.")],
                        "chat_template_kwargs": {"thinking": True, "style": None}}, V31, [f"Hm.</think>2{E}"],
     ["<｜Assistant｜><think>"]),
    ("thought in the content, V3", {"messages": [user("1 1?"), says("<think>\nHm.\n</think>\n\n2")]}, V3,
     [f"<think>\nHm.\n</think>\n\n2{E}"], []),
    ("thought in the content, R1", {"messages": [user("1 1?"), says("<think>\nHm.\n</think>\n\n2")]}, R1,
     [f"Hm.\n</think>\n\n2{E}"], ["<｜Assistant｜><think>\n"]),
    ("thought in the content, V3.1", {"messages": [user("1 1?"), says("<think>Hm.</think>2")]}, V31,
     [f"Hm.</think>2{E}"], ["<｜Assistant｜><think>"]),
    ("reasoning_content, V3", {"messages": [user("1 1?"), says("2", reasoning_content="Hm.")]}, V3,
     [f"<think>\nHm.\n</think>\n\n2{E}"], []),
    ("reasoning_content, R1", {"messages": [user("1 1?"), says("2", reasoning_content="Hm.")]}, R1,
     [f"Hm.\n</think>\n\n2{E}"], ["<｜Assistant｜><think>\n"]),
    ("reasoning_content, V3.1", {"messages": [user("1 1?"), says("2", reasoning_content="Hm.")]}, V31,
     [f"Hm.</think>2{E}"], ["<｜Assistant｜><think>"]),
    ("answers with thoughts", {"prompt": "1 1?", "completion": "<think>\nHm.\n</think>\n\n2"}, R1,
     [f"Hm.\n</think>\n\n2{E}"], ["<｜Assistant｜><think>\n"]),
    ("medical-o1", {"Question": "1 1?", "Complex_CoT": "Hm.", "Response": "2"}, R1, [f"Hm.\n</think>\n\n2{E}"], []),
    ("Nemotron", {"input": [user("1 1?")], "output": "2", "reasoning": "off", "system_prompt": "thinking off"}, V3,
     [f"2{E}"], ["thinking off<｜User｜>1 1?"]),
    ("choices of ARC", {"question": "1 1?", "choices": {"text": ["3", "2"], "label": ["A", "B"]}, "answer": 1}, V3,
     [f"B{E}"], ["A. 3\nB. 2"]),
    ("thoughts by other names", {"messages": [{**user("1 1?"), "from": "human"}, says("2", thought="Hm.")]}, V31,
     [f"Hm.</think>2{E}"], []),
    ("a table", {"messages": json.dumps([user("1 1?"), says("2")]), "id": "7"}, V3, [f"2{E}"], ["<｜User｜>1 1?"]),
    ("alpaca in a table", {"instruction": "And 2?", "output": "4", "history": '[["1 1?", "2"]]', "system": "", "tools":
                           "[]"}, V3, [f"2{E}", f"4{E}"], ["<｜User｜>1 1?"]),
    ("lines", {"instruction": "Add.", "output": ["2"]}, V3, [f"2{E}"], []),
    ("a text", {"text": "Once"}, V3, [f"Once{E}"], []),
]


@pytest.mark.parametrize(("record", "template", "want", "before"), [row[1:] for row in KNOWN],
                         ids=[row[0] for row in KNOWN])
def test_what_is_learnt_of_known_formats(record: Any, template: str, want: list[str], before: list[str]) -> None:
    tokenizer = with_template(template)
    [document] = read_records([record])
    [again] = to_documents(to_table([document]))
    examples = encode(document, tokenizer, 9999)
    assert encode(again, tokenizer, 9999) == examples
    parts = [part for example in examples for part in pieces(example, tokenizer)]
    assert [text for is_learnt, text in parts if is_learnt] == want
    asked = "".join(text for is_learnt, text in parts if not is_learnt)
    assert all(text in asked for text in before)
    if "chat_template_kwargs" in record:
        return
    bare = [part for example in encode(document, with_template(None), 9999)
            for part in pieces(example, with_template(None))]
    said = "".join(text for is_learnt, text in bare if is_learnt)
    assert all(word in said for text in want for word in ("Hm.", "clock", "UTC", "Noon.", "Once") if word in text)
    assert "3" not in said


def test_tables_of_records_that_an_earlier_version_wrote() -> None:
    calls = json.dumps({"content": "I look.", "tool_calls": [CALL]})
    old = Document("", "x", turns=(("tools", json.dumps([TOOL])), ("user", "now?"), ("function_call", calls),
                                   ("tool", "12:00"), ("assistant", "Noon.")))
    tokenizer = with_template(V31)
    [example] = encode(old, tokenizer, 9999)
    assert [text for is_learnt, text in pieces(example, tokenizer) if is_learnt] == ["I look." + CALLED, f"Noon.{E}"]


TALK = [user("1 1?"), says("2")]


@pytest.mark.parametrize(("record", "rule"), [
    ({"text": "Once", "question": "1 1?", "answer": "2"}, "two readings, text alone or with question, answer"),
    ({"text": "Once", "output": "2"}, "two readings, text alone or with output: say with a map"),
    ({"text": "Once", "summary": "2"}, "two readings, text alone or with summary"),
    ({"text": "Once", "label": 0}, "two readings, text alone or with label"),
    ({"text": "Once", "label": True}, "two readings, text alone or with label"),
    ({"text": "Once", "messages": TALK}, "two readings, text alone or with messages"),
    ({"text": "Once", "system": "Be brief."}, "two readings, text alone or with system"),
    ({"text": "Once", "tools": [TOOL]}, "two readings, text alone or with tools"),
    ({"text": "Once", "reasoning": "Hm."}, "two readings, text alone or with reasoning"),
    ({"messages": TALK, "conversations": TALK}, "two readings, messages alone or with conversations"),
    ({"messages": TALK, "question": "3 3?", "answer": "6"}, "two readings, messages alone or with question, answer"),
    ({"messages": TALK[:1], "answer": "1"}, "two readings, messages alone or with answer"),
    ({"messages": TALK, "history": [["a", "b"]]}, "two readings, messages alone or with history"),
    ({"messages": TALK, "reasoning_content": "Hm."}, "two readings, messages alone or with reasoning_content"),
    ({"question": "q", "answer": "a", "reasoning": "x", "cot": "y"}, "two readings.*with cot"),
    ({"messages": [{"role": "system", "content": "a"}, *TALK], "system": "b"}, "two system messages"),
    ({"system": "a", "system_prompt": "b", "messages": TALK}, "system, system_prompt: two system prompts"),
    ({"messages": TALK, "system": {"a": 1}}, "system = {'a': 1}: must be a text"),
    ({"question": "q", "answer": "a", "history": "earlier"}, "history: 'earlier': must be a list of pairs"),
    ({"question": "q", "answer": "a", "history": [["b"]]}, r"history: \['b'\]: must be a list of pairs"),
    ({"question": "q", "answer": "a", "tools": "clock"}, "tools = 'clock': not JSON"),
    ({"messages": TALK, "chat_template_kwargs": [1]}, r"chat_template_kwargs = \[1\]: must be an object"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen, rejected: preferences.*prompt: prompt, answer: chosen"),
    ({"messages": TALK, "chosen": TALK, "rejected": TALK}, "chosen, rejected: preferences"),
    ({"prompt": "q", "completion": "a", "label": False}, "label = False: a judgement"),
    ({"conversations": TALK, "kto_tag": True}, "kto_tag = True: a judgement"),
    ({"messages": TALK, "images": ["a.png"]}, "images: this model reads nothing but text"),
    ({"messages": TALK, "mask": "User"}, "mask: has no meaning here"),
    ({"question": "q", "answer": "a", "weight": 0.5}, "weight = 0.5: must be 0 or 1: a token counts fully "
     "in the loss or not at all, so a share cannot be honoured"),
    ({"question": "q", "answer": "a", "weight": "0.25"}, "weight = '0.25': must be 0 or 1"),
    ({"question": "q", "answer": "a", "train": "later"}, "train = 'later': must be 0 or 1"),
    ({"messages": [user("q"), says("a", weight=0.3)]}, "turn 2: weight = 0.3: must be 0 or 1: a token counts fully "
     "in the loss or not at all, so a share cannot be honoured"),
    ({"messages": [user("q"), says("a", weight=1, train=False)]}, "turn 2: its flags contradict each other"),
    ({"messages": [{**user("q"), "train": True}, says("a")]}, "turn 1 is to be learnt, and of a user nothing is"),
    ({"messages": [user("q"), says("a", train_detail=[{}])]}, "turn 2: train_detail: a turn is learnt whole"),
    ({"messages": [{**user("q"), "reasoning": "Hm."}, says("a")]}, "turn 1 has reasoning, and only an assistant's may"),
    ({"messages": [user("q"), says("a", reasoning={"effort": 1})]}, "turn 2: reasoning: must be one text"),
    ({"messages": [user("q"), says("a", reasoning="b", reasoning_content="c")]}, "turn 2: reasoning_content, reas"),
    ({"messages": [user("q"), says("a", weight=0)]}, "no turn of an assistant that its flags"),
    ({"messages": [user("q"), says([{"type": "image_url"}])]}, "turn 2 has no text or call .* 'image_url'"),
    ({"messages": [user("q"), says("a", value="b")]}, "turn 2 has content and value; one of them would be lost"),
    ({"messages": [user("q"), says("a", **{"from": "human"})]}, "turn 2 has role and from; one of them"),
    ({"messages": [user("q"), says("a", refusal="b")]}, "turn 2 has content and refusal; one of them would be lost"),
    ({"messages": [user("q"), says(None, tool_calls=[CALL], function_call={"name": "f"})]}, "tool_calls and function"),
    ({"messages": [user("q"), says("a", reasoning_details=[{"text": "b"}])]}, "turn 2: reasoning_details: reas"),
    ({"instruction": "q", "output": ["good", "bad"]}, "output: 2 texts, and one answer is learnt"),
    ({"Text": "a", "text": "b"}, "two of its keys differ in case alone"),
    ({"question": "q", "choices": [{"a": 1}], "answer": 0}, "choices = .*: must be a list of texts"),
    ({"questions": [{"question": "q"}], "paragraphs": True, "table": 3, "label": False}, "label = False: a judgement"),
    ({"questions": [{"x": "q"}], "paragraphs": True, "table": 3}, "the text is empty"),
    ({"instruction": "q", "instances": ["a"]}, "instances: must be a list of objects"),
])
def test_what_is_refused_names_key_and_line(record: Any, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{rule}"):
        RecordSet.of(read_records(path), with_template(V3), max_length=999)


@pytest.mark.parametrize(("record", "key"), [
    ('{"question": "q", "answer": NaN}', "answer = nan"), ('{"text": "t", "id": Infinity}', "id = inf"),
    ('{"text": "t", "metadata": {"a": [1, -Infinity]}}', r"metadata.a\[1\] = -inf"),
    ('{"question": "q", "answer": 1e999}', "answer = inf"),
    ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": NaN}}]}]}',
     r"messages\[0\].tool_calls\[0\].arguments.x = nan"),
    ('["hi", NaN]', r"\[1\] = nan"), ("NaN", "must be an object")])
def test_numbers_that_json_does_not_have(record: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + record + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{key}"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(f'[{{"text": "good"}}, {record}]')
    with pytest.raises(DataError, match=rf"a\.json:2: .*{key}"):
        read_records(tmp_path / "a.json")
    with pytest.raises(DataError, match=f"record 1: .*{key}"):
        read_records([json.loads(record)])


def test_keys_that_are_not_used_are_counted() -> None:
    report = ReadReport(strict=True)
    read_records([
        {"text": "a", "id": 1, "url": "u", "title": None, "tags": []}, {"text": "a", "id": 2, "lang": "en"},
        {"messages": [{"from": "human", "value": "q", "time": 3}, says("a", prefix=True)], "prompt": "q"},
        {"question": "q", "answer": "a", "correct": True, "metadata": {"x": 1}, "expert": "e"},
        {"question": "q", "answer": "a", "weight": 0}, {"text": "a", "train": "false"}], report)
    assert report.unused == {"id": 2, "url": 1, "messages[].time": 1, "messages[].prefix": 1, "prompt": 1, "correct": 1}
    assert report.skipped == {"records that ask not to be learnt": 2}
    assert report.notes()[0].startswith("keys of records that were not used: id (2), ")


@pytest.mark.parametrize(("mapping", "record", "want"), [
    ({"prompt": "text", "answer": "summary"}, {"text": "Once", "summary": "2"}, [f"2{E}"]),
    ({"text": "text"}, {"text": "Once", "label": 3, "x": float("nan")}, [f"Once{E}"]),
    ({"prompt": "prompt", "answer": "chosen"}, {"prompt": "q", "chosen": "2", "rejected": "3"}, [f"2{E}"]),
    ({"prompt": "prompt", "answer": "chosen"}, {"prompt": [user("q")], "chosen": [says("2")], "rejected": "3"},
     [f"2{E}"]),
    ({"prompt": "talk", "answer": "chosen"}, {"talk": [{"from": "human", "value": "q"}],
                                              "chosen": {"from": "gpt", "value": "2"}}, [f"2{E}"]),
    ({"prompt": "q", "answer": "output"}, {"q": "q", "output": ["1", "2"]}, [f"1\n2{E}"]),
    ({"messages": "chosen"}, {"chosen": TALK, "rejected": TALK}, [f"2{E}"]),
    ({"messages": "log", "tools": "can", "system": "role", "chat_template_kwargs": "how"},
     {"log": json.dumps(TALK), "can": [TOOL], "role": "Be brief.", "how": '{"thinking": false}'}, [f"2{E}"]),
    ({"prompt": "q", "answer": "a", "history": "past", "reasoning": ["cot", "more"]},
     {"q": "q", "a": "2", "past": [["x", "1"]], "cot": "Hm.", "more": "So."}, [f"1{E}", f"Hm.\nSo.</think>2{E}"]),
])
def test_a_map_decides(mapping: Any, record: Any, want: list[str]) -> None:
    tokenizer = with_template(V31)
    report = ReadReport(strict=True)
    [document] = read_records([record], report, RecordMap.from_dict(mapping))
    assert [text for example in encode(document, tokenizer, 9999) for is_learnt, text in pieces(example, tokenizer)
            if is_learnt] == want
    assert set(report.unused) == set(record) - {column for columns in mapping.values() for column in (
        columns if isinstance(columns, list) else [columns])}
    if "tools" in mapping:
        whole = tokenizer.decode(encode(document, tokenizer, 9999)[0].ids, skip_special=False)
        assert '{"name": "clock"' in whole and "Be brief." in whole


def test_arrays_and_numbers_of_numpy_are_values() -> None:
    turns = np.array([np.array([]), *TALK], dtype=object)[1:]
    rows = [{"messages": turns}, {"messages": tuple(TALK)}, {"question": "1 1?", "answer": np.int64(2)},
            {"question": "1 1?", "answer": np.float32(2)}]
    want = read_records([{"messages": TALK}])[0].turns
    first, second, *others = read_records(rows)
    assert first.turns == second.turns == want
    assert [document.text for document in others] == ["1 1?\n2", "1 1?\n2.0"]
    with pytest.raises(DataError, match="record 1: answer = nan"):
        read_records([{"question": "1 1?", "answer": np.float32("nan")}])
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(DataError, match="record 1: is nested too deeply"):
        read_records([{"text": "a", "x": deep}])


def test_maps_that_are_refused() -> None:
    for keys, rule in (({"text": "a", "tools": "b"}, "map: tools: has no place beside text"),
                       ({"messages": "a", "history": "b"}, "map: history: has no place beside messages"),
                       ({"messages": "a", "tools": ["b", "c"]}, "map: tools = .*: must be a column")):
        with pytest.raises(ConfigError, match=rule):
            RecordMap.from_dict(keys)
    mapping = RecordMap.from_dict({"prompt": "q", "answer": "a"})
    for record, rule in (({"q": "q", "a": float("inf")}, "a = inf"), ({"q": "q"}, "there is no column 'a'"),
                         ({"q": "q", "a": ""}, "no text under a")):
        with pytest.raises(DataError, match=f"record 1: {rule}"):
            read_records([record], mapping=mapping)
    with pytest.raises(DataError, match="column 'a' is a conversation: map it as messages"):
        read_records([{"a": TALK}], mapping=RecordMap.from_dict({"text": "a"}))


def test_variables_that_the_template_does_not_read_are_refused() -> None:
    record = {"messages": TALK, "chat_template_kwargs": {"thinkin": True}}
    for template in (V31, None):
        with pytest.raises(DataError, match="records:1: chat_template_kwargs"):
            [encode(document, with_template(template), 999) for document in read_records([record])]
