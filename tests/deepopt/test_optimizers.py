"""Muon and moments of 8 bits: what a step is, that models learn with them, that a stopped run goes on bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepseek.checkpoint import write_manifest
from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt import optimizers
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.optimizers import MuonAdamW, make_optimizer, orthogonalise, trained
from deepseek.deepopt.settings import TrainConfig
from deepseek.errors import ConfigError
from deepseek.files import write_json
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from deepseek.tune.loop import PartialTrainer
from tests.helpers.killed_runs import SETTINGS, TINY


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Shapes this small are not worth the wait of one thread for another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MUON: dict[str, Any] = {"optimizer": "muon"}
MUON8: dict[str, Any] = {"optimizer": "muon", "moments": "8bit"}
ADAMW8: dict[str, Any] = {"moments": "8bit"}
BF16: dict[str, Any] = {"moments": "8bit", "weights": "bf16"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(values: list[Tensor], steps: int = 3, **options: Any) -> list[Tensor]:
    """Parameters after a few steps of Muon on a group of them, along gradients that depend on their places alone."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    group = {"params": parameters, "weight_decay": 0.1, "parts": 1} | options
    follow(MuonAdamW([group], lr=0.02, betas=(0.9, 0.95), momentum=0.9), parameters, steps)
    return [p.detach() for p in parameters]


def follow(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = randn(*p.shape, seed=100 * step + i)
        optimizer.step()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(4, 24, 48), (3, 48, 24), (2, 32, 32), (1, 1, 9)])
def test_singular_values_come_near_one_and_vectors_stay(
    shape: tuple[int, ...], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "fast_bf16", lambda _: bf16)
    u, s, v = torch.linalg.svd(randn(*shape), full_matrices=False)
    s = torch.logspace(0, -1, s.shape[-1]) * torch.tensor([1e-5, 1.0, 1e3, 10.0])[: shape[0], None]
    y_NRC = orthogonalise(u @ torch.diag_embed(s) @ v)
    values = torch.linalg.svdvals(y_NRC)
    assert y_NRC.dtype == torch.float32 and float(values.min()) > 0.6 and float(values.max()) < 1.3
    inner = u.mT @ y_NRC @ v.mT  # diagonal where the vectors are the same
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < (0.05 if bf16 else 1e-3)
    assert not orthogonalise(torch.zeros(2, 3, 5)).any()


@pytest.mark.parametrize("columns", [24, 6])
@pytest.mark.parametrize("bf16", [False, True])
def test_stacked_experts_are_matrices_of_their_own(bf16: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerance: products of a batch and of one matrix may add in another order."""
    monkeypatch.setattr(optimizers, "fast_bf16", lambda _: bf16)
    grad_EOI, weight_EOI = randn(5, 16, columns, seed=7), randn(5, 16, columns)

    def moved(places: slice, parts: int) -> Tensor:
        p = nn.Parameter(weight_EOI[:, places].clone())
        p.grad = grad_EOI[:, places].clone()
        MuonAdamW([{"params": [p], "parts": parts}], lr=0.1, betas=(0.9, 0.95), momentum=0.9).step()
        return p.detach()

    def alone(expert: int) -> Tensor:
        p = nn.Parameter(weight_EOI[expert].clone())
        p.grad = grad_EOI[expert].clone()
        MuonAdamW([{"params": [p], "parts": 1}], lr=0.1, betas=(0.9, 0.95), momentum=0.9).step()
        return p.detach()

    tolerance = 4e-3 if bf16 else 1e-5
    whole = moved(slice(None), 1)
    torch.testing.assert_close(whole, torch.stack([alone(e) for e in range(5)]), rtol=0, atol=tolerance)
    halves = torch.cat([moved(slice(0, 8), 1), moved(slice(8, 16), 1)], 1)
    torch.testing.assert_close(moved(slice(None), 2), halves, rtol=0, atol=tolerance)
    assert float((whole - halves).abs().max()) > 0.02  # gate and up apart are not one matrix


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_matrix_moves_as_with_torchs_muon(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerance: BF16 products."""
    monkeypatch.setattr(optimizers, "fast_bf16", lambda _: True)
    start, theirs = randn(*shape), nn.Parameter(randn(*shape))
    follow(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
           [theirs], 3)
    torch.testing.assert_close(stepped([start])[0], theirs.detach(), rtol=0, atol=2e-3)


def test_the_rest_moves_as_with_torchs_adamw() -> None:
    values = [randn(7), randn(90, 60), randn(3, 5)]
    theirs = [nn.Parameter(value.clone()) for value in values]
    follow(torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, fused=True), theirs, 3)
    assert all(map(torch.equal, stepped(values, parts=0), theirs))


