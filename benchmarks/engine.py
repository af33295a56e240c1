"""The engine: what batching by expert, residency, the prefix cache and continuous batching bring.

Model: that of inference.py (layer shapes of `v3-16b-a3b`, 5 layers, 2.5 B parameters, NF4 here, Q4_0 for llama.cpp).
For domains it has a SYNTHETIC GATE: a direction for each of four domains is added to the embedding and head rows of a
quarter of the vocabulary and to the gate rows of a quarter of the experts, so that a domain's tokens prefer its
quarter; the share of slots that fall there is measured and printed (a quarter is chance). Weights stay random.

    batching     a queue of prompts of four domains in random order, 8 requests at a time: by expert against
                 first come, first served; tokens/s, distinct experts a layer and step against the expectation for
                 uniform routing, p50 and p99 of the time to finish
    residency    half and a quarter of the experts in memory, the others on disk, one request at a time: warm-up and
                 prefetch on and off; llama.cpp with its mapped file under a memory limit of the same size, where a
                 control group can be made
    throughput   1, 8, 32 and 128 requests of 16 + 32 tokens at once, beside llama-batched-bench
    first        time to the first token of a fresh process's first request, cold (files not in the page cache) and warm
    prefix       requests with a shared system prompt of 1,024 tokens, prefix cache on and off

    python benchmarks/engine.py [--only batching,…] [--rounds 3] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint import expert_spans, load_model
from deepseek.convert import quantize
from deepseek.engine import Engine, EngineOptions, SamplingParams
from deepseek.engine.request import Request
from deepseek.engine.residency import Residency
from deepseek.model import CausalLM
from deepseek.ops.panels import unpack
from deepseek.quant.fused import FusedGate
from deepseek.quant.panels import quantise_panels
from harness import arguments, machine, quiet_rounds, table, versions, write_result
from peers import LlamaCpp, PeerError
from shape import CACHE, CONFIG, write_model

DOMAINS, STRENGTH = 4, 0.5
NAMES = ("law", "code", "medical", "finance")
PARTS = ("batching", "residency", "throughput", "first", "prefix")


def plant(model: CausalLM, strength: float = STRENGTH) -> None:
    """Give a random model domains: token t belongs to domain t % 4, expert e to domain e * 4 // E."""
    generator = torch.Generator().manual_seed(7)
    hidden, experts = CONFIG.hidden_size, CONFIG.n_routed_experts
    direction_DH = torch.linalg.qr(torch.randn(hidden, DOMAINS, generator=generator))[0].t() * hidden**0.5
    embedding, head = model.model.embed_tokens, model.lm_head
    of_token = torch.arange(CONFIG.vocab_size) % DOMAINS
    rows = embedding.codes.float() * embedding.step.unsqueeze(1) + strength * direction_DH[of_token]
    embedding.step = rows.abs().amax(1) / 127
    embedding.codes = (rows / embedding.step.unsqueeze(1)).round().to(torch.int8)
    w_VH = unpack(head.packed, CONFIG.vocab_size, hidden, head.bits).dequantise()
    head.packed = quantise_panels(w_VH + 0.02 * strength * direction_DH[of_token], head.bits)[0].flatten()
    for block in model.moe_blocks().values():
        gate = block.gate
        own = torch.arange(experts) * DOMAINS // experts
        gate.weight.data = (gate.weight.float() + 0.02 * direction_DH[own]).to(gate.weight.dtype)
        assert isinstance(gate, FusedGate)
        gate.fuse()


def in_quarter(engine: Engine, requests: Sequence[Request]) -> float:
    """Share of the slots that fall on the experts of the request's own domain."""
    own = torch.arange(CONFIG.n_routed_experts) * DOMAINS // CONFIG.n_routed_experts
    hits = [own[torch.cat(r.routed)] == NAMES.index(r.domain) for r in requests if r.domain in NAMES]
    return float(torch.cat([h.flatten() for h in hits]).float().mean())


