"""Everything that an assistant says is learnt, in the form in which the model would say it, or refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import DataError, LeftOutError
from deepseek.spoken import encode_conversation
from deepseek.tokenizer import EOS, Tokenizer
from deepseek.tune.records import RecordSet, encode, read_records
from deepseek.tune.show import pieces
from tests.helpers import PUBLISHED
from tests.helpers.chat_templates import CHANNELS, CHATML, KNOWN, LAST, LLAMA, R1, V3, V31, with_template


def learnt(record: Any, tokenizer: Tokenizer, **settings: Any) -> list[str]:
    """What is learnt of a record, decoded, one text a turn."""
    [document] = read_records([record])
    return [text for example in encode(document, tokenizer, 9999, **settings)
            for is_learnt, text in pieces(example, tokenizer) if is_learnt]


def shown(record: Any, tokenizer: Tokenizer) -> list[str]:
    """The examples of a record, learnt parts in brackets."""
    [document] = read_records([record])
    return ["".join(f"[[{text}]]" if is_learnt else text for is_learnt, text in pieces(example, tokenizer))
            for example in encode(document, tokenizer, 9999)]


REAL = PUBLISHED / "tokenizer" / "deepseek_v3"
ASKED = {"role": "user", "content": "6 x 7?"}
INSIDE = {"role": "assistant", "content": "<think>\nSix sevens.\n</think>\n\nIt is 42."}
BESIDE = {"role": "assistant", "content": "It is 42.", "reasoning_content": "Six sevens."}
B, U, A = "<|begin_of_sentence|>", "<｜User｜>", "<｜Assistant｜>"


@pytest.mark.parametrize(("template", "message", "want"), [
    (V3, INSIDE, f"{B}{U}6 x 7?{A}[[<think>\nSix sevens.\n</think>\n\nIt is 42.{EOS}]]"),
    (V3, BESIDE, f"{B}{U}6 x 7?{A}[[<think>\nSix sevens.\n</think>\n\nIt is 42.{EOS}]]"),
    (R1, INSIDE, f"{B}{U}6 x 7?{A}<think>\n[[Six sevens.\n</think>\n\nIt is 42.{EOS}]]"),
    (R1, BESIDE, f"{B}{U}6 x 7?{A}<think>\n[[Six sevens.\n</think>\n\nIt is 42.{EOS}]]"),
    (V31, BESIDE, f"{B}{U}6 x 7?{A}<think>[[Six sevens.</think>It is 42.{EOS}]]"),
    (V31, {"role": "assistant", "content": "<think>Six sevens.</think>It is 42."},
     f"{B}{U}6 x 7?{A}<think>[[Six sevens.</think>It is 42.{EOS}]]"),
    (V31, {"role": "assistant", "content": "It is 42."}, f"{B}{U}6 x 7?{A}</think>[[It is 42.{EOS}]]"),
    (V31, {"role": "assistant", "content": "<think>\n\n</think>\n\nIt is 42."},
     f"{B}{U}6 x 7?{A}</think>[[\n\nIt is 42.{EOS}]]"),
    (R1, {"role": "assistant", "content": "<think>\n\n</think>\n\nIt is 42."},
     f"{B}{U}6 x 7?{A}<think>\n[[\n</think>\n\nIt is 42.{EOS}]]"),
    (R1, {"role": "assistant", "content": "Six sevens.</think>It is 42."},
     f"{B}{U}6 x 7?{A}<think>\n[[Six sevens.</think>It is 42.{EOS}]]"),
    (R1, {"role": "assistant", "content": "<b>42</b>"}, f"{B}{U}6 x 7?{A}[[<b>42</b>{EOS}]]"),
    (V3, {**BESIDE, "reasoning_content": "42"}, f"{B}{U}6 x 7?{A}[[<think>\n42\n</think>\n\nIt is 42.{EOS}]]"),
    (V3, {**BESIDE, "reasoning_content": "6 x 7"}, f"{B}{U}6 x 7?{A}[[<think>\n6 x 7\n</think>\n\nIt is 42.{EOS}]]"),
    (CHATML, BESIDE, "<|im_start|>user\n6 x 7?<|im_end|>\n<|im_start|>assistant\n"
                     "[[<think>\nSix sevens.\n</think>\n\nIt is 42.<|im_end|>\n]]"),
    (CHANNELS, BESIDE, f"<|user|>6 x 7?{EOS}<|assistant|>[[[thought]Six sevens.[/thought]It is 42.{EOS}]]"),
    (LAST, INSIDE, "<|im_start|>user\n6 x 7?<|im_end|>\n<|im_start|>assistant\n"
                   "[[<think>\nSix sevens.\n</think>\n\nIt is 42.<|im_end|>\n]]"),
])
@pytest.mark.parametrize("tags", [True, False])
def test_reasoning_is_learnt_as_the_model_says_it(template: str, message: Any, want: str, tags: bool) -> None:
    assert shown({"messages": [ASKED, message]}, with_template(template, tags=tags)) == [want]


@pytest.mark.parametrize("template", [V3, R1, V31, LAST])
def test_each_turn_that_thinks_follows_a_prompt_without_earlier_thoughts(template: str) -> None:
    tokenizer = with_template(template)
    messages = [ASKED, INSIDE, {"role": "user", "content": "7 x 8?"}, {**BESIDE, "content": "It is 56."},
                {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    examples = shown({"messages": messages}, tokenizer)
    assert len(examples) == 3
    for n, (example, thinks) in enumerate(zip(examples, (True, True, False), strict=True), 1):
        before, _, said = example.partition("[[")
        assert "sevens" not in before and ("sevens" in said) == thinks
        variables: dict[str, Any] = {"thinking": True} if template == V31 and thinks else {}
        prompt = tokenizer.chat(messages[: 2 * n - 1], **variables)
        assert before == prompt if thinks else prompt.startswith(before)


def test_a_call_may_be_thought_about() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    turn = {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [call]}
    rest = [{"role": "tool", "content": "12:00", "tool_call_id": "1"}, {**BESIDE, "content": "Noon."}]
    calls = ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>"
             '{"zone": "UTC"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>')
    first, second = learnt({"messages": [ASKED, turn, *rest]}, with_template(V31))
    assert first == f"I look.</think>{calls}{EOS}"
    assert second == f"<think>\nSix sevens.\n</think>\n\nNoon.{EOS}"  # no prompt of V3.1 opens a thought behind a tool
    first, second = learnt({"messages": [ASKED, turn, *rest]}, with_template(V3))
    assert first == f"<think>\nI look.\n</think>\n\n{calls}{EOS}"


def test_a_prompt_that_rules_thinking_out_is_refused_with_a_count() -> None:
    rows = [{"messages": [ASKED, INSIDE]}, {"messages": [ASKED, {"role": "assistant", "content": "42"}]},
            {"messages": [{"role": "user", "content": "?"}, BESIDE], "chat_template_kwargs": {"thinking": False}}]
    tokenizer = with_template(V31)
    for each, count, first in ((tokenizer.with_variables({"thinking": False}), 2, 1), (tokenizer, 1, 3)):
        with pytest.raises(DataError, match=rf"{count} of 3 records have something to learn that the chat template lea"
                                            rf"ves out .first records:{first}: turn 2 has reasoning.*thinking.*drop"):
            RecordSet.of(read_records(rows), each, max_length=999, valid_fraction=0.0)
    data = RecordSet.of(read_records(rows), tokenizer, max_length=999, valid_fraction=0.0, reasoning="drop")
    said = [text for example in data.train for is_learnt, text in pieces(example, tokenizer) if is_learnt]
    assert said == [f"It is 42.{EOS}", f"42{EOS}", f"It is 42.{EOS}"]
    data = RecordSet.of(read_records(rows[:2]), tokenizer, max_length=999, valid_fraction=0.0)
    assert data.notes == {"turns with reasoning are learnt after a prompt with thinking = true": 1}
    plain = RecordSet.of(read_records(rows[1:2]), with_template(R1), max_length=999, valid_fraction=0.0)
    assert list(plain.notes.items()) == [("turns without reasoning are learnt after a prompt without the <think> that "
                                          "the chat template ends it with", 1)]
    ruled_out = with_template(LAST).with_variables({"enable_thinking": False})
    with pytest.raises(LeftOutError, match="turn 2 has reasoning"):
        learnt(rows[0], ruled_out)


@pytest.mark.parametrize(("template", "message", "what"), [
    ("{% for m in messages %}{{ m.role }}:{{ m.content[:4] }};{% endfor %}", {"content": "It is 42."}, "content"),
    (LLAMA, {"content": "", "tool_calls": [{"name": "clock"}, {"name": "alarm"}]}, "call of alarm"),
    ("{% for m in messages %}{{ m.role }}:{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %};"
     "{{ m.content or '' }}{% endfor %}", {"content": "", "tool_calls": [
         {"name": "clock", "arguments": '{"zone": "UTC"}'}]}, "call of clock"),
    ("{% for m in messages %}{{ m.content.split('</think>')[-1][:2] }}{% endfor %}", INSIDE, "content"),
])
def test_what_a_template_never_shows_is_refused(template: str, message: Any, what: str) -> None:
    record = {"messages": [ASKED, {**message, "role": "assistant"}]}
    with pytest.raises(LeftOutError, match=f"records:1: the chat template leaves out the {what} of turn 2"):
        learnt(record, with_template(template))


def test_what_a_prompt_does_not_show_is_counted() -> None:
    template = ("{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}{{ m.role }}:{{ m.content }};"
                "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    rows = [{"system": "Be brief.", "messages": [ASKED, {"role": "assistant", "content": "42"}]}] * 2
    data = RecordSet.of(read_records(rows), with_template(template), max_length=999, valid_fraction=0.0)
    assert data.notes == {
        "turns are learnt after a prompt in which the chat template leaves out what the system said": 2}


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/tokenizer")
def test_reasoning_under_the_published_template_of_v3() -> None:
    tokenizer = Tokenizer.load(REAL)
    assert learnt({"messages": [ASKED, BESIDE, {"role": "user", "content": "?"}, INSIDE]}, tokenizer) == [
        "<think>\nSix sevens.\n</think>\n\nIt is 42.<｜end▁of▁sentence｜>"] * 2


# ---- the property ---------------------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("abcxyz <>/{}\"'\\\n你ü.3"), min_size=1, max_size=12)
KINDS = ("plain", "inside", "bare", "beside", "reasoning", "call", "both", "parts", "legacy")


@st.composite
def conversation(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[str]]:
    """(messages, all that an assistant says in them); no text occurs twice."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    count = itertools.count()

    def new() -> str:
        return f"{draw(WORDS)}#{next(count)}#"

    def say(*said: str) -> None:
        texts.extend(said)

    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)):
        messages.append({"role": "user", "content": new()})
        message: dict[str, Any] = {"role": "assistant", "content": new()}
        messages.append(message)
        if kind in ("inside", "bare"):
            gap, thought = draw(st.sampled_from(["", "\n"])), new()
            say(thought, message["content"])
            opening = "<think>" if kind == "inside" else ""
            message["content"] = f"{opening}{gap}{thought}{gap}</think>{gap}{gap}{message['content']}"
        elif kind in ("beside", "reasoning", "both"):
            message["reasoning" if kind == "reasoning" else "reasoning_content"] = new()
            say(*(text for key, text in message.items() if key != "role" and (key != "content" or kind != "both")))
        elif kind == "parts":
            say(message["content"])
            message["content"] = [{"type": "text", "text": text} for text in (
                message["content"][:3], message["content"][3:])]
        elif kind == "plain":
            say(message["content"])
        if kind in ("call", "both", "legacy"):
            name, given = f"clock_{next(count)}", {new(): new(), new(): [new(), 3], new(): {new(): None}}
            say(name, *(text for key, value in given.items() for text in (key, *(
                [value] if isinstance(value, str) else [text for text in value if isinstance(text, str)]))))
            function = {"name": name, "arguments": json.dumps(given) if draw(st.booleans()) else given}
            message |= {"content": None} | ({"function_call": function} if kind == "legacy" else
                                            {"tool_calls": [{"id": "1", "type": "function", "function": function}]})
            messages += [{"role": "function" if kind == "legacy" else "tool", "name": name, "content": "noon"},
                         {"role": "assistant", "content": new()}]
            say(messages[-1]["content"])
    return messages, texts


@given(conversation(), st.sampled_from(sorted(KNOWN)), st.booleans())
@settings(max_examples=120, deadline=None)
def test_what_is_learnt_has_every_text_of_an_assistant(said: Any, name: str, tags: bool) -> None:
    messages, texts = said
    tokenizer = with_template(KNOWN[name], tags=tags)
    record = {"messages": messages}
    [document] = read_records([record])
    whole = tokenizer.decode(encode_conversation(messages, tokenizer), skip_special=False)
    found = [" ".join(text.split()) for text in (" ".join(learnt(record, tokenizer)), whole, document.text)]
    for text in texts:
        spelt = [" ".join(form.split()) for form in (text, json.dumps(text)[1:-1],
                                                     json.dumps(text, ensure_ascii=False)[1:-1])]
        for one in found:
            assert any(form in one for form in spelt), (text, one)
