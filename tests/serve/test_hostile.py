"""Bombs and mutated requests against a `deepseek serve` of its own: it lives, its memory stays bounded, others go on.

`pytest -s -m slow tests/serve/test_hostile.py` prints the table of bombs: honest streams alone and beside each.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deepseek.checkpoint import save_model
from deepseek.tokenizer import Tokenizer
from tests.helpers import ROOT

GROWTH = int(1.5 * (1 << 30))  # bytes of resident memory that a bomb may cost
STREAMS = 4
SECONDS = 3.0  # that a bomb goes on at least
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "fox", "max_tokens": 4}
JSON = {"content-type": "application/json"}


@dataclass
class Served:
    """url: without a path. log: what the server wrote to stderr."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=300))

    def post(self, path: str, content: bytes) -> httpx.Response:
        return self.client.post(self.url + path, content=content, headers=JSON)

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)


@contextmanager
def serving(folder: Path, config: Any, random_model: Callable, length: int, *flags: str) -> Iterator[Served]:
    """`deepseek serve` on a tiny model of so many positions with random weights."""
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog", "0123456789", '{"a": [true]}'] * 4, 340)
    save_model(random_model(config(vocab_size=tokenizer.vocab_size, max_position_embeddings=length)), folder)
    tokenizer.save(folder)
    log = folder.with_name("stderr.txt")
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-m", "deepseek.cli", "serve", str(folder), "--port", "0", "--name",
                                    "tiny", *flags], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        yield Served(process.stdout.readline().split(" on ")[1].split("/v1")[0], process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        finally:
            process.kill()


# ---- bombs ----------------------------------------------------------------------------------------------------------

def told(answer: httpx.Response) -> str:
    return f"{answer.status_code}" + (" error" if answer.status_code == 200 and '"error": {' in answer.text else "")


def aside() -> None:
    """The attacker stands for another machine: it gets what processor time the server leaves."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def send(server: Served, path: str, *bodies: dict[str, Any] | bytes, parallel: int = 4) -> Counter[str]:
    """What became of requests, so many at a time."""
    contents = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
    with ThreadPoolExecutor(parallel, initializer=aside) as pool:
        return Counter(pool.map(lambda content: told(server.post(path, content)), contents))


def references(server: Served) -> Counter[str]:
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1000)} | {"d1000": {"type": "boolean"}}
    schema = {"$ref": "#/$defs/d0", "$defs": chain}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return send(server, "/v1/chat/completions", *[CHAT | {"response_format": form, "user": str(i)} for i in range(4)])


def rules(server: Served) -> Counter[str]:
    grammar = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(2700)) + 'r2700: "a"\n'
    return send(server, "/v1/chat/completions", *[CHAT | {"deepseek": {"grammar": grammar}}] * 4)


def optional(server: Served) -> Counter[str]:
    return send(server, "/v1/chat/completions", *[CHAT | {"deepseek": {"regex": "a?" * 100_000}}] * 4)


def ambiguous(server: Served) -> Counter[str]:
    grammar = "start: s\ns: s s s | s s | /[a-z ]/\n"
    return send(server, "/v1/chat/completions", *[CHAT | {"max_tokens": 400, "deepseek": {"grammar": grammar}}] * 4)


def prompts(server: Served) -> Counter[str]:
    body = json.dumps(TEXT | {"prompt": "the quick brown fox " * 200_000}).encode()
    return send(server, "/v1/completions", *[body] * 40, parallel=40)


def embeddings(server: Served) -> Counter[str]:
    return sum((send(server, "/v1/embeddings", {"model": "tiny", "input": ["fox"] * count})
                for count in (20_000, 2048)), Counter())


def messages(server: Served) -> Counter[str]:
    many = [{"role": "user", "content": "x"}] * 60_000
    items = {"model": "tiny", "input": many, "max_output_tokens": 4}
    return sum((send(server, path, *[body] * 4) for path, body in (
        ("/v1/chat/completions", CHAT | {"messages": many}), ("/v1/responses", items),
        ("/tokenize", {"model": "tiny", "messages": many}))), Counter())


def headers(server: Served) -> Counter[str]:
    with ExitStack() as stack:
        for i in range(1200):
            own = stack.enter_context(server.connect())
            own.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-half: %d" % i)
        answer = httpx.get(f"{server.url}/health", timeout=60)
        time.sleep(3)
    return Counter([f"health {answer.status_code}"])


def nesting(server: Served) -> Counter[str]:
    deep = 100_000
    lists, objects = b"[" * deep + b"]" * deep, b'{"a":' * deep + b"0" + b"}" * deep
    head = json.dumps(CHAT)[:-1].encode()
    bodies = [lists, objects, b"[" * deep]
    for name in (b"messages", b"metadata", b"chat_template_kwargs", b"tools", b"response_format", b"deepseek"):
        bodies += [head + b', "' + name + b'": ' + value + b"}" for value in (lists, objects)]
    bodies += [head + b', "response_format": {"type": "json_schema", "json_schema": {"schema": ' + objects + b"}}}",
               head + b', "tools": [{"type": "function", "function": {"name": "f", "parameters": ' + objects + b"}}]}"]
    for depth in (200, 500, 900):  # what the reader takes, and what comes after it may not
        value = b'{"a":' * depth + b"0" + b"}" * depth
        bodies += [head + b', "metadata": ' + value + b"}", head + b', "chat_template_kwargs": ' + value + b"}",
                   head + b', "response_format": {"type": "json_schema", "json_schema": {"schema": ' + value + b"}}}"]
    return send(server, "/v1/chat/completions", *bodies) + send(server, "/v1/responses", *(
        b'{"model": "tiny", "max_output_tokens": 4, "input": "fox", "metadata": {"a": %s}}' % value
        for value in (lists, b"[" * 900 + b"]" * 900)))


def silent_readers(server: Served) -> Counter[str]:
    content = json.dumps({"model": "tiny", "prompt": "fox", "max_tokens": 1900, "stream": True, "logprobs": 20,
                          "ignore_eos": True}).encode()
    with ExitStack() as stack:
        for _ in range(20):
            own = stack.enter_context(server.connect())
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            own.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"content-length: %d\r\n\r\n%s" % (len(content), content))
        time.sleep(20)
    return Counter()


def templates(server: Served) -> Counter[str]:
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    bodies = [CHAT | {"chat_template": bomb}, CHAT | {"chat_template_kwargs": {"chat_template": bomb}},
              CHAT | {"chat_template_kwargs": {"messages": []}},
              CHAT | {"chat_template_kwargs": {"enable_thinking": "x" * 3_000_000}},
              CHAT | {"chat_template_kwargs": {f"v{i}": i for i in range(100_000)}}]
    return send(server, "/v1/chat/completions", *bodies)


BOMBS = (references, rules, optional, ambiguous, prompts, embeddings, messages, headers, nesting, silent_readers,
         templates)


# ---- honest clients -------------------------------------------------------------------------------------------------

class Honest:
    """Streams that go on in another process (helpers/honest_clients.py)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.failures: list[str] = []

    def phase(self) -> list[float]:
        """Seconds from each token to the next since the last call."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        told = json.loads(self.process.stdout.readline())
        self.failures = told["failures"]
        return told["gaps"]


@contextmanager
def honest_clients(server: Served) -> Iterator[Honest]:
    process = subprocess.Popen([sys.executable, "-m", "tests.helpers.honest_clients", server.url, str(STREAMS)],
                               cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Honest(process)
        process.communicate(timeout=160)
        assert process.returncode == 0
    finally:
        process.kill()


def milliseconds(gaps: Sequence[float]) -> str:
    """p50/p99."""
    ordered = sorted(gaps)
    return f"{ordered[len(ordered) // 2] * 1000:.1f}/{ordered[len(ordered) * 99 // 100] * 1000:.1f}" if gaps else "none"


@pytest.fixture(scope="module")
def bombed(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable, random_model: Callable) -> Iterator[Served]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(hard, 4096), hard))
    try:
        with serving(tmp_path_factory.mktemp("hostile") / "tiny", tiny_config, random_model, 2048, "--read_timeout",
                     "5") as server:
            print(f"\n{'bomb':16}{'answers':40}{'seconds':>8}{'MiB more':>10}{'alone p50/p99 ms':>20}{'beside':>16}")
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_a_bomb_harms_nobody(bombed: Served, bomb: Callable[[Served], Counter[str]]) -> None:
    process = psutil.Process(bombed.process.pid)
    with honest_clients(bombed) as honest:
        time.sleep(1)
        honest.phase()
        time.sleep(3)
        alone, before, began = honest.phase(), process.memory_info().rss, time.perf_counter()
        most = before
        told = Counter[str]()
        while time.perf_counter() - began < SECONDS:  # again and again, or the p99 would be one hiccup's
            with ThreadPoolExecutor(1, initializer=aside) as pool:
                answers = pool.submit(bomb, bombed)
                while not answers.done():
                    most = max(most, process.memory_info().rss)
                    time.sleep(0.02)
            told += answers.result()
        beside, seconds = honest.phase(), time.perf_counter() - began
        health = httpx.get(f"{bombed.url}/health", timeout=60)
        time.sleep(0.5)
        after = honest.phase()
    growth = (max(most, process.memory_info().rss) - before)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(told.items()))
    print(f"{bomb.__name__:16}{kinds:40}{seconds:8.1f}{growth >> 20:10}{milliseconds(alone):>20}"
          f"{milliseconds(beside):>16}")
    assert health.status_code == 200 and bombed.process.poll() is None
    assert growth <= GROWTH
    assert not honest.failures and alone and after
    assert not any(kind.startswith("5") for kind in told)
    assert "Traceback" not in bombed.log.read_text()


# ---- mutations ------------------------------------------------------------------------------------------------------

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT | {
        "messages": [{"role": "system", "content": "the lazy dog"},
                     {"role": "user", "content": [{"type": "text", "text": "fox"}]},
                     {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function",
                      "function": {"name": "look", "arguments": '{"city": "x"}'}}]},
                     {"role": "tool", "tool_call_id": "call_1", "content": "rain"}],
        "tools": [TOOL], "tool_choice": "auto", "temperature": 0.7, "top_p": 0.9, "n": 2, "stop": ["zz"], "seed": 7,
        "stream": False, "logprobs": True, "top_logprobs": 2, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "logit_bias": {"5": -3}, "user": "me", "metadata": {"a": "b"}, "reasoning_effort": "low",
        "chat_template_kwargs": {"thinking": False}}),
    ("/v1/chat/completions", CHAT | {
        "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 4, "max_tokens": None,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {
            "type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
            "required": ["a"], "additionalProperties": False}}},
        "deepseek": {"domain": "code", "routed": True, "top_k": 5, "min_p": 0.1, "min_tokens": 1}}),
    ("/v1/chat/completions", CHAT | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}},
                                     "parallel_tool_calls": False}),
    ("/v1/completions", TEXT | {
        "prompt": ["fox", "dog"], "n": 1, "best_of": 1, "echo": True, "logprobs": 2, "top_k": 3, "min_p": 0.0,
        "repetition_penalty": 1.1, "ignore_eos": False, "min_tokens": 1, "stop_token_ids": [3], "prompt_logprobs": 1,
        "skip_special_tokens": True, "parse_special": False, "stream": False, "seed": 1, "stop": "zz"}),
    ("/v1/completions", TEXT | {"prompt": [5, 6, 7], "stream": True, "deepseek": {
        "regex": "[a-z]{1,3}", "experts": {"mask": [], "bias": {}, "top_k": 2, "approx": True}}}),
    ("/v1/completions", TEXT | {"prompt": [[5, 6], [7]], "deepseek": {"grammar": 'start: "a" | "b" start\n'}}),
    ("/v1/embeddings", {"model": "tiny", "input": ["fox", "dog"], "encoding_format": "float", "user": "me"}),
    ("/v1/embeddings", {"model": "tiny", "input": [[5, 6], [7]], "encoding_format": "base64", "dimensions": 32}),
    ("/v1/responses", {
        "model": "tiny", "instructions": "the lazy dog", "max_output_tokens": 4, "temperature": 0.5, "top_p": 0.9,
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "fox"}]},
                  {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}]},
                  {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "rain"}],
        "tools": [{"type": "function", **TOOL["function"]}], "tool_choice": "auto", "store": True, "stream": False,
        "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"}, "include": []}),
    ("/v1/responses", {"model": "tiny", "input": "fox", "max_output_tokens": 4, "stream": True, "text": {"format": {
        "type": "json_schema", "name": "x", "schema": {"type": "object", "properties": {"a": {"type": "null"}}}}}}),
    ("/tokenize", {"model": "tiny", "prompt": "fox", "add_special_tokens": True, "parse_special": True,
                   "return_token_strs": True}),
    ("/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "tools": [TOOL],
                   "add_generation_prompt": True, "chat_template_kwargs": {"thinking": True}}),
    ("/detokenize", {"model": "tiny", "tokens": [5, 6, 7]}),
]
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 17, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), "", " ", "x", "\x00", "\ud800", "\udfff\ud800", "💥" * 30, "é\u0301\u202e\ufeff", "1",
    "-1", "null", "<｜User｜>", "<think>", "{{ 7 * 7 }}", "{% for x in y %}", "a" * 3000, [], {}, [None], [[]], [{}],
    [True], [0], [-1], [2**70], [""], ["x"] * 50, {"": None}, {"a": 1}, {"type": "text"}, {"type": "function"},
    {"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"anyOf": []}, {"enum": []}]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value, without the value itself and what is deeper than 20 levels."""
    if len(at) > 20:
        return []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in ((*at, key), *places(child, (*at, key)))]


