"""Reasoning, content and tool calls come apart the same way however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.serve.output_parser import CALLS, OutputParser, forced_schema
from deepseek.serve.protocol import Function, NamedTool, Tool

TOOLS = [Tool(type="function", function=Function(name=name)) for name in ("weather", "time_of")]
V3 = ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Köln\"}\n```<｜tool▁call▁end｜>\n"
      "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time_of\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>")
V31 = "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Köln\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


def run(pieces: list[str], **how: Any) -> tuple[OutputParser, dict[str, str]]:
    text, told = OutputParser(**({"thinking": False} | how)), {"content": "", "reasoning_content": ""}
    for delta in [*(text.push(piece) for piece in pieces), text.flush()]:
        for key in told:
            told[key] += delta.get(key, "")
    return text, told


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 1000), max_size=40), st.sampled_from([V3, V31]), st.booleans(), st.booleans())
def test_any_cut_gives_the_same(places: list[int], calls: str, opened: bool, thinks: bool) -> None:
    whole = ("" if opened else "<think>") + "hm, <th" + "</think>" if thinks else ""
    whole += "It is <｜tool not yet. " + CALLS + calls
    text, told = run(cut(whole, places), thinking=opened and thinks, tools=TOOLS)
    assert told == {"content": "It is <｜tool not yet. ", "reasoning_content": "hm, <th" if thinks else ""}
    assert text.answer.content == told["content"] and text.answer.reasoning == told["reasoning_content"]
    names = [call["function"]["name"] for call in text.answer.calls]
    assert names == (["weather", "time_of"] if calls == V3 else ["weather"]) and text.answer.valid
    assert text.answer.calls[0]["function"]["arguments"] == '{"city": "Köln"}'


@given(st.text(alphabet="<think>/｜tol▁ab", max_size=40), st.lists(st.integers(0, 100), max_size=10))
def test_nothing_is_lost(text: str, places: list[int]) -> None:
    """What is no marker comes through."""
    _, told = run(cut(text, places), tools=TOOLS)
    joined = text if not text.startswith("<think>") else text.removeprefix("<think>").replace("</think>", "", 1)
    assert told["reasoning_content"] + told["content"] == joined


def test_without_tools_a_marker_is_text() -> None:
    assert run([CALLS + V31])[1]["content"] == CALLS + V31


def test_one_call_alone() -> None:
    text, _ = run([CALLS + V3], tools=TOOLS, parallel=False)
    assert [call["function"]["name"] for call in text.answer.calls] == ["weather"]


def test_what_is_wrong_with_a_call_is_known() -> None:
    for calls in (V31.replace("weather", "nonsense"), V31.replace("}", "")):
        assert not run([CALLS + calls], tools=TOOLS)[0].answer.valid
    text, told = run([CALLS + V31[:30]], tools=TOOLS)  # cut short by max_tokens
    assert told["content"] == CALLS + V31[:30] and not text.answer.calls and not text.answer.valid


def test_a_forced_call() -> None:
    text, told = run(['{"name": "weather", "argu', 'ments": {"city": 1}}'], tools=TOOLS, forced=True)
    assert told["content"] == "" and text.answer.calls[0]["function"] == {"name": "weather", "arguments": '{"city": 1}'}
    named = forced_schema(TOOLS, NamedTool.model_validate({"type": "function", "function": {"name": "time_of"}}))
    assert named["properties"]["name"] == {"const": "time_of"} and len(forced_schema(TOOLS, "required")["anyOf"]) == 2
    assert run(['{"name": "wea'], tools=TOOLS, forced=True)[1]["content"] == '{"name": "wea'


def test_references_of_a_tools_schema_stay_within_it() -> None:
    """What pydantic writes: definitions at the root of the parameters, recursion by `#`."""
    tree = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}, "next": {"$ref": "#"},
                                             "$ref": {"type": "string"}, "far": {"$ref": "https://a/b"}},
            "$defs": {"City": {"enum": ["Paris", "Oslo"]}}}
    schema = forced_schema([Tool(type="function", function=Function(name="trip", parameters=tree))], "required")
    call = {"name": "trip", "arguments": {"city": "Oslo", "next": {"city": "Paris"}, "$ref": "x"}}
    jsonschema.validate(call, schema)
    for wrong in ({"city": "Rome"}, {"next": {"city": "Rome"}}, {"$ref": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(call | {"arguments": wrong}, schema)
    assert schema["$defs"]["trip"]["properties"]["far"] == {"$ref": "https://a/b"}


def test_a_forced_call_may_follow_reasoning() -> None:
    call = 'because</think>{"name": "weather", "arguments": {}}'
    text, told = run(list(call), thinking=True, tools=TOOLS, forced=True)
    assert told["reasoning_content"] == "because" and [c["function"]["name"] for c in text.answer.calls] == ["weather"]


def test_a_further_part_is_set_apart() -> None:
    parser = OutputParser(thinking=True)
    assert parser.push("x</think>a") == {"reasoning_content": "x", "content": "a"} and parser.flush() == {}
    parser.begin(True, "\n\n")
    assert parser.push("y</think>b") == {"reasoning_content": "\n\ny", "content": "\n\nb"}
    parser.begin(False, "\n\n")
    assert parser.push("c") == {"content": "\n\nc"} and parser.push("d") == {"content": "d"}
    assert parser.answer.message() == {
        "role": "assistant", "content": "a\n\nb\n\ncd", "reasoning_content": "x\n\ny"}
    first = OutputParser()
    first.begin(False, "\n\n")
    assert first.push("a") == {"content": "a"}, "nothing is before it"
