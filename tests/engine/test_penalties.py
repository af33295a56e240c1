"""Penalties, biases, minimal lengths and log-probabilities of prompts against loops over the model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig
from deepseek.engine import LLM, SamplingParams
from deepseek.engine.sampler import Logprob, logprobs
from deepseek.errors import RequestError
from deepseek.model import CausalLM
from deepseek.ops.native import native
from deepseek.tokenizer import Tokenizer
from tests.helpers.engines import nf4

PROMPTS = [[7, 8, 9, 8, 7], [20 + i for i in range(60)], [20 + i for i in range(40)], [9] * 3]
SMALL: dict[str, Any] = {"max_num_batched_tokens": 7, "max_num_seqs": 3, "cache_tokens": 256}


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM], tmp_path_factory: Any
          ) -> CausalLM:
    folder = tmp_path_factory.mktemp("penalties")
    own = random_model(tiny_config(vocab_size=261, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=1))
    return load_model(nf4(own, folder))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([], 261)


@torch.inference_mode()
def loop(model: CausalLM, prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    """Greedy, as OpenAI and vLLM define the fields, written down without the engine."""
    cache = model.new_cache(1, len(prompt) + params.max_tokens)
    logits_V = model(torch.tensor([prompt]), cache=cache, attn_impl="naive", last_only=True)[0, -1]
    out: list[int] = []
    while len(out) < params.max_tokens:
        logits = logits_V.float().tolist()
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        if len(out) < params.min_tokens:
            for token in (1, *params.stop_token_ids):
                logits[token] = float("-inf")
        for token in range(len(logits)):
            if token in prompt or token in out:
                more = params.repetition_penalty
                logits[token] = logits[token] / more if logits[token] > 0 else logits[token] * more
            if token in out:
                logits[token] -= params.frequency_penalty * out.count(token) + params.presence_penalty
        out.append(max(range(len(logits)), key=lambda token: logits[token]))
        if out[-1] in (1, *params.stop_token_ids):
            break
        logits_V = model(torch.tensor([out[-1:]]), cache=cache, attn_impl="absorbed", last_only=True)[0, -1]
    return tuple(out)


@pytest.mark.skipif(native is None, reason="exact in any company with the native kernels alone")
@pytest.mark.parametrize("fields", [
    {"presence_penalty": 2.0}, {"frequency_penalty": 1.5}, {"frequency_penalty": -2.0},
    {"logit_bias": {"11": 100, 12: 99.5}, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"logit_bias": {1: 100}, "min_tokens": 4}, {"logit_bias": {30: 100}, "stop_token_ids": [30], "min_tokens": 2},
    {"repetition_penalty": 1.7, "presence_penalty": 1.0, "frequency_penalty": 0.3}])
def test_greedy_tokens_are_those_of_the_rules(model: CausalLM, fields: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, **fields)
    got = LLM(model, **SMALL).generate(PROMPTS, params)
    assert [one.token_ids for one in got] == [loop(model, prompt, params) for prompt in PROMPTS]


def test_a_mixture_is_penalised_by_what_it_said(model: CausalLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, logit_bias={11: 9}, presence_penalty=2, frequency_penalty=2)
    assert LLM(model).generate_ensemble(PROMPTS[:1] * 2, params=params).token_ids == loop(model, PROMPTS[0], params)


def test_stop_strings_and_ids_count_after_min_tokens(model: CausalLM, tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab")
    llm = LLM(model, tokenizer=tokenizer)
    params: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "logit_bias": {a: 100}}
    [out] = llm.generate([[9]], SamplingParams(**params, stop=("a",), min_tokens=3))
    assert (out.text, len(out.token_ids), out.finish_reason) == ("aaa", 4, "stop")
    [out] = llm.generate([[9]], SamplingParams(**params, stop_token_ids=(a,), min_tokens=1))
    assert (out.text.endswith("a"), out.token_ids[-1], out.finish_reason) == (False, a, "stop")
    [out] = llm.generate([[9]], SamplingParams(max_tokens=1, temperature=0, logit_bias={b: 100}))
    assert out.text == "b"


def test_special_tokens_are_shown_where_asked(model: CausalLM, tokenizer: Tokenizer) -> None:
    llm = LLM(model, tokenizer=tokenizer)
    for skip, text in ((True, ""), (False, "<|pad|><|pad|>")):
        assert llm.generate([[9]], SamplingParams(max_tokens=2, temperature=0, logit_bias={2: 100},
                                                  skip_special_tokens=skip))[0].text == text


@torch.no_grad()
def scores(model: CausalLM, prompt: list[int], top: int) -> tuple[Logprob | None, ...]:
    rows = model.lm_head(model.hidden(torch.tensor([prompt]))[0]).float()
    return (None, *(logprobs(row, token, top) for row, token in zip(rows, prompt[1:], strict=False)))


@pytest.mark.skipif(native is None, reason="exact in any company with the native kernels alone")
@pytest.mark.parametrize("options", [{}, SMALL, SMALL | {"prefix_cache": False}])
def test_log_probabilities_of_prompts(model: CausalLM, options: dict[str, Any]) -> None:
    """To the bit those of the model alone: in pieces, in company, stepping back, where the prefix cache knows them."""
    llm = LLM(model, **options)
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2, ignore_eos=True)
    llm.generate(PROMPTS, SamplingParams(max_tokens=3, temperature=0))
    for _ in range(2):
        got = llm.generate(PROMPTS * 2, params)
        assert [one.prompt_logprobs for one in got] == [scores(model, prompt, 2) for prompt in PROMPTS * 2]


def test_a_prompt_alone(model: CausalLM) -> None:
    llm = LLM(model)
    [out] = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=0, prompt_logprobs=0, n=2))
    assert [(one.token_ids, one.text, one.finish_reason) for one in out.choices] == [((), "", "length")] * 2
    assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == 5 and out.usage["completion_tokens"] == 0
    assert llm.generate_ensemble(PROMPTS[:2], params=SamplingParams(max_tokens=0)).token_ids == ()
    assert llm.engine.idle


def test_where_the_text_of_a_token_begins(model: CausalLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
                                          ) -> None:
    ids = iter(tokenizer.encode("a🙂bc"))
    monkeypatch.setattr("deepseek.engine.request.sample", lambda *_: next(ids))
    [out] = LLM(model, tokenizer=tokenizer).generate([[9]], SamplingParams(max_tokens=7, logprobs=0, stop=("bcd",)))
    assert out.logprobs is not None and [one.offset for one in out.logprobs] == [0, 1, 1, 1, 1, 2, 3]


@pytest.mark.parametrize(("fields", "message"), [
    ({"presence_penalty": 2.1}, "presence_penalty = 2.1: must lie in"), ({"frequency_penalty": None}, "must lie in"),
    ({"logit_bias": {3: 101}}, "logit_bias = .*-100 to 100"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": [3]}, "logit_bias"), ({"logit_bias": {-1: 0}}, "logit_bias"),
    ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens = 9: must be an integer from 0 to max_tokens \(8\)"),
    ({"stop_token_ids": 3}, "stop_token_ids"), ({"stop_token_ids": (True,)}, "stop_token_ids"),
    ({"skip_special_tokens": 1}, "skip_special_tokens"), ({"prompt_logprobs": 101}, "prompt_logprobs = 101"),
    ({"max_tokens": -1}, "max_tokens = -1: must be an integer >= 0")])
def test_impossible_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize("fields", [{"logit_bias": {261: 1}}, {"stop_token_ids": (261,)}])
def test_ids_beyond_the_vocabulary(model: CausalLM, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"token id 261: must lie in the vocabulary 0\.\.260"):
        LLM(model).generate([[9]], SamplingParams(**fields))
