"""Messages as clients send them, and the templates that they have to fit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from deepseek.conversation import format_calls, normalize
from deepseek.errors import RequestError
from deepseek.tokenizer import Tokenizer

CALL = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
ASKED = {"role": "user", "content": "What time is it?"}
SAID = {"role": "tool", "tool_call_id": "call_1", "content": "12:00"}
# the parts of published templates that decide how a call is to be given
LOOP = "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for c in m.tool_calls %}"
REST = "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
TEXT = LOOP + "{{ c['function']['name'] + ':' + c['function']['arguments'] }}" + REST
TOJSON = LOOP + "{{ c.function.name }}:{{ c.function.arguments | tojson }}" + REST
ITEMS = LOOP + "{{ c.function.name }}:{% for k, v in c.function.arguments|items %}{{ k }}={{ v }};{% endfor %}" + REST
EITHER = LOOP + ("{{ c.function.name }}:{% if c.function.arguments is string %}{{ c.function.arguments }}"
                 "{% else %}{{ c.function.arguments | tojson }}{% endif %}") + REST
V3 = ("{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% endif %}"
      "{% if m['role'] == 'assistant' and m['content'] is none %}<calls>{% for c in m['tool_calls'] %}"
      "{{ c['function']['name'] + ':' + c['function']['arguments'] }}{% endfor %}{% endif %}"
      "{% if m['role'] == 'assistant' and m['content'] is not none %}<said>{{ m['content'] }}{% endif %}"
      "{% if m['role'] == 'tool' %}<result>{{ m['content'] }}{% endif %}{% endfor %}")


@cache
def definition() -> str:
    return Tokenizer.train(["what time is it"], 261 + 8).definition


def with_template(template: str) -> Tokenizer:
    return Tokenizer(definition(), {}, template)


@pytest.mark.parametrize(("given", "brought"), [
    ({"role": "developer", "content": "x", "name": None}, {"role": "system", "content": "x"}),
    ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}]},
     {"role": "user", "content": "ab"}),
    ({"role": "user", "content": ["a", {"text": "b"}, {"type": "input_text", "text": "c"}]},
     {"role": "user", "content": "abc"}),
    ({"role": "function", "name": "time", "content": "12:00"}, {"role": "tool", "name": "time", "content": "12:00"}),
    ({"role": "observation", "content": "12:00"}, {"role": "tool", "content": "12:00"}),
    ({"role": "tool", "content": [{"type": "text", "text": "12:00"}]}, {"role": "tool", "content": "12:00"}),
    ({"role": "tool", "content": {"at": "é"}}, {"role": "tool", "content": '{"at": "é"}'}),
    ({"role": "assistant", "content": "hi", "tool_calls": [], "function_call": None, "audio": None, "annotations": [],
      "refusal": None, "parsed": None}, {"role": "assistant", "content": "hi"}),
    ({"role": "assistant", "content": "hi", "tool_calls": None}, {"role": "assistant", "content": "hi"}),
    ({"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant", "content": "No."}),
    ({"role": "assistant", "content": None, "reasoning": "Hm."},
     {"role": "assistant", "content": "", "reasoning_content": "Hm."}),
    ({"role": "assistant", "content": "", "tool_calls": [CALL]},
     {"role": "assistant", "content": None, "tool_calls": [CALL]}),
    ({"role": "assistant", "tool_calls": [{**CALL, "index": 0, "function": {**CALL["function"],  # type: ignore[dict-item]
                                                                            "parsed_arguments": {}}}]},
     {"role": "assistant", "content": None, "tool_calls": [CALL]}),
    ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
     {"role": "assistant", "content": None,
      "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}),
    ({"role": "function_call", "content": '{"name": "f", "arguments": {"a": 1}}'},
     {"role": "assistant", "content": None,
      "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]},
     {"role": "assistant", "content": None,
      "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}),
])
def test_messages_come_into_one_form(given: dict[str, Any], brought: dict[str, Any]) -> None:
    assert normalize([given]) == [brought]
    assert normalize([brought]) == [brought]


@pytest.mark.parametrize(("message", "rule"), [
    ("hi", r"messages\[1\]: a message must be an object"),
    ({"content": "x"}, r"messages\[1\].role = None: must be one of system"),
    ({"role": "nobody", "content": "x"}, r"messages\[1\].role = 'nobody'"),
    ({"role": ["user"], "content": "x"}, r"messages\[1\].role = \['user'\]"),
    ({"role": "user"}, r"messages\[1\].content: must be given"),
    ({"role": "assistant", "content": None, "tool_calls": []}, r"messages\[1\].content: must be given, or tool_calls"),
    ({"role": "user", "content": 3}, r"messages\[1\].content = 3: must be a text"),
    ({"role": "user", "content": {"type": "text", "text": "x"}}, r"messages\[1\].content = "),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
     r"messages\[1\].content\[0\].type = 'image_url'"),
    ({"role": "user", "content": [{"type": "text", "text": None}]}, r"messages\[1\].content\[0\].text = None"),
    ({"role": "user", "content": [7]}, r"messages\[1\].content\[0\] = 7"),
    ({"role": "user", "content": "x", "name": 3}, r"messages\[1\].name = 3"),
    ({"role": "user", "content": "x", "tool_calls": [CALL]}, r"messages\[1\].tool_calls: only an assistant"),
    ({"role": "assistant", "tool_calls": "f"}, r"messages\[1\].tool_calls = 'f'"),
    ({"role": "assistant", "tool_calls": {"a": 1}}, r"messages\[1\].tool_calls = "),
    ({"role": "assistant", "tool_calls": [None]}, r"messages\[1\].tool_calls\[0\] = None"),
    ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, r"messages\[1\].tool_calls\[0\].type = 'custom'"),
    ({"role": "assistant", "tool_calls": [{"id": "x"}]}, r"messages\[1\].tool_calls\[0\].function = None"),
    ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, r"tool_calls\[0\].function.name = None"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, r"function.arguments = \[1"),
    ({"role": "function_call", "content": "f()"}, r"messages\[1\].content = 'f\(\)': must be a call in JSON"),
])
def test_what_is_malformed_is_named_by_its_place(message: Any, rule: str) -> None:
    with pytest.raises(RequestError, match=rule):
        normalize([ASKED, message])


def test_messages_must_be_a_list() -> None:
    for wrong in ("hi", None, {"role": "user"}, 3):
        with pytest.raises(RequestError, match="must be a list of objects"):
            normalize(wrong)


@pytest.mark.parametrize(("template", "shown"), [
    (TEXT, '{"zone": "UTC"}'), (TOJSON, '{"zone": "UTC"}'), (ITEMS, "zone=UTC;"), (EITHER, '{"zone": "UTC"}')])
@pytest.mark.parametrize("arguments", ['{"zone": "UTC"}', {"zone": "UTC"}])
def test_arguments_come_as_the_template_takes_them(template: str, shown: str, arguments: Any) -> None:
    call = {**CALL, "function": {"name": "time", "arguments": arguments}}
    text = with_template(template).chat([ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, SAID])
    assert text == f"<user>What time is it?<assistant>time:{shown}<tool>12:00"


@pytest.mark.parametrize("nothing", [{}, {"tool_calls": []}, {"tool_calls": None}, {"function_call": None}])
def test_no_calls_change_nothing(nothing: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": "Noon.", **nothing}
    assert with_template(V3).chat([ASKED, said]) == "<user>What time is it?<said>Noon."


def test_calls_beside_content_stay_where_a_template_shows_one_or_the_other() -> None:
    said = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    shown = "<said>I look.<calls>time:" + '{"zone": "UTC"}' + "<result>12:00"
    assert with_template(V3).chat([ASKED, said, SAID]) == "<user>What time is it?" + shown


def test_what_a_template_has_no_place_for_becomes_text() -> None:
    plain = with_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    tool = {"type": "function", "function": {"name": "time"}}
    calls = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]}
    text = plain.chat([{"role": "developer", "content": "Be brief."}, ASKED, calls, SAID], tools=[tool])
    assert text == ('<system>Tools:\n{"name": "time"}\n\nBe brief.<user>What time is it?<assistant>'
                    + format_calls([{"name": "time", "arguments": '{"zone": "UTC"}'}]) + "<user>12:00")


def test_reasoning_and_tools_go_where_the_template_reads_them() -> None:
    template = ("{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
                "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}")
    said = {"role": "assistant", "content": "Noon.", "reasoning": "Hm."}
    assert with_template(template).chat([said], tools=[CALL]) == "[time](Hm.)Noon."


@pytest.mark.parametrize("content", ["Once", "Once upon ", "a\ufdd2b"])
def test_a_last_message_may_be_left_open(content: str) -> None:
    tokenizer = Tokenizer.train(["once upon"], 261)
    text = tokenizer.chat([ASKED, {"role": "assistant", "content": content}], continue_final_message=True)
    assert text == "<|begin_of_sentence|><|User|>What time is it?<|Assistant|>" + content
    ids = tokenizer.encode_chat([ASKED, {"role": "assistant", "content": "Once"}], continue_final_message=True)
    assert tokenizer.decode(ids).endswith("Once")
    for wrong in ([ASKED], [], [{"role": "assistant", "tool_calls": [CALL]}]):
        with pytest.raises(RequestError, match="continue_final_message: the last message must be"):
            tokenizer.encode_chat(wrong, continue_final_message=True)
    trimming = with_template("{% for m in messages %}{{ m.content | trim }}<end>{% endfor %}")
    assert trimming.chat([{"role": "assistant", "content": " Once "}], continue_final_message=True) == "Once"


def test_a_template_may_have_roles_of_its_own() -> None:
    own = with_template("{% for m in messages %}{% if m['role'] == 'critic' %}{{ m.content }}{% endif %}{% endfor %}")
    assert own.chat([{"role": "critic", "content": "Bad."}]) == "Bad."
