"""Adapters beside a base, chosen by `model`: OpenAI's client as the judge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from deepseek import LoRAAdapter
from deepseek.checkpoint import load_model, save_model
from deepseek.cli import main
from deepseek.engine import LLM, SamplingParams
from deepseek.errors import ConfigError
from deepseek.model.adapter import lora_modules
from deepseek.serve.app import create_app
from deepseek.serve.options import ServeOptions
from tests.helpers.jsonl import write_jsonl
from tests.helpers.servers import AUTH, KEY, Running

HELLO: list[Any] = [{"role": "user", "content": "the quick brown"}]


@torch.no_grad()
def adapter(base: Path, folder: Path, seed: int) -> Path:
    model, generator = load_model(base), torch.Generator().manual_seed(seed)
    side = LoRAAdapter(r=3, lora_alpha=9, target_modules=["q_proj", "v_proj", "o_proj"], experts=["1.0", "2.3"]).attach(
        model)
    for _, module in lora_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if "_B" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return LoRAAdapter.save(model, side, folder)


@pytest.fixture(scope="module")
def folders(tiny_llm: Callable[..., LLM], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, llm = tmp_path_factory.mktemp("adapters"), tiny_llm()
    base = save_model(llm.model, place / "tiny", tokenizer=llm.tokenizer)
    return {"tiny": base, "law": adapter(base, place / "law", 1), "team/med-v2": adapter(base, place / "med", 2)}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    llm = LLM(folders["tiny"], adapters={name: folders[name] for name in ("law", "team/med-v2")}, max_num_seqs=8)
    running = Running(llm, ServeOptions("tiny", api_key=(KEY,)))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def texts(folders: dict[str, Path]) -> dict[str, str]:
    """The greedy answer of each, loaded alone."""
    greedy = SamplingParams(max_tokens=24, temperature=0)
    return {name: LLM(folders["tiny"], adapter=None if name == "tiny" else folder).chat(HELLO, greedy).text
            for name, folder in folders.items()}


def test_the_models_are_the_base_and_its_adapters(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == list(folders)
    assert [model.parent for model in models.values()] == [None, "tiny", "tiny"]  # type: ignore[attr-defined]
    assert client.models.retrieve("team/med-v2").id == "team/med-v2"
    for wrong in ("nobody", "unnamed", "Law", ""):
        answer = httpx.post(f"{client.base_url}chat/completions", timeout=60, headers=AUTH,
                            json={"model": wrong, "messages": HELLO})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert "there are 'tiny', 'law', 'team/med-v2'" in answer.json()["error"]["message"]


def test_all_of_them_at_once_answer_as_alone(server: Running, texts: dict[str, str]) -> None:
    assert len(set(texts.values())) == 3

    async def ask(own: openai.AsyncOpenAI, model: str, stream: bool) -> str:
        done: Any = await own.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0,
                                                      stream=stream)
        if not stream:
            assert done.model == model
            return done.choices[0].message.content
        chunks = [chunk async for chunk in done]
        assert {chunk.model for chunk in chunks} == {model}
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as own:
            return await asyncio.gather(*(ask(own, model, stream) for stream in (True, False) for model in texts))

    assert asyncio.run(everybody()) == [*texts.values(), *texts.values()]


def test_the_other_routes_choose_too(client: openai.OpenAI, folders: dict[str, Path], texts: dict[str, str]) -> None:
    greedy = SamplingParams(max_tokens=9, temperature=0)
    for name in folders:
        alone = LLM(folders["tiny"], adapter=None if name == "tiny" else folders[name])
        done = client.completions.create(model=name, prompt=["the quick", "fox"], max_tokens=9, temperature=0)
        want = alone.generate(["the quick", "fox"], greedy)
        assert [choice.text for choice in done.choices] == [output.text for output in want]
        answer = client.responses.create(model=name, input="the quick brown", max_output_tokens=24, temperature=0)
        assert answer.output_text == texts[name] and answer.model == name
        (vector,), _ = alone.embed(["fox"])
        got = client.embeddings.create(model=name, input="fox", encoding_format="float").data[0].embedding
        assert got == pytest.approx(vector.tolist(), abs=1e-3)


def test_what_they_did_is_counted_by_name(server: Running, client: openai.OpenAI, folders: dict[str, Path]) -> None:
    for name in folders:
        client.completions.create(model=name, prompt="fox", max_tokens=3)
    samples = httpx.get(f"{server.url}/metrics", headers=AUTH, timeout=60).text
    for name in folders:
        count = sum(float(line.rsplit(" ", 1)[1]) for line in samples.splitlines()
                    if line.startswith(f'moe_dr_adapter_requests_total{{adapter="{name}",reason="'))
        tokens = next(float(line.rsplit(" ", 1)[1]) for line in samples.splitlines()
                      if line.startswith(f'moe_dr_adapter_tokens_total{{adapter="{name}"}}'))
        assert count >= 1 and tokens >= 3
    state = httpx.get(f"{server.url}/dashboard/state", headers=AUTH, timeout=60).json()
    assert {name for name, _ in state["slices"]["adapter"]} == set(folders)


def test_a_name_stands_for_one_thing(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(folders["tiny"], adapters={"law": folders["law"]})
    with pytest.raises(ConfigError, match="adapter law: is what the base is called"):
        create_app(llm, ServeOptions("law"))
    llm.close()
    law, base = folders["law"], str(folders["tiny"])
    for words, message in (
            ([f"law={law}", f"law={law}"], f"law is {law} already"),
            ([str(law), str(law)], "several need names: NAME=DIR"),
            ([f"tiny={law}"], "adapter tiny: is what the base is called"), (["=x"], "must read NAME=DIR, or DIR alone"),
            (["law="], "must read NAME=DIR, or DIR alone"), (["law=nowhere"], "nowhere"),
            ([f"a={law}", str(law)], "without a name it stands for the whole model")):
        assert main(["serve", base, "--port", "0", "--adapter", *words]) == 2
        assert message in capsys.readouterr().err


def test_the_command_line_chooses_by_name(folders: dict[str, Path], texts: dict[str, str], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["infer", "--model", str(folders["tiny"]), "--temperature", "0", "--max_tokens", "24", "--adapter",
             *(f"{name}={folder}" for name, folder in folders.items() if name != "tiny")]
    for name, text in texts.items():
        assert main([*flags, "--chat", "--prompt", HELLO[0]["content"],
                     *([] if name == "tiny" else ["--use_adapter", name])]) == 0
        assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    assert main([*flags, "--prompt", "x", "--use_adapter", "tax"]) == 2
    assert "an adapter of the pool: law, team/med-v2" in capsys.readouterr().err
    source = tmp_path / "in.jsonl"
    lines: list[dict[str, Any]] = [{}, {"model": "law"}, {"adapter": "law"}, {"model": "tiny", "adapter": "law"},
                                   {"model": "tiny"}, {"adapter": None}, {"model": "tax"}, {"adapter": "tax"},
                                   {"adapter": 3}, {"model": "law", "adapter": "team/med-v2"}]
    write_jsonl(source, ({"messages": HELLO} | line for line in lines))
    assert main([*flags, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--use_adapter",
                 "team/med-v2"]) == 0
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    med, law, tiny = (texts[name] for name in ("team/med-v2", "law", "tiny"))
    assert [line.get("text") for line in got[:6]] == [med, law, law, law, tiny, med]
    assert [line["error"] for line in got[6:]] == [
        "model = 'tax': there are tiny, law, team/med-v2",
        "adapter = 'tax': is no adapter that was loaded; there are law, team/med-v2",
        "adapter = 3: must be a name, or weights by name, one at least",
        "model = 'law' and adapter = 'team/med-v2': are two adapters"]
