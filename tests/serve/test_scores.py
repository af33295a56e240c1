"""Log-probabilities of what was sent, as lm-evaluation-harness asks for them; sampling fields reach the engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.helpers.servers import KEY, Running


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_is_scored(running: Running, client: openai.OpenAI, most: int) -> None:
    assert running.llm.tokenizer is not None
    ids = running.llm.tokenizer.encode("the quick fox 🦊")
    done = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=most, logprobs=1, echo=True, seed=1,
                                     temperature=0)
    for choice in done.choices:
        said = choice.logprobs
        assert said is not None and said.tokens and said.token_logprobs and said.top_logprobs and said.text_offset
        assert choice.text.startswith("the quick fox 🦊") and len(said.tokens) == len(ids) + most
        assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
        assert all(value is not None and value < 0 for value in said.token_logprobs[1:])
        assert said.text_offset[:2] == [0, len(running.llm.tokenizer.decode(ids[:1]))]
        assert most == 0 or said.text_offset[-1] == len("the quick fox 🦊")
    text = client.completions.create(model="tiny", prompt="the fox", max_tokens=0, echo=True)
    assert text.choices[0].text == "the fox" and text.choices[0].finish_reason == "length"


def test_fields_reach_the_engine(client: openai.OpenAI) -> None:
    ask: Any = dict(model="tiny", messages=[{"role": "user", "content": "fox"}], max_tokens=4, temperature=0)
    done = client.chat.completions.create(**ask, logit_bias={"70": 100}, logprobs=True, extra_body={
        "min_tokens": 4, "prompt_logprobs": 1})
    assert done.choices[0].logprobs is not None and done.choices[0].logprobs.content is not None
    assert len({p.token for p in done.choices[0].logprobs.content}) == 1
    assert done.model_dump()["prompt_logprobs"][0] is None and done.usage is not None
    assert done.usage.completion_tokens == 4
    stopped = client.chat.completions.create(**ask, logit_bias={"70": 100}, extra_body={"stop_token_ids": [70]})
    assert stopped.usage is not None and stopped.usage.completion_tokens == 1


def test_what_no_prompt_can_be_is_refused(client: openai.OpenAI) -> None:
    wrong: list[Any] = [[], [True], [[]]]
    for prompt in wrong:
        with pytest.raises(openai.BadRequestError, match="prompt"):
            client.completions.create(model="tiny", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="x", suffix="y")
