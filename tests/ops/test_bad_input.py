"""Every operation refuses what it cannot take with one clear message."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek import ops
from deepseek.ops.panels import pack
from tests.helpers.operations import (
    HIDDEN,
    INNER,
    randn,
    random_attention,
    random_low_rank,
    random_matrix,
    random_mlp,
    random_naive,
)

X, W = randn(3, 100), pack(random_matrix(20, 100, 4))
MLP = random_mlp(HIDDEN, INNER, 4)
TABLE = ops.ExpertTable([MLP, MLP], HIDDEN, INNER)
INDEX, WEIGHT = torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
PLAIN, X8 = randn(20, 8), randn(2, 8)
LATENTS: dict[str, Any] = dict(q_BTND=randn(2, 5, 3, 12), kv_BTC=randn(2, 5, 24), norm_R=randn(16), eps=1e-6,
                               cos_BTP=randn(1, 5, 4), sin_BTP=randn(1, 5, 4), interleave=True,
                               rows_BSC=torch.zeros(2, 9, 24), past=4)
GATE: dict[str, Any] = dict(groups=4, kept_groups=2, top=4, group_best=2, sigmoid=True, normalise=True,
                            scale_anyway=True, scale=1.0)


def off_by(n: int, packed: Tensor) -> Tensor:
    """A copy that begins n bytes after a multiple of 64."""
    room = torch.zeros(len(packed) + 128, dtype=torch.uint8)
    begin = -room.data_ptr() % 64 + n
    room[begin : begin + len(packed)] = packed
    return room[begin : begin + len(packed)]


def experts(x: Tensor = X, index: Tensor = INDEX, weight: Tensor = WEIGHT, table: Any = TABLE, inner: int = INNER,
            **options: Any) -> Tensor:
    return ops.quantized_experts(x, index, weight, table, inner, **options)


def attention(**changes: Any) -> Tensor:
    return random_attention(5, 16, 3)._replace(**changes).run()


def naive(**changes: Any) -> Tensor:
    return random_naive(2, 3, 4)._replace(**changes).run()


def low_rank(**changes: Any) -> Tensor:
    return random_low_rank(3, 8, 5)._replace(**changes).run()


def latents(**changes: Any) -> Tensor:
    return ops.prepare_latents(*(LATENTS | changes).values())


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "linear: x of another dtype": (
        lambda: ops.quantized_linear(X.bfloat16(), W, 20), "x must be float32, got torch.bfloat16"),
    "linear: a gradient": (lambda: ops.quantized_linear(X.clone().requires_grad_(), W, 20), "x requires a gradient"),
    "linear: weights of another dtype": (
        lambda: ops.quantized_linear(X, W.view(torch.int8), 20),
        f"packed must be {len(W)} contiguous bytes (uint8), got {len(W)} of torch.int8"),
    "linear: too few bytes": (
        lambda: ops.quantized_linear(X, W[:-64], 20),
        f"packed must be {len(W)} contiguous bytes (uint8), got {len(W) - 64} of torch.uint8"),
    "linear: more columns": (lambda: ops.quantized_linear(randn(3, 129), W, 20), "packed must be"),
    "linear: bytes apart": (lambda: ops.quantized_linear(X, torch.stack((W, W), 1)[:, 0], 20), "packed must be"),
    "linear: misaligned": (
        lambda: ops.quantized_linear(X, off_by(1, W), 20),
        "packed must begin at a multiple of 64 bytes, begins 1 after one"),
    "mlp: x of another dtype": (lambda: ops.quantized_mlp(X.double(), MLP, INNER), "x must be float32"),
    "mlp: too few bytes": (
        lambda: ops.quantized_mlp(X, MLP[:-1], INNER), f"packed must be {len(MLP)} contiguous bytes"),
    "mlp: misaligned": (lambda: ops.quantized_mlp(X, off_by(32, MLP), INNER), "begins 32 after one"),
    "experts: x of another dtype": (lambda: experts(X.half()), "x must be float32"),
    "experts: a gradient": (lambda: experts(X.clone().requires_grad_()), "x requires a gradient"),
    "experts: an expert too short": (
        lambda: experts(table=[MLP, MLP[:-64]]), f"expert 1 must be {len(MLP)} contiguous bytes (uint8), got"),
    "experts: an expert misaligned": (
        lambda: experts(table=[off_by(4, MLP), MLP]), "expert 0 must begin at a multiple"),
    "experts: a table for others": (
        lambda: experts(inner=INNER - 1),
        "experts are for hidden, intermediate, bits (100, 40, 4), asked for (100, 39, 4)"),
    "experts: a table of other bits": (lambda: experts(bits=8), "asked for (100, 40, 8)"),
    "experts: an index too large": (lambda: experts(index=INDEX + 1), "index holds 2: must lie in 0..1"),
    "experts: an index too small": (lambda: experts(index=INDEX - 1), "index holds -1: must lie in 0..1"),
    "experts: index of another dtype": (lambda: experts(index=INDEX.int()), "index must be int64 [3, K]"),
    "experts: an index for others": (lambda: experts(index=INDEX[:2], weight=WEIGHT[:2]), "index must be int64 [3, K]"),
    "experts: weights of another shape": (lambda: experts(weight=WEIGHT[:2]), "beside weight of the same shape"),
    "experts: shared too short": (lambda: experts(shared=MLP[:64], shared_inner=INNER), "shared must be"),
    "grouped: too few bytes": (
        lambda: ops.grouped_quantized_linear(X.view(3, 1, 100), W, 64, 0, 20),
        f"packed must be {len(W) + 64} contiguous"),
    "grouped: misaligned": (
        lambda: ops.grouped_quantized_linear(X.view(3, 1, 100), W, 16, 0, 5), "multiples of 64 bytes, got 16 and 0"),
    "grouped: a stride between panels": (
        lambda: ops.grouped_quantized_linear(X.view(3, 2, 50), W, 0, 100, 5), "multiples of 64 bytes, got 0 and 100"),
    "grouped: before the beginning": (
        lambda: ops.grouped_quantized_linear(X.view(3, 1, 100), W, -64, 0, 5), "got -64 and 0"),
    "grouped: x of another dtype": (
        lambda: ops.grouped_quantized_linear(X.view(3, 1, 100).half(), W, 0, 0, 20), "x must be float32"),
    "plain: x of another dtype": (lambda: ops.plain_linear(X8.bfloat16(), PLAIN), "x must be float32"),
    "plain: other columns": (lambda: ops.plain_linear(X8[:, :4], PLAIN), "weights must be [rows, 4]"),
    "plain: weights of another dtype": (lambda: ops.plain_linear(X8, PLAIN.half()), "got torch.float16"),
    "low rank: x of another dtype": (lambda: low_rank(x_TK=randn(3, 8).half()), "x must be float32"),
    "low rank: a gradient": (lambda: low_rank(x_TK=randn(3, 8).requires_grad_()), "x requires a gradient"),
    "low rank: y of another dtype": (lambda: low_rank(y_TO=randn(3, 5).double()), "y must be float32 [3, rows]"),
    "low rank: y of other rows": (lambda: low_rank(y_TO=randn(4, 5)), "y must be float32 [3, rows]"),
    "low rank: weights of other adapters": (lambda: low_rank(weight_TN=randn(3, 3)), "weight [3, 4] beside 4"),
    "low rank: fewer B": (lambda: low_rank(b=[]), "beside 0 adapters"),
    "low rank: A of other columns": (lambda: low_rank(a=[randn(2, 7)] * 4), "A and B must be [R, 8] and [R, 5]"),
    "low rank: B of another rank": (lambda: low_rank(b=[randn(2, 5)] * 4), "got [3, 8] and [2, 5]"),
    "low rank: weights of another dtype": (
        lambda: low_rank(weight_TN=randn(3, 4).double()), "A, B and weight must be float32"),
    "bits that there are not": (lambda: ops.quantized_linear(X, W, 20, bits=5), "bits = 5: must be 4 or 8"),
    "attention: query of another dtype": (
        lambda: attention(q_latent=randn(3, 3, 5, 16).half()), "q_latent must be float32"),
    "attention: rotary query of another dtype": (
        lambda: attention(q_rope=randn(3, 3, 5, 8).double()), "q_rope must be"),
    "attention: other heads": (
        lambda: attention(q_rope=randn(3, 3, 4, 8)), "shapes do not fit: q_latent [3, 3, 5, 16]"),
    "attention: another cache": (lambda: attention(cache=randn(3, 300, 25)), "cache [3, 300, 25]"),
    "attention: another batch": (lambda: attention(cache=randn(2, 300, 24)), "cache [2, 300, 24]"),
    "attention: positions of another dtype": (lambda: attention(past_B=torch.zeros(3).int()), "must be int64 [3]"),
    "attention: too few positions": (lambda: attention(first_B=torch.zeros(2).long()), "must be int64 [3]"),
    "attention: beyond the cache": (lambda: attention(past_B=torch.tensor([0, 298, 0])), "past + 3 <= 300, got"),
    "attention: before the cache": (lambda: attention(first_B=torch.tensor([0, -1, 0])), "first >= 0"),
    "attention: a past before the cache": (lambda: attention(past_B=torch.tensor([0, -1, 0])), "past >= 0"),
    "naive: query of another dtype": (lambda: naive(q_BTND=randn(3, 3, 2, 24).half()), "q must be float32"),
    "naive: other heads": (lambda: naive(q_rope=randn(3, 3, 4, 8)), "shapes do not fit: q [3, 3, 2, 24]"),
    "naive: another batch": (lambda: naive(cache=randn(2, 300, 32)), "cache [2, 300, 32]"),
    "naive: no latents": (lambda: naive(cache=randn(3, 300, 8)), "shapes do not fit"),
    "naive: too few bytes": (lambda: naive(value=64), "kv_b must be"),
    "naive: beyond the cache": (lambda: naive(past_B=torch.tensor([0, 298, 0])), "past + 3 <= 300, got"),
    "latents: q of another dtype": (lambda: latents(q_BTND=randn(2, 5, 3, 12).half()), "q must be float32"),
    "latents: kv of another dtype": (lambda: latents(kv_BTC=randn(2, 5, 24).bfloat16()), "kv must be float32"),
    "latents: rank": (lambda: latents(norm_R=randn(15)), "shapes do not fit"),
    "latents: other rows": (lambda: latents(rows_BSC=torch.zeros(2, 9, 25)), "rows [2, 9, 25]"),
    "latents: rows of another dtype": (lambda: latents(rows_BSC=torch.zeros(2, 9, 24).half()), "rows must be float32"),
    "latents: beyond the rows": (lambda: latents(past=5), "rows must be float32 and hold 5 + 5"),
    "latents: before the rows": (lambda: latents(past=-1), "rows must be float32 and hold -1 + 5"),
    "latents: angles of another length": (lambda: latents(cos_BTP=randn(1, 4, 4)), "cos and sin must be [2 or 1, 5, "),
    "latents: angles of another batch": (
        lambda: latents(cos_BTP=randn(3, 5, 4), sin_BTP=randn(3, 5, 4)), "got [3, 5, 4] and [3, 5, 4]"),
    "latents: sin is not cos": (lambda: latents(sin_BTP=randn(1, 5, 3)), "got [1, 5, 4] and [1, 5, 3]"),
    "latents: q too narrow": (lambda: latents(q_BTND=randn(2, 5, 3, 7)), "at most 3"),
    "norm: weights of another width": (lambda: ops.rms_norm(X, randn(16), 1e-6), "weights must be [100], got [16]"),
    "gate: logits of another dtype": (
        lambda: ops.choose_experts(randn(3, 16).half(), None, **GATE), "logits must be float32"),
    "gate: bias of another dtype": (
        lambda: ops.choose_experts(randn(3, 16), torch.zeros(16).bfloat16(), **GATE), "bias must be float32"),
    "gate: bias of others": (
        lambda: ops.choose_experts(randn(3, 16), torch.zeros(15), **GATE), "one an expert (16), got"),
    "gate: more than are left": (
        lambda: ops.choose_experts(randn(3, 16), None, **(GATE | {"top": 9})), "9 of 16 experts in 2 of 4 groups"),
    "gate: groups that do not divide": (
        lambda: ops.choose_experts(randn(3, 15), None, **GATE), "4 of 15 experts in 2 of 4 groups"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
