"""The four-bit integers of compressed-tensors ("pack-quantized"), as Kimi-K2-Thinking has them.

A matrix W [O, I] is stored as `weight_packed` int32 [O, ceil(I/8)], eight columns in a word, the first in its lowest
bits, each code 0..15 standing for -8..7; `weight_scale` [O, G], one for each of G equal groups of columns of a row; and
`weight_shape`, which is O and I:  W[o, i] = (code[o, i] - 8) * scale[o, i // (I/G)].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, shown

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape")
# of `weights` of a group in quantization_config: what is read; others of these keys are another arithmetic
_READ: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,), "type": ("int",), "symmetric": (True,), "strategy": ("group", "channel"),
    "dynamic": (False, None), "actorder": (None,), "block_structure": (None,)}


def check(keys: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError naming `origin` and the first key of a quantization_config that is not read here."""
    def need(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise ConfigError(f"{origin}: quantization_config.{key} = {shown(value)}: of {METHOD} only {FORMAT} with "
                              f"symmetric int4 weights is read (here {' or '.join(map(repr, allowed))})")

    need("format", keys.get("format"), (FORMAT,))
    need("kv_cache_scheme", keys.get("kv_cache_scheme"), (None,))
    need("transform_config", keys.get("transform_config"), (None, {}))  # rotations of weights and activations
    if not (isinstance(sparse := keys.get("sparsity_config"), Mapping) and sparse.get("format") == "dense"):
        need("sparsity_config", sparse, (None, {}))
    groups = keys.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{origin}: quantization_config.config_groups = {shown(groups)}: must be an object of groups")
    for name, group in groups.items():
        inside = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(inside, Mapping):
            raise ConfigError(f"{origin}: quantization_config.config_groups.{name:.40} = {shown(group)}: must be an "
                              "object with weights")
        for key in ("input_activations", "output_activations"):
            need(f"config_groups.{name:.40}.{key}", group.get(key), (None,))
        need(f"config_groups.{name:.40}.format", group.get("format"), (None, FORMAT))
        for key, allowed in _READ.items():
            need(f"config_groups.{name:.40}.weights.{key}", inside.get(key), allowed)


def logical(stored: Iterable[str]) -> dict[str, str]:
    """Name of a tensor -> a name under which it is stored: the parts of an int4 weight are one tensor, the weight."""
    names = dict.fromkeys(stored)
    stems = [name.removesuffix(PARTS[0]) for name in names if name.endswith(f".{PARTS[0]}")]
    hidden = {stem + part for stem in stems for part in PARTS}
    return {name: name for name in names if name not in hidden} | {f"{stem}weight": stem + PARTS[0] for stem in stems}


def dequantize(packed: Tensor, scale_OG: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[O, columns] in `dtype` (products in FP32). Raises CheckpointError where the parts do not fit."""
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != -(-columns // 8):
        raise CheckpointError(f"weight_packed is {list(packed.shape)} of {packed.dtype}: must be int32 [rows, "
                              f"{-(-columns // 8)}]")
    rows, groups = packed.shape[0], scale_OG.shape[1] if scale_OG.ndim == 2 else 0
    if not scale_OG.is_floating_point() or not groups or scale_OG.shape[0] != rows or columns % groups:
        raise CheckpointError(f"weight_scale is {list(scale_OG.shape)} of {scale_OG.dtype}: must be [{rows}, groups], "
                              f"equal ones of {columns} columns")
    code = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    w_OI = (code.flatten(1)[:, :columns] - 8).float()
    return (w_OI.view(rows, groups, -1) * scale_OG.float().unsqueeze(-1)).view(rows, columns).to(dtype)
