"""The routed experts of one layer: a single pass over (expert, token) pairs sorted by expert.

    pairs    flatten the gate's choice [T, K] and sort it by expert: rows of one expert become contiguous
    gate up  h = silu(x W_gate^T) * (x W_up^T)        one grouped product over the sorted rows
    down     y = (weight * h) W_down^T                the gate's weight goes in where rows are narrow (I, not H)
    combine  out[t] = sum over the K pairs of t       in a fixed order: deterministic

Two forms of the grouped product. torch's `grouped_mm` runs all experts in one call and is what GPUs want. On a CPU it
is a loop over experts inside torch, as fast forward but not backward (docs/log.md); writing that loop here costs
microseconds and keeps each expert's rows in the cache through gate, up, SiLU and down, forward and backward, so that is
the CPU form; its native one (csrc/training.cpp) runs wherever it can. All are tested against `expert_mlp_reference`.
Where a model is trained through torch's BF16 products and a third or more of its narrow experts are chosen, as in a
carved one, all experts are one wide FFN with weight 0 for those not chosen: more products, in half of the time
(docs/log.md).

Shape letters: T tokens, K experts a token, P = T*K pairs, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad, silu

from .linear import linear, to_compute_dtype
from .native import address, dtype_code, fast_bf16, native, runs_native, threads, trains_native

ROWS = 128  # see _filler
NARROW = 128  # neurons; wider experts are better taken one by one


class Pairs(NamedTuple):
    """Pairs sorted by expert. token_P: token of each sorted pair; slot_TK: where pair (t, k) went, -1 if it is none;
    counts_E."""

    token_P: Tensor
    slot_TK: Tensor
    counts_E: Tensor


def sort_pairs(index_TK: Tensor, num_experts: int) -> Pairs:
    """Sort (token, expert) pairs by expert, stable, so that equal inputs give equal orders; without those of -1."""
    flat_P = index_TK.flatten()
    order_P = torch.argsort(flat_P, stable=True)
    counts_E = torch.bincount(flat_P + 1, minlength=num_experts + 1)
    none = int(counts_E[0])
    order_P, counts_E = order_P[none:], counts_E[1:]
    slot_P = torch.full_like(flat_P, -1)
    slot_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    return Pairs(order_P // index_TK.shape[1], slot_P.view_as(index_TK), counts_E)


def pair_weights(weight_TK: Tensor, pairs: Pairs) -> Tensor:
    """The gate's weight of each sorted pair."""
    slot_P, weight_P = pairs.slot_TK.flatten(), weight_TK.flatten()
    if len(pairs.token_P) < len(slot_P):
        here_P = slot_P >= 0
        slot_P, weight_P = slot_P[here_P], weight_P[here_P]
    return weight_P.new_empty(len(slot_P)).scatter(0, slot_P, weight_P)


