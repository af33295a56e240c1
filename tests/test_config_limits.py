"""Sizes and types in config.json are checked before anything is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek import memory
from deepseek.checkpoint import load_model, save_model
from deepseek.cli import main
from deepseek.config import PRESETS, ModelConfig
from deepseek.convert import quantize
from deepseek.errors import MoEDRError
from deepseek.model import CausalLM


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]) -> Path:
    return save_model(random_model(tiny_config()), tmp_path / "model")


def changed(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be at most"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ({"n_routed_experts": 10**9}, "n_routed_experts = 1000000000: must be at most"),
    ({"hidden_size": 2**40}, "hidden_size"), ({"vocab_size": 2**40}, "vocab_size"),
    ({"num_hidden_layers": 4000, "n_routed_experts": 2**14}, "experts"),
    ({"num_nextn_predict_layers": 10**7}, "num_nextn_predict_layers"),
    ({"hidden_size": -1}, "hidden_size = -1"), ({"hidden_size": "big"}, "hidden_size"),
    ({"hidden_size": [1]}, "hidden_size"), ({"hidden_size": 1.5}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"rope_theta": 10**400}, "rope_theta"), ({"rope_theta": float("nan")}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"), ({"rms_norm_eps": {}}, "rms_norm_eps"),
    ({"architectures": 5}, "architectures = 5"), ({"architectures": "DeepseekV3ForCausalLM"}, "architectures"),
    ({"moe_dr": 5}, "moe_dr = 5"), ({"moe_dr": {"format": True}}, "moe_dr.format"),
    ({"moe_dr": {"format": 0}}, "moe_dr.format"), ({"moe_dr": {"format": 1, "kept": 3}}, "moe_dr.kept"),
    ({"moe_dr": {"format": 1, "kept": [[]]}}, "moe_dr.kept"), ({"model_type": 0}, "model_type = 0"),
    ({"model_type": []}, "model_type"), ({"rope_scaling": 0}, "rope_scaling = 0"),
    ({"rope_scaling": []}, "rope_scaling"), ({"rope_scaling": ""}, "rope_scaling"),
], ids=str)
def test_values_that_no_model_has(folder: Path, changes: dict[str, Any], message: str,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    changed(folder, **changes)
    with pytest.raises(MoEDRError, match=message.replace(".", "[.]")) as failure:
        load_model(folder, verify=False)
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 400
    assert main(["info", str(folder)]) == 2
    assert message in (told := capsys.readouterr().err) and "Traceback" not in told


@pytest.mark.parametrize("text", ["[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "{", "", "[]", "\x00"], ids=len)
def test_files_that_are_no_configuration(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(text)
    assert main(["info", str(folder)]) == 2
    assert "config.json" in (told := capsys.readouterr().err) and "Traceback" not in told


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 4000}, "num_hidden_layers = 4000, the tensors 3"),
    ({"n_routed_experts": 8192, "n_group": 1, "topk_group": 1}, "n_routed_experts = 8192, the tensors 16"),
    ({"hidden_size": 2**20}, "has shape"), ({"vocab_size": 2**24}, "has shape"),
    ({"intermediate_size": 2**20}, "has shape"),
])
def test_sizes_that_the_tensors_have_not(folder: Path, tmp_path: Path, changes: dict[str, int], message: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without memory for them: a machine of no memory comes to the same message."""
    changed(folder, **changes)
    monkeypatch.setattr(memory, "ram", lambda: (0, 0))
    for attempt in (lambda: load_model(folder, verify=False), lambda: quantize(folder, tmp_path / "nf4", "nf4")):
        with pytest.raises(MoEDRError, match=message if attempt.__code__.co_names[0] == "load_model" else ""):
            attempt()
    assert not (tmp_path / "nf4").exists()


def test_models_larger_than_the_machine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "ram", lambda: (1000, 1000))
    with pytest.raises(MoEDRError, match=r"needs .* GiB of memory, this machine has"):
        load_model(folder)
    text = tmp_path / "text.txt"
    text.write_text("one two three\n" * 100)
    assert main(["train", "nano", str(text), "--out", str(tmp_path / "run")]) == 2
    assert "B parameters" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_within_the_limits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", name]) == 0 and capsys.readouterr().out
