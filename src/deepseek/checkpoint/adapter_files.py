"""Adapter folders, read and checked. A delta replaces tensors of its base, a LoRA adapter adds products to them.

    folder      one kind of adapter and one alone; what else a folder can be (a run, a checkpoint, a pickle) is named
    settings    every key is used, or known to be harmless at its value; any other is refused by name
    tensors     names, ranks and settings agree, and all numbers are finite
    base        every tensor has its place and shape in the model, and the fingerprint is the base's where one is noted

Four kinds: our deltas and adapters (docs/formats.md), peft's LoRA adapters, and the adapters that ESFT's own code
writes (deepseek-ai/ESFT: expert_cfg.json beside the tensors of the tuned experts).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, NotFoundError
from ..files import read_json
from ..model import CausalLM
from ..model.adapter import LoraSpec, linears
from .adapter_keys import (
    BASE,
    DELTA,
    ESFT,
    KNOWN_TO_PEFT,
    OF_OURS,
    OURS,
    PEFT,
    SOURCE,
    WEIGHTS,
    check_keys,
    check_peft,
    is_experts,
    is_fingerprint,
    is_flag,
    is_format,
    is_text,
)
from .files import TensorFiles, check_manifest
from .identity import base_tensors
from .names import INDEX

PARTS = ("gate_proj", "up_proj", "down_proj")
ROWS = 128  # of a product at a time, so that a row has the same bits wherever a block of rows begins


# ---- the two kinds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What a folder holds. about: the file with its settings, and these; tensors: of its weights.

    made_for: the fingerprints that its base may have, empty where none is noted; base_name: where that base was.
    """

    folder: Path
    about: str
    keys: Mapping[str, Any]
    tensors: TensorFiles
    made_for: tuple[str, ...]

    @property
    def kind(self) -> str:
        """For people and for provenance.json."""
        return {DELTA: "delta", ESFT: "ESFT adapter"}.get(self.about, "LoRA adapter")

    @property
    def base_name(self) -> str:
        name = self.keys.get("base_name") or self.keys.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    @property
    def changed(self) -> frozenset[str]:
        """Names on disk of the base's tensors that the adapter changes."""
        raise NotImplementedError

    def check_fits(self, config: ModelConfig) -> None:
        """Raises CheckpointError unless the names and shapes of all tensors fit the model."""
        raise NotImplementedError

    def merged(self, name: str, start: int, rows: Tensor) -> Tensor:
        """Rows from `start` (a multiple of 128) of the tensor `name`, float32, which may be changed in place: with the
        adapter."""
        raise NotImplementedError

    def where(self, name: str) -> Path:
        """The file that a changed tensor comes from."""
        raise NotImplementedError

    def _number(self, name: str) -> Tensor:
        """A tensor in float32. Raises CheckpointError where it has a value that is not finite."""
        return self.tensors.finite(name, self.tensors.read(name, torch.float32))


@dataclass(frozen=True)
class Delta(Adapter):
    """names: name on disk -> name in the delta's files, which are the same but for ESFT's."""

    names: Mapping[str, str]

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(self.names)

    def check_fits(self, config: ModelConfig) -> None:
        places = base_tensors(CausalLM.on_meta(config))
        for name, stored in self.names.items():
            if name not in places:
                raise CheckpointError(f"{self.folder}: {_no_place(name, config, _last(places))}")
            got, want = self.tensors.shape(stored), tuple(places[name].shape)
            if got != want:
                raise CheckpointError(f"{self.folder}: made for a base of other sizes: {name} is {list(got)}, the "
                                      f"model has {list(want)}")

    def merged(self, name: str, start: int, rows: Tensor) -> Tensor:
        stored = self.names[name]
        return self.tensors.finite(stored, self.tensors.read_rows(stored, start, start + len(rows), torch.float32))

    def where(self, name: str) -> Path:
        return self.tensors.file(self.names[name])

    def tensor(self, name: str) -> Tensor:
        """A changed tensor by its name on disk, in float32."""
        return self._number(self.names[name])

    @torch.no_grad()
    def put_into(self, model: CausalLM) -> None:
        places = base_tensors(model)
        for name in self.names:
            places[name].copy_(self.tensor(name))


