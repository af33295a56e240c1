"""Conversations of records -> messages: names of roles, flags of what is learnt, reasoning, calls.

A turn is {role, content}, {from, value}, or a string (user and assistant alternate). Content may be in parts. An
assistant's may have tool calls (`tool_calls`, `function_call`, or the role function_call with JSON as its content),
reasoning (THINKING), and a flag that says whether it is learnt: `weight` (OpenAI), or one of FLAGS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..conversation import (
    REASONING,
    Conversation,
    format_calls,
    format_tools,
    inline_reasoning,
    normalize,
    of_turns,
    to_turns,
)
from ..errors import DataError, RequestError

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "ai": "assistant",
         "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
         "function_response": "tool", "ipython": "tool", "function_call": "function_call", "tool_call": "function_call"}
FLAGS = ("train", "training", "trainable", "learn", "loss")
THINKING = (*REASONING, "thought", "think", "complex_cot", "cot", "chain_of_thought")
PARTIAL = ("mask", "loss_mask", "loss_scale", "loss_weight", "train_detail", "training_detail")
_PLAIN = {"role", "from", "content", "value"}
_BLOCKS = ("reasoning_details", "thinking_blocks")
_TWICE = (("content", "value"), ("role", "from"), ("content", "refusal"), ("tool_calls", "function_call"))
_KNOWN = _PLAIN | {"name", "tool_call_id", "tool_calls", "function_call", "refusal", "weight", *THINKING, *FLAGS}

Turns = tuple[tuple[str, str], ...]


class Talk(NamedTuple):
    """A conversation of a record. text: its plain form. response_start: offset in it where the answer begins, None
    where several turns are answers. unused: keys of messages that have no meaning here."""

    text: str
    turns: Turns
    response_start: int | None
    unused: tuple[str, ...]


def is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def is_talk(value: Any) -> bool:
    """Whether a value is a message, or a list of messages."""
    return is_turn(value) or (isinstance(value, list) and bool(value) and all(map(is_turn, value)))


def speaks(turn: Any, number: int) -> bool:
    """Say whether a turn is an assistant's."""
    said = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else ("user", "assistant")[number % 2]
    return _role(said) in ("assistant", "function_call")


def talk(turns: Sequence[Any], *, asked: int | None = None, system: str = "", reasoning: str = "",
         tools: list[dict[str, Any]] | None = None, variables: dict[str, Any] | None = None) -> Talk:
    """A conversation. asked: so many turns are the prompt, and what follows is its answer. system: its first message.
    reasoning: of the last turn, an assistant's. Raises DataError, naming the turn."""
    unused: list[str] = []
    messages = [_message(turn, number, unused) for number, turn in enumerate(turns)]
    said = [plain(message) if len(message) > 2 else f"{message['role'].capitalize()}: {message['content']}"
            for message in messages]
    if not any(text[text.index(":") + 1 :].strip() for text in said):
        raise DataError("the conversation is empty")
    if reasoning:
        if messages[-1]["role"] != "assistant":
            raise DataError("reasoning: the answer is no turn of an assistant")
        if messages[-1].get("reasoning_content", reasoning) != reasoning:
            raise DataError("the reasoning of the answer is given twice")
        messages[-1]["reasoning_content"] = reasoning
        said[-1] = plain(messages[-1])
    if system and messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise DataError("two system messages: one of the record, and one among its messages")
    elif system:
        messages.insert(0, {"role": "system", "content": system})
        said.insert(0, plain(messages[0]))
        asked = None if asked is None else asked + 1
    if tools:
        said.insert(0, format_tools(tools))
    at = None if asked is None else sum(len(text) + 2 for text in said[: asked + bool(tools)])
    try:
        return Talk("\n\n".join(said), to_turns(Conversation(messages, tools, variables or {})), at, tuple(unused))
    except RequestError as error:
        raise DataError(str(error)) from None


def turns_asked(turns: Turns, response_start: int) -> int:
    """Count the messages before the offset in the plain form at which the answer begins."""
    conversation = of_turns(turns)
    at = len(format_tools(conversation.tools)) + 2 if conversation.tools else 0
    for number, message in enumerate(conversation.messages):
        if at >= response_start:
            return number
        at += len(plain(normalize([message])[0])) + 2
    return len(conversation.messages)


def plain(message: Mapping[str, Any]) -> str:
    """Format a normalized message in its plain form."""
    message = inline_reasoning(message)
    said = (message["content"] or "") + (
        format_calls([call["function"] for call in message["tool_calls"]]) if message.get("tool_calls") else "")
    return f"{message['role'].capitalize()}: {said}"


