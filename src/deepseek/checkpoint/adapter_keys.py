"""The settings of adapters, key by key: used, harmless at its value, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..settings import is_int

FORMAT = 1
BASE, SOURCE = "base", "base_source"  # fingerprints: of what was trained on; of what that was converted from
DELTA, PEFT, OURS, ESFT = "delta.json", "adapter_config.json", "moe_dr_adapter.json", "expert_cfg.json"
WEIGHTS = {DELTA: "delta.safetensors", PEFT: "adapter_model.safetensors", OURS: "moe_dr_adapter.safetensors"}

_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")


# ---- our formats ----------------------------------------------------------------------------------------------------


def check_keys(path: Path, keys: Mapping[str, Any], known: Mapping[str, Callable[[Any], bool]],
               needed: Sequence[str]) -> None:
    """For formats whose writer we know: every key there, none beyond them, all of their type."""
    if unknown := sorted(set(keys) - set(known)):
        raise CheckpointError(f"{path}: unknown key {unknown[0]} = {keys[unknown[0]]!r:.60}")
    if missing := [key for key in needed if key not in keys]:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    for key, value in keys.items():
        if not known[key](value):
            raise CheckpointError(f"{path}: {key} = {value!r:.60}: this program reads {FORMAT}" if key == "format" else
                                  f"{path}: {key} = {value!r:.60}: not a value that it can have")


def is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_format(value: Any) -> bool:
    return value == FORMAT and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_experts(value: Any) -> bool:
    """{"layer": [index, …]}."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"\d{1,6}", layer) and isinstance(chosen, list) and all(
            is_int(e) and e >= 0 for e in chosen)
        and len(set(chosen)) == len(chosen)
        for layer, chosen in value.items())


OF_OURS: dict[str, Callable[[Any], bool]] = {
    "format": is_format, BASE: is_fingerprint, SOURCE: is_fingerprint, "experts": is_experts}


# ---- peft's ---------------------------------------------------------------------------------------------------------

# peft's keys (0.21) that change nothing of what an adapter computes, whatever their value; the others must be used, or
# have a value that switches them off
_HARMLESS = frozenset("auto_mapping base_model_name_or_path inference_mode megatron_core peft_version "
                      "qalora_group_size revision runtime_config".split())
_USED = frozenset("peft_type task_type r lora_alpha lora_dropout target_modules use_rslora".split())
# what its values mean that would make another model of the same tensors
_MEANING = {
    "bias": "trained biases of the base", "use_dora": "DoRA's magnitudes", "lora_bias": "biases of B",
    "modules_to_save": "whole modules beside the LoRA matrices", "fan_in_fan_out": "transposed weights",
    "rank_pattern": "ranks that differ between modules", "alpha_pattern": "scales that differ between modules",
    "layers_to_transform": "some layers alone", "layers_pattern": "some layers alone",
    "exclude_modules": "modules left out of target_modules", "target_parameters": "parameters of fused experts",
    "trainable_token_indices": "rows of the embedding", "alora_invocation_tokens": "an adapter that acts from some "
    "tokens on (aLoRA)", "layer_replication": "layers that stand several times", "kasa_config": "KaSA, which changes "
    "the base", **{
        f"{name.lower().replace('-', '_')}_config": f"{name}, which changes the base or its ranks: null where peft has "
        "converted the adapter" for name in ("LoftQ", "EVA", "CorDA", "LoRA-GA")},
    "megatron_config": "Megatron's parallel layers", "use_qalora": "QALoRA's grouped inputs",
    "arrow_config": "Arrow's mixture of adapters", "use_bdlora": "block-diagonal matrices",
    "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "ensure_weight_tying": "tied adapters"}
# Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and others subtract from it what A
# and B begin with, so their A and B belong to another base, unless they were converted (then the value is true).
_INITIALISATIONS: tuple[Any, ...] = (None, True, False, "gaussian", "orthogonal")
KNOWN_TO_PEFT = _HARMLESS | _USED | set(_MEANING) | {"init_lora_weights"}


def check_peft(path: Path, keys: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the first key whose value would make another model of the same tensors."""
    kind = keys.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type = {kind!r}: must be 'LORA', other kinds are not read here")
    if (task := keys.get("task_type")) not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{path}: task_type = {task!r:.60}: must be CAUSAL_LM, this is a language model")
    start = keys.get("init_lora_weights")
    if not any(start is good or (isinstance(good, str) and start == good) for good in _INITIALISATIONS):
        raise CheckpointError(f"{path}: init_lora_weights = {start!r:.60}: not supported here: such an adapter belongs "
                              "to a base that its start has changed (PiSSA, OLoRA, CorDA, LoftQ, …) or to ranks of its "
                              "own (EVA); peft converts it with path_initial_model_for_weight_conversion")
    if (flag := keys.get("use_rslora")) not in (None, False, True):
        raise CheckpointError(f"{path}: use_rslora = {flag!r:.60}: must be true or false")
    for key, value in keys.items():
        if key in _HARMLESS or key in _USED or key in OF_OURS or key == "init_lora_weights":
            continue
        if value in _NOTHING or (key == "bias" and value == "none"):
            continue
        why = _MEANING.get(key, "a key that this program does not know")
        raise CheckpointError(f"{path}: {key} = {value!r:.60}: not supported here ({why})")
