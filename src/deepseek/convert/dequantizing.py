"""Quantized or FP8 checkpoint -> plain Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint import TORCH_DTYPES, TensorFiles, load_model, open_checkpoint, outside_index, quantized_targets, units
from ..checkpoint.files import divide, row_blocks
from ..checkpoint.models import check_tensors, plain_keys, stored_parts
from ..config import ModelConfig
from ..errors import ConfigError
from ..files import locked
from ..model import CausalLM
from ..ops import panels
from ..quant.linear import QuantConfig, QuantTarget
from .writing import SHARD_BYTES, Part, Writer, copied, free_folder

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def dequantize(
    source: str | Path, out: str | Path, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16", *,
    overwrite: bool = False, resume: bool = True, progress: bool = True, shard_bytes: int = 5 * SHARD_BYTES,
) -> Path:
    """Write a plain Hugging Face checkpoint with the values of a quantized one (or of an FP8 one); returns its path.

    Arguments and errors as in `quantize`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    with locked(out):
        out = free_folder(out, overwrite, source)
        config, quant, files = open_checkpoint(source)
        if quant is not None:
            load_model(files.folder)  # maps, and checks every tensor
        plan = plan_plain(config, quant, files, DTYPES[dtype])
        write_plain(config, files, out, plan, dtype, {"dtype": dtype}, resume=resume, progress=progress,
                    shard_bytes=shard_bytes, also={})
    return out


def write_plain(
    config: ModelConfig, files: TensorFiles, out: Path, plan: tuple[list[Part], list[Part]], dtype: str,
    key: dict[str, Any], *, resume: bool, progress: bool, shard_bytes: int, also: Mapping[str, Any],
) -> None:
    """Write the two parts of a plan as a plain checkpoint. also: further JSON files beside it."""
    main, mtp = plan
    writer = Writer(out, key | {"shard_bytes": shard_bytes}, files, resume)
    writer.write(divide(main, Part.size, shard_bytes) | ({"mtp.safetensors": mtp} if mtp else {}), {}, progress)
    writer.publish(plain_keys(config, dtype), also)


def plan_plain(
    config: ModelConfig, quant: QuantConfig | None, files: TensorFiles, kind: str
) -> tuple[list[Part], list[Part]]:
    """Plan the tensors of a plain checkpoint as `save_model` writes them, those of mtp.safetensors apart."""
    model = CausalLM.on_meta(config)
    if quant is None:
        check_tensors(model, files)
    made: dict[str, Callable[[], Iterator[Tensor]]] = {}
    for target in quantized_targets(model, quant) if quant is not None else ():
        assert quant is not None
        for unit in units(target, config):
            made |= {name: partial(_unpack, files, target, unit.stem, which, quant.bits, TORCH_DTYPES[kind])
                     for which, name in enumerate(unit.weights)}
    main: list[Part] = []
    mtp: list[Part] = []
    for name, on_disk, tensor in stored_parts(model):
        dtype = "F32" if name.endswith("correction_bias") else kind
        (mtp if outside_index(name, config) else main).append(Part(
            on_disk, dtype, tuple(tensor.shape), made.get(on_disk) or partial(copied, files, on_disk, dtype)))
    return sorted(main, key=lambda part: part.rank), sorted(mtp, key=lambda part: part.rank)


def _unpack(
    files: TensorFiles, target: QuantTarget, stem: str, which: int, bits: panels.Bits, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Row blocks of the weight number `which` of a unit (0; or gate 0, up 1, down 2)."""
    if target.kind == "table":
        for start, stop in row_blocks((target.rows, target.columns)):
            code_OK = files.read_rows(f"{stem}.codes", start, stop)
            step_O = files.read_rows(f"{stem}.step", start, stop)
            yield files.finite(f"{stem}.step", panels.Quantized(code_OK, None, step_O).dequantize().to(dtype))
        return
    rows, columns = (target.columns, target.rows) if which == 2 else (target.rows, target.columns)
    in_turns = target.kind != "matrix" and which < 2  # gate and up
    width, offset = panels.panel_bytes(columns, bits), 0
    if which == 2:
        offset = 2 * panels.matrix_bytes(target.rows, target.columns, bits)
    for start, stop in row_blocks((rows, columns)):
        first, last = start // panels.ROWS, -(-stop // panels.ROWS)
        step = width * (2 if in_turns else 1)
        data = files.read_bytes(f"{stem}.packed", offset + first * step, offset + last * step)
        if in_turns:
            data = data.view(-1, 2, width)[:, which].flatten()
        yield files.finite(f"{stem}.packed", panels.unpack(data, stop - start, columns, bits).dequantize().to(dtype))
