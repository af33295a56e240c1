"""JSON schemas, regular expressions and Lark grammars of clients, compiled by llguidance within limits.

A grammar can be a program against the one who compiles it: 1,000 references in a chain overflow the stack, "a?"
100,000 times takes gigabytes, an ambiguous rule takes seconds a token. So its size is bounded before anything reads
it; a worker process compiles it first and takes its first mask, within limits of time and memory; and only what has
passed is compiled here, on a thread with the same large stack. What a mask may cost is bounded by the library's limits:
with DeepSeek-V3's vocabulary an ambiguous rule such as `s: s s s | s s | /[a-z ]/` may take 0.5 s a token before they
end it, and a schema of 60 optional fields must not be refused; so masks are computed beside the engine's steps
(engine/constraint.py).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .workers import WorkerError, Workers, serve

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

BYTES_AT_MOST = {"json_schema": 256 << 10, "regex": 8 << 10, "grammar": 64 << 10}
PATTERN_BYTES = 8 << 10  # of a schema's patterns, of a grammar's longest line: automata grow with their square
STACK = 256 << 20  # 20,000 chained rules need less; 2,700 need more than the usual 8 MiB
SECONDS, MEMORY = 5.0, 1 << 30  # of the worker
LIMITS: Any = {"step_max_items": 50_000, "max_items_in_row": 2_000, "step_lexer_fuel": 200_000,
               "initial_lexer_fuel": 500_000, "max_lexer_states": 50_000, "verbose_errors": False}
# White space without a bound lets a model write it for ever. A schema's `x-guidance` may set another pattern.
JSON_DEFAULTS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,40}"}
WORKERS = Workers(__name__)


def compile_grammar(tokenizer: LLTokenizer, field: str, source: str) -> LLMatcher:
    """A matcher of `source`. field: json_schema (as JSON text), regex or grammar (Lark).

    Raises ValueError for what is too large, invalid, or beyond the limits of time and memory.
    """
    _check_size(field, source)
    if problem := proven(field, source):
        raise ValueError(problem)
    return _compile(tokenizer, field, source)


def _check_size(field: str, source: str) -> None:
    if (size := len(source.encode())) > (most := BYTES_AT_MOST[field]):
        raise ValueError(f"has {size:,} bytes: must be at most {most:,}")
    patterns = sum(map(len, re.findall(r'"pattern(?:Properties)?"\s*:\s*("(?:[^"\\]|\\.)*"|\{)', source))) \
        if field == "json_schema" else max(map(len, source.splitlines()), default=0)
    if patterns > PATTERN_BYTES:
        raise ValueError(f"has regular expressions of {patterns:,} characters: must be at most {PATTERN_BYTES:,}")


@lru_cache(1024)
def proven(field: str, source: str) -> str | None:
    """What is wrong with a grammar, None where it compiles within the limits."""
    try:
        return WORKERS.ask({"field": field, "source": source}, seconds=SECONDS, memory=MEMORY)["problem"]
    except WorkerError as ended:
        return f"takes more than {ended.seconds:g} seconds to compile" if ended.late else (
            f"ended the process that compiles it (status {ended.status}): it nests too deeply or takes more than "
            f"{MEMORY >> 20:,} MiB")


def work() -> None:
    """A worker, on a vocabulary of bytes: what a grammar takes to compile does not depend on the vocabulary."""
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        try:
            _compile(tokenizer, asked["field"], asked["source"]).compute_logit_bias()
        except (TypeError, ValueError, RecursionError, MemoryError) as error:
            return {"problem": str(error) or type(error).__name__}
        return {"problem": None}

    serve(answer)


def _compile(tokenizer: LLTokenizer, field: str, source: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    def compiled() -> LLMatcher:
        if field == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(source, defaults=JSON_DEFAULTS)
        else:
            grammar = (LLMatcher.grammar_from_regex if field == "regex" else LLMatcher.grammar_from_lark)(source)
        return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))

    matcher = _with_stack(compiled)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


_stack_lock = threading.Lock()


def _with_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """What `work` returns or raises, run on a thread with a large stack."""
    with _stack_lock:  # the size is a setting of the process; a pool starts its thread at the first submission
        usual = threading.stack_size(STACK)
        try:
            pool = ThreadPoolExecutor(1)
            future = pool.submit(work)
        finally:
            threading.stack_size(usual)
    with pool:
        return future.result()
