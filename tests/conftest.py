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

TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
    moe_intermediate_size=16, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, n_group=4, topk_group=2,
    first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12,
    max_position_embeddings=256)


def pytest_configure() -> None:
    torch.set_num_threads(1)  # thousands of products too small to share


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """`tiny_config(n_group=8, …)`: a V3 model of some ten thousand parameters, with changes."""
    return lambda **changes: ModelConfig(**(TINY | changes))


@pytest.fixture(scope="session")
def random_model() -> Callable[..., CausalLM]:
    """`random_model(config, seed=0)`: nothing left at zero or one, logits of magnitude 1-5, uneven routing."""
    return _random_model


@torch.no_grad()
def _random_model(config: ModelConfig, seed: int = 0) -> CausalLM:
    generator = torch.Generator().manual_seed(seed)
    model = CausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            gain = 2.0 if name.endswith(("lm_head.weight", "gate.weight", "embed_tokens.weight")) else 1.0
            parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(-0.1, 0.15, generator=generator)
    return model.eval()


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
