"""Weights divided over ranks by FSDP2: the loss of one process, on the same batches; a part of all tensors on each;
checkpoints that go on in another layout; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from deepseek.checkpoint import load_model
from deepseek.deepopt.shares import check_even
from deepseek.errors import ConfigError
from deepseek.files import sha256
from deepseek.model import CausalLM
from tests.deepopt.test_expert_parallel import same
from tests.helpers import ranks
from tests.helpers.killed_runs import TINY
from tests.helpers.ranks import SHORT

MUON: dict[str, Any] = SHORT | {"optimizer": "muon"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    data = ranks.packed(folder / "tokens")
    ranks.train(data, folder / "divided", None, stop=2, **SHORT)
    with ranks.together("fsdp", folder):
        ranks.train(data, folder / "alone-adamw", None, **SHORT)
        ranks.train(data, folder / "alone-muon", None, **MUON)
        ranks.train(data, folder / "alone-bf16", None, precision="bf16", **SHORT)
    ranks.train(data, folder / "joined", None, **SHORT)
    return folder


@pytest.mark.parametrize(("run", "alone", "tolerance"), [
    ("adamw", "adamw", 1e-5), ("muon", "muon", 1e-3),  # Muon's iteration is in BF16 where that is fast
    ("bf16", "bf16", 2e-3), ("divided", "adamw", 1e-5), ("joined", "adamw", 1e-5)])
def test_two_ranks_take_the_steps_of_one(folder: Path, run: str, alone: str, tolerance: float) -> None:
    same(folder / f"alone-{alone}", folder / run, tolerance)


def test_a_rank_keeps_half_of_all_weights_and_moments(folder: Path) -> None:
    kept = [json.loads((folder / f"kept-{rank}.json").read_text()) for rank in range(2)]
    shapes = {name: [*p.shape] for name, p in CausalLM.on_meta(TINY).named_parameters()}
    assert {place.rpartition(".")[0] for place in kept[0]} == shapes.keys()
    assert {place.rpartition(".")[2] for place in kept[0]} == {"weight", "exp_avg", "exp_avg_sq"}
    for place, one in kept[0].items():
        whole = shapes[place.rpartition(".")[0]]
        assert one[1:] == kept[1][place][1:] == whole[1:]
        assert one[0] == -(-whole[0] // 2) and one[0] + kept[1][place][0] == whole[0]


def test_stopped_ranks_go_on_bit_for_bit(folder: Path) -> None:
    # the same steps as the run with recomputed activations, whose products are the same
    assert sha256(folder / "again" / "model" / "model.safetensors") == sha256(
        folder / "muon" / "model" / "model.safetensors")


def test_checkpoints_are_those_of_one_process(folder: Path) -> None:
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in load_file(
        folder / run / "checkpoint-000003" / "optimizer.safetensors").items()} for run in ("alone-adamw", "adamw")]
    assert shapes[0] == shapes[1]
    load_model(folder / "adamw" / "checkpoint-000003")


@pytest.mark.slow
def test_three_ranks_have_parts_of_other_sizes(tmp_path: Path) -> None:
    data, three = ranks.packed(tmp_path / "tokens"), MUON | {"accumulation": 3}
    with ranks.together("fsdp3", tmp_path, 3):
        ranks.train(data, tmp_path / "alone", None, **three)
    same(tmp_path / "alone", tmp_path / "uneven", 1e-3)


@pytest.mark.parametrize(("settings", "message"), [
    ({"accumulation": 3}, r"accumulation = 3: must be a multiple of the number of ranks \(2\) with fsdp"),
    ({"compress": "int8"}, "fsdp = True: goes only with compress = none, this is int8"),
    ({"expert_parallel": 2}, "fsdp = True: goes only with expert_parallel = 1, this is 2"),
    ({"activations": "fp8"}, "fsdp = True: goes only with activations = plain, this is fp8"),
    ({"moments": "8bit"}, "fsdp = True: goes only with moments = fp32, this is 8bit")])
def test_what_cannot_be_divided_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_even(ranks.config(fsdp=True, **settings), 2)


def test_one_process_has_nothing_to_divide() -> None:
    with pytest.raises(ConfigError, match="fsdp = True: has a meaning only with several ranks"):
        check_even(ranks.config(fsdp=True), 1)
