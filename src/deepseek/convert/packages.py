"""Expert packages into a model and out of it: install, remove, export, verify.

A group's bias does not depend on the other groups: it is set on the base's own hidden states of general text, so that
the score of every group there (the sum of its two best s + b) has the same mean, 2. What is installed first is nothing
to what comes later, and after a removal from the middle a model is what installing the others makes of the base.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import TORCH_DTYPES, load_model, resolve, stored_dtype
from ..checkpoint.identity import check_base
from ..checkpoint.packages import (
    PRECISIONS,
    ExpertPackage,
    PackageInfo,
    bias_name,
    gate_name,
    packed_name,
    packed_size,
    plain_names,
    read_package,
    write_package,
)
from ..checkpoint.ready import is_folder
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, DataError, shown
from ..files import locked, read_json
from ..model.experts import MoE
from ..quant.linear import QuantizedExperts, QuantizedMLP
from ..quant.pack import quantize_panels
from .grown import (
    Contents,
    Group,
    Grown,
    GrownModel,
    Held,
    grown_shape,
    plain_dtype,
    restored,
    start,
    weight_file,
    write_model,
)
from .quantizing import packed_mlp
from .writing import Part, free_folder

CALIBRATION = "calibration.json"  # general text as token ids, in a base's folder


@dataclass(frozen=True)
class Installed:
    """Result of `install`."""

    path: Path
    group: Group
    place: int


def install(
    package: str | Path, model: str | Path, *, out: str | Path | None = None, trust: Sequence[str | Path] = (),
    require_signature: bool = False, calibration: Sequence[Sequence[int]] | None = None, overwrite: bool = False,
) -> Installed:
    """Append a package's experts to a model as one more routing group, in place or (out) in a new folder; at every
    instant the folder is the old model or the new one, and after an interruption the same call can be made again.

    trust, require_signature: as in `read_package`. calibration: token ids of general text, a list a document, to set
    the group's bias on; else those of calibration.json in the model's folder; without both the bias is the package's.
    Raises NotFoundError, ConfigError or CheckpointError naming what does not fit: another base, tokenizer or shape than
    those of the model, a name that is there already.
    """
    opened = open_package(package, trust=trust, require_signature=require_signature)
    done, = install_all([opened], model, out=out, calibration=calibration, overwrite=overwrite)
    return done


def open_package(
    package: str | Path, *, trust: Sequence[str | Path] = (), require_signature: bool = False
) -> ExpertPackage:
    """`read_package`, with a warning about a package that no trusted key has signed."""
    opened = read_package(package, trust=trust, require_signature=require_signature)
    if not opened.trusted:
        warnings.warn(f"{opened.path}: {opened.info.name}: {opened.signer}", stacklevel=3)
    return opened


def install_all(
    packages: Sequence[ExpertPackage], model: str | Path, *, out: str | Path | None = None,
    calibration: Sequence[Sequence[int]] | None = None, overwrite: bool = False, source: str | None = None,
    biases: Sequence[Sequence[float]] | None = None,
) -> list[Installed]:
    """`install` for several packages, in one step: all of them or none; the files are those of one call a package.

    source: the fingerprint of the checkpoint that a plain model without packages was rounded from; packages for that
    fit it. biases: what `calibrate` has found on the same text. Other arguments and errors as of `install`.
    """
    with locked(target := _target(model, out, overwrite)):
        there = GrownModel(model)
        if out is not None:
            free_folder(out, overwrite, there.folder)
        folder, config = there.folder, there.config
        for opened in packages:
            opened.check_fits(config)
        grown = there.grown or start(there, source)
        before = len(grown.groups)
        ids = _calibration(folder, config) if calibration is None else _checked(calibration, config, "calibration")
        for opened in packages:
            _check_fits_beside(opened, grown, folder)
            own = tuple(tuple(opened.files.read(bias_name(layer)).tolist()) for layer in opened.info.layers)
            group = Group(replace(opened.info, tensors={}), opened.sha256, opened.signer, own, sum(map(len, ids)))
            grown = replace(grown, groups=(*grown.groups, group))
        if ids and biases is None:
            biases = _calibrated(there, packages, ids)
        contents: list[Contents] = [*(Held(there, place) for place in range(before))]
        for i, opened in enumerate(packages):
            bias = [opened.files.read(bias_name(layer)) for layer in opened.info.layers] if biases is None else [
                torch.full((opened.info.experts,), one) for one in biases[i]]
            contents.append(Incoming(opened, bias, plain_dtype(there)))
        write_model(target, there, grown, contents)
    return [Installed(target, group, before + i) for i, group in enumerate(grown.groups[before:])]


def _check_fits_beside(opened: ExpertPackage, grown: Grown, folder: Path) -> None:
    """Raises CheckpointError or ConfigError unless the package is for this base and fits the groups that it has."""
    info = opened.info
    check_base([grown.base, *filter(None, [grown.source])], [info.base], f"{opened.path}: {info.name}")
    if info.tokenizer != grown.tokenizer:
        raise CheckpointError(f"{opened.path}: {info.name}: made for another tokenizer: its hash is "
                              f"{info.tokenizer!s:.16}…, that of {folder} {grown.tokenizer!s:.16}…")
    if grown.groups:
        _check_alike(opened, grown.groups[0].info)
    if info.name in grown.names:
        raise ConfigError(f"{folder}: a package {info.name!r} is installed already: remove it first")


def _check_alike(opened: ExpertPackage, first: PackageInfo) -> None:
    if grown_shape(opened.info) != grown_shape(first):
        raise CheckpointError(f"{opened.path}: {opened.info.name}: has {_told(grown_shape(opened.info))}: must have "
                              f"{_told(grown_shape(first))}, as {first.name}")


def remove(model: str | Path, name: str, *, out: str | Path | None = None, overwrite: bool = False) -> Path:
    """Take a package's experts out of a model, in place or in a new folder. The folder is then what it would be had the
    package never been installed; with the last one gone it is the base's, byte for byte. Raises as `install` does."""
    with locked(target := _target(model, out, overwrite)):
        there = GrownModel(model)
        if out is not None:
            free_folder(out, overwrite, there.folder)
        grown = there.need_grown()
        place = grown.place(name, there.folder)
        rest = [i for i in range(len(grown.groups)) if i != place]
        groups = tuple(grown.groups[i] for i in rest)
        write_model(target, there, replace(grown, groups=groups), [Held(there, i) for i in rest])
    return target


