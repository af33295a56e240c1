"""What tuning leaves beside a base: deltas (the tensors that changed) and adapters (LoRA's side paths).

    DELTA/delta.json, .safetensors             changed tensors under their names on disk, and the hash of their base
    ADAPTER/adapter_config.json,               peft's own files, where only attention has side paths
            adapter_model.safetensors
    ADAPTER/moe_dr_adapter.json, .safetensors  the same content where MLPs or experts have them too: peft (0.21) takes
                                               no gate_proj of a model with fused experts, cannot express an expert's
                                               own, and must not load a part in silence

Each folder appears whole and carries manifest.json. docs/formats.md defines the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, NotFoundError
from ..files import replace_folder, write_json
from ..model import CausalLM
from ..model.adapter import PARTS_APART, LoRALinear, Side, attach, linears, side_paths
from ..quant.fused import unfuse
from ..quant.linear import QuantisedExperts, allow_side_paths, is_quantised
from .files import check_manifest, write_manifest
from .names import disk_parts

FORMAT = 1
DELTA, PEFT, OURS = "delta", "adapter_config.json", "moe_dr_adapter.json"
_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

Progress = Callable[[int, int], None]


# ---- what a base is ---------------------------------------------------------------------------------------------


def base_tensors(model: CausalLM) -> dict[str, Tensor]:
    """Every tensor of the base under its name on disk, whatever tuning has put around it; views, nothing is copied."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedExperts):
            state |= {f"{name.replace('.base', '')}.{e}.packed": packed for e, packed in enumerate(module.table)}
    for name, tensor in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, PARTS_APART):
            state[name.replace(".base.", ".")] = tensor
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for disk_name, part in disk_parts(name, model.config):
            out[disk_name] = tensor if part is None else tensor[part[0]][part[1]]
    return out


def tensor_hashes(model: CausalLM, progress: Progress | None = None) -> dict[str, str]:
    """Name on disk -> SHA-256 of dtype, shape and bytes, of every tensor of the base. progress: (done, all)."""
    tensors = base_tensors(model)
    out: dict[str, str] = {}
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{data.dtype} {list(data.shape)} ".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
        out[name] = digest.hexdigest()
        if progress is not None:
            progress(len(out), len(tensors))
    return out


def fingerprint(hashes: Mapping[str, str]) -> str:
    """One hash of a base, from those of its tensors."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


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
    if verify and (found := fingerprint(tensor_hashes(model))) != about.get("base"):
        raise CheckpointError(f"{folder}: made for another base: its hash is {str(about.get('base'))[:16]}…, that of "
                              f"this model {found[:16]}…")
    places = base_tensors(model)
    for name, tensor in _tensors(folder, f"{DELTA}.safetensors").items():
        if name not in places or places[name].shape != tensor.shape:
            want = list(places[name].shape) if name in places else "no such tensor"
            raise CheckpointError(f"{folder}: {name} is {list(tensor.shape)}, the model has {want}")
        places[name].copy_(tensor)


# ---- adapters ---------------------------------------------------------------------------------------------------


def attach_adapter(model: CausalLM, side: Side) -> list[str]:
    """`model.adapter.attach` for a model that may be quantised."""
    if is_quantised(model):
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
    """Write the side paths of `model`. base_name: where the base is; base: its fingerprint."""
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
    with replace_folder(folder) as staging:
        if side.experts or not all(".self_attn." in name for name in names):
            keys |= {"format": FORMAT, "base": base, "experts": {str(k): list(v) for k, v in side.experts.items()}}
            write_json(staging / OURS, keys)
            save_file(tensors, staging / "moe_dr_adapter.safetensors", metadata={"format": "pt"})
        else:
            write_json(staging / PEFT, keys)
            save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
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
    if ours and verify and not is_quantised(model) and (
            found := fingerprint(tensor_hashes(model))) != keys.get("base"):
        raise CheckpointError(f"{folder}: made for another base: its hash is {str(keys.get('base'))[:16]}…, that of "
                              f"this model {found[:16]}…")
    tensors = _tensors(folder, "moe_dr_adapter.safetensors" if ours else "adapter_model.safetensors")
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


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name}: the file is missing")
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / name}: not a whole safetensors file: {error}") from None
