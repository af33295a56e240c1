"""Token ids -> logits: the DeepSeek-V3 (and V2) language model.

    embed -> [ x + mla(norm(x));  x + ffn(norm(x)) ] * layers -> norm -> lm_head
                                   ffn: dense for the first layers, then gate + experts
                                 ↳ MTP modules, each one layer more, predict further ahead

Nothing here keeps state between calls: caches and routing records are objects that the caller owns, and auxiliary
results (routes) are returned, so gradient checkpointing may recompute a layer without counting twice.

Shape letters: B batch, T tokens, S positions in the cache, H hidden, V vocabulary, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import ModelConfig
from ..deprecation import warn
from ..errors import CheckpointError, RequestError
from ..ops.loss import IGNORE
from ..ops.saved import Saver
from .adapters import current, of_all_rows, rows_of
from .cache import BatchCache, Impl, LatentPool, PackedBatch
from .decoder import Decoder, LayerRunner, MTPLayer, RoutingRecord, run_layers
from .experts import MoE
from .gate import Route, expert_load, guidance_loss, sequence_balance_loss
from .layers import Linear
from .mla import AttentionContext, AttentionMask, AttnImpl


@dataclass
class TrainingLoss:
    """Losses of one batch (scalars, FP32) and the load of each expert.

    total = main + mtp_weight * mtp + balance_weight * balance + guide_weight * guide; load_LE rows follow `moe_layers`,
    then the MTP layers.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor | None
    balance: Tensor | None
    guide: Tensor | None
    load_LE: Tensor


