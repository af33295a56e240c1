"""Generation against hand-written loops: greedy, sampled, batched, streamed; stop strings; limits; errors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.atlas import Atlas, ExpertUsage
from deepseek.checkpoint import save_model
from deepseek.config import ModelConfig
from deepseek.convert import quantize
from deepseek.engine import LLM, RequestOutput, SamplingParams, request
from deepseek.engine.text_stream import StopStringMatcher
from deepseek.errors import ConfigError, NotFoundError, RequestError
from deepseek.model import CausalLM, RoutingRecord
from deepseek.quant.native_stack import NativeStack
from deepseek.tokenizer import Tokenizer
from tests.helpers.operations import natively

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
TEXT = "naïve café 世界 – 🙂! 한국어"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Five special tokens and the 256 bytes: every character beyond ASCII is spread over several tokens."""
    return Tokenizer.train([], 261)


@pytest.fixture
def llm(tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM], tokenizer: Tokenizer) -> LLM:
    return LLM(random_model(tiny_config(vocab_size=261, bos_token_id=0, eos_token_id=1)), tokenizer=tokenizer)


@pytest.fixture
def says(llm: LLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`says(text)`: from here on the model's samples spell this text and then end it, prompt after prompt."""

    def script(text: str, then: Sequence[int] = (1,)) -> None:
        ids = [*tokenizer.encode(text), *then]
        position: dict[torch.Generator, Iterator[int]] = {}

        def scripted(logits_V: Any, params: Any, generator: torch.Generator, seen_V: Any) -> int:
            return next(position.setdefault(generator, iter(ids)))

        monkeypatch.setattr(request, "sample", scripted)

    return script


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 261) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def greedy_loop(model: CausalLM, prompt: list[int], steps: int) -> tuple[int, ...]:
    """The slow twin: the whole sequence anew for every token, no cache, no batch."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tuple(ids[len(prompt):])


# ---- the same tokens as the slow twin -------------------------------------------------------------------------------


def test_print_says_what_an_llm_holds(llm: LLM, tmp_path: Path) -> None:
    folder = save_model(llm.model, tmp_path / "model", tokenizer=llm.tokenizer,
                        add=lambda place: Atlas.built_in(llm.model.config, ["law_expert", "x"]).save(place))
    lines = str(LLM(folder)).splitlines()
    assert lines[0].startswith(f"LLM of {folder}: ") and " parameters, 3 layers, 2 of them with 16 exp" in lines[0]
    assert lines[0].endswith("; float32 on cpu") and lines[1] == "  context: 256 tokens"
    assert lines[2].startswith("  tokenizer: 261 tokens, with") and lines[3:] == ["  experts by name: law_expert, x"]
    quantize(folder, tmp_path / "int8", "int8")
    small = LLM(tmp_path / "int8", expert_memory="1MiB")
    assert "; int8 on cpu\n" in repr(small) and "expert memory: 1048576 bytes" in repr(small)
    small.close()
    assert repr(small).endswith("\n  closed")
    alone = repr(LLM(llm.model)).splitlines()
    assert alone[0].startswith("LLM of a model in memory: ") and "none, so prompts are token ids" in alone[2]
    assert alone[3] == "  experts by name: none"


def test_a_batch_of_mixed_lengths_equals_the_uncached_loop_and_each_prompt_alone(llm: LLM) -> None:
    """Logits of a padded row differ from those of the row alone by rounding (next test); greedy tokens are equal
    unless two logits lie within it, which among these 192 choices none do."""
    prompts = random_prompts(16, longest=20)
    outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy_loop(llm.model, prompt, 12)
        assert llm.generate([prompt], GREEDY) == [output]
        assert output.usage == {"prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12}


def test_results_do_not_depend_on_how_prompts_fall_into_batches(llm: LLM) -> None:
    """Sampled rows have generators of their own; rows end at different times (eos and limits)."""
    prompts = random_prompts(11, longest=9)
    params = [SamplingParams(max_tokens=3 + 2 * i, temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=i)
              for i in range(11)]
    together = llm.generate(prompts, params)
    assert len({len(output.token_ids) for output in together}) > 5
    assert together == [llm.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert together == LLM(llm.model, tokenizer=llm.tokenizer, max_num_seqs=4).generate(prompts, params)


def test_seeds(llm: LLM) -> None:
    def run(seed: int | None) -> RequestOutput:
        return llm.generate(["abc"], SamplingParams(max_tokens=20, temperature=2.0, seed=seed, ignore_eos=True))[0]

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)


def test_repetition_penalty_sees_prompt_and_output(llm: LLM) -> None:
    """So strong a penalty forbids every token that was seen: all tokens are new."""
    prompt = random_prompts(1, longest=20, seed=5)[0]
    params = SamplingParams(max_tokens=40, temperature=0, repetition_penalty=1e6, ignore_eos=True)
    out = llm.generate([prompt], params)[0].token_ids
    assert len(set(out)) == 40 and not set(out) & set(prompt)


# ---- where a text ends ----------------------------------------------------------------------------------------------


def test_end_of_sequence_ends_the_text_and_is_not_in_it(llm: LLM, says: Callable[..., None]) -> None:
    says(TEXT)
    output = llm.generate(["x"], SamplingParams(max_tokens=99))[0]
    assert (output.text, output.finish_reason, output.token_ids[-1]) == (TEXT, "stop", 1)
    says(TEXT, then=(1, *b"...."))
    output = llm.generate(["x"], SamplingParams(max_tokens=len(TEXT.encode()) + 3, ignore_eos=True))[0]
    assert output.finish_reason == "length" and len(output.token_ids) == len(TEXT.encode()) + 3
    assert output.text.startswith(TEXT) and len(output.text) == len(TEXT) + 2


def test_max_tokens_in_the_middle_of_a_character(llm: LLM, says: Callable[..., None]) -> None:
    says("a世")
    output = llm.generate(["x"], SamplingParams(max_tokens=3))[0]
    assert (output.text, output.finish_reason) == ("a\ufffd", "length")


@pytest.mark.parametrize(("stop", "text"), [
    (("世界",), "naïve café "), (("zebra", "é"), "naïve caf"), (("n",), ""), (("ïvé", "ïve"), "na"),
    (("absent",), TEXT), (("어",), TEXT[:-1]), (("어 ",), TEXT), (("café 世界 – 🙂!", "fé"), "naïve ca")])
def test_stop_strings(llm: LLM, says: Callable[..., None], stop: tuple[str, ...], text: str) -> None:
    says(TEXT)
    params = SamplingParams(max_tokens=99, stop=stop)
    output = llm.generate(["x"], params)[0]
    assert (output.text, output.finish_reason) == (text, "stop")
    assert (output.token_ids[-1] == 1) == (text == TEXT)
    assert "".join(llm.stream("x", params)) == text


def test_stop_text_does_not_depend_on_the_pieces() -> None:
    """Against a twin that looks at the whole text, over random texts, stops and cuts."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        ends = [(end, -len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
        end, minus_length = min(ends, default=(len(text), 0))  # the first to be complete; of these the longest
        expected = text[: end + minus_length]
        gate, out = StopStringMatcher(stops), ""
        while text and not gate.stopped:
            n = rng.randint(1, 4)
            out += gate.push(text[:n])
            assert expected.startswith(out)
            text = text[n:]
        assert gate.stopped == bool(ends)
        assert out + gate.flush() == expected


