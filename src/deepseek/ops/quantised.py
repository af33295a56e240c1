"""Products with quantised weights, and the small operations around them at inference.

The arithmetic is one for all kernels and for the references here (csrc/kernels.h): activations become int8 with one
scale a row, products are summed exactly over blocks of 64 columns, blocks are added in FP32 in their order by fused
multiply-add. A token's result therefore does not depend on the tokens it is computed with, bit by bit; SiLU,
exponentials and normalisations differ between torch and csrc/ by FP32 rounding only.

Results are float32. None of these operations has a gradient.

Shape letters: T tokens, G groups (heads), K columns, O rows, H hidden, I intermediate, E experts, B batch, N heads,
R latent rank, P rotary width, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from .native import fits, native, threads
from .norm import rms_norm
from .panels import BLOCK, LEVELS, Bits, Quantised, matrix_bytes, mlp_bytes, unpack, unpack_mlp
from .registry import operation


class ExpertTable(tuple[Tensor, ...]):
    """The packed MLPs of one layer's experts, checked once. Raises ValueError naming the expert that does not fit."""

    hidden: int
    inner: int
    bits: Bits

    def __new__(cls, experts: Sequence[Tensor], hidden: int, inner: int, bits: Bits = 4) -> ExpertTable:
        table = super().__new__(cls, experts)
        table.hidden, table.inner, table.bits = hidden, inner, bits
        for e, packed in enumerate(table):
            _check_packed(f"expert {e}", packed, mlp_bytes(hidden, inner, bits))
        return table

    def __reduce__(self) -> tuple[type[ExpertTable], tuple[tuple[Tensor, ...], int, int, Bits]]:
        return ExpertTable, (tuple(self), self.hidden, self.inner, self.bits)

    @cached_property
    def addresses(self) -> Tensor:
        return torch.tensor([packed.data_ptr() for packed in self], dtype=torch.int64)


# ---- references -------------------------------------------------------------------------------------------------


