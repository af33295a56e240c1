"""The commands as a user types them, in processes of their own; and the example, kept true."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli import main
from tests.helpers import ROOT
from tests.helpers.tiny_run import write_notes


def deepseek(
    *words: str, stdin: str | None = None, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deepseek.cli", *words], input=stdin, capture_output=True, text=True,
                          cwd=cwd, timeout=120, env=os.environ | environment)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained model: the folder of its run."""
    folder = tmp_path_factory.mktemp("run")
    write_notes(folder)
    done = deepseek("train", str(folder / "tiny.json"), str(folder / "data"), "--out", str(folder / "out"), "--steps",
                    "12", "--batch_size", "4", "--seq_len", "32", "--eval_every", "6", "--lr", "1e-2")
    assert done.returncode == 0, done.stderr
    assert "model:" in done.stdout and (folder / "out" / "loss.png").is_file()
    return folder


def test_help_imports_nothing_that_takes_seconds() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "deepseek", "--help"], capture_output=True,
                          text=True, timeout=120, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "train" in done.stdout and {"argparse", "deepseek"} <= imported
    assert not imported & {"torch", "numpy", "polars", "fastapi", "matplotlib", "transformers", "huggingface_hub"}


def test_loading_imports_no_compiler(run: Path) -> None:
    """torch's takes seconds to import, of which a command needs none, and training neither."""
    code = """
import sys, torch
from deepseek.checkpoint import load_model
model = load_model(sys.argv[1], torch.float32)
assert "torch._dynamo" not in sys.modules, "loading"
from deepseek.deepopt.optimizers import make_optimizer
from deepseek.deepopt.settings import TrainConfig
for kind in ({}, {"optimizer": "muon", "moments": "8bit"}):
    optimizer = make_optimizer(model.requires_grad_(True), TrainConfig(**kind))
    model.loss(torch.arange(8)[None], torch.arange(8)[None]).total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert "torch._dynamo" not in sys.modules, kind
"""
    done = subprocess.run([sys.executable, "-c", code, str(run / "out" / "model")], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_infer_prints_text_and_experts(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(run / "out" / "model")
    picture = run / "experts.png"
    done = deepseek("infer", "--model", model, "--prompt", "On Monday", "--max_tokens", "8", "--temperature", "0",
                    "--show_experts", "--expert_map", str(picture))
    assert done.returncode == 0 and done.stdout.strip()
    assert "MaxVio" in done.stderr and picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.stdin", io.StringIO("On Monday"))
    assert main(["infer", "--model", model, "--max_tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == done.stdout


def test_chat_answers_and_ends(run: Path) -> None:
    done = deepseek("chat", "--model", str(run / "out" / "model"), "--max_tokens", "4", "--seed", "1",
                    stdin="hello\n/reset\nhello\n/exit\n")
    assert done.returncode == 0, done.stderr


def test_tokenizer_command(run: Path) -> None:
    done = deepseek("data", "tokenizer", str(run / "data"), "--vocab_size", "300", "--out", str(run / "tokenizer"))
    assert done.returncode == 0 and (run / "tokenizer" / "tokenizer.json").is_file()


def test_info_of_a_path_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run / "out" / "model"), "--json", "--price_per_hour", "2", "--tokens_per_second",
                 "10"]) == 0
    assert json.loads(capsys.readouterr().out)["cost"]["per_1e8_tokens"] == pytest.approx(2 / 3600 * 1e8 / 10)


def test_four_bits_and_back(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's commands: quantize, run, describe, chat, and turn back; a damaged file is refused by name."""
    model, small, back = (str(run / name) for name in ("out/model", "nf4", "back"))
    # what needs no process of its own has none: each takes seconds to start
    assert main(["quantize", model, small, "--keep", "*kv_a_proj*"]) == 0
    assert "bits a weight" in capsys.readouterr().out
    command = "infer", "--model", small, "--prompt", "On Monday", "--max_tokens", "8", "--temperature", "0"
    pure = deepseek(*command, DEEPSEEK_PURE="1")
    assert pure.returncode == 0 and pure.stdout.strip() and "DEEPSEEK_PURE is set" in pure.stderr, pure.stderr
    if "DEEPSEEK_PURE" not in os.environ:
        other = deepseek(*command, DEEPSEEK_ISA="foo")
        assert other.returncode == 2 and "DEEPSEEK_ISA = 'foo': this machine" in other.stderr
        assert "Traceback" not in other.stderr
    texts = [pure.stdout]
    for folder in (small, back):
        if folder == back:
            assert main(["quantize", small, back, "--format", "bf16"]) == 0
        capsys.readouterr()
        assert main([*command[:2], folder, *command[3:]]) == 0
        texts.append(capsys.readouterr().out)
    # a model that knows one sentence; rounding may show after a while
    assert texts[0][:12] == texts[1][:12] == texts[2][:12]
    assert main(["info", small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    assert main(["chat", "--model", small, "--max_tokens", "4"]) == 0
    assert main(["quantize", model, small]) == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err
    weights = Path(small) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert main(["infer", "--model", small, "--prompt", "x"]) == 2
    broken = capsys.readouterr().err
    assert "model.safetensors" in broken and "Traceback" not in broken


@pytest.mark.parametrize(("words", "message"), [
    (("infer", "--model", "nowhere", "--prompt", "x"), "nowhere: no such folder"),
    (("infer", "--model", "{model}", "--prompt", "x", "--temperature", "-1"), "temperature = -1.0: must"),
    (("infer", "--model", "{model}", "--prompt", ""), "prompt = '': must not be empty"),
    (("infer", "--model", "{model}", "--prompt", "x", "--device", "tpu"), "device = 'tpu': must be cpu or cuda"),
    (("train", "nano", "nowhere", "--out", "{out}"), "nowhere"),
    (("train", "nano", "{data}", "--out", "{data}/run"), "must not lie inside DATA"),
    (("train", "nano", "{data}", "--out", "{out}", "--lr", "0"), "lr = 0.0: must be a positive number"),
    (("train", "tiny", "{data}", "--out", "{out}"), "tiny: no such folder"),
    (("quantize", "nowhere", "{out}"), "nowhere: no such folder"),
    (("quantize", "{model}", "{out}", "--format", "nf5"), "nf5"),
    (("quantize", "{model}", "{model}"), "must not be the source"),
    (("quantize", "{model}", "{out}", "--keep", "nothing.*"), "keep = 'nothing.*': no weight"),
    (("info", "v3-67b", "--price_per_hour", "-1", "--tokens_per_second", "1"), "price_per_hour = -1.0: must"),
])
def test_what_a_user_gets_wrong_is_one_clear_line(
    run: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"model": run / "out" / "model", "data": run / "data", "out": run / "other"}
    status: Any
    try:
        status = main([word.format(**places) for word in words])
    except SystemExit as left:  # argparse
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error


def test_an_error_is_one_line_of_a_process_too() -> None:
    done = deepseek("infer", "--model", "nowhere", "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "") and "nowhere: no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_utf8_and_empty_files_are_reported_by_name(run: Path) -> None:
    (run / "mixed").mkdir()
    (run / "mixed" / "good.txt").write_text("a text that is fine " * 200)
    (run / "mixed" / "bad.txt").write_bytes(b"caf\xe9 " * 10)
    (run / "mixed" / "empty.txt").write_text("")
    done = deepseek("data", "tokenizer", str(run / "mixed"), "--vocab_size", "280", "--out", str(run / "t2"))
    assert done.returncode == 0 and "bad.txt" in done.stdout and "empty.txt" in done.stdout


def test_demo_train_runs(tmp_path: Path) -> None:
    """`make demo-train` with one step, on a part of the library: the script itself, whole."""
    stdlib, library = Path(sysconfig.get_path("stdlib")), tmp_path / "library"
    shutil.copytree(stdlib / "email", library / "email")
    shutil.copy(stdlib / "textwrap.py", library)
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "demo_train.py"), "--out", str(tmp_path / "demo"),
                           "--steps", "1", "--library", str(library)], capture_output=True, text=True, timeout=280,
                          env=os.environ, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dashboard: http://127.0.0.1:" in done.stdout and "The server has been ended" in done.stdout
    assert done.stdout.count("def read_file(path):") >= 3  # once as a completion, once over HTTP
    assert all((tmp_path / "demo" / name).is_file() for name in ("loss.png", "experts.png", "model/config.json"))
