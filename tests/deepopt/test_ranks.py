"""Several processes in step: the loss of one process, on the same batches; what they send; who is missing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint import load_model
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.predict import predict
from deepseek.deepopt.ranks import BUCKET, Ranks, buckets, even
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import Line
from deepseek.deepopt.shares import Shares, by_speed
from deepseek.errors import ConfigError
from deepseek.files import sha256
from deepseek.model import CausalLM
from tests.helpers import ranks
from tests.helpers.killed_runs import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left (helpers/ranks.py), and one alone in FOLDER/alone."""
    folder = tmp_path_factory.mktemp("ranks")
    data = ranks.packed(folder / "tokens")
    with ranks.together("in_step", folder):
        ranks.train(data, folder / "alone", None)
        ranks.train(data, folder / "alone-long", None, **ranks.LONG)
    return folder


def log(run: Path) -> list[dict[str, Any]]:
    return [record for record, _ in read_log(run / "log.jsonl")]


@pytest.mark.parametrize(("run", "tolerance"), [("none", 1e-5), ("bf16", 1e-3), ("int8", 1e-3),
                                                ("powersgd", 0.03)])
def test_two_ranks_take_the_steps_of_one(folder: Path, run: str, tolerance: float) -> None:
    alone, both = log(folder / "alone"), log(folder / run)
    assert [record["step"] for record in both] == [record["step"] for record in alone]
    for one, two in zip(alone, both, strict=True):
        for key in {"loss", "eval_loss", "mtp_loss", "balance_loss"} & {*one}:
            assert two[key] == pytest.approx(one[key], rel=tolerance), (key, one["step"])
    assert both[0]["max_vio"] == pytest.approx(alone[0]["max_vio"])  # of the loads of all
    one, two = (load_model(folder / name / "model", torch.float32).state_dict() for name in ("alone", run))
    distance = sum(float((two[name] - one[name]).square().sum()) for name in one)
    start = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0)).state_dict()
    moved = sum(float((one[name] - start[name]).square().sum()) for name in one)
    assert distance < moved * {"none": 1e-6, "powersgd": 0.9}.get(run, 0.05)


def test_ranks_with_bf16_weights_have_the_same_bits(folder: Path) -> None:
    one, two = (json.loads((folder / f"found-{rank}.json").read_text())["narrow"] for rank in range(2))
    assert one == two
    assert log(folder / "narrow")[-1]["eval_loss"] == pytest.approx(log(folder / "alone")[-1]["eval_loss"], rel=2e-3)


def test_records_say_what_a_rank_sent(folder: Path) -> None:
    sent = {run: {record["bytes_sent"] for record in log(folder / run) if "loss" in record}
            for run in ("none", "bf16", "int8", "powersgd")}
    plain = 4 * sum(p.numel() for p in CausalLM(TINY).parameters())
    (none,), (bf16,), (int8,) = sent["none"], sent["bf16"], sent["int8"]  # of every step the same
    assert plain < none < 1.1 * plain and 0.45 < bf16 / none < 0.55 and 0.25 < int8 / none < 0.3
    assert max(sent["powersgd"]) < none and "bytes_sent" not in log(folder / "alone")[0]


def test_bytes_are_those_predicted(folder: Path) -> None:
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    for mode in predict(model, ranks.config(), 2, Line()).modes[:4]:
        for record in log(folder / mode.compress):
            if "loss" in record:
                assert mode.sent == pytest.approx(record["bytes_sent"], rel=0.01)


def test_a_run_that_was_stopped_goes_on_with_what_each_rank_has_not_sent(folder: Path) -> None:
    assert sha256(folder / "int8" / "model" / "model.safetensors") == sha256(
        folder / "again" / "model" / "model.safetensors")
    states = [path.name for path in (folder / "again" / "rank-0001").iterdir()]
    assert sorted(states) == ["000003.safetensors", "000006.safetensors"]