@dataclass(frozen=True)
class LoRA(Adapter):
    """A LoRA adapter, W + scale * B A. modules: module on disk (experts too) -> names of its A and B in the file."""

    modules: Mapping[str, tuple[str, str]]
    spec: LoraSpec

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(f"{module}.weight" for module in self.modules)

    def check_fits(self, config: ModelConfig) -> None:
        model = CausalLM.on_meta(config)
        places: dict[str, tuple[Any, Any]] = {
            name: (module.out_features, module.in_features) for name, module in linears(model).items()}
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        for layer in config.moe_layers:
            for expert in range(config.n_routed_experts):
                stem = f"model.layers.{layer}.mlp.experts.{expert}"
                places |= {f"{stem}.{part}": (hidden, inner) if part == "down_proj" else (inner, hidden)
                           for part in PARTS}
        for module, names in self.modules.items():
            if module not in places:
                raise CheckpointError(f"{self.folder}: {_no_place(module, config, _last(places))}")
            (_, wide), (out, _) = (self.tensors.shape(name) for name in names)
            if (out, wide) != places[module]:
                raise CheckpointError(f"{self.folder}: made for a base of other sizes: {module} is a matrix "
                                      f"{[out, wide]} there, the model's is {list(places[module])}")
        if "lm_head" in self.modules and config.tie_word_embeddings:
            raise CheckpointError(f"{self.folder}: adapts lm_head, which is tied to the embeddings in this model")
        self._check_targets(model)

    def _check_targets(self, model: CausalLM) -> None:
        """Raises CheckpointError where the settings name other modules of the model than the tensors do."""
        targets = self.keys.get("target_modules")
        if isinstance(targets, str):  # a pattern, or all-linear: what it matched is in the tensors
            return
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"{self.folder / self.about}: target_modules = {targets!r:.60}: must be a list of "
                                  "names, or a pattern")
        matched = {module for module in (*linears(model), *self.modules)
                   if any(module == target or module.endswith(f".{target}") for target in targets)}
        inside = {module for module in matched if ".mlp.experts." in module}  # an expert has all three, or none
        if not matched and targets:
            raise CheckpointError(f"{self.folder}: target_modules = {', '.join(targets)}: match nothing in this model, "
                                  f"whose linear modules are {', '.join(_last(linears(model)))}")
        if missing := sorted(matched - inside - set(self.modules)):
            raise CheckpointError(f"{self.folder}: {len(missing)} modules that target_modules names have no tensors, "
                                  f"first {missing[0]}: tensors are missing, or the adapter is another model's")
        named = matched | ({m for m in self.modules if ".mlp.experts." in m} if self.about == OURS else set())
        if odd := sorted(set(self.modules) - named):
            raise CheckpointError(f"{self.folder}: {len(odd)} modules have tensors and are not named by "
                                  f"target_modules = {', '.join(targets)}, first {odd[0]}")

    @cached_property
    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight on disk -> (A, scale * B), float32."""
        return {f"{module}.weight": (self._number(a), self.spec.scale * self._number(b))
                for module, (a, b) in self.modules.items()}

    def added(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of scale * B A."""
        a, b = self._pairs[name]
        return torch.cat([b[row : min(row + ROWS, stop)] @ a for row in range(start, stop, ROWS)])

    def merged(self, name: str, start: int, rows: Tensor) -> Tensor:
        return rows.add_(self.added(name, start, start + len(rows)))

    def where(self, name: str) -> Path:
        return self.tensors.file(self.modules[name.removesuffix(".weight")][0])

    def tensor(self, name: str) -> Tensor:
        """One of the file's tensors, in float32."""
        return self._number(name)

    @property
    def untrained(self) -> bool:
        """Whether every B is zero, so that the adapter adds nothing."""
        return not any(bool(b.any()) for _, b in self._pairs.values())


def _last(names: Mapping[str, Any]) -> list[str]:
    """Last parts of module or tensor names."""
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})


def _no_place(name: str, config: ModelConfig, there: Sequence[str]) -> str:
    """Why the model has no module or tensor of this name."""
    layer, expert = (re.search(pattern, name) for pattern in (r"\.layers\.(\d+)\.", r"\.experts\.(\d+)\."))
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f"made for a base of more layers: has {name}, the model's layers are 0..{config.num_hidden_layers - 1}"
    if layer and expert and int(layer[1]) not in config.moe_layers:
        return f"made for another base: has {name}, and layer {layer[1]} of the model has no routed experts"
    if expert and int(expert[1]) >= config.n_routed_experts:
        return f"made for a base of more experts: has {name}, a layer of the model has {config.n_routed_experts}"
    if name.removesuffix(".weight") == "lm_head" and config.tie_word_embeddings:
        return "changes lm_head, which is tied to the embeddings in this model"
    return (f"made for another architecture: the model has no such tensor or linear module as {name}; it has "
            f"{', '.join(there)}")


