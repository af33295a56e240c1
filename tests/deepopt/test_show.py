"""`deepseek watch RUN`: a run as it goes, from its folder; what TensorBoard gets of its records."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.main import main
from deepseek.deepopt.run_folder import SETTINGS, RunLog, scalars
from deepseek.deepopt.settings import TrainConfig
from deepseek.deepopt.show import RunView, duration, time_left

STEP = {"loss": 3.0, "lr": 1e-3, "grad_norm": 1.0, "max_vio": 0.5, "tokens_per_second": 500, "seconds": 2.0}
ROUND = STEP | {"round": 0, "ranks": [0, 1], "steps": {"0": 30, "1": 12}, "efficiency": 0.9, "waited": 1.0,
                "bytes_sent": 1_234_000, "bytes_received": 2_000_000}


def run(out: Path, *records: dict[str, Any], **settings: Any) -> Path:
    out.mkdir()
    (out / SETTINGS).write_text(json.dumps({"train": asdict(TrainConfig(steps=100, **settings)), "model": {}}))
    write(out, *records)
    return out


def write(out: Path, *records: dict[str, Any]) -> None:
    with (out / "log.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_in_step(tmp_path: Path) -> None:
    ranks = {"shares": {"0": 3, "1": 1}, "bytes_sent": 5_000, "imbalance": 1.125}
    out = run(tmp_path / "run", *(STEP | ranks | {"step": step, "loss": 4.0 - step / 100} for step in range(1, 41)),
              {"step": 40, "eval_loss": 3.5})
    view, more = RunView(out).look()
    for words in ("40 of 100", "40%", "loss         3.6000, mean of the last 20 steps: 3.6950", "3.5000 at step 40",
                  "500 tokens/s", "0.005 MB in the last step", "1.12 times the mean", "0: 3 batches, 1: 1 batches",
                  "stopped"):
        assert words in view, words
    assert more and "left" not in view  # no process is known to work on it
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        view, more = RunView(out).look()
        assert more and "running" in view and "about 2 min left" in view


def test_a_run_in_rounds(tmp_path: Path) -> None:
    out = run(tmp_path / "run", {"step": 30} | ROUND, {"step": 60} | ROUND, {"step": 60, "eval_loss": 3.5}, {
        "step": 90} | ROUND, {"step": 90, "eval_loss": 3.6}, compress="local")
    view, _ = RunView(out).look()
    for words in ("90 of 100", "mean of the last 3 rounds", "3.6000 at step 90, lowest 3.5000 at step 60", "90.0%",
                  "1.234 MB in the last round, received 2.000 MB", "0: 30 steps, 1: 12 steps"):
        assert words in view, words
    assert time_left([{"step": 30} | ROUND, {"step": 60} | ROUND], 45) == pytest.approx(3.0)


def test_it_follows_the_log_also_where_that_was_cut_back(tmp_path: Path) -> None:
    view = RunView(out := run(tmp_path / "run"))
    assert "0 of 100" in view.look()[0]
    write(out, {"step": 1} | STEP, {"step": 2} | STEP)
    assert "2 of 100" in view.look()[0]
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert "2 of 100" in view.look()[0]
    RunLog(out, 1, False).close()
    assert "1 of 100" in view.look()[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(tmp_path / "run", {"step": 99} | STEP)
    assert main(["watch", str(out), "--once"]) == 0 and "99 of 100" in capsys.readouterr().out
    rest = threading.Timer(0.3, write, (out, {"step": 100} | STEP))
    rest.start()
    assert main(["watch", str(out), "--interval", "0.05"]) == 0  # and ends as the run does
    rest.join()
    pages = capsys.readouterr().out
    assert "99 of 100" in pages and "100 of 100" in pages and "finished" in pages
    (tmp_path / "none").mkdir()
    for words, message in (([str(tmp_path / "none")], "holds no run"), ([str(tmp_path / "nowhere")], "folder of a run"),
                           ([str(out), "--api_key", "x"], "api_key: applies to the URL of a server alone")):
        assert main(["watch", *words, "--once"]) == 2 and message in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import deepseek.deepopt.show, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tensorboard_gets_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, True)
    log.write({"step": 30, "words": "x", "nothing": None} | ROUND)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert found == pytest.approx(dict(scalars(ROUND))) and found["steps/1"] == 12 and found["ranks"] == 2
    assert all(event.step == 30 for event in events.Scalars("loss"))


def test_durations() -> None:
    assert [duration(seconds) for seconds in (45, 720, 12_000, 190_000)] == ["45 s", "12 min", "3 h 20 min", "2 d 4 h"]
