"""What is malformed, too large or too much is refused in one clear answer; who leaves is aborted; streams end well."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deepseek.engine import LLM
from deepseek.serve.app import create_app
from deepseek.serve.options import ServeOptions
from deepseek.watch.metrics import key
from tests.helpers.servers import AUTH, KEY, Running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 5}


def post(running: Running, content: bytes, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    return httpx.post(running.url + path, content=content, timeout=60,
                      headers=AUTH | {"content-type": "application/json"} | headers)


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe{}", b'{"model": "\xc3\x28"}', b"[]", b"null", b'"x"', b"[" * 100_000,
    json.dumps(CHAT | {"messages": "x"}).encode(), json.dumps(CHAT | {"max_tokens": "5"}).encode(),
    json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}).encode(),
    json.dumps(CHAT | {"seed": 1 << 70}).encode(), json.dumps(CHAT | {"temperature": 1e999}).encode(),
    json.dumps(CHAT | {"stop": ["x"] * 3 + [7]}).encode(), json.dumps(CHAT | {"logit_bias": {"x": 1}}).encode(),
], ids=lambda content: repr(content[:30]))
def test_malformed_bodies(running: Running, content: bytes) -> None:
    answer = post(running, content)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"] and answer.json()["error"]["type"] == "invalid_request_error"


def test_large_bodies(running: Running) -> None:
    body = json.dumps(CHAT | {"messages": [{"role": "user", "content": "x" * (10 << 20)}]}).encode()
    assert post(running, body).status_code == 413

    def pieces() -> Any:  # without a length
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    answer = httpx.post(f"{running.url}/v1/chat/completions", content=pieces(), headers=AUTH, timeout=60)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_other_paths_methods_and_keys(running: Running) -> None:
    assert httpx.get(f"{running.url}/v1/nothing", headers=AUTH).status_code == 404
    assert httpx.get(f"{running.url}/v1/chat/completions", headers=AUTH).status_code == 405
    refused = httpx.get(f"{running.url}/v1/models")
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    health = httpx.get(f"{running.url}/health")
    assert health.status_code == 200 and health.json()["status"] == "ok"
    page = httpx.get(f"{running.url}/", follow_redirects=True)  # what a browser does with the address, without a key
    assert page.status_code == 200 and page.url.path == "/" and page.headers["content-type"].startswith("text/html")
    assert httpx.head(f"{running.url}/").status_code == 200


def test_a_client_that_leaves_is_aborted(running: Running) -> None:
    engine = running.llm.engine
    before = engine.stats.aborted
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout), httpx.stream(
                "POST", f"{running.url}/v1/completions", headers=AUTH, timeout=httpx.Timeout(5, read=0.7),
                json={"model": "tiny", "prompt": "fox", "max_tokens": 1900, "stream": stream,
                      "deepseek": {"ignore_eos": True}}) as answer:
            for i, _ in enumerate(answer.iter_lines()):
                if i > 6:
                    raise httpx.ReadTimeout("enough")
    deadline = time.monotonic() + 10
    while not engine.idle and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.idle and engine.stats.aborted == before + 2
    assert engine.block_manager.available == engine.block_manager.count


def test_a_full_queue_says_when_to_come_again(tiny_llm: Callable[..., Any]) -> None:
    server = Running(tiny_llm(max_num_seqs=1), ServeOptions("tiny", max_waiting=2))
    try:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", timeout=120, json={
                "model": "tiny", "prompt": "fox", "max_tokens": 150, "deepseek": {"ignore_eos": True}}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(answers) == 8 and 0 < len(refused) <= 5
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {(429, "queue_full")}
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
        many = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x", "n": 5}, timeout=60)
        assert many.status_code == 429
    finally:
        server.stop()


def test_streams_end_before_the_server_does(tiny_llm: Callable[..., Any]) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny"))
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", timeout=60, json={
                "model": "tiny", "prompt": "fox", "max_tokens": 200, "stream": True,
                "deepseek": {"ignore_eos": True}}) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(30)
    server.stop()
    thread.join(10)
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    assert server.llm.engine.idle and server.llm.driver.closed


def test_an_answer_that_takes_too_long(tiny_llm: Callable[..., Any]) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny", timeout=0.3))
    try:
        answer = httpx.post(f"{server.url}/v1/completions", timeout=60, json={
            "model": "tiny", "prompt": "fox", "max_tokens": 1900, "deepseek": {"ignore_eos": True}})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        counters, until = server.app.state.server.watch.counters, time.monotonic() + 30
        while key("refused_total", "504") not in (reading := counters.snapshot()) and time.monotonic() < until:
            time.sleep(0.01)  # it is counted once the answer is out
        assert reading[key("requests_total", "unknown", "error")] == reading[key("refused_total", "504")] == 1
        assert server.llm.engine.idle
    finally:
        server.stop()


async def crowd(url: str, count: int, tokens: int, headers: dict[str, str]) -> tuple[int, int]:
    """(finished, left) of concurrent streams, of which a third leave at random instants."""
    draw = random.Random(0)

    async def one(client: httpx.AsyncClient, leaves: int | None) -> bool:
        async with client.stream("POST", f"{url}/v1/completions", headers=headers, json={
                "model": "tiny", "prompt": "the quick", "max_tokens": tokens if leaves is None else 20 * tokens,
                "stream": True, "deepseek": {"ignore_eos": True}}) as answer:  # none ends before it leaves
            assert answer.status_code == 200
            seen = 0
            async for line in answer.aiter_lines():
                seen += bool(line)
                if leaves is not None and seen >= leaves:
                    return False
            return True

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=count)) as client:
        ends = await asyncio.gather(*(one(client, draw.randint(1, tokens // 2) if i % 3 == 0 else None)
                                      for i in range(count)))
    return sum(ends), len(ends) - sum(ends)


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_concurrent_streams_of_which_a_third_leave(tiny_llm: Callable[..., Any], count: int) -> None:
    server = Running(tiny_llm(max_num_seqs=32), ServeOptions("tiny", max_waiting=1000))
    try:
        finished, left = asyncio.run(crowd(server.url, count, 40, {}))
        assert left == -(-count // 3) and finished == count - left
        engine, deadline = server.llm.engine, time.monotonic() + 30
        while not engine.idle and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.idle and engine.block_manager.available == engine.block_manager.count
        engine.block_manager.check_integrity([])
    finally:
        server.stop()


def test_pages_of_named_origins_may_ask(tiny_llm: Callable[..., LLM]) -> None:
    from fastapi.testclient import TestClient

    options = ServeOptions("tiny", api_key=(KEY,), cors_origin=("https://a.example",))
    with TestClient(create_app(tiny_llm(), options)) as client:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        first = client.options("/v1/chat/completions", headers=asked | {"origin": "https://a.example"})
        assert first.status_code == 200 and first.headers["access-control-allow-origin"] == "https://a.example"
        refused = client.get("/v1/models", headers={"origin": "https://a.example"})  # and the page can read why
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
        other = client.options("/v1/chat/completions", headers=asked | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
