"""Requests to an engine that a test steps by itself, and the quantized model that engines run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoint import save_model
from deepseek.convert import quantize
from deepseek.engine import LLM, SamplingParams
from deepseek.engine.request import Request
from deepseek.model import CausalLM
from deepseek.ops.native import native
from deepseek.tokenizer import Tokenizer

exact_in_company = pytest.mark.skipif(native is None, reason="exact in any company with the native kernels alone")


def params(max_tokens: int = 6, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | changes))


def finish(llm: LLM, *requests: Request) -> None:
    """Add the requests, and step until nothing is left to run."""
    llm.engine.add(*requests)
    while not llm.engine.idle:
        llm.engine.step()


def nf4(model: CausalLM, place: Path, tokenizer: Tokenizer | None = None) -> Path:
    """The folder of the model in NF4."""
    quantize(save_model(model, place / "plain", tokenizer=tokenizer), place / "q", "nf4", progress=False)
    return place / "q"
