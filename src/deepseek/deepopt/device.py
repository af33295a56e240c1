"""What of a run belongs to its device: the dtype of activations, the random state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model import CausalLM
from ..ops.native import fast_bf16, trains_native
from .settings import TrainConfig

WIDE = 512  # hidden size from which a CPU's BF16 units outran our FP32 kernels, on one machine with AMX (docs/log.md)


def compute_dtype(config: TrainConfig, model: CausalLM) -> torch.dtype:
    """BF16 where asked, or where `auto` finds BF16 units that are not slower for a narrow model than our FP32 kernels;
    else FP32."""
    by_kernels = trains_native(torch.empty(0, dtype=torch.float32, device=model.device))
    gains = fast_bf16(model.device.type) and not (by_kernels and model.config.hidden_size < WIDE)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and gains)
    return torch.bfloat16 if bf16 else torch.float32


def random_state(device: torch.device) -> dict[str, Tensor]:
    """What torch draws from next, on the CPU and, if `device` is a GPU, there, where dropout has a state of its own."""
    state = {"rng": torch.get_rng_state()}
    return state | {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore `random_state`; a GPU's is kept as it is where the run was on a CPU before."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
