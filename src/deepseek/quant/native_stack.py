"""The layers of a quantized model as the native kernels run them: fewer, larger steps, the same results.

A `NativeStack` stands beside the modules, which stay as they are and know nothing of it: the model hands it a pack of
tokens (model/cache.py), and it runs

    layers      all of them in one call (ops/native_layers.py); where that cannot be, each of them by its module, with
    attention   naive and absorbed over the latent cache, as operations that read kv_b_proj where it lies
                (ops/latent.py). Absorbed folds the query into latent space by W_key, the key half of kv_b_proj, of
                which there is a copy in 8 bits. Rotation, the latent's norm and the write to the cache are one step.
    gate        its matrix as panels; sigmoid, groups and top-k are one step.

Each attn_impl is batch-invariant: a token gets the same bits in any batch and however its text is cut into calls. The
two (naive for a prompt, absorbed for later tokens, unless the caller chooses) differ in rounding.

Shape letters: T tokens, H hidden, N heads, R latent rank, E experts, G sequences that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .. import ops
from ..config import ModelConfig
from ..model import CausalLM, RoutingRecord
from ..model.adapters import EVERYTHING, AdaptedLinear, LowRank, bare, current, path_of
from ..model.cache import BatchCache, Chunk, PackedBatch
from ..model.decoder import DecoderLayer, run_layers
from ..model.experts import MoE
from ..model.gate import Gate, Route, routing_rule
from ..model.mla import MLA, AttentionContext
from ..ops.latent import latent_pages, naive_pages, prepare_pages
from ..ops.native import native
from ..ops.native_layers import Attention, FeedForward, LayerBlock, LayerStack
from ..ops.panels import ROWS, panel_bytes, unpack
from .linear import QuantizedExperts, QuantizedLinear, QuantizedMLP
from .pack import quantize_panels


class NativeStack(nn.Module):
    """All layers of a model, its MTP modules' included. Its tensors are copies for the kernels and no state.

    residency: a native Residency where not all experts are in memory (engine/residency.py).
    """

    residency: Any = None

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.config = model.config
        layers = (*model.model.layers, *model.model.mtp)
        self.own = nn.ModuleList(NativeLayer(layer, model.config) for layer in layers)
        self.stacks: dict[int, LayerStack] = {}  # first layer -> it and those after it that run together

    @staticmethod
    def of(model: CausalLM) -> NativeStack | None:
        """The model's, None where it runs by its modules alone."""
        return model.layer_runner if isinstance(model.layer_runner, NativeStack) else None

    @staticmethod
    def exact(model: CausalLM) -> bool:
        """Whether a token's bits are the same in any company."""
        return native is not None and NativeStack.of(model) is not None and model.device.type == "cpu"

    def absorbs(self, targets: Sequence[str]) -> bool:
        """Whether prompts of an adapter on `targets` run absorbed: the kernels of naive attention read kv_b_proj where
        it lies and know no LoRA."""
        return any(target.endswith(".kv_b_proj") for target in targets)

    def scratch(self, x_BTH: Tensor) -> BatchCache:
        """A cache whose layers all write to the same rows."""
        cache = BatchCache(self.config, *x_BTH.shape[:2], layers=1, device=x_BTH.device)
        cache.pool.data = cache.pool.data.expand(len(self.own), -1, -1, -1)
        return cache

    def forward(self, layers: Sequence[DecoderLayer], x_1TH: Tensor, context: AttentionContext,
                routing: RoutingRecord | None) -> Tensor:
        pack, first = context.visible, layers[0].layer
        assert isinstance(pack, PackedBatch)
        stack = self._stack(layers)
        if not (stack.ready and _takes(pack) and x_1TH.dtype == context.cos.dtype == torch.float32
                and pack.control is None and not current() and not torch.compiler.is_compiling()):
            return run_layers(self._run_layer, layers, x_1TH, context, routing)
        x, rows = x_1TH.clone(memory_format=torch.contiguous_format), pack.pool.data[first:]
        cos, sin = (angle.contiguous().flatten(0, 1) for angle in (context.cos, context.sin))
        routes = stack.run(x.flatten(0, 1), cos, sin, rows, rows.stride(0), pack.sequences, pack.naive,
                           routing is not None, self.residency if first == 0 else None)
        if routing is not None:
            gated = (layer.layer for layer in layers if isinstance(layer.mlp, MoE))
            routing.routes.update(zip(gated, (Route(*route) for route in routes), strict=True))
        return x

    def _run_layer(self, layer: DecoderLayer, x: Tensor, context: AttentionContext) -> tuple[Tensor, Route | None]:
        return self.own[layer.layer](layer, x, context)

    def _stack(self, layers: Sequence[DecoderLayer]) -> LayerStack:
        first = layers[0].layer
        if first not in self.stacks or self.stacks[first].moved:
            self.stacks[first] = LayerStack(
                [cast(NativeLayer, self.own[layer.layer]).native_args(layer) for layer in layers],
                [module._parameters for layer in layers for module in layer.modules()])
        return self.stacks[first]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeStack:
        self.stacks = {}  # their pointers may not survive
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stacks": {}}  # nor in a copy


