"""The one place that reads and writes weights.

On disk: Hugging Face's layout for DeepseekV3ForCausalLM / DeepseekV2ForCausalLM, safetensors only (weights never
execute code), one file or shards with an index, beside `config.json` and the tokenizer. In memory the names are the
same, but for two rows of one table:

    in memory                                       on disk
    model.layers.L.mlp.experts.gate_up_proj [E,..]  model.layers.L.mlp.experts.e.gate_proj.weight, ….up_proj.weight
    model.layers.L.mlp.experts.down_proj    [E,..]  model.layers.L.mlp.experts.e.down_proj.weight
    model.mtp.d.…  (entrance.enorm, …)              model.layers.(num_hidden_layers + d).…  (enorm, …)

MTP tensors are written to `mtp.safetensors`, outside the index, unless the model has V3's 61 layers: transformers
skips `model.layers.61.*` by name and would report any other extra layer as unexpected.

A quantised checkpoint (docs/formats.md, written by convert.py) has packed tensors in the places of its weights. They
are not read but mapped: a module's weights are views of the file.

What we write carries `manifest.json` with the size and SHA-256 of every file; reading refuses, by name, a file that is
truncated or altered. Official FP8 weights (`weight_scale_inv`) are dequantised on the way in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import PRESETS, ModelConfig
from .errors import CheckpointError, ConfigError, NotFoundError
from .files import replace_folder, sha256, write_json
from .model import CausalLM
from .model.layers import rotary_frequencies
from .ops import panels
from .quant import fp8
from .quant.fused import fuse
from .quant.linear import Place, Recipe, is_quantised, places, put

HUB_NAMES = {"deepseek-v3": "deepseek-ai/DeepSeek-V3", "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite"}
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
# as safetensors spells the dtypes that weights have
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8}
PAGE = 4096  # a packed MLP begins at a multiple of it, and is padded to one

Dtype = torch.dtype | Literal["auto", "float32", "bfloat16", "float16"]


# ---- names ------------------------------------------------------------------------------------------------------


def resolve(name: str | Path) -> Path:
    """A checkpoint folder for a path, a known name (`deepseek-v3`) or a hub id: local first, then cache, then hub.

    Raises NotFoundError that says everything that was tried.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path}: the folder has no config.json, so it is not a checkpoint")
        return path
    if path.is_file():
        raise NotFoundError(f"{path}: a checkpoint is a folder, this is a file")
    repo = HUB_NAMES.get(str(name).lower(), str(name))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or str(name).startswith((".", "/", "~")):
        hint = " (it is a preset: `deepseek train` can start from it)" if str(name) in PRESETS else ""
        raise NotFoundError(f"{name}: no such folder here, and not the form of a hub id (owner/name){hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja"]
    cached = "is not in the local cache"
    try:
        folder = Path(snapshot_download(repo, allow_patterns=wanted, local_files_only=True))
        if not (absent := _absent(folder)):
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
    if absent := _absent(folder):  # the hub was out of reach, or the repository holds no safetensors
        raise NotFoundError(f"{name}: no such folder here, and hub id {repo} came without {absent}")
    return folder


def _absent(folder: Path) -> str | None:
    """The first file that a whole checkpoint would have and `folder` has not. Caches are shared between programs."""
    names = ["config.json"]
    if (index := folder / INDEX).is_file():
        names += sorted(set(_weight_map(index).values()))
    else:
        names.append("model.safetensors")
    return next((name for name in names if not (folder / name).is_file()), None)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises CheckpointError naming the index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("a file name is not a string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a weight index: {error}") from None
    return weight_map


# ---- the one name map -------------------------------------------------------------------------------------------

_ENTRANCE = {f"entrance.{part}": part for part in ("enorm", "hnorm", "eh_proj")}