class CausalLM(nn.Module):
    """`model(ids_BT)` -> logits_BTV in FP32."""

    layer_runner: LayerRunner | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.layer_runner = None  # None: the layers run module by module
        self.gradient_checkpointing = False
        self.saver: Saver | None = None  # keeps in FP8 what layers save for the backward pass
        self.compute_dtype: torch.dtype | None = None  # of the activations; None: that of the weights

    @classmethod
    def on_meta(cls, config: ModelConfig) -> CausalLM:
        """A model of names and shapes alone, without memory."""
        with torch.device("meta"):
            return cls(config)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> CausalLM:
        """Normal with initializer_range for every matrix, ones for norms, zeros for biases (V3, section 4.2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
        return self

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def new_cache(self, batch: int = 1, length: int = 256, dtype: torch.dtype = torch.float32) -> BatchCache:
        """An empty cache for `cache=`, on the model's device. length: positions to start with; it grows."""
        return BatchCache(self.config, batch, length, dtype=dtype, device=self.device)

    def moe_blocks(self) -> dict[int, MoE]:
        """Layer index -> its MoE block, MTP layers last."""
        layers = [*self.model.layers, *self.model.mtp]
        return {block.layer: block.mlp for block in layers if isinstance(block.mlp, MoE)}

    def check_gates(self) -> None:
        """Raises CheckpointError naming a gate's weight or bias that holds a value that is not finite. It would not be
        seen in the logits: such an expert is always chosen, or never."""
        for layer, block in self.moe_blocks().items():
            for name, tensor in (("weight", block.gate.weight), ("e_score_correction_bias", block.gate.bias)):
                if tensor is not None and not bool(tensor.isfinite().all()):
                    raise CheckpointError(f"model.layers.{layer}.mlp.gate.{name} holds values that are not finite")

    # ---- inference --------------------------------------------------------------------------------------------

    def forward(
        self,
        ids_BT: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: BatchCache | None = None,
        routing: RoutingRecord | None = None,
        attn_impl: AttnImpl = "auto",
        last_only: bool = False,
        order: AttnImpl | None = None,
    ) -> Tensor:
        """Logits in FP32, [B, T, V], or [B, 1, V] with `last_only`.

        mask_BT: True (or 1) for tokens, False for padding on either side. cache: from `new_cache`, read and extended.
        routing: filled with every gate's decision. attn_impl: naive or absorbed
        (model/mla.py); each is batch-invariant, the two round differently.
        order: deprecated, attn_impl.
        Raises RequestError for ids outside the vocabulary or shapes that do not fit.
        """
        if order is not None:
            warn("order is deprecated: use attn_impl")
            attn_impl = order
        h_BTH = self.hidden(ids_BT, mask_BT, positions_BT, cache, routing, attn_impl)
        return self.lm_head(h_BTH[:, -1:] if last_only else h_BTH).float()

    def hidden(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: BatchCache | None = None,
        routing: RoutingRecord | None = None,
        attn_impl: AttnImpl = "auto",
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, H]; where a cache or a layer runner is used, zeros for padding."""
        self._check(ids_BT, mask_BT, positions_BT, cache)
        x = self._embed(ids_BT)
        return self.model.norm(self._run_batch(self.model.layers, x, mask_BT, positions_BT, cache, routing, attn_impl))

    def packed(self, ids_T: Tensor, pack: PackedBatch, routing: RoutingRecord | None = None,
               runner: LayerRunner | None = None) -> Tensor:
        """Hidden states after the final norm of a pack's tokens, [T, H]; their rows of the pool are written. runner:
        runs the layers instead of the model's own."""
        assert len(ids_T) == pack.tokens
        with rows_of(pack.spans):
            x = self._run(self.model.layers, self._embed(ids_T[None]), pack.positions[None], pack, routing,
                          runner=runner)
        return self.model.norm(x)[0]

    def _run_batch(
        self, layers: Any, x_BTH: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None,
        cache: BatchCache | None, routing: RoutingRecord | None, attn_impl: AttnImpl = "auto",
    ) -> Tensor:
        """Run layers over a batch of rows: as a pack of its real tokens where there is a cache or a layer runner."""
        if attn_impl == "auto":
            attn_impl = "naive" if cache is None or x_BTH.shape[1] > 1 else "absorbed"
        if mask_BT is not None:
            mask_BT = None if bool(mask_BT.all()) else mask_BT.bool()
        if cache is None and self.layer_runner is not None:
            cache = self.layer_runner.scratch(x_BTH)
        if cache is not None:
            return self._run_cached(layers, x_BTH, mask_BT, positions_BT, cache, routing, attn_impl)
        if positions_BT is None:
            positions_BT = _positions(x_BTH, mask_BT)
        mask = None if mask_BT is None else AttentionMask(mask_BT)
        return self._run(layers, x_BTH, positions_BT, mask, routing, attn_impl)

    def _run_cached(
        self, layers: Any, x_BTH: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None, cache: BatchCache,
        routing: RoutingRecord | None, attn_impl: Impl,
    ) -> Tensor:
        """Padding is left out; it comes back as zeros, and as routes to expert -1."""
        batch, tokens, _ = x_BTH.shape
        counts = [tokens] * batch if mask_BT is None else mask_BT.sum(1).tolist()
        if not any(counts):
            return torch.zeros_like(x_BTH)
        adapter = of_all_rows()
        assert adapter is not None or current() is None, "the rows of a batch are one adapter's"
        pack = cache.pack(counts, attn_impl, adapter)
        positions_T = pack.positions if positions_BT is None else _real(positions_BT.expand(batch, -1), mask_BT)
        own = None if routing is None else RoutingRecord()
        x_TH = self._run(layers, _real(x_BTH, mask_BT)[None], positions_T[None], pack, own)[0]
        cache.advance(counts)
        if routing is not None and own is not None:
            routing.routes |= own.routes if mask_BT is None else {
                layer: Route(*(_with_padding(part, mask_BT, fill).flatten(0, 1)
                               for part, fill in zip(route, (-1, 0, 0), strict=True)))
                for layer, route in own.routes.items()}
        return x_TH.unflatten(0, (batch, tokens)) if mask_BT is None else _with_padding(x_TH, mask_BT)

    def _run(self, layers: Any, x: Tensor, positions_BT: Tensor, visible: AttentionMask | PackedBatch | None,
             routing: RoutingRecord | None, attn_impl: Impl = "naive", runner: LayerRunner | None = None) -> Tensor:
        cos, sin = self.model.rotary(positions_BT)
        context = AttentionContext(cos, sin, visible, attn_impl)
        runner = self.layer_runner if runner is None else runner
        if runner is not None:
            return runner(layers, x, context, routing)
        return run_layers(self._run_layer, layers, x, context, routing)

    def _run_layer(self, layer: nn.Module, x: Tensor, context: AttentionContext) -> tuple[Tensor, Route | None]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, context, use_reentrant=False)
        if self.saver is not None and torch.is_grad_enabled():
            with self.saver.saving((*layer.parameters(), *layer.buffers(), context.cos, context.sin)):
                return layer(x, context)
        return layer(x, context)

    def _embed(self, ids_BT: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids_BT)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def _check(
        self, ids_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None, cache: BatchCache | None
    ) -> None:
        if ids_BT.ndim != 2 or ids_BT.numel() == 0:
            raise RequestError(f"ids must have shape [batch, tokens], both >= 1, got {tuple(ids_BT.shape)}")
        if ids_BT.dtype not in (torch.int64, torch.int32):
            raise RequestError(f"ids must be int64 or int32, got {ids_BT.dtype}")
        low, high = (int(v) for v in torch.aminmax(ids_BT))
        if low < 0 or high >= self.config.vocab_size:
            bad, last = low if low < 0 else high, self.config.vocab_size - 1
            raise RequestError(f"token id {bad} is outside the vocabulary 0..{last}")
        if mask_BT is not None and mask_BT.shape != ids_BT.shape:
            raise RequestError(f"mask has shape {tuple(mask_BT.shape)}, ids have {tuple(ids_BT.shape)}")
        if positions_BT is not None and positions_BT.shape not in (ids_BT.shape, (1, ids_BT.shape[1])):
            raise RequestError(f"positions have shape {tuple(positions_BT.shape)}, ids have {tuple(ids_BT.shape)}")
        if cache is not None and cache.batch != ids_BT.shape[0]:
            raise RequestError(f"cache was made for batch {cache.batch}, ids have batch {ids_BT.shape[0]}")

    # ---- multi-token prediction and training -------------------------------------------------------------------

    def mtp_hidden(
        self,
        depth: int,
        previous_BTH: Tensor,
        next_ids_BT: Tensor,
        *,
        mask_BT: Tensor | None = None,
        routing: RoutingRecord | None = None,
    ) -> Tensor:
        """Module `depth` (0 the first): hidden states ready for lm_head, [B, T, H].

        previous_BTH: the final hidden states of the model before (after its norm); next_ids_BT: for each position the
        token `depth + 1` places further on.
        """
        block: MTPLayer = self.model.mtp[depth]  # type: ignore[assignment]
        x = block.input(self._embed(next_ids_BT), previous_BTH)
        return block.shared_head.norm(self._run_batch([block], x, mask_BT, None, None, routing))

    def mtp_packed(self, depth: int, previous_TH: Tensor, next_ids_T: Tensor, pack: PackedBatch,
                   runner: LayerRunner | None = None) -> Tensor:
        """The same for a pack's tokens, [T, H]; the module's rows of the pool are written. runner: as of `packed`."""
        block: MTPLayer = self.model.mtp[depth]  # type: ignore[assignment]
        x = block.input(self._embed(next_ids_T[None]), previous_TH[None])
        return block.shared_head.norm(self._run([block], x, pack.positions[None], pack, None, runner=runner))[0]

    def loss(
        self, ids_BT: Tensor, labels_BT: Tensor, *, mask_BT: Tensor | None = None, mtp_weight: float = 0.0,
        balance_weight: float = 0.0, group_BT: Tensor | None = None, guide_weight: float = 0.0,
        routing: RoutingRecord | None = None,
    ) -> TrainingLoss:
        """Training losses. labels_BT[b, t] is the token that position t should predict (already shifted), or -100.

        The MTP modules (where there are any and mtp_weight > 0) predict labels shifted further; the whole head runs
        fused with its cross entropy, so no [B, T, V] tensor exists. group_BT: the routing group that each token is
        guided to, -1 for none (`guidance_loss`). routing: filled with every gate's decision.
        """
        routing = RoutingRecord() if routing is None else routing
        mask_BT = None if mask_BT is None else mask_BT.bool()
        h_BTH = self._states(ids_BT, mask_BT, routing)
        main = self._head_loss(h_BTH, labels_BT)
        guide = None
        if group_BT is not None and guide_weight and routing.routes:
            parts = [guidance_loss(route, group_BT.flatten(), self.config) for route in routing.routes.values()]
            guide = torch.stack(parts).mean()
        masks: dict[int, Tensor | None] = dict.fromkeys(routing.routes, mask_BT)
        total, mtp = main, None
        if mtp_weight and len(self.model.mtp) and ids_BT.shape[1] > 1:
            parts, here_BT = [], mask_BT
            for depth in range(min(len(self.model.mtp), ids_BT.shape[1] - 1)):
                h_BTH, ids_BT, labels_BT = h_BTH[:, :-1], ids_BT[:, 1:], labels_BT[:, 1:]
                if mask_BT is not None and here_BT is not None:  # a position and the token it is given are both real
                    here_BT = here_BT[:, :-1] & mask_BT[:, depth + 1 :]
                    labels_BT = labels_BT.masked_fill(~here_BT, IGNORE)
                h_BTH = self.mtp_hidden(depth, h_BTH, ids_BT, mask_BT=here_BT, routing=routing)
                masks[self.config.num_hidden_layers + depth] = here_BT
                parts.append(self._head_loss(h_BTH, labels_BT))
            mtp = torch.stack(parts).mean()
            total = total + mtp_weight * mtp
        routes = [(route, None if (mask := masks[layer]) is None else mask.reshape(-1))
                  for layer, route in routing.routes.items()]
        balance = None
        if balance_weight and routes:
            parts = [sequence_balance_loss(route, len(labels_BT), mask_T) for route, mask_T in routes]
            balance = torch.stack(parts).mean()
            total = total + balance_weight * balance
        if guide is not None:
            total = total + guide_weight * guide
        experts = self.config.n_routed_experts
        loads = [expert_load(route.index_TK, experts, mask_T) for route, mask_T in routes]
        load_LE = torch.stack(loads) if loads else torch.zeros(0, experts, dtype=torch.long)
        return TrainingLoss(total, main, mtp, balance, guide, load_LE)

    def row_losses(self, ids_BT: Tensor, labels_BT: Tensor, *, mask_BT: Tensor | None = None,
                   routing: RoutingRecord | None = None) -> Tensor:
        """The main loss of each row, summed over its labels, [B]; arguments as in `loss`."""
        h_BTH = self._states(ids_BT, None if mask_BT is None else mask_BT.bool(), routing)
        count_B = (labels_BT != IGNORE).sum(1)
        return torch.stack([self._head_loss(h, labels) for h, labels in zip(h_BTH, labels_BT, strict=True)]) * count_B

    def _states(self, ids_BT: Tensor, mask_BT: Tensor | None, routing: RoutingRecord | None) -> Tensor:
        ends_padded = mask_BT is not None and bool((mask_BT[:, :-1] | ~mask_BT[:, 1:]).all())
        # nothing looks at padding that comes after it
        return self.hidden(ids_BT, None if ends_padded else mask_BT, routing=routing)

    def _head_loss(self, h_BTH: Tensor, labels_BT: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h_BTH.reshape(-1, h_BTH.shape[-1]), self.lm_head.weight, labels_BT.reshape(-1))


