"""The native kernels (csrc/), or None where the package was installed without them.

DEEPSEEK_PURE=1 at installation leaves them out; at run time it leaves them unused. Either way every operation runs its
torch reference, and that is said once. A library that is there but does not load is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor


def _load() -> Any:
    if os.environ.get("DEEPSEEK_PURE", "0") not in ("", "0"):
        reason = "DEEPSEEK_PURE is set"
    elif importlib.util.find_spec("deepseek._native") is None:
        reason = "the package was installed without them (DEEPSEEK_PURE=1)"
    else:
        from deepseek import _native

        _native.isa()  # refuses an instruction set that is not there
        return _native
    warnings.warn(f"native kernels are not in use: {reason}; operations run their torch reference", stacklevel=2)
    return None


native = _load()


def isa() -> str:
    """Instruction set of the native kernels, or "torch" where they are not in use."""
    return "torch" if native is None else native.isa()


def fits(*tensors: Tensor) -> bool:
    """Whether the native kernels can take these: contiguous tensors in this machine's memory."""
    return native is not None and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def threads() -> int:
    return torch.get_num_threads()
