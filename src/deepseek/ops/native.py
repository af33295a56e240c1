"""The native kernels (csrc/), or None where the package was installed without them.

DEEPSEEK_PURE=1 at installation leaves them out; at run time it leaves them unused. Either way every operation runs its
torch reference, and that is said once. A library that is there but does not load is an error, never a silent fallback.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


def _load() -> Any:
    if os.environ.get("DEEPSEEK_PURE", "0") not in ("", "0"):
        reason = "DEEPSEEK_PURE is set"
    elif find_spec("deepseek._native") is None:
        reason = "the package was installed without them (DEEPSEEK_PURE=1)"
    else:
        loaded = import_module("deepseek._native")  # it needs nothing of the package, whose __init__ names every room
        try:
            loaded.isa()
        except RuntimeError as error:  # DEEPSEEK_ISA names an instruction set that is not there
            raise ConfigError(str(error)) from None
        return loaded
    warnings.warn(f"native kernels are not in use: {reason}; operations run their torch reference", stacklevel=2)
    return None


native = _load()


def isa() -> str:
    """Instruction set of the native kernels, or "torch" where they are not in use."""
    return "torch" if native is None else native.isa()


def runs_native(*tensors: Tensor) -> bool:
    """Whether the native kernels can take these: contiguous tensors in this machine's memory, and not while torch
    traces a graph, where they have no addresses."""
    return (native is not None and not torch.compiler.is_compiling()
            and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors))


# values of oneDNN's ONEDNN_MAX_CPU_ISA that leave its BF16 products without BF16 units
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def has_bf16_units() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())


def choose_bf16() -> str:
    """How BF16 products are computed on the CPU: "torch" on BF16 units (AVX512-BF16, AMX) through torch, "native" on
    FP32 units. DEEPSEEK_BF16 says which; without it, torch wherever it has units that ONEDNN_MAX_CPU_ISA leaves on."""
    asked = os.environ.get("DEEPSEEK_BF16", "")
    if asked not in ("", "native", "torch"):
        raise ConfigError(f"DEEPSEEK_BF16 = {asked!r}: must be native (FP32 units) or torch (its BF16 products)")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    units = limit.upper() not in _WITHOUT_BF16 and has_bf16_units()
    return asked or ("torch" if units else "native")


BF16 = choose_bf16()
# without vector instructions torch is faster, but the plain kernels run where they are asked for
CHOSEN = isa() != "scalar" or os.environ.get("DEEPSEEK_ISA") == "scalar"


def fast_bf16(device_type: str) -> bool:
    """Whether BF16 products go to the device's own BF16 units through torch (then they are faster than FP32)."""
    return device_type != "cpu" or BF16 == "torch"


def threads() -> int:
    return torch.get_num_threads()


def can_train(*tensors: Tensor) -> bool:
    """Whether the training kernels (csrc/training.h) can take these: FP32 or BF16 in this machine's memory, the last
    dimension dense."""
    return (native is not None and not torch.compiler.is_compiling()
            and all(t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
            and {t.dtype for t in tensors} <= {torch.float32, torch.bfloat16})


def trains_native(*tensors: Tensor) -> bool:
    """Whether the training kernels are to take these: they can, torch is not faster than this instruction set's, and
    BF16 does not go to units of its own."""
    return CHOSEN and can_train(*tensors) and not (fast_bf16("cpu") and any(t.dtype == torch.bfloat16 for t in tensors))


def dtype_code(t: Tensor, like: Tensor | None = None) -> int:
    """How a kernel reads `t` (csrc/training.h): as it is, or FP32 rounded on the way in to match BF16 `like`."""
    if t.dtype == torch.bfloat16:
        return 1
    return 2 if like is not None and like.dtype == torch.bfloat16 else 0


def dense_rows(t: Tensor) -> Tensor:
    """`t`, or a copy of it, with rows whose elements lie side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