class NativeLayer(nn.Module):
    """What one layer needs beside its modules: attention where kv_b_proj is quantized; a gate's matrix as panels."""

    gate_panels: Tensor | None

    def __init__(self, layer: DecoderLayer, config: ModelConfig) -> None:
        super().__init__()
        mla, mlp = layer.self_attn, layer.mlp
        self.config = config
        self.attention = NativeAttention(mla) if isinstance(mla.kv_b_proj, QuantizedLinear) else None
        panels = None
        if isinstance(mlp, MoE) and config.hidden_size % 4 == 0:
            weight = mlp.gate.weight.detach()
            panels = ops.pack_panels(weight if weight.dtype in (torch.bfloat16, torch.float32) else weight.float())
        self.register_buffer("gate_panels", panels, persistent=False)

    def forward(self, layer: DecoderLayer, x: Tensor, context: AttentionContext) -> tuple[Tensor, Route | None]:
        attention = gate = None
        if self.attention is not None and _takes(context.visible):
            attention = partial(self.attention, layer.self_attn)
        if self.gate_panels is not None and isinstance(layer.mlp, MoE):
            gate = partial(self.choose, layer.mlp.gate)
        return layer(x, context, attention, gate)

    def choose(self, gate: Gate, x_TH: Tensor) -> Route:
        assert self.gate_panels is not None
        logits_TE = ops.panel_linear(x_TH, self.gate_panels)[:, : self.config.n_routed_experts]
        return Route(*ops.choose_experts(logits_TE.contiguous(), gate.bias, *routing_rule(self.config)))

    def native_args(self, layer: DecoderLayer) -> LayerBlock:
        mlp, ffn = layer.mlp, None
        if isinstance(mlp, MoE) and isinstance(bare(mlp.experts), QuantizedExperts) and not (
                hasattr(mlp, "shared_experts")):
            experts = bare(mlp.experts)
            if self.gate_panels is not None:
                chosen = (self.config.n_routed_experts, *routing_rule(self.config))
                ffn = FeedForward(experts.table.bits, chosen, self.gate_panels, mlp.gate.bias, experts.table,
                                  experts.shared, experts.shared_inner)
        elif isinstance(mlp, QuantizedMLP):
            no_gate = (0, 0, 0, 0, 0, False, False, False, 0.0)
            ffn = FeedForward(mlp.bits, no_gate, None, None, None, mlp.packed, mlp.inner)
        return LayerBlock(None if self.attention is None else self.attention.native_args(layer.self_attn), ffn,
                          layer.input_layernorm.weight, layer.post_attention_layernorm.weight,
                          layer.input_layernorm.eps)


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


