"""Writes a converted checkpoint: tensors divided into files, in resumable steps (see convert/__init__.py)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import EXPERT_USE, INDEX, MANIFEST, PAGE, TORCH_DTYPES, AdaptedFiles, TensorFiles
from ..checkpoint.files import Tensors, file_header, row_blocks
from ..errors import CheckpointError, ConfigError
from ..files import replace_folder, sha256, write_json
from ..interrupts import kept
from ..progress import ProgressBar
from ..tiktokens import FILE as TIKTOKEN
from ..tokenizer import Tokenizer

SHARD_BYTES = 1 << 30  # what a crash can cost
REPORT = "quantization.json"
GROWN = "experts.json"  # what a grown model says of its base and groups (convert/packages.py)
OLD_REPORT = "quantisation.json"  # its name in checkpoints of 0.1
JOURNAL = "journal.json"


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of the result. chunks: makes its bytes, as contiguous tensors one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]

    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts a file: padded ranges, packed matrices, then by the size of the elements."""
        if self.dtype == "U8":
            return (0 if ".mlp." in self.name else 1), 0
        return 2, -TORCH_DTYPES[self.dtype].itemsize


def copied(files: TensorFiles, name: str, kind: str) -> Iterator[Tensor]:
    for start, stop in row_blocks(files.shape(name)):
        yield files.finite(name, files.read_rows(name, start, stop, TORCH_DTYPES[kind]))


def free_folder(out: str | Path, overwrite: bool, *sources: str | Path | None) -> Path:
    """Check `out`: not one of the sources, and new or empty unless it is to be overwritten."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out = {out}: must be a folder, this is a file")
    for source in (Path(source) for source in sources if source is not None):
        if out.exists() and source.exists() and out.samefile(source):
            raise ConfigError(f"out = {out}: must not be the source")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"out = {out}: must be a new or an empty folder (or give overwrite)")
    return out


class Writer:
    """The staging folder `OUT.partial` and its journal; left in place by whatever interrupts the work."""

    def __init__(self, out: Path, key: dict[str, Any], files: Tensors, resume: bool) -> None:
        self.out = out.resolve()
        self.texts = _texts(files.folder) if files.folder.is_dir() else []  # refused before weights are converted
        names = {path.name for path in self.texts}
        converted = TIKTOKEN in names and not names & {"tokenizer.json", "tokenizer.json.gz"}
        self.tokenizer = Tokenizer.load(files.folder) if converted else None
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.key = key | {"source": stamps(files.folder, "config.json")}
        if isinstance(files, AdaptedFiles):
            self.key["adapter"] = stamps(files.adapter.folder, files.adapter.about)
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
        self, contents: dict[str, list[Part]], squares: dict[str, tuple[float, float]], progress: bool
    ) -> int:
        """Write the files that the journal does not hold; returns the bytes of all. `squares` is filled."""
        squares.update({name: (error, weight) for name, (error, weight) in self.squares.items()})
        total = sum(part.size() for parts in contents.values() for part in parts)
        ready = sum(part.size() for name in self.done for part in contents[name])
        disk = next(folder for folder in self.folder.parents if folder.exists())
        if (free := shutil.disk_usage(disk).free) < (need := round(1.01 * (total - ready)) + (1 << 20)):
            raise CheckpointError(f"{self.out}: {need / 2**30:.2f} GiB are to be written and the disk has "
                                  f"{free / 2**30:.2f} GiB free")
        self.folder.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        with kept(lambda: f"{len(self.done)} of {len(contents)} files are whole in {self.folder}"), ProgressBar(
                total=total, initial=ready, unit="B", unit_scale=True, unit_divisor=1024, desc=self.out.name,
                disable=not progress) as bar:
            for name, parts in contents.items():
                if name != "mtp.safetensors":
                    weight_map |= {part.name: name for part in parts}
                if name not in self.done:
                    try:
                        self.done[name] = write_file(self.folder / name, parts, bar.update)
                    except CheckpointError:  # the source is at fault: mended, it is another source
                        shutil.rmtree(self.folder)
                        raise
                    write_json(self.folder / JOURNAL, {"key": self.key, "files": self.done, "squares": squares})
        if len(set(weight_map.values())) > 1:
            size = sum(part.size() for name, parts in contents.items() if name in weight_map.values() for part in parts)
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        return sum(entry["bytes"] for entry in self.done.values())

    def _whole(self, name: str, entry: dict[str, Any]) -> bool:
        file = self.folder / name
        return file.is_file() and file.stat().st_size == entry["bytes"] and sha256(file) == entry["sha256"]

    def publish(self, config: dict[str, Any], also: Mapping[str, Any]) -> None:
        """config.json, the source's small files, further JSON files and the manifest; then the folder becomes OUT."""
        for file in self.texts:
            shutil.copyfile(file, self.folder / file.name)
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder)
        for name, value in {"config.json": config, **also}.items():
            write_json(self.folder / name, value)
        (self.folder / JOURNAL).unlink()
        entries = {path.name: self.done.get(path.name) or {"bytes": path.stat().st_size, "sha256": sha256(path)}
                   for path in sorted(self.folder.iterdir())}
        write_json(self.folder / MANIFEST, {"format": 1, "files": entries})
        with replace_folder(self.out) as staging:
            for path in list(self.folder.iterdir()):
                path.rename(staging / path.name)
        self.folder.rmdir()


def stamps(folder: Path, about: str) -> dict[str, list[int]]:
    """Size and time of the files that a conversion reads: a folder's, or a file alone."""
    paths = [folder / about, *sorted(folder.glob("*.safetensors"))] if folder.is_dir() else [folder]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _texts(folder: Path) -> list[Path]:
    """The small files that go along with the weights. Raises CheckpointError as `check_inside` does."""
    ours = {"config.json", INDEX, MANIFEST, REPORT, OLD_REPORT, EXPERT_USE, GROWN}
    found = []
    for file in sorted(folder.iterdir()):
        small = file.suffix in (".json", ".jinja", ".txt", ".model", ".md") or file.name.startswith("LICENSE")
        if small and file.is_file() and file.name not in ours:
            check_inside(folder, file)
            found.append(file)
    return found


def check_inside(folder: Path, file: Path) -> None:
    """Raises CheckpointError for a link that leads out of the folder; those of the hub's cache lead to its blobs."""
    home = folder.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any((target := file.resolve()).is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(f"{file}: leads out of the checkpoint, to {target}: put a copy in its place, or "
                              "remove it")


def write_file(path: Path, parts: list[Part], progress: Callable[[int], object]) -> dict[str, Any]:
    """Write a safetensors file whose data begins at a whole page; returns its size and SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [end, end + part.size()]}
        end += part.size()
    head = file_header(header, PAGE)
    digest = hashlib.sha256()
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(head)
        for part in parts:
            written = 0
            for chunk in part.chunks():
                put(data := chunk.contiguous().flatten().view(torch.uint8).numpy().data)
                written += data.nbytes
                progress(data.nbytes)
            assert written == part.size(), f"{part.name}: {written} bytes of {part.size()}"
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    return {"bytes": len(head) + end, "sha256": digest.hexdigest()}
