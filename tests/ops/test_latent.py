"""Attention over a latent cache, in both orders, against its references; and what it promises.

Shape letters: B batch, T tokens, N heads, R latent rank, D = nope + rope.
"""

from __future__ import annotations

import pytest
import torch

from deepseek import ops
from deepseek.ops import rotate
from deepseek.ops.latent import latent_attention_reference, naive_attention_reference
from deepseek.ops.native import native
from deepseek.ops.panels import Bits
from tests.helpers.operations import Attention, both_widths, natively, randn, random_attention, random_naive, same_bits


@pytest.mark.parametrize("heads", [1, 5, 16, 20])
@pytest.mark.parametrize("rank", [16, 48, 12])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_latent_attention_is_near_the_reference(heads: int, rank: int, tokens: int, some_threads: int) -> None:
    case = random_attention(heads, rank, tokens)
    torch.testing.assert_close(case.run(), latent_attention_reference(*case, 0.2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "past"), [(0, 0), (0, 126), (0, 127), (0, 128), (1, 128), (5, 5), (9, 3), (128, 299),
                                             (299, 299), (0, 299)])
def test_spans_of_every_length(first: int, past: int) -> None:
    """Blocks of 128 keys, whole and broken, counted from the first visible one; a query before it gets zeros."""
    case = random_attention(3, 16, 1, batch=1)._replace(first_B=torch.tensor([first]), past_B=torch.tensor([past]))
    want = latent_attention_reference(*case, 0.2)
    torch.testing.assert_close(case.run(), want, rtol=1e-4, atol=1e-5)
    if first == past:
        torch.testing.assert_close(case.run(), case.cache[:, past, :16].expand(1, 1, 3, 16))
    if first > past:
        assert not case.run().any()


@pytest.mark.parametrize("rank", [16, 12])
def test_what_a_query_may_not_see_is_not_read(rank: int) -> None:
    """NaN everywhere but in the visible rows."""
    case = random_attention(5, rank, 4)
    cache = torch.full_like(case.cache, torch.nan)
    for b, (first, past) in enumerate(zip(case.first_B.tolist(), case.past_B.tolist(), strict=True)):
        cache[b, first : past + 4] = case.cache[b, first : past + 4]
    if native is not None and rank == 16:
        assert same_bits(case._replace(cache=cache).run(), case.run())
    assert case.run().isfinite().all()


@natively
@pytest.mark.parametrize("heads", [5, 20])
def test_a_query_has_the_same_bits_in_any_company(heads: int, some_threads: int) -> None:
    """Alone, in a batch, in chunks of every length, behind padding on the left."""
    case = random_attention(heads, 32, 40)
    whole = case.run()
    for b in range(3):
        alone = Attention(*(t[b : b + 1] for t in case))
        assert same_bits(alone.run()[0], whole[b])
        first = int(case.first_B[b])
        if first <= case.past_B[b]:  # what lies before the first visible row may as well not be there
            moved = alone._replace(cache=alone.cache[:, first:], first_B=torch.zeros(1, dtype=torch.long),
                                   past_B=alone.past_B - first)
            assert same_bits(moved.run()[0], whole[b])
    for chunk in (1, 7, 39):
        parts = [Attention(case.q_latent[:, t : t + chunk].contiguous(), case.q_rope[:, t : t + chunk].contiguous(),
                           case.cache, case.first_B, case.past_B + t).run() for t in range(0, 40, chunk)]
        assert same_bits(torch.cat(parts, 1), whole)