def mutate(body: Any, chance: random.Random) -> None:
    """Change something in a body, in place."""
    found = places(body)
    if not found:
        return
    *path, key = chance.choice(found)
    holder = body
    for part in path:
        holder = holder[part]
    old, kind = holder[key], chance.randrange(9)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["", "x", key.upper(), key + " ", "\ud800", "type", "__class__"])] = holder.pop(key)
    elif kind == 2:
        holder[key] = [old] * chance.choice([1, 2, 40])
    elif kind == 3:
        for _ in range(chance.choice([1, 5, 60, 200])):
            old = chance.choice([[old], {"a": old}])
        holder[key] = old
    elif kind == 4 and isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 2**70:
        holder[key] = chance.choice([-old, old + 0.5, old * 10**6, old * 10**30, str(old), old - 1, old + 1])
    elif kind == 5 and isinstance(old, str):
        at = chance.randrange(len(old) + 1)
        holder[key] = old[:at] + str(chance.choice(["\ud83d", "\x00", "💥", "\\", '"', "(", "*", "\n"])) + old[at:]
    elif kind == 6:  # something of elsewhere
        holder[key] = copy.deepcopy(chance.choice(list(chance.choice(VALID)[1].values())))
    else:
        holder[key] = copy.deepcopy(chance.choice(STRANGE))


