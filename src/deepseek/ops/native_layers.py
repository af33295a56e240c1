"""Decoder layers in one native call: what takes 25 operations a layer from Python, ten microseconds each, takes one.
The operations themselves (ops/quantized.py, ops/latent.py), of plain weights the modules, are the reference, and what
runs where this cannot.

Shape letters: T tokens, H hidden, P rotary angles, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .latent import Sequences
from .low_rank import addresses
from .native import address, native, runs_native, threads
from .quantized import PLAIN_BITS


class Attention(NamedTuple):
    """csrc/layer.h, `Mla`. sizes: hidden, heads, nope, rope, rank, value, q_rank (0: none). weights: q_a, q_b, kv_a,
    kv_b, o, packed, or matrices of 16 or 32 bits. vectors: q_norm, kv_norm, q_a_bias, kv_a_bias, o_bias. key: the key
    half of kv_b_proj, transposed, [rank, nope] of every head in 8 bits where the weights are quantized."""

    sizes: tuple[int, ...]
    bits: int
    weights: tuple[Tensor | None, ...]
    vectors: tuple[Tensor | None, ...]
    q_eps: float
    kv_eps: float
    scale: float
    key: Tensor | None
    interleave: bool


class MLPs:
    """Gated MLPs where the kernels look for them. addresses: of each a packed range, or of three more addresses: those
    of its matrices gate, up and down. tensors: all of them."""

    def __init__(self, tensors: Sequence[Tensor], addresses: Tensor) -> None:
        self.tensors, self.addresses = tuple(tensors), addresses

    @classmethod
    def packed(cls, *mlps: Tensor) -> MLPs:
        return cls(mlps, torch.tensor([address(mlp) for mlp in mlps]))

    @classmethod
    def plain(cls, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> MLPs:
        """Of every expert, or of one MLP."""
        parts = [part if part.ndim == 3 else part[None] for part in (gate_EIH, up_EIH, down_EHI)]
        each = torch.tensor([[part[e].data_ptr() for part in parts] for e in range(len(parts[0]))])
        return cls([*(one for part in parts for one in part), each], each.data_ptr() + 24 * torch.arange(len(each)))


class FeedForward(NamedTuple):
    """csrc/layer.h, `Ffn`. gate: experts, groups, kept groups, top, group_best, sigmoid, normalise, scale anyway,
    scale (as `choose_experts`); all zero without `experts` for a dense layer, whose MLP is `shared`."""

    bits: int
    gate: tuple[Any, ...]
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    inner: int
    experts: MLPs | None
    shared_inner: int
    shared: MLPs | None


class LayerBlock:
    """One layer as the native kernels see it; holds the memory that it points to. `ready` is False where they cannot
    take it."""

    def __init__(
        self, attention: Attention | None, ffn: FeedForward | None, attention_norm: Tensor, ffn_norm: Tensor, eps: float
    ) -> None:
        self.ready, self.experts, self.top = False, 0, 0
        if attention is None or ffn is None:
            return
        mlps = [one for one in (ffn.experts, ffn.shared) if one is not None]
        vectors = [v if v is None or v.dtype == torch.float64 else v.detach().float()
                   for v in (*attention.vectors, attention_norm, ffn_norm, ffn.gate_bias)]
        given = (*attention.weights, attention.key, ffn.gate_weight, *vectors,
                 *(t for one in mlps for t in one.tensors))
        _, _, nope, _, rank, value, _ = attention.sizes
        self.ready = (
            nope % 16 == 0 and value % 16 == 0 and rank % 16 == 0
            and all(v is None or v.dtype == torch.float32 for v in vectors)
            and runs_native(*(t for t in given if t is not None)))
        if not self.ready:
            return
        *of_attention, norm_1, norm_2, gate_bias = map(address, vectors)
        self.held = ([t.detach() for t in given if t is not None], [one.addresses for one in mlps])
        self.experts, self.top = ffn.gate[0], ffn.gate[3]
        self.layer = native.Layer(
            native.Mla(attention.sizes, attention.bits, tuple(map(address, attention.weights)),
                       tuple(of_attention), attention.q_eps, attention.kv_eps, attention.scale,
                       address(attention.key), attention.interleave),
            native.Ffn(ffn.inner, ffn.shared_inner, ffn.bits, ffn.gate, address(ffn.gate_weight),
                       0 if ffn.gate_weight is None else PLAIN_BITS[ffn.gate_weight.dtype], gate_bias,
                       0 if ffn.experts is None else address(ffn.experts.addresses),
                       0 if ffn.shared is None else int(ffn.shared.addresses[0])),
            norm_1, norm_2, eps)


LowRankMatrices = tuple[Tensor, Tensor] | None  # A [R, K] and B turned round, [R, O], of an adapter that has them


def adapters_of(layers: Sequence[Sequence[Sequence[LowRankMatrices]]]) -> Any:
    """Native adapters of some layers: of q_a, q_b, kv_a and o of each the matrices of every adapter, which must live as
    long."""
    return native.Adapters([[addresses(own) for own in products] for products in layers])


def _state(tensor: Tensor | None) -> tuple[int, int]:
    """Where a parameter lies, and how often it has been written to; small ones of plain layers are copied."""
    return address(tensor), 0 if tensor is None or tensor.is_inference() else tensor._version


class LayerStack:
    """Layers of a model in one native call. `ready` is False where one of them cannot be taken, or there are none.

    parameters: those of each of their modules, by name, as the module keeps them: it puts others there when it moves.
    """

    def __init__(self, blocks: Sequence[LayerBlock], parameters: Sequence[Mapping[str, Tensor | None]]) -> None:
        self.blocks = tuple(blocks)
        self.adapters: dict[Any, Any] = {}  # native ones (`adapters_of`), by whatever names them
        self.ready = bool(blocks) and all(block.ready for block in blocks)
        if self.ready:
            gates = [(block.experts, block.top) for block in blocks if block.experts]
            self.gates = len(gates)
            self.experts, self.top = gates[0] if gates else (0, 0)
            self.ready = len(set(gates)) <= 1
            self.layers = native.Layers(tuple(block.layer for block in blocks))
        self._states = [(own, name, _state(tensor)) for own in parameters for name, tensor in own.items()]

    @property
    def changed(self) -> bool:
        """Whether a module of the layers has been moved, cast or written to since."""
        return any(_state(own[name]) != state for own, name, state in self._states)

    def run(
        self, x_TH: Tensor, cos_TP: Tensor, sin_TP: Tensor, cache: Tensor, layer_stride: int, sequences: Sequences,
        naive: int, record: bool, residency: Any = None, adapters: Any = None, weight_TN: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Run the layers: x is overwritten with the result, the tokens' rows of the cache are written.

        cache: float32, whose rows `sequences` points to; those of a layer lie layer_stride numbers behind the last
        one's, 0 where the rows serve this call alone. naive: so many sequences, the first ones, run naive and
        the others absorbed. residency: a native Residency (engine/residency.py). adapters: native ones (`adapters_of`),
        and how much each counts for each token. Returns (index, weight, scores) of every gate if `record` says so.
        """
        n = len(x_TH)
        assert x_TH.is_contiguous() and x_TH.dtype == torch.float32 and cache.dtype == torch.float32
        assert cos_TP.shape == sin_TP.shape and cos_TP.is_contiguous() and sin_TP.is_contiguous() and len(cos_TP) == n
        scores = index = weight = None
        if record and self.gates:
            scores = x_TH.new_empty(self.gates, n, self.experts)
            index = torch.empty(self.gates, n, self.top, dtype=torch.int64)
            weight = x_TH.new_empty(self.gates, n, self.top)
        native.layers_forward(
            self.layers, x_TH.data_ptr(), *sequences.native(), naive, cos_TP.data_ptr(), sin_TP.data_ptr(),
            cache.data_ptr(), layer_stride, address(scores), address(index), address(weight), residency, threads(),
            *(() if adapters is None else (adapters, address(weight_TN))))
        if scores is None or index is None or weight is None:
            return []
        return list(zip(index, weight, scores, strict=True))
