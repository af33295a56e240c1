"""A tiny model behind a real server."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deepseek.engine import LLM
from deepseek.serve.options import ServeOptions
from deepseek.tokenizer import Tokenizer
from tests.helpers.servers import KEY, Running


@pytest.fixture(scope="session")
def tiny_llm(tiny_config: Callable, random_model: Callable) -> Callable[..., LLM]:
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog", "0123456789", '{"a": [true]}'] * 4, 340)

    def make(**options: Any) -> LLM:
        model = random_model(tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048))
        return LLM(model, tokenizer=tokenizer, **options)

    return make


@pytest.fixture(scope="session")
def running(tiny_llm: Callable[..., LLM]) -> Iterator[Running]:
    server = Running(tiny_llm(max_num_seqs=16), ServeOptions("tiny", api_key=(KEY,), max_body=1 << 20))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (Debian's package)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the test extra (playwright)")
    with playwright.sync_playwright() as own:
        opened = own.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        yield opened
        opened.close()
