"""The server: how long a client waits, beside llama.cpp's own server on the same weights, in the same run.

`deepseek serve` and `llama-server` stand next to each other on loopback, each a process of its own, and work in turn.
Clients stream /v1/completions: prompts of 64 random token ids, no two alike, so that no cache of prefixes helps; 32 new
tokens, greedy, the end-of-text token ignored. A client sends its next request when it has the answer to its last, and
all start at once: with 32 of them, a first token waits for the prompts of the others.

    latency   at 1, 8 and 32 clients: p50 and p99, over all requests of all rounds, of the time to the first token and
              of the time per token after it (of a hundred answers or fewer, p99 is the worst); tokens/s of all clients
              together
    watch     what monitoring costs at 1, 8 and 32 requests: the time inside its code over the time of the engine's
              steps, and tokens/s with it and without, in turn; on planted (planted.py: the same layer shapes, and named
              groups to count), in this process

What is timed. From before the connection is made until the first event that carries text; from there until the event
that says why the answer ended, over 31. Both servers send an event when the text grows: a token that is a part of a
character waits for the others (1 in 224 ids of this tokenizer, read alone; a sign that a server has taken the request
up carries no text and does not count). The number of events with text over the number of tokens is in the result.

Each at its best. Ours as it comes, with --max_num_seqs 32. llama-server with 32 slots and a context that gives each its
room; whether with flash attention and with how patient threads is tried before each number of clients: the fastest
counts. It reads up to 2,048 tokens of prompts before anybody gets a token, ours 512 a step; where the clients' prompts
are more than that, it runs a second time with `-b 512`: first tokens come sooner, the others later, and both rows stand
in the table. One pool of positions for all slots (-kvu) was not found faster. It does not ask the system to send small
packets at once, so the client confirms them at once (TCP_QUICKACK). The client is a few lines on asyncio's streams in
the process of this script; the share of a core that it takes from the servers is in the result.

    python benchmarks/serving.py [--only latency,watch] [--clients 1,8,32] [--rounds 3] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek import LLM
from deepseek.serve.monitoring import Watch
from deepseek.watch.metrics import key
from deepseek.watch.options import WatchOptions
from engine import request, run, shape_model
from harness import arguments, machine, quiet_rounds, ratio, table, versions, write_result
from peers import RELEASE, LlamaCpp
from planted import DOMAINS, NAMES, planted_model, prompt
from shape import CACHE, CONFIG, write_model

PARTS = ("latency", "watch")
PROMPT, NEW, SLOTS = 64, 32, 32
STEP = 512  # tokens of prompts that ours reads at a time
OURS, PEER = "MoE-DR", "llama-server"
START = 300.0  # seconds that a server may take to load


@dataclass(frozen=True)
class Server:
    """One that answers on loopback. wishes: what a request says to it alone."""

    name: str
    port: int
    wishes: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    first: float  # seconds to the first token
    token: float  # seconds per token after it
    events: int  # that carried text


@dataclass(frozen=True)
class Load:
    """What came of some clients' requests. client: the client's processor time over the time that passed."""

    answers: list[Answer]
    seconds: float
    client: float

    @property
    def speed(self) -> float:
        return len(self.answers) * NEW / self.seconds


# ---- servers -------------------------------------------------------------------------------------------------------


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], port: int) -> Iterator[None]:
    """A server that is up. Exits with the end of what it said where it does not come up."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            until = time.monotonic() + START
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"{command[0]}: did not come up:\n{log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(60)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # not listening yet, or loading (503)
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def ours(args: Any) -> Iterator[Server]:
    """`deepseek serve`, at its own defaults for what OpenMP does."""
    port, environment = free_port(), {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-m", "deepseek.cli", "serve", str(shape_model(args.cache)), "--name", "model", "--port",
               str(port), "--threads", str(args.threads), "--max_num_seqs", str(SLOTS),
               "--max_num_batched_tokens", str(STEP)]
    with running(command, environment, port):
        yield Server(OURS, port, {"deepseek": {"ignore_eos": True}})


@contextmanager
def theirs(variant: LlamaCpp, step: int | None = None) -> Iterator[Server]:
    """llama-server; step: tokens of prompts at a time, where that is not left to its default."""
    port = free_port()
    with running(*variant.server(port, SLOTS, PROMPT + NEW, step or 2048), port):
        yield Server(PEER if step is None else f"{PEER} -b {step}", port,
                     {"ignore_eos": True, "cache_prompt": False, "samplers": ["top_k"], "top_k": 1})


# ---- clients -------------------------------------------------------------------------------------------------------


