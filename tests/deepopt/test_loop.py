"""The trainer: settings, loop, log, plot, checkpoints, and that a killed run ends in the same bytes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.checkpoint import MANIFEST, write_manifest
from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt import device
from deepseek.deepopt.device import random_state, set_random_state
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.ranks import Ranks
from deepseek.deepopt.run_folder import checkpoints, read_log
from deepseek.deepopt.settings import Leg, Precision, TrainConfig, learning_rate
from deepseek.errors import CheckpointError, ConfigError
from deepseek.files import sha256
from deepseek.model import CausalLM
from deepseek.ops import native
from deepseek.tokenizer import Tokenizer
from tests.helpers import ROOT
from tests.helpers.bf16 import WAYS, computed_by
from tests.helpers.killed_runs import SETTINGS, TINY

GOLDEN = ROOT / "tests" / "golden" / "losses.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    sentences = [f"the {a} {b} the {c} ." for a in ("red", "old", "big") for b in ("fox sees", "cat eats", "dog likes")
                 for c in ("moon", "river", "bread", "song")]
    documents = [Document(" ".join(sentences[i % 36 : i % 36 + 9]) + f" {i}", f"story {i}") for i in range(60)]
    tokenizer = Tokenizer.train((d.text for d in documents), TINY.vocab_size)
    return pack(documents, tokenizer, tmp_path_factory.mktemp("data") / "tokens", valid_fraction=0.1)


def new_model() -> CausalLM:
    return CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("way", "kernels", "width", "precision", "bf16"), [
    ("torch", True, 512, "auto", True), ("torch", True, 384, "auto", False), ("torch", False, 384, "auto", True),
    ("units", True, 64, "auto", True), ("units", True, 64, "fp32", False), ("fp32", True, 512, "auto", False),
    ("fp32", False, 384, "bf16", True), ("torch", True, 512, "fp32", False)])
def test_auto_is_bf16_where_units_are_faster_than_the_kernels(
    way: str, kernels: bool, width: int, precision: Precision, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "bf16_way", lambda: way)
    monkeypatch.setattr(device, "trains_native", lambda _: kernels)
    model = CausalLM.on_meta(replace(TINY, hidden_size=width))
    model.to_empty(device="cpu")
    found = device.compute_dtype(TrainConfig(precision=precision), model)
    assert found == (torch.bfloat16 if bf16 else torch.float32)


def weights(out: Path) -> tuple[str, str]:
    return sha256(out / "model" / "model.safetensors"), sha256(out / "model" / "mtp.safetensors")


@pytest.mark.parametrize(("key", "value"), [
    ("steps", 0), ("steps", 1.5), ("batch_size", -1), ("lr", 0.0), ("lr", math.nan), ("clip", -1.0), ("beta2", 1.0),
    ("warmup_steps", -1), ("precision", "fp8"), ("weight_decay", math.inf), ("steps", True), ("lr", "x"), ("seed", 0.5),
    ("beta1", None)])
def test_impossible_setting_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*must"):
        TrainConfig(**{key: value})


def test_learning_rate_warms_up_and_ends_low() -> None:
    first = Leg.of(TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.1))
    rates = [learning_rate([first], step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == pytest.approx(0.1)
    # an extension warms up from the last rate, and has a cosine of its own
    both = [learning_rate([first, Leg(200, 0.5, 0.2, 4)], step) for step in range(201)]
    assert both[:100] == rates[:100] and both[100:104] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert both[103:] == sorted(both[103:], reverse=True) and both[200] == pytest.approx(0.1)


def test_run_learns_and_leaves_everything(data: TokenShards, tmp_path: Path) -> None:
    seen: list[dict] = []
    TrainingLoop(new_model(), data, replace(SETTINGS, tensorboard=True), tmp_path).run(seen.append)
    records = [record for record, _ in read_log(tmp_path / "log.jsonl")]
    steps, held_out = [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 31)) and steps == seen
    assert [r["step"] for r in held_out] == [10, 20, 30]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    assert all(r["max_vio"] >= 0 and r["mtp_loss"] > 0 and r["balance_loss"] >= 0.9 for r in steps)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000028", "checkpoint-000030"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.parametrize(("precision", "bf16", "tolerance"), [
    ("fp32", "fp32", 2e-3), *(("bf16", way, 2e-2) for way in WAYS)])
def test_losses_are_the_recorded_ones(
    data: TokenShards, tmp_path: Path, precision: Precision, bf16: str, tolerance: float
) -> None:
    """A refactor that changes a loss is not a refactor. Tolerance: another order of FP32 sums; in BF16 also products
    rounded otherwise, which moves near ties of the gate. `auto` would take FP32 or BF16 as the machine has units."""
    seen: list[dict] = []
    with computed_by(bf16):
        TrainingLoop(new_model(), data, replace(SETTINGS, precision=precision), tmp_path).run(seen.append)
    golden = json.loads(GOLDEN.read_text())
    for key, values in golden.items():
        assert [r[key] for r in seen][: len(values)] == pytest.approx(values, rel=tolerance), key


def test_ranks_compute_as_the_first_one(data: TokenShards, tmp_path: Path) -> None:
    class Second(Ranks):
        def from_first(self, value: Any) -> Any:
            assert value == {"activations": "float32"}
            return {"activations": "bfloat16", "bf16_products": "torch"}

    with computed_by("fp32"):
        loop = TrainingLoop(new_model(), data, replace(SETTINGS, precision="auto"), tmp_path, ranks=Second())
        assert loop.model.compute_dtype == torch.bfloat16 and native.bf16_way() == "torch"


def test_a_run_goes_on_with_the_precision_that_auto_has_chosen(
    data: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SETTINGS, steps=4, precision="auto", save_every=2)

    def interrupt(record: dict) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    with computed_by("torch"):
        monkeypatch.setattr(device, "trains_native", lambda _: False)  # then `auto` is BF16 through torch
        TrainingLoop(new_model(), data, config, tmp_path / "calm").run()
        with pytest.raises(KeyboardInterrupt):
            TrainingLoop(new_model(), data, config, tmp_path / "stopped").run(interrupt)
        about = json.loads((checkpoints(tmp_path / "stopped")[-1] / "trainer.json").read_text())
        assert about["step"] == 3 and about["activations"] == "bfloat16" and about["bf16_products"] == "torch"
        native.use_bf16("fp32")  # as if this process had measured otherwise: `auto` would be FP32
        loop = TrainingLoop(new_model(), data, config, tmp_path / "stopped")
        assert loop.model.compute_dtype == torch.bfloat16 and native.bf16_way() == "torch"
        loop.run()
    assert weights(tmp_path / "stopped") == weights(tmp_path / "calm")


@pytest.mark.parametrize(("precision", "old_names"), [("fp32", False), ("bf16", True)])
def test_interrupted_run_continues_bit_by_bit(
    data: TokenShards, tmp_path: Path, precision: Precision, old_names: bool
) -> None:
    config = replace(SETTINGS, steps=12, precision=precision, accumulation=2, save_every=100)
    TrainingLoop(new_model(), data, config, tmp_path / "calm").run()

    def interrupt(record: dict) -> None:
        if record["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TrainingLoop(new_model(), data, config, tmp_path / "stopped").run(interrupt)
    if old_names:  # of 0.1, where a module's `input` was its `entrance`
        file = checkpoints(tmp_path / "stopped")[-1] / "optimizer.safetensors"
        stored = {name.replace(".input.", ".entrance."): tensor for name, tensor in load_file(file).items()}
        assert any(".entrance." in name for name in stored)
        save_file(stored, file)
        (file.parent / MANIFEST).unlink()
        write_manifest(file.parent)
    second = TrainingLoop(new_model(), data, config, tmp_path / "stopped")
    assert second.step == 7
    second.run()
    assert weights(tmp_path / "calm") == weights(tmp_path / "stopped")
    calm, stopped = ([record for record, _ in read_log(tmp_path / run / "log.jsonl")] for run in ("calm", "stopped"))
    for record in (*calm, *stopped):
        for of_clocks in ("tokens_per_second", "seconds"):
            record.pop(of_clocks, None)
    assert calm == stopped


def test_gradient_checkpointing_changes_nothing(data: TokenShards, tmp_path: Path) -> None:
    for name, flag in (("plain", False), ("recomputed", True)):
        TrainingLoop(new_model(), data, replace(SETTINGS, steps=4, gradient_checkpointing=flag), tmp_path / name).run()
    assert weights(tmp_path / "plain") == weights(tmp_path / "recomputed")


def killed(folder: Path, kills: int) -> dict:
    done = subprocess.run([sys.executable, "-m", "tests.helpers.killed_runs", str(folder), str(kills), "1"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    result = killed(tmp_path, 6)
    assert result["kills"] >= 6 and result["killed"] == result["calm"]


@pytest.mark.slow
def test_run_killed_often_ends_in_the_same_bytes(tmp_path: Path) -> None:
    result = killed(tmp_path, 150)
    print(result)
    assert result["kills"] >= 150 and result["during_writes"] >= 10 and result["killed"] == result["calm"]


def test_other_settings_in_the_same_folder_are_refused(data: TokenShards, tmp_path: Path) -> None:
    config = replace(SETTINGS, steps=1)
    TrainingLoop(new_model(), data, config, tmp_path).run()
    with pytest.raises(ConfigError, match=r"holds a run with lr = 0\.003, this one has 0\.1"):
        TrainingLoop(new_model(), data, replace(config, lr=0.1), tmp_path)


def test_a_run_of_a_version_with_fewer_settings_goes_on(data: TokenShards, tmp_path: Path) -> None:
    config = replace(SETTINGS, steps=2, warmup_steps=1)
    TrainingLoop(new_model(), data, config, tmp_path).run()
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["train"]["compress"], settings["train"]["inner_steps"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert TrainingLoop(new_model(), data, config, tmp_path).step == 2
    with pytest.raises(ConfigError, match="holds a run with compress = 'none', this one has 'bf16'"):
        TrainingLoop(new_model(), data, replace(config, compress="bf16"), tmp_path)


def test_two_trainers_in_one_folder_are_refused(data: TokenShards, tmp_path: Path) -> None:
    first = TrainingLoop(new_model(), data, SETTINGS, tmp_path)
    with pytest.raises(ConfigError, match="another process is writing it"):
        TrainingLoop(new_model(), data, SETTINGS, tmp_path)
    assert first.step == 0


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_deleted_during_the_run(data: TokenShards, tmp_path: Path, whole: bool) -> None:
    out, log = tmp_path / "out", tmp_path / "out" / "log.jsonl"

    def delete(record: dict) -> None:
        shutil.rmtree(out) if whole else log.unlink()

    with pytest.raises(ConfigError, match=r"log\.jsonl: was deleted or replaced during the run"):
        TrainingLoop(new_model(), data, replace(SETTINGS, steps=3), out).run(delete)


def test_altered_checkpoint_is_refused_by_name(data: TokenShards, tmp_path: Path) -> None:
    TrainingLoop(new_model(), data, replace(SETTINGS, steps=2), tmp_path).run()
    victim = checkpoints(tmp_path)[-1] / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: altered"):
        TrainingLoop(new_model(), data, replace(SETTINGS, steps=2), tmp_path)


def test_the_random_state_of_a_gpu_is_kept_where_one_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: held.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: held.copy_(state))
    state = random_state(torch.device("cuda"))
    drawn = torch.rand(3)
    held += 1
    set_random_state(state, torch.device("cpu"))  # what a GPU has drawn is of no use to a CPU
    assert torch.equal(torch.rand(3), drawn) and held[0] == 1
    set_random_state(state, torch.device("cuda"))
    assert torch.equal(held, torch.arange(16, dtype=torch.uint8))
    assert random_state(torch.device("cpu")).keys() == {"rng"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_on_a_gpu_goes_on_where_it_was() -> None:
    device = torch.device("cuda")
    state, ones = random_state(device), torch.ones(64, device=device)
    first = torch.nn.functional.dropout(ones)
    set_random_state(state, device)
    assert torch.equal(torch.nn.functional.dropout(ones), first)


def test_torn_last_log_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [r["step"] for r, _ in read_log(tmp_path / "log.jsonl")] == [1]
