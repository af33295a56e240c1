"""The tensors of a checkpoint folder, read one at a time, and the manifest that guards its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import leads_out, sha256, write_json
from ..quant import fp8
from .names import INDEX, weight_map_of

MANIFEST = "manifest.json"
EXPERT_USE = "expert_use.json"  # which experts ran (engine/warmup.py): grows beside a checkpoint, no part of it
# as safetensors spells the dtypes that weights have
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8}


class Span(NamedTuple):
    """Bytes of a file."""

    file: Path
    offset: int
    size: int


class TensorFiles:
    """The tensors of a checkpoint folder, read one at a time; FP8 weights come out dequantised.

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

    def metadata(self) -> dict[str, str]:
        """Of all files together."""
        return {k: v for handle in set(self._where.values()) for k, v in (handle.metadata() or {}).items()}

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
        kind = TORCH_DTYPES[self._where[name].get_slice(name).get_dtype()]
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


def write_manifest(folder: Path) -> None:
    """manifest.json of everything that is in `folder`."""
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
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: not a manifest: {error}") from None
    if outside := [name for name in entries if leads_out(name)]:
        raise CheckpointError(f"{manifest}: {outside[0]!r} leads out of the folder")
    for file, size_then, digest in expected:
        if not file.is_file():
            raise CheckpointError(f"{file}: the file is missing")
        if (size := file.stat().st_size) != size_then:
            raise CheckpointError(f"{file}: truncated or altered: {size} bytes, the manifest says {size_then}")
        if (weights or file.suffix != ".safetensors") and sha256(file) != digest:
            raise CheckpointError(f"{file}: altered: its SHA-256 is not the manifest's")
