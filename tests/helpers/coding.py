"""A coding of deepseek.ops by its native kernel, on one thread and on three, beside its torch form."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor


def assert_native_is_torch(coding: ModuleType, shape: Sequence[int], given: Sequence[Tensor],
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads, what they leave out and what they stand for, byte for byte. given: a value, what is taken from it, an
    error, and what a payload is added to."""
    value, less, error, onto = given

    def results() -> list[Tensor]:
        coded = [coding.encode(value), coding.encode(value, less), coding.encode(value, None, error, 0.5),
                 coding.encode(value, less, error, 0.9)]
        assert all(coded)
        payload = coded[-1][0]
        odd = torch.cat([payload.new_zeros(1), payload])[1:]  # at an odd address
        return [*(part for one in coded for part in one), coding.decode(odd, shape),
                coding.decode(payload, shape, 0.3), coding.decode(payload, shape, 0.7, onto.clone())]

    ours = results()
    monkeypatch.setattr(coding, "threads", lambda: 3)
    threaded = results()
    by_torch(coding, monkeypatch)
    for one, *others in zip(ours, threaded, results(), strict=True):
        assert all(torch.equal(one, other) for other in others)


def by_torch(coding: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "runs_native", lambda *_: False)
