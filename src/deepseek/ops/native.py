"""The native kernels (csrc/), or None where the package was installed without them.

DEEPSEEK_PURE=1 at installation leaves them out; at run time it leaves them unused. Either way every operation runs its
torch reference, and that is said once. A library that is there but does not load is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


def _load() -> Any:
    if os.environ.get("DEEPSEEK_PURE", "0") not in ("", "0"):
        reason = "DEEPSEEK_PURE is set"
    elif importlib.util.find_spec("deepseek._native") is None:
        reason = "the package was installed without them (DEEPSEEK_PURE=1)"
    else:
        from deepseek import _native

        try:
            _native.isa()
        except RuntimeError as error:  # DEEPSEEK_ISA names an instruction set that is not there
            raise ConfigError(str(error)) from None
        return _native
    warnings.warn(f"native kernels are not in use: {reason}; operations run their torch reference", stacklevel=2)
    return None


native = _load()


def isa() -> str:
    """Instruction set of the native kernels, or "torch" where they are not in use."""
    return "torch" if native is None else native.isa()


def fits(*tensors: Tensor) -> bool:
    """Whether the native kernels can take these: contiguous tensors in this machine's memory, and not while torch
    traces a graph, where they have no addresses."""
    return (native is not None and not torch.compiler.is_compiling()
            and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors))


@cache
def fast_bf16(device_type: str) -> bool:
    """Whether BF16 products run on BF16 units of this device (then they are faster than FP32)."""
    if device_type != "cpu":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())


def threads() -> int:
    return torch.get_num_threads()


def trains(*tensors: Tensor) -> bool:
    """Whether the training kernels (csrc/training.h) can take these: FP32, or BF16 where it has no units of its own,
    in this machine's memory, the last dimension dense."""
    return (native is not None and native.trains() and not torch.compiler.is_compiling()
            and all(t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
            and {t.dtype for t in tensors} <= {torch.float32, torch.bfloat16}
            and not (any(t.dtype == torch.bfloat16 for t in tensors) and fast_bf16("cpu")))


def kind(t: Tensor, like: Tensor | None = None) -> int:
    """How a kernel reads `t` (csrc/training.h): as it is, or FP32 rounded on the way in to match BF16 `like`."""
    if t.dtype == torch.bfloat16:
        return 1
    return 2 if like is not None and like.dtype == torch.bfloat16 else 0


def dense(t: Tensor) -> Tensor:
    """`t`, or a copy of it, with rows whose elements lie side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