def expert_mlp_reference(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> Tensor:
    """Reference implementation: token by token, expert by expert, in FP32."""
    out = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for t in range(x_TH.shape[0]):
        for e, w in zip(index_TK[t].tolist(), weight_TK[t], strict=True):
            if e < 0:
                continue
            gate, up = (gate_up_E2IH[e].float() @ x_TH[t].float()).chunk(2)
            out[t] = out[t] + w.float() * (down_EHI[e].float() @ (silu(gate) * up))
    return out.to(x_TH.dtype)


class ExpertLoop(torch.autograd.Function):
    """Forward and backward of all experts, expert by expert, every intermediate of an expert still in the cache.

    Sums over a token's experts run in FP32, in the order of the experts' indices. Weights of another dtype than the
    activations' are cast expert by expert, in both directions, and only where an expert has rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_P: Tensor, gate_up: Tensor, down: Tensor, pairs: Pairs, wants_grad: bool
    ) -> Tensor:
        out_TH = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        both_P = x.new_empty(len(pairs.token_P), gate_up.shape[1]) if wants_grad else None
        for e, rows in _rows_by_expert(pairs.counts_E):
            tokens = pairs.token_P[rows]
            count, filled = len(tokens), _filler(x, len(tokens))
            both = filled(to_compute_dtype(x.index_select(0, tokens))) @ _operand(gate_up[e], x).t()
            if both_P is not None:
                both_P[rows] = both[:count]
            gate, up = both.chunk(2, 1)
            h = silu(gate).mul_(up).mul_(filled(weight_P[rows].unsqueeze(1)))
            out_TH.index_add_(0, tokens, (h @ _operand(down[e], x).t())[:count].float())
        if wants_grad:
            ctx.save_for_backward(x, weight_P, gate_up, down, both_P, pairs.token_P, pairs.counts_E)
        return out_TH.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_P, gate_up, down, both_P, token_P, counts_E = ctx.saved_tensors
        want_x, want_weight, want_in, want_out = ctx.needs_input_grad[:4]
        idle_E = counts_E == 0
        d_in, d_out = (
            torch.empty_like(w).masked_fill_(idle_E.view(-1, 1, 1), 0) if want else None
            for w, want in ((gate_up, want_in), (down, want_out)))
        d_weight = torch.empty_like(weight_P) if want_weight else None
        dx_TH = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if want_x else None
        for e, rows in _rows_by_expert(counts_E):
            tokens = token_P[rows]
            count, filled = len(tokens), _filler(x, len(tokens))
            dout = filled(to_compute_dtype(dout_TH.index_select(0, tokens)))
            gate, up = filled(to_compute_dtype(both_P[rows])).chunk(2, 1)
            weight = filled(weight_P[rows].unsqueeze(1))
            act = silu(gate)
            h = act * up  # before the gate's weight
            dh = dout @ _operand(down[e], x)
            if d_weight is not None:
                d_weight[rows] = torch.linalg.vecdot(dh, h)[:count]
            if d_out is not None:
                _product_into(d_out[e], dout.t(), h.mul_(weight))
            if d_in is None and dx_TH is None:
                continue
            dh.mul_(weight)
            d_both = dh.new_empty(dh.shape[0], gate_up.shape[1])
            d_gate, d_up = d_both.chunk(2, 1)
            torch.mul(dh, act, out=d_up)
            d_gate.copy_(torch.ops.aten.silu_backward(dh.mul_(up), gate))
            if d_in is not None:
                _product_into(d_in[e], d_both.t(), filled(to_compute_dtype(x.index_select(0, tokens))))
            if dx_TH is not None:
                dx_TH.index_add_(0, tokens, (d_both @ _operand(gate_up[e], x))[:count].float())
        return dx_TH.to(x.dtype) if dx_TH is not None else None, d_weight, d_in, d_out, None, None


class NativeExperts(torch.autograd.Function):
    """The same in one call (csrc/training.cpp): rows of an expert are a task; a token's sum is taken afterwards, in the
    same order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_P: Tensor, gate_up: Tensor, down: Tensor, pairs: Pairs, wants_grad: bool
    ) -> Tensor:
        ends_E = pairs.counts_E.cumsum(0)
        both_P = x.new_empty(len(weight_P), gate_up.shape[1]) if wants_grad else None
        out = torch.empty_like(x)
        native.experts_forward(
            *NativeExperts.native_args(x, weight_P, gate_up, down, pairs.token_P, ends_E, pairs.slot_TK),
            address(both_P), out.data_ptr(), threads())
        if wants_grad:
            ctx.save_for_backward(x, weight_P, gate_up, down, pairs.token_P, ends_E, pairs.slot_TK, both_P)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, both_P = ctx.saved_tensors
        dx, d_weight, d_in, d_out = (torch.empty_like(t) if want else None
                                     for t, want in zip(inputs[:4], ctx.needs_input_grad[:4], strict=True))
        dout = dout_TH.to(both_P.dtype).contiguous()
        native.experts_backward(
            *NativeExperts.native_args(*inputs), both_P.data_ptr(), dout.data_ptr(),
            *map(address, (dx, d_weight, d_in, d_out)), threads())
        return dx, d_weight, d_in, d_out, None, None

    @staticmethod
    def native_args(
        x: Tensor, weight_P: Tensor, gate_up: Tensor, down: Tensor, token_P: Tensor, ends_E: Tensor, slot_TK: Tensor
    ) -> tuple[Any, ...]:
        shape = (*x.shape, slot_TK.shape[1], len(weight_P), len(gate_up), down.shape[2])
        return (shape, *(t.data_ptr() for t in (token_P, ends_E, slot_TK, weight_P, x, gate_up, down)), dtype_code(x),
                dtype_code(gate_up, x))