def test_the_end_of_the_context_is_a_length(llm: LLM) -> None:
    prompt = random_prompts(1, longest=1)[0] * 250
    output, other = llm.generate([prompt, prompt[:7]], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
    assert len(output.token_ids) == 6 and output.usage["total_tokens"] == 256 and output.finish_reason == "length"
    assert len(other.token_ids) == 50


# ---- streaming and chat ---------------------------------------------------------------------------------------------


def test_a_stream_adds_up_to_the_text_and_comes_in_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=2)
    for prompt in ("def f(", "世"):
        pieces = list(llm.stream(prompt, params))
        assert "".join(pieces) == llm.generate([prompt], params)[0].text
        assert len(pieces) > 3 and all(pieces)


def test_a_stream_never_cuts_a_character(llm: LLM, says: Callable[..., None]) -> None:
    says(TEXT)
    assert list(llm.stream("x", SamplingParams(max_tokens=99))) == list(TEXT)


def test_a_stream_runs_only_as_far_as_it_is_read(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, says: Callable[..., None]
) -> None:
    says("abcdef")
    calls = []
    packed = llm.model.packed
    monkeypatch.setattr(llm.model, "packed", lambda *args, **named: calls.append(1) or packed(*args, **named))
    stream = llm.stream("x", SamplingParams(max_tokens=99))
    assert next(stream) == "a" and next(stream) == "b" and len(calls) == 2


