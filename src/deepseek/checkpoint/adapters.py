"""What tuning leaves beside a base: deltas (the tensors that changed) and adapters (LoRA's side paths).

    DELTA/delta.json, .safetensors             changed tensors under their names on disk, and the hash of their base
    ADAPTER/adapter_config.json,               peft's own files, where only attention has side paths; the hash of their
            adapter_model.safetensors          base is in the second one's metadata, which peft passes over: of an
                                               unknown key in the first it says that it must be upgraded
    ADAPTER/moe_dr_adapter.json, .safetensors  the same content where MLPs or experts have them too: peft (0.21) takes
                                               no gate_proj of a model with fused experts, cannot express an expert's
                                               own, and must not load a part in silence

Each folder appears whole and carries manifest.json. docs/formats.md defines the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, NotFoundError
from ..files import replace_folder, write_json
from ..model import CausalLM
from ..model.adapter import LoRALinear, Side, attach, linears, resolve_targets, side_paths
from ..quant.fused import unfuse
from ..quant.linear import Recipe, allow_side_paths, is_quantised
from .files import check_manifest, write_manifest
from .identity import base_tensors, check_base, source_of
from .names import quantised_places

FORMAT = 1
BASE, SOURCE = "base", "base_source"  # fingerprints: of what was trained on; of what that was converted from
DELTA, PEFT, OURS = "delta", "adapter_config.json", "moe_dr_adapter.json"
_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


# ---- deltas -----------------------------------------------------------------------------------------------------


def save_delta(folder: str | Path, tensors: Mapping[str, Tensor], base: str, about: Mapping[str, Any]) -> Path:
    """Write the tensors that differ from the base with fingerprint `base`; about: what was trained, for people."""
    with replace_folder(folder) as staging:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()},
                  staging / f"{DELTA}.safetensors", metadata={"format": "pt"})
        write_json(staging / f"{DELTA}.json", {"format": FORMAT, "base": base, **about})
        write_manifest(staging)
    return Path(folder)


def _apply_delta(model: CausalLM, folder: Path, verify: bool) -> None:
    about = _read(folder, f"{DELTA}.json")
    if is_quantised(model):
        raise CheckpointError(f"{folder}: a delta belongs to a plain checkpoint, this one is quantised: load it on the "
                              "base, save that, and quantise it")
    if verify:
        check_base(model, _made_for(about), folder)
    places = base_tensors(model)
    for name, tensor in _tensors(folder, f"{DELTA}.safetensors").items():
        if name not in places or places[name].shape != tensor.shape:
            want = list(places[name].shape) if name in places else "no such tensor"
            raise CheckpointError(f"{folder}: {name} is {list(tensor.shape)}, the model has {want}")
        places[name].copy_(tensor)


# ---- adapters ---------------------------------------------------------------------------------------------------


def check_targets(config: ModelConfig, recipe: Recipe | None, targets: Sequence[str]) -> None:
    """Raises ConfigError for a target that matches nothing in such a model, or one that names a packed MLP: gate, up
    and down of it are no modules of their own, and to leave them out would be another adapter than was asked for."""
    with torch.device("meta"):
        plain = CausalLM(config)
    places = quantised_places(plain, recipe) if recipe is not None else []
    packed = tuple(f"{place.module}." for place in places if place.kind == "mlp")
    for target, names in resolve_targets(plain, targets).items():
        if inside := [name for name in names if name.startswith(packed)]:
            raise ConfigError(f"target_modules = {target!r}: names {inside[0]}, which is inside a packed MLP of this "
                              "quantised base and takes no side path: name the targets that do, such as q_proj, "
                              "v_proj and o_proj, or tune the plain checkpoint")


def attach_adapter(model: CausalLM, side: Side) -> list[str]:
    """`model.adapter.attach` for a model that may be quantised. Raises ConfigError as `check_targets` does."""
    if is_quantised(model):
        check_targets(model.config, Recipe.of(model.config, "the base"), side.targets)
        unfuse(model)
        allow_side_paths(model)
    return attach(model, side)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The side paths under peft's names; an expert's as if it were a module of its own, as it is on disk."""
    out: dict[str, Tensor] = {}
    for name, module in side_paths(model):
        if isinstance(module, LoRALinear):
            out[f"base_model.model.{name}.lora_A.weight"] = module.lora_A
            out[f"base_model.model.{name}.lora_B.weight"] = module.lora_B
            continue
        for place, expert in enumerate(module.chosen):
            for part, projection in _PARTS.items():
                for letter in "AB":
                    out[f"base_model.model.{name}.{expert}.{projection}.lora_{letter}.weight"] = getattr(
                        module, f"{part}_{letter}")[place]
    return out