def disk_parts(name: str, config: ModelConfig) -> list[tuple[str, tuple[int, slice] | None]]:
    """Where the tensor `name` of the model lives on disk: (name on disk, (expert, rows) or None for the whole)."""
    if match := re.fullmatch(r"model\.mtp\.(\d+)\.(.+)", name):
        rest = match[2]
        for ours, theirs in _ENTRANCE.items():
            rest = theirs + rest[len(ours):] if rest.startswith(ours) else rest
        name = f"model.layers.{config.num_hidden_layers + int(match[1])}.{rest}"
    if match := re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)", name):
        inner, stem = config.moe_intermediate_size, match[1]
        rows = {"gate_up_proj": {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)},
                "down_proj": {"down_proj": slice(None)}}[match[2]]
        return [(f"{stem}.{e}.{part}.weight", (e, where)) for e in range(config.n_routed_experts)
                for part, where in rows.items()]
    return [(name, None)]


def outside_index(name: str, config: ModelConfig) -> bool:
    """Whether the tensor `name` of the model is written to mtp.safetensors (see the top of this file)."""
    return name.startswith("model.mtp.") and config.num_hidden_layers != 61


class Unit(NamedTuple):
    """What is quantised as one: the stem of its names on disk and the plain weights there that it is made of (one, or
    gate, up and down of a gated MLP)."""

    stem: str
    weights: tuple[str, ...]


def units(place: Place, config: ModelConfig) -> list[Unit]:
    """The unit of a place, or those of its experts in their order."""
    gated = place.kind in ("mlp", "experts")
    name = {"mlp": "gate_proj.weight", "experts": "down_proj"}.get(place.kind, "weight")
    suffix = {"mlp": ".gate_proj.weight", "experts": ".down_proj.weight"}.get(place.kind, ".weight")
    stems = [on_disk.removesuffix(suffix) for on_disk, _ in disk_parts(f"{place.module}.{name}", config)]
    parts = ("gate_proj.weight", "up_proj.weight", "down_proj.weight") if gated else ("weight",)
    return [Unit(stem, tuple(f"{stem}.{part}" for part in parts)) for stem in stems]


def quantised_places(model: CausalLM, recipe: Recipe) -> list[Place]:
    """Those that the recipe does not keep. One kept weight keeps its whole MLP, or all routed experts of its layer."""
    def kept(place: Place) -> bool:
        names = (name for unit in units(place, model.config) for name in unit.weights)
        return any(fnmatchcase(name, pattern) for name in names for pattern in recipe.keep)

    return [place for place in places(model) if not kept(place)]


