"""Parses a model's text, as it is generated, into content, reasoning and tool calls.

    reasoning     up to `</think>`, where the template opened it or the text begins with `<think>`
    content       up to the first tool call
    tool calls    DeepSeek's formats, between `<｜tool▁calls▁begin｜>` and the end: V3's `function<sep>NAME`, arguments
                  in a fenced block; V3.1's `NAME<sep>ARGUMENTS`. Where a call is forced (tool_choice) the text is a
                  JSON object by constraint, and that is the call

Text that may be the beginning of a marker is held back until more of it has come.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..conversation import CALLS, THINK, THOUGHT
from .protocol import NamedTool, Tool

_CALL = re.compile("<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)
_FENCED = re.compile(r"\s*(\S+)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


@dataclass
class ParsedOutput:
    """One choice so far. valid: whether every call names a known tool and has its required arguments."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    valid: bool = True

    def message(self) -> dict[str, Any]:
        out: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.calls:
            out["tool_calls"] = self.calls
        return out


class OutputParser:
    """Parses text in pieces; `push` returns a delta of OpenAI's stream, empty while nothing is certain."""

    def __init__(self, *, thinking: bool = False, tools: Sequence[Tool] = (), forced: bool = False,
                 parallel: bool = True) -> None:
        """parallel: whether more than one call may be made; otherwise only the first counts."""
        self.answer, self.forced = ParsedOutput(), forced
        self.required = {tool.function.name: (tool.function.parameters or {}).get("required", []) for tool in tools}
        self.parallel = parallel
        self.begin(thinking)

    def begin(self, thinking: bool, joint: str = "") -> None:
        """A text begins: the first, or that of a further part, which a joint sets apart from what there is.
        thinking: whether the template opened its reasoning."""
        self._state = "thinking" if thinking else "start"
        self._held = ""
        self._joints = dict.fromkeys(("content", "reasoning"), joint)

    def push(self, piece: str) -> dict[str, Any]:
        self._held += piece
        delta: dict[str, Any] = {}
        while self._state not in ("calls", "forced") and self._step(delta):
            pass
        return delta

    def flush(self) -> dict[str, Any]:
        """The last delta: the text has ended."""
        delta: dict[str, Any] = {}
        if self._state in ("calls", "forced"):
            self._calls(delta)
        elif self._held:
            self._put(delta, "reasoning" if self._state == "thinking" else "content", self._held)
        self._held = ""
        return delta

    def _step(self, delta: dict[str, Any]) -> bool:
        """Parse one part of the held text. False when nothing more is certain."""
        if self._state == "start":
            if self.forced:
                self._state = "forced"
                return False
            if not self._held or (THINK.startswith(self._held) and self._held != THINK):
                return False
            self._state = "thinking" if self._held.startswith(THINK) else "content"
            self._held = self._held.removeprefix(THINK)
            return True
        marker = THOUGHT if self._state == "thinking" else CALLS if self.required else None
        where = "reasoning" if self._state == "thinking" else "content"
        at = self._held.find(marker) if marker else -1
        if at >= 0:
            assert marker is not None
            self._put(delta, where, self._held[:at])
            self._held = self._held[at + len(marker) :]
            after = "forced" if self.forced else "content"
            self._state = after if self._state == "thinking" else "calls"
            return self._state == "content" and bool(self._held)
        keep = next((n for n in range(min(len(self._held), len(marker) - 1), 0, -1) if self._held.endswith(marker[:n])),
                    0) if marker else 0
        self._put(delta, where, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _put(self, delta: dict[str, Any], where: str, text: str) -> None:
        if text:
            before, joint = getattr(self.answer, where), self._joints.pop(where, "")
            text = joint + text if before else text
            setattr(self.answer, where, before + text)
            key = "reasoning_content" if where == "reasoning" else "content"
            delta[key] = delta.get(key, "") + text

    def _calls(self, delta: dict[str, Any]) -> None:
        found = _forced(self._held) if self._state == "forced" else _parse(self._held)
        for name, arguments in found if self.parallel else found[:1]:
            self.answer.valid &= name in self.required and _holds(arguments, self.required[name])
            self.answer.calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function",
                                      "function": {"name": name, "arguments": arguments}})
        if found:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(self.answer.calls)]
        elif self._held:  # cut short, or no call after all: nothing of what was said is lost
            self.answer.valid = False
            self._put(delta, "content", self._held if self._state == "forced" else CALLS + self._held)


def _parse(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of every complete call."""
    out = []
    for head, tail in _CALL.findall(text):
        if head.strip() == "function" and (fenced := _FENCED.fullmatch(tail)):
            out.append((fenced[1], fenced[2]))
        else:
            out.append((head.strip(), tail.strip()))
    return out


def _forced(text: str) -> list[tuple[str, str]]:
    try:
        call = json.loads(text)
        return [(call["name"], json.dumps(call["arguments"], ensure_ascii=False, allow_nan=False))]
    except (ValueError, KeyError, TypeError):  # the text was cut short by max_tokens
        return []


def _holds(arguments: str, required: Any) -> bool:
    try:
        given = json.loads(arguments)
    except ValueError:
        return False
    return isinstance(given, dict) and isinstance(required, list) and all(name in given for name in required)


def forced_schema(tools: Sequence[Tool], choice: str | NamedTool) -> dict[str, Any]:
    """The JSON schema of a call that tool_choice demands.

    A tool's parameters become a definition of their own, and their references (`#/$defs/City`) point into it: what the
    client wrote counts from the root of its own schema.
    """
    able = [tool.function for tool in tools if isinstance(choice, str) or tool.function.name == choice.function.name]
    calls = [{"type": "object", "properties": {"name": {"const": function.name},
                                               "arguments": {"$ref": f"#/$defs/{function.name}"}},
              "required": ["name", "arguments"], "additionalProperties": False} for function in able]
    definitions = {function.name: _moved(function.parameters, f"#/$defs/{function.name}") for function in able}
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references start from `place`."""
    def point(part: dict[str, Any]) -> dict[str, Any]:
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            part["$ref"] = place + reference[1:]
        return part

    return json.loads(json.dumps(schema), object_hook=point)
