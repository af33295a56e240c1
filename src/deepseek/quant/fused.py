"""Inference forms of a quantized model's layers: fewer, larger steps, the same results.

    attention   naive and absorbed over the latent cache, as operations that read kv_b_proj where it lies
                (ops/latent.py). Absorbed folds the query into latent space by W_key, the key half of kv_b_proj, of
                which there is a copy in 8 bits. Rotation, the latent's norm and the write to the cache are one step.
    gate        its matrix as panels; sigmoid, groups and top-k are one step.
    layers      where the native kernels can, all of them in one call (ops/native_layers.py).

Each attn_impl is batch-invariant: a token gets the same bits in any batch and however its text is cut into calls. The
two (naive for a prompt, absorbed for later tokens, unless the caller chooses) differ in rounding.

Shape letters: B batch, T tokens, H hidden, N heads, R latent rank, E experts, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..config import ModelConfig
from ..model import CausalLM, RoutingRecord
from ..model.adapters import EVERYTHING, AdaptedLinear, LowRank, bare, current, of_all_rows, path_of
from ..model.cache import LatentCache, PackedBatch
from ..model.experts import MoE
from ..model.gate import Gate, Route, routing_rule
from ..model.mla import MLA, AttentionContext, AttentionMask, AttnImpl
from ..model.transformer import DecoderLayer, MTPLayer
from ..ops.latent import Sequences, latent_pages, naive_pages, prepare_pages
from ..ops.native import native
from ..ops.native_layers import Attention, FeedForward, LayerBlock, LayerStack
from ..ops.panels import ROWS, panel_bytes, unpack
from .linear import QuantizedExperts, QuantizedLinear, QuantizedMLP
from .pack import quantize_panels


class AbsorbedLora:
    """LoRA on kv_b_proj, s B A, in absorbed attention: what it adds to queries and to values. B is in 8 bits by
    head, as W_key is there; r is the rank, padded to whole panels."""

    def __init__(self, path: LowRank, config: ModelConfig) -> None:
        a_rR, b_Or = path.matrices()
        a_rR, b_Or = pad(a_rR, (0, 0, 0, -path.rank % ROWS)), pad(b_Or, (0, -path.rank % ROWS))
        key_NDr, value_NWr = b_Or.view(config.num_attention_heads, -1, len(a_rR)).split(
            (config.qk_nope_head_dim, config.v_head_dim), 1)
        self.key = _by_head(key_NDr.transpose(1, 2)) if config.qk_nope_head_dim else None
        self.value = _by_head(value_NWr)
        self.down, self.up = ops.pack_panels(a_rR), ops.pack_panels(a_rR.t().contiguous())
        self.rank, self.width = a_rR.shape[0], config.v_head_dim

    def queries(self, q_TND: Tensor) -> Tensor:
        assert self.key is not None
        q_TNr = ops.grouped_quantized_linear(q_TND, self.key, 0, self.key.shape[1], self.rank, bits=8)
        out = ops.panel_linear(q_TNr.flatten(0, 1), self.up)
        return out.view(*q_TNr.shape[:2], -1)

    def values(self, latent_TNR: Tensor) -> Tensor:
        latent_TNr = ops.panel_linear(latent_TNR.flatten(0, 1), self.down).view(*latent_TNR.shape[:2], -1)
        return ops.grouped_quantized_linear(latent_TNr, self.value, 0, self.value.shape[1], self.width, bits=8)


AbsorbedLoras = Sequence[tuple[AbsorbedLora, slice]]


class FusedMLA(MLA):
    """MLA whose kv_b_proj is quantized. Falls back to MLA's own forms for masks with holes and caches of other dtypes.

    key: W_key turned round, [R, nope] of every head in 8 bits; None where nope is 0. value: the value rows of kv_b_proj
    in 8 bits where they cannot be read in their place, because a head's rows are no whole panels.
    """

    key: Tensor | None
    value: Tensor | None
    loras: dict[str, AbsorbedLora]

    def fuse(self) -> None:
        config, kv_b = self.config, self.kv_b_proj
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        assert isinstance(kv_b, QuantizedLinear)
        w = unpack(kv_b.packed, kv_b.out_features, kv_b.in_features, kv_b.bits).dequantize()
        key_NDR, value_NWR = w.view(config.num_attention_heads, nope + value, -1).split((nope, value), 1)
        self.register_buffer("key", _by_head(key_NDR.transpose(1, 2)) if nope else None, persistent=False)
        in_place = nope % ROWS == 0 and value % ROWS == 0
        self.register_buffer("value", None if in_place else _by_head(value_NWR), persistent=False)
        self.loras = {}

    def native_args(self) -> Attention | None:
        """Arguments of a native layer, without adapters; None where a projection is not quantized."""
        config = self.config
        q_a = bare(self.q_a_proj) if config.q_lora_rank is not None else None
        q_b = bare(self.q_proj if config.q_lora_rank is None else self.q_b_proj)
        projections = (q_a, q_b, *map(bare, (self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj)))
        if not all(p is None or isinstance(p, QuantizedLinear) for p in projections) or q_b.bias is not None:
            return None
        return Attention(
            (config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim,
             config.kv_lora_rank, config.v_head_dim, config.q_lora_rank or 0), projections[3].bits,
            tuple(None if p is None else p.packed for p in projections),
            (None if q_a is None else self.q_a_layernorm.weight, self.kv_a_layernorm.weight,
             None if q_a is None else q_a.bias, projections[2].bias, projections[4].bias),
            0.0 if q_a is None else self.q_a_layernorm.eps, self.kv_a_layernorm.eps, config.softmax_scale,
            self.key, config.rope_interleave)

    def forward(self, x_BTH: Tensor, context: AttentionContext, layer: int) -> Tensor:
        batch, tokens, _ = x_BTH.shape
        visible = _visible(context, x_BTH)
        if not _kernels_take(visible, context.cache):
            return super().forward(x_BTH, context._replace(visible=visible), layer)
        config, cos, sin = self.config, context.cos, context.sin
        if config.q_lora_rank is None:
            q = self.q_proj(x_BTH)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTH)))
        kv = self.kv_a_proj_with_mqa(x_BTH)
        q_BTND = q.view(batch, tokens, config.num_attention_heads, config.qk_head_dim)
        if isinstance(visible, PackedBatch) and self._takes_pages(visible):
            return self.o_proj(self._by_pages(q_BTND[0], kv[0], cos[0], sin[0], visible, layer).view(1, tokens, -1))
        rows, past = _latent_rows(context.cache, layer, x_BTH, config.latent_dim)
        q_rope = ops.prepare_latents(q_BTND, kv, self.kv_a_layernorm.weight, self.kv_a_layernorm.eps, cos, sin,
                                     config.rope_interleave, rows, past)
        if isinstance(visible, PackedBatch):
            visible.write(layer, rows[0])
            out = torch.cat([
                self._by_kernels(q_BTND[:, place], q_rope[:, place], rows, chunk.attn_impl,
                                 AttentionMask(None, 1, chunk.tokens, chunk.past, rows.device), chunk.adapter)
                for chunk, place, rows in visible.read(layer)], 1)
        else:
            out = self._by_kernels(q_BTND, q_rope, rows, context.impl(tokens), visible, of_all_rows())
        return self.o_proj(out)

    def _by_kernels(self, q_BTND: Tensor, q_rope: Tensor, rows: Tensor, attn_impl: AttnImpl, visible: AttentionMask,
                    adapter: str | None) -> Tensor:
        """All heads' values, [B, T, N W]. adapter: whose rows they are; with LoRA on kv_b_proj attention is
        absorbed, whatever is asked."""
        config, kv_b, lora = self.config, bare(self.kv_b_proj), self._absorbed_lora(adapter)
        batch, tokens = q_BTND.shape[:2]
        assert isinstance(kv_b, QuantizedLinear) and visible.span is not None
        q_BTND, q_rope = q_BTND.contiguous(), q_rope.contiguous()
        if attn_impl == "naive" and lora is None:
            return ops.naive_attention(q_BTND, q_rope, rows, kv_b.packed, config.v_head_dim, *visible.span,
                                       config.softmax_scale, bits=kv_b.bits).flatten(2)
        loras = [] if lora is None else [(lora, EVERYTHING)]
        q_latent = self._queries(q_BTND.flatten(0, 1), loras)
        latent = ops.latent_attention(q_latent.view(batch, tokens, *q_latent.shape[1:]), q_rope, rows,
                                      *visible.span, config.softmax_scale)
        return self._values(latent.flatten(0, 1), loras).view(batch, tokens, -1)

    def _takes_pages(self, pack: PackedBatch) -> bool:
        """Whether the kernels can read the pack's pages where they lie."""
        prompts = pack.chunks[: pack.naive]
        return native is not None and self.config.kv_lora_rank % ROWS == 0 and not (
            isinstance(self.kv_b_proj, AdaptedLinear) and any(self.kv_b_proj.path(c.adapter) for c in prompts))

    def _by_pages(self, q_TND: Tensor, kv_TC: Tensor, cos_TP: Tensor, sin_TP: Tensor, pack: PackedBatch,
                  layer: int) -> Tensor:
        """All heads' values of a pack's tokens, [T, N W]; their rows of the pool are written. The same kernels as in
        `_by_kernels`, for all chunks at once."""
        config, kv_b, cache = self.config, bare(self.kv_b_proj), pack.pool.data[layer]
        q_TND = q_TND.contiguous()
        q_rope = prepare_pages(q_TND, kv_TC.contiguous(), self.kv_a_layernorm.weight, self.kv_a_layernorm.eps, cos_TP,
                               sin_TP, config.rope_interleave, cache, pack.sequences)
        prompts, later = pack.sequences.split(pack.naive)
        first, parts = int(later.begin[0]) if len(later.past) else len(q_TND), []
        if pack.naive:
            parts.append(naive_pages(q_TND[:first], q_rope[:first], cache, kv_b.packed, config.v_head_dim, prompts,
                                     config.softmax_scale, kv_b.bits))
        if first < len(q_TND):
            loras = [(lora, slice(rows.start - first, rows.stop - first)) for name, rows in pack.spans
                     if (lora := self._absorbed_lora(name)) is not None]
            latent = latent_pages(self._queries(q_TND[first:], loras), q_rope[first:], cache, later.moved(),
                                  config.softmax_scale)
            parts.append(self._values(latent, loras))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _queries(self, q_TND: Tensor, loras: AbsorbedLoras) -> Tensor:
        """Each head's query in latent space, [T, N, R]."""
        config = self.config
        if self.key is None:  # all of a query is rotary
            return q_TND.new_zeros(*q_TND.shape[:2], config.kv_lora_rank)
        q_TND = q_TND[..., : config.qk_nope_head_dim]
        out_TNR = ops.grouped_quantized_linear(q_TND, self.key, 0, self.key.shape[1], config.kv_lora_rank, bits=8)
        for lora, rows in loras:
            out_TNR[rows] += lora.queries(q_TND[rows])
        return out_TNR

    def _values(self, latent_TNR: Tensor, loras: AbsorbedLoras) -> Tensor:
        """Each head's summed latent through the value half of kv_b_proj, [T, N, W]."""
        out_TNW = self._base_values(latent_TNR)
        for lora, rows in loras:
            out_TNW[rows] += lora.values(latent_TNR[rows])
        return out_TNW

    def _absorbed_lora(self, adapter: str | None) -> AbsorbedLora | None:
        """An adapter's matrices on kv_b_proj as absorbed attention needs them, made when first used; None without."""
        path = path_of(self.kv_b_proj, adapter)
        if path is None or adapter is None:
            return None
        if adapter not in self.loras:
            self.loras[adapter] = AbsorbedLora(path, self.config)
        return self.loras[adapter]

    def _base_values(self, latent_TNR: Tensor) -> Tensor:
        config, kv_b = self.config, bare(self.kv_b_proj)
        if self.value is not None:
            return ops.grouped_quantized_linear(latent_TNR, self.value, 0, self.value.shape[1], config.v_head_dim,
                                                bits=8)
        assert isinstance(kv_b, QuantizedLinear)
        panel = panel_bytes(config.kv_lora_rank, kv_b.bits)
        head = (config.qk_nope_head_dim + config.v_head_dim) // ROWS * panel
        return ops.grouped_quantized_linear(latent_TNR, kv_b.packed, config.qk_nope_head_dim // ROWS * panel, head,
                                            config.v_head_dim, bits=kv_b.bits)


