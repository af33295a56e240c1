"""Work before the queue is bounded: lengths, counts and bytes are refused early, and others go on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deepseek.errors import RequestError
from deepseek.serve.options import ServeOptions
from tests.helpers.servers import AUTH, Running


def post(running: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(running.url + path, content=json.dumps({"model": "tiny"} | body), timeout=60,
                      headers=AUTH | {"content-type": "application/json"})


@pytest.mark.parametrize(("path", "body"), [
    ("completions", {"prompt": []}), ("completions", {"prompt": [True]}), ("completions", {"prompt": [[]]}),
    ("completions", {"prompt": [1.5]}), ("completions", {"prompt": [[True]]}),
    ("completions", {"prompt": ["x"] * 3000}),
    ("completions", {"prompt": "the quick brown fox " * 40_000}), ("completions", {"prompt": "\ud800" * 100_000}),
    ("embeddings", {"input": []}), ("embeddings", {"input": [[]]}), ("embeddings", {"input": [True]}),
    ("embeddings", {"input": ["x"] * 20_000}), ("embeddings", {"input": "a" * 900_000}),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}] * 10_000}),
    ("chat/completions", {"messages": [{"role": "user", "content": "fox " * 200_000}]}),
], ids=lambda value: str(value)[:40])
def test_what_cannot_fit_is_refused(running: Running, path: str, body: dict[str, Any]) -> None:
    refused = post(running, f"/v1/{path}", body)
    assert refused.status_code == 400 and refused.json()["error"]["message"], refused.text


def test_a_long_text_is_not_tokenized(running: Running) -> None:
    refused = post(running, "/tokenize", {"prompt": "the quick brown fox " * 40_000})
    assert refused.status_code == 400 and "must leave room" in refused.json()["error"]["message"]
    assert post(running, "/tokenize", {"prompt": ""}).json()["count"] == 1


def test_a_long_text_is_not_encoded_whole(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = running.llm.tokenizer
    assert tokenizer is not None
    assert not tokenizer.surely_longer("fox " * 100_000, 10**6) and not tokenizer.surely_longer("fox", 0)
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: pytest.fail("encoded"))
    for text in ("fox " * 10**6, " " * 10**6, "\ud800" * 10**6):
        with pytest.raises(RequestError, match="must leave room within the model's context"):
            running.llm.encode(text)


def test_bytes_under_way_are_bounded(tiny_llm: Callable[..., Any]) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny", max_body=10_000))
    try:
        host, port = server.url.removeprefix("http://").split(":")
        waiting = []
        for _ in range(16):
            own = socket.create_connection((host, int(port)), timeout=30)
            own.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10000\r\n\r\n{")
            waiting.append(own)
        body = {"model": "tiny", "prompt": "fox", "max_tokens": 2}
        until = time.monotonic() + 60  # all of them arrive before
        while (answer := httpx.post(f"{server.url}/v1/completions", json=body)).status_code == 200:
            assert time.monotonic() < until
        assert answer.status_code == 429 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "queue_full"

        def chunks() -> Any:
            yield json.dumps(body).encode()

        assert httpx.post(f"{server.url}/v1/completions", content=chunks(),
                          headers={"content-type": "application/json"}).status_code == 429
        for own in waiting:
            own.close()
        until = time.monotonic() + 60
        while httpx.post(f"{server.url}/v1/completions", json=body).status_code == 429:
            assert time.monotonic() < until
    finally:
        server.stop()


def test_embeddings_leave_room_for_others_and_end_with_their_client(tiny_llm: Callable[..., Any]) -> None:
    llm = tiny_llm()
    server = Running(llm, ServeOptions("tiny"))
    count, plain, begun = 0, llm.pooling_request, threading.Event()

    def pooling_request(prompt: Any, adapter: str | None) -> Any:
        nonlocal count
        count += 1
        begun.set()
        time.sleep(0.02)
        return plain(prompt, adapter)

    llm.pooling_request = pooling_request
    try:
        content = json.dumps({"model": "tiny", "input": ["fox"] * 2000}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as own:
            own.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"content-length: %d\r\n\r\n%s" % (len(content), content))
            assert begun.wait(30)
        done = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "fox", "max_tokens": 2},
                          timeout=60)
        assert done.status_code == 200
        until = time.monotonic() + 30
        while server.app.state.server.open and time.monotonic() < until:
            time.sleep(0.02)
        assert count < 2000
    finally:
        server.stop()
