"""Plain or FP8 checkpoint -> four or eight bits (docs/formats.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..checkpoint import AdaptedFiles, TensorFiles, open_checkpoint, stored_dtype, stored_fingerprint
from ..checkpoint.files import divide, row_blocks
from ..checkpoint.models import check_names, plain_keys
from ..checkpoint.names import on_disk, packed_bytes, quantized_targets, units
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..files import locked
from ..model import CausalLM
from ..ops import panels
from ..quant import int8
from ..quant.linear import QuantConfig, quant_targets
from ..quant.pack import quantize_panels, squared
from .merging import dtype_name, provenance
from .writing import REPORT, SHARD_BYTES, Part, Writer, copied, free_folder

_T = TypeVar("_T")


@dataclass(frozen=True)
class Report:
    """Result of a conversion: size, and error by weight.

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
        """||W - W'|| / ||W|| over everything that was quantized."""
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
        """Size, error by layer and kind, and the worst experts, for a terminal."""
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
    adapter: str | Path | None = None, overwrite: bool = False, resume: bool = True, progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Write the quantized form (docs/formats.md) of a checkpoint: a folder, a known name or a hub id, of BF16, FP32,
    DeepSeek's FP8 or compressed-tensors' int4. Memory does not grow with the model.

    keep: patterns (fnmatch) of weight names that stay as they are; one weight keeps its whole MLP, or all the routed
    experts of its layer. adapter: a delta or a LoRA adapter to merge in first; the result has the bytes that `merge`
    and then `quantize` give. resume: go on with what an interrupted call has left in `out`.partial.
    Raises CheckpointError, ConfigError or NotFoundError; `out` appears whole or not at all. Another process that writes
    `out` is an error, and so is a text beside the weights that is a link out of the checkpoint.
    """
    quant = QuantConfig(format, tuple(keep))
    with locked(out):
        out = free_folder(out, overwrite, source, adapter)
        config, before, files = open_checkpoint(source)
        if before is not None:
            raise ConfigError(f"{files.folder}: is quantized already ({before.format}): convert it back first "
                              "(`deepseek quantize IN OUT --format bf16`)")
        if adapter is not None:
            files = AdaptedFiles.open(files, config, adapter, progress=progress)
            config = ModelConfig.from_dict(plain_keys(config, dtype_name(files)), origin=str(source))  # as merge writes
        return quantize_tensors(config, files, out, quant, resume=resume, progress=progress, shard_bytes=shard_bytes,
                                note_source=True)


def quantize_tensors(
    config: ModelConfig, files: TensorFiles, out: Path, quant: QuantConfig, *, resume: bool = True,
    progress: bool = True, shard_bytes: int = SHARD_BYTES, note_source: bool = False,
    also: Mapping[str, Any] | None = None,
) -> Report:
    """`quantize` for any reader of tensors; `out` must not exist. note_source: read them once more for the fingerprint
    by which adapters know the checkpoint that this one was made from. also: further JSON files beside it."""
    squares: dict[str, tuple[float, float]] = {}
    plan, kept, parameters = _plan_quantized(config, quant, files, squares)
    key = {"quantize": quant.to_dict(), "shard_bytes": shard_bytes}
    writer = Writer(out, key, files, resume)
    size = writer.write(divide(plan, Part.size, shard_bytes), squares, progress)
    report = Report(quant.format, parameters, size, kept, squares)
    about = quant.to_dict()
    if note_source:
        about["source"] = stored_fingerprint(config, files, stored_dtype(files), progress)
    writer.publish(config.to_dict() | {"quantization_config": about},
                   {REPORT: report.to_dict()} | provenance(files) | dict(also or {}))
    return report


def _plan_quantized(
    config: ModelConfig, quant: QuantConfig, files: TensorFiles, squares: dict[str, tuple[float, float]]
) -> tuple[list[Part], tuple[str, ...], int]:
    """(the parts in order, what is kept, parameters of the source)."""
    model = CausalLM.on_meta(config)
    chosen = quantized_targets(model, quant)
    candidates = [(target, units(target, config)) for target in quant_targets(model)]
    for pattern in quant.keep:
        if not any(fnmatchcase(w, pattern) for _, made in candidates for unit in made for w in unit.weights):
            raise ConfigError(f"keep = {pattern!r}: no weight that could be quantized has such a name")
    tied = config.tie_word_embeddings
    both = not tied or not {"lm_head", "model.embed_tokens"} & {target.module for target in chosen}
    parts: list[Part] = []
    used: set[str] = {"lm_head.weight"} if tied else set()
    missing: list[str] = []

    def source_of(name: str, shape: tuple[int, ...]) -> str:
        name = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        used.add(name)
        if name not in files:
            missing.append(name)
            return name
        files.check_plain(name)
        if files.shape(name) != shape:
            raise CheckpointError(f"{files.folder}: {name} has shape {files.shape(name)}, config.json asks for {shape}")
        return name

    for target in chosen:
        wide, narrow = (target.rows, target.columns), (target.columns, target.rows)
        shapes = [wide, wide, narrow] if target.kind in ("mlp", "experts") else [wide]
        for unit in units(target, config):
            sources = [source_of(name, shape) for name, shape in zip(unit.weights, shapes, strict=True)]
            encode = partial(quantize_panels, bits=quant.bits)
            matrices = [partial(_blocks, files, source, name, squares, encode)
                        for source, name in zip(sources, unit.weights, strict=True)]
            if target.kind == "table":
                table = partial(_blocks, files, sources[0], unit.weights[0], squares, _table)
                parts += [Part(f"{unit.stem}.codes", "I8", wide, partial(_codes, table)),
                          Part(f"{unit.stem}.step", "F32", wide[:1], partial(_steps, table))]
            else:
                size = packed_bytes(target, quant.bits)
                write = matrices[0] if target.kind == "matrix" else partial(packed_mlp, matrices, size)
                parts.append(Part(f"{unit.stem}.packed", "U8", (size,), write))
    inside = tuple(f"{target.module}." for target in chosen)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (name.startswith(inside) and not name.endswith(".bias")) or (tied and both and name == "lm_head.weight"):
            continue
        for disk_name, piece in on_disk(name, tensor, config).items():
            source = source_of(disk_name, tuple(piece.shape))
            if source in files:
                kind = files.dtype(source)
                kind = "BF16" if kind in ("F8_E4M3", "I4") else kind
                parts.append(Part(disk_name, kind, files.shape(source), partial(copied, files, source, kind)))
    check_names(files, used, missing)
    kept = tuple(made[0].stem.removesuffix(".0") if target.kind == "experts" else made[0].stem
                 for target, made in candidates if target not in chosen)
    counted = (n for n in used if not n.endswith("correction_bias") and not (tied and n == "lm_head.weight"))
    numbers = sum(math.prod(files.shape(name)) for name in counted)
    return sorted(parts, key=lambda part: part.rank), kept, numbers


_Squares = dict[str, tuple[float, float]]  # name of a weight -> (squared error, squared weight)


def _blocks(
    files: TensorFiles, source: str, name: str, squares: _Squares, encode: Callable[[Tensor], tuple[_T, float, float]]
) -> Iterator[_T]:
    """Encode one matrix by row blocks; its squared errors are entered at the end."""
    error = weight = 0.0
    for start, stop in row_blocks(files.shape(source)):
        w = files.read_rows(source, start, stop, torch.float32)
        encoded, lost, square = encode(w)
        if not math.isfinite(square):
            files.finite(source, w)
        error, weight = error + lost, weight + square
        yield encoded
    squares[name] = error, weight


def _table(w: Tensor) -> tuple[panels.Quantized, float, float]:
    q = int8.quantize(w)
    return q, squared(w - q.dequantize()), squared(w)


def _codes(table: Callable[[], Iterator[panels.Quantized]]) -> Iterator[Tensor]:
    return (q.code_OK for q in table())


def _steps(table: Callable[[], Iterator[panels.Quantized]]) -> Iterator[Tensor]:
    return (q.step_O for q in table())


def packed_mlp(matrices: Sequence[Callable[[], Iterator[Tensor]]], size: int) -> Iterator[Tensor]:
    """The bytes of a packed MLP and zeros up to `size`, of the panels of gate, up and down."""
    gate, up, down = (matrix() for matrix in matrices)
    written = 0
    for part in chain((torch.stack(pair, 1) for pair in zip(gate, up, strict=True)), down):
        written += part.numel()
        yield part
    yield torch.zeros(size - written, dtype=torch.uint8)
