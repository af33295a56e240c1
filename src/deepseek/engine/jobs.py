"""A file of prompts -> a file of answers, line for line.

    in    {"id"?, "prompt" | "messages", "domain"?, and any of SamplingParams by name}
    out   {"id" | "line", "text", "finish_reason", "usage", "choices"?, "logprobs"?} or {"id" | "line", "error"}

Answers stand in the order of the prompts. A bad line costs one error line. An output that is there already is gone on
with: as many lines as it has are taken as done, a torn last one is written anew. Every answer is on disk before the
next is; what was lost in a crash are the requests in flight.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError, RequestError
from .llm import LLM, outcome
from .request import Request, RequestOutput
from .sampler import SamplingParams

AHEAD = 4  # lines in flight, as a multiple of batch_size: what batching by expert can choose from
KNOWN = {field.name for field in fields(SamplingParams)} - {"experts", "routed"}


def run_file(
    llm: LLM, source: Path, target: Path, params: SamplingParams, progress: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Answer what is not answered yet; (answers, errors among them) of this call. progress: told (done, all lines).

    Raises DataError where the input cannot be read or the output belongs to a longer one.
    """
    try:
        total = sum(1 for _ in _lines(source))
    except OSError as error:
        raise DataError(f"{source}: {error.strerror}") from None
    done = _finished(target)
    if done > total:
        raise DataError(f"{target}: has {done} answers for the {total} lines of {source}: it belongs to another input")
    written = errors = 0
    flight: deque[tuple[dict[str, Any], list[Request] | str]] = deque()
    lines = enumerate(_lines(source), 1)
    with target.open("a", encoding="utf-8") as out:
        while True:
            while len(flight) < AHEAD * llm.engine.options.batch_size and (line := next(lines, None)) is not None:
                if line[0] > done:
                    flight.append(_begin(llm, *line, params))
            if not flight:
                return written, errors
            name, group = flight[0]
            while not isinstance(group, str) and any(request.finish_reason is None for request in group):
                llm.engine.step()
            flight.popleft()
            answer = {"error": group} if isinstance(group, str) else _answer(outcome(group))
            _write(out, name | answer)
            written, errors = written + 1, errors + isinstance(group, str)
            if progress is not None:
                progress(done + written, total)


def _begin(llm: LLM, number: int, line: bytes, params: SamplingParams) -> tuple[dict[str, Any], list[Request] | str]:
    """A line's id (or number), and its requests, under way, or what is wrong with it."""
    name: dict[str, Any] = {"line": number}
    try:
        try:
            keys = json.loads(line)
        except ValueError as error:
            raise RequestError(f"not JSON: {error}") from None
        if not isinstance(keys, dict):
            raise RequestError(f"{line[:40]!r}: must be an object")
        name = {"id": keys["id"]} if "id" in keys else name
        given = [key for key in ("prompt", "messages") if key in keys]
        if len(given) != 1:
            raise RequestError(f"has {' and '.join(given) or 'neither prompt nor messages'}: must have one of prompt "
                               "and messages")
        own = {key: value for key, value in keys.items() if key in KNOWN}
        if unknown := set(keys) - KNOWN - {"id", "prompt", "messages", "domain"}:
            raise RequestError(f"{min(unknown)!r} is no field of a request; there are {', '.join(sorted(KNOWN))}")
        prompt, domain = keys[given[0]], keys.get("domain")
        if not isinstance(prompt, str if given == ["prompt"] else list):
            raise RequestError(f"{given[0]} = {prompt!r:.60}: must be a {'text' if given == ['prompt'] else 'list'}")
        if domain is not None and not isinstance(domain, str):
            raise RequestError(f"domain = {domain!r}: must be a name")
        group = llm.requests(prompt, replace(params, **own), domain=domain)
        for request in group:
            llm.engine.add(request)
        return name, group
    except RequestError as error:
        return name, str(error)


def _answer(output: RequestOutput) -> dict[str, Any]:
    def one(choice: RequestOutput) -> dict[str, Any]:
        out: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
        if choice.logprobs is not None:
            out["logprobs"] = [{"token": p.token, "logprob": p.logprob, "top": [list(pair) for pair in p.top]}
                               for p in choice.logprobs]
        return out

    answer = one(output) | {"usage": output.usage}
    return answer | {"choices": [one(choice) for choice in output.choices]} if output.others else answer


def _lines(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        yield from (line for line in file if line.strip())


def _finished(target: Path) -> int:
    """Whole lines of the output; a torn end is cut off."""
    if not target.exists():
        return 0
    with target.open("r+b") as file:
        count = end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _write(out: TextIO, answer: Mapping[str, Any]) -> None:
    out.write(json.dumps(answer, ensure_ascii=False) + "\n")
    out.flush()
    os.fsync(out.fileno())
