"""The harness' model class on our engine: ids as Hugging Face's tokenizer makes them, numbers as of one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint import load_model
from deepseek.engine import LLM
from deepseek.errors import RequestError

pytest.importorskip("lm_eval", reason="needs the extra eval (lm-eval)")

from deepseek.evaluate.language_model import EngineLM

QUESTION = "Question: what is 2 + 3?\nA. one\nB. two\nAnswer:"


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def lm(model_folder: Path) -> Iterator[EngineLM]:
    llm = LLM(model_folder, max_num_batched_tokens=48)
    lm = EngineLM(llm, max_length=128)
    yield lm
    llm.close()


@torch.inference_mode()
def direct(lm: EngineLM, ids: list[int], start: int) -> float:
    """The log-probability of ids[start:] after those before."""
    log_TV = lm.llm.model(torch.tensor([ids[:-1]]))[0, start - 1 :].double().log_softmax(-1)
    return float(log_TV[range(len(ids) - start), ids[start:]].sum())


def test_texts_become_the_ids_of_hugging_faces_tokenizer(lm: EngineLM, model_folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra test (transformers)")
    theirs = transformers.AutoTokenizer.from_pretrained(model_folder)
    for text in (QUESTION, "小明有3个苹果", "<|User|>hi<|Assistant|>", "  two\n\nlines "):
        assert lm.tok_encode(text) == theirs.encode(text), text
    begin = lm.llm.bos_id
    assert lm.tok_encode("one", add_special_tokens=True) == [begin, *lm.tok_encode("one", add_special_tokens=False)]


def test_log_likelihoods_are_those_of_one_pass(lm: EngineLM) -> None:
    pairs = [(QUESTION, f" {letter}") for letter in "ABCD"] + [
        ("", "The capital"), ("The capital of France is ", "Paris."), (QUESTION, " two and more of it"),
        ("one two three four " * 32, " five six")]
    got = lm.loglikelihood([Instance(pair) for pair in pairs])
    for (context, continuation), (value, greedy) in zip(pairs, got, strict=True):
        if context == "":
            ids = [lm.prefix_token_id, *lm.tok_encode(continuation, add_special_tokens=False)]
            start = 1
        else:
            ids = lm.tok_encode(context + continuation)
            start = len(lm.tok_encode(context.rstrip()))
        if (cut := len(ids) - lm.max_length - 1) > 0:
            ids, start = ids[cut:], start - cut
        assert abs(value - direct(lm, ids, start)) < 1e-4 and isinstance(greedy, bool)
    assert len(lm.tok_encode(pairs[-1][0])) > lm.max_length


def test_a_long_text_is_scored_in_windows(lm: EngineLM) -> None:
    text = "The capital of France is Paris. What is 2 + 3? " * 12
    ids, most = lm.tok_encode(text), lm.max_length
    assert most < len(ids) < 3 * most
    want = direct(lm, [lm.prefix_token_id, *ids[:most]], 1)
    for start in range(most, len(ids), most):
        stop = min(start + most, len(ids))
        want += direct(lm, ids[stop - most - 1 : stop], most + 1 - (stop - start))
    (got, short) = lm.loglikelihood_rolling([Instance((text,)), Instance(("one",))])
    assert got == pytest.approx(want, abs=1e-3)
    assert short == pytest.approx(direct(lm, [lm.prefix_token_id, *lm.tok_encode("one")], 1), abs=1e-4)


def test_answers_are_greedy_and_end_at_stop_strings(lm: EngineLM) -> None:
    settings = {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
    (text,) = lm.generate_until([Instance((QUESTION, settings))])
    ids = lm.tok_encode(QUESTION)
    for _ in range(20):
        ids.append(int(lm.llm.model(torch.tensor([ids]))[0, -1].argmax()))
    whole = lm.text_tokenizer.decode(ids[len(lm.tok_encode(QUESTION)) :])
    assert text and text == whole.partition("\n\n")[0].partition("<|end_of_sentence|>")[0]
    stop = text[3:5]
    (cut,) = lm.generate_until([Instance((QUESTION, settings | {"until": stop}))])
    assert cut == text.partition(stop)[0]


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_beams": 4, "max_gen_toks": 9}, "num_beams: not known"), ({"max_gen_toks": 128}, "an answer of 128 tokens")])
def test_settings_that_cannot_be_kept(lm: EngineLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lm.generate_until([Instance((QUESTION, settings))])


def test_a_model_without_a_tokenizer(model_folder: Path) -> None:
    with pytest.raises(RequestError, match="must have a tokenizer"):
        EngineLM(LLM(load_model(model_folder)))
