"""Reads several LoRA adapters and adds them to one base (model/adapters.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError, ConfigError
from ..model import CausalLM
from ..model.adapters import LowRank, add, names_on
from ..ops.native import native
from ..quant.linear import QuantConfig
from .adapter_files import Delta, LoRA, read_adapter
from .adapters import check_targets
from .identity import check_base, fingerprints

UNNAMED = "unnamed"  # a LoRA adapter that stands for the whole model


def sort_out(
    adapter: str | Path | None, adapters: Mapping[str, str | Path] | None
) -> tuple[Path | None, dict[str, Path]]:
    """(the delta to put in, the LoRA adapters to put beside the base by name): what an adapter without a name and those
    with one are. Looks at the folders, not at a model.

    Raises ConfigError for a bad name and for what cannot stand together, and what `load_model` raises of an adapter.
    """
    named = {name: Path(folder).expanduser() for name, folder in (adapters or {}).items()}
    for name, folder in named.items():
        if not re.fullmatch(r"[!-<>-~]{1,128}", name):
            raise ConfigError(f"adapter {name!r}: a name must be 1 to 128 visible ASCII characters, = not among them")
        if isinstance(read_adapter(folder, verify=False), Delta):
            raise _refused(name, folder)
    if adapter is None:
        return None, named
    folder = Path(adapter).expanduser()
    if isinstance(read_adapter(folder, verify=False), Delta):
        return folder, named
    if named:
        raise ConfigError(f"adapter = {str(adapter)!r}: without a name it stands for the whole model: must have one "
                          f"beside {', '.join(named)}")
    return None, {UNNAMED: folder}


def _refused(name: str, folder: Path) -> ConfigError:
    return ConfigError(f"adapter {name} ({folder}): is a delta, which changes the base's own weights: one at a time "
                       "can be put in, without a name")


def read_several(model: CausalLM, folders: Mapping[str, str | Path], *, verify: bool = True) -> dict[str, LoRA]:
    """Name -> adapter, each checked to fit the model that was loaded as stored (dtype "auto"); the base is hashed once.

    Raises ConfigError for a delta and for a name that is taken, and what `load_model` raises of an adapter.
    """
    found: dict[str, LoRA] = {}
    there: list[str] = []
    for name, folder in folders.items():
        adapter = read_adapter(folder, verify=verify)
        if isinstance(adapter, Delta):
            raise _refused(name, adapter.folder)
        assert isinstance(adapter, LoRA)
        if name in names_on(model):
            raise ConfigError(f"adapter {name}: the model has an adapter of this name already")
        adapter.check_fits(model.config)
        if verify and adapter.made_for:
            there = there or fingerprints(model)
            check_base(there, adapter.made_for, adapter.folder, adapter.base_name)
        try:
            if (quant := QuantConfig.of(model.config, "the base")) is not None:
                check_targets(model.config, quant, adapter.spec.targets)
        except ConfigError as error:
            raise CheckpointError(f"{adapter.folder}: {error}") from None
        found[name] = adapter
    return found


def put_beside(model: CausalLM, adapters: Mapping[str, LoRA]) -> None:
    """Add the adapters to the model, in place; as panels where it computes natively in FP32."""
    dtype, device = model.compute_dtype or model.lm_head.weight.dtype, model.device
    panels = native is not None and dtype == torch.float32 and device.type == "cpu"
    for name, adapter in adapters.items():
        linears: dict[str, LowRank] = {}
        experts: dict[str, dict[int, dict[str, LowRank]]] = {}
        for module, (a, b) in adapter.modules.items():
            path = LowRank(adapter.tensor(a), adapter.tensor(b), adapter.spec.scale, panels).to(device)
            block, inside, rest = module.partition(".mlp.experts.")
            if not inside:
                linears[module] = path
                continue
            expert, _, part = rest.partition(".")
            own = experts.setdefault(f"{block}.mlp.experts", {}).setdefault(int(expert), {})
            own[part.removesuffix("_proj")] = path
        add(model, name, linears, experts)