def test_muon_takes_the_matrices_that_are_maps() -> None:
    model = CausalLM(TINY)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.3)).param_groups
    found = {names[id(p)]: (group["parts"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == trained(model).keys()
    layer = "model.layers.1."
    assert {name.removeprefix(layer): how for name, how in found.items() if name.startswith(layer)} == {
        **{f"self_attn.{part}_proj.weight": (1, 0.3) for part in ("q", "kv_b", "o")},
        **{f"mlp.shared_experts.{part}_proj.weight": (1, 0.3) for part in ("gate", "up", "down")},
        "self_attn.kv_a_proj_with_mqa.weight": (1, 0.3), "mlp.experts.gate_up_proj": (2, 0.3),
        "mlp.experts.down_proj": (1, 0.3), "mlp.gate.weight": (0, 0.3), "input_layernorm.weight": (0, 0.0),
        "post_attention_layernorm.weight": (0, 0.0), "self_attn.kv_a_layernorm.weight": (0, 0.0)}
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == (0, 0.3)
    groups = make_optimizer(model, TrainConfig()).param_groups  # AdamW alone
    assert not any(group["parts"] and group["params"] for group in groups)


# ---- runs ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    words = [f"the {a} {b} ." for a in ("red", "old", "big") for b in ("fox sees", "cat eats", "dog likes")]
    documents = [Document(" ".join(words[i % 9:] + words[: i % 9]) + f" {i}", f"story {i}") for i in range(60)]
    tokenizer = Tokenizer.train((d.text for d in documents), TINY.vocab_size)
    return pack(documents, tokenizer, tmp_path_factory.mktemp("data") / "tokens", valid_fraction=0.1)


def new_model() -> CausalLM:
    return CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))


class Experts(PartialTrainer):
    """Trains experts alone."""

    def __init__(self, model: CausalLM, *args: Any) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(".experts." in name)
        super().__init__(model, *args)


@pytest.mark.parametrize("trainer", [TrainingLoop, Experts])
@pytest.mark.parametrize("kind", [MUON, MUON8, ADAMW8, BF16, MUON | BF16], ids=str)
def test_interrupted_run_continues_bit_by_bit(
    data: TokenShards, tmp_path: Path, kind: dict[str, Any], trainer: type[TrainingLoop]
) -> None:
    config = replace(SETTINGS, steps=6, save_every=100, **kind)
    calm = trainer(new_model(), data, config, tmp_path / "calm")
    calm.run()

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(new_model(), data, config, tmp_path / "stopped").run(interrupt)
    second = trainer(new_model(), data, config, tmp_path / "stopped")
    assert second.step == 3
    second.run()
    ours, theirs = trained(calm.model), trained(second.model)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    for name, p in ours.items():
        state, other = calm.optimizer.state[p], second.optimizer.state[theirs[name]]
        assert p.dtype == theirs[name].dtype
        assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state), name


def test_models_learn_as_with_adamw(data: TokenShards, tmp_path: Path) -> None:
    """How far the loss falls in 20 steps: with Muon at least 85 % as far, with 8 bits as far within 3 %, and
    with BF16 weights within 3 % of that."""
    def learnt(**kind: Any) -> float:
        seen: list[dict[str, Any]] = []
        config = replace(SETTINGS, steps=20, eval_every=100, save_every=100, precision="fp32", **kind)
        TrainingLoop(new_model(), data, config, tmp_path / "-".join(["run", *kind.values()])).run(seen.append)
        return seen[0]["loss"] - sum(record["loss"] for record in seen[-5:]) / 5

    adamw, muon = learnt(), learnt(**MUON)
    assert adamw > 1.0 and muon > 0.85 * adamw
    assert learnt(**ADAMW8) == pytest.approx(adamw, rel=0.03)
    assert learnt(**MUON8) == pytest.approx(muon, rel=0.03)
    assert learnt(**BF16) == pytest.approx(adamw, rel=0.03)
    assert learnt(**MUON | BF16) == pytest.approx(muon, rel=0.03)