# ---- reading ------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | Path, *, verify: bool = True) -> Delta | LoRA:
    """What a folder holds, checked in itself. Raises NotFoundError where there is no adapter, CheckpointError naming
    what is wrong with one. verify: compare its files with its manifest."""
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise NotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: an adapter is a folder, this is a file")
    kinds = [name for name in (DELTA, PEFT, OURS, ESFT) if (folder / name).is_file()]
    if not kinds:
        raise NotFoundError(f"{folder}: {_what_else(folder)}")
    if len(kinds) > 1:
        raise CheckpointError(f"{folder}: holds {' and '.join(kinds)}: must be one adapter")
    if verify:
        check_manifest(folder)
    about = kinds[0]
    keys = read_json(folder / about, CheckpointError)
    tensors = _tensors(folder, about)
    return {DELTA: _delta, ESFT: _esft}.get(about, _lora)(folder, about, keys, tensors)


def _what_else(folder: Path) -> str:
    """End of an error message: what a folder without an adapter is."""
    neither = f"neither a delta ({DELTA}) nor an adapter ({PEFT}, {OURS})"
    names = {path.name for path in folder.iterdir()}
    if not names:
        return f"the folder is empty: {neither}"
    for name in ("delta", "adapter"):
        if (folder / name).is_dir():
            return f"{neither}, but what holds one: give {folder / name}"
    for about, weights in WEIGHTS.items():
        if weights in names:
            return f"holds {weights} without {about}, its settings"
    if "config.json" in names:
        return f"a whole checkpoint, {neither}: give it as the model"
    if "trained.safetensors" in names:
        return f"a checkpoint within a run, {neither}: let the run end, and give what it leaves"
    return neither


def _tensors(folder: Path, about: str) -> TensorFiles:
    if about == ESFT:
        names = [] if (folder / INDEX).is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
        if not names and not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder}: holds {about} and no safetensors file")
        found = TensorFiles(folder, verify=False, names=names)
    else:
        file = folder / WEIGHTS[about]
        if not file.is_file():
            pickle = file.with_suffix(".bin")
            raise CheckpointError(f"{file}: the file is missing" + (
                f": {pickle.name} is a pickle, which may execute code and is not read: save the adapter again as "
                "safetensors" if pickle.is_file() else ""))
        found = TensorFiles(folder, verify=False, names=[file.name])
    for name in found:
        if (kind := found.dtype(name)) not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"{found.file(name)}: {name} is of {kind}: must be F32, F16, BF16 or F64")
    if not any(True for _ in found):
        raise CheckpointError(f"{folder}: its weights hold no tensor")
    return found


def _delta(folder: Path, about: str, keys: dict[str, Any], tensors: TensorFiles) -> Delta:
    check_keys(folder / about, keys, {"format": is_format, BASE: is_fingerprint, "base_name": is_text,
                                       "mode": is_text, "experts": is_experts}, ("format", BASE))
    return Delta(folder, about, keys, tensors, (keys[BASE],), {name: name for name in tensors})


def _esft(folder: Path, about: str, keys: dict[str, Any], tensors: TensorFiles) -> Delta:
    """ESFT's code saves names with or without the leading `model.`."""
    check_keys(folder / about, keys, {"experts": is_experts, "shared_experts": is_flag,
                                       "non_expert_modules": is_flag}, ("experts",))
    names = {f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name: name
             for name in tensors}
    tuned = {f"model.layers.{int(layer)}.mlp.experts.{e}.{part}.weight"
             for layer, chosen in keys["experts"].items() for e in chosen for part in PARTS}
    if missing := sorted(tuned - set(names)):
        raise CheckpointError(f"{folder}: {len(missing)} tensors of the experts that {about} names are missing, first "
                              f"{missing[0]}")
    for name in sorted(set(names) - tuned):
        kind = "experts" if ".mlp.experts." in name else "shared_experts" if ".shared_experts." in name else \
            "non_expert_modules"
        if kind == "experts" or not keys.get(kind):
            raise CheckpointError(f"{folder}: holds {name}, which {about} does not name ({kind})")
    return Delta(folder, about, keys, tensors, (), names)


# ---- LoRA ---------------------------------------------------------------------------------------------------------

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_ODD = (  # names that tell what else an adapter trains
    ("lora_magnitude_vector", "a magnitude of DoRA"), ("lora_embedding_", "LoRA on an embedding"),
    (".modules_to_save", "a whole module saved beside the LoRA matrices"), (".lora_A.bias", "a bias of LoRA's"),
    (".lora_B.bias", "a bias of LoRA's"), (".token_adapter", "trained rows of the embedding"),
    ("lora_diag", "a diagonal of KaSA"), (".bias", "a trained bias"))