def packed_bytes(place: Place, bits: panels.Bits) -> int:
    """Of one unit of a matrix, an MLP or experts, with the padding that an MLP ends with."""
    if place.kind == "matrix":
        return panels.matrix_bytes(place.rows, place.columns, bits)
    return -(-panels.mlp_bytes(place.columns, place.rows, bits) // PAGE) * PAGE


# ---- reading ----------------------------------------------------------------------------------------------------


class TensorFiles:
    """The tensors of a checkpoint folder, read one at a time; FP8 weights come out dequantised.

    Raises CheckpointError naming the file for anything missing, truncated or altered.
    """

    def __init__(self, folder: Path, *, verify: bool | Literal["small"] = True) -> None:
        self.folder = folder
        if verify:
            check_manifest(folder, weights=verify is True)
        self._where: dict[str, Any] = {}
        self._file: dict[str, Path] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        for file in self._files():
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from None
            for key in handle.keys():  # noqa: SIM118 - not a dict
                self._where[key], self._file[key] = handle, file
        if missing := sorted(set(self._indexed) - set(self._where)):
            raise CheckpointError(f"{folder}: the index names {len(missing)} tensors that its files do not hold, "
                                  f"first {missing[0]}")

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        self._indexed: dict[str, str] = {}
        if index.is_file():
            self._indexed = _weight_map(index)
            names = sorted(set(self._indexed.values()))
        else:
            names = ["model.safetensors"]
        if (self.folder / "mtp.safetensors").is_file():
            names.append("mtp.safetensors")
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: {name!r} leads out of the folder")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder / name}: the file is missing")
        return [self.folder / name for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: F32, BF16, F8_E4M3, …"""
        return self._where[name].get_slice(name).get_dtype()

    def file(self, name: str) -> Path:
        return self._file[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, dequantised where it is FP8, in `dtype` if given.

        A view of the mapped file where nothing is to be converted: it costs no memory, and must not be written to.
        """
        return self._plain(name, self._where[name].get_tensor(name), 0, dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """The same for rows start..stop alone, copied from the file and not mapped, so that a walk over a large
        checkpoint never has more than these in memory. Of an FP8 matrix `start` must be a multiple of 128."""
        _, *rest = shape = self.shape(name)
        kind = TORCH_DTYPES[self.dtype(name)]
        row = math.prod(rest) * kind.itemsize
        stop = min(stop, shape[0])
        data = self.read_bytes(name, start * row, stop * row)
        return self._plain(name, data.view(kind).view(stop - start, *rest), start, dtype)

    def read_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes start..stop of a tensor as uint8, copied from the file."""
        file = self._file[name]
        if file not in self._headers:  # safe_open has checked it
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                self._headers[file] = 8 + length, json.loads(stream.read(length))
        begin, header = self._headers[file]
        data = torch.empty(stop - start, dtype=torch.uint8)
        with file.open("rb") as stream:
            stream.seek(begin + header[name]["data_offsets"][0] + start)
            if (got := stream.readinto(data.numpy().data)) != len(data):
                raise CheckpointError(f"{file}: {name} ends {len(data) - got} bytes early: the file has shrunk")
        return data

    def _plain(self, name: str, tensor: Tensor, start: int, dtype: torch.dtype | None) -> Tensor:
        if tensor.dtype == torch.float8_e4m3fn:
            scale = f"{name}_scale_inv"
            if scale not in self:
                raise CheckpointError(f"{self.folder}: {name} is FP8 but {scale} is missing")
            if start % fp8.BLOCK:
                raise ValueError(f"start = {start}: must be a multiple of {fp8.BLOCK} in an FP8 matrix")
            scales = self.read(scale)
            if self.shape(name)[0] != len(tensor):
                first = start // fp8.BLOCK
                scales = scales[first : first - (-len(tensor) // fp8.BLOCK)]
            try:
                return fp8.dequantise(tensor, scales, dtype or torch.bfloat16)
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder}: {name}: {error}") from None
        return tensor if dtype is None else tensor.to(dtype)


def open_checkpoint(
    path_or_name: str | Path, *, verify: bool | None = None
) -> tuple[ModelConfig, Recipe | None, TensorFiles]:
    """The configuration of a checkpoint, how it is quantised if it is, and its tensors; MTP modules that the
    configuration announces and the files lack are taken out of it (transformers writes the count alone).

    verify: as in `load_model`.
    """
    folder = resolve(path_or_name)
    config = ModelConfig.from_file(folder)
    recipe = Recipe.of(config, str(folder))
    files = TensorFiles(folder, verify=verify if verify is not None else True if recipe is None else "small")
    if config.num_nextn_predict_layers and not any(f"layers.{config.num_hidden_layers}." in name for name in files):
        config = config.with_(num_nextn_predict_layers=0)
    return config, recipe, files


def load_model(
    path_or_name: str | Path, dtype: Dtype = "auto", device: torch.device | str = "cpu", *, verify: bool | None = None
) -> CausalLM:
    """Read a checkpoint into a CausalLM in evaluation mode.

    dtype: of all parameters; "auto" takes the checkpoint's own (BF16 for official FP8). Gate biases stay FP32. Of a
    quantised checkpoint: of the activations, always float32; its files are mapped and not read.
    verify: compare every file with the manifest's sizes and hashes where there is a manifest, or (False) not at all;
    None leaves out the hashes of a quantised checkpoint's weights, which would be the only reason to read them all.
    Raises NotFoundError, CheckpointError or ConfigError, each naming the file.
    """
    config, recipe, files = open_checkpoint(path_or_name, verify=verify)
    with torch.device("meta"):
        model = CausalLM(config)
    if recipe is not None:
        if dtype not in ("auto", "float32", torch.float32):
            raise ConfigError(f"dtype = {dtype}: a quantised checkpoint computes in float32 (auto)")
        return _fill_quantised(model, recipe, files, device)
    model.to(_dtype_of(dtype, files)).to_empty(device=device)
    _restore_buffers(model, config)
    _fill(model, files, files.folder)
    return model.eval()


def _restore_buffers(model: CausalLM, config: ModelConfig) -> None:
    """What `to_empty` wiped and the checkpoint does not hold; FP32 whatever the dtype of the weights."""
    model.model.rotary.inv_P = rotary_frequencies(config).to(model.device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for block in model.moe_blocks().values():
        if config.topk_method == "noaux_tc":
            block.gate.e_score_correction_bias = torch.zeros(config.n_routed_experts, device=model.device)


# Scales were used up with their weights; the others are copies of what the model shares or computes.
_DERIVED = re.compile(
    r".*(_scale_inv|rotary_emb\.inv_freq)|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


def _fill(model: CausalLM, files: TensorFiles, folder: Path) -> None:
    used: set[str] = set()
    missing: list[str] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            used.add(name)
            continue
        for disk_name, part in disk_parts(name, model.config):
            if disk_name not in files:
                missing.append(disk_name)
                continue
            used.add(disk_name)
            place = tensor.data if part is None else tensor.data[part[0]][part[1]]
            if files.shape(disk_name) != tuple(place.shape):
                raise CheckpointError(f"{folder}: {disk_name} has shape {files.shape(disk_name)}, "
                                      f"config.json asks for {tuple(place.shape)}")
            place.copy_(files.read(disk_name, place.dtype))
    check_names(files, used, missing)


def check_names(files: TensorFiles, used: set[str], missing: list[str]) -> None:
    """Raises CheckpointError for tensors that are missing, or that are there and have no place in the model."""
    if missing:
        raise CheckpointError(f"{files.folder}: {len(missing)} tensors are missing, first {missing[0]}")
    extra = sorted(name for name in files if name not in used and not _DERIVED.fullmatch(name))
    if extra:
        raise CheckpointError(f"{files.folder}: {len(extra)} tensors have no place in the model, first {extra[0]}")


def _fill_quantised(
    model: CausalLM, recipe: Recipe, files: TensorFiles, device: torch.device | str
) -> CausalLM:
    """Put quantised modules into a model on the meta device; plain matrices keep their dtype, vectors become FP32."""
    config = model.config
    used: set[str] = set()
    missing: list[str] = []

    def stored(name: str, kind: torch.dtype | None, shape: tuple[int, ...]) -> Tensor:
        used.add(name)
        if name not in files:
            missing.append(name)
            return torch.empty(0, dtype=kind)
        tensor = files.read(name)
        if tensor.shape != shape or kind not in (None, tensor.dtype):
            want = f"{list(shape)}" + (f" of {str(kind).removeprefix('torch.')}" if kind else "")
            raise CheckpointError(f"{files.file(name)}: {name} is {list(tensor.shape)} of {files.dtype(name)}, must be "
                                  f"{want}")
        if kind == torch.uint8 and tensor.data_ptr() % 64:
            raise CheckpointError(f"{files.file(name)}: {name} does not begin at a multiple of 64 bytes")
        return tensor.to(device)

    tied = config.tie_word_embeddings
    for place in quantised_places(model, recipe):
        stems = [unit.stem for unit in units(place, config)]
        if place.kind == "table":
            parts = [stored(f"{stems[0]}.codes", torch.int8, (place.rows, place.columns)),
                     stored(f"{stems[0]}.step", torch.float32, (place.rows,))]
        else:
            size = packed_bytes(place, recipe.bits)
            parts = [stored(f"{stem}.packed", torch.uint8, (size,)) for stem in stems]
        if missing:
            check_names(files, used, missing)
        tied = tied and place.module not in ("lm_head", "model.embed_tokens")
        put(model, place, parts, recipe.bits)
    plain: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_meta or (name == "lm_head.weight" and tied):
            continue
        pieces = [stored(on_disk, None, tuple(tensor.shape) if part is None else tuple(tensor[part[0]][part[1]].shape))
                  for on_disk, part in disk_parts(name, config)]
        if not missing:
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces).view(tensor.shape)
            plain[name] = whole.float() if whole.ndim == 1 else whole
    check_names(files, used, missing)
    model.load_state_dict(plain, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary.inv_P = rotary_frequencies(config).to(device)
    model.compute_dtype = torch.float32
    fuse(model)
    return model.requires_grad_(False).eval()


def _dtype_of(dtype: Dtype, files: TensorFiles) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        stored = next((files.dtype(n) for n in files if n.endswith("embed_tokens.weight")), "BF16")
        return {"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16)
    if dtype not in named:
        raise ConfigError(f"dtype = {dtype!r}: must be auto, float32, bfloat16 or float16")
    return named[dtype]


def check_manifest(folder: Path, *, weights: bool = True) -> None:
    """Compare a folder with its manifest.json; one without a manifest (a download) passes with its sizes unchecked.

    weights: False leaves out the hashes of safetensors files, which would read them all, and compares their sizes.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: not a manifest: {error}") from None
    for file, size_then, digest in expected:
        if not file.is_file():
            raise CheckpointError(f"{file}: the file is missing")
        if (size := file.stat().st_size) != size_then:
            raise CheckpointError(f"{file}: truncated or altered: {size} bytes, the manifest says {size_then}")
        if (weights or file.suffix != ".safetensors") and sha256(file) != digest:
            raise CheckpointError(f"{file}: altered: its SHA-256 is not the manifest's")


# ---- writing ----------------------------------------------------------------------------------------------------


def save_model(
    model: CausalLM, path: str | Path, *, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES,
    extra_files: Iterable[Path] = (), add: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint that transformers loads with no missing and no unexpected tensor; atomic as a folder.

    tokenizer: a Tokenizer to save beside it. extra_files: copied in. add: called with the staging folder, for whatever
    else should appear together with the weights (optimiser state). Returns the path.
    """
    if is_quantised(model):
        raise CheckpointError(f"{path}: a quantised model is not written again: its checkpoint is what it is, and "
                              "`deepseek quantize IN OUT --format bf16` makes a plain one of it")
    with replace_folder(path) as folder:
        config = model.config.with_(num_nextn_predict_layers=len(model.model.mtp))
        dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
        keys = {k: v for k, v in config.to_dict().items() if k != "dtype"}  # transformers 5's name, of the old file
        write_json(folder / "config.json", keys | {"torch_dtype": dtype})
        main, mtp = _disk_tensors(model)
        _write_shards(folder, main, shard_bytes)
        if mtp:
            save_file(mtp, folder / "mtp.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(folder)
        for file in extra_files:
            (folder / file.name).write_bytes(file.read_bytes())
        if add is not None:
            add(folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        write_json(folder / MANIFEST, {"format": 1, "files": {
            str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}})
    return Path(path)


def _disk_tensors(model: CausalLM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    main: dict[str, Tensor] = {}
    mtp: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        inside = outside_index(name, model.config)
        for disk_name, part in disk_parts(name, model.config):
            piece = tensor if part is None else tensor[part[0]][part[1]]
            (mtp if inside else main)[disk_name] = piece.detach().contiguous().cpu()
    return main, mtp


def _write_shards(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


__all__ = ["TensorFiles", "check_manifest", "disk_parts", "load_model", "resolve", "save_model"]
