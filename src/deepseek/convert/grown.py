"""Grown models: a base with the routing groups of expert packages in it, and the folder of such a model.

The layers of a grown model from some k on are MoE layers. Their dense FFN is the shared expert, every package is a
routing group. A token goes to one group (topk_group 1), to all its experts (num_experts_per_tok), with their raw
sigmoid scores for weights (norm_topk_prob false): a group that is not concerned adds next to nothing.

The folder is a function of the base and of the packages in their order. The base's tensors lie in its own files, of
which the headers alone are others (`mlp.gate_proj` is `mlp.shared_experts.gate_proj`); each group has a file
(`experts-01.safetensors`, …), all gates one (`gates.safetensors`). What the base had in their place lies in the folder
`base`, so that the last removal gives back every file, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..atlas import Atlas, ExpertUsage, NamedGroup
from ..atlas.atlas import FILE as ATLAS
from ..atlas.atlas import Shape, measurement_of
from ..checkpoint import (
    EXPERT_USE,
    INDEX,
    MANIFEST,
    PAGE,
    TORCH_DTYPES,
    check_tensors,
    fingerprint,
    load_model,
    open_checkpoint,
    quantized_targets,
    resolve,
    stored_dtype,
    stored_fingerprint,
    tensor_hashes,
)
from ..checkpoint.files import file_header
from ..checkpoint.identity import source_of
from ..checkpoint.packages import PackageInfo, bias_name, gate_name, is_sha256, packed_name, plain_names
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, DataError, NotFoundError, nearest, shown
from ..files import read_json, replace_folder, sha256, to_json, write_json
from ..ids import ExpertId, ExpertSet
from ..interrupts import kept
from ..model import CausalLM
from ..quant.linear import QuantConfig
from ..tokenizer import Tokenizer
from .dequantizing import plain_keys
from .writing import GROWN, Part, check_inside, write_file

FORMAT = 1
BASE = "base"  # the folder of the base's own versions of replaced files
GATES = "gates.safetensors"
_REPLACED = ("config.json", INDEX, MANIFEST, EXPERT_USE, ATLAS)  # beside the weights
_EXPERTS = re.compile(r"experts-\d+\.safetensors")
_COPY = 1 << 24  # bytes at a time


@dataclass(frozen=True)
class Group:
    """An installed package. info: as the package has it, without the hashes; bias: its own, a row a layer; signer: for
    people; calibrated: tokens of general text that its bias was set on, 0 where it is the package's own."""

    info: PackageInfo
    sha256: str
    signer: str
    bias: tuple[tuple[float, ...], ...]
    calibrated: int

    @classmethod
    def parse(cls, keys: Any) -> Group:
        """Raises ValueError, KeyError or TypeError."""
        info = PackageInfo.parse(to_json({"format": 1, "tensors": {}} | keys["info"], sort_keys=True))
        bias = tuple(tuple(map(float, row)) for row in keys["bias"])
        if [len(row) for row in bias] != [info.experts] * len(info.layers) or not is_sha256(keys["sha256"]):
            raise ValueError(f"group {info.name}: must have a SHA-256, and a bias for every expert")
        return cls(info, keys["sha256"], str(keys["signer"]), bias, int(keys["calibrated"]))

    def to_dict(self) -> dict[str, Any]:
        keys = asdict(self)
        del keys["info"]["tensors"]
        return keys


