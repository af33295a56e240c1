"""What an assistant says -> ids, with its reasoning, in the form in which the model says it.

Chat templates leave reasoning out of the turns that they write (DeepSeek's cut a content at `</think>`, others drop the
thoughts of earlier turns), because a model does not see them again. To learn from a turn its reasoning must be there,
after the generation prompt that the model has at that place, which may have opened it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .conversation import THINK, THOUGHT, contains, format_reasoning, missing_part, normalize, split_reasoning, squeeze
from .errors import LeftOutError
from .tokenizer import Tokenizer, unmarked

_TAGS = rf"(?:{THINK}\s*(?:{THOUGHT}\s*)?|{THOUGHT}\s*)"
_FIRST, _LAST = re.compile(_TAGS), re.compile(rf"{_TAGS}\Z")
_SWITCHES = ("thinking", "enable_thinking")  # variables of templates that let the model think


class Turn(NamedTuple):
    """Ids of a conversation up to the end of an assistant's turn, and where in them the turn begins. notes: what is to
    be counted of it."""

    ids: list[int]
    start: int
    notes: tuple[str, ...] = ()


class _Prompt(NamedTuple):
    """A generation prompt: all of it, what comes before the tags of reasoning at its end, and these."""

    text: str
    base: str
    tags: str

    @property
    def opened(self) -> str | None:
        """White space after a `<think>` that ends the prompt, None where none does."""
        return self.tags[len(THINK) :] if self.tags.startswith(THINK) and THOUGHT not in self.tags else None


def encode_turn(messages: Sequence[Mapping[str, Any]], n: int, tokenizer: Tokenizer, *,
                tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> Turn:
    """Ids up to the end of the n-th of normalized messages, an assistant's, as the model would say it after the prompt
    for it. variables: of the template; one of `thinking` and `enable_thinking` that is not given is set where a turn
    with reasoning needs it.

    Raises RequestError where the template refuses the messages, LeftOutError where it shows a part of the turn in no
    way.
    """
    message = messages[n]
    own, inside, bare = split_reasoning(message)
    prompt = _prompt(messages[:n], tokenizer, tools, variables)
    seen = squeeze(unmarked(prompt.text))
    notes = [f"turns are learnt after a prompt in which the chat template leaves out what the {role} said" for role in
             dict.fromkeys(each["role"] for each in messages[:n] if each["role"] != "assistant"
                           and not contains(seen, each["content"]))]
    if squeeze(own + re.sub(_TAGS, "", inside)) and THOUGHT in prompt.tags:
        switch = next((name for name in _SWITCHES if tokenizer.template_knows(name)
                       and name not in variables.keys() | tokenizer.variables.keys()), None)
        if switch is not None:
            variables = {**variables, switch: True}
            notes.append(f"turns with reasoning are learnt after a prompt with {switch} = true")
            prompt = _prompt(messages[:n], tokenizer, tools, variables)
        if THOUGHT in prompt.tags:
            raise LeftOutError(f"turn {n + 1} has reasoning, and the chat template as it is set tells the model not to "
                               "think")
    written = tokenizer.marked_chat(messages[: n + 1], tools=tools, add_generation_prompt=False, **variables)
    missing = missing_part(message, unmarked(written[_agree(prompt.base, written) :]))
    if not missing and (written.startswith(prompt.text) or not own + inside):
        if prompt.opened is not None and not written.startswith(prompt.text):
            notes.append("turns without reasoning are learnt after a prompt without the <think> that the chat template "
                         "ends it with")
        ids = tokenizer.encode_marked(written)
        before = tokenizer.encode_marked(prompt.text if written.startswith(prompt.text) else prompt.base)
        return Turn(ids, _agree(before, ids), tuple(notes))
    if own + inside:
        written = tokenizer.marked_chat([*messages[:n], bare], tools=tools, add_generation_prompt=False, **variables)
        if written.startswith(prompt.base):
            answer = _untagged(written[len(prompt.base) :])
            said = tokenizer.marked(format_reasoning(own, inside, prompt.opened)) + answer
            missing = missing_part(message, unmarked(said))
            if not missing:
                before = tokenizer.encode_marked(prompt.text)
                return Turn(before + tokenizer.encode_marked(said), len(before), tuple(notes))
    raise LeftOutError(f"the chat template leaves out the {missing or 'reasoning'} of turn {n + 1}")


def encode_conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *,
                        tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> list[int]:
    """Ids of a whole conversation in which every assistant's turn has its reasoning. Raises as `encode_turn` does."""
    said = normalize(messages, tokenizer.roles)
    parts = {n: split_reasoning(message) for n, message in enumerate(said) if message["role"] == "assistant"}
    thinking = [n for n, (own, inside, _) in parts.items() if own + inside]
    text = tokenizer.marked_chat(said, tools=tools, add_generation_prompt=False, **variables)

    def begins(of: Sequence[Mapping[str, Any]], n: int) -> int | None:
        """Where in the text the n-th message begins, None where the template writes otherwise what is before it."""
        base = _prompt(of[:n], tokenizer, tools, variables).base
        return len(base) if text.startswith(base) else None

    if any((at := begins(said, n)) is None or missing_part(said[n], unmarked(text[at:])) for n in thinking):
        bare = [parts[n][2] if n in parts else message for n, message in enumerate(said)]
        text, pieces, done = tokenizer.marked_chat(bare, tools=tools, add_generation_prompt=False, **variables), [], 0
        for n in thinking:
            if (at := begins(bare, n)) is None:
                raise LeftOutError(f"the chat template leaves out the reasoning of turn {n + 1}")
            pieces += [text[done:at], tokenizer.marked(format_reasoning(*parts[n][:2]))]
            done = len(text) - len(_untagged(text[at:]))
        text = "".join([*pieces, text[done:]])
    shown = unmarked(text)
    for n in parts:
        if missing := missing_part(said[n], shown):
            raise LeftOutError(f"the chat template leaves out the {missing} of turn {n + 1}")
    return tokenizer.encode_marked(text)


def _prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None,
            variables: Mapping[str, Any]) -> _Prompt:
    text = tokenizer.marked_chat(messages, tools=tools, add_generation_prompt=True, **variables)
    tags = found[0] if (found := _LAST.search(text)) else ""
    return _Prompt(text, text[: len(text) - len(tags)], tags)


def _agree(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items of two sequences are equal from the start."""
    least = min(len(one), len(other))
    if one[:least] == other[:least]:
        return least
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _untagged(text: str) -> str:
    """A text without the tags of reasoning that it begins with."""
    return text[found.end() :] if (found := _FIRST.match(text)) else text