class NativeAttention(nn.Module):
    """MLA whose kv_b_proj is quantized, over packs in FP32.

    key: W_key turned round, [R, nope] of every head in 8 bits; None where nope is 0. value: the value rows of kv_b_proj
    in 8 bits where they cannot be read in their place, because a head's rows are no whole panels.
    """

    key: Tensor | None
    value: Tensor | None

    def __init__(self, mla: MLA) -> None:
        super().__init__()
        self.config, kv_b = mla.config, mla.kv_b_proj
        nope, value = self.config.qk_nope_head_dim, self.config.v_head_dim
        assert isinstance(kv_b, QuantizedLinear)
        w = unpack(kv_b.packed, kv_b.out_features, kv_b.in_features, kv_b.bits).dequantize()
        key_NDR, value_NWR = w.view(self.config.num_attention_heads, nope + value, -1).split((nope, value), 1)
        self.register_buffer("key", _by_head(key_NDR.transpose(1, 2)) if nope else None, persistent=False)
        in_place = nope % ROWS == 0 and value % ROWS == 0
        self.register_buffer("value", None if in_place else _by_head(value_NWR), persistent=False)
        self.loras: dict[str, AbsorbedLora] = {}

    def native_args(self, mla: MLA) -> Attention | None:
        """Arguments of a native layer, without adapters; None where a projection is not quantized."""
        config = self.config
        q_a = bare(mla.q_a_proj) if config.q_lora_rank is not None else None
        q_b = bare(mla.q_proj if config.q_lora_rank is None else mla.q_b_proj)
        projections = (q_a, q_b, *map(bare, (mla.kv_a_proj_with_mqa, mla.kv_b_proj, mla.o_proj)))
        if not all(p is None or isinstance(p, QuantizedLinear) for p in projections) or q_b.bias is not None:
            return None
        return Attention(
            (config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim,
             config.kv_lora_rank, config.v_head_dim, config.q_lora_rank or 0), projections[3].bits,
            tuple(None if p is None else p.packed for p in projections),
            (None if q_a is None else mla.q_a_layernorm.weight, mla.kv_a_layernorm.weight,
             None if q_a is None else q_a.bias, projections[2].bias, projections[4].bias),
            0.0 if q_a is None else mla.q_a_layernorm.eps, mla.kv_a_layernorm.eps, config.softmax_scale,
            self.key, config.rope_interleave)

    def forward(self, mla: MLA, x_1TH: Tensor, context: AttentionContext, layer: int) -> Tensor:
        pack = context.visible
        assert isinstance(pack, PackedBatch)
        # LoRA on kv_b_proj is unknown to the kernels of naive attention
        adapted = isinstance(mla.kv_b_proj, AdaptedLinear) and any(
            mla.kv_b_proj.path(chunk.adapter) for chunk in pack.chunks[: pack.naive])
        by_pages = native is not None and self.config.kv_lora_rank % ROWS == 0 and not adapted
        attend = self._by_pages if by_pages else self._by_chunks
        values = attend(mla, mla.queries(x_1TH), mla.kv_a_proj_with_mqa(x_1TH), context, pack, layer)
        return mla.o_proj(values.flatten(1).unsqueeze(0))

    def _by_chunks(self, mla: MLA, q_1TND: Tensor, kv_1TC: Tensor, context: AttentionContext, pack: PackedBatch,
                   layer: int) -> Tensor:
        """All heads' values of a pack's tokens, [T, N, W]; their rows of the pool are written."""
        norm, rows = mla.kv_a_layernorm, torch.empty_like(kv_1TC)
        q_rope = ops.prepare_latents(q_1TND, kv_1TC, norm.weight, norm.eps, context.cos, context.sin,
                                     self.config.rope_interleave, rows, 0)
        pack.write(layer, rows[0])
        return torch.cat([
            self._attend(mla, q_1TND[0, place].unflatten(0, (len(rows), chunk.tokens)),
                         q_rope[0, place].unflatten(0, (len(rows), chunk.tokens)), rows, chunk).flatten(0, 1)
            for chunk, place, rows in pack.read(layer)])

    def _attend(self, mla: MLA, q_GTND: Tensor, q_rope: Tensor, rows_GSC: Tensor, chunk: Chunk) -> Tensor:
        """[G, T, N, W] of chunks that are alike; with LoRA on kv_b_proj attention is absorbed, whatever is asked."""
        config, kv_b, lora = self.config, bare(mla.kv_b_proj), self._absorbed_lora(mla, chunk.adapter)
        q_GTND, q_rope = q_GTND.contiguous(), q_rope.contiguous()
        past_G = torch.full((len(rows_GSC),), chunk.past, device=rows_GSC.device)
        span = torch.zeros_like(past_G), past_G
        if chunk.attn_impl == "naive" and lora is None:
            return ops.naive_attention(q_GTND, q_rope, rows_GSC, kv_b.packed, config.v_head_dim, *span,
                                       config.softmax_scale, bits=kv_b.bits)
        loras = [] if lora is None else [(lora, EVERYTHING)]
        q_latent = self._queries(q_GTND.flatten(0, 1), loras).unflatten(0, q_GTND.shape[:2])
        latent = ops.latent_attention(q_latent, q_rope, rows_GSC, *span, config.softmax_scale)
        return self._values(mla, latent.flatten(0, 1), loras).unflatten(0, q_GTND.shape[:2])

    def _by_pages(self, mla: MLA, q_1TND: Tensor, kv_1TC: Tensor, context: AttentionContext, pack: PackedBatch,
                  layer: int) -> Tensor:
        """`_by_chunks` with the same kernels for all chunks at once, which read the pages where they lie."""
        config, kv_b, cache = self.config, bare(mla.kv_b_proj), pack.pool.data[layer]
        norm, q_TND = mla.kv_a_layernorm, q_1TND[0].contiguous()
        q_rope = prepare_pages(q_TND, kv_1TC[0].contiguous(), norm.weight, norm.eps, context.cos[0], context.sin[0],
                               config.rope_interleave, cache, pack.sequences)
        prompts, later = pack.sequences.split(pack.naive)
        first, parts = int(later.begin[0]) if len(later.past) else len(q_TND), []
        if pack.naive:
            parts.append(naive_pages(q_TND[:first], q_rope[:first], cache, kv_b.packed, config.v_head_dim, prompts,
                                     config.softmax_scale, kv_b.bits))
        if first < len(q_TND):
            loras = [(lora, slice(rows.start - first, rows.stop - first)) for name, rows in pack.spans
                     if (lora := self._absorbed_lora(mla, name)) is not None]
            latent = latent_pages(self._queries(q_TND[first:], loras), q_rope[first:], cache, later.moved(),
                                  config.softmax_scale)
            parts.append(self._values(mla, latent, loras))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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

    def _values(self, mla: MLA, latent_TNR: Tensor, loras: AbsorbedLoras) -> Tensor:
        """Each head's summed latent through the value half of kv_b_proj, [T, N, W]."""
        out_TNW = self._base_values(mla, latent_TNR)
        for lora, rows in loras:
            out_TNW[rows] += lora.values(latent_TNR[rows])
        return out_TNW

    def _absorbed_lora(self, mla: MLA, adapter: str | None) -> AbsorbedLora | None:
        """An adapter's matrices on kv_b_proj as absorbed attention needs them, made when first used; None without."""
        path = path_of(mla.kv_b_proj, adapter)
        if path is None or adapter is None:
            return None
        if adapter not in self.loras:
            self.loras[adapter] = AbsorbedLora(path, self.config)
        return self.loras[adapter]

    def _base_values(self, mla: MLA, latent_TNR: Tensor) -> Tensor:
        config, kv_b = self.config, bare(mla.kv_b_proj)
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


def _takes(pack: Any) -> bool:
    """Whether the kernels can read and write the pack's rows."""
    assert isinstance(pack, PackedBatch)
    return pack.pool.data.dtype == torch.float32 and pack.pool.data.device.type == "cpu"