def test_a_slow_rank_takes_fewer_batches(folder: Path) -> None:
    alone, both = log(folder / "alone-long"), log(folder / "slow")
    for one, two in zip(alone, both, strict=True):
        for key in {"loss", "eval_loss", "mtp_loss", "balance_loss"} & {*one}:
            assert two[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
    steps = [record for record in both if "loss" in record]
    shares = [record["shares"] for record in steps]
    assert shares[:5] == [{"0": 2, "1": 2}] * 5 and shares[5:10] == [{"0": 3, "1": 1}] * 5
    assert shares[10] == {"0": 3, "1": 1}  # of other processes, which go on from step 10, and neither is slow
    about = json.loads((folder / "slow" / "checkpoint-000010" / "trainer.json").read_text())["shares"]
    assert about["now"] == [3, 1] and about["speeds"][0] > 1.6 * about["speeds"][1]
    assert all(0 < record["efficiency"] <= 1 for record in steps)


def test_even_shares_do_not_depend_on_clocks(folder: Path) -> None:
    assert {json.dumps(record["shares"]) for record in log(folder / "even") if "loss" in record} == {'{"0": 2, "1": 2}'}
    assert sha256(folder / "even" / "model" / "model.safetensors") == sha256(
        folder / "none" / "model" / "model.safetensors")


def test_shares_follow_speeds_and_do_not_flap() -> None:
    assert by_speed(4, [3.0, 1.0]) == [3, 1] and by_speed(16, [3.0, 1.0]) == [12, 4]
    assert by_speed(7, [1.0, 1.0, 1.0]) == even(7, 3) and by_speed(3, [100.0, 1.0, 1.0]) == [1, 1, 1]
    draw, count = random.Random(0), 16
    shares, changes = Shares(count, 2, moves=True), []
    for step in range(1, 201):  # a rank at half the other's speed, both of them 20 % off or less
        before = shares.now
        shares.take(step, [100] * count, [share * draw.uniform(0.8, 1.2) * slow for share, slow in zip(
            before, (1, 2), strict=True)])
        changes += [step] * (shares.now != before)
    assert changes and max(changes) <= 10 and 10 <= shares.now[0] <= 11
    again = Shares(count, 2, moves=True)
    again.load(json.loads(json.dumps(shares.state())))
    assert again.state() == shares.state()
    for other in (Shares(count, 3, moves=True), Shares(count, 2, moves=False), Shares(8, 2, moves=True)):
        before = other.now
        other.load(shares.state())
        assert other.now == before == even(sum(before), len(before))


def test_errors_name_the_rank(folder: Path) -> None:
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["differs"] == found[1]["differs"] == (
        "colour: must be the same on all ranks; rank 0 has 'red', rank 1 'green'")
    assert found[0]["late"].startswith("rank 0, step 7: no answer from rank 1, last heard of step 8 (time-out 1 s; ")


def test_fewer_batches_than_ranks_are_refused(tmp_path: Path) -> None:
    data = ranks.packed(tmp_path / "tokens")
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"accumulation = 4: must be at least the number of ranks \(5\)"):
        TrainingLoop(model, data, ranks.config(), tmp_path / "run", ranks=Ranks(0, 5))


def test_batches_are_divided_without_gap_or_overlap() -> None:
    for count, size in ((4, 1), (4, 3), (7, 4), (8, 8)):
        parts = [Ranks(rank, size).part(count) for rank in range(size)]
        assert [micro for part in parts for micro in part] == [*range(count)]
        assert {len(part) for part in parts} <= {count // size, -(-count // size)}
    assert [*Ranks(1, 3).part(6, [1, 3, 2])] == [1, 2, 3] and even(7, 3) == [3, 2, 2]


def test_buckets_keep_order_and_type() -> None:
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in (
        (3, torch.float32), (BUCKET, torch.float32), (5, torch.float32), (2, torch.int64), (1, torch.float32))]
    found = [[len(tensor) for tensor in bucket] for bucket in buckets(tensors)]
    assert found == [[3], [BUCKET], [5], [2], [1]]
    assert [tensor for bucket in buckets(tensors) for tensor in bucket] == tensors
