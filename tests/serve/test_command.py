"""`deepseek serve` as a process: it says where it is, answers, and ends its streams when it is told to end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek.atlas import Atlas
from deepseek.checkpoint import save_model
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.convert import quantize
from deepseek.domain import DomainClassifier
from deepseek.engine import LLM, SamplingParams
from deepseek.model import CausalLM
from deepseek.serve.options import ServeOptions
from deepseek.watch.history import History
from tests.helpers import ROOT
from tests.helpers.servers import Running


@pytest.fixture(scope="module")
def folder(tiny_llm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    llm = tiny_llm()
    return save_model(llm.model, tmp_path_factory.mktemp("served") / "tiny", tokenizer=llm.tokenizer)


def test_named_experts_are_warmed_while_it_runs(folder: Path) -> None:
    config = ModelConfig.from_file(folder)
    Atlas.built_in(config, ["law_expert", "code_expert"]).save(folder)
    server = Running(LLM(folder), ServeOptions("tiny"))
    try:
        done = httpx.post(f"{server.url}/v1/deepseek/warm", json={"experts": ["law_expert"]}, timeout=60).json()
        each = config.n_routed_experts // config.n_group
        assert done["experts"] == each * len(config.moe_layers) and done["bytes"] > 0
        wrong = httpx.post(f"{server.url}/v1/deepseek/warm", json={"experts": ["x"]}, timeout=60)
        assert wrong.status_code == 400 and "there are law_expert, code_expert" in wrong.json()["error"]["message"]
        listed = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]
        assert listed["deepseek"]["experts"] == ["law_expert", "code_expert"]
    finally:
        server.stop()


def test_a_classifier_says_what_requests_are_about(tiny_llm: Callable[..., Any],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    texts = {name: ["".join(draw.choices(letters, k=80)) for _ in range(30)]
             for name, letters in (("law_expert", "abcdef"), ("code_expert", "uvwxyz"))}
    llm = tiny_llm()
    assert llm.domain_of(texts["law_expert"][0]) is None
    llm.classifier, _ = DomainClassifier.train(
        [text for own in texts.values() for text in own], [name for name, own in texts.items() for _ in own], bits=12)
    for name, own in texts.items():
        assert llm.domain_of(own[0]) == llm.requests(own[0], SamplingParams())[0].domain == name
    assert llm.domain_of("the plaintiff and the defendant, uvwxyz uvwxyz") == "law_expert"  # rules come first
    assert llm.domain_of("") is None
    llm.close()
    assert main(["serve", "nothing", "--classifier", "nowhere.npz"]) != 0
    assert "nowhere.npz" in capsys.readouterr().err


def test_a_history_that_cannot_be_is_said_before_the_model_is_loaded(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nothing", "--history", str(tmp_path)]) != 0
    assert "must be a file that can be written" in capsys.readouterr().err
    with contextlib.closing(History(tmp_path / "other.sqlite")):
        assert main(["serve", "nothing", "--history", str(tmp_path / "other.sqlite")]) != 0
    assert "another server uses it" in capsys.readouterr().err
    with contextlib.closing(sqlite3.connect(tmp_path / "foreign.sqlite")) as foreign:
        foreign.execute("create table readings (x)")
    assert main(["serve", "nothing", "--history", str(tmp_path / "foreign.sqlite")]) != 0
    assert "it is of another program" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [False, True])
def test_texts_are_logged_only_if_asked(tiny_llm: Callable[..., Any], asked: bool,
                                        caplog: pytest.LogCaptureFixture) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny", log_texts=asked))
    try:
        with caplog.at_level("INFO", logger="deepseek.serve"):
            done = httpx.post(f"{server.url}/v1/completions", timeout=60, json={
                "model": "tiny", "prompt": "a secret", "max_tokens": 4})
    finally:
        server.stop()
    assert ("a secret" in caplog.text) is asked
    if asked:
        line, = (json.loads(r.message) for r in caplog.records if "a secret" in r.message)
        assert line == {"request_id": done.headers["x-request-id"], "answer": done.json()["id"], "prompt": "a secret",
                        "text": done.json()["choices"][0]["text"]}


def curls() -> Iterator[str]:
    """The commands with curl in the READMEs and the manual, as they stand there."""
    for name in ("README.md", "README.zh.md", "docs/serving.md", "docs/tutorial.md", "docs/tutorial.zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        yield from re.findall(r"^(curl (?:.*\\\n)*.*)$", text, re.MULTILINE)


def test_the_curl_commands_of_the_manual(folder: Path) -> None:
    """Run by a shell; only the address is changed, to that of this server, and the ready model's name."""
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    Atlas.built_in(ModelConfig.from_file(folder), ["law_expert", "code_expert"]).save(folder)
    server = Running(LLM(folder), ServeOptions("nf4", api_key=("KEY",)))
    try:
        commands = list(curls())
        assert len(commands) >= 5
        for command in commands:
            command = command.replace('"model": "mini"', '"model": "nf4"')
            done = subprocess.run(command.replace("http://127.0.0.1:8000", server.url), shell=True, timeout=60,
                                  capture_output=True, text=True)
            answer = json.loads(done.stdout)
            assert "error" not in answer and ("choices" in answer or "expected_coverage" in answer), (command, answer)
    finally:
        server.stop()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_ends(tiny_llm: Callable[..., Any], tmp_path: Path, sent: signal.Signals) -> None:
    """With four bits, whose kernels' objects must be gone at the end: nanobind reports those that are not."""
    tokenizer = tiny_llm().tokenizer
    model = CausalLM(ModelConfig.preset("nano").with_(vocab_size=tokenizer.vocab_size)).init_weights()
    quantize(save_model(model, tmp_path / "plain", tokenizer=tokenizer), tmp_path / "tiny")
    process = subprocess.Popen([sys.executable, "-m", "deepseek.cli", "serve", str(tmp_path / "tiny"), "--port", "0",
                                "--log"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"DEEPSEEK_API_KEY": (key := "k-from-the-environment")})
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("serving tiny on http://127.0.0.1:"), process.stderr.read()
        assert "open to anyone" not in line
        url = line.split(" on ")[1].strip()
        if shutil.which("curl"):
            said = subprocess.run(
                ["curl", "-s", f"{url}/chat/completions", "-H", f"Authorization: Bearer {key}", "-H",
                 "Content-Type: application/json", "-d", json.dumps({
                     "model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "a secret"}]})],
                capture_output=True, text=True, timeout=60, check=True).stdout
            assert json.loads(said)["choices"][0]["message"]["role"] == "assistant"
        with httpx.stream("POST", f"{url}/completions", headers={"authorization": f"Bearer {key}"}, timeout=60, json={
                "model": "tiny", "prompt": "a secret", "max_tokens": 300, "stream": True,
                "deepseek": {"ignore_eos": True}}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(sent)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) in ((0, -sent) if sent == signal.SIGTERM else (130,))
        said = process.stderr.read()
        assert "leaked" not in said
        log = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        assert key not in said
        assert [entry["status"] for entry in log] == [200] * len(log) and log[-1]["path"] == "/v1/completions"
        assert "secret" not in json.dumps(log) and all(entry["request_id"].startswith("req_") for entry in log)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("flags", "message"), [
    (["--port", "99999"], "port = 99999: must be an integer from 0 to 65535"),
    (["--host", "nowhere.invalid"], "cannot listen there"),
    (["--host", ""], "host = '': must be a host's name or address"),
    (["--timeout", "0"], "timeout = 0.0: must be a positive number"), (["--max_num_seqs", "0"], "max_num_seqs = 0")])
def test_bad_flags(folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--port", "0", *flags]) == 2
    assert message in capsys.readouterr().err
