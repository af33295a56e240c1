"""Checkpoint -> checkpoint, some megabytes at a time: quantise, and back.

    1. plan     from config.json and the names and shapes of the source: every tensor of the result, in its order and
                with its size, divided into files. What is missing or too big for the disk is an error here
    2. write    file by file: the header, then the tensors, made from row blocks that are read, converted and written
                one after the other. A file appears under its name when it is whole, and is entered in a journal
    3. publish  config.json, index, report, tokenizer and manifest beside them; the folder takes its place in one step

All this happens in `OUT.partial`. The same command after a crash finds the journal there and goes on behind the last
whole file. Everything is a function of the source, so the result has the same bytes as without the crash.

The order of the tensors gives the alignment that docs/formats.md promises without holes, which safetensors forbids:
first the ranges that are padded to whole pages, then packed matrices, which are multiples of 64 bytes, then the rest by
the size of its elements.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .checkpoint import (
    EXPERT_USE,
    INDEX,
    MANIFEST,
    PAGE,
    TORCH_DTYPES,
    TensorFiles,
    check_names,
    disk_parts,
    load_model,
    open_checkpoint,
    outside_index,
    packed_bytes,
    quantised_places,
    stored_dtype,
    stored_fingerprint,
    units,
)
from .config import ModelConfig
from .errors import CheckpointError, ConfigError
from .files import locked, replace_folder, sha256, write_json
from .model import CausalLM
from .ops import panels
from .progress import ProgressBar
from .quant import int8
from .quant.linear import Place, Recipe, places
from .quant.panels import quantise_panels, squared

_T = TypeVar("_T")

SHARD_BYTES = 1 << 30  # what a crash can cost
REPORT = "quantisation.json"
JOURNAL = "journal.json"
_CHUNK = 1 << 20  # weights that are converted at a time
_PLAIN = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Report:
    """What a conversion made of the weights.

    bytes: of all safetensors files. parameters: of the source, tied ones once. kept: what `keep` left as it was.
    squares: weight name -> (sum of squared errors, sum of squared weights).
    """

    format: str
    parameters: int
    bytes: int
    kept: tuple[str, ...]
    squares: Mapping[str, tuple[float, float]]

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.parameters

    @property
    def error(self) -> float:
        """||W - W'|| / ||W|| over everything that was quantised."""
        return self._grouped(lambda _: "all").get("all", 0.0)

    def by_layer(self) -> dict[str, float]:
        return self._grouped(lambda name: m[1] if (m := re.match(r"model\.layers\.(\d+)\.", name)) else None)

    def by_kind(self) -> dict[str, float]:
        return self._grouped(lambda name: re.sub(r"^model\.(layers\.\d+\.)?|\.\d+|\.weight$", "", name))

    def by_expert(self) -> dict[str, float]:
        """Layer and index of a routed expert, "3.17", -> its error."""
        return self._grouped(lambda name: f"{m[1]}.{m[2]}" if (
            m := re.match(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)) else None)

    def _grouped(self, key: Callable[[str], str | None]) -> dict[str, float]:
        sums: dict[str, tuple[float, float]] = {}
        for name, (error, weight) in self.squares.items():
            if (group := key(name)) is not None:
                before = sums.get(group, (0.0, 0.0))
                sums[group] = before[0] + error, before[1] + weight
        return {group: math.sqrt(error / weight) if weight else 0.0 for group, (error, weight) in sums.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format, "parameters": self.parameters, "bytes": self.bytes,
                "bits_per_weight": self.bits_per_weight, "kept": list(self.kept), "relative_error": {
                    "all": self.error, "layers": self.by_layer(), "kinds": self.by_kind(), "experts": self.by_expert(),
                    "weights": {name: math.sqrt(e / w) if w else 0.0 for name, (e, w) in self.squares.items()}}}

    def table(self, worst: int = 8) -> str:
        """For a terminal: size, error by layer and kind, the worst experts."""
        lines = [f"{self.format}: {self.bits_per_weight:.3f} bits a weight, {self.parameters:,} weights, "
                 f"{self.bytes / 2**20:,.1f} MiB; relative error {self.error:.4f}"]
        if self.kept:
            lines.append(f"kept as they were: {', '.join(self.kept)}")
        experts = self.by_expert()
        ranked = sorted(experts, key=experts.__getitem__, reverse=True)[:worst]
        for title, errors in (("kind", self.by_kind()), ("layer", self.by_layer()),
                              ("worst experts", {f"layer {e.replace('.', ' expert ')}": experts[e] for e in ranked})):
            if errors:
                lines += ["", f"{title:<36}error", *(f"  {name:<34}{error:.4f}" for name, error in errors.items())]
        return "\n".join(lines)


