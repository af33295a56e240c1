"""What a configuration costs: parameters, arithmetic, memory, and what of it fits a machine.

Everything but `measure_machine` is arithmetic over one table, the weights of the model as (part, role, rows, columns,
copies, copies that one token uses). Nothing is allocated and torch is not imported.

    total      every parameter of the main model (671 B for DeepSeek-V3); MTP modules are counted apart, as DeepSeek
               does (README_WEIGHTS.md). The gate's e_score_correction_bias is a buffer that training moves by rule, no
               parameter: it counts in bytes, not in parameters.
    active     what one token needs: of the routed experts K in E, of the rest everything. DeepSeek-V3 has 37.6 B with
               embedding and head, 36.6 B without the embedding, of which a token reads one row: the published "37 B".
    FLOPs      2 * matrix weights that the token is multiplied with
               + 2 * layers * heads * (qk_nope + qk_rope + v) * context,
               the second line for a token that looks at `context` positions in naive attention. The dense twin
               has the same weights and the same attention, and every routed expert at work.
    bytes      recipes of a weight of n numbers
                 FP32  4 n
                 BF16  2 n
                 FP8   n + 4 per block of 128 x 128, the official layout; embedding, head, gate and norms stay BF16
                 NF4   what `deepseek quantize` writes (docs/formats.md): 4 + 8/64 + 32/columns bits (a byte of scale a
                       block, a float a row), rows padded to 16, columns to 64, a gated MLP to 4096 bytes; gate, norms
                       and biases stay BF16, the embedding is int8 with one FP32 scale per row, a tied head is stored
                       in NF4 beside it
               and FP32 for the gate's bias in all of them.
    cache      MLA: (kv_lora_rank + qk_rope) numbers a layer; plain multi-head attention of the same heads:
               heads * (qk_nope + v), which is the 2 n_h d_h of arXiv 2405.04434, table 1. BF16.
    tokens/s   bandwidth / (active bytes + cached positions): decoding one sequence reads them once per token, and a
               machine cannot be faster than that, unless a good part of them stays in the processor's own cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..config import ModelConfig
from ..errors import RequestError

FORMATS = ("FP32", "BF16", "FP8", "NF4")
_PARTS = ("embedding", "attention", "dense FFN", "gate", "routed experts", "shared experts", "norms", "head")


class Weight(NamedTuple):
    part: str
    role: Literal["linear", "mlp", "gate", "vector", "table", "head", "state"]
    rows: int  # of an mlp: its inner width; it is gate and up [rows, columns] and down [columns, rows]
    columns: int = 1
    copies: int = 1
    active: int = 1

    @property
    def numbers(self) -> int:
        return self.rows * self.columns * (3 if self.role == "mlp" else 1)

    def bytes(self, format: str) -> int:
        """Size of one copy, by the formulas at the top of this file."""
        if self.role == "state" or format == "FP32":
            return 4 * self.numbers
        if format == "FP8" and self.role in ("linear", "mlp"):
            blocks = math.ceil(self.rows / 128) * math.ceil(self.columns / 128)
            return self.numbers + 4 * blocks * (3 if self.role == "mlp" else 1)
        if format == "NF4" and self.role in ("linear", "head"):
            return _nf4_bytes(self.rows, self.columns)
        if format == "NF4" and self.role == "mlp":
            both = 2 * _nf4_bytes(self.rows, self.columns) + _nf4_bytes(self.columns, self.rows)
            return 4096 * math.ceil(both / 4096)
        if format == "NF4" and self.role == "table":
            return self.numbers + 4 * self.rows
        return 2 * self.numbers


def _nf4_bytes(rows: int, columns: int) -> int:
    """As ops/panels.py, which would load torch."""
    blocks = math.ceil(columns / 64)
    return math.ceil(rows / 16) * (64 + 64 * math.ceil(blocks / 4) + 512 * blocks)


def _main(config: ModelConfig) -> Iterator[Weight]:
    yield Weight("embedding", "table", config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, config.is_moe(layer))
    yield Weight("norms", "vector", config.hidden_size)
    if not config.tie_word_embeddings:
        yield Weight("head", "head", config.vocab_size, config.hidden_size)


def _mtp(config: ModelConfig) -> Iterator[Weight]:
    for _ in range(config.num_nextn_predict_layers):
        yield from _layer(config, True)
        yield Weight("projection", "linear", config.hidden_size, 2 * config.hidden_size)
        yield Weight("norms", "vector", config.hidden_size, copies=3, active=3)


def _layer(config: ModelConfig, moe: bool) -> Iterator[Weight]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    if config.q_lora_rank is None:
        yield Weight("attention", "linear", heads * config.qk_head_dim, hidden)
    else:
        yield Weight("attention", "linear", config.q_lora_rank, hidden)
        yield Weight("norms", "vector", config.q_lora_rank)
        yield Weight("attention", "linear", heads * config.qk_head_dim, config.q_lora_rank)
    yield Weight("attention", "linear", config.latent_dim, hidden)
    yield Weight("attention", "linear", heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield Weight("attention", "linear", hidden, heads * config.v_head_dim)
    if config.attention_bias:
        yield Weight("attention", "vector", (config.q_lora_rank or 0) + config.latent_dim + hidden)
    yield Weight("norms", "vector", rank)
    yield Weight("norms", "vector", hidden, copies=2, active=2)
    if not moe:
        yield Weight("dense FFN", "mlp", config.intermediate_size, hidden)
        return
    experts, inner = config.n_routed_experts, config.moe_intermediate_size
    yield Weight("gate", "gate", experts, hidden)
    if config.topk_method == "noaux_tc":
        yield Weight("gate", "state", experts)
    yield Weight("routed experts", "mlp", inner, hidden, experts, config.num_experts_per_tok)
    if config.n_shared_experts:
        yield Weight("shared experts", "mlp", inner * config.n_shared_experts, hidden)


@dataclass(frozen=True)
class Part:
    """One kind of weight, in parameters."""

    name: str
    total: int
    active: int


@dataclass(frozen=True)
class Memory:
    """The main model's weights in one format, in bytes. `resident`: what must be in memory if routed experts stream
    from disk, everything else and the K experts of every layer. `read`: what decoding one token reads of them;
    `dense_read`: what it would read with every expert at work."""

    format: str
    weights: int
    resident: int
    read: int
    dense_read: int


@dataclass(frozen=True)
class ModelInfo:
    """The accounts of one configuration at a context of `context` positions. Units: parameters, FLOPs, bytes."""

    name: str
    config: ModelConfig
    context: int
    parts: tuple[Part, ...]
    mtp: Part
    gate_bias: int
    flops: int
    dense_flops: int
    memory: tuple[Memory, ...]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int:
        return sum(part.active for part in self.parts)

    @property
    def active_beyond_lookup(self) -> int:
        """Active parameters without an embedding table of which a token reads only its row (a tied one is the head)."""
        return self.active - (0 if self.config.tie_word_embeddings else self.parts[0].active)

    @property
    def active_share(self) -> float:
        return self.active / self.total

    @property
    def flops_saved(self) -> float:
        """Share of the dense twin's FLOPs per token that this model does not spend."""
        return 1 - self.flops / self.dense_flops

    @property
    def read(self) -> int:
        """Bytes that decoding one token reads in BF16, weights and the `context` cached positions."""
        return self.in_format("BF16").read + self.cache_per_token * self.context

    @property
    def dense_read(self) -> int:
        """The same for the dense twin, with the same cache."""
        return self.in_format("BF16").dense_read + self.cache_per_token * self.context

    @property
    def latency_bound(self) -> float:
        """How many times lower than its dense twin's the latency can be at most, where memory bandwidth decides."""
        return self.dense_read / self.read

    @property
    def cache_per_token(self) -> int:
        return self.config.num_hidden_layers * self.config.latent_dim * 2

    @property
    def plain_cache_per_token(self) -> int:
        config = self.config
        heads = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        return config.num_hidden_layers * heads * 2

    def in_format(self, format: str) -> Memory:
        return next(memory for memory in self.memory if memory.format == format)