def save_adapter(folder: str | Path, model: nn.Module, side: Side, base_name: str, base: str) -> Path:
    """Write the side paths of `model`. base_name: where the base is; base: its fingerprint, beside which goes that of
    the checkpoint which a quantised base was made from."""
    names = [name for name, module in side_paths(model) if isinstance(module, LoRALinear)]
    last = sorted({name.rpartition(".")[2] for name in names})
    # a bare name would match more modules in peft than have a side path here, if a target was given in full
    bare = {name for name in linears(model) if name.rpartition(".")[2] in last} == set(names)
    keys: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": side.r,
        "lora_alpha": side.lora_alpha, "lora_dropout": side.lora_dropout, "bias": "none",
        "target_modules": last if bare else names, "inference_mode": True, "fan_in_fan_out": False,
        "use_rslora": False, "modules_to_save": None}
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in adapter_tensors(model).items()}
    bases = {BASE: base} | ({SOURCE: source} if (source := source_of(cast(CausalLM, model))) else {})
    with replace_folder(folder) as staging:
        if side.experts or not all(".self_attn." in name for name in names):
            keys |= {"format": FORMAT, **bases, "experts": {str(k): list(v) for k, v in side.experts.items()}}
            write_json(staging / OURS, keys)
            save_file(tensors, staging / "moe_dr_adapter.safetensors", metadata={"format": "pt"})
        else:
            write_json(staging / PEFT, keys)
            marks = {f"moe_dr.{key}": value for key, value in bases.items()}
            save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"} | marks)
        write_manifest(staging)
    return Path(folder)


def _apply_adapter(model: CausalLM, folder: Path, verify: bool) -> None:
    ours = (folder / OURS).is_file()
    keys = _read(folder, OURS if ours else PEFT)
    changing: dict[str, tuple[Any, ...]] = {
        "bias": ("none",), "use_dora": (False, None), "use_rslora": (False, None), "modules_to_save": (None, []),
        "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "peft_type": ("LORA",),
        "fan_in_fan_out": (False, None), "layers_to_transform": (None, [])}
    for key, good in changing.items():
        if key in keys and keys[key] not in good:
            raise CheckpointError(f"{folder}: {key} = {keys[key]!r}: not supported here (only {good[0]!r} is)")
    tensors = _tensors(folder, "moe_dr_adapter.safetensors" if ours else "adapter_model.safetensors")
    made_for = _made_for(keys if ours else _marks(folder / "adapter_model.safetensors"))
    if verify and (ours or made_for):  # peft itself writes no base
        check_base(model, made_for, folder)
    modules = {match[1] for name in tensors
               if (match := re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name))}
    try:
        side = Side(keys["r"], keys["lora_alpha"], keys.get("lora_dropout") or 0.0,
                    tuple(sorted(name for name in modules if ".mlp.experts." not in name)),
                    {int(layer): tuple(chosen) for layer, chosen in keys.get("experts", {}).items()})
        attach_adapter(model, side)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not an adapter's settings: {error!r}") from None
    places = adapter_tensors(model)
    if odd := sorted(set(places) ^ set(tensors)):
        raise CheckpointError(f"{folder}: {len(odd)} tensors do not match the settings, first {odd[0]}")
    for name, tensor in tensors.items():
        if places[name].shape != tensor.shape:
            raise CheckpointError(f"{folder}: {name} is {list(tensor.shape)}, must be {list(places[name].shape)}")
        places[name].data.copy_(tensor)


# ---- either -----------------------------------------------------------------------------------------------------


def apply(model: CausalLM, folder: str | Path, *, verify: bool = True) -> None:
    """Put a delta's tensors, or an adapter's side paths, into the model that was loaded as stored (dtype "auto").

    Raises NotFoundError, or CheckpointError: damaged files, another base (verify), another shape.
    """
    folder = Path(folder).expanduser()
    if verify and folder.is_dir():
        check_manifest(folder)
    if (folder / f"{DELTA}.json").is_file():
        _apply_delta(model, folder, verify)
    elif (folder / PEFT).is_file() or (folder / OURS).is_file():
        _apply_adapter(model, folder, verify)
    else:
        raise NotFoundError(f"{folder}: neither a delta ({DELTA}.json) nor an adapter ({PEFT}, {OURS})")


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"must be an object, got {type(value).__name__}")
    except ValueError as error:
        raise CheckpointError(f"{folder / name}: not valid: {error}") from None
    if value.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{folder / name}: format = {value['format']!r}: this program reads {FORMAT}")
    return value


def _made_for(keys: Mapping[str, Any]) -> list[str]:
    return [keys[key] for key in (BASE, SOURCE) if isinstance(keys.get(key), str)]


def _marks(file: Path) -> dict[str, str]:
    """What the file's metadata says under our name."""
    with safe_open(file, "pt") as opened:
        found = opened.metadata() or {}
    return {key.removeprefix("moe_dr."): value for key, value in found.items() if key.startswith("moe_dr.")}


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name}: the file is missing")
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / name}: not a whole safetensors file: {error}") from None
