"""A file of prompts in, a file of answers out: in order, bad lines named, gone on with after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepseek.engine import LLM, SamplingParams
from deepseek.engine.run_batch import KNOWN, OF_MESSAGES, OF_PROMPT, check_files, run_file
from deepseek.errors import ConfigError, DataError, RequestError
from deepseek.files import take_lock
from deepseek.tokenizer import Tokenizer
from tests.helpers.jsonl import write_jsonl

GREEDY = SamplingParams(max_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def llm(tiny_config: Callable, random_model: Callable) -> LLM:
    tokenizer = Tokenizer.train(["the quick brown fox jumps", "0123456789"] * 4, 300)
    return LLM(random_model(tiny_config(vocab_size=tokenizer.vocab_size)), tokenizer=tokenizer, max_num_seqs=2)


def note(told: list[tuple[int, ...]], *progress: int) -> None:
    told.append(progress)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_in_order_and_bad_lines_named(llm: LLM, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"id": "a", "prompt": "the quick", "max_tokens": 9}\n{"prompt": 7}\nnot json\n\n'
                       b'{"id": 4, "messages": [{"role": "user", "content": "fox"}], "n": 2, "logprobs": 1}\n'
                       b'{"id": "e", "prompt": "x", "top_q": 1}\n{"id": "f", "prompt": "x", "top_p": 7}\n'
                       b'{"prompt": "x", "messages": []}\n[]\n{"id": "\\ud800", "prompt": "x"}\n' + b"[" * 200_000
                       + b'\n{"messages": [1, 2]}\n{"messages": []}\n'
                       b'{"id": "h", "prompt": "brown", "max_tokens": 2}\n')
    answered, errors = run_file(llm, source, tmp_path / "out.jsonl", GREEDY)
    got = lines(tmp_path / "out.jsonl")
    assert (answered, errors) == (13, 10) and len(got) == 13
    want = llm.generate(["the quick", "brown"], [SamplingParams(max_tokens=9, temperature=0),
                                                 SamplingParams(max_tokens=2, temperature=0)])
    assert [got[0], got[12]] == [
        {"id": i, "text": o.text, "finish_reason": o.finish_reason, "usage": o.usage}
        for i, o in zip("ah", want, strict=True)]
    assert got[1] == {"line": 2, "error": "prompt = 7: must be a text"}
    assert got[2]["line"] == 3 and got[2]["error"].startswith("not JSON: ")
    assert got[3]["id"] == 4 and len(got[3]["choices"]) == 2 and len(got[3]["logprobs"]) == 5
    assert got[4] == {"id": "e", "error": got[4]["error"]} and "'top_q' is no field" in got[4]["error"]
    assert got[5]["error"] == "top_p = 7: must lie in (0, 1]"
    assert "prompt and messages" in got[6]["error"] and "must be an object" in got[7]["error"]
    assert [got[i]["line"] for i in range(6, 12)] == [8, 9, 10, 11, 12, 13]  # of the file, blank lines counted
    assert "surrogates not allowed" in got[8]["error"] and "not JSON" in got[9]["error"]
    assert all("must be a list of objects, one at least" in got[i]["error"] for i in (10, 11))


def test_goes_on_where_it_stopped(llm: LLM, tmp_path: Path) -> None:
    """Whole lines are kept as they are, a torn one is written anew; the result is that of one go."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, ({"id": i, "prompt": "fox " * i} for i in range(8)))
    run_file(llm, source, out, GREEDY)
    whole = out.read_bytes()
    torn = b"".join(whole.splitlines(keepends=True)[:3])
    for rest in (b"", b'{"id": 3, "te'):
        out.write_bytes(torn.replace(b'"id": 1,', b'"id": 1, "kept": 1,') + rest)
        told: list[tuple[int, ...]] = []
        assert run_file(llm, source, out, GREEDY, partial(note, told)) == (5, 0)
        assert out.read_bytes() == whole.replace(b'"id": 1,', b'"id": 1, "kept": 1,', 1)
        assert told == [(i, 8) for i in range(4, 9)]
    assert run_file(llm, source, out, GREEDY) == (0, 0)
    source.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="has 8 answers for the 1 lines"):
        run_file(llm, source, out, GREEDY)
    write_jsonl(source, ({"id": i or "new", "prompt": "fox"} for i in range(8)))
    with pytest.raises(DataError, match=r"has the answer to \{'id': 0\} where .* asks \{'id': 'new'\}: it belongs to"):
        run_file(llm, source, out, GREEDY)
    assert out.read_bytes() == whole.replace(b'"id": 1,', b'"id": 1, "kept": 1,', 1)
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    for place, target, message in ((tmp_path / "none.jsonl", out, "must be a file"), (tmp_path, out, "must be a file"),
                                   (source, tmp_path, "Is a directory"), (source, tmp_path / "no" / "o", "No such"),
                                   (source, other, "line 1 is no answer: it is another file")):
        with pytest.raises(DataError, match=message):
            run_file(llm, place, target, GREEDY)
    with pytest.raises(RequestError, match="json_schema"):
        run_file(llm, source, tmp_path / "new.jsonl", SamplingParams(json_schema='{"type": "nonsense"}'))
    assert not (tmp_path / "new.jsonl").exists()