def export(
    model: str | Path, name: str, out: str | Path, *, license: str | None = None, card: Mapping[str, Any] | None = None,
    key: str | Path | None = None,
) -> ExpertPackage:
    """Write an installed group as a package: its experts in the precision in which the model has them, with the bias
    that it came with. license, card: others than it came with. key: to sign with. Raises as `install` does."""
    there = GrownModel(model)
    grown = there.need_grown()
    place = grown.place(name, there.folder)
    held, info = Held(there, place), grown.groups[place].info
    if there.quant is None:
        precision = str(stored_dtype(there.files)).removeprefix("torch.")
    else:
        precision = there.quant.format
        if plain := [layer for layer in info.layers if held.packed(layer) is None]:
            raise ConfigError(f"{there.folder}: {name}: the experts of layer {plain[0]} are plain and others packed: "
                              "export them from a model that has all of one kind")
    info = replace(info, precision=precision, license=info.license if license is None else license,
                   card=info.card if card is None else card)
    bias = dict(zip(info.layers, grown.groups[place].bias, strict=True))
    tensors: dict[str, Tensor] = {}
    for layer in info.layers:
        tensors |= {gate_name(layer): held.rows(layer), bias_name(layer): torch.tensor(bias[layer])}
        for e in range(info.experts):
            for name_there, name_here in zip(held.names(layer, e, place), held.names(layer, e, 0), strict=True):
                tensors[name_here] = there.files.read(name_there)
    return write_package(out, info, tensors, key=key)


def installed(model: str | Path) -> Grown | None:
    """What a model's folder says of its packages; None without any. Raises CheckpointError for a damaged one."""
    return Grown.read(resolve(model))


def verify_model(model: str | Path) -> Grown:
    """Compare every byte of a grown model with its manifest, and of its base with the hashes that it notes."""
    there = GrownModel(model, verify=True)
    grown = there.need_grown()
    for name, stated in grown.weights.items():
        digest = hashlib.sha256()
        for chunk in restored(there, name):
            digest.update(chunk)
        if digest.hexdigest() != stated:
            raise CheckpointError(f"{there.folder / weight_file(name)}: altered: it would not be the base's file")
    return grown


def _told(shape: tuple[tuple[int, ...], int, int]) -> str:
    layers, experts, width = shape
    return f"{experts} experts of width {width} in layers {layers[0]} to {layers[-1]}"


def _target(model: str | Path, out: str | Path | None, overwrite: bool) -> Path:
    """The folder to write."""
    if overwrite and out is None:
        raise ConfigError("overwrite = True: has a meaning only with out")
    if out is None and not is_folder(model):
        resolve(model, weights=False)
        raise ConfigError(f"out: must be given, because {model} is not a local folder to change")
    return resolve(model) if out is None else Path(out)


# ---- calibration ----------------------------------------------------------------------------------------------------


def _calibration(folder: Path, config: ModelConfig) -> list[Sequence[int]]:
    file = folder / CALIBRATION
    if not file.is_file():
        return []
    keys = read_json(file, DataError, "not general text as token ids")
    if keys.get("format") != 1 or not isinstance(keys.get("tokens"), list):
        raise DataError(f"{file}: not general text as token ids: must have format 1 and tokens, lists of ids")
    return _checked(keys["tokens"], config, f"{file}: tokens")


