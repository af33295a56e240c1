"""Reads several adapters, LoRA or deltas of experts, and adds them to one base (model/adapters.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..model import CausalLM
from ..model.adapter_paths import AdapterPath, FullRank, LowRank
from ..model.adapters import add, bare, names_on
from ..ops.native import native
from ..quant.linear import QuantConfig
from .adapter_files import Delta, LoRA, read_adapter
from .adapters import check_targets
from .identity import check_base, fingerprints

_EXPERT = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
UNNAMED = "unnamed"  # a LoRA adapter that stands for the whole model


def sort_out(
    adapter: str | Path | None, adapters: Mapping[str, str | Path] | None
) -> tuple[Path | None, dict[str, Path]]:
    """(the delta to put in, the adapters to put beside the base by name): what an adapter without a name and those with
    one are. Looks at the folders, not at a model.

    Raises ConfigError for a bad name and for what cannot stand together, and what `load_model` raises of an adapter.
    """
    named = {name: Path(folder).expanduser() for name, folder in (adapters or {}).items()}
    for name, folder in named.items():
        if not re.fullmatch(r"[!-<>-~]{1,128}", name):
            raise ConfigError(f"adapter {name!r}: a name must be 1 to 128 visible ASCII characters, = not among them")
        read_adapter(folder, verify=False)
    if adapter is None:
        return None, named
    folder = Path(adapter).expanduser()
    if isinstance(read_adapter(folder, verify=False), Delta):
        return folder, named
    if named:
        raise ConfigError(f"adapter = {str(adapter)!r}: without a name it stands for the whole model: must have one "
                          f"beside {', '.join(named)}")
    return None, {UNNAMED: folder}


def _check_delta(name: str, delta: Delta, config: ModelConfig) -> None:
    """Raises ConfigError unless all that the delta holds are matrices of routed experts."""
    for tensor in delta.names:
        if (match := _EXPERT.fullmatch(tensor)) is None or int(match[2]) not in config.moe_layers:
            raise ConfigError(f"adapter {name} ({delta.folder}): holds {tensor}: beside a base a delta may change "
                              "matrices of routed experts alone: give it without a name, as part of the model, or tune "
                              "the experts alone")


def read_several(model: CausalLM, folders: Mapping[str, str | Path], *, verify: bool = True) -> dict[str, Delta | LoRA]:
    """Name -> adapter, each checked to fit the model that was loaded as stored (dtype "auto"); the base is hashed once.

    Raises ConfigError for a delta of more than experts and for a name that is taken, and what `load_model` raises of an
    adapter.
    """
    found: dict[str, Delta | LoRA] = {}
    there: list[str] = []
    for name, folder in folders.items():
        adapter = read_adapter(folder, verify=verify)
        if name in names_on(model):
            raise ConfigError(f"adapter {name}: the model has an adapter of this name already")
        adapter.check_fits(model.config)
        if verify and adapter.made_for:
            there = there or fingerprints(model)
            check_base(there, adapter.made_for, adapter.folder, adapter.base_name)
        if isinstance(adapter, Delta):
            _check_delta(name, adapter, model.config)
            found[name] = adapter
            continue
        try:
            if (quant := QuantConfig.of(model.config, "the base")) is not None:
                check_targets(model.config, quant, adapter.spec.targets)
        except ConfigError as error:
            raise CheckpointError(f"{adapter.folder}: {error}") from None
        found[name] = adapter
    return found


@torch.no_grad()
def put_beside(model: CausalLM, adapters: Mapping[str, Delta | LoRA]) -> None:
    """Add the adapters to the model, in place; as panels where it computes natively in FP32. Of a delta the difference
    to the experts as the model has them, quantized ones made dense."""
    dense = lru_cache(1)(lambda block, expert: bare(model.get_submodule(block)).dense(expert))
    dtype, device = model.compute_dtype or model.lm_head.weight.dtype, model.device
    panels = native is not None and dtype == torch.float32 and device.type == "cpu"
    for name, adapter in adapters.items():
        linears: dict[str, LowRank] = {}
        experts: dict[str, dict[int, dict[str, AdapterPath]]] = {}
        for tensor in sorted(adapter.changed):
            match = _EXPERT.fullmatch(tensor)
            block, expert, part = (match[1], int(match[3]), match[4]) if match else ("", 0, "")
            path: AdapterPath
            if isinstance(adapter, Delta):
                gate_up, down = dense(block, expert)
                gate, up = gate_up.chunk(2)
                base = {"gate": gate, "up": up, "down": down}[part]
                path = FullRank(adapter.tensor(tensor).to(device), base, panels)
            else:
                a, b = adapter.modules[tensor.removesuffix(".weight")]
                path = LowRank(adapter.tensor(a), adapter.tensor(b), adapter.spec.scale, panels).to(device)
            if match:
                experts.setdefault(block, {}).setdefault(expert, {})[part] = path
            else:
                assert isinstance(path, LowRank)
                linears[tensor.removesuffix(".weight")] = path
        add(model, name, linears, experts)
