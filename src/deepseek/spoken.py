"""What an assistant says -> ids, with its reasoning, in the form in which the model says it.

Chat templates leave reasoning out of the turns that they write (DeepSeek's cut a content at `</think>`, others drop the
thoughts of earlier turns), because a model does not see them again. To learn from a turn its reasoning must be there,
after the generation prompt that the model has at that place, which may have opened it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .conversation import THINK, THOUGHT, left_out, normalize, parted, squeezed, thought
from .errors import LeftOutError
from .tokenizer import Tokenizer, unmarked

_TAGS = rf"(?:{THINK}\s*(?:{THOUGHT}\s*)?|{THOUGHT}\s*)"
_FIRST, _LAST = re.compile(_TAGS), re.compile(rf"{_TAGS}\Z")
_SWITCHES = ("thinking", "enable_thinking")  # variables of templates that let the model think


class Turn(NamedTuple):
    """Ids of a conversation up to the end of an assistant's turn, and where in them the turn begins. switch: the
    variable of the template that had to be set, so that the prompt lets the model think."""

    ids: list[int]
    start: int
    switch: str | None = None


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
    own, inside, bare = parted(message)
    prompt, switch = _prompt(messages[:n], tokenizer, tools, variables), None
    if squeezed(own + re.sub(_TAGS, "", inside)) and THOUGHT in prompt.tags:
        switch = next((name for name in _SWITCHES if tokenizer.template_knows(name)
                       and name not in variables.keys() | tokenizer.variables.keys()), None)
        if switch is not None:
            variables = {**variables, switch: True}
            prompt = _prompt(messages[:n], tokenizer, tools, variables)
        if THOUGHT in prompt.tags:
            raise LeftOutError(f"turn {n + 1} has reasoning, and the chat template as it is set tells the model not to "
                               "think")
    written = tokenizer.marked_chat(messages[: n + 1], tools=tools, add_generation_prompt=False, **variables)
    missing = left_out(message, unmarked(written[_agree(prompt.base, written) :]))
    if not missing and (written.startswith(prompt.text) or not own + inside):
        ids = tokenizer.encode_marked(written)
        before = tokenizer.encode_marked(prompt.text if written.startswith(prompt.text) else prompt.base)
        return Turn(ids, _agree(before, ids), switch)
    if own + inside:
        written = tokenizer.marked_chat([*messages[:n], bare], tools=tools, add_generation_prompt=False, **variables)
        if written.startswith(prompt.base):
            said = tokenizer.marked(thought(own, inside, prompt.opened)) + _untagged(written[len(prompt.base) :])
            missing = left_out(message, unmarked(said))
            if not missing:
                before = tokenizer.encode_marked(prompt.text)
                return Turn(before + tokenizer.encode_marked(said), len(before), switch)
    raise LeftOutError(f"the chat template leaves out the {missing or 'reasoning'} of turn {n + 1}")


def encode_conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *,
                        tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> list[int]:
    """Ids of a whole conversation in which every assistant's turn has its reasoning. Raises as `encode_turn` does."""
    said = normalize(messages, tokenizer.roles)
    text = tokenizer.marked_chat(said, tools=tools, add_generation_prompt=False, **variables)
    speaking = [n for n, message in enumerate(said) if message["role"] == "assistant"]
    if not any(_missing(said, speaking, text)):
        return tokenizer.encode_marked(text)
    parts = {n: parted(said[n]) for n in speaking}
    bare = [parts[n][2] if n in parts else message for n, message in enumerate(said)]
    text, pieces, done = tokenizer.marked_chat(bare, tools=tools, add_generation_prompt=False, **variables), [], 0
    for n, (own, inside, _) in parts.items():
        if own + inside:
            base = _prompt(bare[:n], tokenizer, tools, variables).base
            if not text.startswith(base):
                raise LeftOutError(f"the chat template leaves out the reasoning of turn {n + 1}")
            pieces += [text[done : len(base)], tokenizer.marked(thought(own, inside))]
            done = len(text) - len(_untagged(text[len(base) :]))
    text = "".join([*pieces, text[done:]])
    for n, missing in zip(speaking, _missing(said, speaking, text), strict=True):
        if missing:
            raise LeftOutError(f"the chat template leaves out the {missing} of turn {n + 1}")
    return tokenizer.encode_marked(text)


def _missing(messages: Sequence[Mapping[str, Any]], speaking: Sequence[int], text: str) -> list[str | None]:
    """What a conversation's text does not show of each assistant's turn, one after the other."""
    shown, out = squeezed(unmarked(text)), []
    for n in speaking:
        out.append(left_out(messages[n], shown))
        answer = squeezed(parted(messages[n])[2]["content"] or "")
        shown = shown[max(shown.find(answer), 0) + len(answer) :] if out[-1] is None else shown
    return out


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
