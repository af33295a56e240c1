"""Random and awkward inputs for the operations on quantized weights.

Run as a program, it prints the instruction set and then, one a line, a digest of the bits of every native result.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deepseek import ops
from deepseek.ops.native import isa, native
from deepseek.ops.panels import Bits, Quantized, pack, pack_mlp

SHAPES = ((16, 64), (48, 130), (5, 70), (100, 256), (33, 192), (1, 1), (17, 63), (64, 65), (30, 448))
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 130)
HIDDEN, INNER, SHARED, EXPERTS, TOP = 100, 40, 90, 8, 3

both_widths = pytest.mark.parametrize("bits", [4, 8])
natively = pytest.mark.skipif(native is None, reason="promised by the native kernels alone")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where both are NaN, whose payload is nobody's business."""
    numbers = torch.where(a.isnan(), 0.0, a).view(torch.int32), torch.where(b.isnan(), 0.0, b).view(torch.int32)
    return a.shape == b.shape and torch.equal(*numbers) and torch.equal(a.isnan(), b.isnan())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_matrix(rows: int, columns: int, bits: Bits, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    step_O = torch.rand(rows, generator=generator) / columns
    if bits == 8:
        return Quantized(torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8), None, step_O)
    code_OK = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale_Ob = torch.randint(0, 256, (rows, -(-columns // 64)), generator=generator, dtype=torch.uint8)
    return Quantized(code_OK, scale_Ob, step_O / 128)


def random_mlp(hidden: int, inner: int, bits: Bits, seed: int = 0) -> Tensor:
    return pack_mlp(random_matrix(inner, hidden, bits, seed), random_matrix(inner, hidden, bits, seed + 1),
                    random_matrix(hidden, inner, bits, seed + 2))


def awkward_rows(columns: int) -> Tensor:
    """Activations of every kind: zeros, one peak, denormals (alone and beside ordinary numbers), huge, tiny, halves
    that a rounding has to decide, and rows whose peak has an inexact reciprocal."""
    x = randn(columns, seed=7)
    peak = torch.zeros(columns)
    peak[-1] = -3.0
    halves = torch.arange(columns).remainder(127) + 0.5
    halves[0] = 127.0
    rows = [x * 0, peak, x * 1e-42, torch.where(x > 0, x, x * 1e-42), x * 1e37, x * 1e-37, x.sign() * 1e-39, halves,
            x * (3e38 / x.abs().max()), -halves]
    return torch.stack(rows + [randn(columns, seed=s) * 10.0 ** (s % 9 - 4) for s in range(20)])


class Experts(NamedTuple):
    """Arguments of one call of the experts of a layer."""

    x_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    experts: ops.ExpertTable
    shared: Tensor

    def run(self, rows: slice | Tensor = slice(None), *, shared: bool = True) -> Tensor:
        return ops.quantized_experts(
            self.x_TH[rows], self.index_TK[rows], self.weight_TK[rows], self.experts, INNER,
            shared=self.shared if shared else None, shared_inner=SHARED if shared else 0, bits=self.experts.bits)


def random_experts(tokens: int, bits: Bits, *, top: int = TOP, only: int | None = None, seed: int = 0) -> Experts:
    """only: the one expert that all tokens visit; by default they visit any but the last, which is left empty."""
    generator = torch.Generator().manual_seed(seed)
    table = ops.ExpertTable([random_mlp(HIDDEN, INNER, bits, 10 * e) for e in range(EXPERTS)], HIDDEN, INNER, bits)
    index_TK = torch.rand(tokens, EXPERTS - 1, generator=generator).argsort(-1)[:, :top]
    if only is not None:
        index_TK = torch.full((tokens, 1), only)
    weight_TK = torch.rand(index_TK.shape, generator=generator)
    return Experts(randn(tokens, HIDDEN, seed=seed) * 3, index_TK, weight_TK, table,
                   random_mlp(HIDDEN, SHARED, bits, 500))


class Attention(NamedTuple):
    """Arguments of one call of latent attention."""

    q_latent: Tensor
    q_rope: Tensor
    cache: Tensor
    first_B: Tensor
    past_B: Tensor

    def run(self) -> Tensor:
        return ops.latent_attention(*self, 0.2)


def random_attention(heads: int, rank: int, tokens: int, *, batch: int = 3) -> Attention:
    """Different beginnings and ends; the last sequence's first queries are padding."""
    length, rope = 300, 8  # 150 tokens at most
    first_B = torch.tensor([0, 7, 131, 299])[:batch]
    past_B = torch.tensor([length - tokens, 140, 130, 0])[:batch]
    return Attention(randn(batch, tokens, heads, rank), randn(batch, tokens, heads, rope, seed=1),
                     randn(batch, length, rank + rope, seed=2), first_B, past_B)


class Naive(NamedTuple):
    """Arguments of one call of attention in the naive order."""

    q_BTND: Tensor
    q_rope: Tensor
    cache: Tensor
    kv_b: Tensor
    value: int
    first_B: Tensor
    past_B: Tensor
    bits: Bits

    def run(self) -> Tensor:
        return ops.naive_attention(*self[:-1], 0.02, bits=self.bits)

    def part(self, tokens: slice) -> Naive:
        """Of the queries given, as if the rest came in other calls."""
        return self._replace(q_BTND=self.q_BTND[:, tokens].contiguous(), q_rope=self.q_rope[:, tokens].contiguous(),
                             past_B=self.past_B + (tokens.start or 0))


def random_naive(heads: int, tokens: int, bits: Bits, *, nope: int = 16, value: int = 32, batch: int = 3) -> Naive:
    """Like `random_attention`, which has the same positions."""
    case, rank = random_attention(heads, 24, tokens, batch=batch), 24
    kv_b = pack(random_matrix(heads * (nope + value), rank, bits))
    return Naive(randn(batch, tokens, heads, nope + 8, seed=3), case.q_rope, case.cache, kv_b, value, case.first_B,
                 case.past_B, bits)


class Terms(NamedTuple):
    """Arguments of `add_low_rank`."""

    y_TO: Tensor
    x_TK: Tensor
    a: list[Tensor]
    b: list[Tensor]
    weight_TN: Tensor

    def run(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """What becomes of these rows, in a call of their own."""
        y_TO = self.y_TO[rows].clone()
        ops.add_low_rank(y_TO, self.x_TK[rows], self.a, self.b, self.weight_TN[rows])
        return y_TO


def random_low_rank(tokens: int, columns: int, rows: int) -> Terms:
    """Adapters of several ranks, of which each row has some or none."""
    ranks = (3, 16, 1, 8)
    weight_TN = randn(tokens, len(ranks), seed=9)
    weight_TN[randn(tokens, len(ranks), seed=8) < 0] = 0.0
    return Terms(randn(tokens, rows), randn(tokens, columns, seed=1),
                 [randn(r, columns, seed=2 + i) / columns**0.5 for i, r in enumerate(ranks)],
                 [randn(r, rows, seed=6 + i) / r**0.5 for i, r in enumerate(ranks)], weight_TN)


def results() -> Iterator[tuple[str, Tensor]]:
    for bits in (4, 8):
        for rows, columns in SHAPES:
            packed = pack(random_matrix(rows, columns, bits))
            for tokens in TOKENS:
                yield f"linear {bits} {rows} {columns} {tokens}", ops.quantized_linear(
                    randn(tokens, columns), packed, rows, bits=bits)
            yield f"awkward {bits} {rows} {columns}", ops.quantized_linear(
                awkward_rows(columns), packed, rows, bits=bits)
        packed = torch.cat([pack(random_matrix(20, 70, bits, seed)) for seed in range(3)])
        for tokens in (1, 9):
            yield f"grouped {bits} {tokens}", ops.grouped_quantized_linear(
                randn(tokens, 3, 70), packed, 0, len(packed) // 3, 20, bits=bits)
        for tokens in (1, 2, 7, 40, 111):
            case = random_experts(tokens, bits)
            yield f"experts {bits} {tokens}", case.run()
            yield f"routed {bits} {tokens}", case.run(shared=False)
            yield f"mlp {bits} {tokens}", ops.quantized_mlp(case.x_TH, case.shared, SHARED, bits=bits)
        yield f"crowd {bits}", random_experts(60, bits, only=5).run()
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (1, 3, 4, 9, 50)):
        yield f"plain {dtype} {tokens}", ops.plain_linear(randn(tokens, 100), randn(50, 100).to(dtype))
    for columns, rows, tokens in itertools.product((37, 64, 200), (5, 96, 150), (1, 3, 9, 50)):
        yield f"low rank {columns} {rows} {tokens}", random_low_rank(tokens, columns, rows).run()
    for heads, rank, tokens in itertools.product((1, 5, 16, 20), (16, 48), (1, 3, 40)):
        yield f"attention {heads} {rank} {tokens}", random_attention(heads, rank, tokens, batch=4).run()
    for bits, heads, tokens in itertools.product((4, 8), (1, 3), (1, 16, 17, 40, 150)):
        yield f"naive {bits} {heads} {tokens}", random_naive(heads, tokens, bits, batch=4).run()
        yield f"odd naive {bits} {heads} {tokens}", random_naive(heads, tokens, bits, nope=12, value=21).run()
    for interleave in (False, True):
        latents = torch.zeros(2, 9, 36)
        yield f"rotated {interleave}", ops.prepare_latents(
            randn(2, 5, 3, 20), randn(2, 5, 36), randn(28), 1e-6, randn(2, 5, 4), randn(2, 5, 4), interleave,
            latents, 3)
        yield f"latents {interleave}", latents
    for sigmoid in (False, True):
        for name, part in zip(("index", "weight", "scores"), ops.choose_experts(
                randn(300, 32) * 3, randn(32), groups=8, kept_groups=3, top=5, group_best=2, sigmoid=sigmoid,
                normalise=True, scale_anyway=True, scale=2.5), strict=True):
            yield f"gate {sigmoid} {name}", part
    for width in (1, 16, 33, 100):
        yield f"norm {width}", ops.rms_norm(randn(70, width), randn(width), 1e-6)


if __name__ == "__main__":
    print(isa())
    for name, result in results():
        print(name, hashlib.sha256(result.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(), sep="\t")
