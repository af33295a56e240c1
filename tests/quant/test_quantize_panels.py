"""The native quantizer beside the readable codecs."""

from __future__ import annotations

import pytest
import torch

from deepseek.ops import native
from deepseek.ops.panels import unpack
from deepseek.quant import int8, nf4
from deepseek.quant.pack import quantize_panels


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (48, 256), (33, 130), (7, 1000)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy", "tiny", "huge"])
def test_native_panels_are_the_codecs(rows: int, columns: int, bits: int, kind: str) -> None:
    w = torch.randn(rows, columns)
    w = {"normal": w, "heavy": w**3, "tiny": w * 1e-30, "huge": w * 1e30}[kind]
    w[rows // 2] = 0
    w[0, : min(64, columns)] = 0
    packed, error, square = quantize_panels(w, bits)
    q, ours = (nf4 if bits == 4 else int8).quantize(w), unpack(packed, rows, columns, bits)
    assert torch.equal(ours.code_OK, q.code_OK)
    torch.testing.assert_close(ours.step_O, q.step_O, rtol=1e-6, atol=0)
    if q.scale_Ob is not None and ours.scale_Ob is not None:  # a fit on the edge between two scales may fall either way
        assert int((ours.scale_Ob.int() - q.scale_Ob.int()).abs().max()) <= 1
    if kind in ("normal", "heavy"):
        lost = float(torch.linalg.vector_norm(w - ours.dequantize(), dtype=torch.float64) ** 2)
        assert error == pytest.approx(lost, rel=1e-4)
        assert square == pytest.approx(float(w.double().square().sum()), rel=1e-5)


def test_the_fallback_is_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(20, 100)
    fast, fast_error, _ = quantize_panels(w, 4)
    monkeypatch.setattr(native, "native", None)
    slow, slow_error, _ = quantize_panels(w, 4)
    assert fast.shape == slow.shape and float((fast != slow).float().mean()) < 0.05
    assert fast_error == pytest.approx(slow_error, rel=1e-3)
