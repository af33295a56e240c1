"""Brings messages of clients and records into the form that chat templates expect.

Clients send back what they were sent: null values, keys that mean nothing here, content in parts, OpenAI's former
`function_call`. `normalize` brings all of it into one form. What is left depends on the template: whether it takes the
arguments of a call as text or as an object, and whether it has a place for calls, tools and reasoning at all.
`Style.of` finds that out by trial, and `Style.fit` writes the messages accordingly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import RequestError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "function": "tool", "observation": "tool", "function_call": "assistant", "tool_call": "assistant"}
CALLS = "<｜tool▁calls▁begin｜>"
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message that hold what was thought before it
THINK, THOUGHT = "<think>", "</think>"
_TEXTS = ("text", "input_text", "output_text")


def normalize(messages: Any, also: Collection[str] = ()) -> list[dict[str, Any]]:
    """The messages with the keys `role`, `content` (a text; None beside calls alone), and, where they say something,
    `name`, `tool_call_id`, `reasoning_content` and `tool_calls` ({id, type, function: {name, arguments}}).

    Null is "not given" and unknown keys are ignored. Text parts are joined; `developer` is `system`; `function` and
    `observation` are `tool`; `function_call` (a key, or a role with a call as its content) is a tool call; `reasoning`
    and `thinking` are `reasoning_content`; a refusal is content. also: further roles that pass as they are.
    Raises RequestError with the place of what is malformed, such as `messages[2].content`.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise RequestError(f"messages = {messages!r:.60}: must be a list of objects")
    return [_message(message, f"messages[{i}]", also) for i, message in enumerate(messages)]