@dataclass(frozen=True)
class Grown:
    """experts.json. base: the fingerprint of the base without groups; source: that of the checkpoint which a quantized
    or rounded base was made from; weights: its files and their SHA-256."""

    base: str
    source: str | None
    tokenizer: str | None
    weights: Mapping[str, str]
    groups: tuple[Group, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Grown | None:
        """None where there is none. Raises CheckpointError for one that is damaged."""
        file = folder / GROWN
        if not file.exists():
            return None
        keys = read_json(file, CheckpointError, "not a list of packages")
        try:
            if keys["format"] != FORMAT:
                raise ValueError(f"format = {shown(keys['format'])}: this program reads {FORMAT}")
            groups = tuple(map(Group.parse, keys["groups"]))
            base, source, tokenizer, weights = (keys[key] for key in ("base", "source", "tokenizer", "weights"))
            hashes = all(value is None or is_sha256(value) for value in (source, tokenizer)) and is_sha256(base)
            if not groups or not hashes or not all(
                    is_sha256(value) and Path(name).name == name and name.endswith(".safetensors")
                    for name, value in weights.items()):
                raise ValueError("base, source, tokenizer and weights must be SHA-256s, and there must be groups")
            if len({grown_shape(group.info) for group in groups}) > 1:
                raise ValueError("its groups are of several shapes")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            why = str(error) if type(error) is ValueError or isinstance(error, CheckpointError) else repr(error)
            raise CheckpointError(f"{file}: not a list of packages: {why:.300}") from None
        return cls(base, source, tokenizer, weights, groups)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT} | asdict(self) | {"groups": [group.to_dict() for group in self.groups]}

    @property
    def names(self) -> list[str]:
        return [group.info.name for group in self.groups]

    def place(self, name: str, folder: Path) -> int:
        """Raises ConfigError listing the names there are."""
        if name not in self.names:
            raise ConfigError(f"{folder}: no package {name!r:.60} is installed; there are {', '.join(self.names)}"
                              f"{nearest(name, self.names)}")
        return self.names.index(name)


def grown_shape(info: PackageInfo) -> tuple[tuple[int, ...], int, int]:
    """What all packages of a model have in common: layers, experts in each, their width."""
    return info.layers, info.experts, info.width


class GrownModel:
    """A model's folder, open and checked: a base, or one grown of it."""

    def __init__(self, model: str | Path, *, verify: bool | None = None) -> None:
        """verify: as in `load_model`."""
        self.folder = resolve(model)
        self.config, self.quant, self.files = open_checkpoint(self.folder, verify=verify)
        self.grown = Grown.read(self.folder)
        config = self.config
        if self.grown is None:
            if config.moe_layers or config.num_nextn_predict_layers or config.model_type != "deepseek_v3":
                raise CheckpointError(
                    f"{self.folder}: has routed experts that came from no package, or MTP modules, or is no "
                    "deepseek_v3: packages go into a model whose layers are all dense, or that has packages already (a "
                    "conversion of a grown model is none: convert the base, and install the packages again)")
            if (self.folder / BASE).exists():
                raise CheckpointError(f"{self.folder / BASE}: is in the way: the name is kept for the base's files")
        else:
            count = len(self.grown.groups)
            want, _ = grown_config(config, self.quant, self.grown.groups[0].info, count, self.folder)
            if want != config:
                raise CheckpointError(f"{self.folder / GROWN}: config.json is not that of {count} packages of "
                                      f"{self.grown.groups[0].info.experts} experts")

    def need_grown(self) -> Grown:
        if self.grown is None:
            raise ConfigError(f"{self.folder}: no packages are installed")
        return self.grown


def grown_config(
    config: ModelConfig, quant: QuantConfig | None, info: PackageInfo, count: int, what: object
) -> tuple[ModelConfig, QuantConfig | None]:
    """The configuration of a base, or of a model grown of it, with `count` groups such as `info` describes. Raises
    CheckpointError naming `what` where a quantized base's `keep` says other things of the shared experts."""
    grown = config.with_(
        first_k_dense_replace=info.layers[0], moe_layer_freq=1, n_routed_experts=count * info.experts,
        num_experts_per_tok=info.experts, n_group=count, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0,
        moe_intermediate_size=info.width, n_shared_experts=config.intermediate_size // info.width,
        topk_method="noaux_tc", scoring_func="sigmoid")
    if quant is None or config.moe_layers:
        return grown, quant
    dense, model = CausalLM.on_meta(config), CausalLM.on_meta(grown)
    packed = {target.module for target in quantized_targets(dense, quant)}
    plain = [layer for layer in info.layers if f"model.layers.{layer}.mlp" not in packed]
    keep = (*quant.keep, *(f"model.layers.{layer}.mlp.shared_experts.*" for layer in plain))
    quant = replace(quant, keep=tuple(dict.fromkeys(keep)))
    after = {target.module for target in quantized_targets(model, quant)}
    for layer in info.layers:
        if (f"model.layers.{layer}.mlp.shared_experts" in after) == (layer in plain):
            raise CheckpointError(f"{what}: quantization_config.keep = {list(quant.keep)}: keeps the shared experts of "
                                  f"layer {layer}, whose FFN is packed: quantize the base with other patterns")
    return grown, quant


