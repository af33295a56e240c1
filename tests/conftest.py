"""What every test may use: one thread, a fixed seed, tiny configurations, models whose every number matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint import save_model
from deepseek.config import ModelConfig
from deepseek.model import CausalLM
from tests.helpers import models


def pytest_configure() -> None:
    torch.set_num_threads(1)  # thousands of products too small to share


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """`tiny_config(n_group=8, …)`: a V3 model of some ten thousand parameters, with changes."""
    return lambda **changes: ModelConfig(**(models.TINY | changes))


@pytest.fixture(scope="session")
def random_model() -> Callable[..., CausalLM]:
    """`random_model(config, seed=0)`: nothing left at zero or one, logits of magnitude 1-5, uneven routing."""
    return models.random_model


@pytest.fixture
def in_transformers(tmp_path: Path) -> Callable[..., Any]:
    """`in_transformers(model)`: the same model in transformers, by way of a checkpoint of ours on disk.

    Every such load also proves that transformers misses no tensor of ours and meets none that it does not know.
    """
    transformers = pytest.importorskip("transformers", reason="parity needs the test extra (transformers)")

    def load(model: CausalLM, **save_options: Any) -> Any:
        folder = save_model(model, tmp_path / "ours", **save_options)
        twin, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values()), report
        assert type(twin).__name__ == {"deepseek_v2": "DeepseekV2ForCausalLM"}.get(
            model.config.model_type, "DeepseekV3ForCausalLM")
        return twin.eval()

    return load