def mutated(seed: int) -> tuple[str, bytes]:
    """A path and a body of a seed."""
    chance = random.Random(seed)
    path, body = copy.deepcopy(chance.choice(VALID))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        mutate(body, chance)
    content = json.dumps(body, ensure_ascii=chance.random() < 0.9 or "\\ud" in json.dumps(body)).encode()
    if chance.random() < 0.1:
        at = chance.randrange(len(content))
        content = chance.choice([content[:at], content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :],
                                 content[:at] + content[at // 2 :], b"\xef\xbb\xbf" + content])
    return path, content


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def fault(answer: httpx.Response) -> str | None:
    """What an answer should not be."""
    if answer.status_code >= 500 or '"server_error"' in answer.text:
        return f"{answer.status_code} {answer.text:.300}"
    if answer.headers["content-type"].startswith("text/event-stream"):
        parts = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    else:
        parts = [answer.text]
    bodies = [json.loads(part, parse_constant=refuse_constant) for part in parts]
    if answer.status_code >= 400 and not bodies[0]["error"]["message"]:
        return "an error without a message"
    return None


@pytest.mark.slow
def test_mutated_requests_are_answered(tmp_path: Path, tiny_config: Callable, random_model: Callable) -> None:
    with serving(tmp_path / "tiny", tiny_config, random_model, 512) as server:
        def one(seed: int) -> tuple[int, str | None]:
            path, content = mutated(seed)
            try:
                answer = server.post(path, content)
                wrong = fault(answer)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                return 0, f"seed {seed} {path} {content!r:.600}: {error!r}"
            return answer.status_code, wrong and f"seed {seed} {path} {content!r:.600}: {wrong}"

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(one, range(5000)))
        print("\nmutated requests:", dict(Counter(status for status, _ in answers)))
        wrong = [text for _, text in answers if text]
        assert not wrong, f"{len(wrong)} wrong answers:\n" + "\n".join(wrong[:20])
        assert {status for status, _ in answers} >= {200, 400}
        assert httpx.get(f"{server.url}/health").status_code == 200 and server.process.poll() is None
        assert "Traceback" not in server.log.read_text(), server.log.read_text()[-3000:]