def test_one_process_at_a_time_writes_the_output(llm: LLM, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "fox"}\n')
    with out.open("ab") as held:
        take_lock(held, out)
        for work in (partial(check_files, source, out), partial(run_file, llm, source, out, GREEDY)):
            with pytest.raises(ConfigError, match=r"out\.jsonl: another process is writing it"):
                work()
    assert not out.read_bytes() and run_file(llm, source, out, GREEDY) == (1, 0)


@pytest.mark.parametrize("replaced", [False, True])
def test_an_output_deleted_during_the_run(llm: LLM, tmp_path: Path, replaced: bool) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "fox"}\n' * 3)

    def delete(done: int, _: int) -> None:
        out.unlink()
        if replaced:
            out.write_text("")

    with pytest.raises(DataError, match=r"out\.jsonl: was deleted or replaced while answers were written to it"):
        run_file(llm, source, out, GREEDY, delete)
    assert run_file(llm, source, out, GREEDY) == (3, 0) and len(lines(out)) == 3


def test_null_is_not_given(llm: LLM, tmp_path: Path) -> None:
    nulls = dict.fromkeys([*KNOWN, *OF_PROMPT, *OF_MESSAGES, "id", "domain", "messages"])
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "the quick", **nulls}) + "\n" + json.dumps({"prompt": "x", "top_q": None}))
    assert run_file(llm, source, target, GREEDY) == (2, 1)
    first, second = lines(target)
    assert first["line"] == 1 and first["text"] == llm.generate(["the quick"], GREEDY)[0].text
    assert "'top_q' is no field" in second["error"]


def test_lines_say_what_servers_are_told(llm: LLM, tmp_path: Path) -> None:
    hand = "<|begin_of_sentence|><|User|>fox<|Assistant|>"
    asked, said = {"role": "user", "content": "fox"}, {"role": "assistant", "content": "the"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "x", "tools": []}, "'tools' does not apply to prompt"),
        ({"messages": [asked], "parse_special": True}, "'parse_special' does not apply to messages"),
        ({"prompt": "x", "parse_special": "yes"}, "parse_special = 'yes': must be true or false"),
        ({"messages": [asked], "chat_template_kwargs": {"thinking": True}}, "'thinking' is no variable"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: must be given")]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "fox"}]}]},
        {"prompt": hand, "parse_special": True},
        {"messages": [asked, said], "continue_final_message": True},
        {"prompt": hand + "the", "parse_special": True}, *(line for line, _ in wrong)])))
    run_file(llm, source, target, GREEDY)
    parts, raw, open_end, raw_open, *errors = lines(target)
    assert parts["text"] == raw["text"] and open_end["text"] == raw_open["text"]
    for answer, (_, words) in zip(errors, wrong, strict=True):
        assert words in answer["error"]