def quantise_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values as float32 [T, K padded to 64], scale [T]): scale = absmax / 127, round to nearest even. A row with
    a number that is not finite makes all its results NaN."""
    x = pad(x_TK.float(), (0, -x_TK.shape[-1] % BLOCK))
    peak_T = x.abs().amax(-1)
    inverse_T = torch.where(peak_T > 0, torch.tensor(127.0) / peak_T, 0.0)  # a number / a tensor rounds twice
    inverse_T = torch.where(inverse_T < 3e38, inverse_T, 0.0)
    return (x * inverse_T.unsqueeze(-1)).round(), peak_T / 127.0


def linear_reference(x_TK: Tensor, w: Quantised) -> Tensor:
    """x W^T in the arithmetic above, [T, O]; the slow twin, equal to the kernels bit by bit."""
    q_TK, scale_T = quantise_rows(x_TK)
    rows, columns = w.code_OK.shape
    if w.scale_Ob is None:
        acc_TO = (q_TK[:, :columns].double() @ w.code_OK.double().t()).float()
    else:
        levels = torch.tensor(LEVELS, dtype=torch.float32)[w.code_OK.long()]
        levels_ObK = pad(levels, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
        sums_bTO = torch.bmm(q_TK.unflatten(1, (-1, BLOCK)).transpose(0, 1), levels_ObK.permute(1, 2, 0))
        acc_TO = sums_bTO.new_zeros(sums_bTO.shape[1:])
        for b, sums_TO in enumerate(sums_bTO):  # all integers: float64 holds product and sum, one rounding is an fma
            acc_TO = (acc_TO.double() + sums_TO.double() * w.scale_Ob[:, b].double()).float()
    return acc_TO * (w.step_O * scale_T.unsqueeze(1))


def mlp_reference(x_TH: Tensor, packed: Tensor, inner: int, bits: Bits) -> Tensor:
    gate, up, down = unpack_mlp(packed, x_TH.shape[1], inner, bits)
    return linear_reference(silu(linear_reference(x_TH, gate)) * linear_reference(x_TH, up), down)


def experts_reference(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, table: ExpertTable, shared: Tensor | None, shared_inner: int
) -> Tensor:
    y_TKH = x_TH.new_zeros(*index_TK.shape, x_TH.shape[1])
    for e in index_TK.unique().tolist():
        token, slot = (index_TK == e).nonzero(as_tuple=True)
        y_TKH[token, slot] = mlp_reference(x_TH[token], table[e], table.inner, table.bits)
    out_TH = torch.zeros_like(x_TH) if shared is None else mlp_reference(x_TH, shared, shared_inner, table.bits)
    for k in range(index_TK.shape[1]):
        out_TH = torch.addcmul(out_TH, weight_TK[:, k : k + 1], y_TKH[:, k])
    return out_TH


def latent_attention_reference(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, first_B: Tensor, past_B: Tensor, scale: float
) -> Tensor:
    rank, tokens, length = q_latent.shape[-1], q_latent.shape[1], cache.shape[1]
    q_BTNC = torch.cat((q_latent, q_rope), -1)
    scores_BNTS = torch.einsum("btnc,bsc->bnts", q_BTNC, cache) * scale
    position_S = torch.arange(length)
    last_BT = past_B.unsqueeze(1) + torch.arange(tokens)
    first_BT = torch.minimum(first_B.unsqueeze(1), last_BT)  # a query of padding sees itself
    seen_BTS = (position_S >= first_BT.unsqueeze(-1)) & (position_S <= last_BT.unsqueeze(-1))
    probs = scores_BNTS.masked_fill(~seen_BTS.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("bnts,bsr->btnr", probs, cache[..., :rank]).contiguous()


# ---- operations -------------------------------------------------------------------------------------------------


@operation(lambda x, packed, rows, bias=None, *, bits=4: x.new_empty(*x.shape[:-1], rows))
def quantised_linear(
    x: Tensor, packed: Tensor, rows: int, bias: Tensor | None = None, *, bits: int = 4
) -> Tensor:
    """x[..., K] -> [..., rows]: x W^T + bias; packed: W in panels (ops/panels.py)."""
    x_TK = _check_activations("x", x).reshape(-1, x.shape[-1])
    tokens, columns = x_TK.shape
    _check_packed("packed", packed, matrix_bytes(rows, columns, bits))
    if fits(x_TK, packed):
        out = x_TK.new_empty(tokens, rows)
        native.quantised_linear(x_TK.data_ptr(), tokens, 1, columns, packed.data_ptr(), 0, rows, bits, out.data_ptr(),
                                threads())
    else:
        out = linear_reference(x_TK, unpack(packed, rows, columns, bits))
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], rows)


@operation(lambda x_TH, packed, inner, *, bits=4: x_TH.new_empty(x_TH.shape))
def quantised_mlp(x_TH: Tensor, packed: Tensor, inner: int, *, bits: int = 4) -> Tensor:
    """down(silu(gate x) * up x) from one packed range, [T, H]."""
    x_TH = _check_activations("x", x_TH)
    tokens, hidden = x_TH.shape
    _check_packed("packed", packed, mlp_bytes(hidden, inner, bits))
    if not fits(x_TH, packed):
        return mlp_reference(x_TH, packed, inner, bits)
    out = torch.empty_like(x_TH)
    native.quantised_experts(x_TH.data_ptr(), tokens, hidden, 0, 0, 0, 0, 0, inner, packed.data_ptr(), inner, bits,
                             out.data_ptr(), threads())
    return out


@operation(lambda x_TH, index_TK, weight_TK, experts, inner, shared=None, shared_inner=0, *, bits=4: (
    x_TH.new_empty(x_TH.shape)))
def quantised_experts(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: Sequence[Tensor], inner: int,
    shared: Tensor | None = None, shared_inner: int = 0, *, bits: int = 4
) -> Tensor:
    """Weighted sum over each token's experts, plus the shared experts where given, [T, H].

    index_TK: int64, 0..E-1. experts: one packed MLP each; an ExpertTable of them saves checking them every time.
    """
    x_TH = _check_activations("x", x_TH)
    tokens, hidden = x_TH.shape
    table = experts if isinstance(experts, ExpertTable) else ExpertTable(experts, hidden, inner, bits)
    if (table.hidden, table.inner, table.bits) != (hidden, inner, bits):
        raise ValueError(f"experts are for hidden, intermediate, bits {(table.hidden, table.inner, table.bits)}, "
                         f"asked for {(hidden, inner, bits)}")
    if index_TK.dtype != torch.int64 or index_TK.shape != weight_TK.shape or len(index_TK) != tokens:
        raise ValueError(f"index must be int64 [{tokens}, K] beside weight of the same shape, got "
                         f"{index_TK.dtype} {list(index_TK.shape)} and {list(weight_TK.shape)}")
    if index_TK.numel():
        low, high = (int(v) for v in index_TK.aminmax())
        if low < 0 or high >= len(table):
            raise ValueError(f"index holds {low if low < 0 else high}: must lie in 0..{len(table) - 1}")
    weight_TK = weight_TK.float()
    if shared is not None:
        _check_packed("shared", shared, mlp_bytes(hidden, shared_inner, bits))
    index_TK, weight_TK = index_TK.contiguous(), weight_TK.contiguous()
    if not fits(x_TH, *table[:1]):
        return experts_reference(x_TH, index_TK, weight_TK, table, shared, shared_inner)
    out = torch.empty_like(x_TH)
    native.quantised_experts(
        x_TH.data_ptr(), tokens, hidden, index_TK.data_ptr(), weight_TK.data_ptr(), index_TK.shape[1],
        table.addresses.data_ptr(), len(table), inner, 0 if shared is None else shared.data_ptr(),
        shared_inner, bits, out.data_ptr(), threads())
    return out


@operation(lambda x_TGK, packed, offset, stride, rows, *, bits=4: x_TGK.new_empty(*x_TGK.shape[:2], rows))
def grouped_quantised_linear(
    x_TGK: Tensor, packed: Tensor, offset: int, stride: int, rows: int, *, bits: int = 4
) -> Tensor:
    """[T, G, rows]: group g of x times the `rows` rows whose panels begin `offset + g * stride` bytes into packed.

    MLA's value half of kv_b_proj, head by head, without copying it out.
    """
    x_TGK = _check_activations("x", x_TGK)
    tokens, groups, columns = x_TGK.shape
    if offset < 0 or stride < 0 or offset % 64 or stride % 64:
        raise ValueError(f"offset and stride must be multiples of 64 bytes, got {offset} and {stride}")
    _check_packed("packed", packed, offset + (groups - 1) * stride + matrix_bytes(rows, columns, bits))
    if not fits(x_TGK, packed):
        parts = (packed[offset + g * stride :][: matrix_bytes(rows, columns, bits)] for g in range(groups))
        return torch.stack([linear_reference(x_TGK[:, g], unpack(part, rows, columns, bits))
                            for g, part in enumerate(parts)], 1)
    out = x_TGK.new_empty(tokens, groups, rows)
    native.quantised_linear(x_TGK.data_ptr(), tokens, groups, columns, packed.data_ptr() + offset, stride, rows, bits,
                            out.data_ptr(), threads())
    return out


def pack_panels(w_GOK: Tensor) -> Tensor:
    """BF16 or FP32 matrices [G, O, K] as panels of 16 rows, [G, ceil(O / 16), K, 16]; rows are padded with zeros.

    K must divide by 4.
    """
    groups, rows, columns = w_GOK.shape
    if columns % 4 or w_GOK.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"weights are {w_GOK.dtype} {list(w_GOK.shape)}: must be bfloat16 or float32, columns a "
                         "multiple of 4")
    padded = pad(w_GOK, (0, 0, 0, -rows % 16))
    return padded.view(groups, -1, 16, columns).transpose(2, 3).contiguous()


@operation(lambda x_TGK, packed_GPK16: x_TGK.new_empty(*x_TGK.shape[:2], 16 * packed_GPK16.shape[1]))
def panel_linear(x_TGK: Tensor, packed_GPK16: Tensor) -> Tensor:
    """[T, G, 16 P] in float32: group g of x times matrix g of `pack_panels`; products and sums in FP32."""
    _check_activations("x", x_TGK, dense=False)
    tokens, groups, columns = x_TGK.shape
    if packed_GPK16.shape != (groups, packed_GPK16.shape[1], columns, 16) or columns % 4 or packed_GPK16.dtype not in (
            torch.bfloat16, torch.float32):
        raise ValueError(f"weights must be [{groups}, P, {columns}, 16], bfloat16 or float32, columns a multiple of 4, "
                         f"got {packed_GPK16.dtype} {list(packed_GPK16.shape)}")
    rows = packed_GPK16.shape[1] * 16
    if not fits(packed_GPK16) or x_TGK.stride(2) != 1:
        w_GOK = packed_GPK16.float().transpose(2, 3).reshape(groups, rows, columns)
        return torch.einsum("tgk,gok->tgo", x_TGK, w_GOK).contiguous()
    out = x_TGK.new_empty(tokens, groups, rows)
    native.panel_linear(x_TGK.data_ptr(), tokens, groups, columns, x_TGK.stride(0), x_TGK.stride(1),
                        packed_GPK16.data_ptr(), packed_GPK16.dtype == torch.bfloat16, rows, out.data_ptr(), threads())
    return out


@operation(lambda q_latent, q_rope, cache, first_B, past_B, scale: q_latent.new_empty(q_latent.shape))
def latent_attention(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, first_B: Tensor, past_B: Tensor, scale: float
) -> Tensor:
    """Absorbed MLA over the latent cache, [B, T, N, R] float32.

    q_latent [B, T, N, R], q_rope [B, T, N, P], cache [B, >= S, R + P] (rows of a sequence contiguous; rotary keys
    last). Query t of sequence b sees positions first_B[b] … past_B[b] + t, and at least its own; int64 tensors.
    """
    _check_activations("q_latent", q_latent, dense=False), _check_activations("q_rope", q_rope, dense=False)
    batch, tokens, heads, rank = q_latent.shape
    rope = q_rope.shape[-1]
    if q_rope.shape[:3] != q_latent.shape[:3] or cache.shape[0] != batch or cache.shape[2] != rank + rope:
        raise ValueError(f"shapes do not fit: q_latent {list(q_latent.shape)}, q_rope {list(q_rope.shape)}, "
                         f"cache {list(cache.shape)}")
    if first_B.dtype != torch.int64 or past_B.dtype != torch.int64 or not len(first_B) == len(past_B) == batch:
        raise ValueError(f"first and past must be int64 [{batch}]")
    past, first = past_B.tolist(), first_B.tolist()
    if batch and (max(past) + tokens > cache.shape[1] or min(first) < 0 or min(past) < 0):
        raise ValueError(f"positions must satisfy first >= 0, past >= 0 and past + {tokens} <= {cache.shape[1]}, got "
                         f"first {first}, past {past}")
    suits = cache.stride()[1:] == (rank + rope, 1) and cache.dtype == torch.float32 and rank % 16 == 0
    if not suits or not fits(q_latent, q_rope, first_B, past_B):
        return latent_attention_reference(q_latent, q_rope, cache.float(), first_B, past_B, scale)
    out = torch.empty_like(q_latent)
    native.mla_attention(q_latent.data_ptr(), q_rope.data_ptr(), cache.data_ptr(), cache.stride(0), first_B.data_ptr(),
                         past_B.data_ptr(), batch, tokens, heads, rank, rope, scale, out.data_ptr(), threads())
    return out


@operation(lambda q_BTND, kv_BTC, norm_R, eps, cos_BTP, sin_BTP, interleave, rows_BSC, past: (
    q_BTND.new_empty(*q_BTND.shape[:3], 2 * cos_BTP.shape[-1])), mutates=["rows_BSC"])
def prepare_latents(
    q_BTND: Tensor, kv_BTC: Tensor, norm_R: Tensor, eps: float, cos_BTP: Tensor, sin_BTP: Tensor, interleave: bool,
    rows_BSC: Tensor, past: int
) -> Tensor:
    """The rotated rotary part of q, [B, T, N, rope]; writes [RMSNorm(latent) | rotated key] to rows_BSC[:, past:].

    q_BTND: [..., nope + rope]; kv_BTC: latent and rotary key, R + rope wide; cos, sin: [B or 1, T, rope / 2]; rows_BSC:
    float32, at least past + T rows. Rotated pairs lie as two halves (model/layers.py, `rotate`).
    """
    _check_activations("q", q_BTND, dense=False), _check_activations("kv", kv_BTC, dense=False)
    batch, tokens, heads, width = q_BTND.shape
    rank, rope = len(norm_R), 2 * cos_BTP.shape[-1]
    if kv_BTC.shape != (batch, tokens, rank + rope) or rows_BSC.shape[::2] != (batch, rank + rope):
        raise ValueError(f"shapes do not fit: q {list(q_BTND.shape)}, kv {list(kv_BTC.shape)}, rank {rank}, rotary "
                         f"width {rope}, rows {list(rows_BSC.shape)}")
    if rows_BSC.dtype != torch.float32 or past < 0 or past + tokens > rows_BSC.shape[1]:
        raise ValueError(f"rows must be float32 and hold {past} + {tokens}, got {rows_BSC.dtype} "
                         f"{list(rows_BSC.shape)}")
    if cos_BTP.shape != sin_BTP.shape or cos_BTP.shape[:2] not in ((1, tokens), (batch, tokens)) or width < rope:
        raise ValueError(f"cos and sin must be [{batch} or 1, {tokens}, at most {width // 2}], got "
                         f"{list(cos_BTP.shape)} and {list(sin_BTP.shape)}")
    norm_R = norm_R.detach().float()
    rows_lie_together = rows_BSC.stride()[1:] == (rank + rope, 1)
    if fits(q_BTND, kv_BTC, norm_R, cos_BTP, sin_BTP) and rows_lie_together and (
            cos_BTP.dtype == sin_BTP.dtype == torch.float32):
        q_rope = q_BTND.new_empty(batch, tokens, heads, rope)
        native.mla_prepare(
            q_BTND.data_ptr(), kv_BTC.data_ptr(), norm_R.data_ptr(), eps, cos_BTP.data_ptr(), sin_BTP.data_ptr(),
            cos_BTP.shape[0] > 1, interleave, batch, tokens, heads, width - rope, rope, rank, q_rope.data_ptr(),
            rows_BSC.data_ptr(), rows_BSC.stride(0), past, threads())
        return q_rope
    new = rows_BSC[:, past : past + tokens]
    new[..., :rank] = rms_norm(kv_BTC[..., :rank], norm_R, eps)
    new[..., rank:] = _rotated(kv_BTC[..., rank:].unsqueeze(2), cos_BTP, sin_BTP, interleave).squeeze(2)
    return _rotated(q_BTND[..., width - rope :], cos_BTP, sin_BTP, interleave)


def choose_experts(
    logits_TE: Tensor, bias_E: Tensor | None, groups: int, kept_groups: int, top: int, group_best: int, sigmoid: bool,
    normalise: bool, scale_anyway: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(index [T, top] int64, weight [T, top], scores [T, E]) of a gate, natively; its slow twin is model/gate.py.

    group_best: how many choices make a group's score, 0 where groups play no part. Needs `fits(logits, bias)`.
    """
    tokens, experts = logits_TE.shape
    if logits_TE.dtype != torch.float32 or (
            bias_E is not None and (bias_E.dtype != torch.float32 or bias_E.shape != (experts,))):
        got = None if bias_E is None else (bias_E.dtype, list(bias_E.shape))
        raise ValueError(f"logits and bias must be float32, one bias an expert ({experts}), got {logits_TE.dtype} and "
                         f"{got}")
    if experts % groups or not 1 <= top <= kept_groups * experts // groups or not (
            kept_groups <= groups and group_best <= experts // groups):
        raise ValueError(f"{top} of {experts} experts in {kept_groups} of {groups} groups, each scored by its best "
                         f"{group_best}: does not come out")
    scores_TE = torch.empty_like(logits_TE)
    index_TK = torch.empty(tokens, top, dtype=torch.int64)
    weight_TK = logits_TE.new_empty(tokens, top)
    native.choose_experts(
        logits_TE.data_ptr(), tokens, experts, groups, kept_groups, top, group_best, sigmoid, normalise, scale_anyway,
        scale, 0 if bias_E is None else bias_E.data_ptr(), scores_TE.data_ptr(), index_TK.data_ptr(),
        weight_TK.data_ptr(), threads())
    return index_TK, weight_TK, scores_TE


def _rotated(x: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, interleave: bool) -> Tensor:
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    cos, sin = cos_BTP.unsqueeze(2), sin_BTP.unsqueeze(2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# ---- checks -----------------------------------------------------------------------------------------------------


def _check_activations(name: str, x: Tensor, *, dense: bool = True) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient and quantised products have none: use torch.no_grad()")
    return x.contiguous() if dense else x


def _check_packed(name: str, packed: Tensor, need: int) -> None:
    if packed.dtype != torch.uint8 or packed.numel() < need or not packed.is_contiguous():
        raise ValueError(f"{name} must be {need} contiguous bytes (uint8), got {packed.numel()} of {packed.dtype}")
    if packed.device.type == "cpu" and packed.data_ptr() % 64:
        raise ValueError(f"{name} must begin at a multiple of 64 bytes, begins {packed.data_ptr() % 64} after one")
