"""The examples, run on a tiny checkpoint."""

from __future__ import annotations

import io
import json
import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek import LLM, Atlas, ModelConfig, Tokenizer, save_model
from deepseek.model import CausalLM
from tests.helpers import ROOT
from tests.helpers.jsonl import write_jsonl

EXAMPLES = ROOT / "examples"
SHORT = sorted(set(EXAMPLES.glob("*.py")) - {EXAMPLES / "demo.py", EXAMPLES / "demo_train.py",
                                                  EXAMPLES / "edge_router.py"})
NAMES = ("law_expert", "code_expert", "text_expert", "math_expert")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run(script, *words, stdin="")`: what it prints. In this process, because each of its own takes seconds."""
    def script(name: str, *words: str | Path, stdin: str = "") -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """law.jsonl and code.jsonl: documents of other letters; cases.jsonl: questions and answers."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, letters in (("law", "abcdefgh"), ("code", "uvwxyz{}")):
        documents = [{"text": " ".join("".join(draw.choices(letters, k=5)) for _ in range(40))} for _ in range(40)]
        write_jsonl(folder / f"{name}.jsonl", documents)
    cases = [{"input": f"Section {i}?", "output": f"Pay {i % 7} coins."} for i in range(40)]
    write_jsonl(folder / "cases.jsonl", cases)
    return folder


@pytest.fixture
def model(texts: Path, tmp_path: Path, tiny_config: Callable[..., ModelConfig],
          random_model: Callable[..., CausalLM]) -> Path:
    tokenizer = Tokenizer.train([*(file.read_text() for file in texts.iterdir()), "The court"], 400)
    config = tiny_config(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
                         max_position_embeddings=512)
    return save_model(random_model(config), tmp_path / "model", tokenizer=tokenizer)


@pytest.mark.parametrize("script", SHORT, ids=lambda script: script.name)
def test_examples_are_short_and_say_how_they_are_run(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert text.count("\n") < 40 and f"python examples/{script.name} " in text


def test_chat(run: Callable[..., str], model: Path) -> None:
    answers = run("chat.py", model, stdin="hello\nagain\n")
    assert answers.strip() and answers.count("\n") >= 2


def test_run_batch_answers_in_the_schema(run: Callable[..., str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Is it void?\nDoes it hold?\n")
    lines = [json.loads(line) for line in run("run_batch.py", model, tmp_path / "prompts.txt").splitlines()]
    assert [line["prompt"] for line in lines] == ["Is it void?", "Does it hold?"]
    for line in lines:
        assert line["finish_reason"] == "length" or json.loads(line["answer"])["verdict"] in ("yes", "no", "unclear")


def test_name_experts_keeps_what_stands(run: Callable[..., str], model: Path, texts: Path) -> None:
    said = run("name_experts.py", model, f"law_expert={texts / 'law.jsonl'}", f"code_expert={texts / 'code.jsonl'}")
    atlas = Atlas.load(model)
    assert set(atlas.names) == {"law_expert", "code_expert"}
    assert all(f"{name}: {len(atlas[name])} experts" in said for name in atlas.names)


def test_tune_law(run: Callable[..., str], model: Path, texts: Path, tmp_path: Path) -> None:
    Atlas.built_in(ModelConfig.from_file(model), NAMES).save(model)
    said = run("tune_law.py", model, texts / "cases.jsonl", tmp_path / "run", texts / "law.jsonl")
    assert "frozen tensors have the SHA-256 they had" in said and "law_expert" in said
    found = re.search(r"(\d+) of (\d+) frozen tensors have", said)
    assert found is not None and found[1] == found[2] != "0"
    assert (tmp_path / "run" / "delta").is_dir()


def test_serve_client(run: Callable[..., str], model: Path) -> None:
    pytest.importorskip("openai", reason="needs the test extra (openai)")
    from deepseek.serve.options import ServeOptions
    from tests.helpers.servers import Running

    server = Running(LLM(model), ServeOptions("tiny", api_key=("KEY",)))
    try:
        said = run("serve_client.py", f"{server.url}/v1", "KEY", "The court")
    finally:
        server.stop()
    assert said.startswith("model tiny, adapters beside it: none\n")
    assert len(re.findall(r"layer \d: expert \d+ saw most tokens", said)) == 2
