"""`deepseek train --ranks N`: real processes, and real ends of them. Minutes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig
from deepseek.deepopt.run_folder import checkpoints, read_log
from tests.helpers import ROOT
from tests.helpers.killed_runs import TINY

STEPS = 60
LOCAL = ["--compress", "local", "--inner_steps", "3"]


def command(folder: Path, name: str, *more: str) -> list[str]:
    if not (folder / "text.txt").exists():
        draw = random.Random(0)
        words = [f"w{draw.randrange(40)}" for _ in range(20000)]
        (folder / "text.txt").write_text("\n\n".join(" ".join(words[i : i + 100]) for i in range(0, 20000, 100)))
        (folder / "tiny.json").write_text(json.dumps(TINY.to_dict()))
        assert ModelConfig.from_file(folder / "tiny.json").hidden_size == TINY.hidden_size
    return [sys.executable, "-m", "deepseek", "train", str(folder / "tiny.json"), str(folder / "text.txt"), "--out",
            str(folder / name), "--steps", str(STEPS), "--batch_size", "2", "--seq_len", "32", "--accumulation", "4",
            "--warmup_steps", "4", "--eval_every", "30", "--save_every", "6", "--precision", "fp32", "--ranks", "2",
            *more]


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """The ranks of a launcher."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return sorted(int(pid) for pid in found.split())


def reached(out: Path, step: int) -> bool:
    return any(record["step"] >= step for record, _ in read_log(out / "log.jsonl"))


def until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        if holds():
            return
        assert process.poll() is None, "the run has ended"
        time.sleep(0.05)
    raise AssertionError("what was waited for did not come")


@pytest.mark.parametrize("more", [pytest.param(LOCAL, marks=pytest.mark.slow), []])
def test_a_rank_that_says_what_is_wrong_is_not_started_again(tmp_path: Path, more: list[str]) -> None:
    words = command(tmp_path, "run", *more, "--seq_len", "9999999")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "seq_len = 9999999" in done.stderr, done.stderr
    assert "start again" not in done.stderr and "starts again" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_end_a_run_in_step(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, "run", "--rank_timeout", "5"), cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: reached(tmp_path / "run", 12), process)
    os.kill(children(process)[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and b"a rank does not answer; all start again" in errors, errors.decode()
    assert load_model(tmp_path / "run" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("more", [LOCAL, [], ["--expert_parallel", "2"], ["--fsdp"]])
def test_a_killed_rank_does_not_end_the_run(tmp_path: Path, more: list[str]) -> None:
    process = subprocess.Popen(command(tmp_path, "run", *more), cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: reached(tmp_path / "run", 12), process)
    ranks = children(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert load_model(tmp_path / "run" / "model")
    log = [record for record, _ in read_log(tmp_path / "run" / "log.jsonl")]
    losses = [record["loss"] for record in log if "loss" in record]
    assert losses[-1] < losses[0] and log[-1]["step"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("more", [LOCAL, [], ["--expert_parallel", "2"], ["--fsdp"]])
def test_a_signal_stops_all_ranks_and_the_same_command_goes_on(tmp_path: Path, more: list[str]) -> None:
    process = subprocess.Popen(command(tmp_path, "run", *more), cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: reached(tmp_path / "run", 6), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, errors.decode()
    found = checkpoints(tmp_path / "run")
    assert found and not (tmp_path / "run" / "model").exists()
    done = subprocess.run(command(tmp_path, "run", *more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout and load_model(tmp_path / "run" / "model")
