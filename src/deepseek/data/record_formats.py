"""One record -> text, where its answer begins, turns, expert, metadata. Formats are recognised by keys or mapped.

A record is a string, a conversation, or an object recognised by its keys: `text` (with `code`, its answer, in MBPP), a
conversation under one of CONVERSATIONS, or at least one key of ASKING and one of ANSWERING. Parts of the last kind are
joined in the order of those two tuples, a line each, which covers question/answer, problem/analysis,
instruction/input/output, prompt/completion and their relatives. `choices`, or columns choice0, choice1, …, become
lettered options, and an answer that is an index among them becomes its letter (MMLU). `questions` beside `table` or
`paragraphs` (TAT-QA) is one text, asked at the end. Prompt and completion may be (lists of) messages (TRL): one
conversation, of which the completion is the answer. Keys are compared without regard to case.

Beside a conversation, or a question and its answer, these are used: a system prompt (SYSTEM), `tools` or `functions`,
`chat_template_kwargs`; beside a question and its answer also `history` (alpaca: earlier pairs, learnt too) and what was
thought before the answer (THINKING). A record that says `weight: 0` or `train: false` is left out.

Refused are records with two readings, such as an answer beside `text`, and those of which a part would be lost:
preferences, images. Keys that mean nothing are counted (`ParsedRecord.unused`).

Beside these an object may have `expert` (a name) and `metadata` (an object); `complexity`, `language` (or `lang`) and
`error_type` at the top level count as metadata too.

Where no key is known, a map says which column is what (mapping.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..conversation import squeeze, tools_of
from ..errors import DataError, RequestError
from .turns import PARTIAL, THINKING, Turns, filled, flag, is_talk, pairs, speaks, talk

CONVERSATIONS = ("messages", "conversations", "conversation", "turns", "dialogue")
ASKING = ("instruction", "context", "body", "problem", "question", "prompt", "input", "en", "options")
ANSWERING = ("analysis", "rationale", "solution", "canonical_solution", "long_answer", "answer", "answers", "output",
             "completion", "response", "golden", "correct", "target", "zh")
ALSO_ANSWERING = ("summary", "highlights", "headline", "translation", "reply", "label", "labels", "sql")  # beside text
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
VARIABLES = "chat_template_kwargs"
DESCRIBING = {"complexity": "complexity", "lang": "language", "language": "language", "error_type": "error_type"}
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
LETTERS = "ABCDEFGHIJ"
_PREFERENCE = re.compile("(chosen|rejected)(_|$)")
_BESIDE, _LOST = (*SYSTEM, *TOOLS, VARIABLES), (*NOT_TEXT, *PARTIAL)
_SWITCH = ("on", "off", "yes", "no", "true", "false")  # `reasoning` says in some sets whether there is any


class ParsedRecord(NamedTuple):
    """The parts of a record. response_start: offset in `text` where its answer begins, None where it has none or
    several. unused: keys that have no meaning here."""

    text: str
    turns: Turns = ()
    response_start: int | None = None
    metadata: Mapping[str, Any] = {}
    expert: str | None = None
    unused: tuple[str, ...] = ()


class Mapper(Protocol):
    """Says which columns of a record are what (mapping.RecordMap)."""

    def parse(self, record: Any) -> list[ParsedRecord]: ...


def parse_record(record: Any, mapping: Mapper | None = None) -> list[ParsedRecord]:
    """Parse a record, by `mapping` where one is given, else by its keys. Several results where it holds several
    instances, none where it asks to be left out. Raises DataError with the reason where it cannot be parsed."""
    try:
        return _parse(record, mapping)
    except RecursionError:
        raise DataError("is nested too deeply") from None


def _parse(record: Any, mapping: Mapper | None) -> list[ParsedRecord]:
    if mapping is not None:
        found = mapping.parse(record)
    elif isinstance(record, str):
        found = [joined([record], [])]
    elif isinstance(record, list):
        found = [conversation(checked(record))]
    elif isinstance(record, Mapping):
        low = {str(key).lower(): value for key, value in checked(record).items()}
        if len(low) < len(record):
            raise DataError("two of its keys differ in case alone: say with a map which columns count")
        found = _recognised(low)
    else:
        raise DataError(f"must be an object, a list of turns or a string, got {type(record).__name__}")
    for one in found:
        if not one.text.strip():
            raise DataError("the text is empty")
        if not one.text.isascii() and (lone := re.search("[\ud800-\udfff]", one.text)):
            raise DataError(f"a lone surrogate {lone[0]!r}, which UTF-8 cannot hold")
    return found


def checked(value: Any, key: str = "") -> Any:
    """Return the value unchanged. Raises DataError, naming the key, for a number inside that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{key or 'the record'} = {value}: must be a number that JSON has, a text or null")
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(item, str):
                checked(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            if not isinstance(item, str):
                checked(item, f"{key}[{n}]")
    return value


def known_keys(names: list[str]) -> bool:
    """Say whether these are names of columns rather than a first record."""
    low = {name.lower().strip() for name in names}
    asked = low & {*ASKING, "choices", "choice0"}
    return len(low) == len(names) and bool("text" in low or low & {*CONVERSATIONS, "chosen", "rejected"}
                                           or (asked and low & {*ANSWERING}))


def _recognised(keys: dict[str, Any]) -> list[ParsedRecord]:
    given = {key: value for key, value in keys.items() if filled(value)}
    _refuse(given)
    if not all(flag(key, given[key]) for key in ("weight", "train") if key in given):
        return []
    if isinstance(given.get("instances"), list):  # self-instruct: one instruction, several inputs and outputs
        rest = {key: value for key, value in given.items() if key != "instances"}
        if not all(isinstance(instance, Mapping) for instance in given["instances"]):
            raise DataError("instances: must be a list of objects")
        return [one for instance in given["instances"] for one in _recognised(
            rest | {str(key).lower(): value for key, value in instance.items()})]
    used = {"weight", "train", "expert", *DESCRIBING}
    if (found := _read(given, used)) is None:
        names = ", ".join(sorted(keys)[:12]) + (", …" if len(keys) > 12 else "")
        raise DataError("the conversation is empty" if any(isinstance(keys.get(key), list) for key in CONVERSATIONS)
                        else f"no text, and no filled question and answer, under a known key; it has {names or 'none'}")
    metadata = {name: given[key] for key, name in DESCRIBING.items() if given.get(key)}
    if isinstance(given.get("metadata"), Mapping):
        metadata |= given["metadata"]
        used.add("metadata")
    return [found._replace(metadata=metadata, expert=expert_of(given.get("expert")), unused=(
        *found.unused, *(key for key in given if key not in used)))]


def _read(given: dict[str, Any], used: set[str]) -> ParsedRecord | None:
    """Parse the keys of a record by their only reading, adding the keys that it uses to `used`; None where there is
    none."""
    if "choice0" in given or "choices" in given:
        used |= {key for key in given if re.fullmatch(r"choices|choice\d", key)}
        given = _lettered(given)
    asked, answered = ([key for key in _named(names, given) if says(given[key])] for names in (ASKING, ANSWERING))
    thinking = [key for key in _named(THINKING, given) if isinstance(said := given[key], str)
                and said.lower() not in _SWITCH]
    beside = _named(_BESIDE, given)
    if isinstance(given.get("text"), str):  # MBPP has the task under `text` and its solution under `code`
        _one_reading("text", [*_named((*CONVERSATIONS, *ALSO_ANSWERING, "history"), given), *asked, *answered,
                              *thinking, *beside])
        used |= {"text", "code"}
        return joined([given["text"]], [part_text(given.get("code"))])
    named = _named(CONVERSATIONS, given)
    given |= {key: parsed(value) for key in named if isinstance(value := given[key], str)}  # of a table
    if talks := [key for key in named if isinstance(given[key], list)]:
        turns = given[talks[0]]
        everyone, assistant = (squeeze(" ".join(_strings(said))) for said in (
            turns, [turn for n, turn in enumerate(turns) if speaks(turn, n)])) if asked or answered else ("", "")
        new = [key for keys, said in ((asked, everyone), (answered, assistant)) for key in keys
               if squeeze(" ".join(_strings(given[key]))) not in said]  # the others repeat what the turns say
        _one_reading(talks[0], [*talks[1:], *_named(("history",), given), *thinking, *new])
        used |= {talks[0], *beside}
        return conversation(turns, talks[0], **_beside(given))
    if asked and answered:
        _one_reading(f"{asked[0]} and {answered[0]}", thinking[1:])
        used |= {*asked, *answered, *thinking, *beside, "history"}
        return asked_and_answered(
            [given[key] for key in asked], [given[key] for key in answered], **_beside(given),
            history=given.get("history"), reasoning=given[thinking[0]] if thinking else "")
    if isinstance(given.get("questions"), list):  # TAT-QA, SQuAD: a table and paragraphs, then questions about them
        used |= {"table", "paragraphs", "questions"}
        table = given.get("table")
        rows, about = (value if isinstance(value, list) else [] for value in (
            table.get("table") if isinstance(table, Mapping) else table, given.get("paragraphs")))
        parts = [" | ".join(map(str, row)) for row in rows if isinstance(row, list)]
        parts += [part_text(item.get("text")) for item in about if isinstance(item, Mapping)]
        parts += [part_text(item.get(key)) for item in given["questions"] if isinstance(item, Mapping)
                  for key in ("question", "answer")]
        return joined(parts, [])
    return None


def _refuse(given: Mapping[str, Any]) -> None:
    """Raise DataError for a record of which a part would be lost, naming the key and what to do."""
    if pair := [key for key in given if key.startswith(("chosen", "rejected")) and re.match(_PREFERENCE, key)]:
        raise DataError(f"{', '.join(pair)}: preferences, and nothing is learnt from a comparison here; to learn the "
                        "preferred answers, give a map (prompt: prompt, answer: chosen; or messages: chosen)")
    if "kto_tag" in given or (isinstance(given.get("label"), bool) and "text" not in given):
        key = "kto_tag" if "kto_tag" in given else "label"
        raise DataError(f"{key} = {given[key]!r}: a judgement, and answers are learnt here whatever it says; keep the "
                        f"good ones, without {key}")
    if ranked := [key for key in _named(("output", "completion", "response"), given) if isinstance(given[key], list)
                  and len(given[key]) > 1 and all(isinstance(item, str) for item in given[key])]:
        raise DataError(f"{ranked[0]}: {len(given[ranked[0]])} texts, and one answer is learnt; if they are lines of "
                        "one, say so with a map")
    if lost := _named(_LOST, given):
        raise DataError(f"{lost[0]}: " + ("this model reads nothing but text" if lost[0] in NOT_TEXT else
                        "has no meaning here: a turn is learnt or not (weight: 0 in the message)")
                        + "; a map can leave it out")


def _named(names: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """Return the names that are given, in the order of `names`."""
    return [] if given.keys().isdisjoint(names) else [name for name in names if name in given]


def _one_reading(reading: str, others: Sequence[str]) -> None:
    if others:
        raise DataError(f"has two readings, {reading} alone or with {', '.join(dict.fromkeys(others))}: say with a map "
                        "which columns count")


def _beside(given: Mapping[str, Any]) -> dict[str, Any]:
    """Collect system prompt, tools and template variables of a record, as keywords of `conversation`."""
    system = [given[key] for key in SYSTEM if key in given]
    if len(set(map(str, system))) > 1:
        raise DataError(f"{', '.join(key for key in SYSTEM if key in given)}: two system prompts")
    return {"system": system[0] if system else None, "tools": next((given[key] for key in TOOLS if key in given), None),
            VARIABLES: given.get(VARIABLES)}


def _tools(value: Any) -> list[dict[str, Any]]:
    try:
        return tools_of(value)
    except RequestError as error:
        raise DataError(str(error)) from None


def conversation(turns: list[Any], name: str | None = None, *, asked: int | None = None, system: Any = None,
                  tools: Any = None, reasoning: str = "", chat_template_kwargs: Any = None) -> ParsedRecord:
    """Parse a conversation with its system prompt, tools and variables. name: the key of the turns."""
    variables = chat_template_kwargs
    if isinstance(variables, str):
        variables = parsed(variables)
    if not isinstance(variables, Mapping | None):
        raise DataError(f"{VARIABLES} = {variables!r:.60}: must be an object, {{name: value}}")
    if not isinstance(system, str | None):
        raise DataError(f"system = {system!r:.60}: must be a text")
    found = talk(turns, asked=asked, system=system or "", reasoning=reasoning, tools=_tools(tools), variables={
        key: value for key, value in (variables or {}).items() if value is not None})
    return ParsedRecord(found.text, found.turns, found.response_start, unused=tuple(
        f"{name or 'messages'}[].{key}" for key in found.unused))


def asked_and_answered(asked: list[Any], answered: list[Any], *, history: Any = None, reasoning: str = "",
                        **beside: Any) -> ParsedRecord:
    """Parse a question and its answer: plain text where that is all there is, else a conversation."""
    beside["tools"] = _tools(beside.get("tools"))
    if not any(map(is_talk, asked + answered)) and not history and not reasoning and not any(beside.values()):
        return joined([part_text(part) for part in asked], [part_text(part) for part in answered])
    if history and any(map(is_talk, asked)):
        raise DataError("history: the prompt is a list of messages already; put the pairs there")
    earlier = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(
        pairs(parsed(history) if isinstance(history, str) else history) if history else ())]
    first, second = (_as_turns(part, role) for part, role in ((asked, "user"), (answered, "assistant")))
    return conversation([*earlier, *first, *second], asked=None if history else len(first), reasoning=reasoning,
                         **beside)


def _as_turns(parts: list[Any], role: str) -> list[Any]:
    """Convert texts and messages to turns; adjacent texts are joined."""
    out: list[Any] = []
    joins = False
    for part in parts:
        if is_talk(part):
            out, joins = out + (part if isinstance(part, list) else [part]), False
        elif (text := part_text(part)) and joins:
            out[-1] = {"role": role, "content": joined([out[-1]["content"], text], []).text}
        elif text:
            out, joins = [*out, {"role": role, "content": text}], True
    return out


def says(value: Any) -> bool:
    return bool(part_text(value)) if isinstance(value, str) else is_talk(value) or bool(part_text(value))


def _strings(value: Any) -> list[str]:
    """Return all texts inside a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else [part_text(value)]


def parsed(text: str) -> Any:
    """Return the value of a text that is JSON, else the text."""
    try:
        return checked(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _lettered(keys: dict[str, Any]) -> dict[str, Any]:
    """MMLU: choices as lettered options, the index of the right one as its letter."""
    choices = keys.get("choices", [keys[f"choice{i}"] for i in range(len(LETTERS)) if f"choice{i}" in keys])
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), list):  # ARC: {text: […], label: […]}
        choices = choices["text"]
    if not isinstance(choices, list) or not all(isinstance(choice, str | int | float) for choice in choices):
        raise DataError(f"choices = {choices!r:.60}: must be a list of texts")
    answer = str(keys.get("answer", ""))
    if answer.isdecimal() and int(answer) < len(choices):
        answer = LETTERS[int(answer)] if len(choices) <= len(LETTERS) else answer
    return {**keys, "options": dict(zip(LETTERS, choices, strict=False)), "answer": answer}


def joined(asked: list[str], answered: list[str]) -> ParsedRecord:
    text = ""
    for part in filter(None, asked):
        text += part if not text or text.endswith("\n") else "\n" + part
    if not any(answered):
        return ParsedRecord(text)
    at = len(text) + (not text.endswith("\n"))
    for part in filter(None, answered):
        text += part if text.endswith("\n") else "\n" + part
    return ParsedRecord(text, (), at)


def expert_of(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DataError(f"expert = {value!r}: must be a name")
    return value or None


def part_text(value: Any) -> str:
    """Convert a value to text: choices become a line each; deeper nesting gives ''."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [f"{key}. {item}" for key, item in value.items() if not isinstance(item, list | dict)]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return ""
