"""What of a run belongs to its device: the dtype of activations, the random state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model import CausalLM
from ..ops.native import ASKED_BF16, bf16_units, bf16_way, trains_native, use_bf16
from .settings import TrainConfig

WIDE = 512  # hidden size from which torch's BF16 products outran our FP32 kernels on one machine (docs/log.md)


def compute_dtype(config: TrainConfig, model: CausalLM) -> torch.dtype:
    """BF16 where asked, or where `auto` finds it faster: on a GPU; on a CPU where the native kernels use its BF16
    units, or torch does and the model is wide or the native kernels do not run. Else FP32."""
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bf16" else torch.float32
    if model.device.type != "cpu":
        return torch.bfloat16
    way = bf16_way()
    narrow = trains_native(torch.empty(0)) and model.config.hidden_size < WIDE
    return torch.bfloat16 if way == "units" or (way == "torch" and not narrow) else torch.float32


def arithmetic(model: CausalLM) -> dict[str, str]:
    """How a model on the CPU is being trained: what `auto` and measured rates have chosen, for the checkpoint."""
    if model.compute_dtype != torch.bfloat16 or model.device.type != "cpu":
        return {"activations": str(model.compute_dtype).removeprefix("torch.")}
    return {"activations": "bfloat16", "bf16_products": bf16_way()}


def keep_arithmetic(about: Mapping[str, str], config: TrainConfig, model: CausalLM) -> None:
    """Compute as the run began, or as the first rank does: another measurement might choose otherwise. DEEPSEEK_BF16
    counts first, and what this machine has not is chosen anew."""
    if config.precision == "auto" and "activations" in about:
        model.compute_dtype = getattr(torch, about["activations"])
    if (way := about.get("bf16_products")) and not ASKED_BF16 and (way != "units" or bf16_units()):
        use_bf16(way)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """What torch draws from next, on the CPU and, if `device` is a GPU, there, where dropout has a state of its own."""
    state = {"rng": torch.get_rng_state()}
    return state | {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore `random_state`; a GPU's is kept as it is where the run was on a CPU before."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
