"""A file of prompts -> a file of answers, line for line.

    in    {"id"?, "prompt" | "messages", "domain"?, "adapter"? | "model"?, "pool"?, any of SamplingParams by name; with
          a prompt "parse_special"?; with messages "tools"?, "chat_template_kwargs"?, "continue_final_message"?}; null
          is "not given"; "pool": false is answered by the base though the LLM has a pool
    out   {"id" | "line", "text", "finish_reason", "usage", "choices"?, "logprobs"?, "prompt_logprobs"?, "routing"?}, or
          {"id" | "line", "error"}

Answers are in the order of the prompts. A bad line gives one error line, a blank one none. An existing output file is
resumed: its ids (or line numbers) must match the input's first lines, and a torn last line is written again. Every
answer is synced to disk before the next; a crash loses only the requests in flight.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ..atlas.usage import ExpertUsage
from ..errors import DataError, RequestError, shown
from ..files import is_file_at, take_lock, to_json
from ..interrupts import kept
from .llm import LLM
from .request import AdapterChoice, RequestOutput
from .routing import Answer
from .sampling_params import SamplingParams

AHEAD = 4  # lines in flight, as a multiple of max_num_seqs: what batching by expert can choose from
KNOWN = {field.name for field in fields(SamplingParams)} - {"experts", "routed"}
OF_PROMPT: dict[str, tuple[type, str]] = {"parse_special": (bool, "true or false")}
OF_MESSAGES: dict[str, tuple[type, str]] = {
    "tools": (list, "a list of tools"), "chat_template_kwargs": (dict, "an object"),
    "continue_final_message": (bool, "true or false")}


def run_file(
    llm: LLM, source: Path, target: Path, params: SamplingParams, progress: Callable[[int, int], None] | None = None,
    usage: ExpertUsage | None = None, *, parse_special: bool = False, adapter: AdapterChoice | None = None,
) -> tuple[int, int]:
    """Answer the lines that have no answer yet; returns (answers, errors among them). progress: gets (done, all lines).
    usage: counts the experts of what runs. parse_special, adapter: as in `LLM.generate`, for lines that do not say.

    Raises what `check_files` raises, RequestError for params that no line could have; and what goes wrong with the
    model or its files on the way, which is no line's fault: the same call then goes on.
    """
    llm.requests([0], params, adapter=adapter)
    written = errors = 0
    flight: deque[tuple[dict[str, Any], Answer | str]] = deque()
    with _opened(source, target) as (out, total, done), kept(
            lambda: f"{done + written:,} of {total:,} answers are in {target}"), _aborting(llm, flight):
        lines = islice(_lines(source), done, None)
        while True:
            while len(flight) < AHEAD * llm.engine.options.max_num_seqs and (line := next(lines, None)) is not None:
                flight.append(_begin(llm, *line, params, usage, parse_special, adapter))
            if not flight:
                return written, errors
            name, found = flight[0]
            if isinstance(found, Answer):
                found = _finish(llm, found)
            flight.popleft()
            answer = {"error": found} if isinstance(found, str) else _answer(found.output())
            write_answer(out, name | answer)
            if not is_file_at(out, target):
                raise DataError(f"{target}: was deleted or replaced while answers were written to it, and they are "
                                "lost: the same command answers from what is there now")
            written, errors = written + 1, errors + isinstance(found, str)
            if progress is not None:
                progress(done + written, total)


def _finish(llm: LLM, answer: Answer) -> Answer | str:
    """Wait for an answer, with its further parts; or what is wrong with the line. Raises what is not its fault."""
    requests = answer.requests
    while requests:
        for request in requests:
            request.done.wait()
        for request in requests:
            if isinstance(request.error, RequestError):
                return str(request.error)  # what this line asks for came to a limit on the way
            if request.error:
                raise request.error
        llm.driver.submit(*(requests := answer.advance()))
    return answer


@contextmanager
def _aborting(llm: LLM, flight: Iterable[tuple[dict[str, Any], Answer | str]]) -> Iterator[None]:
    """What is still in flight at the end is aborted."""
    try:
        yield
    finally:
        for _, answer in flight:
            llm.driver.abort(*(() if isinstance(answer, str) else answer.requests))


def check_files(source: Path, target: Path) -> tuple[int, int]:
    """(lines of the input, those of them that the output answers). A torn last line of the output is cut off.

    Raises DataError where the input cannot be read, the output cannot be written or belongs to another input, and
    ConfigError where another process is writing the output.
    """
    with _opened(source, target) as (_, total, done):
        return total, done


@contextmanager
def _opened(source: Path, target: Path) -> Iterator[tuple[IO[bytes], int, int]]:
    """The output, locked for this process, and what `check_files` returns."""
    with ExitStack() as stack:
        try:
            if not source.is_file():
                raise DataError(f"{source}: must be a file: it is read twice")
            total = sum(1 for _ in _lines(source))
            out = stack.enter_context(target.open("a+b"))
            take_lock(out, target)
            answers = _finished(out, target)
        except OSError as error:
            raise DataError(f"{error.filename or target}: {error.strerror}") from None
        _compare(source, target, total, answers)
        yield out, total, len(answers)


def _compare(source: Path, target: Path, total: int, answers: list[dict[str, Any]]) -> None:
    if len(answers) > total:
        raise DataError(f"{target}: has {len(answers)} answers for the {total} lines of {source}: it belongs to "
                        "another input")
    for (number, line), answer in zip(_lines(source), answers, strict=False):
        if (asked := _name(number, line)[0]) != answer:
            raise DataError(f"{target}: has the answer to {answer} where {source} asks {asked}: it belongs to another "
                            "input")


def _name(number: int, line: bytes) -> tuple[dict[str, Any], dict[str, Any] | str]:
    """What a line is called in the output, and its fields or what is wrong with it."""
    name: dict[str, Any] = {"line": number}
    try:
        keys = json.loads(line)
        json.dumps(keys, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        return name, f"not JSON: {error}"
    if not isinstance(keys, dict):
        return name, f"{line[:40]!r}: must be an object"
    return {"id": keys["id"]} if keys.get("id") is not None else name, keys


def _begin(llm: LLM, number: int, line: bytes, params: SamplingParams, usage: ExpertUsage | None,
           parse_special: bool, adapter: AdapterChoice | None) -> tuple[dict[str, Any], Answer | str]:
    """A line's id (or number), and its requests, under way, or what is wrong with it."""
    name, keys = _name(number, line)
    try:
        if isinstance(keys, str):
            raise RequestError(keys)
        everywhere = KNOWN | {"domain", "adapter", "model", "pool"}
        if unknown := set(keys) - everywhere - {"id", "prompt", "messages", *OF_PROMPT, *OF_MESSAGES}:
            raise RequestError(f"{min(unknown)!r} is no field of a request; there are "
                               f"{', '.join(sorted({*everywhere, *OF_PROMPT, *OF_MESSAGES}))}")
        keys = {key: value for key, value in keys.items() if value is not None}
        given = [key for key in ("prompt", "messages") if key in keys]
        if len(given) != 1:
            raise RequestError(f"has {' and '.join(given) or 'neither prompt nor messages'}: must have one of prompt "
                               "and messages")
        prompt, domain = keys[given[0]], keys.get("domain")
        if keys.get("pool") is True:
            adapter = None  # the line says who answers
        if given == ["prompt"] and not isinstance(prompt, str):
            raise RequestError(f"prompt = {prompt!r:.60}: must be a text")
        if given == ["messages"] and not (isinstance(prompt, list) and prompt and all(
                isinstance(message, dict) for message in prompt)):
            raise RequestError(f"messages = {prompt!r:.60}: must be a list of objects, one at least")
        if domain is not None and not isinstance(domain, str):
            raise RequestError(f"domain = {domain!r}: must be a name")
        if "model" in keys:
            if not isinstance(keys["model"], str):
                raise RequestError(f"model = {keys['model']!r:.60}: must be a name")
            adapter = llm.adapter_of(keys["model"])
        if "adapter" in keys:
            llm.find_adapter(adapter := keys["adapter"])
        if {"model", "adapter"} <= set(keys) and llm.adapter_of(keys["model"]) not in (None, adapter):
            raise RequestError(f"model = {keys['model']!r} and adapter = {keys['adapter']!r}: are two adapters")
        if not isinstance(pool := keys.get("pool", adapter is None and llm.pool is not None), bool):
            raise RequestError(f"pool = {shown(pool)}: must be true or false")
        own = {key: value for key, value in keys.items() if key in KNOWN}
        answer = Answer(llm, prompt, replace(params, **own), routing=pool, domain=domain, adapter=adapter, usage=usage,
                        **{"parse_special": parse_special, **_beside(keys, given[0])})
        llm.driver.submit(*answer.requests)
        return name, answer
    except RequestError as error:
        return name, str(error)


