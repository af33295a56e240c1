"""Where a checkpoint is and what its tensors are called: paths, hub ids, the one weight-name map, quantized units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import NamedTuple

from torch import Tensor

from ..config import PRESETS, ModelConfig
from ..errors import CheckpointError, NotFoundError, nearest, shown
from ..files import leads_out, read_json
from ..model import CausalLM
from ..ops import panels
from ..quant import int4
from ..quant.linear import QuantConfig, QuantTarget, quant_targets
from .ready import READY, is_ready, no_shape, ready

HUB_NAMES = {"deepseek-v3": "deepseek-ai/DeepSeek-V3", "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite"}
INDEX = "model.safetensors.index.json"
PAGE = 4096  # a packed MLP begins at a multiple of it, and is padded to one


def resolve(name: str | Path, *, weights: bool = True) -> Path:
    """A checkpoint folder for a ready model (`mini`), a path, a known name (`deepseek-v3`) or a hub id: local first,
    then cache, then hub. The folder of a run stands for the model in it. weights: False fetches only the small files of
    a hub id, if it has an index.

    Raises NotFoundError that says everything that was tried; of a ready model, what `pull` raises.
    """
    if is_ready(name):
        return ready(str(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "model" / "config.json").is_file():
            return path / "model"
        raise NotFoundError(f"{path}: {_no_checkpoint(path)}")
    if path.is_file():
        what, advice = _foreign(path.name)
        raise NotFoundError(f"{path}: a checkpoint is a folder, this is a file" + (f" of {what}: {advice}" if what else
                                                                                   ""))
    repo = HUB_NAMES.get(str(name).lower(), str(name))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or str(name).startswith((".", "/", "~")):
        hint = (f" (it is a preset, without weights: `deepseek train {name} DATA` makes some)" if str(name) in PRESETS
                else nearest(str(name), [*READY, *HUB_NAMES, *PRESETS]))
        raise NotFoundError(f"{name}: no such folder here, and not the form of a hub id (owner/name){hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*(["*.safetensors"] if weights else []), "*.json", "*.jinja", "*.model"]
    cached = "is not in the local cache"
    try:
        folder = Path(snapshot_download(repo, allow_patterns=wanted, local_files_only=True))
        if not (absent := _absent(folder, weights)):
            return folder
        cached = f"is in the local cache without {absent}"
    except HFValidationError as error:
        raise NotFoundError(f"{name}: no such folder here, and not a hub id: {error}") from None
    except LocalEntryNotFoundError:
        pass
    try:
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFoundError(f"{name}: no such folder here, hub id {repo} {cached}, "
                            f"and the hub gave no answer: {reason}") from None
    if not weights and not (folder / INDEX).is_file():
        return resolve(name)
    if absent := _absent(folder, weights):  # the hub was out of reach, or the repository holds no safetensors
        raise NotFoundError(f"{name}: no such folder here, and hub id {repo} came without {absent}")
    return folder


def _no_checkpoint(folder: Path) -> str:
    """Why a folder without config.json is not a checkpoint."""
    if not any(folder.iterdir()):
        return "the folder has no config.json: the folder is empty"
    for adapter in ("delta", "adapter"):
        if (folder / adapter).is_dir():
            return (f"the folder is of a tuning, which left {folder / adapter}: give the base model, and this as its "
                    "adapter")
    if (folder / "settings.json").is_file():
        return "the folder is a run that has not finished: there is no model in it yet"
    return "the folder has no config.json, so it is not a checkpoint" + other_weights(folder)


def find_config(name: str | Path) -> ModelConfig:
    """The configuration of a preset, a config.json, a checkpoint folder or a hub id; local first.
    Raises ConfigError for the name of a ready model, which is no configuration to train."""
    if is_ready(name):
        raise no_shape(str(name))
    path = Path(name).expanduser()
    if path.is_file():
        return ModelConfig.from_file(path, strict=True)
    if str(name) in PRESETS and not path.exists():
        return ModelConfig.preset(str(name))
    return ModelConfig.from_file(resolve(name))


def _absent(folder: Path, weights: bool) -> str | None:
    """First missing file of a checkpoint, or None (a shared hub cache may be partial)."""
    names = ["config.json"]
    if (index := folder / INDEX).is_file():
        names += sorted(set(weight_map_of(index).values())) if weights else []
    else:
        names.append("model.safetensors")
    return next((name for name in names if not (folder / name).is_file()), None)


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises CheckpointError naming the index."""
    weight_map = read_json(index, CheckpointError, "not a weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: not a weight index: weight_map = {shown(weight_map)}: must be an object with "
                              "the file of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise CheckpointError(f"{index}: not a weight index: the file of {name:.80} is {shown(file)}: must be a "
                                  "file name")
        if leads_out(file):
            raise CheckpointError(f"{index}: not a weight index: {file!r:.80} leads out of the folder")
    return weight_map


class Names:
    """The tensors that an index names, without their files: what is known of a checkpoint before its download."""

    def __init__(self, stored: Iterable[str], folder: Path) -> None:
        self.folder, self._names = folder, int4.logical(stored)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


