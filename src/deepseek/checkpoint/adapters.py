"""Writes and attaches what tuning makes of a base: deltas (the tensors that changed) and LoRA adapters.

    DELTA/delta.json, .safetensors             changed tensors under their names on disk, and the hash of their base
    ADAPTER/adapter_config.json,               peft's own files, where LoRA is on attention alone; the hash of their
            adapter_model.safetensors          base is in the second one's metadata, which peft passes over: of an
                                               unknown key in the first it says that it must be upgraded
    ADAPTER/moe_dr_adapter.json, .safetensors  the same content where MLPs or experts have them too: peft (0.21) takes
                                               no gate_proj of a model with fused experts, cannot express an expert's
                                               own, and must not load a part in silence

Each folder appears whole and carries manifest.json. docs/formats.md defines the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..files import replace_folder, to_json, write_json
from ..model import CausalLM
from ..model.adapter import LoRALinear, LoraSpec, attach, linears, lora_modules, resolve_targets
from ..quant.linear import QuantConfig, allow_adapters, is_quantized
from .adapter_files import Delta, read_adapter
from .adapter_keys import BASE, DELTA, FORMAT, OURS, PEFT, SOURCE, WEIGHTS
from .files import write_manifest
from .identity import check_base, fingerprints, source_of
from .names import quantized_targets

_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


# ---- deltas -----------------------------------------------------------------------------------------------------


def save_delta(folder: str | Path, tensors: Mapping[str, Tensor], base: str, about: Mapping[str, Any]) -> Path:
    """Write the tensors that differ from the base with fingerprint `base`; about: what was trained, for people."""
    with replace_folder(folder) as staging:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()},
                  staging / WEIGHTS[DELTA], metadata={"format": "pt"})
        write_json(staging / DELTA, {"format": FORMAT, "base": base, **about})
        write_manifest(staging)
    return Path(folder)


# ---- adapters ---------------------------------------------------------------------------------------------------


def check_targets(config: ModelConfig, quant: QuantConfig | None, targets: Sequence[str]) -> None:
    """Raises ConfigError for a target that matches nothing in such a model, or one that names a packed MLP: gate, up
    and down of it are no modules of their own, and to leave them out would be another adapter than was asked for."""
    plain = CausalLM.on_meta(config)
    packed_targets = quantized_targets(plain, quant) if quant is not None else []
    packed = tuple(f"{target.module}." for target in packed_targets if target.kind == "mlp")
    for target, names in resolve_targets(plain, targets).items():
        if inside := [name for name in names if name.startswith(packed)]:
            raise ConfigError(f"target_modules = {target!r}: names {inside[0]}, which is inside a packed MLP of this "
                              "quantized base and takes no LoRA adapter: name the targets that do, such as q_proj, "
                              "v_proj and o_proj, or tune the plain checkpoint")


def attach_adapter(model: CausalLM, spec: LoraSpec) -> list[str]:
    """`model.adapter.attach` for a model that may be quantized. Raises ConfigError as `check_targets` does."""
    if is_quantized(model):
        check_targets(model.config, QuantConfig.of(model.config, "the base"), spec.targets)
        model.layer_runner = None  # gradients, and modules that replace others, need the plain forms
        allow_adapters(model)
    return attach(model, spec)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA matrices under peft's names; an expert's as if it were a module of its own, as it is on disk."""
    out: dict[str, Tensor] = {}
    for name, module in lora_modules(model):
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


def save_adapter(folder: str | Path, model: nn.Module, spec: LoraSpec, base_name: str, base: str) -> Path:
    """Write the LoRA adapter of `model`. base_name: where the base is; base: its fingerprint, beside which goes that of
    the checkpoint which a quantized base was made from."""
    names = [name for name, module in lora_modules(model) if isinstance(module, LoRALinear)]
    last = sorted({name.rpartition(".")[2] for name in names})
    # a bare name would match more modules in peft than have a LoRA adapter here, if a target was given in full
    bare = {name for name in linears(model) if name.rpartition(".")[2] in last} == set(names)
    keys: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": spec.r,
        "lora_alpha": spec.lora_alpha, "lora_dropout": spec.lora_dropout, "bias": "none",
        "target_modules": last if bare else names, "inference_mode": True, "fan_in_fan_out": False,
        "use_rslora": spec.use_rslora, "modules_to_save": None}
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in adapter_tensors(model).items()}
    bases = {BASE: base} | ({SOURCE: source} if (source := source_of(cast(CausalLM, model))) else {})
    with replace_folder(folder) as staging:
        if spec.experts or not all(".self_attn." in name for name in names):
            keys |= {"format": FORMAT, **bases, "experts": {str(k): list(v) for k, v in spec.experts.items()}}
            write_json(staging / OURS, keys)
            save_file(tensors, staging / WEIGHTS[OURS], metadata={"format": "pt"})
        else:
            write_json(staging / PEFT, keys)
            marks = {f"moe_dr.{key}": value for key, value in bases.items()}
            save_file(tensors, staging / WEIGHTS[PEFT], metadata={"format": "pt"} | marks)
            _sort_metadata(staging / WEIGHTS[PEFT])
        write_manifest(staging)
    return Path(folder)


def _sort_metadata(path: Path) -> None:
    """Sort a file's metadata, whose order safetensors leaves to chance, so that equal adapters are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = to_json(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


# ---- either -----------------------------------------------------------------------------------------------------


def apply(model: CausalLM, folder: str | Path, *, verify: bool = True) -> None:
    """Apply a delta's tensors, or an adapter's matrices, to the model that was loaded as stored (dtype "auto").

    Raises NotFoundError, or CheckpointError: damaged files, another base (verify), another shape.
    """
    adapter = read_adapter(folder, verify=verify)
    if isinstance(adapter, Delta) and is_quantized(model):
        raise CheckpointError(f"{adapter.folder}: a delta belongs to a plain checkpoint, this one is quantized: "
                              "quantize the plain one with it (`deepseek quantize PLAIN OUT --adapter DELTA`)")
    adapter.check_fits(model.config)
    if verify and adapter.made_for:  # peft itself writes no base, nor does ESFT's code
        check_base(fingerprints(model), adapter.made_for, adapter.folder, adapter.base_name)
    if isinstance(adapter, Delta):
        adapter.put_into(model)
        return
    try:
        attach_adapter(model, adapter.spec)
    except ConfigError as error:
        raise CheckpointError(f"{adapter.folder}: {error}; or quantize the plain checkpoint with the adapter in it "
                              "(`deepseek quantize PLAIN OUT --adapter ADAPTER`)") from None
    for name, tensor in adapter_tensors(model).items():
        tensor.data.copy_(adapter.tensor(name))