def describe(config: ModelConfig, *, name: str = "", context: int = 4096) -> ModelInfo:
    """The accounts of `config`; `context` is capped at max_position_embeddings. Raises RequestError for context < 1."""
    if context < 1:
        raise RequestError(f"context = {context!r}: must be a positive number of tokens")
    context = min(context, config.max_position_embeddings)
    weights = list(_main(config))
    # a tied embedding is the head, too: multiplied with, and read as a whole
    multiplied = {"linear", "mlp", "gate", "head"} | ({"table"} if config.tie_word_embeddings else set())
    attention = (
        2 * config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * context
    )
    matrices = [w for w in weights if w.role in multiplied]
    return ModelInfo(
        name=name,
        config=config,
        context=context,
        parts=tuple(_sum(part, [w for w in weights if w.part == part]) for part in _PARTS),
        mtp=_sum("MTP", _mtp(config)),
        gate_bias=sum(w.numbers for w in weights if w.role == "state"),
        flops=2 * sum(w.numbers * w.active for w in matrices) + attention,
        dense_flops=2 * sum(w.numbers * w.copies for w in matrices) + attention,
        memory=tuple(_memory(format, weights, config) for format in FORMATS),
    )


def _sum(name: str, weights: Iterable[Weight]) -> Part:
    parameters = [w for w in weights if w.role != "state"]
    return Part(name, sum(w.numbers * w.copies for w in parameters), sum(w.numbers * w.active for w in parameters))


def _memory(format: str, weights: list[Weight], config: ModelConfig) -> Memory:
    tied = config.tie_word_embeddings
    if tied and format == "NF4":
        weights, tied = [*weights, Weight("head", "head", config.vocab_size, config.hidden_size)], False
    total = sum(w.bytes(format) * w.copies for w in weights)
    resident = sum(w.bytes(format) * w.active for w in weights)
    lookup = 0.0 if tied else sum(w.bytes(format) * (1 - 1 / w.rows) for w in weights if w.role == "table")
    return Memory(format, total, resident, round(resident - lookup), round(total - lookup))
