"""Grouped-query attention -> latent attention with fewer numbers a token than the exact form, on calibration text.

For each of D / 2 frequencies a token's G keys hold complex numbers k_g, which RoPE turns by the same angle; a query
head adds Re(q conj(k_g)) to its score. Any complex matrix on the G numbers commutes with the turning, if queries get
its inverse. RoRoPE (TransMLA, arXiv 2502.07864) takes real rotations; here they are unitary, and of keys scaled by the
size of their queries.

    rotary    k' = U^H B k, q' = U^H B^-1 q e_g; B: root mean square of the queries of each key head, U: eigenvectors of
              B E[k k^H] B, so number s of k' makes eigenvalue s of the scores' energy. What is weak, or turned little
              within the context, need not be turned: over all layers, those numbers stay rotary whose energy times
              1 - |c|^2 is largest. The rotary key has a pair for each, of whatever frequency (LongRoPE's factors)
    nope      the rest, as ordinary keys k_n of D numbers a head. Of all constant factors the mean c of the turning
              e^(i w t) over distances t comes nearest to it; their queries are multiplied by that
    latent    of z = (k_n of all heads, v of all heads) less their mean: what a constant adds to all scores of a query
              is nothing, and the values' mean is o_proj's bias. Error is measured where it acts, keys by E[q q^T] and
              by how far values lie from the output, values by o_proj' o_proj, both by the square of the attention that
              a token gets. With M the root of that, the latent is the first RANK coordinates V^T M z, V: eigenvectors
              of M cov(z) M, and kv_b_proj is M^-1 V
    o_proj    fitted to the source's output

The latent's norm is held still by constant channels as in the exact form (checkpoint/dense.py).

Shape letters: B batch, T tokens, S positions, M all positions, H hidden, X = H + 1 with a constant, N heads, G key
heads, D numbers of a head, P = D / 2 pairs, J pairs of the rotary key, R rank, Z = 2 G D.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.dense import CONSTANT, CONSTANT_SHARE, SPREAD, DenseConfig, latent_width
from ..config import LongRope, ModelConfig
from ..model.mla import MLA, AttentionContext
from .source import GroupedAttention

FLOOR = 1e-6  # of a metric's eigenvalues, as a share of the largest
PRIOR = 1e-3  # weight of inputs of all directions alike, beside those of the text
KEYS = 8.0  # weight of keys: errors of scores add up over tokens that are alike
RIDGE = 0.5  # of the fit of o_proj, as a share of the mean square of its inputs
NEAR = 512  # attention that is not turned is taken to lie within so many tokens
DISTANCES = 512  # at which the turning is averaged
ROWS = 4  # windows that go through attention at a time


class Rotary(NamedTuple):
    """The rotary numbers of a layer, the strongest first. energy_PG: of the scores; to_PGG: k' of k, and back."""

    energy_PG: Tensor
    to_PGG: Tensor
    back_PGG: Tensor


class Choice(NamedTuple):
    """Which numbers stay rotary, the same in all layers. count_P: of each frequency; mean_P: what turning the others is
    replaced by."""

    count_P: Tensor
    mean_P: Tensor


def turning(frequencies_P: Tensor, context: int) -> Tensor:
    """Mean of e^(i w t) of each frequency, complex [P]: t from 1 to `context`, each doubling as likely as another."""
    t = torch.exp(torch.linspace(0, math.log(context), DISTANCES, dtype=torch.float64))
    angle = frequencies_P.double()[:, None] * t
    return torch.polar(torch.ones_like(angle), angle).mean(1).to(torch.complex64)


