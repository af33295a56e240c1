"""Expert packages: one named group of experts in one file, to be shared (docs/formats.md).

A package is a safetensors file. Its tensors are those that a grown model (convert/packages.py) has for one routing
group, numbered from expert 0, and its metadata is a JSON text with all there is to know of them: name, base, tokenizer,
licence, evidence, and the SHA-256 of every tensor. The SHA-256 of that text is beside it, perhaps with a signature of
it. The header is written in one way only, so that there is no byte of the file that is not checked.

A package comes from a stranger. Nothing is allocated before the sizes of the header, of all tensors and of the file
agree with each other; there is no path in it; every number is finite.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, shown
from ..files import parse_json, reading, to_json, write_atomically
from ..ops import panels
from ..settings import is_int, is_number
from .files import TORCH_DTYPES, TensorFiles, file_header
from .identity import digest_of
from .names import PAGE
from .signatures import check_signature, sign, trusted_keys

FORMAT = 1
PRECISIONS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # and the packed ones
BITS = {"nf4": 4, "int8": 8}
_HEADER = 1 << 26  # bytes at most
_ALIGN = 64  # where the data begin
_NAME = re.compile(r"\w[\w-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PackageInfo:
    """What a package says of itself.

    base: the fingerprint of the model without groups. tokenizer: its tokenizer's, None without one. precision: of the
    experts: float32, bfloat16, float16, nf4 or int8. layers, experts, width, hidden: the layers with experts, how many
    each has, their FFN's width, the model's. card: figures and text for people. evidence, measured: the atlas entry.
    tensors: name -> SHA-256, as in fingerprints.
    """

    name: str
    base: str
    tokenizer: str | None
    precision: str
    layers: tuple[int, ...]
    experts: int
    width: int
    hidden: int
    license: str
    card: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def need(key: str, rule: str, holds: bool) -> None:
            if not holds:
                raise CheckpointError(f"{key} = {shown(getattr(self, key))}: must be {rule}")

        def count(value: Any, least: int, most: int) -> bool:
            return is_int(value) and least <= value <= most

        def numbers(value: object) -> bool:
            return isinstance(value, Mapping) and all(map(is_number, value.values()))

        named = isinstance(self.name, str) and bool(_NAME.fullmatch(self.name))
        need("name", "1 to 64 letters, digits, _ and -", named)
        need("base", "a SHA-256", is_sha256(self.base))
        need("tokenizer", "a SHA-256 or null", self.tokenizer is None or is_sha256(self.tokenizer))
        need("precision", f"one of {', '.join((*PRECISIONS, *BITS))}",
             isinstance(self.precision, str) and self.precision in (*PRECISIONS, *BITS))
        need("layers", "the numbers of layers that follow each other",
             bool(self.layers) and all(count(layer, 0, 4095) for layer in self.layers)
             and list(self.layers) == list(range(self.layers[0], self.layers[0] + len(self.layers))))
        need("experts", "an integer from 2 to 65536", count(self.experts, 2, 1 << 16))
        need("width", "an integer from 1 to 1048576", count(self.width, 1, 1 << 20))
        need("hidden", "an integer from 1 to 1048576", count(self.hidden, 1, 1 << 20))
        need("license", "a text of 1 to 200 characters", isinstance(self.license, str) and 0 < len(self.license) <= 200)
        need("card", "an object", isinstance(self.card, Mapping))
        need("evidence", "an object of finite numbers", numbers(self.evidence))
        need("measured", "an object or null", self.measured is None or isinstance(self.measured, Mapping))
        need("tensors", "an object of SHA-256s",
             isinstance(self.tensors, Mapping) and all(is_sha256(v) for v in self.tensors.values()))

    @property
    def bits(self) -> int | None:
        return BITS.get(self.precision)

    def shapes(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Name of every tensor -> (the dtypes it may have, shape)."""
        out: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        wide, narrow = (self.width, self.hidden), (self.hidden, self.width)
        for layer in self.layers:
            for e in range(self.experts):
                if self.bits:
                    out[packed_name(layer, e)] = ("U8",), (packed_size(self.hidden, self.width, self.bits),)
                else:
                    shapes = zip(plain_names(layer, e), (wide, wide, narrow), strict=True)
                    out |= {name: ((PRECISIONS[self.precision],), shape) for name, shape in shapes}
            out[gate_name(layer)] = tuple(PRECISIONS.values()), (self.experts, self.hidden)
            out[bias_name(layer)] = ("F32",), (self.experts,)
        return out

    def text(self) -> str:
        """The JSON text in the file, whose SHA-256 identifies the package."""
        return to_json({"format": FORMAT} | asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> PackageInfo:
        """Read `text`. Raises CheckpointError (a ValueError) naming the key and its rule."""
        keys = parse_json(text)
        if (version := keys.pop("format", None)) != FORMAT or isinstance(version, bool):
            raise CheckpointError(f"format = {shown(version)}: this program reads {FORMAT}")
        if odd := sorted({*cls.__dataclass_fields__} ^ {*keys}):
            raise CheckpointError(f"{odd[0]!r:.60}: {'is no key of a package' if odd[0] in keys else 'is missing'}")
        layers = keys.pop("layers")
        return cls(**keys, layers=tuple(layers) if isinstance(layers, list) else ())


def is_sha256(value: object) -> bool:
    return isinstance(value, str) and bool(_HEX.fullmatch(value))


def plain_names(layer: int, expert: int) -> list[str]:
    """Names of an expert's weights: gate, up and down."""
    stem = f"model.layers.{layer}.mlp.experts.{expert}"
    return [f"{stem}.{part}_proj.weight" for part in ("gate", "up", "down")]


def packed_name(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.packed"


def gate_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def bias_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"


def packed_size(hidden: int, width: int, bits: int) -> int:
    return -(-panels.mlp_bytes(hidden, width, bits) // PAGE) * PAGE


class Signature(NamedTuple):
    """Who signed a package. key: in hexadecimal; file: that of the trusted key, None for an untrusted key."""

    key: str
    file: Path | None


@dataclass(frozen=True, eq=False)
class ExpertPackage:
    """An open package, whole and checked. sha256: of its text; files: its tensors."""

    path: Path
    info: PackageInfo
    sha256: str
    signature: Signature | None
    files: TensorFiles

    @property
    def trusted(self) -> bool:
        return self.signature is not None and self.signature.file is not None

    @property
    def signer(self) -> str:
        """For people: who signed it, as far as that is known."""
        if self.signature is None:
            return "unsigned"
        key, file = self.signature
        return f"signed by {file.stem}" if file else f"unsigned: its key {key} is not one that you trust"

    def expert(self, layer: int, expert: int) -> list[Tensor]:
        """gate, up [I, H] and down [H, I] of an expert, in float32 where it is packed."""
        info = self.info
        if not info.bits:
            return [self.files.read(name) for name in plain_names(layer, expert)]
        packed = self.files.read(packed_name(layer, expert))
        return [part.dequantize() for part in panels.unpack_mlp(packed, info.hidden, info.width, info.bits)]

    def check_fits(self, config: ModelConfig) -> None:
        """Raises CheckpointError unless the group can stand in a model of this width, depth and FFN."""
        info, layers = self.info, config.num_hidden_layers
        if info.hidden != config.hidden_size or info.layers[-1] != layers - 1:
            raise CheckpointError(f"{self.path}: {info.name}: is for {info.layers[-1] + 1} layers of width "
                                  f"{info.hidden}, the model has {layers} of {config.hidden_size}")
        if config.intermediate_size % info.width:
            raise CheckpointError(f"{self.path}: {info.name}: experts of width {info.width}: must divide the FFN's "
                                  f"({config.intermediate_size})")


# ---- reading --------------------------------------------------------------------------------------------------------


def read_package(
    path: str | Path, *, trust: Sequence[str | Path] = (), require_signature: bool = False
) -> ExpertPackage:
    """Open a package and check every byte of it. trust: PEM files of public keys, beside those of the user's key
    folder. require_signature: by one of these.

    Raises NotFoundError, or CheckpointError naming the file and what is wrong: another format, an altered byte, tensors
    that are not what the text says, numbers that are not finite, a wrong signature.
    """
    path = Path(path).expanduser()
    with reading(path, CheckpointError):
        begin, entries, meta = _header_of(path)
        text = meta.pop("package")
        key, signature, stated = (meta.pop(name, None) for name in ("key", "signature", "sha256"))
        if meta.pop("format", None) != "pt" or meta or (key is None) != (signature is None):
            raise ValueError("not an expert package: its metadata must be format, package, sha256, and perhaps key and "
                             "signature")
        if hashlib.sha256(text.encode()).hexdigest() != stated:
            raise ValueError("altered: the SHA-256 of its text is not the one beside it")
        info = PackageInfo.parse(text)
        if info.text() != text:
            raise ValueError("not an expert package: its text is not written as docs/formats.md says")
        _check_sizes(info, entries, path.stat().st_size - begin)
    signed = None
    if key is not None and signature is not None:
        check_signature(text, key, signature, path)
        signed = Signature(key, trusted_keys(trust).get(key))
    elif trust:
        trusted_keys(trust)  # a wrong key file is said in any case
    package = ExpertPackage(path, info, stated, signed, TensorFiles(path.parent, verify=False, names=(path.name,)))
    if require_signature and not package.trusted:
        raise CheckpointError(f"{path}: {info.name}: {package.signer}: the signature of a trusted key is required")
    _check_tensors(package)
    return package


def _header_of(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(where the data begins, the tensors' entries, the metadata). Raises ValueError."""
    if not path.is_file():
        path.stat()
        raise ValueError("not an expert package: must be a file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER, path.stat().st_size - 8):
            raise ValueError("not an expert package: not a whole safetensors file")
        raw = file.read(length)
    try:
        entries = parse_json(raw.decode("ascii"))
    except UnicodeDecodeError:
        raise ValueError("altered: its header is not ASCII") from None
    meta = entries.get("__metadata__")
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise ValueError("not an expert package: it has no metadata")
    if "package" not in meta:
        raise ValueError("not an expert package: its metadata say nothing of one")
    if file_header(entries, _ALIGN) != len(raw).to_bytes(8, "little") + raw:
        raise ValueError("altered: its header is not written as docs/formats.md says")
    return 8 + length, {name: entry for name, entry in entries.items() if name != "__metadata__"}, dict(meta)


def _check_sizes(info: PackageInfo, entries: Mapping[str, Any], size: int) -> None:
    """Raises ValueError unless header, text and size of the file agree."""
    want = len(info.layers) * (info.experts * (1 if info.bits else 3) + 2)
    if len(entries) != want:
        raise ValueError(f"{len(entries)} tensors: must be {want}, for {info.experts} experts in each of "
                         f"{len(info.layers)} layers")
    shapes, end = info.shapes(), 0
    if odd := sorted({*shapes} ^ {*info.tensors}) or sorted({*shapes} ^ {*entries}):
        raise ValueError(f"{odd[0]!r:.80}: {'is missing' if odd[0] in shapes else 'is no tensor of such a package'}")
    kinds = {name: entry.get("dtype") if isinstance(entry, dict) else None for name, entry in entries.items()}
    if list(entries) != _ordered(kinds):
        raise ValueError("its tensors are not in their order")
    for name, entry in entries.items():
        dtypes, shape = shapes[name]
        if kinds[name] not in dtypes or entry.get("shape") != list(shape):
            found = f"{shown(kinds[name])} {shown(entry.get('shape'))}" if isinstance(entry, dict) else shown(entry)
            raise ValueError(f"{name} is {found}: must be {' or '.join(dtypes)} {list(shape)}")
        stop = end + math.prod(shape) * TORCH_DTYPES[entry["dtype"]].itemsize
        if {**entry} != {"dtype": entry["dtype"], "shape": list(shape), "data_offsets": [end, stop]}:
            raise ValueError(f"{name}: {shown(entry)}: must lie at {[end, stop]}")
        end = stop
    if end != size:
        raise ValueError(f"truncated or altered: its tensors are {end:,} bytes, {size:,} are there")


def _ordered(dtypes: Mapping[str, Any]) -> list[str]:
    """Names as the file has them: by falling size of the elements, so that each is aligned to its element."""
    sizes = {name: TORCH_DTYPES[kind].itemsize if isinstance(kind, str) and kind in TORCH_DTYPES else 0
             for name, kind in dtypes.items()}
    return sorted(dtypes, key=lambda name: (-sizes[name], name))


def _check_tensors(package: ExpertPackage) -> None:
    """Raises CheckpointError for a tensor with another SHA-256, or numbers that are not finite."""
    info, files = package.info, package.files
    for name, stated in info.tensors.items():
        tensor = files.read(name)
        if digest_of(tensor.dtype, tuple(tensor.shape), [tensor]) != stated:
            raise CheckpointError(f"{package.path}: altered: the SHA-256 of {name} is not the one of its text")
        steps = [tensor] if tensor.dtype != torch.uint8 else [
            part.step_O for part in panels.unpack_mlp(tensor, info.hidden, info.width, info.bits or 4)]
        if not all(bool(part.isfinite().all()) for part in steps):
            raise CheckpointError(f"{package.path}: {name} holds values that are not finite")


# ---- writing --------------------------------------------------------------------------------------------------------


def write_package(
    path: str | Path, info: PackageInfo, tensors: Mapping[str, Tensor], *, key: str | Path | None = None
) -> ExpertPackage:
    """Write a package, whole or not at all, and read it back. tensors: those of `info.shapes()`; the hashes in `info`
    are filled in. key: a PEM file of an Ed25519 private key to sign with.

    Raises ConfigError for a key file that is none, CheckpointError for what `read_package` would refuse.
    """
    spelt = {kind: name for name, kind in TORCH_DTYPES.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
    info = replace(info, tensors={name: digest_of(tensor.dtype, tuple(tensor.shape), [tensor])
                                  for name, tensor in sorted(tensors.items())})
    text = info.text()
    meta = {"format": "pt", "package": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if key is not None:
        meta["key"], meta["signature"] = sign(text, key)
    entries: dict[str, Any] = {"__metadata__": dict(sorted(meta.items()))}
    end = 0
    order = _ordered({name: spelt[tensor.dtype] for name, tensor in tensors.items()})
    for name in order:
        tensor = tensors[name]
        entries[name] = {"dtype": spelt[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    try:
        _check_sizes(info, {name: entries[name] for name in order}, end)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if Path(path).is_dir():
        raise ConfigError(f"out = {path}: must be a file, this is a folder")
    data = (tensors[name].flatten().view(torch.uint8).numpy().tobytes() for name in order)
    write_atomically(path, b"".join([file_header(entries, _ALIGN), *data]))
    return read_package(path)
