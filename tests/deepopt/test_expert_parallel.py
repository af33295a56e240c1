"""Experts divided over ranks: the loss of one process, on the same batches; a part of the experts on each; checkpoints
that go on in another layout; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.checkpoint import load_model, write_tensors
from deepseek.deepopt.expert_parallel import check_layout
from deepseek.deepopt.run_folder import read_log
from deepseek.errors import ConfigError
from tests.helpers import ranks
from tests.helpers.killed_runs import TINY
from tests.helpers.ranks import FOUR, SHORT

PER_RANK = TINY.n_routed_experts // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    data = ranks.packed(folder / "tokens")
    ranks.train(data, folder / "divided", None, stop=2, **SHORT)
    with ranks.together("experts", folder):
        ranks.train(data, folder / "alone-adamw", None, **SHORT)
        ranks.train(data, folder / "alone-muon", None, optimizer="muon", **SHORT)
    ranks.train(data, folder / "joined", None, **SHORT)
    return folder


def same(one: Path, other: Path, tolerance: float) -> None:
    alone, both = ([record for record, _ in read_log(run / "log.jsonl")] for run in (one, other))
    assert [record["step"] for record in both] == [record["step"] for record in alone] == [1, 2, 3, 3]
    for a, b in zip(alone, both, strict=True):
        for key in {"loss", "eval_loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio"} & {*a}:
            assert b[key] == pytest.approx(a[key], rel=tolerance), (key, a["step"])
    one_, two = (load_model(run / "model", torch.float32).state_dict() for run in (one, other))
    for name, tensor in one_.items():
        if not name.endswith("e_score_correction_bias"):  # a sign, which one token may turn
            assert float((two[name] - tensor).norm()) <= 10 * tolerance * float(tensor.norm()), name


@pytest.mark.parametrize(("run", "optimizer", "tolerance"), [
    ("adamw", "adamw", 1e-5), ("muon", "muon", 1e-3),  # Muon's iteration is in BF16 where that is fast
    ("divided", "adamw", 1e-5), ("joined", "adamw", 1e-5), ("placed", "adamw", 1e-5)])
def test_two_ranks_with_half_of_the_experts_take_the_steps_of_one(
        folder: Path, run: str, optimizer: str, tolerance: float) -> None:
    same(folder / f"alone-{optimizer}", folder / run, tolerance)


def test_a_rank_keeps_weights_and_moments_of_its_own_experts_alone(folder: Path) -> None:
    for rank in range(2):
        kept = json.loads((folder / f"kept-{rank}.json").read_text())
        assert {name.rpartition(".")[2] for name in kept} == {"weight", "step", "exp_avg", "exp_avg_sq"}
        assert {shape[0] for shape in kept.values() if shape} == {PER_RANK}


def test_experts_go_to_other_ranks_by_their_loads(folder: Path) -> None:
    steps = [record for record, _ in read_log(folder / "placed" / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in steps if "placed" in record] == [2]
    placed = steps[1]["placed"]
    assert placed["experts"] >= 2 and placed["before"] > placed["after"] >= 1
    fixed = [record for record, _ in read_log(folder / "adamw" / "log.jsonl")]
    assert [record["imbalance"] for record in steps[:2]] == [record["imbalance"] for record in fixed[:2]]
    assert steps[2]["imbalance"] < fixed[2]["imbalance"]


def test_stopped_ranks_go_on_bit_for_bit_where_experts_have_moved(folder: Path) -> None:
    runs = [folder / run / "checkpoint-000003" for run in ("placed", "placed-again")]
    assert (runs[0] / "model.safetensors").read_bytes() == (runs[1] / "model.safetensors").read_bytes()
    once, again = (load_file(run / "optimizer.safetensors") for run in runs)
    assert all(torch.equal(once[name], tensor) for name, tensor in again.items() if name != "rng")  # nothing sets it
    one, other = (json.loads((run / "trainer.json").read_text())["placement"] for run in runs)
    assert one == other and any(sum(loads) for loads in one["loads"])


@pytest.mark.parametrize("run", ["adamw", "adamw-8bit", "muon-8bit"])
def test_experts_move_with_their_moments(folder: Path, run: str) -> None:
    before, after = max((folder / run).glob("checkpoint-*")), folder / run / "moved"
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    old, new = (load_file(path / "optimizer.safetensors") for path in (before, after))
    assert len(new) > 10 and all(torch.equal(old[name], tensor) for name, tensor in new.items())
    codes = {tensor.dtype for name, tensor in new.items() if ".experts." in name}
    assert codes & {torch.uint8, torch.int8} if run.endswith("8bit") else codes == {torch.float32}


def test_checkpoints_are_those_of_one_process(folder: Path) -> None:
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in load_file(
        folder / run / "checkpoint-000003" / "optimizer.safetensors").items()} for run in ("alone-adamw", "adamw")]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_groups_of_ranks_have_one_set_of_experts_each(tmp_path: Path) -> None:
    data = ranks.packed(tmp_path / "tokens")
    with ranks.together("groups", tmp_path, 4):
        ranks.train(data, tmp_path / "alone", None, **FOUR)
    same(tmp_path / "alone", tmp_path / "groups", 1e-5)


@pytest.mark.parametrize(("settings", "size", "message"), [
    ({"expert_parallel": 2}, 3, r"expert_parallel = 2: must divide the number of ranks \(3\)"),
    ({"expert_parallel": 3}, 3, r"expert_parallel = 3: must divide n_routed_experts \(8\)"),
    ({"expert_parallel": 4, "accumulation": 6}, 4, r"accumulation = 6: must be a multiple of the number of ranks .4"),
    ({"expert_parallel": 2, "moments": "8bit"}, 2, r"expert_parallel = 2: with moments = 8bit .* this one has 512"),
    ({"place_every": 5}, 2, "place_every = 5: has a meaning only with expert_parallel"),
    ({"expert_parallel": 2, "compress": "int8"}, 2, "expert_parallel = 2: goes only with compress = none")])
def test_what_cannot_be_divided_is_refused(settings: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(TINY, ranks.config(**settings), size)


def test_tensors_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.rand(4, 3).t(), "c": torch.tensor(2.5),
               "d": torch.rand(2, 3).bfloat16(), "e": torch.zeros(0, 2), "f": torch.arange(6).int().view(3, 2)}
    there = tensors | {"f": tensors["f"].to("meta")}
    write_tensors(tmp_path / "ours", there, lambda name: tensors[name].chunk(3))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert {*ours} == {*theirs} and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name: ours[name].dtype for name in ours} == {name: tensor.dtype for name, tensor in tensors.items()}
    with pytest.raises(AssertionError, match="parts of another size"):
        write_tensors(tmp_path / "short", there, lambda name: tensors[name][:2])
