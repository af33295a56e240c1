"""A checkpoint to convert, with awkward widths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint import save_model
from deepseek.model import CausalLM
from tests.helpers.conversions import RAGGED


@pytest.fixture
def source(tiny_config: Callable, random_model: Callable, tmp_path: Path) -> Callable[..., Path]:
    """`source(dtype, **changes)`: a checkpoint folder."""
    def make(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
        model: CausalLM = random_model(tiny_config(**(RAGGED | changes)))
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.data = parameter.data.to(dtype)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return save_model(model, tmp_path / "source")

    return make
