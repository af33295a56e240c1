"""The byte layout of quantized matrices, against the words of its definition, byte by byte."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import CheckpointError
from deepseek.ops.panels import (
    LEVELS,
    ZERO,
    Bits,
    Quantized,
    matrix_bytes,
    mlp_bytes,
    pack,
    pack_mlp,
    panel_bytes,
    unpack,
    unpack_mlp,
)


def random_matrix(rows: int, columns: int, bits: Bits, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    step_O = torch.rand(rows, generator=generator)
    if bits == 8:
        code_OK = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        return Quantized(code_OK, None, step_O)
    code_OK = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale_Ob = torch.randint(0, 256, (rows, -(-columns // 64)), generator=generator, dtype=torch.uint8)
    return Quantized(code_OK, scale_Ob, step_O)


def assert_same(a: Quantized, b: Quantized) -> None:
    assert torch.equal(a.code_OK, b.code_OK) and torch.equal(a.step_O, b.step_O)
    assert (a.scale_Ob is None) == (b.scale_Ob is None)
    assert a.scale_Ob is None or b.scale_Ob is None or torch.equal(a.scale_Ob, b.scale_Ob)


@given(rows=st.integers(1, 50), columns=st.integers(1, 330), bits=st.sampled_from((4, 8)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_unpack_gives_back_what_was_packed(rows: int, columns: int, bits: Bits, seed: int) -> None:
    q = random_matrix(rows, columns, bits, seed)
    packed = pack(q)
    assert packed.dtype == torch.uint8 and packed.shape == (matrix_bytes(rows, columns, bits),)
    assert panel_bytes(columns, bits) % 64 == 0
    assert_same(unpack(packed, rows, columns, bits), q)


@given(hidden=st.integers(1, 140), inner=st.integers(1, 140), bits=st.sampled_from((4, 8)))
@settings(max_examples=25, deadline=None)
def test_an_mlp_and_the_padding_behind_it(hidden: int, inner: int, bits: Bits) -> None:
    parts = (random_matrix(inner, hidden, bits, 1), random_matrix(inner, hidden, bits, 2),
             random_matrix(hidden, inner, bits, 3))
    packed = pack_mlp(*parts)
    assert packed.shape == (mlp_bytes(hidden, inner, bits),)
    for again, part in zip(unpack_mlp(torch.cat((packed, packed[:100])), hidden, inner, bits), parts, strict=True):
        assert_same(again, part)


def test_four_bits_byte_by_byte() -> None:
    """20 rows are two panels, 70 columns two blocks; every byte from the definition at the top of panels.py."""
    rows, columns, blocks = 20, 70, 2
    q = random_matrix(rows, columns, 4)
    assert q.scale_Ob is not None
    data, width = bytes(pack(q).tolist()), panel_bytes(columns)
    assert len(data) == 2 * width and width == 64 + 64 + blocks * 512

    def code(row: int, column: int) -> int:
        return int(q.code_OK[row, column]) if row < rows and column < columns else ZERO

    for p in range(2):
        panel = data[p * width : (p + 1) * width]
        for r in range(16):
            row = 16 * p + r
            step = struct.unpack_from("<f", panel, 4 * r)[0]
            assert step == (float(q.step_O[row]) if row < rows else 0.0)
            for b in range(blocks):
                assert panel[64 + 16 * b + r] == (int(q.scale_Ob[row, b]) if row < rows else 0)
                for g in range(8):
                    for j in range(4):
                        byte = panel[128 + ((b * 8 + g) * 16 + r) * 4 + j]
                        column = 64 * b + 8 * g + j
                        assert byte & 15 == code(row, column) and byte >> 4 == code(row, column + 4)
        assert not any(panel[64 + 16 * blocks : 128])


def test_eight_bits_byte_by_byte() -> None:
    rows, columns = 17, 66
    q = random_matrix(rows, columns, 8)
    data, width = bytes(pack(q).tolist()), panel_bytes(columns, 8)
    assert len(data) == 2 * width and width == 64 + 2 * 1024
    for row in range(32):
        panel, r = data[row // 16 * width :], row % 16
        for k in range(128):
            byte = panel[64 + ((k // 64 * 16 + k % 64 // 4) * 16 + r) * 4 + k % 4]
            want = int(q.code_OK[row, k]) if row < rows and k < columns else 0
            assert byte == want % 256


def test_gate_and_up_lie_in_turns() -> None:
    gate, up, down = random_matrix(33, 70, 4, 1), random_matrix(33, 70, 4, 2), random_matrix(70, 33, 4, 3)
    packed, width = pack_mlp(gate, up, down), panel_bytes(70)
    for p in range(3):
        assert torch.equal(packed[2 * p * width :][:width], pack(gate)[p * width :][:width])
        assert torch.equal(packed[(2 * p + 1) * width :][:width], pack(up)[p * width :][:width])
    assert torch.equal(packed[6 * width :], pack(down))


def test_values_follow_the_formula() -> None:
    q = random_matrix(3, 130, 4)
    assert q.scale_Ob is not None and LEVELS[ZERO] == 0
    w_OK = q.dequantize()
    for r in range(3):
        for k in (0, 63, 64, 129):
            want = float(q.step_O[r]) * int(q.scale_Ob[r, k // 64]) * LEVELS[int(q.code_OK[r, k])]
            assert float(w_OK[r, k]) == pytest.approx(want, rel=1e-6)
    q = random_matrix(3, 130, 8)
    assert torch.equal(q.dequantize(), q.code_OK.float() * q.step_O[:, None])


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_that_do_not_fit_are_refused(bits: Bits) -> None:
    packed = pack(random_matrix(16, 64, bits))
    with pytest.raises(CheckpointError, match=rf"a {bits}-bit matrix \[16, 64\] is {len(packed)} bytes"):
        unpack(packed[:-1], 16, 64, bits)
    with pytest.raises(CheckpointError, match=r"got .* of torch\.int8"):
        unpack(packed.view(torch.int8), 16, 64, bits)
    with pytest.raises(CheckpointError, match=rf"a {bits}-bit MLP of hidden 64, intermediate 16 is"):
        unpack_mlp(packed, 64, 16, bits)