def _by_head(w_NOK: Tensor) -> Tensor:
    """Each head's matrix in 8 bits, uint8 [N, bytes of one]."""
    return torch.stack([quantize_panels(w_OK.contiguous(), 8)[0].flatten() for w_OK in w_NOK])


def _kernels_take(visible: AttentionMask | PackedBatch, cache: LatentCache | None) -> bool:
    """Whether the kernels can attend: FP32 rows, and a contiguous range of visible positions."""
    if isinstance(visible, PackedBatch):
        return visible.pool.data.dtype == torch.float32 and visible.pool.data.device.type == "cpu"
    return (cache is None or cache.data.dtype == torch.float32) and visible.span is not None


class FusedGate(Gate):
    weight_PH16: Tensor

    def fuse(self) -> None:
        weight = self.weight.detach()
        if weight.dtype not in (torch.bfloat16, torch.float32):
            weight = weight.float()
        self.register_buffer("weight_PH16", ops.pack_panels(weight), persistent=False)

    def forward(self, x_TH: Tensor) -> Route:
        logits_TE = ops.panel_linear(x_TH, self.weight_PH16)[:, : self.config.n_routed_experts]
        return Route(*ops.choose_experts(logits_TE.contiguous(), self.bias, *routing_rule(self.config)))


class FusedLayer(DecoderLayer):
    """A decoder layer with the arguments of its native form."""

    block: LayerBlock | None = None

    def native_args(self) -> LayerBlock:
        if self.block is None:
            self.block = self._native_args()
        return self.block

    def _native_args(self) -> LayerBlock:
        attention, mlp = self.self_attn, self.mlp
        ffn = None
        if isinstance(mlp, MoE) and isinstance(bare(mlp.experts), QuantizedExperts) and not (
                hasattr(mlp, "shared_experts")):
            gate, experts = mlp.gate, bare(mlp.experts)
            if isinstance(gate, FusedGate):
                chosen = (gate.config.n_routed_experts, *routing_rule(gate.config))
                ffn = FeedForward(experts.table.bits, chosen, gate.weight_PH16, gate.bias, experts.table,
                                  experts.shared, experts.shared_inner)
        elif isinstance(mlp, QuantizedMLP):
            no_gate = (0, 0, 0, 0, 0, False, False, False, 0.0)
            ffn = FeedForward(mlp.bits, no_gate, None, None, None, mlp.packed, mlp.inner)
        return LayerBlock(attention.native_args() if isinstance(attention, FusedMLA) else None, ffn,
                          self.input_layernorm.weight, self.post_attention_layernorm.weight, self.input_layernorm.eps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.block = None  # its pointers may not survive
        return super()._apply(fn, recurse)


class FusedCausalLM(CausalLM):
    """Runs all layers in one native call where possible, else module by module."""

    stack = LayerStack()
    ahead = LayerStack()  # the MTP module that drafts
    residency: Any = None  # a native Residency where not all experts are in memory (engine/residency.py)

    def _layers(self, x_BTH: Tensor, context: AttentionContext, routing: RoutingRecord | None) -> Tensor:
        layers = cast(list[FusedLayer], list(self.model.layers))
        self.stack = _stack(self.stack, layers)
        batch, tokens, _ = x_BTH.shape
        visible, cache = _visible(context, x_BTH), context.cache
        if not _natively(self.stack, x_BTH, context.cos, visible, cache):
            return super()._layers(x_BTH, context._replace(visible=visible), routing)
        x = x_BTH.clone(memory_format=torch.contiguous_format)
        cos, sin = (angle.expand(batch, -1, -1).contiguous().flatten(0, 1) for angle in (context.cos, context.sin))
        naive = batch if context.impl(tokens) == "naive" else 0
        if isinstance(visible, PackedBatch):
            rows, stride = visible.pool.data, visible.pool.data.stride(0)
            sequences, naive = visible.sequences, visible.naive
        else:
            assert visible.span is not None
            rows, _ = _latent_rows(cache, 0, x_BTH, self.config.latent_dim)
            stride = 0 if cache is None else cache.data.stride(0)
            sequences = Sequences.in_rows(*visible.span, tokens, rows.stride(0), rows.shape[2])
        routes = self.stack.run(x.flatten(0, 1), cos, sin, rows, stride, sequences, naive, routing is not None,
                                self.residency)
        if routing is not None:
            gated = (layer.layer for layer in layers if isinstance(layer.mlp, MoE))
            routing.routes.update(zip(gated, (Route(*route) for route in routes), strict=True))
        return x

    def _ahead(self, block: MTPLayer, x_BTH: Tensor, context: AttentionContext) -> Tensor:
        self.ahead, pack = _stack(self.ahead, [cast(FusedLayer, block)]), context.visible
        assert isinstance(pack, PackedBatch)
        if not _natively(self.ahead, x_BTH, context.cos, pack, None):
            return super()._ahead(block, x_BTH, context)
        x, rows = x_BTH.clone(memory_format=torch.contiguous_format), pack.pool.data[block.layer :]
        cos, sin = (angle.contiguous().flatten(0, 1) for angle in (context.cos, context.sin))
        self.ahead.run(x.flatten(0, 1), cos, sin, rows, rows.stride(0), pack.sequences, pack.naive, False, None)
        return x


def absorbs(model: CausalLM, targets: Sequence[str]) -> bool:
    """Whether prompts of an adapter on `targets` run absorbed: the kernels of naive attention read kv_b_proj where it
    lies and know no LoRA."""
    return isinstance(model, FusedCausalLM) and any(target.endswith(".kv_b_proj") for target in targets)


def _stack(known: LayerStack, layers: Sequence[FusedLayer]) -> LayerStack:
    blocks = tuple(layer.native_args() for layer in layers)
    return known if blocks == known.blocks else LayerStack(blocks)  # compares identities


def _visible(context: AttentionContext, x_BTH: Tensor) -> AttentionMask | PackedBatch:
    batch, tokens, _ = x_BTH.shape
    return context.visible or AttentionMask(None, batch, tokens, 0, x_BTH.device)


def _natively(stack: LayerStack, x_BTH: Tensor, cos: Tensor, visible: AttentionMask | PackedBatch,
              cache: LatentCache | None) -> bool:
    controlled = isinstance(visible, PackedBatch) and visible.control is not None
    return (stack.ready and not torch.compiler.is_compiling() and x_BTH.dtype == cos.dtype == torch.float32
            and not controlled and not current() and _kernels_take(visible, cache))


def _latent_rows(cache: LatentCache | None, layer: int, x_BTH: Tensor, width: int) -> tuple[Tensor, int]:
    """(cache rows of the layer with room for x, or temporary rows without a cache; index of the first free row)."""
    batch, tokens, _ = x_BTH.shape
    if cache is None:
        return x_BTH.new_empty(batch, tokens, width), 0
    return cache.slot(layer, tokens), cache.length


def fuse(model: CausalLM) -> None:
    """Switch a quantized model to its inference forms; parameters, names and state do not change."""
    for block in (*model.model.layers, *model.model.mtp):
        attention, config = block.self_attn, model.config
        if isinstance(attention.kv_b_proj, QuantizedLinear):
            attention.__class__ = FusedMLA
            assert isinstance(attention, FusedMLA)
            attention.fuse()
        if isinstance(block.mlp, MoE) and config.hidden_size % 4 == 0:
            gate = block.mlp.gate
            gate.__class__ = FusedGate
            assert isinstance(gate, FusedGate)
            gate.fuse()
        block.__class__ = FusedLayer
    model.__class__ = FusedCausalLM


def unfuse(model: CausalLM) -> None:
    """Undo `fuse`: gradients, and modules that replace others, need the plain forms."""
    for block in (*model.model.layers, *model.model.mtp):
        block.__class__ = MTPLayer if hasattr(block, "input") else DecoderLayer
        if isinstance(block.self_attn, FusedMLA):
            del block.self_attn.key, block.self_attn.value, block.self_attn.loras
            block.self_attn.__class__ = MLA  # type: ignore[assignment]
        if isinstance(block.mlp, MoE) and isinstance(block.mlp.gate, FusedGate):
            del block.mlp.gate.weight_PH16
            block.mlp.gate.__class__ = Gate  # type: ignore[assignment]
    model.__class__ = CausalLM
