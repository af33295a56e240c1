"""Chat templates, rendered within limits.

They come with checkpoints, so whoever made the files wrote a program that runs here. jinja2's sandbox keeps it from
Python's objects, not from working without end (`'a' * 10**10`, nested loops, lists that hold themselves twice), much of
it inside of one C call that no check between operations sees. So a worker process renders: the kernel ends it when it
has computed too long, its memory is limited, and this process's threads go on meanwhile. Workers are kept for the next
conversation and end with this process. Our own template needs none.

Rendering is transformers' (utils/chat_template_utils.py, release 5.23): jinja2's immutable sandbox, blocks trimmed,
`tojson` without escapes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import RequestError

_KEPT = 4  # idle workers


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
        given = json.dumps({"template": template, "values": values, "limits": asdict(LIMITS)})
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the variables of the chat template must be JSON: {error}") from None
    worker = _take()
    try:
        assert worker.stdin is not None and worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(given.encode() + b"\n")
            worker.stdin.flush()
        reply = worker.stdout.readline()
    except BaseException:  # an interrupt, say: its reply must not become another conversation's
        _end(worker)
        raise
    if not reply.endswith(b"\n"):
        _end(worker)
        if worker.returncode == -signal.SIGPROF:
            raise RequestError("the chat template computes too long for this conversation: more than "
                               f"{_seconds(LIMITS.seconds, len(given)):g} seconds")
        raise RequestError(f"the chat template ended the process that renders it (status {worker.returncode})")
    answer = json.loads(reply)
    if "limit" in answer:
        _end(worker)
    else:
        _keep(worker)
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
        return {"limit": f"more than {LIMITS.memory:,} bytes of memory"}
    except RecursionError:
        return {"limit": "it nests too deeply"}
    except Exception as error:  # a template is a program: wrong messages, and its own mistakes, can raise anything
        return {"error": str(error)[:1000]}
    if len(text) > most:
        return {"limit": f"a text of {len(text):,} characters, of which there may be {most:,}"}
    return {"text": text}


def _seconds(seconds: float, given: int) -> float:
    return seconds * (1 + given // (4 << 20))


# ---- workers ---------------------------------------------------------------------------------------------------------

_idle: list[subprocess.Popen[bytes]] = []
_owner = os.getpid()
_lock = threading.Lock()


def _take() -> subprocess.Popen[bytes]:
    global _owner
    with _lock:
        if _owner != os.getpid():  # after a fork the workers are the parent's
            _idle.clear()
            _owner = os.getpid()
        while _idle:
            if (worker := _idle.pop()).poll() is None:
                return worker
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deepseek.templates import work; work()"
    try:
        return subprocess.Popen([sys.executable, "-c", code, json.dumps(sys.path)], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE)
    except OSError as error:
        raise RequestError(f"the chat template needs a process that renders it: {error.strerror}") from None


def _keep(worker: subprocess.Popen[bytes]) -> None:
    with _lock:
        if len(_idle) < _KEPT:
            _idle.append(worker)
            return
    _end(worker)


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    with contextlib.suppress(BrokenPipeError):
        worker.communicate()


@atexit.register
def _end_all() -> None:
    if _owner == os.getpid():
        while _idle:
            _end(_idle.pop())


def work() -> None:
    """A worker: a conversation a line in, its text a line out, until the input ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        limits = Limits(**asked["limits"])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(ValueError, OSError):  # not every system can; the time is limited everywhere
            resource.setrlimit(resource.RLIMIT_AS, (limits.memory, hard))
        signal.setitimer(signal.ITIMER_PROF, _seconds(limits.seconds, len(line)))  # SIGPROF ends the process
        answer = _attempt(asked["template"], asked["values"], max(limits.text, 4 * len(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


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
