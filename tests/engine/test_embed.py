"""Embeddings run as requests: in pieces, beside others, after stepping back, and equal to the model's own pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek.engine import LLM, SamplingParams
from deepseek.errors import MoEDRError, RequestError
from deepseek.model import CausalLM
from tests.helpers.engines import finish

PROMPTS = [[5 + (i * 7 + j * j) % 80 for j in range(length)] for i, length in enumerate((1, 30, 70, 100, 33))]


@pytest.fixture(scope="module")
def model(tiny_config: Callable, random_model: Callable) -> CausalLM:
    return random_model(tiny_config(vocab_size=90, max_position_embeddings=512))


@torch.inference_mode()
def means(model: CausalLM) -> list[Tensor]:
    return [model.hidden(torch.tensor([ids]))[0].double().mean(0).float() for ids in PROMPTS]


@pytest.mark.parametrize("options", [
    {}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 2}, {"cache_tokens": 192, "max_num_batched_tokens": 24},
    {"prefix_cache": False}], ids=lambda options: "-".join(options) or "plain")
def test_the_mean_of_the_last_hidden_states(model: CausalLM, options: dict) -> None:
    llm = LLM(model, **options)
    for _ in range(2):  # what the prefix cache holds by then has no hidden states
        got, tokens = llm.embed(PROMPTS)
        assert tokens == sum(map(len, PROMPTS))
        for mean_H, want_H in zip(got, means(model), strict=True):
            assert mean_H.dtype == torch.float32
            torch.testing.assert_close(mean_H, want_H, rtol=1e-4, atol=1e-5)
    assert llm.engine.idle and llm.engine.block_manager.available == llm.engine.block_manager.count


def test_a_request_that_steps_back_counts_each_position_once(model: CausalLM) -> None:
    llm = LLM(model, max_num_batched_tokens=16)
    request = llm.pooling_request(PROMPTS[3])
    llm.engine.add(request)
    llm.engine.step()
    llm.engine.step()
    llm.engine.scheduler.preempt(request)
    while request.finish_reason is None:
        llm.engine.step()
    assert llm.engine.scheduler.preempted == 1
    torch.testing.assert_close(request.mean_H, means(model)[3], rtol=1e-4, atol=1e-5)


def test_beside_a_request_that_generates(model: CausalLM) -> None:
    llm = LLM(model, max_num_batched_tokens=12)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    (alone,) = llm.generate([PROMPTS[1]], params)
    requests = llm.requests(PROMPTS[1], params)
    pooled = [llm.pooling_request(prompt) for prompt in PROMPTS]
    finish(llm, *requests, *pooled)
    assert tuple(requests[0].token_ids) == alone.token_ids
    for request, want_H in zip(pooled, means(model), strict=True):
        torch.testing.assert_close(request.mean_H, want_H, rtol=1e-4, atol=1e-5)


def test_what_is_no_number_is_an_error(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    size = model.config.hidden_size
    monkeypatch.setattr(model, "packed", lambda ids_T, *_: torch.full((len(ids_T), size), torch.nan))
    with pytest.raises(MoEDRError, match="not numbers"):
        LLM(model).embed([[9, 8]])


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ([90], "token id 90"), ([5] * 512, "512 tokens")])
def test_prompts_that_cannot_run(model: CausalLM, prompt: list[int], message: str) -> None:
    llm = LLM(model)
    llm.bos_id = None
    with pytest.raises(RequestError, match=message):
        llm.embed([[5], prompt])