async def answer(port: int, body: bytes) -> Answer:
    """One request over a connection of its own, its stream read to the end."""
    began, first, last, events, tokens = time.perf_counter(), 0.0, 0.0, 0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = writer.get_extra_info("socket")
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    said = b""
    async for line in reader:  # an event is a line, and never parted between two pieces of the body
        now = time.perf_counter()
        if hasattr(socket, "TCP_QUICKACK"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        said = line
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        for choice in event.get("choices", ()):
            if choice["text"]:
                first, events = first or now, events + 1
            if choice["finish_reason"] is not None:
                last = now
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    writer.close()
    if not last or tokens != NEW:
        raise SystemExit(f"port {port}: {tokens} of {NEW} tokens; its last line: {said[:500]!r}")
    first = first or last
    return Answer(first - began, (last - first) / (NEW - 1), events)


def load(server: Server, clients: int, each: int, seed: int) -> Load:
    """`clients` at once, each with `each` requests one after the other."""
    draw = random.Random(seed)

    def body() -> bytes:
        ids = [draw.randrange(CONFIG.vocab_size) for _ in range(PROMPT)]
        return json.dumps({"model": "model", "prompt": ids, "max_tokens": NEW, "temperature": 0, "stream": True,
                           "stream_options": {"include_usage": True}, **server.wishes}).encode()

    bodies = [[body() for _ in range(each)] for _ in range(clients)]

    async def client(own: list[bytes]) -> list[Answer]:
        return [await answer(server.port, body) for body in own]

    async def everyone() -> list[list[Answer]]:
        return await asyncio.gather(*map(client, bodies))

    busy, began = time.process_time(), time.perf_counter()
    answers = [one for own in asyncio.run(everyone()) for one in own]
    seconds = time.perf_counter() - began
    return Load(answers, seconds, (time.process_time() - busy) / seconds)


# ---- latency -------------------------------------------------------------------------------------------------------


def latency(args: Any) -> tuple[list[str], dict[str, Any]]:
    peer = LlamaCpp.install(args.cache, write_model(args.cache / "model"), args.threads)
    rows = [["clients", "server", "requests", "first token, p50 (ms)", "p99 (ms)", "per token, p50 (ms)", "p99 (ms)",
             "tokens/s"]]
    data: dict[str, Any] = {}
    gains, chosen, most, seeds = [], [], 0.0, itertools.count()
    with ExitStack() as stack:
        mine = stack.enter_context(ours(args))
        peers = {variant: stack.enter_context(theirs(variant)) for variant in peer.variants()}
        for clients in args.clients:
            best = fastest(mine, peers, clients, seeds)
            with ExitStack() as second:
                servers = [mine, peers[best]]
                if clients * PROMPT > STEP:
                    servers.append(second.enter_context(theirs(best, STEP)))
                kept, shares = in_turn(args, servers, clients, seeds)
            found = {name: summary([one[name] for one in kept]) for name in kept[0]}
            for name, numbers in found.items():
                rows.append([str(clients), name, str(numbers["requests"]),
                             *(f"{1000 * value:.1f}" for key in ("first", "token") for value in numbers[key]),
                             f"{numbers['speed']:.1f}"])
            speeds = {name: [one[name].speed for one in kept] for name in found}
            gain = min(ratio(speeds[OURS], their) for name, their in speeds.items() if name != OURS)
            most = max(most, *(numbers["client"] for numbers in found.values()))
            gains.append(f"**{gain:.2f}** ({clients})")
            chosen.append(f"{best.name.removeprefix('llama.cpp Q4_0, ')} ({clients})")
            data[str(clients)] = found | {"ratio": gain, "variant": best.name, "stolen": shares}
    return [f"Prompts of {PROMPT} random ids, {NEW} new tokens, greedy; NF4 here, Q4_0 there. MoE-DR's tokens/s over "
            f"llama-server's (the faster of its rows), by clients: {', '.join(gains)}.", "", table(rows), "",
            f"llama-server (of llama-cpp-python {RELEASE}) with its fastest setting: {', '.join(chosen)}. The clients "
            f"are one process on the same machine, which took {most:.1%} of one core's time at most, from any server."
            ], {"latency": data}


def fastest(mine: Server, peers: Mapping[LlamaCpp, Server], clients: int, seeds: Iterator[int]) -> LlamaCpp:
    """The peer's fastest setting for so many clients, by the better of two tries each, so that a disturbed one does not
    decide. Trying them also warms up; ours does the same work once."""
    speeds: dict[LlamaCpp, float] = dict.fromkeys(peers, 0.0)
    for seed in itertools.islice(seeds, 2):
        for variant, server in peers.items():
            speeds[variant] = max(speeds[variant], load(server, clients, max(1, 8 // clients), seed).speed)
    load(mine, clients, max(1, 8 // clients), next(seeds))
    for variant, speed in speeds.items():
        print(f"  {clients} clients: {speed:6.1f} tokens/s, {variant.name}", flush=True)
    return max(speeds, key=lambda variant: speeds[variant])


def in_turn(args: Any, servers: Sequence[Server], clients: int, seeds: Iterator[int],
            ) -> tuple[list[dict[str, Load]], list[float]]:
    """(rounds, each by name of the server; share of time stolen in each). Every other round turns the order round."""

    def one() -> dict[str, Load]:
        seed = next(seeds)
        done = {server.name: load(server, clients, max(3, 24 // clients), seed)
                for server in servers[:: 1 if seed % 2 else -1]}
        print(f"  {clients} clients: " + ", ".join(f"{name} {done[name].speed:.1f}" for name in sorted(done))
              + " tokens/s", flush=True)
        return {server.name: done[server.name] for server in servers}

    return quiet_rounds(args.rounds, one)


def summary(loads: Sequence[Load]) -> dict[str, Any]:
    """first, token: (p50, p99) in seconds over all answers. speed, client: medians of rounds."""
    answers = [one for done in loads for one in done.answers]

    def middle_and_tail(values: list[float]) -> tuple[float, float]:
        values = sorted(values)
        return statistics.median(values), values[int(0.99 * len(values))]

    return {"requests": len(answers), "first": middle_and_tail([one.first for one in answers]),
            "token": middle_and_tail([one.token for one in answers]),
            "speed": statistics.median(done.speed for done in loads),
            "client": statistics.median(done.client for done in loads),
            "events_per_token": sum(one.events for one in answers) / (len(answers) * NEW)}


# ---- monitoring ----------------------------------------------------------------------------------------------------


def watch(args: Any) -> tuple[list[str], dict[str, Any]]:
    llm = LLM(planted_model(args.cache), max_num_seqs=SLOTS, prefix_cache=False, speculate=False)
    draw = random.Random(0)
    rows = [["requests", "step (ms)", "counting (us a step)", "of the steps' time", "tokens/s with", "without",
             "ratio"]]
    data: dict[str, Any] = {}
    watched = Watch(llm, "planted", WatchOptions())
    counters = watched.counters

    def spent() -> tuple[float, ...]:
        snapshot = watched.monitor.snapshot()
        return tuple(snapshot[key(f"{name}_total")] for name in ("watch_seconds", "step_seconds", "steps"))

    for count in args.clients:
        def speed(count: int = count) -> float:
            kinds = [draw.randrange(DOMAINS) for _ in range(count)]
            requests = [request(prompt(draw, kind, PROMPT), NEW, NAMES[kind]) for kind in kinds]
            return count * NEW / run(llm.engine, requests)

        def one(speed: Callable[[], float] = speed) -> dict[str, Any]:
            llm.engine.listeners.append(counters)
            before = spent()
            out = {"with": speed(), "spent": [b - a for a, b in zip(before, spent(), strict=True)]}
            llm.engine.listeners.clear()
            return out | {"without": speed()}

        one()
        kept, shares = quiet_rounds(args.rounds, one)
        own, steps, number = (sum(part) for part in zip(*(got["spent"] for got in kept), strict=True))
        speeds = {name: [got[name] for got in kept] for name in ("with", "without")}
        gain = ratio(speeds["without"], speeds["with"])
        rows.append([str(count), f"{1000 * steps / number:.1f}", f"{1e6 * own / number:.0f}", f"{own / steps:.2%}",
                     *(f"{statistics.median(values):.1f}" for values in speeds.values()), f"{gain:.3f}"])
        data[str(count)] = {"share": own / steps, "steps": number, "speeds": speeds, "ratio": gain, "stolen": shares}
    watched.close()
    llm.close()
    return [f"Prompts of {PROMPT} ids, {NEW} new tokens each, a reading every {WatchOptions().interval:g} s as the "
            "server takes them. Counting: what the engine's thread spends on keeping routes, and reading threads on "
            "counting them and on the reading.", "", table(rows)], {"watch": data}


def parts(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return text.split(",")


def counts(text: str) -> list[int]:
    if wrong := [part for part in text.split(",") if not part.isdecimal() or not 1 <= int(part) <= SLOTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: must be from 1 to {SLOTS}")
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--clients", type=counts, default=[1, 8, 32], metavar="N,…", help="how many at once")
    parser.add_argument("--only", type=parts, default=list(PARTS), metavar="PART,…", help=", ".join(PARTS))
    args = parser.parse_args()
    where, packages = machine(args.threads), versions("torch", "uvicorn")
    for name in args.only:  # a result each, so that one can be measured again
        print(name, flush=True)
        lines, found = globals()[name](args)
        write_result(f"serving-{name}", "\n".join([
            f"# The server: {name}", "", f"{where['cpu']}, {args.threads} threads, torch {packages['torch']}, uvicorn "
            f"{packages['uvicorn']}; {args.rounds} rounds.", "", *lines]), {"machine": where, **found})


if __name__ == "__main__":
    main()
