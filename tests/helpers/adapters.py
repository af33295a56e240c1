"""Adapters to serve: random ones, saved as tuning would, and the folders of a base to put them beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepseek import LoRAAdapter
from deepseek.checkpoint import load_model
from deepseek.model import CausalLM
from deepseek.model.adapter import lora_modules

# attention with and without kv_b_proj, experts, both; the last one's names are what a quantized base cannot take
KINDS: dict[str, dict[str, Any]] = {
    "law": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "kv_a_proj_with_mqa"]},
    "med": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "lm_head"]},
    "code": {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"],
             "experts": ["1.0", "1.3", "1.7", "1.15", "2.1", "2.8", "2.15"]},
}


@torch.no_grad()
def trained(model: CausalLM, scale: float = 0.05) -> CausalLM:
    """As if B had been trained: nothing left at zero."""
    generator = torch.Generator().manual_seed(3)
    for _, module in lora_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_B"):
                parameter.normal_(0.0, scale, generator=generator)
    return model


@torch.no_grad()
def save_adapter(base: Path, folder: Path, seed: int = 0, scale: float = 0.15, **fields: Any) -> Path:
    """An adapter of LoRAAdapter's fields with random B, for the plain or quantized checkpoint `base`."""
    model, generator = load_model(base), torch.Generator().manual_seed(seed)
    side = LoRAAdapter(**fields).attach(model)
    for _, module in lora_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            parameter.normal_(0.0, scale if "_B" in name else parameter.shape[-1] ** -0.5, generator=generator)
    return LoRAAdapter.save(model, side, folder, str(base))