def quantize(
    source: str | Path, out: str | Path, format: Literal["nf4", "int8"] = "nf4", *, keep: Iterable[str] = (),
    overwrite: bool = False, resume: bool = True, progress: bool = True, shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Write the quantised form (docs/formats.md) of a checkpoint: a folder, a known name or a hub id, of BF16, FP32 or
    DeepSeek's FP8. Memory does not grow with the model.

    keep: patterns (fnmatch) of weight names that stay as they are; one weight keeps its whole MLP, or all the routed
    experts of its layer. resume: go on with what an interrupted call has left in `out`.partial.
    Raises CheckpointError, ConfigError or NotFoundError; `out` appears whole or not at all. Another process that writes
    `out` is an error, and so is a text beside the weights that is a link out of the checkpoint.
    """
    recipe = Recipe(format, tuple(keep))
    with locked(out):
        out = _free(out, source, overwrite)
        config, before, files = open_checkpoint(source)
        if before is not None:
            raise ConfigError(f"{files.folder}: is quantised already ({before.format}): convert it back first "
                              "(`deepseek quantize IN OUT --format bf16`)")
        return quantize_tensors(config, files, out, recipe, resume=resume, progress=progress, shard_bytes=shard_bytes,
                                note_source=True)


def quantize_tensors(
    config: ModelConfig, files: TensorFiles, out: Path, recipe: Recipe, *, resume: bool = True, progress: bool = True,
    shard_bytes: int = SHARD_BYTES, note_source: bool = False,
) -> Report:
    """`quantize` for tensors that come from anything that reads like a checkpoint; `out` must be free. note_source:
    read them once more for the fingerprint by which adapters know the checkpoint that this one was made from."""
    squares: dict[str, tuple[float, float]] = {}
    plan, kept, parameters = _plan_quantised(config, recipe, files, squares)
    key = {"quantise": recipe.to_dict(), "shard_bytes": shard_bytes}
    writer = _Writer(out, key, files, resume)
    size = writer.write(_divide(plan, shard_bytes), squares, progress)
    report = Report(recipe.format, parameters, size, kept, squares)
    write_json(writer.folder / REPORT, report.to_dict())
    about = recipe.to_dict()
    if note_source:
        about["source"] = stored_fingerprint(config, files, stored_dtype(files), progress)
    writer.publish(config.to_dict() | {"quantization_config": about})
    return report


def dequantize(
    source: str | Path, out: str | Path, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16", *,
    overwrite: bool = False, resume: bool = True, progress: bool = True, shard_bytes: int = 5 * SHARD_BYTES,
) -> Path:
    """Write a plain Hugging Face checkpoint with the values of a quantised one (or of an FP8 one); returns its path.

    Arguments and errors as in `quantize`.
    """
    if dtype not in _PLAIN:
        raise ConfigError(f"dtype = {dtype!r}: must be one of {', '.join(_PLAIN)}")
    with locked(out):
        out = _free(out, source, overwrite)
        config, recipe, files = open_checkpoint(source)
        if recipe is not None:
            load_model(files.folder)  # maps, and checks every tensor
        plan, mtp = _plan_plain(config, recipe, files, _PLAIN[dtype])
        writer = _Writer(out, {"dtype": dtype, "shard_bytes": shard_bytes}, files, resume)
        writer.write(_divide(plan, shard_bytes) | ({"mtp.safetensors": mtp} if mtp else {}), {}, progress)
        keys = {k: v for k, v in config.to_dict().items() if k != "dtype"}  # transformers 5's name, of the old file
        writer.publish(keys | {"torch_dtype": dtype})
    return out


def _free(out: str | Path, source: str | Path, overwrite: bool) -> Path:
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out = {out}: must be a folder, this is a file")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise ConfigError(f"out = {out}: must not be the source")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"out = {out}: must be a new or an empty folder (or give overwrite)")
    return out


# ---- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """One tensor of the result. chunks: makes its bytes, as contiguous tensors one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts a file: padded ranges, packed matrices, then by the size of the elements."""
        if self.dtype == "U8":
            return (0 if ".mlp." in self.name else 1), 0
        return 2, -TORCH_DTYPES[self.dtype].itemsize


def _rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row blocks of about _CHUNK numbers: multiples of 128, which FP8 blocks and panels divide."""
    height = max(128, _CHUNK // math.prod(shape[1:]) // 128 * 128)
    return ((start, min(start + height, shape[0])) for start in range(0, shape[0], height))


def _plan_quantised(
    config: ModelConfig, recipe: Recipe, files: TensorFiles, squares: dict[str, tuple[float, float]]
) -> tuple[list[_Part], tuple[str, ...], int]:
    """(the parts in order, what is kept, parameters of the source)."""
    with torch.device("meta"):
        model = CausalLM(config)
    chosen = quantised_places(model, recipe)
    candidates = [(place, units(place, config)) for place in places(model)]
    for pattern in recipe.keep:
        if not any(fnmatchcase(w, pattern) for _, made in candidates for unit in made for w in unit.weights):
            raise ConfigError(f"keep = {pattern!r}: no weight that could be quantised has such a name")
    tied = config.tie_word_embeddings
    both = not tied or not {"lm_head", "model.embed_tokens"} & {place.module for place in chosen}
    parts: list[_Part] = []
    used: set[str] = {"lm_head.weight"} if tied else set()
    missing: list[str] = []

    def source_of(name: str, shape: tuple[int, ...]) -> str:
        name = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        used.add(name)
        if name not in files:
            missing.append(name)
        elif files.shape(name) != shape:
            raise CheckpointError(f"{files.folder}: {name} has shape {files.shape(name)}, config.json asks for {shape}")
        return name

    for place in chosen:
        wide, narrow = (place.rows, place.columns), (place.columns, place.rows)
        shapes = [wide, wide, narrow] if place.kind in ("mlp", "experts") else [wide]
        for unit in units(place, config):
            sources = [source_of(name, shape) for name, shape in zip(unit.weights, shapes, strict=True)]
            encode = partial(quantise_panels, bits=recipe.bits)
            matrices = [partial(_blocks, files, source, name, squares, encode)
                        for source, name in zip(sources, unit.weights, strict=True)]
            if place.kind == "table":
                table = partial(_blocks, files, sources[0], unit.weights[0], squares, _table)
                parts += [_Part(f"{unit.stem}.codes", "I8", wide, partial(_codes, table)),
                          _Part(f"{unit.stem}.step", "F32", wide[:1], partial(_steps, table))]
            else:
                size = packed_bytes(place, recipe.bits)
                write = matrices[0] if place.kind == "matrix" else partial(_mlp, matrices, size)
                parts.append(_Part(f"{unit.stem}.packed", "U8", (size,), write))
    inside = tuple(f"{place.module}." for place in chosen)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (name.startswith(inside) and not name.endswith(".bias")) or (tied and both and name == "lm_head.weight"):
            continue
        for on_disk, part in disk_parts(name, config):
            source = source_of(on_disk, tuple(tensor.shape if part is None else tensor[part[0]][part[1]].shape))
            if source in files:
                kind = files.dtype(source)
                kind = "BF16" if kind == "F8_E4M3" else kind
                parts.append(_Part(on_disk, kind, files.shape(source), partial(_copy, files, source, kind)))
    check_names(files, used, missing)
    kept = tuple(made[0].stem.removesuffix(".0") if place.kind == "experts" else made[0].stem
                 for place, made in candidates if place not in chosen)
    counted = (n for n in used if not n.endswith("correction_bias") and not (tied and n == "lm_head.weight"))
    numbers = sum(math.prod(files.shape(name)) for name in counted)
    return sorted(parts, key=lambda part: part.rank), kept, numbers


_Squares = dict[str, tuple[float, float]]  # name of a weight -> (squared error, squared weight)


def _blocks(
    files: TensorFiles, source: str, name: str, squares: _Squares, encode: Callable[[Tensor], tuple[_T, float, float]]
) -> Iterator[_T]:
    """Row blocks of one matrix, encoded; its squares are entered when it has been walked through."""
    error = weight = 0.0
    for start, stop in _rows(files.shape(source)):
        w = files.read_rows(source, start, stop, torch.float32)
        encoded, lost, square = encode(w)
        if not math.isfinite(square) and not bool(w.isfinite().all()):
            raise CheckpointError(f"{files.file(source)}: {source} holds values that are not finite")
        error, weight = error + lost, weight + square
        yield encoded
    squares[name] = error, weight


def _table(w: Tensor) -> tuple[panels.Quantised, float, float]:
    q = int8.quantise(w)
    return q, squared(w - q.dequantise()), squared(w)


def _codes(table: Callable[[], Iterator[panels.Quantised]]) -> Iterator[Tensor]:
    return (q.code_OK for q in table())


def _steps(table: Callable[[], Iterator[panels.Quantised]]) -> Iterator[Tensor]:
    return (q.step_O for q in table())


def _mlp(matrices: Sequence[Callable[[], Iterator[Tensor]]], size: int) -> Iterator[Tensor]:
    gate, up, down = (matrix() for matrix in matrices)
    written = 0
    for part in chain((torch.stack(pair, 1) for pair in zip(gate, up, strict=True)), down):
        written += part.numel()
        yield part
    yield torch.zeros(size - written, dtype=torch.uint8)


def _copy(files: TensorFiles, name: str, kind: str) -> Iterator[Tensor]:
    return (files.read_rows(name, *rows, dtype=TORCH_DTYPES[kind]) for rows in _rows(files.shape(name)))


def _plan_plain(
    config: ModelConfig, recipe: Recipe | None, files: TensorFiles, kind: str
) -> tuple[list[_Part], list[_Part]]:
    """The tensors of the plain checkpoint, those of its mtp.safetensors apart; in all as `save_model` writes it."""
    with torch.device("meta"):
        model = CausalLM(config)
    made: dict[str, Callable[[], Iterator[Tensor]]] = {}
    for place in quantised_places(model, recipe) if recipe is not None else ():
        assert recipe is not None
        for unit in units(place, config):
            made |= {name: partial(_unpack, files, place, unit.stem, which, recipe.bits, TORCH_DTYPES[kind])
                     for which, name in enumerate(unit.weights)}
    main: list[_Part] = []
    mtp: list[_Part] = []
    used: set[str] = set()
    missing: list[str] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        parts = mtp if outside_index(name, config) else main
        if name == "lm_head.weight" and config.tie_word_embeddings:
            used.add(name)
            continue
        for on_disk, part in disk_parts(name, config):
            shape = tuple(tensor.shape if part is None else tensor[part[0]][part[1]].shape)
            dtype = "F32" if name.endswith("correction_bias") else kind
            used.add(on_disk)
            if on_disk not in made and on_disk not in files:
                missing.append(on_disk)
            parts.append(_Part(on_disk, dtype, shape, made.get(on_disk) or partial(_copy, files, on_disk, dtype)))
    if recipe is None:
        check_names(files, used, missing)
    return sorted(main, key=lambda part: part.rank), sorted(mtp, key=lambda part: part.rank)


def _unpack(
    files: TensorFiles, place: Place, stem: str, which: int, bits: panels.Bits, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Row blocks of the weight number `which` of a unit (0; or gate 0, up 1, down 2)."""
    if place.kind == "table":
        for start, stop in _rows((place.rows, place.columns)):
            code_OK = files.read_rows(f"{stem}.codes", start, stop)
            yield panels.Quantised(code_OK, None, files.read_rows(f"{stem}.step", start, stop)).dequantise().to(dtype)
        return
    rows, columns = (place.columns, place.rows) if which == 2 else (place.rows, place.columns)
    in_turns = place.kind != "matrix" and which < 2  # gate and up
    width, offset = panels.panel_bytes(columns, bits), 0
    if which == 2:
        offset = 2 * panels.matrix_bytes(place.rows, place.columns, bits)
    for start, stop in _rows((rows, columns)):
        first, last = start // panels.ROWS, -(-stop // panels.ROWS)
        step = width * (2 if in_turns else 1)
        data = files.read_bytes(f"{stem}.packed", offset + first * step, offset + last * step)
        if in_turns:
            data = data.view(-1, 2, width)[:, which].flatten()
        yield panels.unpack(data, stop - start, columns, bits).dequantise().to(dtype)


def _divide(parts: list[_Part], shard_bytes: int) -> dict[str, list[_Part]]:
    """File name -> its parts, in order, as many as fit into shard_bytes."""
    shards: list[list[_Part]] = [[]]
    room = shard_bytes
    for part in parts:
        if part.bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(part)
        room -= part.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


# ---- writing ------------------------------------------------------------------------------------------------------


class _Writer:
    """The staging folder `OUT.partial` and its journal; left in place by whatever interrupts the work."""

    def __init__(self, out: Path, key: dict[str, Any], files: TensorFiles, resume: bool) -> None:
        self.out = out.resolve()
        self.texts = _texts(files.folder)  # refused before the weights are converted
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        sources = [files.folder / "config.json", *sorted(files.folder.glob("*.safetensors"))]
        self.key = key | {"source": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sources}}
        self.done: dict[str, dict[str, Any]] = {}
        self.squares: dict[str, list[float]] = {}
        if not resume and self.folder.exists():
            shutil.rmtree(self.folder)
        if (self.folder / JOURNAL).is_file():
            self._continue(self.folder / JOURNAL)

    def _continue(self, journal: Path) -> None:
        try:
            entries = json.loads(journal.read_text(encoding="utf-8"))
            key, done, self.squares = entries["key"], entries["files"], entries["squares"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{journal}: not a journal ({error}): remove {self.folder}") from None
        if key != self.key:
            raise ConfigError(f"{self.folder}: holds the beginning of another conversion (other source, format or "
                              "patterns): remove it to start this one")
        self.done = {name: entry for name, entry in done.items() if self._whole(name, entry)}

    def write(
        self, contents: dict[str, list[_Part]], squares: dict[str, tuple[float, float]], progress: bool
    ) -> int:
        """Write the files that the journal does not hold; returns the bytes of all. `squares` is filled."""
        squares.update({name: (error, weight) for name, (error, weight) in self.squares.items()})
        total = sum(part.bytes for parts in contents.values() for part in parts)
        ready = sum(part.bytes for name in self.done for part in contents[name])
        disk = next(folder for folder in self.folder.parents if folder.exists())
        if (free := shutil.disk_usage(disk).free) < (need := round(1.01 * (total - ready)) + (1 << 20)):
            raise CheckpointError(f"{self.out}: {need / 2**30:.2f} GiB are to be written and the disk has "
                                  f"{free / 2**30:.2f} GiB free")
        self.folder.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        with ProgressBar(total=total, initial=ready, unit="B", unit_scale=True, unit_divisor=1024, desc=self.out.name,
                  disable=not progress) as bar:
            for name, parts in contents.items():
                if name != "mtp.safetensors":
                    weight_map |= {part.name: name for part in parts}
                if name not in self.done:
                    self.done[name] = _write_file(self.folder / name, parts, bar.update)
                    write_json(self.folder / JOURNAL, {"key": self.key, "files": self.done, "squares": squares})
        if len(set(weight_map.values())) > 1:
            size = sum(part.bytes for name, parts in contents.items() if name in weight_map.values() for part in parts)
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        return sum(entry["bytes"] for entry in self.done.values())

    def _whole(self, name: str, entry: dict[str, Any]) -> bool:
        file = self.folder / name
        return file.is_file() and file.stat().st_size == entry["bytes"] and sha256(file) == entry["sha256"]

    def publish(self, config: dict[str, Any]) -> None:
        """config.json, the source's small files and the manifest; then the folder becomes OUT."""
        write_json(self.folder / "config.json", config)
        for file in self.texts:
            shutil.copyfile(file, self.folder / file.name)
        (self.folder / JOURNAL).unlink()
        entries = {path.name: self.done.get(path.name) or {"bytes": path.stat().st_size, "sha256": sha256(path)}
                   for path in sorted(self.folder.iterdir())}
        write_json(self.folder / MANIFEST, {"format": 1, "files": entries})
        with replace_folder(self.out) as staging:
            for path in list(self.folder.iterdir()):
                path.rename(staging / path.name)
        self.folder.rmdir()


def _texts(folder: Path) -> list[Path]:
    """The small files that go along with the weights. Raises CheckpointError for a link that leads out of the folder;
    those of the hub's cache lead to its own blobs."""
    ours = {"config.json", INDEX, MANIFEST, REPORT, EXPERT_USE}
    home = folder.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    found = []
    for file in sorted(folder.iterdir()):
        small = file.suffix in (".json", ".jinja", ".txt", ".model", ".md") or file.name.startswith("LICENSE")
        if small and file.is_file() and file.name not in ours:
            if not any((target := file.resolve()).is_relative_to(allowed) for allowed in homes):
                raise CheckpointError(f"{file}: leads out of the checkpoint, to {target}: put a copy in its place, or "
                                      "remove it")
            found.append(file)
    return found


def _write_file(path: Path, parts: list[_Part], progress: Callable[[int], object]) -> dict[str, Any]:
    """Write a safetensors file whose data begins at a whole page; returns its size and SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [end, end + part.bytes]}
        end += part.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    digest = hashlib.sha256()
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for part in parts:
            written = 0
            for chunk in part.chunks():
                put(data := chunk.contiguous().flatten().view(torch.uint8).numpy().data)
                written += data.nbytes
                progress(data.nbytes)
            assert written == part.bytes, f"{part.name}: {written} bytes of {part.bytes}"
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}