def _checked(ids: Sequence[Sequence[int]], config: ModelConfig, what: str) -> list[Sequence[int]]:
    for row in ids:
        if not isinstance(row, Sequence) or not row or not all(
                type(i) is int and 0 <= i < config.vocab_size for i in row):
            raise DataError(f"{what}: {shown(row)}: must be lists of token ids from 0 to {config.vocab_size - 1}")
    if not ids:
        raise DataError(f"{what}: holds no text")
    return [row[: config.max_position_embeddings] for row in ids]


def calibrate(
    model: str | Path, packages: Sequence[ExpertPackage], ids: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The bias that installation sets on this text, for every package and each of its layers. Raises as `install`."""
    there = GrownModel(model)
    for opened in packages:
        opened.check_fits(there.config)
        _check_alike(opened, packages[0].info)
    return _calibrated(there, packages, _checked(ids, there.config, "calibration"))


@torch.no_grad()
def _calibrated(
    there: GrownModel, packages: Sequence[ExpertPackage], ids: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The bias of the experts of every package and layer, from the base's hidden states of this text (see above)."""
    model = load_model(there.folder, verify=False)
    model.layer_runner = None  # its modules are to be watched
    best = [{layer: list[float]() for layer in opened.info.layers} for opened in packages]
    for layer in packages[0].info.layers:
        block: Any = model.model.layers[layer]
        block.mlp = mlp = _dense(block.mlp)
        for opened, sums in zip(packages, best, strict=True):
            mlp.register_forward_pre_hook(_scoring(opened.files.read(gate_name(layer)).float(), sums[layer]))
    for row in ids:
        model.hidden(torch.tensor([row]))
    tokens = sum(map(len, ids))
    return [[1 - sum(total) / tokens / 2 for total in sums.values()] for sums in best]


def _scoring(rows: Tensor, sums: list[float]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that enters the sum of the two best scores of every call's tokens."""
    def score(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        s_TE = (args[0].flatten(0, -2).float() @ rows.t()).sigmoid()
        sums.append(float(s_TE.topk(2).values.double().sum()))

    return score


def _dense(mlp: nn.Module) -> nn.Module:
    """The FFN of the base's layer."""
    if not isinstance(mlp, MoE):
        return mlp
    experts = mlp.experts
    if isinstance(experts, QuantizedExperts) and experts.shared is not None:
        return QuantizedMLP(experts.shared, experts.shared_inner, experts.table.bits)
    return mlp.shared_experts


# ---- a package's tensors --------------------------------------------------------------------------------------------


class Incoming:
    """Those of a package, in the model's format."""

    place = None

    def __init__(self, package: ExpertPackage, bias: Sequence[Tensor], dtype: str | None) -> None:
        """dtype: of the model's weights; None takes the package's own, or BF16 where it is packed."""
        self.package, self.info = package, package.info
        self.dtype = dtype or PRECISIONS.get(self.info.precision, "BF16")
        self._bias = dict(zip(self.info.layers, bias, strict=True))

    def rows(self, layer: int) -> Tensor:
        return self.package.files.read(gate_name(layer))

    def bias(self, layer: int) -> Tensor:
        return self._bias[layer]

    def parts(self, place: int, packed: Mapping[int, int | None]) -> Iterator[Part]:
        info = self.info
        for layer in info.layers:
            for e in range(info.experts):
                number, bits = place * info.experts + e, packed[layer]
                if bits:
                    size = packed_size(info.hidden, info.width, bits)
                    yield Part(packed_name(layer, number), "U8", (size,), partial(self._packed, layer, e, bits, size))
                    continue
                wide, narrow = (info.width, info.hidden), (info.hidden, info.width)
                for which, name in enumerate(plain_names(layer, number)):
                    yield Part(name, self.dtype, narrow if which == 2 else wide, partial(self._plain, layer, e, which))

    def _plain(self, layer: int, expert: int, which: int) -> Iterator[Tensor]:
        yield self._finite(self.package.expert(layer, expert)[which].to(TORCH_DTYPES[self.dtype]), layer, expert)

    def _packed(self, layer: int, expert: int, bits: int, size: int) -> Iterator[Tensor]:
        if bits == self.info.bits:
            yield self.package.files.read(packed_name(layer, expert))
            return
        yield from packed_mlp([partial(iter, [quantize_panels(part.float().contiguous(), bits)[0]])
                               for part in self.package.expert(layer, expert)], size)

    def _finite(self, tensor: Tensor, layer: int, expert: int) -> Tensor:
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self.package.path}: expert {layer}.{expert} is beyond what {self.dtype} can hold")
        return tensor
