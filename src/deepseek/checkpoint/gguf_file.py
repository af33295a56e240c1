"""A GGUF file (llama.cpp's format) of a dense model as a checkpoint in Hugging Face's layout: configuration, tensors,
tokenizer. Quantized weights come out dequantized, some rows at a time.

    file      "GGUF", version, number of tensors, number of fields; fields (name, type, value); tensors (name,
              dimensions, the innermost first, type, offset); from the next multiple of the alignment on their data
    q and k   of Llama's architecture have their rows in rotary pairs (i, i + d/2), which is undone here
    RoPE      of Llama 3.1 lies in a tensor of divisors (rope_freqs.weight)
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from ..errors import CheckpointError, NotFoundError, printable, shown
from .gguf_tokenizer import tokenizer_files

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DIVISORS = "rope_freqs.weight"
# of a model's fields, those that are read, and those that change nothing
_READ = frozenset(
    "block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv "
    "attention.key_length attention.value_length attention.layer_norm_rms_epsilon attention.sliding_window "
    "rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.attn_factor vocab_size "
    "rope.scaling.original_context_length rope.scaling.finetuned tensor_data_layout".split())


class _Stored(NamedTuple):
    """A tensor in the file. shape: as torch has it; row: bytes of a row."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row: int


class GGUFFile:
    """The tensors of a GGUF file under Hugging Face's names; `keys`: what its config.json would say; `texts`: the JSON
    files of its tokenizer, by name.

    Raises CheckpointError naming the file for what is truncated, altered or unknown here.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path  # as messages name it
        if not path.is_file():
            raise NotFoundError(f"{path}: no such file")
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._fields, stored = _Header(data).read()
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not a whole GGUF file: {printable(str(error))}") from None
        self.architecture = str(self._fields.get("general.architecture"))
        self._tensors = {_hf_name(name): tensor for name, tensor in stored.items()}
        self.keys = self._config()
        self._tensors.pop(_DIVISORS, None)
        self.texts = tokenizer_files(self._fields, path)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """As GGUF spells it: F32, F16, BF16, Q4_0, …"""
        return self._tensors[name].kind.name

    def file(self, name: str) -> Path:
        return self.folder

    def check_plain(self, name: str) -> None:
        """Raises CheckpointError unless the tensor can be dequantized."""
        try:
            self._rows(self._tensors[name], 0, 1)
        except NotImplementedError:
            raise CheckpointError(f"{self.folder}: {name} is {self.dtype(name)}: not read here") from None

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows start..stop of a tensor, dequantized, read from the file and not mapped."""
        tensor = self._tensors[name]
        if self.architecture == "llama" and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
            width = self.keys["head_dim"]
            first, last = start // width * width, -(-stop // width) * width
            rows = self._rows(tensor, first, min(last, tensor.shape[0]))
            rows = rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)[start - first : stop - first]
        else:
            rows = self._rows(tensor, start, min(stop, tensor.shape[0]))
        return rows if dtype is None else rows.to(dtype)

    def _rows(self, tensor: _Stored, start: int, stop: int) -> Tensor:
        count, (_, *rest) = stop - start, tensor.shape
        data = torch.empty(count * tensor.row, dtype=torch.uint8)
        with self.folder.open("rb") as file:
            file.seek(tensor.offset + start * tensor.row)
            if file.readinto(data.numpy().data) != len(data):
                raise CheckpointError(f"{self.folder}: the file has shrunk")
        if (plain := _PLAIN.get(tensor.kind.name)) is not None:
            return data.view(plain).view(count, *rest)
        return torch.from_numpy(dequantize(data.view(count, -1).numpy(), tensor.kind)).view(count, *rest)

    # ---- configuration -------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        """The keys of config.json."""
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(f"{self.folder}: general.architecture = {shown(self.architecture)}: must be one of "
                                  f"{', '.join(ARCHITECTURES)}")
        prefix = f"{self.architecture}."
        fields = {name.removeprefix(prefix): value for name, value in self._fields.items() if name.startswith(prefix)}
        if odd := sorted(name for name, value in fields.items() if name not in _READ and value):
            raise CheckpointError(f"{self.folder}: {prefix}{odd[0]} = {shown(fields[odd[0]])}: is not known here and "
                                  "may change what the model computes")
        for name in ("embedding_length", "attention.head_count", "feed_forward_length", "block_count",
                     "context_length"):
            if not (type(fields.get(name)) is int and fields[name] > 0):
                raise CheckpointError(f"{self.folder}: {prefix}{name} = {shown(fields.get(name))}: must be a positive "
                                      "integer, the same for all layers")
        width = fields.get("attention.key_length", fields["embedding_length"] // fields["attention.head_count"])
        if type(width) is not int or width < 1:
            raise CheckpointError(f"{self.folder}: {prefix}attention.key_length = {shown(width)}: must be a positive "
                                  "integer")
        for name in ("attention.value_length", "rope.dimension_count"):
            if fields.get(name, width) != width:
                raise CheckpointError(f"{self.folder}: {prefix}{name} = {shown(fields[name])}: must be {width}, the "
                                      "width of a head")
        if "model.embed_tokens.weight" not in self._tensors:
            raise CheckpointError(f"{self.folder}: token_embd.weight is missing")
        tokens = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": fields["embedding_length"], "intermediate_size": fields["feed_forward_length"],
            "num_hidden_layers": fields["block_count"], "num_attention_heads": fields["attention.head_count"],
            "num_key_value_heads": fields.get("attention.head_count_kv"), "head_dim": width,
            "rms_norm_eps": _decimal(fields.get("attention.layer_norm_rms_epsilon", 1e-6)),
            "max_position_embeddings": fields["context_length"],
            "rope_theta": _decimal(fields.get("rope.freq_base", 10000.0)), "rope_scaling": self._scaling(fields, width),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "use_sliding_window": bool(fields.get("attention.sliding_window")),
            "sliding_window": fields.get("attention.sliding_window"),
            **{key: self._fields.get(f"tokenizer.ggml.{name}") for key, name in tokens.items()}}

    def _scaling(self, fields: Mapping[str, Any], width: int) -> dict[str, Any] | None:
        """rope_scaling."""
        kind, factor = fields.get("rope.scaling.type", "none"), fields.get("rope.scaling.factor")
        original = fields.get("rope.scaling.original_context_length", fields["context_length"])
        if _DIVISORS in self._tensors:
            if kind != "none" or self.shape(_DIVISORS) != (width // 2,):
                raise CheckpointError(f"{self.folder}: {_DIVISORS}: must have {width // 2} numbers and no other "
                                      f"scaling beside it (rope.scaling.type = {shown(kind)})")
            divisors = self._rows(self._tensors[_DIVISORS], 0, width // 2).tolist()
            return {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
        if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
            return None
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = original
        if fields.get("rope.scaling.attn_factor", 1.0) != 1.0:
            raise CheckpointError(f"{self.folder}: rope.scaling.attn_factor: must be 1")
        return scaling


def _decimal(value: Any) -> Any:
    """1e-05 of the float32 nearest to it."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    return f"{f'model.layers.{match[1]}.' if match[1] else ''}{_NAMES[match[2]]}.{match[3]}"


class _Header:
    """Reads the fields and tensors of a file; nothing that the file's size does not allow is allocated.

    Raises ValueError or struct.error.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, _Stored]]:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        if (version := self.number("I")) not in _VERSIONS:
            raise ValueError(f"version {version}: {' and '.join(map(str, _VERSIONS))} are read here")
        tensors, count = self.number("Q"), self.number("Q")
        fields = {}
        for _ in range(self.fitting(count, 13)):
            name = self.text()
            fields[name] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(self.fitting(tensors, 25))]
        step = fields.get("general.alignment", 32)
        if type(step) is not int or step < 1:
            raise ValueError(f"general.alignment = {step}: must be a positive integer")
        start = -(-self.at // step) * step
        out = {}
        for name, stored in found:
            stored = stored._replace(offset=start + stored.offset)
            if (end := stored.offset + stored.shape[0] * stored.row) > len(self.data):
                raise ValueError(f"{name} ends at byte {end:,} of {len(self.data):,}")
            if name in out:
                raise ValueError(f"{name} is there twice")
            out[name] = stored
        return fields, out

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def fitting(self, count: int, size: int) -> int:
        """A number of things of at least `size` bytes each."""
        if count * size > len(self.data) - self.at:
            raise ValueError(f"{count:,} entries do not fit behind byte {self.at:,} of {len(self.data):,}")
        return count

    def text(self) -> str:
        length = self.fitting(self.number("Q"), 1)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a field of type {kind} before byte {self.at:,}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            size = struct.calcsize(f"<{code}")
            values = struct.unpack_from(f"<{self.fitting(count, size)}{code}", self.data, self.at)
            self.at += count * size
            return list(values)
        if kind != _TEXT:
            raise ValueError(f"a list of type {kind} before byte {self.at:,}")
        return [self.text() for _ in range(self.fitting(count, 8))]

    def tensor(self) -> tuple[str, _Stored]:
        """A tensor, with its offset counted from the first one's."""
        name = self.text()
        dimensions = [self.number("Q") for _ in range(self.fitting(self.number("I"), 8))]
        kind, offset = GGMLQuantizationType(self.number("I")), self.number("Q")
        block, size = GGML_QUANT_SIZES[kind]
        if not dimensions or not all(0 < n < 1 << 40 for n in dimensions) or dimensions[0] % block or (
                len(dimensions) == 1 < block):
            raise ValueError(f"{name} has dimensions {shown(dimensions)}: must be positive, and whole blocks of "
                             f"{block} ({kind.name})")
        row = math.prod(dimensions[:-1]) // block * size  # of one number in a vector
        return name, _Stored(kind, tuple(reversed(dimensions)), offset, row)