def _operand(w: Tensor, x: Tensor) -> Tensor:
    """One expert's matrix as the operand of a product with activations like `x`."""
    return to_compute_dtype(w.to(x.dtype))


def _rows_by_expert(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows among the sorted pairs) for every expert that has any."""
    start = 0
    for e, n in enumerate(counts_E.tolist()):
        if n:
            yield e, slice(start, start + n)
            start += n


def _filler(x: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """What adds rows of zeros to `count` rows, up to a power of two or a multiple of ROWS, where their product is
    oneDNN's: it compiles a kernel for every shape it meets, and an expert's rows are another number in every step."""
    more = 0
    if x.device.type == "cpu" and to_compute_dtype(x[:0]).dtype != torch.float32:
        more = -count % ROWS if count > ROWS else (1 << (count - 1).bit_length()) - count
    return (lambda rows: pad(rows, (0, 0, 0, more))) if more else (lambda rows: rows)  # pad would copy them


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def grouped(x_TH: Tensor, weight_P: Tensor, gate_up: Tensor, down: Tensor, pairs: Pairs) -> Tensor:
    """All experts at once through torch's grouped product (GPUs; also the CPU loop's second reference)."""
    dtype = x_TH.dtype
    ends_E = pairs.counts_E.cumsum(0).to(torch.int32)
    x_PH = x_TH.index_select(0, pairs.token_P)
    gate, up = grouped_mm(x_PH, gate_up.to(dtype).transpose(1, 2), offs=ends_E).chunk(2, 1)
    h = silu(gate) * up * weight_P.unsqueeze(1).to(dtype)
    y_PH = grouped_mm(h, down.to(dtype).transpose(1, 2), offs=ends_E)
    y_PH = torch.cat((y_PH, y_PH.new_zeros(1, y_PH.shape[1])))  # the row of slot -1
    tokens, k = pairs.slot_TK.shape
    return y_PH.index_select(0, pairs.slot_TK.flatten() % len(y_PH)).view(tokens, k, -1).sum(1)


def all_experts(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every expert for every token, with weight 0 where it is not chosen."""
    experts, both, hidden = gate_up.shape
    weight_TE = x_TH.new_zeros(len(x_TH), experts).scatter(1, index_TK, weight_TK.to(x_TH.dtype))
    gate, up = linear(x_TH, gate_up.flatten(0, 1)).view(len(x_TH), experts, 2, both // 2).unbind(2)
    h_TEI = silu(gate) * up * weight_TE.unsqueeze(2)
    return linear(h_TEI.flatten(1), down.transpose(0, 1).reshape(hidden, -1))


def expert_mlp(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """Weighted sum over each token's K experts of down(silu(gate(x)) * up(x)), [T, H].

    index_TK: int64 in 0..E-1, distinct within a row, or -1 for a pair that another call computes; weight_TK: FP32,
    differentiable.
    """
    experts = gate_up_E2IH.shape[0]
    if (x_TH.device.type == "cpu" and x_TH.dtype == torch.bfloat16 and fast_bf16("cpu") and torch.is_grad_enabled()
            and not trains_native(x_TH, gate_up_E2IH) and gate_up_E2IH.requires_grad and down_EHI.shape[2] < NARROW
            and 3 * index_TK.shape[1] >= experts and bool((index_TK >= 0).all())):
        return all_experts(x_TH, index_TK, weight_TK, gate_up_E2IH, down_EHI)
    pairs = sort_pairs(index_TK, experts)
    weight_P = pair_weights(weight_TK, pairs)
    if x_TH.device.type == "cpu":
        tensors = (x_TH, weight_P, gate_up_E2IH, down_EHI)
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        fast = trains_native(*tensors) and runs_native(*tensors) and (
            gate_up_E2IH.dtype == down_EHI.dtype and weight_P.dtype == torch.float32)
        return (NativeExperts if fast else ExpertLoop).apply(*tensors, pairs, wants_grad)
    return grouped(x_TH, weight_P, gate_up_E2IH, down_EHI, pairs)