def describe(config: ModelConfig) -> str:
    """`7.4 M parameters, 5 layers, 4 of them with 16 experts, 4 a token`, as of a model without its MTP modules."""
    size = sum(p.numel() for p in CausalLM.on_meta(config.with_(num_nextn_predict_layers=0)).parameters())
    power = min((len(str(size)) - 1) // 3, 3)
    moe = len(config.moe_layers)
    experts = f", {moe} of them with {config.n_routed_experts} experts, {config.num_experts_per_tok} a token"
    return (f"{size / 1e3**power:,.1f}{('', ' K', ' M', ' B')[power]} parameters, {config.num_hidden_layers} layers"
            f"{experts if moe else ''}")


def _positions(x_BTH: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Positions count tokens, not padding."""
    if mask_BT is not None:
        return (mask_BT.long().cumsum(1) - 1).clamp(min=0)
    return torch.arange(x_BTH.shape[1], device=x_BTH.device).unsqueeze(0)


def _real(x_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The real tokens of all rows side by side."""
    return x_BT.flatten(0, 1) if mask_BT is None else x_BT[mask_BT]


def _with_padding(x_T: Tensor, mask_BT: Tensor, fill: int = 0) -> Tensor:
    """`_real` undone."""
    out_BT = x_T.new_full((*mask_BT.shape, *x_T.shape[1:]), fill)
    out_BT[mask_BT] = x_T
    return out_BT


__all__ = ["IGNORE", "BatchCache", "CausalLM", "LatentPool", "PackedBatch", "RoutingRecord", "TrainingLoss",
           "describe"]