def choose(energy_PG: Tensor, dense: DenseConfig, width: int) -> Choice:
    """The width / 2 numbers that lose most where they are not turned. energy_PG: over all layers."""
    frequencies_P = torch.tensor(dense.frequencies)
    lost_PG = energy_PG * (1 - turning(frequencies_P, dense.context).abs().square().clamp(max=1))[:, None]
    kept = lost_PG.flatten().argsort(descending=True, stable=True)[: width // 2]
    count_P = torch.bincount(kept // dense.key_heads, minlength=len(frequencies_P))
    return Choice(count_P, turning(frequencies_P, min(NEAR, dense.context)))


def latent_config(dense: DenseConfig, rank: int, choice: Choice) -> ModelConfig:
    exact, width = dense.to_v3(), 2 * int(choice.count_P.sum())
    frequencies = torch.tensor(dense.frequencies).repeat_interleave(choice.count_P).tolist()
    factors = tuple(dense.rope_theta ** (-2 * j / width) / one for j, one in enumerate(frequencies))
    return exact.with_(
        kv_lora_rank=latent_width(rank), qk_nope_head_dim=dense.head_dim, qk_rope_head_dim=width,
        longrope=LongRope(factors, dense.context, attention_factor=dense.rotary_scale))


def as_complex(x: Tensor) -> Tensor:
    """[..., D], pairs side by side -> complex [..., P]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(-2)


def rotary_numbers(q_MNP: Tensor, k_MGP: Tensor) -> Rotary:
    """Of queries and keys, rotated or not; M: positions."""
    group = q_MNP.shape[1] // k_MGP.shape[1]
    size_PG = q_MNP.abs().square().mean(0).unflatten(0, (-1, group)).sum(1).t()
    size_PG = size_PG.clamp(min=1e-12 * float(size_PG.max()) + 1e-30).sqrt()
    scaled_PMG = k_MGP.permute(2, 0, 1) * size_PG[:, None]
    energy_PG, u_PGG = torch.linalg.eigh(scaled_PMG.transpose(1, 2) @ scaled_PMG.conj() / len(k_MGP))
    u_PGG = u_PGG.flip(-1)
    return Rotary(energy_PG.flip(-1).clamp(min=0), u_PGG.mH * size_PG[:, None], u_PGG / size_PG[:, :, None])


def layer_numbers(attn: GroupedAttention, x_BTH: Tensor) -> Rotary:
    q_MNP, k_MGP = (as_complex(projected(attn, part, x_BTH).flatten(0, 1)) for part in "qk")
    return rotary_numbers(q_MNP, k_MGP)


def projected(attn: GroupedAttention, part: str, x_BTH: Tensor) -> Tensor:
    return getattr(attn, f"{part}_proj")(x_BTH).unflatten(-1, (-1, attn.dense.head_dim))


def affine(projection: nn.Linear) -> Tensor:
    """Its weight with its bias as one more column."""
    weight, bias = projection.weight, projection.bias
    return torch.cat([weight, (weight.new_zeros(len(weight)) if bias is None else bias)[:, None]], 1)


def importance(attn: GroupedAttention, x_BTH: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """([B, T] the squared attention that each token gets, over all heads; [N] the square of what an error of 1 in the
    scores of a head changes: mean |o_proj (v - output)|^2 under that attention)."""
    dense = attn.dense
    group = dense.heads // dense.key_heads
    metric_NDD = output_metric(attn)
    got_BT, moved_N, sum_N = torch.zeros(x_BTH.shape[:2]), torch.zeros(dense.heads), torch.zeros(dense.heads)
    for row, x_TH in enumerate(x_BTH):
        q, k, v = (part[0].transpose(0, 1) for part in attn.heads(x_TH[None], context))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        score_NTS = (q @ k.transpose(1, 2)).mul_(attn.scale)
        score_NTS.masked_fill_(torch.ones(score_NTS.shape[1:], dtype=torch.bool).triu_(1), -torch.inf)
        p_NTS = score_NTS.softmax(-1)
        o_NTD = p_NTS @ v
        square_NTS = p_NTS.square_()
        got_NS, given_NT = square_NTS.sum(1), square_NTS.sum(2)
        got_BT[row] = got_NS.sum(0)
        moved_N += ((v @ metric_NDD * v).sum(-1) * got_NS + (o_NTD @ metric_NDD * o_NTD).sum(-1) * given_NT
                    - 2 * ((square_NTS @ v) @ metric_NDD * o_NTD).sum(-1)).sum(1)
        sum_N += got_NS.sum(1)
    return got_BT, moved_N.clamp(min=0) / sum_N


def output_metric(attn: GroupedAttention) -> Tensor:
    """o_proj' o_proj of each head, [N, D, D]."""
    w_NHD = attn.o_proj.weight.unflatten(1, (-1, attn.dense.head_dim)).transpose(0, 1)
    return w_NHD.transpose(1, 2) @ w_NHD


def roots(metric_GDD: Tensor) -> tuple[Tensor, Tensor]:
    """The block diagonal root of metrics, and its inverse, float64."""
    there, back = [], []
    for metric in metric_GDD.double():
        values, vectors = torch.linalg.eigh(metric)
        values = values.clamp(min=FLOOR * float(values[-1]) + 1e-30).sqrt()
        there.append(vectors * values @ vectors.t())
        back.append(vectors / values @ vectors.t())
    return torch.block_diag(*there), torch.block_diag(*back)


def compressed(attn: GroupedAttention, x_BTH: Tensor, context: AttentionContext, config: ModelConfig, choice: Choice,
               rank: int) -> MLA:
    """Latent attention that comes near to a layer's. x_BTH: the layer's inputs, normed."""
    dense = attn.dense
    heads, groups, width, pairs = dense.heads, dense.key_heads, dense.head_dim, config.qk_rope_head_dim // 2
    group_N = torch.arange(heads) // (heads // groups)
    rotary = layer_numbers(attn, x_BTH)
    pair_J, place_J = (torch.arange(groups) < choice.count_P[:, None]).nonzero().unbind(1)
    assert len(pair_J) == pairs
    plain_PGG = rotary.back_PGG @ (rotary.to_PGG * (torch.arange(groups) >= choice.count_P[:, None])[:, :, None])

    wq_NXP, wk_GXP = (as_complex(affine(part).unflatten(0, (-1, width)).transpose(1, 2))
                      for part in (attn.q_proj, attn.k_proj))
    w_ZX = torch.cat([as_real(torch.einsum("pgh,hxp->gxp", plain_PGG, wk_GXP)).transpose(1, 2).flatten(0, 1),
                      affine(attn.v_proj)]).double()
    wq_NXD = as_real(wq_NXP * choice.mean_P) * dense.rotary_scale**2
    down_RX, up_ZR, mean_Z = latent(attn, x_BTH, context, wq_NXD, w_ZX, rank)

    rope_JX = torch.einsum("jg,gxj->jx", rotary.to_PGG[pair_J, place_J], wk_GXP[:, :, pair_J])
    back_NJ = rotary.back_PGG[pair_J[:, None], group_N, place_J[:, None]].conj().t()
    q_rope_NXJ = as_real(wq_NXP[:, :, pair_J] * back_NJ[:, None])
    wide = ((width + 2 * pairs) / width) ** 0.5  # V3 divides scores by the root of more numbers
    wq_OX = torch.cat([wq_NXD, q_rope_NXJ], -1).transpose(1, 2).flatten(0, 1) * wide
    up_GDR = up_ZR.unflatten(0, (2, groups, width)).transpose(0, 1).flatten(1, 2)

    mla, latents, hidden = MLA(config).requires_grad_(False), config.kv_lora_rank, dense.hidden
    for parameter in mla.parameters():
        parameter.zero_()
    if config.q_lora_rank is None:
        mla.q_proj.weight.copy_(wq_OX[:, :hidden])
    else:  # the caller fills what passes the hidden state on
        mla.q_b_proj.weight[:, :hidden] = wq_OX[:, :hidden]
        mla.q_b_proj.weight[:, hidden : hidden + len(SPREAD)] = wq_OX[:, hidden:] / (4 * len(SPREAD))
    keys = mla.kv_a_proj_with_mqa
    keys.weight[:rank] = down_RX[:, :hidden]
    keys.weight[latents:] = as_real(rope_JX[:, :hidden].t()).t()
    keys.bias[:rank] = down_RX[:, hidden]
    keys.bias[latents - latents // CONSTANT_SHARE : latents] = CONSTANT
    keys.bias[latents:] = as_real(rope_JX[:, hidden])
    mla.kv_a_layernorm.weight[:rank] = CONSTANT / CONSTANT_SHARE**0.5
    mla.kv_b_proj.weight[:, :rank] = up_GDR[group_N].flatten(0, 1)
    mla.o_proj.weight.copy_(attn.o_proj.weight)
    mean_GD = mean_Z[groups * width :].unflatten(0, (groups, width)).float()
    mla.o_proj.bias.copy_(attn.o_proj(mean_GD[group_N].flatten()))
    return mla


def latent(attn: GroupedAttention, x_BTH: Tensor, context: AttentionContext, wq_NXD: Tensor, w_ZX: Tensor, rank: int
           ) -> tuple[Tensor, Tensor, Tensor]:
    """(down_RX, up_ZR, mean_Z): latent = down (x, 1), and z = mean + up latent. wq_NXD: the nope queries of all heads;
    w_ZX: their keys, then values, of all key heads."""
    groups = attn.dense.key_heads
    got_BT, moved_N = importance(attn, x_BTH, context)
    x_MX = torch.cat([x_BTH, torch.ones_like(x_BTH[..., :1])], -1).flatten(0, 1)
    share_M = (got_BT / got_BT.sum()).flatten()
    mean_X = (share_M @ x_MX).double()
    cov_XX = ((x_MX * share_M[:, None]).t() @ x_MX).double() - mean_X.outer(mean_X)
    even_X = cov_XX.diagonal().mean().expand(len(cov_XX)).clone()
    even_X[-1] = 0
    cov_ZZ = w_ZX @ (cov_XX + PRIOR * even_X.diag()) @ w_ZX.t()
    second_XX = x_MX.t() @ x_MX / len(x_MX)
    queries_NDD = wq_NXD.transpose(1, 2) @ second_XX @ wq_NXD * (KEYS * moved_N / attn.dense.head_dim)[:, None, None]
    metric_GDD = torch.cat([part.unflatten(0, (groups, -1)).sum(1) for part in (queries_NDD, output_metric(attn))])
    root_ZZ, back_ZZ = roots(metric_GDD)
    _, vectors_ZZ = torch.linalg.eigh(root_ZZ @ cov_ZZ @ root_ZZ)
    vectors_ZR = vectors_ZZ[:, -rank:].flip(1)
    down_RX, up_ZR = vectors_ZR.t() @ root_ZZ @ w_ZX, back_ZZ @ vectors_ZR
    down_RX[:, -1] -= down_RX @ mean_X
    # no larger than this over the text: the constant channels of the norm are much larger
    size = float((x_MX @ down_RX.t().float()).square().sum(1).max() / rank) ** 0.5 or 1.0
    return (down_RX / size).float(), (up_ZR * size).float(), w_ZX @ mean_X


def fit_output(mla: MLA, x_BTH: Tensor, target_BTH: Tensor, context: AttentionContext, fitted: int) -> Tensor:
    """Fit o_proj to what attention should give, on the first `fitted` windows; returns what it gives, for all."""
    output, mla.o_proj = mla.o_proj, nn.Identity()  # type: ignore[assignment]
    heads_BTO = torch.cat([mla(x, context, 0) for x in x_BTH.split(ROWS)])
    mla.o_proj = output
    o_MO, missing_MH = heads_BTO[:fitted].flatten(0, 1), (target_BTH - output(heads_BTO))[:fitted].flatten(0, 1)
    mean_O, mean_H = o_MO.mean(0), missing_MH.mean(0)
    centred_MO = o_MO - mean_O
    square_OO = centred_MO.t() @ centred_MO
    square_OO.diagonal().add_(RIDGE * square_OO.diagonal().mean().clamp(min=1e-30))
    change_OH = torch.linalg.solve(square_OO, centred_MO.t() @ (missing_MH - mean_H))
    output.weight.add_(change_OH.t())
    output.bias.add_(mean_H - mean_O @ change_OH)
    return output(heads_BTO)