def test_weights_in_bf16_are_matrices_and_so_is_the_model(data: TokenShards, tmp_path: Path) -> None:
    config = replace(SETTINGS, steps=2, **BF16)
    model = TrainingLoop(new_model(), data, config, tmp_path)
    kinds = {name: p.dtype for name, p in trained(model.model).items()}
    assert kinds["model.layers.1.mlp.experts.gate_up_proj"] == kinds["lm_head.weight"] == torch.bfloat16
    assert kinds["model.layers.1.mlp.gate.weight"] == kinds["model.norm.weight"] == torch.float32
    model.run()
    assert {t.dtype for name, t in load_file(tmp_path / "model" / "model.safetensors").items()
            if not name.endswith("bias")} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [{"moments": "fp32"}, {"compress": "local"}], ids=str)
def test_weights_in_bf16_do_not_go_with_everything(kind: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"weights = 'bf16': .*{next(iter(kind))} = "):
        TrainConfig(**BF16 | kind)


def test_moments_of_8_bits_are_those_of_large_tensors() -> None:
    model = CausalLM(TINY)
    optimizer = make_optimizer(model, TrainConfig(**MUON8))
    parameters = trained(model)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kinds = {name: {key: t.dtype for key, t in optimizer.state[p].items() if t.ndim == 2}
             for name, p in parameters.items() if p.ndim > 1}
    assert kinds["model.embed_tokens.weight"] == {"exp_avg": torch.uint8, "exp_avg_sq": torch.uint8}
    assert kinds["model.layers.1.mlp.experts.gate_up_proj"] == {"momentum": torch.int8}
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == {"momentum": torch.float32}
    assert kinds["model.layers.1.mlp.gate.weight"] == dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.float32)


def test_a_run_of_before_goes_on_with_adamw(data: TokenShards, tmp_path: Path) -> None:
    config = replace(SETTINGS, steps=1)
    TrainingLoop(new_model(), data, config, tmp_path).run()
    settings = json.loads((tmp_path / "settings.json").read_text())
    for key in ("optimizer", "moments", "momentum"):
        del settings["train"][key]
    # settings that were kept where they had no meaning; one that has one now
    for older in ({}, {"momentum": 0.95, "inner_steps": 30}, {"balance": None}):
        write_json(tmp_path / "settings.json", settings | {"train": settings["train"] | older})
        assert TrainingLoop(new_model(), data, config, tmp_path).step == 1
    with pytest.raises(ConfigError, match="holds a run with optimizer = 'adamw', this one has 'muon'"):
        TrainingLoop(new_model(), data, replace(config, optimizer="muon"), tmp_path)


def test_codes_of_an_older_form_are_refused(data: TokenShards, tmp_path: Path) -> None:
    config = replace(SETTINGS, steps=1, **ADAMW8)
    TrainingLoop(new_model(), data, config, tmp_path).run()
    file = tmp_path / "checkpoint-000001" / "optimizer.safetensors"
    state = load_file(file)
    save_file({name: t.view(torch.int8) if name.endswith(".exp_avg") and t.dtype == torch.uint8 else t
               for name, t in state.items()}, file)
    (file.parent / "manifest.json").unlink()
    write_manifest(file.parent)
    with pytest.raises(ConfigError, match=r"checkpoint-000001: .*older form"):
        TrainingLoop(new_model(), data, config, tmp_path)


@pytest.mark.parametrize(("key", "value"), [
    ("optimizer", "sgd"), ("optimizer", None), ("momentum", 1.0), ("moments", "4bit"), ("moments", 8),
    ("weights", "fp16")])
def test_impossible_setting_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*must"):
        TrainConfig(**{key: value})
