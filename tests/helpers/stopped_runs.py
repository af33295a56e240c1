"""Commands that are stopped by signals: run by test_interrupts.py in a process of its own.

    python -m tests.helpers.stopped_runs FOLDER

Every command runs in a child forked from this process, which has imported torch and uses one thread. A child writes a
marker where the signal is to hit it, and waits there. Prints {case: [exit status, what it said]} as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deepseek  # noqa: F401
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.convert import writing
from deepseek.data import stages
from deepseek.deepopt import loop, trainer
from deepseek.deepopt.loop import TrainingLoop
from deepseek.engine import run_batch
from deepseek.tokenizer import Tokenizer
from tests.helpers.jsonl import write_jsonl

LONG = 60.0
CONFIG: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=128)


def wait_at(owner: Any, name: str, marker: Path, seconds: float, nth: int = 1) -> None:
    """The nth call of owner.name writes the marker and waits before it does its work."""
    real, count = getattr(owner, name), [0]

    def waits(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == nth:
            marker.write_text("here")
            time.sleep(seconds)
        return real(*args, **kwargs)

    setattr(owner, name, waits)


def child(words: list[str], said: Path, prepare: Callable[[], None] | None = None) -> int:
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            if prepare is not None:
                prepare()
            status = main(words)
        finally:
            os._exit(status)
    return pid


def main_() -> None:
    root = Path(sys.argv[1])
    os.chdir(root)
    torch.set_num_threads(1)
    # what every child would load, before the first fork
    import deepseek.engine.llm
    import deepseek.tune.tuner  # noqa: F401
    loop.plot_run = lambda *_: None  # drawing takes longer than such runs
    results: dict[str, Any] = {}
    Path("config.json").write_text(json.dumps(ModelConfig(**CONFIG).to_dict()))
    texts = [f"the {a} {b} sees the {c} and the {b} of {a} {i}" for i in range(4) for a in ("red", "old", "big")
             for b in ("fox", "cat") for c in ("moon", "bread", "song")]
    write_jsonl(Path("text.jsonl"), ({"text": text} for text in texts))

    Tokenizer.train([Path("text.jsonl").read_text()], 290).save("words")

    def run(case: str, words: list[str], target: tuple[Any, str, float, int] | None = None, *signals: int) -> None:
        marker, said = root / f"{case}.here", root / f"{case}.said"
        pid = child(words, said, (lambda: wait_at(target[0], target[1], marker, *target[2:])) if target else None)
        if target:
            began = time.monotonic()
            while not marker.exists() and time.monotonic() - began < LONG:
                time.sleep(0.01)
        for number, sent in enumerate(signals):
            while number and "leaves at once" not in said.read_text():  # the first one is known
                time.sleep(0.01)
            os.kill(pid, sent)
        _, status = os.waitpid(pid, 0)
        results[case] = [os.waitstatus_to_exitcode(status), said.read_text()]

    def train(out: str) -> list[str]:
        return ["train", "config.json", "text.jsonl", "--out", out, "--tokenizer", "words", "--steps", "6",
                "--batch_size", "2", "--seq_len", "16", "--warmup_steps", "2", "--eval_every", "4", "--save_every",
                "100", "--eval_batches", "1"]

    step = (TrainingLoop, "train_step", 0.3, 3)
    run("calm", train("calm"))
    run("int", train("int"), step, signal.SIGINT)
    run("int again", train("int"))
    run("term", train("term"), step, signal.SIGTERM)
    run("term again", ["train", "--out", "term"])
    run("twice", train("twice"), (TrainingLoop, "train_step", LONG, 3), signal.SIGINT, signal.SIGINT)
    run("evaluating", train("evaluating"), (TrainingLoop, "evaluate", LONG, 1), signal.SIGINT)
    run("evaluating again", train("evaluating"))
    run("packing", train("packing"), (trainer, "pack_cached", LONG, 1), signal.SIGINT)
    calm, *others = [(root / out / "model" / "model.safetensors").read_bytes()
                     for out in ("calm", "int", "term", "evaluating")]
    results["weights"] = [other == calm for other in others]
    results["checkpoints"] = {out: sorted(path.name for path in (root / out).glob("checkpoint-*"))
                              for out in ("int", "twice", "evaluating", "packing")}

    def tune(out: str) -> list[str]:
        return ["tune", "calm/model", "text.jsonl", "--retain_data", "text.jsonl", "--out", out, "--r", "2",
                "--steps", "6", "--batch_size", "2", "--eval_records", "4"]

    run("tune calm", tune("tune-calm"))
    run("tune", tune("tune"), step, signal.SIGTERM)
    run("tune again", tune("tune"))
    calm, other = [(root / out / "adapter" / "adapter_model.safetensors").read_bytes() for out in ("tune-calm", "tune")]
    results["adapters"] = [other == calm]
    run("quantize", ["quantize", "calm/model", "four"], (writing, "write_file", LONG, 1), signal.SIGINT)
    Path("run.yaml").write_text("out: piped\nsources: [text.jsonl]\n")
    run("data", ["data", "run", "run.yaml"], (stages, "find_duplicates", LONG, 1), signal.SIGTERM)
    Path("in.jsonl").write_text('{"prompt": "the red"}\n' * 3)
    files = ["--input", "in.jsonl", "--output", "out.jsonl"]
    run("infer", ["infer", "--model", "calm/model", *files, "--max_tokens", "2"], (run_batch, "write_answer", LONG, 2),
        signal.SIGINT)
    print(json.dumps(results))


if __name__ == "__main__":
    main_()
