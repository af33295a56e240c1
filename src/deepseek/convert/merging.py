"""Plain or FP8 checkpoint + adapter -> plain Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint import AdaptedFiles, TensorFiles, open_checkpoint
from ..errors import CheckpointError, ConfigError
from ..files import locked, read_json, sha256
from .dequantizing import DTYPES, plan_plain, write_plain
from .writing import SHARD_BYTES, free_folder

PROVENANCE = "provenance.json"
FORMAT = 1


@dataclass(frozen=True)
class Merged:
    """Result of `merge`. changed: tensors. kept: the share of what the adapter adds that `dtype` holds. too_small:
    the base's dtype and its share, where it was not taken for that."""

    path: Path
    kind: str
    dtype: str
    changed: int
    kept: float
    too_small: tuple[str, float] | None = None

    def __str__(self) -> str:
        held = "" if self.kept > 0.999 else f", which holds {self.kept:.1%} of what the adapter adds"
        if self.too_small is not None:
            held = f", as {self.too_small[0]} would hold {self.too_small[1]:.1%} of what the adapter adds"
        return f"{self.kind}: {self.changed} tensors changed, written in {self.dtype}{held}"


def merge(
    source: str | Path, adapter: str | Path, out: str | Path,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto", *, overwrite: bool = False, resume: bool = True,
    progress: bool = True, shard_bytes: int = 5 * SHARD_BYTES,
) -> Merged:
    """Write the checkpoint that a delta or a LoRA adapter makes of its base: weights with their index, config.json, the
    small files beside the base (tokenizer, atlas, licence), and provenance.json. Memory does not grow with the model.

    dtype: of the weights; auto is the base's, or float32 where that would lose more than a tenth of what a LoRA adapter
    adds (AdaptedFiles). Other arguments and errors as in `quantize`; an adapter that does not fit is a CheckpointError
    that says why.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: must be one of auto, {', '.join(DTYPES)}")
    with locked(out):
        out = free_folder(out, overwrite, source, adapter)
        config, quant, plain = open_checkpoint(source)
        if quant is not None:
            raise ConfigError(f"{plain.folder}: is quantized ({quant.format}), and a merge would be rounded away: "
                              "merge into the checkpoint that it was made from, or quantize that with the adapter "
                              "(`deepseek quantize IN OUT --adapter ADAPTER`)")
        asked = None if dtype == "auto" else getattr(torch, dtype)
        files = AdaptedFiles.open(plain, config, adapter, asked, progress=progress)
        name = dtype_name(files)
        plan = plan_plain(config, None, files, DTYPES[name])
        write_plain(config, files, out, plan, name, {"merge": name}, resume=resume, progress=progress,
                    shard_bytes=shard_bytes, also=provenance(files))
    small = files.too_small and (_name(files.too_small[0]), files.too_small[1])
    return Merged(out, files.adapter.kind, name, len(files.adapter.changed), files.kept, small)


def dtype_name(files: AdaptedFiles) -> str:
    return _name(files.torch_dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def provenance(files: TensorFiles) -> dict[str, Any]:
    """{provenance.json: what was merged into what}, after the steps that the base's own file tells; nothing where
    nothing was merged."""
    if not isinstance(files, AdaptedFiles):
        return {}
    adapter = files.adapter
    step = {
        "base": {"name": str(files.folder), "fingerprint": files.base},
        "adapter": {"name": str(adapter.folder), "kind": adapter.kind, "made_for": list(adapter.made_for), "sha256": {
            file.name: sha256(file) for file in sorted({adapter.folder / adapter.about, *map(
                adapter.tensors.file, adapter.tensors)})}},
        "dtype": dtype_name(files), "changed": len(adapter.changed), "kept": files.kept}
    return {PROVENANCE: {"format": FORMAT, "merged": [*_before(files.folder / PROVENANCE), step]}}


def _before(path: Path) -> list[Any]:
    """Steps noted by earlier merges. Raises CheckpointError for a malformed file."""
    if not path.is_file():
        return []
    value = read_json(path, CheckpointError, "not a record of merges")
    if value.get("format") != FORMAT or not isinstance(value.get("merged"), list):
        raise CheckpointError(f"{path}: not a record of merges of format {FORMAT}: remove it to do without")
    return value["merged"]
