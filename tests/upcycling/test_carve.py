"""Experts carved out of a dense FFN: nothing is lost where all of it is active, and what a gate can see, it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek import Tokenizer
from deepseek.checkpoint import TensorFiles, load_model
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.convert import quantize
from deepseek.errors import ConfigError, DataError, NotFoundError
from deepseek.upcycling import carve as carving
from deepseek.upcycling.carve import active_share, carve, carved_config
from deepseek.upcycling.carve_settings import CarveConfig
from deepseek.upcycling.grouping import assign, balanced_clusters, divide_layer

transformers = pytest.importorskip("transformers", reason="the sources are transformers' own models")

WORDS = "the law of the land and a house by the sea where people went before the rain came down".split()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """The folder of a random dense model with a tokenizer, and beside it text.txt."""
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "dense")
    text = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(90)]
    Tokenizer.train(text, 300).save(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(text))
    return tmp_path / "dense"


def asked(dense: Path, share: float = 0.5, **changes: Any) -> CarveConfig:
    keys: dict[str, Any] = dict(
        carve=share, calibrate=(str(dense.parent / "text.txt"),), calibration_tokens=512, expert_width=8)
    return CarveConfig(**keys | changes)


def logits(folder: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of our model and of transformers'."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return load_model(folder, "float32")(ids), theirs(ids).logits


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_with_all_of_the_ffn_active_it_computes_what_the_dense_model_does(dense: Path) -> None:
    out = dense.parent / "v3"
    found = carve(dense, out, asked(dense, 1.0))
    assert found.share == 1 and found.experts == found.experts_per_token == 10 and found.shared_width == 16
    assert max(found.errors.values()) < 1e-10
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()(ids).logits
    ours, theirs = logits(out, ids)
    assert far(ours, want) < 1e-5 and far(theirs, want) < 1e-5


def test_half_of_it_is_a_plain_checkpoint_of_the_same_neurons(dense: Path) -> None:
    out = dense.parent / "v3"
    found = carve(dense, out, asked(dense))
    config = ModelConfig.from_file(out)
    assert (config.first_k_dense_replace, config.n_routed_experts, config.num_experts_per_tok) == (1, 10, 2)
    assert found.share == active_share(config) == (96 + 3 * 32) / (4 * 96) and sorted(found.errors) == [1, 2, 3]
    assert found.flops < found.dense_flops and found.bytes["BF16"] < found.dense_bytes["BF16"]
    assert json.loads((out / "report.json").read_text())["share"] == found.share
    ours, theirs = logits(out, torch.randint(0, 300, (2, 40)))
    assert far(ours, theirs) < 1e-5
    source, files = TensorFiles(dense), TensorFiles(out)
    for part in ("gate_proj", "up_proj"):
        rows = torch.cat([files.read(f"model.layers.2.mlp.{where}.{part}.weight")
                          for where in ("shared_experts", *(f"experts.{e}" for e in range(10)))])
        want = source.read(f"model.layers.2.mlp.{part}.weight")
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, want.tolist()))


def test_it_can_be_quantized(dense: Path) -> None:
    out = carve(dense, dense.parent / "v3", asked(dense)).path
    quantize(out, dense.parent / "int8", "int8", progress=False)
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        assert far(load_model(dense.parent / "int8")(ids), load_model(out)(ids)) < 0.2


def test_the_fitted_projections_lose_less(dense: Path) -> None:
    errors = [carve(dense, dense.parent / str(refit), asked(dense, refit=refit)).errors for refit in (True, False)]
    assert errors[0][1] < 0.9 * errors[1][1]  # later layers see other inputs


def test_without_text_the_model_writes_some(dense: Path) -> None:
    found = carve(dense, dense.parent / "v3", asked(dense, calibrate=(), calibration_tokens=200), dtype="bfloat16")
    assert found.share == 0.5 and load_model(found.path).lm_head.weight.dtype == torch.bfloat16
    ids = carving.load_file(dense.parent / "v3.run" / "calibration.safetensors")["ids"]
    assert ids.shape == (4, 64) and len(ids.unique()) > 20


def test_what_was_stopped_goes_on_and_ends_the_same(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = carve(dense, dense.parent / "whole", asked(dense)).path
    one = carving.carve_layer
    done: list[int] = []

    def stopped(*args: Any) -> Any:
        if args[3] == 2 and 2 not in done:
            done.append(2)
            raise KeyboardInterrupt
        done.append(args[3])
        return one(*args)

    monkeypatch.setattr(carving, "carve_layer", stopped)
    out = dense.parent / "again"
    with pytest.raises(KeyboardInterrupt):
        carve(dense, out, asked(dense))
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"again\.run: holds the beginning of another model, of expert_width = 8"):
        carve(dense, out, asked(dense, expert_width=16))
    carve(dense, out, asked(dense))
    assert done == [0, 1, 2, 2, 3]
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_the_gate_finds_the_neurons_that_a_token_needs() -> None:
    """Four kinds of inputs, a quarter of the neurons for each: a quarter of the experts computes nearly everything."""
    config = ModelConfig.preset("nano").with_(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=4, n_routed_experts=16, num_experts_per_tok=4,
        n_shared_experts=0, n_group=1, topk_group=1, routed_scaling_factor=4.0)
    generator = torch.Generator().manual_seed(0)
    kind_T, owner_I = torch.randint(0, 4, (600,), generator=generator), torch.arange(64) % 4
    x_TH = torch.randn(600, 32, generator=generator)
    x_TH[:, :4] = 6.0 * torch.nn.functional.one_hot(kind_T, 4) - 1.5
    gate_IH = 0.1 * torch.randn(64, 32, generator=generator)
    gate_IH[:, :4] = 4.0 * torch.nn.functional.one_hot(owner_I, 4) - 2.0
    up_IH, down_HI = torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator)
    found = divide_layer(x_TH, torch.zeros(600, 32), gate_IH, up_IH, down_HI, config, 0, refit=False)
    experts = owner_I[found.order_I].view(16, 4)
    assert (experts == experts[:, :1]).all() and found.error < 0.02


def test_clusters_have_the_same_size() -> None:
    generator = torch.Generator().manual_seed(0)
    assert assign(torch.rand(60, 12, generator=generator), 5).bincount().tolist() == [5] * 12
    centres = torch.randn(4, 8, generator=generator) * 9
    points = centres.repeat(6, 1) + torch.randn(24, 8, generator=generator)
    found = balanced_clusters(points, 4, 3)
    assert found.bincount().tolist() == [6] * 4
    assert sum(len(found[i::4].unique()) for i in range(4)) <= 6  # two centres may begin in one heap


@pytest.mark.parametrize(("changes", "message"), [
    ({"expert_width": 7}, "expert_width = 7: must divide the FFN's 96 neurons"),
    ({"dense_layers": 4}, "dense_layers = 4: must be less than the model's 4 layers"),
    ({"always_active": 0.95}, "always_active = 0.95: must leave at least 2 experts"),
    ({"carve": 0.3}, r"carve = 0.3: must be at least 0.438 with dense_layers = 1 of 4"),
])
def test_what_cannot_be_divided(changes: dict[str, Any], message: str) -> None:
    config = ModelConfig.preset("nano").with_(intermediate_size=96, num_hidden_layers=4, first_k_dense_replace=4)
    with pytest.raises(ConfigError, match=message):
        carved_config(config, CarveConfig(**{"carve": 0.5, "expert_width": 8} | changes))


def test_the_command(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = str(dense.parent / "v3"), str(dense.parent / "text.txt")
    command = ["upcycle", str(dense), out, "--carve", "0.75", "--calibrate", f"land={text}", "--expert_width", "8",
               "--calibration_tokens", "256"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "75.0% of the FFN active: 6 of 10 experts of 8 neurons and 16 shared ones a layer" in said
    for words, message in ((["--carve", "1.5"], "carve = 1.5: must lie in (0, 1]"),
                           (["--expert_width", "8"], "expert_width = 8: has a meaning only with carve"),
                           (["--heal", "x"], "heal = ['x']: has a meaning only with carve"),
                           (["--carve", "0.5", "--heal_lr", "1"], "heal_lr = 1.0: has a meaning only with heal"),
                           (["--carve", "0.5", "--check"], "check = True: a model with carved experts")):
        assert main(["upcycle", str(dense), str(dense.parent / "other"), *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(NotFoundError, match="nowhere"):
        carve(dense, dense.parent / "other", asked(dense, calibrate=("land=nowhere",)))
    assert not (dense.parent / "other.run").exists()
    (dense.parent / "text.txt").write_text("too short")
    with pytest.raises(DataError, match="the text of text has less than one window of 64 tokens"):
        carve(dense, dense.parent / "other", asked(dense))
