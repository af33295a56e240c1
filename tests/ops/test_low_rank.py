"""What adapters add to a product: the torch reference, and the same bits for a row in any company."""

from __future__ import annotations

import pytest
import torch

from deepseek.ops.low_rank import add_low_rank_reference
from tests.helpers.operations import natively, randn, random_low_rank, same_bits

SHAPES = ((8, 5), (37, 96), (200, 150), (64, 300))


@pytest.mark.parametrize("tokens", [0, 1, 3, 9, 150])
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_it_is_the_sum_in_double(tokens: int, columns: int, rows: int, some_threads: int) -> None:
    case = random_low_rank(tokens, columns, rows)
    want = case.y_TO.double()
    for i, (a, b) in enumerate(zip(case.a, case.b, strict=True)):
        want += case.weight_TN[:, i, None].double() * (case.x_TK.double() @ a.double().t() @ b.double())
    torch.testing.assert_close(case.run(), want.float(), rtol=1e-5, atol=1e-5)
    add_low_rank_reference(*case)
    torch.testing.assert_close(case.y_TO, want.float(), rtol=1e-5, atol=1e-5)


@natively
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_a_row_has_the_same_bits_in_any_company(columns: int, rows: int, some_threads: int) -> None:
    case = random_low_rank(150, columns, rows)
    together = case.run()
    for part in (slice(0, 1), slice(3, 8), slice(20, 121), torch.tensor([5, 140, 5, 7])):
        assert same_bits(case.run(part), together[part])
    for t in range(0, 150, 17):  # adapters that a row does not have may be there or not
        own = case.weight_TN[t].nonzero().flatten().tolist()
        alone = case._replace(a=[case.a[i] for i in own], b=[case.b[i] for i in own], weight_TN=case.weight_TN[:, own])
        assert same_bits(alone.run(slice(t, t + 1)), together[t : t + 1])


def test_a_row_without_adapters_stays_and_what_is_not_finite_does_not_spread() -> None:
    case = random_low_rank(9, 37, 96)
    case.weight_TN[2] = 0.0
    before = case.run()
    assert same_bits(before[2], case.y_TO[2])
    case.x_TK[4] = torch.nan
    case.weight_TN[4] = randn(4)
    case.a[1][0, 3] = torch.inf
    case.weight_TN[5:, 1] = case.weight_TN[:4, 1] = 0.0
    case.x_TK[2] = torch.nan
    after = case.run()
    assert same_bits(after[2], before[2]) and after[4].isnan().all() and after[[0, 1, 3, 5, 6, 7, 8]].isfinite().all()
