"""Chat templates, rendered within limits.

They come with checkpoints, so they are programs of the checkpoint's author. jinja2's sandbox keeps them from
Python's objects, not from working without end (`'a' * 10**10`, nested loops, lists that hold themselves twice), much of
it inside of one C call that no check between operations sees. So a worker process renders (workers.py). Our own
template needs none.

Rendering is transformers' (utils/chat_template_utils.py, release 5.23): jinja2's immutable sandbox, blocks trimmed,
`tojson` without escapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import RequestError
from .workers import WorkerError, Workers, serve


@dataclass(frozen=True)
class Limits:
    """Of one rendering. seconds: of computing, not of waiting. memory: bytes of the worker. text, source: characters of
    the result and of the template. seconds and text grow with the conversation."""

    seconds: float = 2.0
    memory: int = 1 << 30
    text: int = 16 << 20
    source: int = 256 << 10


LIMITS = Limits()


def render(template: str, values: Mapping[str, Any], *, trusted: bool = False) -> str:
    """The text of a template. trusted: it is ours, and is rendered here.

    Raises RequestError where the template fails, naming the limit if it has reached one; and for values that are not
    JSON's.
    """
    if len(template) > LIMITS.source:
        raise RequestError(f"the chat template has {len(template):,} characters: must have {LIMITS.source:,} at most")
    if trusted:
        return _answer(_attempt(template, values, LIMITS.text))
    try:
        answer = WORKERS.ask({"template": template, "values": values, "text": LIMITS.text}, seconds=LIMITS.seconds,
                              memory=LIMITS.memory)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the variables of the chat template must be JSON: {error}") from None
    except WorkerError as ended:
        raise RequestError("the chat template computes too long for this conversation: more than "
                           f"{ended.seconds:g} seconds" if ended.late else
                           f"the chat template ended the process that renders it (status {ended.status})") from None
    return _answer(answer)


def _answer(answer: Mapping[str, str]) -> str:
    if "limit" in answer:
        raise RequestError(f"the chat template exceeds its limits for this conversation: {answer['limit']}")
    if "error" in answer:
        raise RequestError(f"the chat template refuses the messages: {answer['error']}")
    return answer["text"]


def _attempt(template: str, values: Mapping[str, Any], most: int) -> dict[str, str]:
    try:
        text = _compile(template).render(**values)
    except MemoryError:
        return {"limit": "more memory than it may have"}
    except RecursionError:
        return {"limit": "it nests too deeply"}
    except Exception as error:  # a template is a program: wrong messages, and its own mistakes, can raise anything
        return {"error": str(error)[:1000]}
    if len(text) > most:
        return {"limit": f"a text of {len(text):,} characters, of which there may be {most:,}"}
    return {"text": text}


def work() -> None:
    """A worker: conversations in, their texts out."""
    def answer(asked: dict[str, Any]) -> dict[str, str]:
        given = len(json.dumps(asked["values"]))
        return _attempt(asked["template"], asked["values"], max(asked["text"], 4 * given))

    serve(answer)


WORKERS = Workers(__name__)


# ---- jinja2 ----------------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant says; for rendering it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)