def test_chat_goes_through_the_template(llm: LLM, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi <|User|>"}]
    ids = tokenizer.encode_chat(messages)
    assert llm.encode(messages) == ids and ids.count(tokenizer.encode("<|User|>", special=True)[0]) == 1
    assert llm.chat(messages, GREEDY) == llm.generate([ids], GREEDY)[0]


@pytest.mark.filterwarnings("ignore:a prompt spells out")
def test_control_tokens_of_a_raw_prompt_count_where_they_are_asked_for(llm: LLM, tokenizer: Tokenizer) -> None:
    hand = tokenizer.chat([{"role": "user", "content": "hi"}])
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert llm.encode(hand, parse_special=True) == ids  # one begin token, not two
    assert llm.encode("<|User|>hi<|Assistant|>", parse_special=True) == ids
    assert llm.generate([hand], GREEDY, parse_special=True) == llm.generate([ids], GREEDY)
    assert "".join(llm.stream(hand, GREEDY, parse_special=True)) == llm.generate([ids], GREEDY)[0].text
    assert llm.requests(hand, GREEDY, parse_special=True)[0].prompt_ids == ids
    want, = llm.generate([ids], GREEDY)
    assert llm.generate_ensemble([hand, hand], None, GREEDY, parse_special=True).token_ids == want.token_ids
    with pytest.warns(DeprecationWarning, match="LLM.mix is deprecated: use LLM.generate_ensemble"):
        assert llm.mix([hand, hand], None, GREEDY, parse_special=True).token_ids == want.token_ids
    plain = llm.encode(hand)
    assert plain[0] == tokenizer.bos_id and all(i >= 5 for i in plain[1:])


def test_control_tokens_that_do_not_count_are_warned_of_once(llm: LLM) -> None:
    llm.tokenizer = Tokenizer.train([], 261)  # one that has not warned yet
    with pytest.warns(UserWarning, match=r"control token '<\|User\|>', which is ordinary text here"):
        llm.encode("a <|User|>")
    llm.encode("a <|User|>")  # said once: a second warning would be an error
    llm.encode("<p>no token</p>")


def test_tools_variables_and_control_tokens_in_every_function(llm: LLM, tokenizer: Tokenizer) -> None:
    own = Tokenizer(tokenizer.definition, {}, "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
                                               "{{ style }}{% for m in messages %}{{ m.content }}{% endfor %}")
    mine = LLM(llm.model, tokenizer=own)
    hi, tools = [{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "clock"}}]
    want = mine.generate([own.encode("clockbriefhi")], GREEDY)[0]
    named: dict[str, Any] = {"tools": tools, "chat_template_kwargs": {"style": "brief"}}

    async def last(prompt: Any, **named: Any) -> tuple[int, ...]:
        return [tuple(request.token_ids) async for request in mine.stream_async(prompt, GREEDY, **named)][-1]

    assert mine.chat(hi, GREEDY, **named) == mine.generate([hi], GREEDY, **named)[0] == want
    assert mine.generate_ensemble([hi, hi], None, GREEDY, **named).token_ids == want.token_ids
    assert "".join(mine.stream(hi, GREEDY, **named)) == want.text
    assert asyncio.run(last(hi, **named)) == want.token_ids
    raw = mine.generate([own.encode_prompt("<|User|>hi", parse_special=True)], GREEDY)[0]
    assert asyncio.run(last("<|User|>hi", parse_special=True)) == raw.token_ids
    for wrong in ("clock", ["clock"], {"name": "clock"}):
        with pytest.raises(RequestError, match=r"tools = .*: must be a list of objects"):
            mine.chat(hi, GREEDY, tools=wrong)  # type: ignore[arg-type]


def test_variables_of_the_template(llm: LLM, tokenizer: Tokenizer) -> None:
    template = "{{ 'deep' if thinking else 'flat' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    own = Tokenizer(tokenizer.definition, {}, template)
    hi = [{"role": "user", "content": "hi"}]
    deep, flat = own.encode("deephi"), own.encode("flathi")
    by_default = LLM(llm.model, tokenizer=own, chat_template_kwargs={"thinking": True})
    assert by_default.encode(hi) == deep and own.encode_chat(hi) == flat
    assert by_default.tokenizer is not None and by_default.tokenizer.fingerprint != own.fingerprint
    assert by_default.encode(hi, chat_template_kwargs={"thinking": False}) == flat
    assert by_default.chat(hi, GREEDY) == by_default.generate([deep], GREEDY)[0]
    assert by_default.chat(hi, GREEDY, chat_template_kwargs={"thinking": False}) == by_default.generate(
        [flat], GREEDY)[0]
    refused: list[Any] = [{"thinkin": True}, {"add_generation_prompt": False}, {"messages": []}, {3: 4}, [1]]
    for wrong in refused:
        with pytest.raises(RequestError, match="chat_template_kwargs"):
            llm.chat(hi, GREEDY, chat_template_kwargs=wrong)
    with pytest.raises(ConfigError, match="'thinkin' is no variable that the chat template reads"):
        LLM(llm.model, tokenizer=own, chat_template_kwargs={"thinkin": True})
    with pytest.raises(ConfigError, match="chat_template_kwargs: needs a tokenizer"):
        LLM(llm.model, chat_template_kwargs={"thinking": True})


