"""The layers of a model as the native kernels run them: fewer, larger steps, the same results.

A `NativeStack` stands beside the modules, which stay as they are and know nothing of it: the model hands it a pack of
tokens (model/cache.py), and it runs, of a quantized model,

    layers      all of them in one call (ops/native_layers.py); where that cannot be, each of them by its module, with
    attention   naive and absorbed over the latent cache, as operations that read kv_b_proj where it lies
                (ops/latent.py). Absorbed folds the query into latent space by W_key, the key half of kv_b_proj, of
                which there is a copy in 8 bits. Rotation, the latent's norm and the write to the cache are one step.
    gate        its product; sigmoid, groups and top-k are one step.

Of plain weights it runs steps of few tokens (`beside`), whose time is that of reading the weights: all layers in one
call, on BF16 or FP32 matrices where they lie, with activations in FP32; W_key is then a copy in their dtype. Larger
steps stay with the modules, whose products are torch's.

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

from .. import ops
from ..config import ModelConfig
from ..model import CausalLM, RoutingRecord
from ..model.adapters import EVERYTHING, Adapter, Share, bare, current, paths_of
from ..model.cache import BatchCache, Chunk, PackedBatch
from ..model.decoder import DecoderLayer, run_layers
from ..model.experts import MoE, RoutedExperts
from ..model.gate import Gate, Route, routing_rule
from ..model.layers import MLP, Linear
from ..model.mla import MLA, AttentionContext
from ..ops.latent import latent_pages, naive_pages, prepare_pages
from ..ops.native import CHOSEN, native
from ..ops.native_layers import Attention, FeedForward, LayerBlock, LayerStack, MLPs
from ..ops.panels import ROWS, panel_bytes, unpack
from ..ops.quantized import PLAIN_BITS
from .linear import QuantizedExperts, QuantizedLinear, QuantizedMLP, is_quantized
from .native_adapters import AbsorbedLora, AbsorbedLoras, by_head, layer_adapters

FEW = 16  # tokens of a step that the kernels run with plain weights; of more, torch's products are faster


class NativeStack(nn.Module):
    """All layers of a model, its MTP modules' included. Its tensors are copies for the kernels and no state.

    few: tokens of a step that run in one native call at most; None: any number.
    residency: a native Residency where not all experts are in memory (engine/residency.py).
    """

    residency: Any = None

    def __init__(self, model: CausalLM, few: int | None = None) -> None:
        super().__init__()
        self.config, self.few = model.config, few
        layers = (*model.model.layers, *model.model.mtp)
        self.own = nn.ModuleList(NativeLayer(layer, model.config) for layer in layers)
        self.stacks: dict[int, LayerStack] = {}  # first layer -> it and those after it that run together

    @staticmethod
    def of(model: CausalLM) -> NativeStack | None:
        """The model's, None where it runs by its modules alone."""
        return model.layer_runner if isinstance(model.layer_runner, NativeStack) else None

    @classmethod
    def beside(cls, model: CausalLM) -> NativeStack | None:
        """One for the steps of few tokens of a model that is not quantized, which keeps its modules; None where the
        kernels cannot take it."""
        if not CHOSEN or model.layer_runner is not None or model.device.type != "cpu":
            return None
        stack = cls(model, FEW)
        return stack if stack._stack(cast(Sequence[DecoderLayer], model.model.layers)).ready else None

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
        known = x_1TH.dtype == torch.float32 if self.few is None else pack.tokens <= self.few
        adapted, adapters = current(), None
        if not (known and stack.ready and _takes(pack) and context.cos.dtype == torch.float32
                and pack.control is None and not torch.compiler.is_compiling()) or (
                adapted is not None and (adapters := layer_adapters(stack, layers, tuple(adapted.shares))) is None):
            return run_layers(self._run_layer, layers, x_1TH, context, routing)
        x = x_1TH.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows = pack.pool.data[first:]
        cos, sin = (angle.contiguous().flatten(0, 1) for angle in (context.cos, context.sin))
        routes = stack.run(x.flatten(0, 1), cos, sin, rows, rows.stride(0), pack.sequences, pack.naive,
                           routing is not None, self.residency if first == 0 else None, adapters,
                           None if adapted is None else adapted.weights(tuple(adapted.shares), pack.tokens))
        if routing is not None:
            gated = (layer.layer for layer in layers if isinstance(layer.mlp, MoE))
            routing.routes.update(zip(gated, (Route(*route) for route in routes), strict=True))
        return x.to(x_1TH.dtype)

    def _run_layer(self, layer: DecoderLayer, x: Tensor, context: AttentionContext) -> tuple[Tensor, Route | None]:
        return self.own[layer.layer](layer, x, context)

    def _stack(self, layers: Sequence[DecoderLayer]) -> LayerStack:
        first = layers[0].layer
        if first not in self.stacks or self.stacks[first].changed:
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
    """What one layer needs beside its modules: attention where kv_b_proj is quantized, and a gate's choice."""

    def __init__(self, layer: DecoderLayer, config: ModelConfig) -> None:
        super().__init__()
        mla = layer.self_attn
        self.config, self.quantized = config, is_quantized(layer)
        self.attention = NativeAttention(mla) if isinstance(mla.kv_b_proj, QuantizedLinear) else None

    def forward(self, layer: DecoderLayer, x: Tensor, context: AttentionContext) -> tuple[Tensor, Route | None]:
        attention = gate = None
        if self.attention is not None and _takes(context.visible):
            attention = partial(self.attention, layer.self_attn)
        if self.quantized and isinstance(layer.mlp, MoE):
            gate = partial(self.choose, layer.mlp.gate)
        return layer(x, context, attention, gate)

    def choose(self, gate: Gate, x_TH: Tensor) -> Route:
        logits_TE = ops.plain_linear(x_TH, _gate_weight(gate))
        return Route(*ops.choose_experts(logits_TE, gate.bias, *routing_rule(self.config)))

    def native_args(self, layer: DecoderLayer) -> LayerBlock:
        key = None if self.attention is None else self.attention.key
        return LayerBlock(_attention_args(layer.self_attn, key), _ffn_args(layer.mlp, self.config),
                          layer.input_layernorm.weight, layer.post_attention_layernorm.weight,
                          layer.input_layernorm.eps)


