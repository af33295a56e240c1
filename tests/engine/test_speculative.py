"""Drafts change no token, params or sampled, in pieces or after stepping back; right ones save steps."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepseek.checkpoint import load_model
from deepseek.engine import LLM
from deepseek.engine.speculative import TERM, TRIAL, AdaptiveDrafting, Trial
from deepseek.model import CausalLM
from deepseek.ops.native import native
from deepseek.tokenizer import Tokenizer
from tests.helpers.engines import finish, nf4, params


@pytest.fixture(scope="module")
def model(tiny_config: Callable, random_model: Callable, tmp_path_factory: Any) -> CausalLM:
    """Of few tokens, so that a random module is right now and then."""
    place = tmp_path_factory.mktemp("speculative")
    made = random_model(tiny_config(vocab_size=12, max_position_embeddings=1024, num_nextn_predict_layers=1))
    return load_model(nf4(made, place))


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(12) for _ in range(draw.choice([1, 5, 130]))] for _ in range(count)]


@pytest.mark.skipif(native is None, reason="exact in any company with the native kernels alone")
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 9},
                                     {"cache_tokens": 640}], ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 5, "logprobs": 1}, {"n": 2, "seed": 1,
                                      "temperature": 1.0}, {"routed": True}], ids=str)
def test_drafts_change_nothing(model: CausalLM, options: dict[str, Any], sampling: dict[str, Any],
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "drafts", lambda self: True)
    want = LLM(model, speculate=False).generate(prompts(6), params(40, **sampling))
    llm = LLM(model, **options)
    got = llm.generate(prompts(6), params(40, **sampling))
    assert got == want
    if sampling.get("routed"):
        assert all(torch.equal(a.routed, b.routed) for a, b in zip(got, want, strict=True))
    stats = llm.engine.drafter.stats
    assert 0 < stats.accepted < stats.drafted
    llm.engine.block_manager.check_integrity([])
    assert llm.engine.block_manager.available == llm.engine.block_manager.count


def test_right_drafts_save_steps(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that knows the future: two tokens a step, and the same ones."""
    want = LLM(model, speculate=False).generate([[3, 1, 4]], params(40))[0]
    llm = LLM(model)
    drafter = llm.engine.drafter
    choice = drafter.adaptive.of(1)
    monkeypatch.setattr(choice, "drafts", lambda: True)

    def oracle(run: Any) -> None:
        for request, chunk, _ in run:
            request.sequence.num_drafted_tokens = chunk.past + chunk.tokens
            at = len(request.token_ids)
            request.sequence.draft_token = want.token_ids[at] if at < 40 else 0

    monkeypatch.setattr(drafter, "draft", oracle)
    assert llm.generate([[3, 1, 4]], params(40))[0] == want
    assert llm.engine.stats.steps == 1 + 20  # the prompt, then 39 tokens two by two
    assert drafter.stats.acceptance >= 0.95  # the last one is of a token that is not wanted any more


def test_the_module_sees_every_position_with_the_token_that_follows(model: CausalLM, monkeypatch: Any) -> None:
    """What it computes piece by piece is what `mtp_hidden` computes of the whole text."""
    llm = LLM(model, max_num_batched_tokens=50)
    seen: list[torch.Tensor] = []
    packed = llm.model.mtp_packed
    monkeypatch.setattr(llm.model, "mtp_packed", lambda *args: seen.append(packed(*args)) or seen[-1])
    monkeypatch.setattr(llm.engine.drafter.adaptive.of(1), "drafts", lambda: True)
    prompt = prompts(3)[2] + [1] * 60
    output = llm.generate([prompt], params(max_tokens=10))[0]
    ids = torch.tensor([prompt + list(output.token_ids)])
    with torch.no_grad():
        h_BTH = model.hidden(ids[:, :-1])
        want_TH = model.mtp_hidden(0, h_BTH, ids[:, 1:])[0]
    got_TH = torch.cat(seen)
    first = len(prompt) - 1  # from there on in the other order, whose rounding of activations to 8 bits differs
    assert torch.allclose(got_TH[:first], want_TH[:first], atol=1e-4) and len(got_TH) >= len(prompt) + 5
    later, want = got_TH[first:], want_TH[first : len(got_TH)]
    assert (later - want).norm() < 0.1 * want.norm()


def test_the_faster_kind_of_step_is_taken_and_tried_again() -> None:
    for faster in (True, False):
        choice, taken = AdaptiveDrafting().of(4), []
        for _ in range(TERM):
            drafts = choice.drafts()
            taken.append(drafts)
            choice.add(drafts, 1.0 if drafts == faster else 1.5, 4)
        assert taken[: 2 * TRIAL] == [True] * TRIAL + [False] * TRIAL
        assert set(taken[2 * TRIAL :]) == {faster} and choice.drafts()
    gain = AdaptiveDrafting()
    assert gain.of(2) is gain.of(3) is not gain.of(4)


def test_without_a_module_there_are_no_drafts(tiny_config: Callable, random_model: Callable) -> None:
    assert LLM(random_model(tiny_config())).engine.drafter is None


def test_a_constraint_may_end_the_text_on_a_draft(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask after a token is awaited before the draft behind it counts; the request leaves at once where it ends."""
    pytest.importorskip("llguidance", reason="needs llguidance")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = Tokenizer(json.dumps({"model": {"type": "BPE", "vocab": {c: i for i, c in enumerate("abcdefghijkl")},
                                                "merges": []}, "decoder": level, "pre_tokenizer": level}))
    asked = params(regex="[a-f]{20}", max_tokens=30)
    want = LLM(model, tokenizer=tokenizer, speculate=False).generate([[3, 1, 4]], asked)[0]
    assert want.finish_reason == "stop" and len(want.token_ids) == 20
    llm = LLM(model, tokenizer=tokenizer)
    drafter = llm.engine.drafter
    assert drafter is not None
    monkeypatch.setattr(drafter.adaptive.of(1), "drafts", lambda: True)

    def oracle(run: Any) -> None:
        for request, chunk, _ in run:
            request.sequence.num_drafted_tokens = chunk.past + chunk.tokens
            request.sequence.draft_token = want.token_ids[min(len(request.token_ids), 19)]

    monkeypatch.setattr(drafter, "draft", oracle)
    request, = llm.requests([3, 1, 4], asked)
    slept = request.constraint.advance
    monkeypatch.setattr(request.constraint, "advance", lambda token: (time.sleep(0.001), slept(token))[1])
    finish(llm, request)
    assert request.text == want.text and request.finish_reason == "stop" and drafter.stats.accepted > 0
    assert llm.engine.stats.finished == 1 and not llm.engine.scheduler.running