# ---- loading, routing, errors ---------------------------------------------------------------------------------------


def test_from_a_checkpoint_folder(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(llm.model, tmp_path / "model", tokenizer=tokenizer)
    assert LLM(str(tmp_path / "model")).generate(["abc", ""], GREEDY) == llm.generate(["abc", ""], GREEDY)
    with pytest.raises(NotFoundError):
        LLM(tmp_path / "nowhere")


def test_bf16_weights_generate(tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]) -> None:
    """Batched and alone may part at near ties in BF16; here only that every number is one and lengths are right."""
    model = random_model(tiny_config()).to(torch.bfloat16)
    outputs = LLM(model).generate([[5, 6, 7], [8]], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [5, 5]


@natively
def test_plain_weights_run_natively_and_as_the_model_says(
    tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]
) -> None:
    """Prompts of more tokens than a native step takes, then steps of few; the model itself runs as before."""
    model = random_model(tiny_config(qk_nope_head_dim=16, v_head_dim=16, num_nextn_predict_layers=1))
    llm = LLM(model)
    assert isinstance(llm.engine.runner.layers, NativeStack) and model.layer_runner is None
    prompts = [[*range(5, 40)], [8], [7, 9, 11]]
    for prompt, output in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        ids = torch.tensor([[*prompt, *output.token_ids[:-1]]])
        with torch.no_grad():
            logits_TV = model(ids)[0, len(prompt) - 1 :]
        chosen_T = logits_TV[torch.arange(len(logits_TV)), torch.tensor(output.token_ids)]
        torch.testing.assert_close(chosen_T, logits_TV.amax(-1), rtol=0, atol=1e-4)


def test_usage_counts_every_token_that_ran_and_no_padding(llm: LLM) -> None:
    prompts = random_prompts(5, longest=9)
    usage = ExpertUsage(llm.model.config)
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 2, 3, 4, 9)]
    outputs = llm.generate(prompts, params, usage=usage)
    expected = ExpertUsage(llm.model.config)
    for prompt, output in zip(prompts, outputs, strict=True):  # the last token is sampled but not run
        routing = RoutingRecord()
        with torch.no_grad():
            llm.model(torch.tensor([[*prompt, *output.token_ids[:-1]]]), routing=routing)
        expected.add(routing)
    assert usage.tokens == expected.tokens == sum(map(len, prompts)) + 0 + 1 + 2 + 3 + 8
    assert torch.equal(usage.counts_LE, expected.counts_LE)
    assert torch.allclose(usage.weights_LE, expected.weights_LE, atol=1e-4)


def test_an_empty_prompt_starts_from_the_begin_token(llm: LLM) -> None:
    assert llm.encode("") == llm.encode([]) == [0]
    assert llm.generate([""], GREEDY) == llm.generate([[0]], GREEDY)
    assert llm.generate([], GREEDY) == []
    llm.bos_id = None
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[]], GREEDY)


def test_without_a_tokenizer_ids_go_in_and_come_out(llm: LLM) -> None:
    bare = LLM(llm.model)
    output = bare.generate([[7, 8]], GREEDY)[0]
    assert output.text == "" and output.token_ids == llm.generate([[7, 8]], GREEDY)[0].token_ids
    conversation = [{"role": "user", "content": "x"}]
    for prompt, params in (("text", GREEDY), (conversation, GREEDY), ([7], SamplingParams(stop=("x",)))):
        with pytest.raises(RequestError, match="needs a tokenizer"):
            bare.generate([prompt], params)


@pytest.mark.parametrize(("prompt", "message"), [
    (list(range(5, 261)), r"the prompt has 256 tokens: must leave room .*max_position_embeddings = 256"),
    ([5, 261], r"token id 261: must lie in the vocabulary 0\.\.260"), ([-1], r"token id -1: must lie"),
    (5, "5: must be a text, a list of token ids or a list of messages"), ([True], r"\[True\]: must be"),
    ([5, "x"], "must be a text"), ("\ud800", "surrogate"), ([{"role": "judge", "content": ""}], "judge")])
def test_bad_prompts_are_named_before_any_prompt_runs(llm: LLM, prompt: Any, message: str) -> None:
    usage = ExpertUsage(llm.model.config)
    with pytest.raises(RequestError, match=f"^prompt 1: .*{message}"):
        llm.generate(["fine", prompt], GREEDY, usage=usage)
    assert usage.tokens == 0
    with pytest.raises(RequestError, match=message):
        llm.stream(prompt, GREEDY)


def test_bad_calls(llm: LLM) -> None:
    with pytest.raises(RequestError, match="params has 1 entries: must be one for all or one for each of the 2"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ConfigError, match="max_num_seqs = 0: must be an integer >= 1"):
        LLM(llm.model, max_num_seqs=0)
