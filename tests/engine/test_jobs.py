"""A file of prompts in, a file of answers out: in order, bad lines named, gone on with after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepseek.engine import LLM, SamplingParams
from deepseek.engine.jobs import run_file
from deepseek.errors import DataError
from deepseek.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def llm(tiny_config: Callable, random_model: Callable) -> LLM:
    tokenizer = Tokenizer.train(["the quick brown fox jumps", "0123456789"] * 4, 300)
    return LLM(random_model(tiny_config(vocab_size=tokenizer.vocab_size)), tokenizer=tokenizer, batch_size=2)


def note(told: list[tuple[int, ...]], *progress: int) -> None:
    told.append(progress)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_in_order_and_bad_lines_named(llm: LLM, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"id": "a", "prompt": "the quick", "max_tokens": 9}\n{"prompt": 7}\nnot json\n\n'
                       b'{"id": 4, "messages": [{"role": "user", "content": "fox"}], "n": 2, "logprobs": 1}\n'
                       b'{"id": "e", "prompt": "x", "top_q": 1}\n{"id": "f", "prompt": "x", "top_p": 7}\n'
                       b'{"prompt": "x", "messages": []}\n[]\n{"id": "h", "prompt": "brown", "max_tokens": 2}\n')
    answered, errors = run_file(llm, source, tmp_path / "out.jsonl", GREEDY)
    got = lines(tmp_path / "out.jsonl")
    assert (answered, errors) == (9, 6) and len(got) == 9
    want = llm.generate(["the quick", "brown"], [SamplingParams(max_tokens=9, temperature=0),
                                                 SamplingParams(max_tokens=2, temperature=0)])
    assert [got[0], got[8]] == [
        {"id": i, "text": o.text, "finish_reason": o.finish_reason, "usage": o.usage}
        for i, o in zip("ah", want, strict=True)]
    assert got[1] == {"line": 2, "error": "prompt = 7: must be a text"}
    assert got[2]["line"] == 3 and got[2]["error"].startswith("not JSON: ")
    assert got[3]["id"] == 4 and len(got[3]["choices"]) == 2 and len(got[3]["logprobs"]) == 5
    assert got[4] == {"id": "e", "error": got[4]["error"]} and "'top_q' is no field" in got[4]["error"]
    assert got[5]["error"] == "top_p = 7: must lie in (0, 1]"
    assert "prompt and messages" in got[6]["error"] and "must be an object" in got[7]["error"]


def test_goes_on_where_it_stopped(llm: LLM, tmp_path: Path) -> None:
    """Whole lines are kept as they are, a torn one is written anew; the result is that of one go."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": "fox " * i}) + "\n" for i in range(8)))
    run_file(llm, source, out, GREEDY)
    whole = out.read_bytes()
    torn = b"".join(whole.splitlines(keepends=True)[:3])
    for rest in (b"", b'{"id": 3, "te'):
        out.write_bytes(torn.replace(b'"id": 1', b'"id": "kept"') + rest)
        told: list[tuple[int, ...]] = []
        assert run_file(llm, source, out, GREEDY, partial(note, told)) == (5, 0)
        assert out.read_bytes() == whole.replace(b'"id": 1,', b'"id": "kept",', 1)
        assert told == [(i, 8) for i in range(4, 9)]
    assert run_file(llm, source, out, GREEDY) == (0, 0)
    source.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="has 8 answers for the 1 lines"):
        run_file(llm, source, out, GREEDY)
    with pytest.raises(DataError, match="No such file"):
        run_file(llm, tmp_path / "none.jsonl", out, GREEDY)
