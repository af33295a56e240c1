"""Continuations are scored as the model's own pass scores them, and a prompt that several share runs once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepseek.engine import LLM
from deepseek.engine.scoring import Score, score
from deepseek.errors import RequestError
from deepseek.model import CausalLM

CONTEXTS = [[3 + (i * 5 + j * j) % 80 for j in range(length)] for i, length in enumerate((1, 40, 70, 110))]
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in ([7], [8], [9, 10, 11], [9, 10, 12])]


@pytest.fixture(scope="module")
def model(tiny_config: Callable, random_model: Callable) -> CausalLM:
    return random_model(tiny_config(vocab_size=90, max_position_embeddings=128))


@torch.inference_mode()
def direct(model: CausalLM, context: list[int], continuation: list[int]) -> Score:
    """By one pass over all ids."""
    log_TV = model(torch.tensor([[*context, *continuation][:-1]]))[0, len(context) - 1 :].double().log_softmax(-1)
    return Score(float(log_TV[range(len(continuation)), continuation].sum()),
                 log_TV.argmax(-1).tolist() == continuation)


@pytest.mark.parametrize("options", [
    {}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 1}, {"cache_tokens": 160, "max_num_batched_tokens": 24},
    {"prefix_cache": False}], ids=lambda options: "-".join(options) or "plain")
def test_scores_are_those_of_one_pass(model: CausalLM, options: dict) -> None:
    llm, noted = LLM(model, **options), {}
    best = direct(model, CONTEXTS[2], [7])
    greedy = [int(model(torch.tensor([CONTEXTS[2]]))[0, -1].argmax())]
    for _ in range(2):  # then with all of it in the prefix cache
        got = score(llm, [*PAIRS, (CONTEXTS[2], greedy)], on_score=noted.__setitem__)
        assert [noted[place] for place in range(len(got))] == got and got[-1].greedy
        for one, pair in zip(got, PAIRS, strict=False):
            want = direct(model, *pair)
            assert abs(one.logprob - want.logprob) < 1e-4 and one.greedy == want.greedy
    assert got[8].logprob == pytest.approx(best.logprob, abs=1e-4)
    assert llm.engine.idle and llm.engine.block_manager.available == llm.engine.block_manager.count


def test_a_shared_prompt_runs_once(model: CausalLM) -> None:
    llm = LLM(model)
    context = CONTEXTS[3]
    score(llm, [(context, [token]) for token in range(4, 8)])
    assert llm.engine.stats.computed == len(context) + 3  # of the other three the last token alone
    begun = llm.engine.stats.computed
    score(llm, [(CONTEXTS[2] + [i, 2, 3], [4]) for i in range(5, 15)])
    assert llm.engine.stats.computed - begun == len(CONTEXTS[2]) + 10 * 3


def test_examples_questions_and_choices_run_once(model: CausalLM) -> None:
    """Questions behind the same examples: each one's choices share the question, all questions the examples."""
    llm, examples = LLM(model), [5 + i % 70 for i in range(64)]
    questions = [examples + [10 + q] * 16 for q in range(3)]
    score(llm, [(question, [token]) for question in questions for token in range(4, 8)])
    assert llm.engine.stats.computed == 64 + 3 * 16 + 3 * 3  # of all but the first choice the last token alone


def test_the_whole_context_and_one_token(model: CausalLM) -> None:
    ids = [5 + i % 70 for i in range(129)]
    (got,) = score(LLM(model), [(ids[:1], ids[1:])])
    assert got.logprob == pytest.approx(direct(model, ids[:1], ids[1:]).logprob, abs=1e-3)


@pytest.mark.parametrize(("pair", "message"), [
    (([], [3]), "context: must have"), (([3], []), "continuation: must have"), (([3], [90]), "token id 90"),
    (([3] * 100, [4] * 30), "has 130 tokens: must be at most 129")])
def test_pairs_that_cannot_be_scored(model: CausalLM, pair: tuple[list[int], list[int]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        score(LLM(model), [([3], [4]), pair])