def _message(message: Any, place: str, also: Collection[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{place}: a message must be an object with role and content, got {message!r:.60}")
    given = {key: value for key, value in message.items() if value is not None}
    said = given.get("role")
    if not isinstance(said, str) or (said not in ROLES and said not in also):
        raise RequestError(f"{place}.role = {said!r:.60}: must be one of {', '.join(ROLES)}")
    role = said if said in also else ROLES[said]
    content = _text(given["content"], f"{place}.content", role) if "content" in given else None
    out: dict[str, Any] = {"role": role, "content": content}
    for key in ("name", "tool_call_id"):
        if key in given:
            out[key] = _string(given[key], f"{place}.{key}")
    calls = given.get("tool_calls") or ([given["function_call"]] if given.get("function_call") else [])
    if role != "assistant" and calls:
        raise RequestError(f"{place}.tool_calls: only an assistant's message may have them, not one of {said!r}")
    if said in ("function_call", "tool_call") and said not in also:
        calls, out["content"] = _written_calls(content, f"{place}.content")
    if role == "assistant":
        reasoning = next((given[key] for key in REASONING if given.get(key)), None)
        if isinstance(reasoning, str):
            out["reasoning_content"] = reasoning
        if not out["content"] and isinstance(given.get("refusal"), str):
            out["content"] = given["refusal"]
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f"{place}.tool_calls = {calls!r:.60}: must be a list of calls")
        if calls:
            out["tool_calls"] = [_call(call, f"{place}.tool_calls[{n}]") for n, call in enumerate(calls)]
            out["content"] = out["content"] or None
        elif out["content"] is None and "reasoning_content" in out:
            out["content"] = ""
    if out["content"] is None and "tool_calls" not in out:
        raise RequestError(f"{place}.content: must be given" + (", or tool_calls" if role == "assistant" else ""))
    return out


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{place} = {value!r:.60}: must be a text")
    return value


def _text(content: Any, place: str, role: str) -> str:
    if isinstance(content, Mapping) and role == "tool":
        return _json(content, place)  # what a tool returned, not yet written as text
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"{place} = {content!r:.60}: must be a text or a list of text parts")
    return "".join(_part(part, f"{place}[{n}]") for n, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(f"{place} = {part!r:.60}: must be a part such as {{\"type\": \"text\", \"text\": …}}")
    kind = part.get("type") or "text"
    if kind == "refusal":
        return _string(part.get("refusal"), f"{place}.refusal")
    if kind not in _TEXTS:
        raise RequestError(f"{place}.type = {kind!r:.60}: must be text: this model reads nothing else")
    return _string(part.get("text"), f"{place}.text")


def _call(call: Any, place: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise RequestError(f"{place} = {call!r:.60}: must be a call, an object with function")
    if (kind := call.get("type") or "function") != "function":
        raise RequestError(f"{place}.type = {kind!r:.60}: must be function")
    function = call if call.get("function") is None and "name" in call else call.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f"{place}.function = {function!r:.60}: must be an object with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = dict(arguments)
    elif arguments is None or arguments == "":
        arguments = "{}"
    else:
        _string(arguments, f"{place}.function.arguments")
    out = {"type": "function", "function": {
        "name": _string(function.get("name"), f"{place}.function.name"), "arguments": arguments}}
    return out if call.get("id") is None else {"id": _string(call["id"], f"{place}.id"), **out}


def _written_calls(content: str | None, place: str) -> tuple[Any, str | None]:
    """(calls, content) of a turn whose role is `function_call`; its content is JSON: a call, a list of them, or an
    object with `tool_calls` and `content` (how records of data keep such turns)."""
    try:
        found = json.loads(content or "")
    except (ValueError, RecursionError):
        raise RequestError(f"{place} = {content!r:.60}: must be a call in JSON, with name and arguments") from None
    if isinstance(found, dict) and "tool_calls" in found:
        beside = found.get("content")
        return found["tool_calls"], beside if isinstance(beside, str) and beside else None
    return (found if isinstance(found, list) else [found]), None


def _json(value: Any, place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{place}: no JSON: {error}") from None


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The tools of a record, as OpenAI's clients write them. value: a list of them or of bare functions, or its JSON.

    Raises RequestError for what is no tool."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"tools = {value!r:.60}: not JSON: {error}") from None
    if not value:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RequestError(f"tools = {value!r:.60}: must be a list of tools")
    out = []
    for n, tool in enumerate(value):
        function = tool if isinstance(tool, Mapping) and tool.get("function") is None else (
            tool["function"] if isinstance(tool, Mapping) else None)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{n}] = {tool!r:.60}: must be a tool, an object with function and its name")
        beside = {} if function is tool else {key: one for key, one in tool.items() if one is not None}
        out.append({"type": "function"} | beside | {"function": {
            key: one for key, one in function.items() if one is not None and (function is not tool or key != "type")}})
    return out


class Conversation(NamedTuple):
    """A record's conversation. messages: an assistant's may have `learn`, False where it is left out of the loss.
    variables: of the chat template, for this conversation."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}


def to_turns(conversation: Conversation) -> tuple[tuple[str, str], ...]:
    """A conversation as (role, text) turns. A message with more than role and content is its JSON, of the role
    `message`; tools and variables stand in front, as JSON of the roles `tools` and `variables`."""
    front = [(name, _json(value, name)) for name, value in (("tools", conversation.tools),
                                                            ("variables", conversation.variables)) if value]
    return (*front, *((message["role"], message["content"]) if message.keys() == {"role", "content"}
                      else ("message", _json(message, "message")) for message in conversation.messages))


def of_turns(turns: Sequence[Sequence[str]]) -> Conversation:
    """The conversation that `to_turns` wrote."""
    front = {role: json.loads(text) for role, text in turns[:2] if role in ("tools", "variables")}
    return Conversation([json.loads(text) if role == "message" else {"role": role, "content": text}
                         for role, text in turns[len(front) :]], front.get("tools"), front.get("variables", {}))


def format_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools as text, for a template without a place for them."""
    return "Tools:\n" + "\n".join(_json(tool.get("function", tool), "tools") for tool in tools)


def format_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls (name, arguments) in DeepSeek-V3.1's notation."""
    return CALLS + "".join(f"<｜tool▁call▁begin｜>{call['name']}<｜tool▁sep｜>{_as_text(call['arguments'])}"
                           "<｜tool▁call▁end｜>" for call in calls) + "<｜tool▁calls▁end｜>"


# ---- reasoning ------------------------------------------------------------------------------------------------------


def split_reasoning(message: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """(reasoning of a key of its own, reasoning in the content with its tags, the message without either) of a
    normalized message. In a content it reaches to the last `</think>` and the white space that follows."""
    content, own = message["content"] or "", message.get("reasoning_content", "")
    answer = content[content.rfind(THOUGHT) + len(THOUGHT) :].lstrip() if THOUGHT in content else content
    inside = content[: len(content) - len(answer)]
    if squeeze(own) in squeeze(inside):
        own = ""
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return own, inside, rest | {"content": answer if answer or not message.get("tool_calls") else None}


def format_reasoning(own: str, inside: str, opened: str | None = None) -> str:
    """Reasoning (the first two of `split_reasoning`) as a model writes it before its answer. opened: the white space
    between the `<think>` that ends a prompt and the prompt's end; None where the prompt opens no thought."""
    gap = "" if opened == "" else "\n"
    text = (f"{THINK}{gap}{own.strip(chr(10))}{gap}{THOUGHT}{gap}{gap}" if own else "") + inside
    if opened is not None and text.lstrip().startswith(THINK):
        text = text.lstrip().removeprefix(THINK)
        while opened and text[:1] == opened[:1]:
            text, opened = text[1:], opened[1:]
    return text


def inline_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A normalized message whose reasoning, if it has any, is part of its content."""
    own, inside, bare = split_reasoning(message)
    return {**bare, "content": format_reasoning(own, inside) + (bare["content"] or "")} if own else dict(message)


def missing_part(message: Mapping[str, Any], text: str) -> str | None:
    """The first part of an assistant's normalized message that a text does not show, up to white space: "reasoning",
    "content" or a call; None where all is there. text: begins where the turn does."""
    own, inside, bare = split_reasoning(message)
    rest = squeeze(text)
    answer = squeeze(bare["content"] or "")
    before, at = "", 0
    for piece in (squeeze(part) for part in (own, *re.split(f"{THINK}|{THOUGHT}", inside), answer)):
        if (found := rest.find(piece, at)) < 0:
            return "content" if answer and answer not in rest else "reasoning"
        before, at = rest[:found], found + len(piece)
    rest = f"{before} {rest[at:]}"
    for call in message.get("tool_calls") or ():
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if not contains(rest, name) or not ((isinstance(arguments, str) and contains(rest, arguments)) or all(
                contains(rest, said) for said in _texts(_as_object(arguments)))):
            return f"call of {name}"
    return None


def contains(text: str, said: str) -> bool:
    """Whether a squeezed text contains `said`, as it is or as JSON or Python write it inside of quotes."""
    return squeeze(said) in text or any(squeeze(spelling[1:-1]) in text for spelling in (
        json.dumps(said), json.dumps(said, ensure_ascii=False), repr(said)))


def squeeze(text: str) -> str:
    """A text with its white space reduced to single blanks."""
    return " ".join(text.split())


def _texts(value: Any) -> list[str]:
    """All strings inside of a value, including keys."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, list | tuple) else (
        [value] if isinstance(value, str) else [])


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else _json(arguments, "arguments")


def _as_object(arguments: Any) -> Any:
    """Arguments as an object, where they are one: a model's text need not be JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


@dataclass(frozen=True)
class Style:
    """The parts of a message that a chat template shows.

    calls: how it takes the arguments of a call, "text" or "object"; None where it shows no calls. beside: whether it
    shows calls beside content. reasoning: the key of a message that it reads reasoning from.
    """

    tools: bool = False
    calls: str | None = None
    beside: bool = True
    reasoning: str | None = None

    @classmethod
    def of(cls, source: str, render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str | None]) -> Style:
        """Find the style of a template by trial. render: (messages, tools) -> text, None where it fails."""
        def reads(name: str) -> bool:
            return re.search(rf"\b{name}\b", source) is not None

        tool = {"type": "function", "function": {
            "name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}}

        def shown(arguments: Any, content: str | None = None) -> str | None:
            call = {"id": "probe0000", "type": "function", "function": {"name": "probename", "arguments": arguments}}
            return render([{"role": "user", "content": "?"},
                           {"role": "assistant", "content": content, "tool_calls": [call]},
                           {"role": "tool", "content": "!", "name": "probename", "tool_call_id": "probe0000"}], [tool])

        calls, beside = None, True
        if reads("tool_calls"):
            keyed: dict[str, Any] = {"probekey": "probevalue"}
            text, made = shown(json.dumps(keyed)), shown(keyed)
            if text is None and made is None:  # it wants something else of a conversation: go by its words
                keyed_words = re.search(r"arguments\s*(\||\.)\s*items|arguments\s*\|\s*tojson", source)
                calls = "object" if keyed_words else "text"
            elif "probename" in (text or "") + (made or ""):
                good = text is not None and "probekey" in text and '\\"probekey' not in text
                calls = "text" if good or made is None or "probekey" not in made else "object"
                beside = "probename" in (shown(keyed if calls == "object" else json.dumps(keyed), "beside") or "")
        return cls(reads("tools"), calls, beside,
                   next((key for key in REASONING if (reads(key) if key != "thinking" else re.search(
                       r"""\.thinking\b|\[['"]thinking['"]\]""", source))), None))  # a variable has that name, too

    def fit(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
            ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Normalized messages as the template takes them, and its `tools`. What it has no place for becomes text: tools
        a system message, calls V3.1's notation, results a user's message. Reasoning that has no place is left out."""
        out = [one for message in messages for one in self._fit(dict(message))]
        if not tools:
            return out, None
        if self.tools:
            return out, [dict(tool) for tool in tools]
        if out and out[0]["role"] == "system":
            out[0] = {**out[0], "content": f"{format_tools(tools)}\n\n{out[0]['content']}"}
        else:
            out.insert(0, {"role": "system", "content": format_tools(tools)})
        return out, None

    def _fit(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        reasoning, calls = message.pop("reasoning_content", None), message.get("tool_calls")
        if reasoning is not None and self.reasoning is not None:
            message[self.reasoning] = reasoning
        if self.calls is None and message["role"] == "tool":
            return [{"role": "user", "content": message["content"]}]
        if not calls:
            return [message]
        if self.calls is None:
            del message["tool_calls"]
            return [message | {"content": (message["content"] or "") + format_calls([c["function"] for c in calls])}]
        turn = _as_object if self.calls == "object" else _as_text
        message["tool_calls"] = [call | {"function": call["function"] | {
            "arguments": turn(call["function"]["arguments"])}} for call in calls]
        if message["content"] is not None and not self.beside:
            return [{k: v for k, v in message.items() if k != "tool_calls"},
                    {"role": message["role"], "content": None, "tool_calls": message["tool_calls"]}]
        return [message]