# Weights of other programs, by how their files' names end, and what to do with them. Pickles execute code when they are
# read, so they are not read here.
_PICKLES = ("pickled weights", "they can run code when they are read: let transformers convert them "
            "(AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)), or get the model's safetensors")
_ELSEWHERE = "get the model's safetensors in Hugging Face's layout"
_FOREIGN = {
    ".gguf": ("GGUF", "`deepseek upcycle FILE OUT` makes a checkpoint of a dense model of Llama's kind; of another, "
                      f"{_ELSEWHERE}"),
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"), _PICKLES),
    ".distcp": ("torch's distributed checkpoints", "gather and convert them where they were trained, to safetensors"),
    **dict.fromkeys((".h5", ".msgpack", ".onnx", ".npz", ".mlmodel", ".tflite", ".engine"),
                    ("weights of another program", _ELSEWHERE))}


def _foreign(name: str) -> tuple[str, str]:
    """(format, advice) for a file of weights in another program's format, else empty."""
    if name.endswith((".safetensors", INDEX)):
        return "safetensors", "name its folder"
    odd = name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
    return ("", "") if odd else _FOREIGN.get(PurePath(name).suffix.lower(), ("", ""))


def other_weights(folder: Path) -> str:
    """End of an error message: what the folder has instead of a checkpoint; "" if that is unknown."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(path.name for path in folder.iterdir()):
        if (kind := _foreign(name))[0] and not name.endswith(INDEX):
            found.setdefault(kind, []).append(name)
    plain = found.pop(("safetensors", "name its folder"), [])
    if plain and not (folder / INDEX).is_file():
        return f": it has {_listed(plain)} and no {INDEX} that says what is in them"
    return "".join(f": it has {what} ({_listed(files)}): {advice}" for (what, advice), files in found.items())


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


# ---- the one name map -------------------------------------------------------------------------------------------

_MTP_INPUT = {f"input.{part}": part for part in ("enorm", "hnorm", "eh_proj")}


def hf_names(name: str, config: ModelConfig) -> list[tuple[str, tuple[int, slice] | None]]:
    """Where the tensor `name` of the model lives on disk: (name on disk, (expert, rows) or None for the whole)."""
    if match := re.fullmatch(r"model\.mtp\.(\d+)\.(.+)", name):
        rest = match[2]
        for ours, theirs in _MTP_INPUT.items():
            rest = theirs + rest[len(ours):] if rest.startswith(ours) else rest
        name = f"model.layers.{config.num_hidden_layers + int(match[1])}.{rest}"
    if match := re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)", name):
        inner, stem = config.moe_intermediate_size, match[1]
        rows = {"gate_up_proj": {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)},
                "down_proj": {"down_proj": slice(None)}}[match[2]]
        return [(f"{stem}.{e}.{part}.weight", (e, where)) for e in range(config.n_routed_experts)
                for part, where in rows.items()]
    return [(name, None)]


def on_disk(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """The tensor `name` of the model as files have it: names there, and views."""
    return {disk_name: tensor if part is None else tensor[part[0]][part[1]]
            for disk_name, part in hf_names(name, config)}


def outside_index(name: str, config: ModelConfig) -> bool:
    """Whether the tensor `name` of the model is written to mtp.safetensors (see the top of this file)."""
    return name.startswith("model.mtp.") and config.num_hidden_layers != 61


class Unit(NamedTuple):
    """One quantized unit: the stem of its names on disk and the plain weights there that it is made of (one, or
    gate, up and down of a gated MLP)."""

    stem: str
    weights: tuple[str, ...]


def units(target: QuantTarget, config: ModelConfig) -> list[Unit]:
    """The unit of a target, or those of its experts in their order."""
    gated = target.kind in ("mlp", "experts")
    name = {"mlp": "gate_proj.weight", "experts": "down_proj"}.get(target.kind, "weight")
    suffix = {"mlp": ".gate_proj.weight", "experts": ".down_proj.weight"}.get(target.kind, ".weight")
    stems = [on_disk.removesuffix(suffix) for on_disk, _ in hf_names(f"{target.module}.{name}", config)]
    parts = ("gate_proj.weight", "up_proj.weight", "down_proj.weight") if gated else ("weight",)
    return [Unit(stem, tuple(f"{stem}.{part}" for part in parts)) for stem in stems]


def quantized_targets(model: CausalLM, quant: QuantConfig) -> list[QuantTarget]:
    """Targets that are quantized. One kept weight keeps its whole MLP, or all routed experts of its layer."""
    def kept(target: QuantTarget) -> bool:
        names = (name for unit in units(target, model.config) for name in unit.weights)
        return any(fnmatchcase(name, pattern) for name in names for pattern in quant.keep)

    return [target for target in quant_targets(model) if not kept(target)]


def packed_bytes(target: QuantTarget, bits: panels.Bits) -> int:
    """Size of one unit of a matrix, an MLP or experts, with an MLP's padding."""
    if target.kind == "matrix":
        return panels.matrix_bytes(target.rows, target.columns, bits)
    return -(-panels.mlp_bytes(target.columns, target.rows, bits) // PAGE) * PAGE