# ---- a group's tensors ---------------------------------------------------------------------------------------------


class Contents(Protocol):
    """The tensors of a group that is to be written. place: where the group stands in the model now, None outside."""

    @property
    def place(self) -> int | None: ...

    @property
    def info(self) -> PackageInfo: ...

    def rows(self, layer: int) -> Tensor:
        """The gate's, [experts, H]."""

    def bias(self, layer: int) -> Tensor:
        """The experts', [experts]."""

    def parts(self, place: int, packed: Mapping[int, int | None]) -> Iterator[Part]:
        """The experts at `place` in the new model. packed: bits of every layer's experts, None for plain ones."""


class Held:
    """Those of an installed group, at its place in the model."""

    def __init__(self, there: GrownModel, place: int) -> None:
        self.files, self.place, self.info = there.files, place, there.need_grown().groups[place].info
        self.config, self.quant = there.config, there.quant

    def packed(self, layer: int) -> int | None:
        """The bits of the layer's experts, None where they are plain."""
        first = self.place * self.info.experts
        return self.quant.bits if self.quant and packed_name(layer, first) in self.files else None

    def names(self, layer: int, expert: int, place: int) -> list[str]:
        """Names of an expert's tensors when its group is at `place`."""
        number = place * self.info.experts + expert
        return [packed_name(layer, number)] if self.packed(layer) else plain_names(layer, number)

    def rows(self, layer: int) -> Tensor:
        return self._own(gate_name(layer))

    def bias(self, layer: int) -> Tensor:
        return self._own(bias_name(layer))

    def _own(self, name: str) -> Tensor:
        return self.files.read(name).unflatten(0, (-1, self.info.experts))[self.place]

    def parts(self, place: int, packed: Mapping[int, int | None]) -> Iterator[Part]:
        for layer in self.info.layers:
            for e in range(self.info.experts):
                for old, new in zip(self.names(layer, e, self.place), self.names(layer, e, place), strict=True):
                    yield Part(new, self.files.dtype(old), self.files.shape(old), lambda old=old: iter(  # type: ignore[misc]
                        [self.files.read(old)]))


# ---- the folder -----------------------------------------------------------------------------------------------------


def start(there: GrownModel, source: str | None = None) -> Grown:
    """What a base notes of itself at its first package. source: the fingerprint of the checkpoint that a plain base was
    rounded from; a quantized one says that itself."""
    files, config = there.files, there.config
    weights = sorted({files.file(name) for name in files})
    if taken := [file.name for file in weights if file.name == GATES or _EXPERTS.fullmatch(file.name)]:
        raise CheckpointError(f"{there.folder / taken[0]}: is in the way: the name is kept for experts of packages")
    try:
        tokenizer = Tokenizer.load(there.folder).fingerprint
    except NotFoundError:
        tokenizer = None
    if there.quant is None:
        check_tensors(CausalLM.on_meta(config), files)
        base = stored_fingerprint(config, files, stored_dtype(files))
    else:
        model = load_model(there.folder, verify=False)  # opening it has compared what there is
        base, source = fingerprint(tensor_hashes(model), model.config), source_of(model)
    return Grown(base, source, tokenizer, {file.name: sha256(file) for file in weights})


def write_model(target: Path, there: GrownModel, grown: Grown, contents: Sequence[Contents]) -> None:
    """Write the model with these groups; with none, the base."""
    folder = there.folder
    ours = {"config.json", INDEX, MANIFEST, GROWN, GATES, BASE, EXPERT_USE, ATLAS, *grown.weights,
            *map(weight_file, grown.weights)}
    linked = target.exists() and target.resolve() == folder.resolve()
    with kept(f"{target} is as it was"), replace_folder(target) as staging:
        for path in folder.iterdir():
            if path.name not in ours and not _EXPERTS.fullmatch(path.name):
                _clone(path, staging / path.name, folder, linked)
        if contents:
            _write_grown(staging, there, grown, contents, linked)
        else:
            _write_base(staging, there, grown)


