"""Who may connect, how slowly a client may send and read, and what a signal to end does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek.cli import main
from deepseek.errors import ConfigError
from deepseek.keys import check_keys, find_keys
from deepseek.serve.connections import Process
from deepseek.serve.middleware import Guard
from deepseek.serve.options import ServeOptions, check_host, host_name
from deepseek.watch.options import WatchOptions
from tests.helpers.servers import Running

BODY: dict[str, Any] = {"model": "tiny", "prompt": "fox", "max_tokens": 2}


@pytest.fixture(scope="module")
def tight(tiny_llm: Callable[..., Any]) -> Iterator[Running]:
    """Few connections, little time."""
    server = Running(tiny_llm(max_num_seqs=4), ServeOptions(
        "tiny", max_connections=8, receive_timeout=0.5, read_timeout=0.5, shutdown_timeout=0.5))
    yield server
    server.stop()


def connect(server: Running, sent: bytes = b"") -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    own = socket.create_connection((host, int(port)), timeout=30)
    own.sendall(sent)
    return own


def rest(own: socket.socket) -> bytes:
    out = b""
    with contextlib.suppress(ConnectionError):
        while part := own.recv(1 << 16):
            out += part
    own.close()
    return out


@pytest.mark.parametrize("key", ["", " ", "a b", "key\n", "schl\u00fcssel"])
def test_a_key_that_no_client_can_send(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="api_key: must be visible ASCII"):
        check_keys(["good", key])
    assert main(["serve", "nowhere", "--api_key", key]) == 2
    assert "api_key" in capsys.readouterr().err


def test_flags_and_files_come_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"one\r\n\n  two \n")
    assert find_keys() == []
    for given, files, keys in ((["flag"], [], ["flag"]), ([], [file], ["one", "two"]),
                               (["flag"], [file], ["flag", "one", "two"]), ([], [], ["variable"])):
        monkeypatch.setenv("DEEPSEEK_API_KEY", " variable\n")
        assert find_keys(given, files) == keys
        assert "DEEPSEEK_API_KEY" not in os.environ  # no worker inherits it


@pytest.mark.parametrize("blank", ["", " ", "\n", "a b", "schl\u00fcssel"])
def test_a_blank_key_leaves_no_server_open(blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", blank)
    assert main(["serve", "nowhere"]) == 2
    assert "DEEPSEEK_API_KEY: must be visible ASCII" in (said := capsys.readouterr().err)
    assert not blank.strip() or blank not in said
    file = tmp_path / "keys"
    file.write_text(blank)
    assert main(["serve", "nowhere", "--api_key_file", str(file)]) == 2
    assert f"api_key_file = '{file}': " in capsys.readouterr().err


@pytest.mark.parametrize(("data", "words"), [
    (None, "No such file"), (b"\xff\xfe", "must be text"), (b"k\n" * (1 << 16), "65,536 bytes at most")])
def test_a_file_that_holds_no_keys(data: bytes | None, words: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    if data is not None:
        file.write_bytes(data)
    for command in (["serve", "nowhere"], ["watch", "http://127.0.0.1:1"]):
        assert main([*command, "--api_key_file", str(file)]) == 2
        assert words in capsys.readouterr().err
    assert main(["serve", "nowhere", "--api_key_file", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("header", "name"), [
    ("localhost", "localhost"), ("LocalHost.:8000", "localhost"), ("[::1]:80", "::1"), ("[0:0:0:0:0:0:0:1]", "::1"),
    ("127.0.0.1:1", "127.0.0.1"), ("", None), (":80", None), ("a:b", None), ("[::1", None), ("[evil]", None),
    ("[::1]x", None), ("a:80:90", None), ("::1", None), (".", None)])
def test_host_names(header: str, name: str | None) -> None:
    assert host_name(header) == name


def test_names_that_no_host_header_can_have() -> None:
    assert check_host("Ai.Example.") == "ai.example" and check_host("[::1]") == "::1"
    for name in ("", "http://a", "a:80", "a/b", "a b", "*"):
        with pytest.raises(ConfigError, match="allowed_host"):
            check_host(name)


@pytest.mark.parametrize(("header", "bound", "hosts", "keys", "here"), [
    ("127.0.0.1:8000", "127.0.0.1", (), (), True), ("127.9.9.9", "127.0.0.1", (), (), True),
    ("[::1]:8000", "::1", (), (), True), ("[::ffff:127.0.0.1]", "127.0.0.1", (), (), True),
    ("evil.example", "127.0.0.1", (), (), False), ("localhost.evil.example", "127.0.0.1", (), (), False),
    ("127.0.0.1.evil.example", "0.0.0.0", (), (), False), ("192.168.1.5:8000", "127.0.0.1", (), (), False),
    ("192.168.1.5:8000", "0.0.0.0", (), (), True), ("192.168.1.5:8000", "192.168.1.5", (), (), True),
    ("ai.example:80", "0.0.0.0", ("ai.example",), (), True), ("AI.Example.", "127.0.0.1", ("ai.example",), (), True),
    ("evil.example", "127.0.0.1", ("ai.example",), ("k",), False), ("evil.example", "127.0.0.1", (), ("k",), True),
    ("", "127.0.0.1", (), (), False)])
def test_hosts(header: str, bound: str, hosts: tuple[str, ...], keys: tuple[str, ...], here: bool) -> None:
    async def nothing(*_: Any) -> None:
        pass

    guard = Guard(nothing, keys, 1, lambda _: None, hosts, bound)
    assert (not guard.checks_hosts or guard.is_allowed_host(header)) is here


def test_a_foreign_name_is_refused_in_openais_shape(running: Running, tight: Running) -> None:
    for path in ("/health", "/dashboard", "/v1/models"):
        refused = httpx.get(tight.url + path, headers={"host": "evil.example"})
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_not_allowed"
        assert refused.headers["x-request-id"]
    assert httpx.get(f"{running.url}/health", headers={"host": "evil.example"}).status_code == 200  # it has a key


@pytest.mark.parametrize("sent", [
    b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx: ",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"])
def test_requests_that_do_not_arrive_are_ended(tight: Running, sent: bytes) -> None:
    answer = rest(connect(tight, sent))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_a_body_that_drips_is_ended(tight: Running) -> None:
    own = connect(tight, b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10000\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(300):
            own.sendall(b" ")
            time.sleep(0.02)
        pytest.fail("it went on")
    own.close()


def test_half_sent_requests_make_room(tiny_llm: Callable[..., Any]) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny", max_connections=8, receive_timeout=600))
    try:
        crowd = [connect(server, b"GET / HTTP/1.1\r\nx: ") for _ in range(40)]
        assert httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60).status_code == 200
        assert len(server.server.server_state.connections) <= 8
        for own in crowd:
            own.close()
        with contextlib.ExitStack() as stack:  # connections that are being answered make no room
            busy = [stack.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", timeout=60, json=BODY | {
                "max_tokens": 1900, "stream": True, "deepseek": {"ignore_eos": True}})) for _ in range(8)]
            answer = rest(connect(server))
            assert answer.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in answer
        assert [one.status_code for one in busy] == [200] * 8
    finally:
        server.stop()


def test_a_client_that_does_not_read_is_ended() -> None:
    left = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        assert (await receive())["type"] == "http.request"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):  # more than the system's buffers hold
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    async def drain(_: float) -> None:
        pass

    listener = socket.create_server(("127.0.0.1", 0))
    process = Process(app, ServeOptions(read_timeout=0.3), drain)
    thread = threading.Thread(target=lambda: asyncio.run(process.serve([listener])))
    thread.start()
    with socket.create_connection(listener.getsockname(), timeout=30) as own:
        own.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert left.wait(30)
    process.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def test_half_a_request_is_not_waited_for_at_the_end(tiny_llm: Callable[..., Any]) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny", shutdown_timeout=1))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as half, socket.create_connection(
            (host, int(port)), timeout=30) as idle:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in idle.recv(1 << 16)
        server.stop()
        assert b"shutting_down" in half.recv(1 << 16)


@pytest.mark.parametrize("length", [b"x", b"-1", b"", b"\xb2", b"9" * 5000])
def test_lengths_that_are_none(length: bytes) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def nobody(*_: Any) -> None:
        pytest.fail("let through")

    asyncio.run(Guard(nobody, ["key"], 100, lambda _: None)(
        {"type": "http", "method": "POST", "path": "/health", "headers": [(b"content-length", length)]}, nobody, send))
    assert sent[0]["status"] == 400


def test_streams_that_do_not_end_in_time_end_with_an_error(tiny_llm: Callable[..., Any]) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny", shutdown_timeout=1))
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        while not lines:
            with httpx.stream("POST", f"{server.url}/v1/completions", timeout=60, json=BODY | {
                    "max_tokens": 2000, "stream": True, "deepseek": {"ignore_eos": True}}) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

    slow = server.llm.engine.step

    def step() -> Any:
        time.sleep(0.05)
        return slow()

    server.llm.engine.step = step  # type: ignore[method-assign]
    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(30)
    server.server.should_exit = True
    while not server.app.state.server.closing:
        time.sleep(0.01)
    refused = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 503
    server.stop()
    thread.join(10)
    assert json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert server.llm.engine.idle and server.llm.driver.closed


def test_feedback_that_cannot_be_kept_is_503_and_answers_go_on(tiny_llm: Callable[..., Any], tmp_path: Path) -> None:
    server = Running(tiny_llm(), ServeOptions("tiny", watch=WatchOptions(history=tmp_path / "h.sqlite")))
    try:
        (tmp_path / "h.sqlite").unlink()
        done = httpx.post(f"{server.url}/v1/completions", timeout=60, json=BODY)
        assert done.status_code == 200
        refused = httpx.post(f"{server.url}/v1/feedback", json={"id": done.json()["id"], "rating": "up"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "history_failed"
        assert httpx.get(f"{server.url}/dashboard/state").status_code == 200
    finally:
        server.stop()


def test_nothing_is_made_for_a_client_that_does_not_read(tiny_llm: Callable[..., Any]) -> None:
    """And it gets everything once it reads."""
    server = Running(tiny_llm(), ServeOptions("tiny"))
    try:
        content = json.dumps({"model": "tiny", "prompt": "fox", "max_tokens": 1500, "stream": True, "logprobs": 20,
                              "ignore_eos": True}).encode()
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.settimeout(60)
        host, port = server.url.removeprefix("http://").split(":")
        own.connect((host, int(port)))
        own.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                    b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content))
        running, end = server.llm.engine.scheduler.running, time.monotonic() + 60
        while not any(request.paused for request in running):
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.3)
        (silent,) = running
        assert silent.paused and len(silent.token_ids) < 500
        with httpx.Client(timeout=60) as client:  # others go on
            assert client.post(f"{server.url}/v1/completions", json=BODY).status_code == 200
        said = rest(own)
        assert b'"finish_reason": "length"' in said and b"data: [DONE]" in said and len(silent.token_ids) == 1500
    finally:
        server.stop()