def prompt(draw: random.Random, domain: int, tokens: int) -> list[int]:
    return [draw.randrange(CONFIG.vocab_size // DOMAINS) * DOMAINS + domain for _ in range(tokens)]


def request(ids: list[int], tokens: int, domain: str | None = None, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **params)
    return Request(ids, sampling, limit=tokens, domain=domain)


def run(engine: Engine, requests: Sequence[Request], step: Callable[[], None] | None = None) -> float:
    """Seconds until all are done."""
    began = time.perf_counter()
    for one in requests:
        engine.add(one)
    while not engine.idle:
        engine.step()
        if step is not None:
            step()
    return time.perf_counter() - began


# ---- batching by expert ------------------------------------------------------------------------------------------


def batching(args: Any, model: CausalLM) -> tuple[list[str], dict[str, Any]]:
    batch, count, tokens = 8, 96, 24
    plant(model)

    def queue(seed: int, routed: bool = False) -> list[Request]:
        draw = random.Random(seed)
        kinds = [draw.randrange(DOMAINS) for _ in range(count)]
        return [request(prompt(draw, kind, 16), tokens, NAMES[kind], routed=routed) for kind in kinds]

    probe = Engine(model, EngineOptions(batch_size=batch, prefix_cache=False))
    sample = queue(99, routed=True)[:16]
    run(probe, sample)
    share = in_quarter(probe, sample)
    print(f"  synthetic gate: {share:.1%} of the slots fall on the domain's own quarter of the experts", flush=True)

    def measure(policy: str, seed: int) -> dict[str, Any]:
        engine = Engine(model, EngineOptions(batch_size=batch, prefix_cache=False, policy=policy))  # type: ignore
        requests = queue(seed)
        seconds = run(engine, requests)
        waits = sorted((r.finished or 0) - r.arrived for r in requests)
        return {"speed": count * tokens / seconds, "p50": statistics.median(waits), "p99": waits[int(0.99 * count)],
                "texts": [r.token_ids for r in requests]}

    def distinct(policy: str) -> float:
        engine = Engine(model, EngineOptions(batch_size=batch, prefix_cache=False, policy=policy))  # type: ignore
        seen: list[float] = []
        original = engine._count

        def count_them(works: Any, routing: Any) -> None:
            if all(work.chunk.order == "absorbed" for work in works) and len(works) == batch:
                seen.extend(len(route.index_TK.unique()) for route in routing.routes.values())
            original(works, routing)

        engine._count = count_them  # type: ignore[method-assign]
        requests = queue(0, routed=True)
        run(engine, requests)
        return statistics.mean(seen)

    seeds = iter(range(1, 1000))

    def one() -> dict[str, dict[str, Any]]:
        seed = next(seeds)
        out = {policy: measure(policy, seed) for policy in ("fcfs", "expert")}
        assert out["fcfs"].pop("texts") == out["expert"].pop("texts"), "outputs differ"
        print("  " + ", ".join(f"{k} {v['speed']:.1f} tokens/s" for k, v in out.items()), flush=True)
        return out

    kept, _ = quiet_rounds(args.rounds, one)
    top, experts = CONFIG.num_experts_per_tok, CONFIG.n_routed_experts
    expected = experts * (1 - (1 - top / experts) ** batch)
    gain = statistics.median(r["expert"]["speed"] / r["fcfs"]["speed"] for r in kept)
    rows = [["order", "tokens/s", "distinct experts a layer and step", "of those expected", "p50 (s)", "p99 (s)"]]
    data: dict[str, Any] = {"share": share, "gain": gain, "expected": expected}
    for policy, name in (("fcfs", "first come, first served"), ("expert", "by expert")):
        used = distinct(policy)
        middle = {key: statistics.median(r[policy][key] for r in kept) for key in ("speed", "p50", "p99")}
        data[policy] = middle | {"distinct": used}
        rows.append([name, f"{middle['speed']:.1f}", f"{used:.1f}", f"{used / expected:.0%}", f"{middle['p50']:.1f}",
                     f"{middle['p99']:.1f}"])
    return [f"Synthetic gate: {share:.0%} of the slots fall on the quarter of the experts that a token's domain "
            f"prefers. {count} prompts of {DOMAINS} domains in random order, 16 + {tokens} tokens, {batch} at a time; "
            f"same texts in both orders. By expert: {gain:.2f} times the tokens/s (median of rounds).", "",
            table(rows)], data


# ---- residency -----------------------------------------------------------------------------------------------------


def residency(args: Any, folder: Path) -> tuple[list[str], dict[str, Any]]:
    spans = expert_spans(folder)
    whole = sum(span.size for own in spans.values() for span in own)
    tokens = 48
    rows = [["experts in memory", "warm-up", "prefetch", "tokens/s", "there", "read ahead, used", "waited (s)",
             "MiB read", "of it seen by the system"]]
    data: dict[str, Any] = {"experts_bytes": whole}
    for share in (0.5, 0.25):
        for warm, ahead in ((False, False), (True, False), (True, True)):
            model = load_model(folder)
            plant(model)
            slot = max(span.size for own in spans.values() for span in own) + 8192
            count = sum(map(len, spans.values()))
            own = Residency(model, spans, int(share * count) * slot, prefetch=ahead)
            if warm:  # the experts that the domain prefers, as many as fit
                quarter = CONFIG.n_routed_experts // DOMAINS
                own.warm([[*range(quarter), *range(quarter, CONFIG.n_routed_experts)] for _ in spans])
            engine = Engine(model, EngineOptions(batch_size=1, prefix_cache=False), residency=own)
            draw = random.Random(3)
            own.stats.read, before = 0, read_bytes()
            seconds = run(engine, [request(prompt(draw, 0, 16), tokens, NAMES[0]) for _ in range(2)])
            seen, stats = read_bytes() - before, own.stats
            rows.append([f"{share:.0%}", "on" if warm else "off", "on" if ahead else "off",
                         f"{2 * tokens / seconds:.1f}", f"{stats.hits / max(stats.wanted, 1):.0%}",
                         f"{stats.used / stats.foretold:.0%}" if stats.foretold else "",
                         f"{stats.stall:.1f}", f"{stats.read / 2**20:,.0f}", f"{seen / max(stats.read, 1):.0%}"])
            print("  " + " | ".join(rows[-1]), flush=True)
            data[f"{share}-{warm}-{ahead}"] = stats.to_dict() | {"speed": 2 * tokens / seconds, "system_read": seen}
            own.close()
    lines = [f"One request at a time, 16 + {tokens} tokens of one domain (synthetic gate); {whole / 2**20:,.0f} MiB of "
             "experts. `there`: experts in memory when a layer of a step asked. The last column: what /proc/self/io "
             "says was read from disk, over what the engine says.", "", table(rows)]
    for share in (0.5, 0.25):
        try:
            files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            limit = files - int((1 - share) * whole) + (256 << 20)
            speed = limited_llama(args, limit)
            lines += ["", f"llama.cpp Q4_0, mapped, in a control group of {limit / 2**20:,.0f} MiB (all "
                      f"weights but {1 - share:.0%} of the experts, and 256 MiB): {speed:.1f} tokens/s."]
            data[f"llama-{share}"] = speed
        except (OSError, PeerError) as error:
            lines += ["", f"llama.cpp under a memory limit: not measured ({error})."]
            break
    return lines, data


def read_bytes() -> int:
    """Bytes that this process had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def limited_llama(args: Any, limit: int) -> float:
    """tokens/s of llama.cpp in a memory control group. Raises OSError where none can be made."""
    peer = LlamaCpp.install(args.cache, write_model(args.cache / "model"), args.threads)
    group = Path("/sys/fs/cgroup/memory/moe-dr-benchmark")
    group.mkdir(exist_ok=True)
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        fd = os.open(peer.model, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # pages that others brought in would not count
        os.close(fd)
        command = [str(peer.binaries / "llama-bench"), "-m", str(peer.model), "-t", str(args.threads), "-p", "0", "-n",
                   "48", "-r", "1", "-o", "json", "-mmp", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True,
                              preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        return float(json.loads(done.stdout[done.stdout.index("["):])[0]["avg_ts"])
    except subprocess.SubprocessError as error:
        raise PeerError(str(error)) from None
    finally:
        group.rmdir()


# ---- throughput ----------------------------------------------------------------------------------------------------


def throughput(args: Any, model: CausalLM) -> tuple[list[str], dict[str, Any]]:
    peer = LlamaCpp.install(args.cache, write_model(args.cache / "model"), args.threads)
    rows = [["requests", "MoE-DR tokens/s", "llama.cpp tokens/s", "ratio"]]
    data: dict[str, Any] = {}
    for batch in (1, 8, 32, 128):
        engine = Engine(model, EngineOptions(batch_size=batch, prefix_cache=False, cache_tokens=128 * batch + 128))
        variants = {v: max(v.decode(batch, 16 if batch > 8 else 32) for _ in range(1)) for v in peer.variants()}
        best = max(variants, key=variants.__getitem__)
        steps = 32

        def ours(batch: int = batch, engine: Engine = engine, steps: int = steps) -> float:
            draw = random.Random(batch)
            requests = [request([draw.randrange(CONFIG.vocab_size) for _ in range(16)], steps) for _ in range(batch)]
            for one in requests:
                engine.add(one)
            while any(not one.token_ids for one in requests):
                engine.step()
            done, began = sum(len(one.token_ids) for one in requests), time.perf_counter()
            while not engine.idle:
                engine.step()
            return (batch * steps - done) / (time.perf_counter() - began)

        def one(batch: int = batch, best: LlamaCpp = best, ours: Any = ours, steps: int = steps) -> tuple[float, float]:
            result = ours(), best.decode(batch, steps, 16)
            print(f"  {batch} requests: {result[0]:.1f} and {result[1]:.1f} tokens/s", flush=True)
            return result

        kept, _ = quiet_rounds(args.rounds, one)
        mine, theirs = (statistics.median(r[i] for r in kept) for i in (0, 1))
        gain = statistics.median(a / b for a, b in kept)
        rows.append([str(batch), f"{mine:.1f}", f"{theirs:.1f}", f"{gain:.2f}"])
        data[str(batch)] = {"ours": mine, "llama": theirs, "ratio": gain, "variant": best.name}
    return ["Decoding, after 16 tokens of prompt, 32 tokens each; llama.cpp: llama-batched-bench, its fastest setting.",
            "", table(rows)], data


# ---- first token and shared prefix -----------------------------------------------------------------------------------

_FIRST = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
began = time.perf_counter()
from deepseek import LLM, SamplingParams
llm = LLM(sys.argv[1])
loaded = time.perf_counter()
params = SamplingParams(max_tokens=1, temperature=0)
for _ in range(2):
    start = time.perf_counter()
    llm.generate([list(range(100, 164))], params)
    print(time.perf_counter() - start)
    llm.engine.pages.__init__(llm.engine.pages.pool)
print(loaded - began)
"""


def first(args: Any, folder: Path) -> tuple[list[str], dict[str, Any]]:
    def measure(cold: bool) -> list[float]:
        for file in folder.glob("*.safetensors"):
            fd = os.open(file, os.O_RDONLY)
            if cold:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(fd, 1 << 24):
                    pass
            os.close(fd)
        out = subprocess.run([sys.executable, "-c", _FIRST, str(folder), str(args.threads)], capture_output=True,
                             text=True, check=True).stdout.split()
        return [float(value) for value in out]

    rows = [["files", "import and load (s)", "first token (s)", "of the next request (s)"]]
    data: dict[str, Any] = {}
    for cold in (True, False):
        runs = [measure(cold) for _ in range(args.rounds)]
        one, two, load = (statistics.median(r[i] for r in runs) for i in range(3))
        rows.append(["on disk" if cold else "in the page cache", f"{load:.1f}", f"{one:.2f}", f"{two:.2f}"])
        data["cold" if cold else "warm"] = {"load": load, "first": one, "second": two}
    return ["A prompt of 64 tokens in a fresh process, first request.", "", table(rows)], data


def prefix(args: Any, model: CausalLM) -> tuple[list[str], dict[str, Any]]:
    draw = random.Random(5)
    system = [draw.randrange(CONFIG.vocab_size) for _ in range(1024)]

    def measure(cached: bool, seed: int) -> tuple[float, float]:
        engine = Engine(model, EngineOptions(batch_size=8, prefix_cache=cached, cache_tokens=16384))
        tails = random.Random(seed)
        requests = [request(system + [tails.randrange(CONFIG.vocab_size) for _ in range(16)], 8) for _ in range(8)]
        run(engine, requests[:1])
        for one in requests[1:]:
            one.arrived = time.monotonic()
        seconds = run(engine, requests[1:])
        return seconds, statistics.median((r.first_token or 0) - r.arrived for r in requests[1:])

    kept, _ = quiet_rounds(args.rounds, lambda: {on: measure(on, 1) for on in (True, False)})
    seconds = {on: statistics.median(r[on][0] for r in kept) for on in (True, False)}
    waits = {on: statistics.median(r[on][1] for r in kept) for on in (True, False)}
    gain = statistics.median(r[False][0] / r[True][0] for r in kept)
    rows = [["prefix cache", "7 requests (s)", "first token, median (s)"],
            *(["on" if on else "off", f"{seconds[on]:.2f}", f"{waits[on]:.2f}"] for on in (True, False))]
    return [f"Seven requests after a first one, 1,024 shared + 16 own tokens, 8 new ones: {gain:.1f} times as fast.",
            "", table(rows)], {"seconds": {str(k): v for k, v in seconds.items()}, "gain": gain}


def parts(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return text.split(",")


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--only", type=parts, default=list(PARTS), metavar="PART,…", help=", ".join(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.cache / "model-nf4"
    if not folder.is_dir():
        quantize(write_model(args.cache / "model"), folder)
    where, packages = machine(args.threads), versions("torch")
    text = ["# The engine", "",
            f"{where['cpu']}, {args.threads} threads, torch {packages['torch']}; {args.rounds} rounds, medians."]
    data: dict[str, Any] = {"machine": where}
    for name in args.only:
        print(name, flush=True)
        lines, found = globals()[name](args, folder if name in ("residency", "first") else load_model(folder))
        text += ["", f"## {name.capitalize()}", "", *lines]
        data[name] = found
    write_result("engine" if args.only == list(PARTS) else "engine-" + "-".join(args.only), "\n".join(text), data)


if __name__ == "__main__":
    main()
