"""The dense -> V3 weight map: a model of Llama's kind as a DeepSeek-V3 whose layers are all dense, exactly.

With N heads, G heads of keys and values, of d numbers each, V3's latent attention says the same when

    keys      the one rotary key, R = G d wide, holds the keys of all G heads side by side; qk_nope_head_dim is 0. A
              query head has its numbers at its own key head and zeros elsewhere. Llama rotates the pair
              (i, i + d/2) of a head, V3 the pair (2j, 2j + 1) of the whole: i of head g goes to j = g d/2 + i
    angles    each head needs the same d/2 frequencies, V3 has R/2 falling ones: LongRoPE's factors, one a pair, turn
              the latter into the former, and whatever scaling the source's RoPE has is in them, too
    scale     V3 divides scores by sqrt(R), the source by sqrt(d). Of the factor sqrt(G) between them the powers of two
              are multiplied into the queries; what is left goes into LongRoPE's attention_factor, since another factor
              would round BF16 weights
    values    go through the latent, whose RMSNorm would bend them. A sixteenth of its channels is constant, by a bias
              M = 4096 with no weights: the norm then divides by M/4, but for |v|^2 / (2 c M^2), 1e-7 in practice, and
              its weight M/4 gives the values back. Its weight is 0 on the constant channels, so products that round
              their input by the row (ops/quantized.py) are not led by them. kv_b_proj picks each head's slice
    biases    of keys and values are kv_a_proj_with_mqa's. Of queries: q_a_proj passes the hidden state on, beside
              constant channels made in the same way, 32 of which the norm's weight keeps, at values of 2 to 6 that add
              up to 128: rounding is different in each, and all of them carry the bias / 128. q_b_proj holds the queries
    FFN       the dense MLP of the layers in front of the first MoE layer, of which there is none

Powers of two and zeros are exact in BF16: so is the whole map, in the dtype that the source has.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DANGEROUS, FOREIGN, LongRope, ModelConfig, YarnScaling
from ..errors import CheckpointError, ConfigError, printable, shown
from ..model import CausalLM
from ..model.layers import inverse_frequencies
from ..settings import is_int, is_number
from .files import TensorFiles, Tensors, row_blocks
from .models import check_names
from .names import hf_names

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
WIDEST_KEY = 512  # of the rotary key; wider ones cost more than they give
_REFUSED = {"Qwen3ForCausalLM": "its queries and keys pass an RMS norm of every head (q_norm, k_norm) before they are "
                                "rotated, and DeepSeek-V3's attention has none there: there is no exact form"}
CONSTANT, CONSTANT_SHARE = 4096, 16  # one channel in so many has it
SPREAD = [(64 + sign * (2 * j + 1)) / 64 for j in range(16) for sign in (1, -1)]  # add up to 32
_KEYS = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings hidden_act "
    "tie_word_embeddings attention_bias sliding_window use_sliding_window max_window_layers layer_types bos_token_id "
    "eos_token_id pad_token_id initializer_range quantization_config".split())
_ARITHMETIC = re.compile("rope|rotary|norm|scal|factor|multiplier|softcap|bias|window|attention|activation|residual|"
                         "expert")  # in names of unknown keys
_ROWS = 4096  # of a matrix of ones and zeros at a time


@dataclass(frozen=True)
class DenseConfig:
    """What config.json says of a dense model. frequencies: the angle per position of each rotary pair of a head;
    biases: those of q, k, v and o that there are."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    frequencies: tuple[float, ...]
    rotary_scale: float
    rope_theta: float
    context: int
    eps: float
    tied: bool
    biases: str
    tokens: Mapping[str, Any]

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any], origin: str, context: int | None = None) -> DenseConfig:
        """Read the keys of a config.json. context: how many positions to keep, if not all.

        Raises ConfigError, naming the key, for what is no such model or has no exact form.
        """
        names = keys.get("architectures")
        name = names[0] if isinstance(names, list) and len(names) == 1 else None
        if name not in ARCHITECTURES:
            raise ConfigError(f"{origin}: architectures = {shown(names)}: "
                              + (_REFUSED.get(str(name)) or f"must be one of {', '.join(ARCHITECTURES)}"))
        _check_other_keys(keys, origin)

        def count(key: str, default: int | None = None) -> int:
            value: Any = default if keys.get(key) is None else keys[key]
            if not is_int(value) or not 0 < value < 1 << 31:
                raise ConfigError(f"{origin}: {key} = {shown(value)}: must be a positive integer")
            return value

        def number(key: str, value: Any) -> float:
            if not is_number(value) or value <= 0:
                raise ConfigError(f"{origin}: {key} = {shown(value)}: must be a positive number")
            return float(value)

        hidden, heads, most = count("hidden_size"), count("num_attention_heads"), count("max_position_embeddings")
        key_heads, width = count("num_key_value_heads", heads), count("head_dim", hidden // heads)
        if heads % key_heads:
            raise ConfigError(f"{origin}: num_key_value_heads = {key_heads}: must divide num_attention_heads ({heads})")
        if width % 2:
            raise ConfigError(f"{origin}: head_dim = {width}: must be even")
        if context is not None and not 0 < context <= most:
            raise ConfigError(f"context = {context}: must lie in 1..{most} (max_position_embeddings)")
        window, types = keys.get("sliding_window", 4096), keys.get("layer_types") or []
        slides = name == "MistralForCausalLM" or "sliding_attention" in types or (
            bool(keys.get("use_sliding_window")) and not types)
        if slides and window is not None and not (is_int(window) and window >= (context or most)):
            raise ConfigError(f"{origin}: sliding_window = {shown(window)}: is shorter than the context of "
                              f"{context or most} tokens, and DeepSeek-V3's attention has no window (--context keeps "
                              "fewer positions)")
        scaling = dict(keys.get("rope_scaling") or keys.get("rope_parameters") or {})
        theta = number("rope_theta", scaling.pop("rope_theta", None) or keys.get("rope_theta", 10000.0))
        frequencies, scale = _rotary(scaling, theta, width, most, origin)
        return cls(
            count("vocab_size"), hidden, count("intermediate_size"), count("num_hidden_layers"), heads, key_heads,
            width, tuple(frequencies.tolist()), scale, theta, context or most,
            number("rms_norm_eps", keys.get("rms_norm_eps", 1e-6)), keys.get("tie_word_embeddings") is True,
            "qkv" if name == "Qwen2ForCausalLM" else "qkvo" if keys.get("attention_bias") else "",
            {key: keys[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in keys})

    @property
    def key_width(self) -> int:
        """Width of all keys of a token, which is that of V3's rotary key; of its values, too."""
        return self.key_heads * self.head_dim

    def to_v3(self) -> ModelConfig:
        """The configuration of the same model as a DeepSeek-V3."""
        width = self.key_width
        own = [self.rope_theta ** (-2 * j / width) for j in range(width // 2)]
        factors = [mine / self.frequencies[j % len(self.frequencies)] for j, mine in enumerate(own)]
        tokens: dict[str, Any] = {key: tuple(ids) if isinstance(ids, list) else ids for key, ids in self.tokens.items()}
        return ModelConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, intermediate_size=self.inner, moe_intermediate_size=self.inner,
            n_routed_experts=1, num_experts_per_tok=1, first_k_dense_replace=self.layers,
            q_lora_rank=None if "q" not in self.biases else latent_width(
                max(self.hidden, len(SPREAD) * (CONSTANT_SHARE - 1))),
            kv_lora_rank=latent_width(width), qk_nope_head_dim=0, qk_rope_head_dim=width, v_head_dim=self.head_dim,
            attention_bias=True, rope_theta=self.rope_theta, max_position_embeddings=self.context,
            longrope=LongRope(tuple(factors), self.context, attention_factor=self.rotary_scale * self._query_scale[1]),
            rms_norm_eps=self.eps, tie_word_embeddings=self.tied, **tokens)

    @property
    def _query_scale(self) -> tuple[float, float]:
        """(a power of two, a factor on both queries and keys) that make sqrt(key_heads) of a score."""
        power = 2 ** (int(math.log2(self.key_heads)) // 2)
        return power, (self.key_heads / power**2) ** 0.25


def latent_width(channels: int) -> int:
    """Width of a latent that holds so many channels beside its constant ones; a multiple of 16."""
    return -(-channels * CONSTANT_SHARE // (CONSTANT_SHARE - 1) // 16) * 16


def _check_other_keys(keys: Mapping[str, Any], origin: str) -> None:
    kinds = {"rope_scaling": dict, "rope_parameters": dict, "quantization_config": dict, "layer_types": list}
    for key, kind in kinds.items():
        if not isinstance(keys.get(key), kind | None):
            what = "a list" if kind is list else "an object"
            raise ConfigError(f"{origin}: {key} = {shown(keys[key])}: must be {what} or null")
    method = (keys.get("quantization_config") or {}).get("quant_method", "fp8")
    if method not in ("fp8", "compressed-tensors"):
        raise ConfigError(f"{origin}: quantization_config.quant_method = {shown(method)}: such weights are not read "
                          "here: take the model that they were made of")
    if keys.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{origin}: hidden_act = {shown(keys['hidden_act'])}: must be 'silu'")
    for key, value in keys.items():
        if key in _KEYS or key in FOREIGN or value is None or value is False:
            continue
        if key in DANGEROUS:
            if value not in DANGEROUS[key]:
                raise ConfigError(f"{origin}: {key} = {shown(value)}: has no exact form (only {DANGEROUS[key][-1]!r} "
                                  "has)")
        elif _ARITHMETIC.search(key):
            raise ConfigError(f"{origin}: {printable(key)} = {shown(value)}: is not known here and may change what "
                              "the model computes")
        else:
            warnings.warn(f"{origin}: unknown key {printable(key)} = {shown(value)} is left out", stacklevel=4)


def _rotary(scaling: dict[str, Any], theta: float, width: int, context: int, origin: str) -> tuple[Tensor, float]:
    """(angle per position of each rotary pair, factor on cos and sin). Raises ConfigError for what positions alone do
    not decide."""
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    if scaling.pop("partial_rotary_factor", None) not in (None, 1):
        raise ConfigError(f"{origin}: partial_rotary_factor: must be 1: DeepSeek-V3's rotary key is rotated whole")
    stated = {key: value for key, value in scaling.items() if value is not None}
    plain = inverse_frequencies(width, theta, None)
    try:
        if kind == "default" and not stated:
            return plain, 1.0
        if kind == "linear":
            return plain / _numbers(stated, "factor")[0], 1.0
        if kind == "llama3":
            stated.setdefault("original_max_position_embeddings", context)
            return _llama3(plain, *_numbers(stated, "factor", "low_freq_factor", "high_freq_factor",
                                            "original_max_position_embeddings")), 1.0
        if kind == "yarn":
            yarn = YarnScaling(**{"factor": None, "original_max_position_embeddings": context} | stated)
            return inverse_frequencies(width, theta, yarn), yarn.rotary_scale
        if kind == "longrope" and stated.get("short_factor") == stated.pop("long_factor", None):
            long = LongRope(tuple(stated.pop("short_factor")), **{"original_max_position_embeddings": context} | stated)
            if len(long.factors) == width // 2:
                return inverse_frequencies(width, theta, long), long.rotary_scale
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{origin}: rope_scaling = {shown(scaling, 200)}: {error}") from None
    why = {"dynamic": ": its frequencies change with the length of the text",
           "longrope": ": its two lists of factors differ, so frequencies change with the length of the text"}
    raise ConfigError(f"{origin}: rope_scaling.type = {shown(kind)} with {printable(', '.join(scaling)) or 'no keys'}: "
                      f"has no exact form{why.get(str(kind), '')} (default, linear, llama3, yarn and longrope have)")


def _numbers(scaling: Mapping[str, Any], *names: str) -> list[float]:
    if set(scaling) != set(names):
        raise ConfigError(f"must have {', '.join(names)} and no other keys")
    for name in names:
        if not is_number(scaling[name]) or scaling[name] <= 0:
            raise ConfigError(f"{name} = {shown(scaling[name])}: must be a positive number")
    return [float(scaling[name]) for name in names]


def _llama3(inv_P: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Llama 3.1's frequencies: long waves divided by `factor`, short ones kept, a ramp between."""
    turns_P = original * inv_P / (2 * math.pi)
    smooth_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_P) * inv_P / factor + smooth_P * inv_P


class DenseAsV3:
    """The tensors of a dense checkpoint as those of a DeepSeek-V3, made row by row.

    Raises CheckpointError for tensors that are missing, of another shape, or have no place.
    """

    def __init__(self, dense: DenseConfig, files: Tensors) -> None:
        self.dense, self.files, self.config = dense, files, dense.to_v3()
        model = CausalLM.on_meta(self.config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()
                       if name != "lm_head.weight" or not dense.tied}
        assert all(hf_names(name, self.config) == [(name, None)] for name in self.shapes)
        self._check()

    def _check(self) -> None:
        dense, files = self.dense, self.files
        rows = {"q": dense.heads * dense.head_dim, "k": dense.key_width, "v": dense.key_width, "o": dense.hidden}
        want: dict[str, tuple[int, ...]] = {}
        for layer in range(dense.layers):
            for part, height in rows.items():
                stem = f"model.layers.{layer}.self_attn.{part}_proj"
                want[f"{stem}.weight"] = (height, rows["q"] if part == "o" else dense.hidden)
                if part in dense.biases:
                    want[f"{stem}.bias"] = (height,)
        want |= {name: shape for name, shape in self.shapes.items() if ".self_attn." not in name}
        self._used = frozenset(want)
        used = {*want} | {name for name in files if name.endswith("lm_head.weight") and dense.tied}
        check_names(files, used, [name for name in want if name not in files])
        for name, shape in want.items():
            files.check_plain(name)
            if files.shape(name) != shape:
                raise CheckpointError(f"{files.folder}: {name} has shape {files.shape(name)}, its configuration asks "
                                      f"for {shape}")

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def source_parameters(self) -> int:
        return sum(math.prod(self.files.shape(name)) for name in self.files if name in self._used)

    def rows(self, name: str) -> Iterator[Tensor]:
        """A tensor of V3 as blocks of rows, float32, one after the other."""
        layer, _, part = name.partition(".self_attn.")
        if not part:
            return self._copy(name)
        made = _MADE[part]
        return made(self, f"{layer}.self_attn.", part)

    # ---- one row of the table each -------------------------------------------------------------------------------

    def _copy(self, name: str) -> Iterator[Tensor]:
        return (self._read(name, *rows) for rows in row_blocks(self.files.shape(name)))

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.files.read_rows(name, start, stop, torch.float32)
        if not bool(rows.isfinite().all()):
            raise CheckpointError(f"{self.files.file(name)}: {name} holds values that are not finite")
        return rows

    def _head(self, stem: str, head: int) -> Tensor:
        """A head's rows of a weight or a bias, the two halves of each rotary pair side by side."""
        width = self.dense.head_dim
        rows = self._read(stem, head * width, (head + 1) * width)
        return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)

    def _queries(self, stem: str, part: str) -> Iterator[Tensor]:
        dense, columns = self.dense, self.config.q_lora_rank or self.dense.hidden
        for head in range(dense.heads):
            rows = torch.zeros(dense.key_width, columns)
            at = head // (dense.heads // dense.key_heads) * dense.head_dim
            mine = rows[at : at + dense.head_dim]
            mine[:, : dense.hidden] = self._head(f"{stem}q_proj.weight", head)
            if "q" in dense.biases:
                bias = self._head(f"{stem}q_proj.bias", head) / (4 * len(SPREAD))
                mine[:, dense.hidden : dense.hidden + len(SPREAD)] = bias.unsqueeze(1)
            yield rows.mul_(dense._query_scale[0])

    def _latents_and_keys(self, stem: str, part: str) -> Iterator[Tensor]:
        kind, rank = part.rpartition(".")[2], self.config.kv_lora_rank
        rest = torch.zeros(rank - self.dense.key_width, *([self.dense.hidden] if kind == "weight" else []))
        if kind == "weight":
            yield from self._copy(f"{stem}v_proj.weight")
        else:
            rest[-(rank // CONSTANT_SHARE):] = CONSTANT
            yield (self._read(f"{stem}v_proj.bias", 0, self.dense.key_width) if "v" in self.dense.biases
                   else torch.zeros(self.dense.key_width))
        yield rest
        for head in range(self.dense.key_heads):
            yield (self._head(f"{stem}k_proj.{kind}", head) if kind == "weight" or "k" in self.dense.biases
                   else torch.zeros(self.dense.head_dim))

    def _latent_norm(self, stem: str, part: str) -> Iterator[Tensor]:
        weight = torch.zeros(self.config.kv_lora_rank)
        weight[: self.dense.key_width] = CONSTANT / CONSTANT_SHARE**0.5
        yield weight

    def _values(self, stem: str, part: str) -> Iterator[Tensor]:
        dense = self.dense
        for head in range(dense.heads):
            at = head // (dense.heads // dense.key_heads) * dense.head_dim
            yield torch.eye(dense.head_dim, self.config.kv_lora_rank).roll(at, 1)

    def _passed_on(self, stem: str, part: str) -> Iterator[Tensor]:
        rank, hidden = self.shapes[f"{stem}{part}"]
        for start in range(0, rank, _ROWS):
            place = torch.arange(start, min(start + _ROWS, rank))
            rows = torch.zeros(len(place), hidden)
            inside = place < hidden
            rows[inside, place[inside]] = 1.0
            yield rows

    def _constants(self, stem: str, part: str) -> Iterator[Tensor]:
        rank = self.shapes[f"{stem}{part}"][0]
        bias = torch.zeros(rank)
        bias[self.dense.hidden : self.dense.hidden + rank // CONSTANT_SHARE] = CONSTANT
        yield bias

    def _query_norm(self, stem: str, part: str) -> Iterator[Tensor]:
        weight, hidden = torch.zeros(self.shapes[f"{stem}{part}"]), self.dense.hidden
        weight[:hidden] = CONSTANT / CONSTANT_SHARE**0.5
        weight[hidden : hidden + len(SPREAD)] = torch.tensor(SPREAD)  # constants come out of the norm as 4
        yield weight

    def _output(self, stem: str, part: str) -> Iterator[Tensor]:
        if part.endswith("bias") and "o" not in self.dense.biases:
            return iter([torch.zeros(self.dense.hidden)])
        return self._copy(f"{stem}{part}")


class DenseFiles(TensorFiles):
    """The tensors that `DenseAsV3` makes, as conversions read them, without a folder of them in between."""

    def __init__(self, made: DenseAsV3) -> None:
        self.made, self.folder = made, made.files.folder
        self._last: tuple[str, Tensor] = "", torch.empty(0)

    def __contains__(self, name: str) -> bool:
        return name in self.made.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.made.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.made.shapes[name]

    def dtype(self, name: str) -> str:
        return "F32"

    def file(self, name: str) -> Path:
        return self.folder

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.read_rows(name, 0, self.shape(name)[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        if self._last[0] != name:  # rows are asked for one block after the other
            self._last = name, torch.cat([*self.made.rows(name)])
        rows = self._last[1][start:stop]
        return rows if dtype is None else rows.to(dtype)


# the table: V3's tensors of attention -> what they are made from (all others are the source's)
_MADE: dict[str, Callable[[DenseAsV3, str, str], Iterator[Tensor]]] = {
    "q_proj.weight": DenseAsV3._queries,
    "q_a_proj.weight": DenseAsV3._passed_on,
    "q_a_proj.bias": DenseAsV3._constants,
    "q_a_layernorm.weight": DenseAsV3._query_norm,
    "q_b_proj.weight": DenseAsV3._queries,
    "kv_a_proj_with_mqa.weight": DenseAsV3._latents_and_keys,
    "kv_a_proj_with_mqa.bias": DenseAsV3._latents_and_keys,
    "kv_a_layernorm.weight": DenseAsV3._latent_norm,
    "kv_b_proj.weight": DenseAsV3._values,
    "o_proj.weight": DenseAsV3._output,
    "o_proj.bias": DenseAsV3._output,
}