def _write_base(staging: Path, there: GrownModel, grown: Grown) -> None:
    for name in _REPLACED:
        if (path := there.folder / BASE / name).is_file():
            check_inside(there.folder, path)
            shutil.copyfile(path, staging / name)
    for name, stated in grown.weights.items():
        with (staging / name).open("wb") as file:
            file.writelines(restored(there, name))
        if sha256(staging / name) != stated:
            raise CheckpointError(f"{there.folder / weight_file(name)}: altered: it would not be the base's file")


def restored(there: GrownModel, name: str) -> Iterator[bytes]:
    """The bytes of the base's weight file: its own header, the data that are here."""
    yield (there.folder / BASE / f"{name}.header").read_bytes()
    yield from _data(there.folder / weight_file(name))


def weight_file(name: str) -> str:
    """What a weight file of the base is called in a grown model. Of a folder with model.safetensors transformers reads
    this file alone."""
    return "base.safetensors" if name == "model.safetensors" else name


def _data(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(int.from_bytes(stream.read(8), "little"), os.SEEK_CUR)
        while chunk := stream.read(_COPY):
            yield chunk


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def _write_grown(
    staging: Path, there: GrownModel, grown: Grown, contents: Sequence[Contents], linked: bool
) -> None:
    folder, info, count = there.folder, contents[0].info, len(contents)
    config, quant = grown_config(there.config, there.quant, info, count, folder)
    weight_map: dict[str, str] = {}
    sizes = 0

    def entered(name: str) -> None:
        nonlocal sizes
        header = json.loads(_header(staging / name)[8:])
        header.pop("__metadata__", None)
        weight_map.update(dict.fromkeys(header, name))
        sizes += sum(stop - start for start, stop in (entry["data_offsets"] for entry in header.values()))

    if there.grown is None:
        (staging / BASE).mkdir()
        for name in _REPLACED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / BASE / name)
        for name in grown.weights:
            header = _header(folder / name)
            (staging / BASE / f"{name}.header").write_bytes(header)
            with (staging / weight_file(name)).open("wb") as file:
                file.write(_as_shared(header, info.layers[0]))
                file.writelines(_data(folder / name))
    else:
        for name in (BASE, *map(weight_file, grown.weights)):
            _clone(folder / name, staging / name, folder, linked)
    for name in map(weight_file, grown.weights):
        entered(name)
    targets = {target.module for target in quantized_targets(CausalLM.on_meta(config), quant)} if quant else set()
    packed = {layer: quant.bits if quant and f"model.layers.{layer}.mlp.experts" in targets else None
              for layer in info.layers}
    for place, content in enumerate(contents):
        name = f"experts-{place + 1:02d}.safetensors"
        if content.place == place:
            _clone(folder / name, staging / name, folder, linked)
        else:
            parts = sorted(content.parts(place, packed), key=lambda part: part.rank)
            write_file(staging / name, parts, lambda _: None)
        entered(name)
    write_file(staging / GATES, _gates(contents, plain_dtype(there) or "F32"), lambda _: None)
    entered(GATES)
    write_json(staging / INDEX, {"metadata": {"total_size": sizes}, "weight_map": weight_map})
    if quant is None:
        keys = plain_keys(config, str(stored_dtype(there.files)).removeprefix("torch."))
    else:
        keys = config.to_dict() | {"quantization_config": quant.to_dict()}
    write_json(staging / "config.json", keys)
    write_json(staging / GROWN, grown.to_dict())
    _write_manifest(staging, folder)
    old = [None if content.place is None else content.place * info.experts + e
           for content in contents for e in range(info.experts)]
    _atlas(there, grown, config, old).save(staging / ATLAS)
    _write_use(staging, there, old)


