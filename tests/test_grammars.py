"""A grammar that takes too much ends its worker, not this process."""

from __future__ import annotations

import json
import os
import signal

import pytest

from deepseek import grammars
from deepseek.grammars import proven

llguidance = pytest.importorskip("llguidance")


@pytest.fixture(autouse=True)
def _anew() -> None:
    proven.cache_clear()


def test_what_compiles_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proven("regex", "[ab]{3}") is None
    monkeypatch.setattr(grammars.WORKERS, "ask", None)  # would fail if it were asked again
    assert proven("regex", "[ab]{3}") is None


def test_what_is_invalid_is_told() -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    for field, source in (("regex", "["), ("grammar", "start: nothing"), ("json_schema", '{"type": "nonsense"}')):
        with pytest.raises(ValueError, match=r".+"):
            grammars.compile_grammar(tokenizer, field, source)


def test_a_crash_is_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with the stack that threads usually have, 2,700 chained rules are a segmentation fault."""
    def crash(question: object, **_: object) -> None:
        raise grammars.WorkerError(-signal.SIGSEGV, 5.0)

    rules = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(2700)) + 'r2700: "y"'
    assert proven("grammar", rules) is None
    proven.cache_clear()
    monkeypatch.setattr(grammars.WORKERS, "ask", crash)
    assert "ended the process that compiles it (status -11)" in str(proven("grammar", rules))


def test_time_and_memory_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "SECONDS", 0.01)
    assert "takes more than 0.01 seconds" in str(proven("regex", "a?" * 4000))
    monkeypatch.setattr(grammars, "SECONDS", 5.0)
    monkeypatch.setattr(grammars, "MEMORY", 64 << 20)  # less than the worker's thread asks for
    assert proven("json_schema", json.dumps({"enum": list(range(20_000))})) is not None
    monkeypatch.undo()
    assert proven("regex", "a+") is None and grammars.WORKERS.owner == os.getpid()