def _gate_weight(gate: Gate) -> Tensor:
    weight = gate.weight.detach()
    return weight if weight.dtype in PLAIN_BITS else weight.float()


def _stored(module: Any) -> tuple[Tensor | None, int]:
    """A projection's weights as the kernels read them, and their bits; no weights where they cannot."""
    module = bare(module)
    if isinstance(module, QuantizedLinear):
        return module.packed, module.bits
    known = type(module) is Linear and module.weight.dtype in PLAIN_BITS
    return (module.weight, PLAIN_BITS[module.weight.dtype]) if known else (None, 0)


def _attention_args(mla: MLA, key: Tensor | None) -> Attention | None:
    """Arguments of a native layer, without adapters; None where the kernels cannot take a projection. key: of a
    quantized kv_b_proj."""
    config, compressed = mla.config, mla.config.q_lora_rank is not None
    q_a, q_b = (bare(mla.q_a_proj), bare(mla.q_b_proj)) if compressed else (None, bare(mla.q_proj))
    kv_a, kv_b, o = map(bare, (mla.kv_a_proj_with_mqa, mla.kv_b_proj, mla.o_proj))
    stored = [_stored(module) for module in (q_a, q_b, kv_a, kv_b, o) if module is not None]
    weights, bits = [w for w, _ in stored], stored[-1][1]
    if any(w is None for w in weights) or {one for _, one in stored} != {bits} or q_b.bias is not None:
        return None
    if bits > 8 and config.qk_nope_head_dim:
        w_NDR = kv_b.weight.detach().unflatten(0, (config.num_attention_heads, -1))
        key = w_NDR[:, : config.qk_nope_head_dim].transpose(1, 2).contiguous()
    return Attention(
        (config.hidden_size, config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim,
         config.kv_lora_rank, config.v_head_dim, config.q_lora_rank or 0), bits,
        tuple(weights if compressed else [None, *weights]),
        (mla.q_a_layernorm.weight if compressed else None, mla.kv_a_layernorm.weight,
         None if q_a is None else q_a.bias, kv_a.bias, o.bias),
        mla.q_a_layernorm.eps if compressed else 0.0, mla.kv_a_layernorm.eps, config.softmax_scale, key,
        config.rope_interleave)