def _as_shared(header: bytes, first: int) -> bytes:
    """The header of a base's file with the FFNs of layers from `first` on as shared experts."""
    def renamed(name: str) -> str:
        match = re.match(r"(model\.layers\.(\d+)\.mlp\.)(.+)", name)
        return f"{match[1]}shared_experts.{match[3]}" if match and int(match[2]) >= first else name

    return file_header({renamed(name): entry for name, entry in json.loads(header[8:]).items()}, PAGE)


def _gates(contents: Sequence[Contents], dtype: str) -> list[Part]:
    info, count = contents[0].info, len(contents) * contents[0].info.experts
    parts = []
    for layer in info.layers:
        rows = torch.cat([content.rows(layer).to(TORCH_DTYPES[dtype]) for content in contents])
        bias = torch.cat([content.bias(layer).float() for content in contents])
        parts += [Part(gate_name(layer), dtype, (count, info.hidden), partial(iter, [rows])),
                  Part(bias_name(layer), "F32", (count,), partial(iter, [bias]))]
    return sorted(parts, key=lambda part: part.rank)


def plain_dtype(there: GrownModel) -> str | None:
    """Of a plain model's weights, as safetensors spells it."""
    own = stored_dtype(there.files)
    return None if there.quant else next(name for name, kind in TORCH_DTYPES.items() if kind == own)


def _atlas(there: GrownModel, grown: Grown, config: ModelConfig, old: Sequence[int | None]) -> Atlas:
    """The model's atlas with the groups as they are now."""
    file = there.folder / ATLAS
    atlas = Atlas(Shape.of(there.config), [])
    if there.grown is not None and file.is_file():
        atlas = Atlas.load(file)
        if atlas.shape != Shape.of(there.config):
            raise CheckpointError(f"{file}: is of another model: {atlas.shape}; this one has {Shape.of(there.config)}")
    before = set() if there.grown is None else {*there.grown.names}
    if taken := [name for name in grown.names if name in atlas and name not in before]:
        raise ConfigError(f"{file}: names other experts {taken[0]!r}: no package of that name can stand beside them")
    gone = ", ".join(before - {*grown.names})
    atlas = atlas.renumbered(config, old, f"some of its experts were those of {gone}, which was removed")
    size, groups = grown.groups[0].info.experts, [*atlas.groups]
    for place, group in enumerate(grown.groups):
        if group.info.name not in atlas:
            experts = ExpertSet(ExpertId(layer, place * size + e) for layer in group.info.layers for e in range(size))
            try:
                measured = measurement_of(group.info.measured)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{group.info.name}: measured is not what an atlas has: {error!r:.100}") from None
            groups.append(NamedGroup(group.info.name, "built-in", experts, (), group.info.evidence, measured))
    return Atlas(atlas.shape, groups, atlas.refused)


def _write_use(staging: Path, there: GrownModel, old: Sequence[int | None]) -> None:
    """Recorded use goes along with its experts; one that is of no such model is left as it is, as everywhere."""
    file = there.folder / EXPERT_USE
    if there.grown is None or not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        use = ExpertUsage.from_json(text)
    except DataError:
        use = None
    if use is not None and (use.layers, use.experts) == (there.config.moe_layers, there.config.n_routed_experts):
        text = use.renumbered(old).to_json()
    (staging / EXPERT_USE).write_text(text, encoding="utf-8")


def _clone(source: Path, target: Path, folder: Path, linked: bool) -> None:
    """The same file or folder at `target`; linked: the old one is going to be removed."""
    if source.is_symlink() and linked:
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _clone(path, target / path.name, folder, linked)
    else:
        check_inside(folder, source)
        try:
            if not linked:
                raise OSError
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _write_manifest(staging: Path, folder: Path) -> None:
    """Of all files that do not change with use. What is linked to a file of the old model has its entry."""
    known = read_json(folder / MANIFEST, CheckpointError).get("files", {}) if (folder / MANIFEST).is_file() else {}
    entries = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file() and not path.is_symlink()):
        name = str(path.relative_to(staging))
        linked = name in known and (folder / name).is_file() and path.samefile(folder / name)
        entries[name] = known[name] if linked else {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(staging / MANIFEST, {"format": 1, "files": entries})
