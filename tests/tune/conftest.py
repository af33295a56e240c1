"""A tiny checkpoint with a tokenizer and named groups, and a few records to tune it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.atlas import Atlas
from deepseek.checkpoint import save_model
from deepseek.config import ModelConfig
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from tests.helpers.records import NAMES, general, records


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [f"{r['input']} {r['output']}" for r in records()] + [r["text"] for r in general()]
    return Tokenizer.train(texts, 400)


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer, tiny_config: Callable[..., ModelConfig],
         random_model: Callable[..., CausalLM]) -> Callable[..., Path]:
    """`base(dtype=…, **changes)`: the folder of a checkpoint with an atlas of four built-in names."""
    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        config = tiny_config(vocab_size=400, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, **changes)
        model = random_model(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                parameter.data *= 0.3
        bias = {name: b.clone() for name, b in model.named_buffers() if name.endswith("correction_bias")}
        model.to(dtype)
        for name, value in bias.items():
            model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = value
        return save_model(model, tmp_path / "base", tokenizer=tokenizer,
                          add=lambda folder: Atlas.built_in(config, NAMES).save(folder))

    return make


@pytest.fixture
def plots() -> None:
    """Asked for by a test that looks at the curve."""


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny run."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("deepseek.deepopt.loop.plot_run", lambda *_: None)


@pytest.fixture
def quick() -> dict[str, Any]:
    """Settings of a run of seconds that still learns."""
    return {"lr": 3e-3, "batch_size": 4, "max_length": 64, "eval_records": 8, "eval_every": 100, "save_every": 3,
            "retain_data": general(), "precision": "fp32"}