def _message(turn: Any, number: int, unused: list[str]) -> dict[str, Any]:
    """The normalized message of a turn, with `learn` False where it says so."""
    if isinstance(turn, str):
        return {"role": "assistant" if number % 2 else "user", "content": turn}
    if not is_turn(turn):
        raise DataError(f"turn {number + 1} has neither role and content nor from and value")
    given = {key: value for key, value in turn.items() if value is not None}
    said = given.get("role", given.get("from"))
    role, content = _role(said), given.get("content", given.get("value"))
    if role and role != "function_call" and isinstance(content, str) and (
            given.keys() == {"role", "content"} or given.keys() == {"from", "value"}):
        return {"role": role, "content": content}
    for one, other in _TWICE:
        both = [given.get(key) for key in (one, other)]
        if all(map(filled, both)) and both[0] != both[1] and not (one == "role" and len(set(map(_role, both))) == 1):
            raise DataError(f"turn {number + 1} has {one} and {other}; one of them would be lost")
    if not role:
        raise DataError(f"turn {number + 1} has role {said!r}, must be one of {', '.join(ROLES)}")
    thinking = [key for key in THINKING if given.get(key)]
    thoughts = [given[key] for key in thinking]
    if not all(isinstance(each, str) for each in thoughts) or len(set(thoughts)) > 1:
        raise DataError(f"turn {number + 1}: {', '.join(thinking)}: must be one text")
    if not thoughts and (blocks := [key for key in _BLOCKS if filled(given.get(key))]):
        raise DataError(f"turn {number + 1}: {blocks[0]}: reasoning is read as a text, from {THINKING[0]}")
    if content is None and not thoughts and not any(given.get(k) for k in ("tool_calls", "function_call", "refusal")):
        raise DataError(f"turn {number + 1} has no text")
    try:
        [message] = normalize([{**given, "role": role, "content": content, **({REASONING[0]: thoughts[0]} if thoughts
                                                                              else {})}])
    except (RequestError, TypeError) as error:
        raise DataError(f"turn {number + 1} has no text or call that can be read: "
                        f"{str(error).removeprefix('messages[0].')}") from None
    learnt = _learnt(given, number)
    if message["role"] == "assistant":
        message |= {} if learnt is not False else {"learn": False}
    elif learnt:
        raise DataError(f"turn {number + 1} is to be learnt, and of a {message['role']} nothing is: only what an "
                        "assistant says; leave the flag out")
    elif thoughts:
        raise DataError(f"turn {number + 1} has reasoning, and only an assistant's may")
    unused += [key for key, value in given.items() if key not in _KNOWN and filled(value)]
    return message


def _role(said: Any) -> str:
    """Return the role by its usual name, "" for an unknown one."""
    return ROLES.get(str(said).lower(), "")


def _learnt(turn: Mapping[str, Any], number: int) -> bool | None:
    """Parse the flags of a turn; None where it has none."""
    if partial := next((key for key in PARTIAL if key in turn), None):
        raise DataError(f"turn {number + 1}: {partial}: a turn is learnt whole or not at all, as a token counts "
                        "fully in the loss or not; set weight to 0 or 1")
    said = {flag(key, turn[key], f"turn {number + 1}: ") for key in ("weight", *FLAGS) if key in turn}
    if len(said) > 1:
        raise DataError(f"turn {number + 1}: its flags contradict each other: "
                        + ", ".join(f"{key} = {turn[key]!r}" for key in ("weight", *FLAGS) if key in turn))
    return said.pop() if said else None


def flag(key: str, value: Any, place: str = "") -> bool:
    """Parse a flag such as `weight: 0` or `train: false` of a turn or a record. Raises DataError for a weight that is
    neither 0 nor 1, which the loss cannot honour."""
    if str(value).lower() in ("0", "0.0", "false"):
        return False
    if str(value).lower() not in ("1", "1.0", "true"):
        raise DataError(f"{place}{key} = {value!r:.60}: must be 0 or 1: a token counts fully in the loss "
                        "or not at all, so a share cannot be honoured; give 1 to learn it, 0 to leave it out")
    return True


def filled(value: Any) -> bool:
    """Say whether a value is given and not empty."""
    return value is not None and not (isinstance(value, str | list | tuple | Mapping) and not value)


def pairs(history: Any) -> Iterator[str]:
    """The texts of alpaca's `history`, a list of [user, assistant]. Raises DataError for another form."""
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history: {pair!r:.60}: must be a list of pairs, [user, assistant]")
        yield from pair
