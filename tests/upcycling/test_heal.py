"""Training of carved experts: the loss against its formula, what learns, what a stop leaves, what text is given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from deepseek.checkpoint import load_model
from deepseek.cli import main
from deepseek.errors import ConfigError
from deepseek.upcycling import heal as healing
from deepseek.upcycling.carve import carve
from deepseek.upcycling.carve_settings import HealConfig
from deepseek.upcycling.distil import BEST, best_of, distillation_loss
from deepseek.upcycling.heal import HealData, HealLoop
from tests.upcycling.test_carve import asked, dense  # noqa: F401 - a fixture


@pytest.mark.parametrize("kl_share", [0.0, 0.3, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_formula(kl_share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x_MH = torch.randn(40, 12, generator=generator).requires_grad_()
    w_VH = torch.randn(100, 12, generator=generator)
    labels_M = torch.randint(0, 100, (40,), generator=generator)
    labels_M[3] = -100
    targets = best_of(3 * torch.randn(40, 100, generator=generator))
    total, entropy, kl = distillation_loss(x_MH, w_VH, labels_M, targets, kl_share)
    (2 * total).backward()
    got, x_MH.grad = x_MH.grad, None
    log_q_MK = (x_MH @ w_VH.t()).log_softmax(-1).gather(1, targets.ids)
    rest_t, rest_q = (1 - logs.exp().sum(1) for logs in (targets.log_p, log_q_MK))
    want_kl = ((targets.log_p.exp() * (targets.log_p - log_q_MK)).sum(1) + rest_t * (rest_t / rest_q).log())[
        labels_M >= 0].mean()
    want_entropy = cross_entropy(x_MH @ w_VH.t(), labels_M)
    (2 * (kl_share * want_kl + (1 - kl_share) * want_entropy)).backward()
    assert torch.allclose(kl, want_kl, atol=1e-5) and torch.allclose(entropy, want_entropy, atol=1e-5)
    assert torch.allclose(total, kl_share * kl + (1 - kl_share) * entropy)
    assert got is not None and x_MH.grad is not None and torch.allclose(got, x_MH.grad, atol=1e-6)


def test_the_teacher_itself_has_no_divergence() -> None:
    x_MH, w_VH = torch.randn(8, 6), torch.randn(30, 6)
    targets = best_of(x_MH @ w_VH.t())
    assert targets.ids.shape == (8, BEST)
    _, _, kl = distillation_loss(x_MH, w_VH, torch.zeros(8, dtype=torch.int64), targets, 1.0)
    assert abs(float(kl)) < 1e-5


def texts(dense: Path) -> tuple[str, ...]:  # noqa: F811
    """Two names, many documents each."""
    lines = (dense.parent / "text.txt").read_text().splitlines()
    for name, part in (("land", lines[::2]), ("sea", [line[::-1] for line in lines[1::2]])):
        (dense.parent / f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(part[i:] + part[:i])}) + "\n"
                                                            for i in range(len(part))))
    return tuple(f"{name}={dense.parent / name}.jsonl" for name in ("land", "sea"))


def training(dense: Path, **changes: Any) -> HealConfig:  # noqa: F811
    keys: dict[str, Any] = dict(heal=texts(dense), heal_tokens=64 * 4 * 12, heal_batch=4, heal_lr=3e-3, heal_saved=4,
                                heal_evaluated=4)
    return HealConfig(**keys | changes)


def test_healing_lowers_every_loss_and_changes_experts_alone(dense: Path) -> None:  # noqa: F811
    out, run = dense.parent / "v3", dense.parent / "v3.run"
    found = carve(dense, out, asked(dense, 0.5, calibrate=(), calibration_tokens=512),
                  training(dense, anneal=0.5, kl_share=0.0))
    assert {*found.losses} == {"dense", "before", "after"} and {*found.losses["after"]} == {"land", "sea"}
    for name, before in found.losses["before"].items():
        assert found.losses["after"][name] < before - 0.1
    carved, healed = (load_model(folder).state_dict() for folder in (run / "carved", out))
    changed = {name for name, tensor in healed.items() if not torch.equal(tensor, carved[name])}
    assert changed and all(".mlp." in name and ".layers.0." not in name for name in changed)
    assert any("gate.weight" in name for name in changed) and any(".shared_experts." in name for name in changed)
    log = [json.loads(line) for line in (run / "heal" / "log.jsonl").read_text().splitlines()]
    active = [record["experts_per_token"] for record in log if "kl" in record]
    assert active[0] == 10 and active[5] > active[6] == active[-1] == 2
    assert (out / "loss.png").is_file() and "| after | " in (out / "report.md").read_text()
    report = json.loads((out / "report.json").read_text())
    assert report["losses"] == found.losses and "path" not in report
    log_p = load_file(run / "targets" / "targets-000000.safetensors")["log_p"]
    assert log_p.shape == (48, 64, BEST) and math.isclose(float(log_p[:, :, 0].float().exp().mean()), 0.5, abs_tol=0.5)


def test_what_was_stopped_goes_on_bit_for_bit(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(healing, "CHUNK", 20)
    whole = carve(dense, dense.parent / "whole", asked(dense), training(dense))
    out, ask, step = dense.parent / "again", healing.best_of, HealLoop.train_step
    asked_for, taken = [0], [0]

    def stopped_asking(logits: Any) -> Any:
        asked_for[0] += 1
        if asked_for[0] == 30:
            raise KeyboardInterrupt
        return ask(logits)

    def stopped_training(self: HealLoop) -> dict[str, Any]:
        taken[0] += 1
        if taken[0] == 7:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(healing, "best_of", stopped_asking)
    with pytest.raises(KeyboardInterrupt):
        carve(dense, out, asked(dense), training(dense))
    monkeypatch.setattr(HealLoop, "train_step", stopped_training)
    with pytest.raises(KeyboardInterrupt):
        carve(dense, out, asked(dense), training(dense))
    assert not out.exists()
    again = carve(dense, out, asked(dense), training(dense))
    assert again.losses == whole.losses and asked_for[0] == 30 + 28 and taken[0] == 7 + 6
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole.path / name).read_bytes()


def test_other_text_in_the_same_folder_is_refused(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    settings = training(dense)

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(HealLoop, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        carve(dense, dense.parent / "v3", asked(dense), settings)
    file = dense.parent / "land.jsonl"
    file.write_text(file.read_text() + json.dumps({"text": "the sea " * 90}) + "\n")
    with pytest.raises(ConfigError, match=r"holds a run with fingerprint = .*, this one has"):
        carve(dense, dense.parent / "v3", asked(dense), settings)


def test_a_carved_model_can_be_healed_later(dense: Path) -> None:  # noqa: F811
    out, run, settings = dense.parent / "v3", dense.parent / "v3.run", training(dense)
    text = settings.heal
    carve(dense, out, asked(dense, calibrate=text))
    layers = {file: file.stat().st_mtime_ns for file in (run / "layers").iterdir()}
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        carve(dense, out, asked(dense, calibrate=text), settings)
    found = carve(dense, out, asked(dense, calibrate=text), settings, overwrite=True)
    assert {*found.losses} == {"dense", "before", "after"}
    assert {file: file.stat().st_mtime_ns for file in (run / "layers").iterdir()} == layers
    (dense.parent / "sea.jsonl").write_text(json.dumps({"text": "the land " * 90}) + "\n")
    with pytest.raises(ConfigError, match=r"v3\.run: holds the beginning of another model, of calibrate = "):
        carve(dense, out, asked(dense, calibrate=text), overwrite=True)


def test_windows_come_from_each_name_in_turn(dense: Path) -> None:  # noqa: F811
    from deepseek import Tokenizer

    places = {name: [path] for name, _, path in (word.partition("=") for word in texts(dense))}
    data = HealData.pack(places, Tokenizer.load(dense), dense.parent / "run", 64, 0)
    batch = data.batch(3, 4, 64, seed=0)
    assert torch.equal(batch.ids_BT[1:2], data.shards["sea"].batch(6, 1, 64, seed=0).ids_BT)
    assert torch.equal(batch.labels_BT[2:3], data.shards["land"].batch(7, 1, 64, seed=0).labels_BT)


def test_the_command(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    out = str(dense.parent / "v3")
    assert main(["upcycle", str(dense), out, "--carve", "0.75", "--heal", *texts(dense), "--expert_width", "8",
                 "--heal_tokens", "512", "--calibration_tokens", "512"]) == 0
    said = capsys.readouterr().out
    assert "| perplexity | land | sea |" in said and f"run:    {out}.run" in said