def _mlp_args(mlp: nn.Module) -> tuple[MLPs | None, int, int]:
    """(MLP, width, bits) of a dense layer's FFN or the shared experts; None where the kernels cannot take it."""
    if isinstance(mlp, QuantizedMLP):
        return MLPs.packed(mlp.packed), mlp.inner, mlp.bits
    if type(mlp) is not MLP:
        return None, 0, 0
    stored = [_stored(module) for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    plain, bits = [w for w, one in stored if w is not None and one > 8], {one for _, one in stored}
    if len(plain) < 3 or len(bits) > 1:
        return None, 0, 0
    return MLPs.plain(*(w.detach() for w in plain)), mlp.gate_proj.out_features, bits.pop()


def _ffn_args(mlp: nn.Module, config: ModelConfig) -> FeedForward | None:
    """The same for a layer's FFN."""
    if not isinstance(mlp, MoE):
        dense, inner, bits = _mlp_args(mlp)
        return None if dense is None else FeedForward(
            bits, (0, 0, 0, 0, 0, False, False, False, 0.0), None, None, 0, None, inner, dense)
    chosen = (config.n_routed_experts, *routing_rule(config)), _gate_weight(mlp.gate), mlp.gate.bias
    experts, beside = bare(mlp.experts), getattr(mlp, "shared_experts", None)
    if isinstance(experts, QuantizedExperts) and beside is None:
        table = experts.table
        return FeedForward(table.bits, *chosen, table.inner, MLPs(table, table.addresses), experts.shared_inner,
                           None if experts.shared is None else MLPs.packed(experts.shared))
    if type(experts) is not RoutedExperts:
        return None
    (gate, up), down = experts.gate_up_proj.detach().chunk(2, 1), experts.down_proj.detach()
    shared, shared_inner, bits = (None, 0, PLAIN_BITS.get(down.dtype, 0)) if beside is None else _mlp_args(beside)
    if {gate.dtype, down.dtype} != {dtype for dtype in PLAIN_BITS if PLAIN_BITS[dtype] == bits}:
        return None
    return FeedForward(bits, *chosen, down.shape[2], MLPs.plain(gate, up, down), shared_inner, shared)


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
        self.register_buffer("key", by_head(key_NDR.transpose(1, 2)) if nope else None, persistent=False)
        in_place = nope % ROWS == 0 and value % ROWS == 0
        self.register_buffer("value", None if in_place else by_head(value_NWR), persistent=False)
        self.loras: dict[str, AbsorbedLora] = {}

    def forward(self, mla: MLA, x_1TH: Tensor, context: AttentionContext, layer: int) -> Tensor:
        pack = context.visible
        assert isinstance(pack, PackedBatch)
        # LoRA on kv_b_proj is unknown to the kernels of naive attention
        adapted = any(paths_of(mla.kv_b_proj, chunk.adapter) for chunk in pack.chunks[: pack.naive])
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
        config, kv_b, loras = self.config, bare(mla.kv_b_proj), self._absorbed_loras(mla, chunk.adapter)
        q_GTND, q_rope = q_GTND.contiguous(), q_rope.contiguous()
        past_G = torch.full((len(rows_GSC),), chunk.past, device=rows_GSC.device)
        span = torch.zeros_like(past_G), past_G
        if chunk.attn_impl == "naive" and not loras:
            return ops.naive_attention(q_GTND, q_rope, rows_GSC, kv_b.packed, config.v_head_dim, *span,
                                       config.softmax_scale, bits=kv_b.bits)
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
            loras = [(lora, share) for name, share in pack.absorbed_shares.items()
                     for lora, _ in self._absorbed_loras(mla, name)]
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
        for lora, share in loras:
            share.add(out_TNR, lora.queries(q_TND[share.rows]))
        return out_TNR

    def _values(self, mla: MLA, latent_TNR: Tensor, loras: AbsorbedLoras) -> Tensor:
        """Each head's summed latent through the value half of kv_b_proj, [T, N, W]."""
        out_TNW = self._base_values(mla, latent_TNR)
        for lora, share in loras:
            share.add(out_TNW, lora.values(latent_TNR[share.rows]))
        return out_TNW

    def _absorbed_loras(self, mla: MLA, adapter: Adapter | None) -> AbsorbedLoras:
        """The matrices on kv_b_proj of an adapter, or of a mixture's members, as absorbed attention needs them, made
        when first used; for all rows."""
        found = paths_of(mla.kv_b_proj, adapter)
        for name, path, _ in found:
            if name not in self.loras:
                self.loras[name] = AbsorbedLora(path, self.config)
        return [(self.loras[name], Share(EVERYTHING, weight)) for name, _, weight in found]

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


def _takes(pack: Any) -> bool:
    """Whether the kernels can read and write the pack's rows."""
    assert isinstance(pack, PackedBatch)
    return pack.pool.data.dtype == torch.float32 and pack.pool.data.device.type == "cpu"
