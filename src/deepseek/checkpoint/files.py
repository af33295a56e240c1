"""The tensors of a checkpoint folder, read one at a time, and the manifest that guards its files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, shown
from ..files import leads_out, read_json, sha256, to_json, write_json
from ..quant import fp8, int4
from .names import INDEX, other_weights, weight_map_of

MANIFEST = "manifest.json"
EXPERT_USE = "expert_use.json"  # which experts ran (engine/warmup.py): grows beside a checkpoint, no part of it
# as safetensors spells the dtypes that weights have
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32}
_WEIGHTS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I4")
CHUNK = 1 << 20  # numbers of a tensor that are worked on at a time
_T = TypeVar("_T")


class Span(NamedTuple):
    """A range of bytes in a file."""

    file: Path
    offset: int
    size: int


class Tensors(Protocol):
    """The tensors of a checkpoint: a folder's (TensorFiles) or a GGUF file's (gguf_file.py). folder: as messages name
    it."""

    folder: Path

    def __contains__(self, name: str) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def file(self, name: str) -> Path: ...
    def check_plain(self, name: str) -> None: ...
    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor: ...


class TensorFiles:
    """The tensors of a checkpoint folder, read one at a time; DeepSeek's FP8 and compressed-tensors' int4 come out
    dequantized, the latter (three tensors on disk) under the weight's name.

    Raises CheckpointError naming the file for anything missing, truncated or altered.
    """

    def __init__(self, folder: Path, *, verify: bool | Literal["small"] = True, names: Sequence[str] = ()) -> None:
        """names: the files to read; those of a checkpoint if not given."""
        self.folder = folder
        if verify:
            check_manifest(folder, weights=verify is True)
        self._where: dict[str, Any] = {}
        self._file: dict[str, Path] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._indexed: dict[str, str] = {}
        for file in [folder / name for name in names] or self._files():
            if not file.is_file():
                raise CheckpointError(f"{file}: the file is missing")
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a whole safetensors file: {_pointer(file) or error}") from None
            for key in handle.keys():  # noqa: SIM118 - not a dict
                if key in self._where:
                    raise CheckpointError(f"{file}: {key} is also in {self._file[key].name}")
                self._where[key], self._file[key] = handle, file
        if missing := sorted(set(self._indexed) - set(self._where)):
            raise CheckpointError(f"{folder}: the index names {len(missing)} tensors that its files do not hold, "
                                  f"first {missing[0]}")
        self._names = int4.logical(self._where)
        self._int4 = {name: self._shape_of(name.removesuffix("weight")) for name, stored in self._names.items()
                      if name != stored}

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            self._indexed = weight_map_of(index)
            names = sorted(set(self._indexed.values()))
        else:
            names = ["model.safetensors"]
        if (self.folder / "mtp.safetensors").is_file():
            names.append("mtp.safetensors")
        for name in names:
            if Path(name).name != name or leads_out(name):
                raise CheckpointError(f"{index}: {name!r} leads out of the folder")
            if not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r:.80} must be a safetensors file{other_weights(self.folder)}")
            if not (self.folder / name).is_file():
                instead = "" if self._indexed else other_weights(self.folder)
                raise CheckpointError(f"{self.folder / name}: the file is missing{instead}")
        return [self.folder / name for name in names]

    def _shape_of(self, stem: str) -> tuple[int, ...]:
        """Shape of an int4 weight. Raises CheckpointError for a part that is missing or unsupported."""
        file = self._file[stem + int4.PARTS[0]]
        for part in int4.PARTS:
            if stem + part not in self._where:
                raise CheckpointError(f"{file}: {stem}{int4.PARTS[0]} is there and {stem}{part} is not")
        for part in ("weight_zero_point", "weight_g_idx"):
            if stem + part in self._where:
                raise CheckpointError(f"{file}: {stem}{part}: int4 weights with it are not read here")
        stored = self._where[stem + int4.PARTS[2]].get_tensor(stem + int4.PARTS[2])
        shape = tuple(stored.tolist()) if stored.dtype in (torch.int64, torch.int32) and stored.shape == (2,) else ()
        rows = self._where[stem + int4.PARTS[0]].get_slice(stem + int4.PARTS[0]).get_shape()[:1]
        if len(shape) != 2 or not 0 < shape[1] <= 1 << 31 or [shape[0]] != rows:
            raise CheckpointError(f"{file}: {stem}{int4.PARTS[2]} is {shown(stored.flatten()[:4].tolist())}: must be "
                                  "the rows and columns of the weight")
        return shape

    def __contains__(self, name: str) -> bool:
        return name in self._where or name in self._int4

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._int4.get(name) or tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: F32, BF16, F8_E4M3, …; I4 for compressed-tensors' int4."""
        return "I4" if name in self._int4 else self._where[name].get_slice(name).get_dtype()

    def metadata(self) -> dict[str, str]:
        """Of all files together."""
        return {k: v for handle in set(self._where.values()) for k, v in (handle.metadata() or {}).items()}

    def file(self, name: str) -> Path:
        return self._file[self._names.get(name, name)]

    def check_plain(self, name: str) -> None:
        """Raises CheckpointError unless the tensor is of a kind that weights have."""
        if (kind := self.dtype(name)) not in _WEIGHTS:
            raise CheckpointError(f"{self.file(name)}: {name} is {kind}: weights must be {', '.join(_WEIGHTS[:-1])}")
        if kind == "F8_E4M3":
            self._scale_of(name)

    def finite(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor, unchanged. Raises CheckpointError for a value that is not finite."""
        if not bool(rows.isfinite().all()):
            why = ", or beyond what float16 can hold" if rows.dtype == torch.float16 else ""
            raise CheckpointError(f"{self.file(name)}: {name} holds values that are not finite{why}")
        return rows

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, dequantized where it is FP8, in `dtype` if given.

        A view of the mapped file where nothing is to be converted: it costs no memory, and must not be written to.
        """
        if name in self._int4:
            return self.read_rows(name, 0, self._int4[name][0], dtype)
        return self._plain(name, self._where[name].get_tensor(name), 0, dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """The same for rows start..stop alone, copied from the file and not mapped, so that a walk over a large
        checkpoint never has more than these in memory. Of an FP8 matrix `start` must be a multiple of 128."""
        if name in self._int4:
            packed, scale = (self.read_rows(name.removesuffix("weight") + part, start, stop) for part in int4.PARTS[:2])
            try:
                return int4.dequantize(packed, scale, self._int4[name][1], dtype or torch.bfloat16)
            except CheckpointError as error:
                raise CheckpointError(f"{self.file(name)}: {name}: {error}") from None
        _, *rest = shape = self.shape(name)
        if (spelt := self._where[name].get_slice(name).get_dtype()) not in TORCH_DTYPES:
            raise CheckpointError(f"{self.file(name)}: {name} is {spelt}: must be one of {', '.join(TORCH_DTYPES)}")
        kind = TORCH_DTYPES[spelt]
        row = math.prod(rest) * kind.itemsize
        stop = min(stop, shape[0])
        data = self.read_bytes(name, start * row, stop * row)
        return self._plain(name, data.view(kind).view(stop - start, *rest), start, dtype)

    def read_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes start..stop of a tensor as uint8, copied from the file."""
        file, begin, _ = self.place(name)
        data = torch.empty(stop - start, dtype=torch.uint8)
        with file.open("rb") as stream:
            stream.seek(begin + start)
            if (got := stream.readinto(data.numpy().data)) != len(data):
                raise CheckpointError(f"{file}: {name} ends {len(data) - got} bytes early: the file has shrunk")
        return data

    def place(self, name: str) -> Span:
        """Where a tensor's bytes lie."""
        file = self._file[name]
        if file not in self._headers:  # safe_open has checked it
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                self._headers[file] = 8 + length, json.loads(stream.read(length))
        begin, header = self._headers[file]
        start, stop = header[name]["data_offsets"]
        return Span(file, begin + start, stop - start)

    def _scale_of(self, name: str) -> str:
        """The name of an FP8 weight's scales. Raises CheckpointError where they are missing or no numbers."""
        if (scale := f"{name}_scale_inv") not in self:
            raise CheckpointError(f"{self.folder}: {name} is FP8 but {scale} is missing")
        if (kind := self.dtype(scale)) not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"{self.file(scale)}: {scale} is {kind}: must be F32 (or F64, F16, BF16)")
        return scale

    def _plain(self, name: str, tensor: Tensor, start: int, dtype: torch.dtype | None) -> Tensor:
        if tensor.dtype == torch.float8_e4m3fn:
            scale = self._scale_of(name)
            if start % fp8.BLOCK:
                raise ValueError(f"start = {start}: must be a multiple of {fp8.BLOCK} in an FP8 matrix")
            scales = self.read(scale)
            if self.shape(name)[0] != len(tensor):
                first = start // fp8.BLOCK
                scales = scales[first : first - (-len(tensor) // fp8.BLOCK)]
            try:
                return fp8.dequantize(tensor, scales, dtype or torch.bfloat16)
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder}: {name}: {error}") from None
        return tensor if dtype is None else tensor.to(dtype)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Row blocks of about CHUNK numbers: multiples of 128, which FP8 blocks and panels divide."""
    height = max(128, CHUNK // max(1, math.prod(shape[1:])) // 128 * 128)
    return ((start, min(start + height, shape[0])) for start in range(0, shape[0], height))


def divide(parts: Iterable[_T], size: Callable[[_T], int], shard_bytes: int) -> dict[str, list[_T]]:
    """File name -> its parts, in order, as many as fit into shard_bytes."""
    shards: list[list[_T]] = [[]]
    room = shard_bytes
    for part in parts:
        if size(part) > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(part)
        room -= size(part)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], elsewhere: Callable[[str], Iterable[Tensor]]) -> None:
    """Write a safetensors file, a tensor at a time. elsewhere: gives the parts of one that is on the meta device, which
    lie one after the other."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # each at a multiple of its element
    spelt, end = {dtype: name for name, dtype in TORCH_DTYPES.items()}, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        header[name] = {"dtype": spelt[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end := end + tensor.nbytes]}
    head = file_header(header, 8)
    with file.open("wb") as stream:
        stream.write(head)
        for name, tensor in tensors.items():
            for part in elsewhere(name) if tensor.is_meta else [tensor]:
                stream.write(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    assert file.stat().st_size == len(head) + end, f"{file}: parts of another size"


def file_header(entries: Mapping[str, Any], align: int) -> bytes:
    """What a safetensors file begins with, padded so that its data begin at a multiple of `align`."""
    text = to_json(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def _pointer(file: Path) -> str:
    """What a small text file in place of weights is, such as a Git LFS pointer."""
    with file.open("rb") as stream:
        return "it is a pointer of Git LFS: run `git lfs pull` in its folder" if stream.read(40).startswith(
            b"version https://git-lfs") else ""


def write_manifest(folder: Path) -> None:
    """Write manifest.json for all files in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / MANIFEST, {"format": 1, "files": {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}})


def check_manifest(folder: Path, *, weights: bool = True) -> None:
    """Compare a folder with its manifest.json; one without a manifest (a download) passes with its sizes unchecked.

    weights: False leaves out the hashes of safetensors files, which would read them all, and compares their sizes.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    entries = read_json(manifest, CheckpointError, "not a manifest").get("files")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{manifest}: not a manifest: files = {shown(entries)}: must be an object")
    for name, entry in entries.items():
        if leads_out(name):
            raise CheckpointError(f"{manifest}: {name!r:.80} leads out of the folder")
        if not (isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)):
            raise CheckpointError(f"{manifest}: not a manifest: {name:.80} has {shown(entry)}: must have bytes and "
                                  "sha256")
    for name, entry in entries.items():
        file, size_then, digest = folder / name, entry["bytes"], entry["sha256"]
        if not file.is_file():
            raise CheckpointError(f"{file}: the file is missing")
        if (size := file.stat().st_size) != size_then:
            raise CheckpointError(f"{file}: truncated or altered: {size} bytes, the manifest says {size_then}")
        if (weights or file.suffix != ".safetensors") and sha256(file) != digest:
            raise CheckpointError(f"{file}: altered: its SHA-256 is not the manifest's")
