"""One record -> text, where its answer begins, turns, expert, metadata. Shapes are recognised by keys or mapped.

A record is a string, a conversation, or an object recognised by its keys: `text` (with `code`, its answer, in MBPP), a
conversation under one of CONVERSATIONS, or at least one key of ASKING and one of ANSWERING. Parts of the last kind are
joined in the order of those two tuples, a line each, which covers question/answer, problem/analysis,
instruction/input/output, prompt/completion and their relatives. `choices`, or columns choice0, choice1, …, become
lettered options, and an answer that is an index among them becomes its letter (MMLU). `questions` beside `table` or
`paragraphs` (TAT-QA) is one text, asked at the end. Prompt and completion may be lists of messages (TRL): one
conversation, of which the completion is the answer. `tools` beside messages are kept. Keys are compared without regard
to case.

Beside these an object may have `expert` (a name) and `metadata` (an object); `complexity`, `language` (or `lang`) and
`error_type` at the top level count as metadata too.

A RecordMap says which column is what where no key is known. A column is a name, a dotted path into nested objects, or
the number of a column, from 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..conversation import normalize, of_turns, told, tools_of, written
from ..errors import ConfigError, DataError, RequestError
from ..files import read_yaml

CONVERSATIONS = ("messages", "conversations", "conversation", "turns", "dialogue")
ASKING = ("instruction", "context", "body", "problem", "question", "prompt", "input", "en", "options")
ANSWERING = ("analysis", "rationale", "solution", "canonical_solution", "long_answer", "answer", "answers", "output",
             "completion", "response", "golden", "correct", "target", "zh")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "bot": "assistant", "model": "assistant", "developer": "system", "tool": "tool", "function": "tool",
         "observation": "tool", "function_call": "function_call", "tool_call": "function_call"}
DESCRIBING = {"complexity": "complexity", "lang": "language", "language": "language", "error_type": "error_type"}
LETTERS = "ABCDEFGHIJ"
_JOINED = ("text", "prompt", "answer")

Turns = tuple[tuple[str, str], ...]
Column = str | int


class Shaped(NamedTuple):
    """What a record says. answer_at: offset in `text` where its answer begins, None where it has none or several."""

    text: str
    turns: Turns = ()
    answer_at: int | None = None
    metadata: Mapping[str, Any] = {}
    expert: str | None = None


@dataclass(frozen=True)
class RecordMap:
    """Which columns of a record are what: `text`, or `messages`, or `prompt` and `answer` (several are joined by
    newlines). metadata: {name: column}. header: whether the first row of a table names its columns; if not given, it
    does unless all columns here are numbers. Raises ConfigError for a combination that says nothing."""

    text: tuple[Column, ...] = ()
    prompt: tuple[Column, ...] = ()
    answer: tuple[Column, ...] = ()
    messages: tuple[Column, ...] = ()
    expert: tuple[Column, ...] = ()
    metadata: tuple[tuple[str, Column], ...] = ()
    header: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("text", "messages", "prompt") if getattr(self, name)]
        if len(given) != 1 or bool(self.prompt) != bool(self.answer):
            raise ConfigError(f"map: must have one of text, messages, or prompt with answer; it has "
                              f"{', '.join([*given, *(['answer'] if self.answer else [])]) or 'none'}")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (*self.text, *self.prompt, *self.answer, *self.messages, *self.expert, *(c for _, c in self.metadata))

    @classmethod
    def from_dict(cls, keys: Any) -> RecordMap:
        """From the keys of a YAML mapping. Raises ConfigError for an unknown key or a value of another kind."""
        names = [field.name for field in fields(cls)]
        if not isinstance(keys, Mapping) or (unknown := set(keys) - set(names)):
            what = f"unknown key {min(map(str, unknown))!r}" if isinstance(keys, Mapping) else "not a mapping"
            raise ConfigError(f"map: {what}: the keys are {', '.join(names)}")
        values: dict[str, Any] = {}
        for name, value in keys.items():
            if name == "header":
                good, out = isinstance(value, bool), value
            elif name == "metadata":
                value = {c: c for c in value} if isinstance(value, list) else value
                good = isinstance(value, Mapping) and all(_is_column(c) for c in value.values())
                out = tuple((str(k), c) for k, c in value.items()) if good else ()
            else:
                out = tuple(value) if isinstance(value, list) else (value,)
                good = all(map(_is_column, out)) and (len(out) == 1 or (bool(out) and name in _JOINED))
            if not good:
                raise ConfigError(f"map: {name} = {value!r}: must be "
                                  + {"header": "true or false", "metadata": "{name: column} or a list of columns"}.get(
                                      name, "a column or a list of them"))
            values[name] = out
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> RecordMap:
        """From a YAML file. Raises NotFoundError, or ConfigError naming the file."""
        try:
            return cls.from_dict(read_yaml(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None

    def shape(self, record: Any) -> list[Shaped]:
        """As `shape`, by this map. Raises DataError where a column is missing or empty."""
        def look(column: Column) -> Any:
            if isinstance(record, Mapping) and str(column) in record:
                return record[str(column)]
            value = list(record.values()) if isinstance(record, Mapping) and isinstance(column, int) else record
            for step in [column] if isinstance(column, int) else column.split("."):
                if isinstance(value, Mapping) and step in value:
                    value = value[step]
                elif isinstance(value, list) and str(step).isdecimal() and int(step) < len(value):
                    value = value[int(step)]
                else:
                    raise DataError(f"there is no column {column!r}")
            return value

        expert = _expert(look(self.expert[0])) if self.expert else None
        metadata = {name: look(column) for name, column in self.metadata}
        if self.messages:
            said = look(self.messages[0])
            if not isinstance(said, list):
                raise DataError(f"column {self.messages[0]!r} must be a list of turns")
            return [conversation(said)._replace(metadata=metadata, expert=expert)]
        asked, answered = ([part_text(look(c)) for c in columns] for columns in (self.text or self.prompt, self.answer))
        if not any(asked) or (self.answer and not any(answered)):
            empty = self.answer if any(asked) else self.text or self.prompt
            raise DataError(f"no text under {', '.join(map(str, empty))}")
        return [_joined(asked, answered)._replace(metadata=metadata, expert=expert)]


def shape(record: Any, mapping: RecordMap | None = None) -> list[Shaped]:
    """What one record says; more than one where it holds several instances. Raises DataError, saying why it cannot."""
    if mapping is not None:
        found = mapping.shape(record)
    elif isinstance(record, str):
        found = [_joined([record], [])]
    elif isinstance(record, list):
        found = [conversation(record)]
    elif isinstance(record, Mapping):
        found = _recognised({str(key).lower(): value for key, value in record.items()})
    else:
        raise DataError(f"must be an object, a list of turns or a string, got {type(record).__name__}")
    for one in found:
        if not one.text.strip():
            raise DataError("the text is empty")
        if not one.text.isascii() and (lone := re.search("[\ud800-\udfff]", one.text)):
            raise DataError(f"a lone surrogate {lone[0]!r}, which UTF-8 cannot hold")
    return found


def known_keys(names: list[str]) -> bool:
    """Whether these look like the names of columns rather than a first record."""
    low = {name.lower().strip() for name in names}
    asked = low & {*ASKING, "choices", "choice0"}
    return len(low) == len(names) and bool("text" in low or low & {*CONVERSATIONS} or (asked and low & {*ANSWERING}))


def is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _recognised(keys: dict[str, Any]) -> list[Shaped]:
    if isinstance(keys.get("instances"), list):  # self-instruct: one instruction, several inputs and outputs
        rest = {key: value for key, value in keys.items() if key != "instances"}
        return [one for instance in keys["instances"] if isinstance(instance, Mapping)
                for one in _recognised({**rest, **instance})]
    if isinstance(keys.get("text"), str):  # MBPP has the task under `text` and its solution under `code`
        found = _joined([keys["text"]], [part_text(keys.get("code"))])
    elif said := [keys[key] for key in CONVERSATIONS if isinstance(keys.get(key), list)]:
        found = conversation(said[0], _tools(keys))
    elif talk := _prompt_and_completion(keys):
        found = conversation(talk[0] + talk[1], _tools(keys), len(talk[0]))
    elif isinstance(keys.get("questions"), list):  # TAT-QA, SQuAD: a table and paragraphs, then questions about them
        table = keys.get("table")
        rows = table.get("table") if isinstance(table, Mapping) else table
        parts = [" | ".join(map(str, row)) for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
        parts += [part_text(item.get("text")) for item in keys.get("paragraphs") or () if isinstance(item, Mapping)]
        parts += [part_text(item.get(key)) for item in keys["questions"] if isinstance(item, Mapping)
                  for key in ("question", "answer")]
        found = _joined(parts, [])
    else:
        if "choice0" in keys or "choices" in keys:
            keys = _lettered(keys)
        asked, answered = ([part_text(keys[key]) for key in names if key in keys] for names in (ASKING, ANSWERING))
        if not (any(asked) and any(answered)):
            names = ", ".join(sorted(keys)[:12]) + (", …" if len(keys) > 12 else "")
            raise DataError(f"no text, and no filled question and answer, under a known key; it has {names or 'none'}")
        found = _joined(asked, answered)
    metadata = {name: keys[key] for key, name in DESCRIBING.items() if keys.get(key)}
    if isinstance(keys.get("metadata"), Mapping):
        metadata |= keys["metadata"]
    return [found._replace(metadata=metadata, expert=_expert(keys.get("expert")))]


def _tools(keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        return tools_of(keys.get("tools") or keys.get("functions"))
    except RequestError as error:
        raise DataError(str(error)) from None


def _prompt_and_completion(keys: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """The turns of both where one of them is a list of messages; a text beside it is a turn."""
    def is_talk(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(is_turn, value))

    asked, answered = ([keys[key] for key in names if keys.get(key)] for names in (ASKING, ANSWERING))
    if not asked or not answered or not any(map(is_talk, asked + answered)):
        return None
    first, second = ([turn for part in parts
                      for turn in (part if is_talk(part) else [{"role": role, "content": part_text(part)}])]
                     for role, parts in (("user", asked), ("assistant", answered)))
    return first, second


def _lettered(keys: dict[str, Any]) -> dict[str, Any]:
    """MMLU: choices as lettered options, the index of the right one as its letter."""
    choices = keys.get("choices")
    if not isinstance(choices, list):
        choices = [keys[f"choice{i}"] for i in range(len(LETTERS)) if f"choice{i}" in keys]
    answer = str(keys.get("answer", ""))
    if answer.isdecimal() and int(answer) < len(choices):
        answer = LETTERS[int(answer)] if len(choices) <= len(LETTERS) else answer
    return {**keys, "options": dict(zip(LETTERS, choices, strict=False)), "answer": answer}


def _joined(asked: list[str], answered: list[str]) -> Shaped:
    text = ""
    for part in filter(None, asked):
        text += part if not text or text.endswith("\n") else "\n" + part
    if not any(answered):
        return Shaped(text)
    at = len(text) + (not text.endswith("\n"))
    for part in filter(None, answered):
        text += part if text.endswith("\n") else "\n" + part
    return Shaped(text, (), at)


def _expert(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DataError(f"expert = {value!r}: must be a name")
    return value or None


def _is_column(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != "" and not (
        isinstance(value, int) and value < 0)


def part_text(value: Any) -> str:
    """A value as text; choices become a line each; what is nested deeper is not text."""
    if isinstance(value, Mapping):
        value = [f"{key}. {item}" for key, item in value.items() if not isinstance(item, list | dict)]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else ""


def conversation(turns: list[Any], tools: list[dict[str, Any]] | None = None, asked: int | None = None) -> Shaped:
    """Turns as {role, content}, as {from, value}, or as strings that alternate between user and assistant. Content may
    be in parts. A turn with tool calls has the role function_call and JSON as its text (`conversation.normalize`);
    tools are a first turn of the role tools. asked: so many turns are the prompt, and what follows is its answer."""
    said = [_turn(turn, number) for number, turn in enumerate(turns)]
    if not any(text.strip() for _, text, _ in said):
        raise DataError("the conversation is empty")
    if tools:
        said.insert(0, ("tools", json.dumps(tools, ensure_ascii=False), told(tools)))
    plain = [shown for *_, shown in said]
    at = None if asked is None else sum(len(shown) + 2 for shown in plain[: asked + bool(tools)])
    return Shaped("\n\n".join(plain), tuple((role, text) for role, text, _ in said), at)


def turns_asked(turns: Turns, answer_at: int) -> int:
    """How many messages of a conversation come before the place in its plain form where the answer begins."""
    messages, tools = of_turns(turns)
    at = len(told(tools)) + 2 if tools else 0
    for number, message in enumerate(messages):
        if at >= answer_at:
            return number
        at += len(_turn(message, number)[2]) + 2
    return len(messages)


def _turn(turn: Any, number: int) -> tuple[str, str, str]:
    """(role, text, plain form)."""
    if isinstance(turn, str):
        role, text = ("assistant" if number % 2 else "user"), turn
    elif is_turn(turn):
        role = ROLES.get(str(turn.get("role", turn.get("from"))).lower(), "")
        text = turn.get("content", turn.get("value"))
    else:
        raise DataError(f"turn {number + 1} has neither role and content nor from and value")
    if not role:
        raise DataError(f"turn {number + 1} has role {turn.get('role', turn.get('from'))!r}, "
                        f"must be one of {', '.join(ROLES)}")
    if isinstance(turn, Mapping) and (not isinstance(text, str) or role == "function_call"
                                      or turn.get("tool_calls") or turn.get("function_call")):
        return _with_calls({**turn, "role": role, "content": text}, number)
    return role, text, f"{role.capitalize()}: {text}"


def _with_calls(turn: Mapping[str, Any], number: int) -> tuple[str, str, str]:
    """(role, text, plain form) of a turn whose content is in parts, or that calls tools."""
    if turn["content"] is None and not any(turn.get(key) for key in ("tool_calls", "function_call", "refusal")):
        raise DataError(f"turn {number + 1} has no text")
    try:
        [message] = normalize([turn])
        text, calls = message["content"] or "", message.get("tool_calls")
        if not calls:
            return message["role"], text, f"{message['role'].capitalize()}: {text}"
        shown = text + written([call["function"] for call in calls])
        return "function_call", json.dumps({"content": text, "tool_calls": calls}, ensure_ascii=False), (
            f"Assistant: {shown}")
    except (RequestError, TypeError) as error:
        raise DataError(f"turn {number + 1} has no text or call that can be read: "
                        f"{str(error).removeprefix('messages[0].')}") from None
