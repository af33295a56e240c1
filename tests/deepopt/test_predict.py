"""What a run on several machines would cost. That bytes are those of real ranks: test_ranks.py, test_rounds.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from deepseek.cli.main import main
from deepseek.deepopt.predict import Prediction, predict
from deepseek.deepopt.settings import Compress, Line, TrainConfig
from deepseek.errors import ConfigError
from deepseek.model import CausalLM
from tests.helpers.killed_runs import TINY

CONFIG = TrainConfig(batch_size=2, seq_len=32, accumulation=4, precision="fp32")


def predicted(config: TrainConfig = CONFIG, ranks: int = 2, **line: str) -> Prediction:
    return predict(CausalLM(TINY).init_weights(torch.Generator().manual_seed(0)), config, ranks, Line(**line))


def test_the_command_prints_a_table_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.to_dict()))
    words = ["train", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "run"), "--batch_size", "2",
             "--seq_len", "32", "--accumulation", "4"]
    ahead = ["--predict", "2", "--bandwidth", "100Mbit", "--latency", "20ms"]
    assert main([*words, *ahead]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTION, nothing is trained: 2 ranks") and "100Mbit with 20ms one way" in lines[0]
    assert [line.split()[0].rstrip(",") for line in lines[4:]] == ["compress", *get_args(Compress)]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.json"}
    for bad, message in (
            ([*ahead, "--bandwidth", "100"], "bandwidth = '100': must be a positive number with a unit"),
            ([*ahead, "--bandwidth", "0Mbit"], "bandwidth = '0Mbit': must be"),
            ([*ahead, "--latency", "20 minutes"], "latency = '20 minutes': must be a positive number with a unit"),
            ([*ahead, "--ranks", "2"], "predict = 2: is for one process"), (["--predict", "1"], "predict = 1: must be"),
            (["--predict", "5"], "accumulation = 4: must be at least the number of ranks (5)"),
            (["--latency", "1ms"], "latency: has a meaning only with --predict")):
        assert main([*words, *bad]) == 2 and message in capsys.readouterr().err, bad


def test_the_line_counts() -> None:
    assert Line(bandwidth="8Mbit", latency="20ms").seconds(2, 1e6) == pytest.approx(1.04)
    for text, same in (("1MB", "8Mbit"), ("1.5GB/s", "12Gbps"), ("100mbit", "100 Mbit/s"), ("500kbit", "0.5Mbit")):
        assert Line(bandwidth=text).seconds(0, 1e6) == pytest.approx(Line(bandwidth=same).seconds(0, 1e6))
    near, far, thin = (predicted(latency="1us"), predicted(latency="1s"), predicted(bandwidth="1kbit"))
    for one, two, three in zip(near.modes, far.modes, thin.modes, strict=True):
        assert one.line < two.line < three.line and three.efficiency < one.efficiency < 1, one.compress
        assert one.sent == two.sent == three.sent
    none, powersgd = far.modes[0], far.modes[3]
    assert 2 < none.line < 2.1 and 4 < powersgd.line < 4.1  # two hops of an all-reduce among two; PowerSGD takes two


def test_more_ranks_take_fewer_batches_and_send_more() -> None:
    two, four = predicted(), predicted(ranks=4)
    for one, other in zip(two.modes, four.modes, strict=True):
        assert (one.sent < other.sent) == (one.compress not in ("local", "sparse")), one.compress
        assert one.received < other.received
    plain = 4 * sum(p.numel() for p in CausalLM(TINY).parameters())
    assert four.modes[0].sent == pytest.approx(2 * 3 / 4 * plain, rel=0.01)


def test_memory_is_what_there_is() -> None:
    numbers = sum(p.numel() for p in CausalLM(TINY).parameters())
    found = predicted(CONFIG).calibration
    assert found.gradients == 4 * numbers and found.gradients <= found.weights < 1.01 * found.gradients
    assert 2 * found.gradients <= found.moments < 2.01 * found.gradients
    wider, again = (predicted(TrainConfig(**vars(CONFIG) | more)).calibration.activations for more in (
        {"batch_size": 4}, {"batch_size": 4, "gradient_checkpointing": True}))
    assert 1.7 < wider / found.activations < 2.1 and again < 0.7 * wider
    states: dict[str, Any] = {mode.compress: mode.state / found.gradients for mode in predicted().modes}
    assert states["none"] == 0 and states["int8"] == pytest.approx(1.5)  # of what goes to each rank, and of its sum
    assert states["local"] == pytest.approx(3, rel=0.1) and states["sparse"] == pytest.approx(2, rel=0.1)


def test_settings_of_a_mode_count_where_the_run_has_it() -> None:
    low = predicted(TrainConfig(**vars(CONFIG) | {"compress": "powersgd", "powersgd_rank": 1}))
    assert low.modes[3].sent < predicted().modes[3].sent
    short = predicted(TrainConfig(**vars(CONFIG) | {"compress": "local", "inner_steps": 2}))
    assert "sparse, 2 steps a round" in short.table() and short.modes[5].sent > predicted().modes[5].sent


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="accumulation = 4: must be at least the number of ranks"):
        predicted(ranks=8)