@natively
def test_a_cache_within_a_larger_one() -> None:
    """Rows of one sequence lie together, sequences anywhere; other layouts and dtypes take the reference."""
    case = random_attention(5, 16, 3)
    large = randn(3, 500, 24)
    large[:, :300] = case.cache
    assert same_bits(case._replace(cache=large[:, :300]).run(), case.run())
    for other in (case.cache.transpose(0, 1).contiguous().transpose(0, 1), case.cache.double()):
        torch.testing.assert_close(case._replace(cache=other).run(), case.run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(("nope", "rope", "rank"), [(12, 8, 28), (0, 2, 16), (16, 64, 33)])
def test_prepare_latents(nope: int, rope: int, rank: int, per_sequence: bool, interleave: bool,
                         some_threads: int) -> None:
    q_BTND, kv_BTC, norm_R = randn(2, 5, 3, nope + rope), randn(2, 5, rank + rope, seed=1), randn(rank, seed=2)
    angle = randn(2 if per_sequence else 1, 5, rope // 2, seed=3)
    cos, sin = angle.cos() * 1.3, angle.sin() * 1.3
    cache = randn(2, 20, rank + rope, seed=4)
    rows, before = cache[:, :9], cache.clone()
    q_rope = ops.prepare_latents(q_BTND, kv_BTC, norm_R, 1e-6, cos, sin, interleave, rows, 4)
    torch.testing.assert_close(q_rope, rotate(q_BTND[..., nope:], cos, sin, interleave), rtol=1e-5, atol=1e-6)
    latent = ops.rms_norm(kv_BTC[..., :rank], norm_R, 1e-6)
    key = rotate(kv_BTC[:, :, None, rank:], cos, sin, interleave)
    torch.testing.assert_close(cache[:, 4:9], torch.cat((latent, key[:, :, 0]), -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(cache[:, :4], before[:, :4]) and torch.equal(cache[:, 9:], before[:, 9:])
    apart = torch.zeros(9, 2, rank + rope).transpose(0, 1)  # not as the kernels need it: the reference
    again = ops.prepare_latents(q_BTND, kv_BTC, norm_R.bfloat16(), 1e-6, cos, sin, interleave, apart, 4)
    torch.testing.assert_close(again, q_rope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(apart[:, 4:], cache[:, 4:9], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", [16, 12])
def test_nan_in_attention_stays_with_its_query(rank: int) -> None:
    case = random_attention(5, rank, 3)
    good = case.run()
    case.q_latent[1, 2, 3, 0] = torch.nan
    now = case.run()
    assert now[1, 2, 3].isnan().all()
    good[1, 2, 3] = now[1, 2, 3] = 0
    torch.testing.assert_close(now, good)




# ---- the naive order ------------------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 40, 150])
@pytest.mark.parametrize(("nope", "value"), [(16, 32), (48, 16), (12, 21), (0, 32), (0, 21)])
def test_naive_attention_is_near_the_reference(
    nope: int, value: int, tokens: int, heads: int, bits: Bits, some_threads: int
) -> None:
    case = random_naive(heads, tokens, bits, nope=nope, value=value)
    torch.testing.assert_close(case.run(), naive_attention_reference(*case[:-1], 0.02, bits), rtol=1e-4, atol=1e-4)


@natively
@both_widths
def test_a_query_of_the_naive_order_has_the_same_bits_in_any_company(bits: Bits, some_threads: int) -> None:
    """Alone, in a batch, in chunks of every length, behind padding on the left, on more threads."""
    case = random_naive(3, 150, bits)
    whole = case.run()
    for b in range(3):
        alone = case._replace(**{name: getattr(case, name)[b : b + 1] for name in (
            "q_BTND", "q_rope", "cache", "first_B", "past_B")})
        assert same_bits(alone.run()[0], whole[b])
        first = int(case.first_B[b])
        if first <= case.past_B[b]:
            moved = alone._replace(cache=alone.cache[:, first:], first_B=torch.zeros(1, dtype=torch.long),
                                   past_B=alone.past_B - first)
            assert same_bits(moved.run()[0], whole[b])
    for chunk in (1, 7, 16, 131):
        parts = [case.part(slice(t, min(t + chunk, 150))).run() for t in range(0, 150, chunk)]
        assert same_bits(torch.cat(parts, 1), whole), chunk


@natively
@both_widths
@pytest.mark.parametrize("tokens", [4, 40])
def test_what_a_query_of_the_naive_order_may_not_see_is_not_read(tokens: int, bits: Bits) -> None:
    """NaN before the first visible row and after the last one; then in the middle: later queries alone have it."""
    case = random_naive(2, tokens, bits)
    cache = torch.full_like(case.cache, torch.nan)
    for b, (first, past) in enumerate(zip(case.first_B.tolist(), case.past_B.tolist(), strict=True)):
        cache[b, first : past + tokens] = case.cache[b, first : past + tokens]
    good = case.run()
    assert same_bits(case._replace(cache=cache).run(), good)
    for place in (0, 26):  # a latent, a rotary key
        cache = case.cache.clone()
        cache[1, 142, place] = torch.nan  # past_B[1] is 140: the third query is the first to see it
        now = case._replace(cache=cache).run()
        assert same_bits(now[1, :2], good[1, :2]) and same_bits(now[[0, 2]], good[[0, 2]])
        assert now[1, 2:].isnan().all()
