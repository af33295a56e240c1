"""The native kernels (csrc/), or None where the package was installed without them.

DEEPSEEK_PURE=1 at installation leaves them out; at run time it leaves them unused. Either way every operation runs its
torch reference, and that is said once. A library that is there but does not load is an error, never a silent fallback.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
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
# without vector instructions torch is faster, but the plain kernels run where they are asked for
CHOSEN = isa() != "scalar" or os.environ.get("DEEPSEEK_ISA") == "scalar"


def torch_has_bf16_units() -> bool:
    """Whether torch computes BF16 products on BF16 units: the processor has them and oneDNN may use them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return limit.upper() not in _WITHOUT_BF16 and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())


def bf16_units() -> str:
    """Name of the BF16 units that the native kernels have here (csrc/training_pairs.h), or nothing."""
    return "" if native is None else native.bf16_units()


def asked_bf16() -> str:
    """What DEEPSEEK_BF16 asks for, or nothing.

    Raises ConfigError for a value that is none, or that this machine or build does not have.
    """
    asked = os.environ.get("DEEPSEEK_BF16", "")
    if asked not in ("", "units", "fp32", "torch"):
        raise ConfigError(f"DEEPSEEK_BF16 = {asked!r}: must be units (native kernels on BF16 units), fp32 (on FP32 "
                          "units) or torch (its BF16 products)")
    if asked == "units" and not bf16_units():
        raise ConfigError("DEEPSEEK_BF16 = units: this machine, build or DEEPSEEK_ISA has no BF16 units for the native "
                          "kernels (AVX512-BF16 or AMX); fp32 or torch works everywhere")
    return asked


def choose_bf16(rates: Callable[[], dict[str, float]]) -> str:
    """How BF16 products of training are computed on the CPU: "units", "fp32" or "torch". DEEPSEEK_BF16 says which;
    without it the fastest of `rates` (operations a second of those there are). Training gains more from the native
    kernels than the rate of a product says, so torch has to be twice as fast; and where torch has no BF16 units, its
    emulation of them is not asked."""
    if asked := asked_bf16():
        return asked
    if native is None or not CHOSEN:
        return "torch" if torch_has_bf16_units() else "fp32"
    if not bf16_units() and not torch_has_bf16_units():
        return "fp32"
    found = rates()
    own = max((way for way in found if way != "torch"), key=found.__getitem__)
    return "torch" if found.get("torch", 0.0) > 2 * found[own] else own


_way: str | None = None


def bf16_way() -> str:
    """That choice, made once in a process, before its first use."""
    if _way is None:
        use_bf16(choose_bf16(product_rates))
    assert _way is not None
    return _way


def use_bf16(way: str) -> None:
    """Compute BF16 products of training in this way from now on."""
    global _way
    _way = way
    if native is not None:
        native.use_bf16_units(way != "fp32")


def product_rates(rows: int = 512, side: int = 512) -> dict[str, float]:
    """Operations a second of a BF16 product in each of the ways that this machine has: the best of a few, in turn, of
    some milliseconds in all."""
    assert native is not None
    left, right = (torch.full((n, side), 0.5, dtype=torch.bfloat16) for n in (rows, side))
    out = left.new_empty(rows, side)

    def own() -> None:
        native.product(left.data_ptr(), side, 1, False, right.data_ptr(), side, 1, True, rows, side, side,
                       out.data_ptr(), 1, threads())

    native.use_bf16_units(True)
    with torch.no_grad():
        ways: dict[str, Callable[[], object]] = {"fp32": own} | ({"units": own} if native.bf16_units() else {}) | (
            {"torch": lambda: torch.mm(left, right.t(), out=out)} if torch_has_bf16_units() else {})
        seconds = dict.fromkeys(ways, float("inf"))
        for _ in range(4):
            for way, work in ways.items():
                native.use_bf16_units(way == "units")
                began = time.perf_counter()
                work()
                seconds[way] = min(seconds[way], time.perf_counter() - began)
        native.use_bf16_units(_way != "fp32")
    return {way: 2 * rows * side * side / taken for way, taken in seconds.items()}


if ASKED_BF16 := asked_bf16():
    use_bf16(ASKED_BF16)
TORCH_BF16 = ASKED_BF16 == "torch" or (ASKED_BF16 != "fp32" and torch_has_bf16_units())


def fast_bf16(device_type: str) -> bool:
    """Whether torch's own BF16 products are to be used, since the device has units for them."""
    return device_type != "cpu" or TORCH_BF16


def threads() -> int:
    return torch.get_num_threads()


def can_train(*tensors: Tensor) -> bool:
    """Whether the training kernels (csrc/training.h) can take these: FP32 or BF16 in this machine's memory, the last
    dimension dense."""
    return (native is not None and not torch.compiler.is_compiling()
            and all(t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
            and {t.dtype for t in tensors} <= {torch.float32, torch.bfloat16})


def trains_native(*tensors: Tensor) -> bool:
    """Whether the training kernels are to take these: they can, torch is not faster than this instruction set's, nor
    with BF16."""
    return CHOSEN and can_train(*tensors) and not (
        any(t.dtype == torch.bfloat16 for t in tensors) and bf16_way() == "torch")


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