def _beside(keys: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields that belong to a prompt alone, or to messages alone."""
    ours, others = (OF_PROMPT, OF_MESSAGES) if what == "prompt" else (OF_MESSAGES, OF_PROMPT)
    if wrong := set(keys) & set(others):
        raise RequestError(f"{min(wrong)!r} does not apply to {what}")
    for key in set(keys) & set(ours):
        kind, words = ours[key]
        if not isinstance(keys[key], kind):
            raise RequestError(f"{key} = {keys[key]!r:.60}: must be {words}")
    return {key: keys[key] for key in ours if key in keys}


def _answer(output: RequestOutput) -> dict[str, Any]:
    def one(choice: RequestOutput) -> dict[str, Any]:
        out: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
        for field in ("logprobs", "prompt_logprobs"):
            if (values := getattr(choice, field)) is not None:
                out[field] = [p and {"token": p.token, "logprob": p.logprob, "top": [list(pair) for pair in p.top]}
                              for p in values]
        return out

    answer = one(output) | {"usage": output.usage} | (
        {"routing": list(output.routing)} if output.routing is not None else {})
    return answer | {"choices": [one(choice) for choice in output.choices]} if output.others else answer


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, text) of the lines that are not blank."""
    with source.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _finished(file: IO[bytes], target: Path) -> list[dict[str, Any]]:
    """The names of the output's whole lines; a torn end is cut off."""
    names: list[dict[str, Any]] = []
    end = file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            keys = json.loads(line)
            names.append({"id": keys["id"]} if "id" in keys else {"line": keys["line"]})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{target}: line {len(names) + 1} is no answer: it is another file") from None
        end += len(line)
    file.truncate(end)
    return names


def write_answer(out: IO[bytes], answer: Mapping[str, Any]) -> None:
    out.write((to_json(answer, ensure_ascii=False) + "\n").encode())
    out.flush()
    os.fsync(out.fileno())