def _lora(folder: Path, about: str, keys: dict[str, Any], tensors: TensorFiles) -> LoRA:
    path = folder / about
    if about == OURS:
        if unknown := sorted(set(keys) - KNOWN_TO_PEFT - set(OF_OURS)):
            raise CheckpointError(f"{path}: unknown key {unknown[0]} = {keys[unknown[0]]!r:.60}")
        ours = {key: value for key, value in keys.items() if key in OF_OURS}
        check_keys(path, ours, OF_OURS, ("format", BASE, "experts"))
        marks: Mapping[str, Any] = keys
    else:
        if odd := sorted(set(keys) & set(OF_OURS)):
            raise CheckpointError(f"{path}: {odd[0]} = {keys[odd[0]]!r:.60}: not a key of peft's")
        marks = _marks(tensors)
    check_peft(path, keys)
    modules = _pairs(folder, tensors)
    chosen = _experts(folder, modules)
    if about == OURS and (said := {int(layer): set(e) for layer, e in keys["experts"].items() if e}) != {
            layer: set(e) for layer, e in chosen.items()}:
        raise CheckpointError(f"{folder}: {about} names the experts {_shown(said)}, the tensors those of "
                              f"{_shown(chosen)}")
    try:
        spec = LoraSpec(keys["r"], keys["lora_alpha"], keys.get("lora_dropout") or 0.0,
                        tuple(sorted(name for name in modules if ".mlp.experts." not in name)), chosen,
                    bool(keys.get("use_rslora")))
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for a, b in modules.values():
        shapes = tensors.shape(a), tensors.shape(b)
        if not all(len(shape) == 2 for shape in shapes):
            raise CheckpointError(f"{folder}: {a} is {list(shapes[0])}, its B {list(shapes[1])}: must be matrices")
        if not shapes[0][0] == shapes[1][1] == spec.r:
            raise CheckpointError(f"{folder}: r = {spec.r} in {about}, but {a} is {list(shapes[0])} and its B "
                                  f"{list(shapes[1])}: their rank must be r")
    made_for = tuple(marks[key] for key in (BASE, SOURCE) if key in marks)
    return LoRA(folder, about, keys, tensors, made_for, modules, spec)


def _pairs(folder: Path, tensors: TensorFiles) -> dict[str, tuple[str, str]]:
    """Module -> names of its A and B."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        match = _TENSOR.fullmatch(name)
        if match is None or match[1].endswith((".lora_A", ".lora_B")):
            why = next((why for part, why in _ODD if part in name), None)
            if why is None and re.search(r"\.lora_[AB]\.\w+\.weight$", name):
                why = "named as in memory (state_dict): save it with peft's save_pretrained"
            why = why or "no matrix of LoRA, or not by the name that peft gives it"
            raise CheckpointError(f"{folder}: {name}: not supported here ({why})")
        found.setdefault(match[1], {})[match[2]] = name
    for module, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(f"{folder}: base_model.model.{module}.lora_{'B' if 'A' in pair else 'A'}.weight is "
                                  "missing, its partner is there")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _experts(folder: Path, modules: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """{layer: experts} with LoRA: on all three of their matrices."""
    parts: dict[tuple[int, int], set[str]] = {}
    for module in modules:
        if ".mlp.experts." in module:
            match = re.fullmatch(r"model\.layers\.(\d{1,6})\.mlp\.experts\.(\d{1,6})\.(gate|up|down)_proj", module)
            if match is None:
                raise CheckpointError(f"{folder}: {module}: no matrix of an expert")
            parts.setdefault((int(match[1]), int(match[2])), set()).add(f"{match[3]}_proj")
    for (layer, expert), has in parts.items():
        if missing := [part for part in PARTS if part not in has]:
            raise CheckpointError(f"{folder}: expert {layer}.{expert} has no tensors for {missing[0]}: must be on "
                                  f"{', '.join(PARTS)}, or on none")
    layers = sorted({layer for layer, _ in parts})
    return {layer: tuple(sorted(e for at, e in parts if at == layer)) for layer in layers}


def _shown(experts: Mapping[int, Any]) -> str:
    return ", ".join(f"{layer}.{e}" for layer, chosen in experts.items() for e in sorted(chosen)[:3]) or "none"


def _marks(tensors: TensorFiles) -> dict[str, str]:
    """Our entries in the metadata of peft's file. Raises CheckpointError for what is no fingerprint."""
    found = {key.removeprefix("moe_dr."): value
             for key, value in tensors.metadata().items() if key.startswith("moe_dr.")}
    for key, value in found.items():
        if key not in (BASE, SOURCE) or not is_fingerprint(value):
            raise CheckpointError(f"{tensors.folder}: metadata moe_dr.{key} = {value!r:.60}: no fingerprint of a base")
    return found
