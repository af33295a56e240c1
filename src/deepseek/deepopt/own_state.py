"""What only one rank has, beside the checkpoint of the same step: OUT/rank-RRRR/SSSSSS.safetensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomically

KEEP = 3  # more than checkpoints that a run goes on from: one that is there has the states of all ranks


def write_own(out: Path, rank: int, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write the state of a rank at a step, and drop all but the newest ones."""
    folder = out / f"rank-{rank:04d}"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{step:06d}.safetensors", save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        {key: str(value) for key, value in about.items()}))
    for old in sorted(folder.glob("*.safetensors"))[:-KEEP]:
        old.unlink()


def read_own(out: Path, rank: int, step: int) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """(tensors, about) of a rank at a step; None where it was not there."""
    path = out / f"rank-{rank:04d}" / f"{step:06d}.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def parts_of(tensors: Mapping[str, Tensor]) -> Mapping[str, dict[str, Tensor]]:
    """{what comes before the first dot of a name: {the rest: tensor}}; nothing of a part that is not there."""
    found = defaultdict[str, dict[str, Tensor]](dict)
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        found[part][name] = tensor
    return found
