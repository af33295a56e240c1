"""The engine: what batching by expert, continuous batching, the prefix cache and drafts bring.

Models: `planted`, layer shapes of `v3-16b-a3b` with 5 layers, NF4, and a SYNTHETIC GATE (planted.py); `shape`, the
same without the gate's lean, beside llama.cpp's Q4_0 of the same weights (shape.py); `named`, the preset `small`
trained by named.py, NF4, on real prompts of its unseen sources.

    batching     a queue of prompts of several domains in random order, 8 requests at a time: by expert against first
                 come, first served; tokens/s, distinct experts a layer and step against the expectation for uniform
                 routing, p50 and p99 of the time to finish; planted and named
    throughput   1, 8, 32 and 128 requests of 16 + 32 tokens at once, beside llama-batched-bench; shape
    first        time to the first token of a fresh process's first request, cold (files not in the page cache) and warm
    prefix       requests with a shared system prompt of 1,024 tokens, prefix cache on and off; shape
    drafts       the MTP module: its own drafts on the demo's model (examples/demo.py), and SIMULATED drafts, right with
                 a given chance, on planted: tokens/s against none, and what the measured switch takes
    memory       10,000 short requests in one process: memory after the first 1,000 and at the end; named

    python benchmarks/engine.py [--only batching,…] [--rounds 3] [--cache FOLDER] [--named MODEL] [--demo MODEL]
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from deepseek import LLM
from deepseek.checkpoint import load_model
from deepseek.convert import quantize
from deepseek.data import ReadReport, read_documents
from deepseek.engine import Engine, EngineOptions, SamplingParams
from deepseek.engine.request import Request
from deepseek.engine.speculative import Drafter, Trial
from deepseek.model import CausalLM
from deepseek.model.cache import Chunk
from deepseek.tokenizer import Tokenizer
from domains import UNSEEN, add_data, data_folder, places
from harness import arguments, machine, quiet_rounds, table, versions, write_result
from peers import LlamaCpp
from planted import DOMAINS, NAMES, OF_EXPERT, planted_model, prompt
from shape import CACHE, CONFIG, write_model

PARTS = ("batching", "throughput", "first", "prefix", "drafts", "memory")
Queue = Callable[[int, bool], list[Request]]  # (seed, whether routes are wanted back) -> the requests of a round


def request(ids: list[int], tokens: int, domain: str | None = None, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **params)
    return Request(ids, sampling, max_new_tokens=tokens, domain=domain)


def run(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds until all are done."""
    began = time.perf_counter()
    for one in requests:
        engine.add(one)
    while not engine.idle:
        engine.step()
    return time.perf_counter() - began


def shape_model(cache: Path) -> Path:
    folder = cache / "model-nf4"
    if not folder.is_dir():
        quantize(write_model(cache / "model"), folder)
    return folder


def named_model(args: Any) -> Path | None:
    """The model that named.py trained, in four bits. None, with a line that says so, where there is none."""
    folder: Path = args.cache / f"named{args.sample}-nf4"
    if not folder.is_dir():
        named = args.named or Path(f"runs/named{args.sample}/guided/model")
        if not (named / "config.json").is_file():
            print(f"{named}: no model, and no figures of it: `python benchmarks/named.py` trains it (or give --named)")
            return None
        quantize(named, folder)
    return folder


def real_prompts(args: Any, folder: Path, tokens: int) -> dict[str, list[list[int]]]:
    """Beginnings of the documents of each name's unseen source."""
    tokenizer, out = Tokenizer.load(folder), {}
    for name, (_, files) in UNSEEN.items():
        documents = [d.text for d in read_documents(places(args.data, files), ReadReport())]
        encoded = (tokenizer.encode(text[: 8 * tokens], bos=True)[:tokens] for text in documents[:400])
        out[name] = [ids for ids in encoded if len(ids) == tokens]
    return out


# ---- batching by expert ------------------------------------------------------------------------------------------


def batching(args: Any) -> tuple[list[str], dict[str, Any]]:
    count, tokens = 96, 24

    def planted(seed: int, routed: bool) -> list[Request]:
        draw = random.Random(seed)
        kinds = [draw.randrange(DOMAINS) for _ in range(count)]
        return [request(prompt(draw, kind, 16), tokens, NAMES[kind], routed=routed) for kind in kinds]

    small = named_model(args)
    texts = real_prompts(args, small, 32) if small else {}

    def real(seed: int, routed: bool) -> list[Request]:
        draw = random.Random(seed)
        kinds = [draw.choice(list(texts)) for _ in range(count)]
        return [request(draw.choice(texts[kind]), tokens, kind, routed=routed) for kind in kinds]

    model = load_model(planted_model(args.cache))
    share = in_quarter(model, planted(99, True)[:16])
    lines, data = ["### The benchmark shape, synthetic gate", "",
                   f"{share:.0%} of the slots fall on the quarter of the experts that a token's domain prefers (by "
                   f"chance 25 %). {count} prompts of {DOMAINS} domains in random order, 16 + {tokens} tokens.", ""], {}
    found, data["planted"] = orders(args, model, planted, count * tokens)
    data["planted"]["share"] = share
    if small is None:
        return lines + found, data
    lines += [*found, "", "### The trained model with names built in", "",
              f"{count} prompts of {len(texts)} sources that training never saw, 32 + {tokens} tokens; each comes with "
              "its domain's name.", ""]
    found, data["named"] = orders(args, load_model(small), real, count * tokens)
    return lines + found, data


def in_quarter(model: CausalLM, requests: Sequence[Request]) -> float:
    """Share of the slots that fall on the experts of the request's own domain."""
    run(Engine(model, EngineOptions(max_num_seqs=8, prefix_cache=False)), requests)
    hits = [OF_EXPERT[torch.cat(r.routes)] == NAMES.index(str(r.domain)) for r in requests]
    return float(torch.cat([h.flatten() for h in hits]).float().mean())


def orders(args: Any, model: CausalLM, queue: Queue, tokens: int) -> tuple[list[str], dict[str, Any]]:
    """First come, first served, and by expert."""
    batch, seeds = 8, iter(range(1, 1000))

    def engine(policy: str) -> Engine:
        return Engine(model, EngineOptions(max_num_seqs=batch, prefix_cache=False, speculate=False,
                                           policy=policy))  # type: ignore[arg-type]

    def measure(policy: str, seed: int) -> dict[str, Any]:
        requests = queue(seed, False)
        seconds = run(engine(policy), requests)
        waits = sorted((r.finished or 0) - r.arrived for r in requests)
        return {"speed": tokens / seconds, "p50": statistics.median(waits), "p99": waits[int(0.99 * len(waits))],
                "texts": [r.token_ids for r in requests]}

    def distinct(policy: str) -> float:
        """Experts that a layer reads in a step in which all places generate."""
        own, seen = engine(policy), list[float]()

        class Distinct:
            def wants_routes(self, _: Any) -> bool:
                return True

            def on_step(self, output: Any) -> None:
                if all(one.chunk.attn_impl == "absorbed" for one in output.batch) and len(output.batch) == batch:
                    seen.extend(len(route.index_TK.unique()) for route in output.routing.routes.values())

        own.listeners.append(Distinct())
        run(own, queue(0, True))
        return statistics.mean(seen)

    def one() -> dict[str, dict[str, Any]]:
        seed = next(seeds)
        out = {policy: measure(policy, seed) for policy in ("fcfs", "expert")[:: 1 if seed % 2 else -1]}
        assert out["fcfs"].pop("texts") == out["expert"].pop("texts"), "outputs differ"
        print("  " + ", ".join(f"{k} {v['speed']:.1f} tokens/s" for k, v in sorted(out.items())), flush=True)
        return out

    kept, _ = quiet_rounds(args.rounds, one)
    top, experts = model.config.num_experts_per_tok, model.config.n_routed_experts
    expected = experts * (1 - (1 - top / experts) ** batch)
    gain = statistics.median(r["expert"]["speed"] / r["fcfs"]["speed"] for r in kept)
    rows = [["order", "tokens/s", "distinct experts a layer and step", "of those expected", "p50 (s)", "p99 (s)"]]
    data: dict[str, Any] = {"gain": gain, "expected": expected}
    for policy, name in (("fcfs", "first come, first served"), ("expert", "by expert")):
        used = distinct(policy)
        middle = {key: statistics.median(r[policy][key] for r in kept) for key in ("speed", "p50", "p99")}
        data[policy] = middle | {"distinct": used}
        rows.append([name, f"{middle['speed']:.1f}", f"{used:.1f}", f"{used / expected:.0%}", f"{middle['p50']:.2f}",
                     f"{middle['p99']:.2f}"])
    return [table(rows), "", f"By expert: **{gain:.2f} times** the tokens/s (median of rounds), {batch} requests at a "
            f"time, the same texts in both orders. Uniform routing would read {expected:.1f} of {experts} experts a "
            "layer and step."], data


# ---- throughput ----------------------------------------------------------------------------------------------------


def throughput(args: Any) -> tuple[list[str], dict[str, Any]]:
    model = load_model(shape_model(args.cache))
    peer = LlamaCpp.install(args.cache, write_model(args.cache / "model"), args.threads)
    rows = [["requests", "MoE-DR tokens/s", "llama.cpp tokens/s", "ratio"]]
    data: dict[str, Any] = {}
    best = peer
    for batch in (1, 8, 32, 128):
        engine = Engine(model, EngineOptions(max_num_seqs=batch, prefix_cache=False, cache_tokens=128 * batch + 128))
        if batch <= 32:  # beyond it takes minutes, and the fastest of 32 stays so
            best = max(peer.variants(), key=lambda variant: variant.decode(batch, 16))
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
    return ["Decoding, after 16 tokens of prompt, 32 tokens each; llama.cpp: llama-batched-bench, its fastest "
            "setting (at 128 that of 32).", "", table(rows)], data


# ---- first token and shared prefix -----------------------------------------------------------------------------------

_FIRST = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
began = time.perf_counter()
from deepseek import LLM, SamplingParams
llm = LLM(sys.argv[1], prefix_cache=False)
loaded = time.perf_counter()
params = SamplingParams(max_tokens=1, temperature=0)
for _ in range(2):
    start = time.perf_counter()
    llm.generate([list(range(100, 164))], params)
    print(time.perf_counter() - start)
print(loaded - began)
"""


def first(args: Any) -> tuple[list[str], dict[str, Any]]:
    folder = shape_model(args.cache)

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


def prefix(args: Any) -> tuple[list[str], dict[str, Any]]:
    model = load_model(shape_model(args.cache))
    draw = random.Random(5)
    system = [draw.randrange(CONFIG.vocab_size) for _ in range(1024)]

    def measure(cached: bool, seed: int) -> tuple[float, float]:
        engine = Engine(model, EngineOptions(max_num_seqs=8, prefix_cache=cached, cache_tokens=16384))
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


# ---- drafts ----------------------------------------------------------------------------------------------------------


def drafts(args: Any) -> tuple[list[str], dict[str, Any]]:
    lines, data = [], {}
    if (args.demo / "config.json").is_file():
        small = args.cache / "demo-nf4"
        if not small.is_dir():
            quantize(args.demo, small)
        tokenizer, model = Tokenizer.load(small), load_model(small)
        heads = ("def ", "import ", "class ", "    for ", "        self.", "# ", "    return ", "    if ")
        ids = [tokenizer.encode(head, bos=True) for head in heads]
        rows = [["requests", "none, tokens/s", "always", "gain", "drafts right", "the switch: tokens/s", "it takes"]]
        for batch in (1, 8):
            def own(batch: int = batch, model: CausalLM = model, ids: Any = ids) -> list[Request]:
                return [request(ids[i % 8], 200) for i in range(8)]

            row, data[f"demo-{batch}"] = drafted(args, model, own, batch, None)
            rows.append([str(batch), *row])
        lines += ["The model of `make demo-train`, trained on Python's library, and its own MTP module, 200 "
                  "tokens each:", "", table(rows), ""]
    else:
        lines += [f"The demo's model: not measured ({args.demo} holds none; `make demo-train` trains it).", ""]
    model = load_model(planted_model(args.cache))
    rows = [["drafts right, asked", "none, tokens/s", "always", "gain", "drafts right", "the switch: tokens/s",
             "it takes"]]
    for chance in (0.0, 0.5, 0.85, 1.0):
        def big() -> list[Request]:
            return [request(prompt(random.Random(1), 0, 16), 96)]

        row, data[f"simulated-{chance}"] = drafted(args, model, big, 1, chance)
        rows.append([f"{chance:.0%}", *row])
    return [*lines, "Benchmark shape, one request; the MTP module runs as it would (one layer more on five, on V3's 61 "
            "it weighs a twelfth of that), but its drafts are SIMULATED, right with the chance given (DeepSeek-V3 "
            "reports 85 to 90 %, arXiv 2412.19437, 5.4.3):", "", table(rows)], data


def drafted(args: Any, model: CausalLM, queue: Callable[[], list[Request]], batch: int, chance: float | None,
            ) -> tuple[list[str], dict[str, Any]]:
    """No drafts, drafts in every step, and as the engine chooses. chance: of a simulated draft to be right."""
    known: list[list[int]] = []

    def measure(kind: str) -> tuple[float, Engine]:
        engine = Engine(model, EngineOptions(max_num_seqs=batch, prefix_cache=False, speculate=kind != "none"))
        requests = queue()
        if engine.drafter is not None and chance is not None:
            simulate(engine.drafter, dict(zip([r.request_id for r in requests], known, strict=True)), chance)
        if kind == "always":
            engine.drafter.adaptive.of = lambda size: Always()  # type: ignore[union-attr, method-assign]
        seconds = run(engine, requests)
        texts = [r.token_ids for r in requests]
        assert not known or texts == known, "drafts changed a text"
        known[:] = texts
        return sum(map(len, texts)) / seconds, engine

    def one() -> dict[str, tuple[float, Engine]]:
        out = {kind: measure(kind) for kind in ("none", "always", "switch")}
        print("  " + ", ".join(f"{kind} {speed:.1f} tokens/s" for kind, (speed, _) in out.items()), flush=True)
        return out

    measure("none")
    kept, _ = quiet_rounds(args.rounds, one)
    speed = {kind: statistics.median(r[kind][0] for r in kept) for kind in kept[0]}
    gain = statistics.median(r["always"][0] / r["none"][0] for r in kept)
    right = kept[0]["always"][1].drafter.stats.acceptance  # type: ignore[union-attr]
    table_ = kept[-1]["switch"][1].drafter.adaptive.table()  # type: ignore[union-attr]
    takes = ", ".join(f"{size}: {'drafts' if on else 'none'}" for size, _, _, on in table_)
    return ([f"{speed['none']:.1f}", f"{speed['always']:.1f}", f"{gain:.2f}", f"{right:.0%}", f"{speed['switch']:.1f}",
             takes], {"speed": speed, "gain": gain, "acceptance": right, "switch": table_})


class Always(Trial):
    def drafts(self) -> bool:
        return True


def simulate(drafter: Drafter, known: dict[int, list[int]], chance: float) -> None:
    """Let the module run, and replace its drafts by right or wrong ones."""
    own, draw = drafter.draft, random.Random(0)

    def draft(run: Sequence[tuple[Request, Chunk, Tensor]]) -> None:
        own(run)
        for one, *_ in run:
            if one.sequence.draft_token is not None and len(one.token_ids) < one.max_new_tokens:
                right = known[one.request_id][len(one.token_ids)]
                one.sequence.draft_token = right if draw.random() < chance else (right + 1) % CONFIG.vocab_size

    drafter.draft = draft  # type: ignore[method-assign]


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(args: Any) -> tuple[list[str], dict[str, Any]]:
    if (folder := named_model(args)) is None:
        raise SystemExit(2)
    llm, process, draw = LLM(folder, max_num_seqs=32), psutil.Process(), random.Random(0)
    texts = [ids for own in real_prompts(args, folder, 16).values() for ids in own]
    marks, began = {}, time.perf_counter()
    for done in range(0, 10_000, 250):
        params = [SamplingParams(max_tokens=8, seed=done + i, temperature=1.0, logprobs=i % 2 or None)
                  for i in range(250)]
        llm.generate([draw.choice(texts)[: draw.randint(2, 16)] for _ in params], params)
        gc.collect()
        marks[done + 250] = process.memory_info().rss
    grown = marks[10_000] / marks[1_000] - 1
    pages = llm.engine.block_manager
    pages.check_integrity([])
    rows = [["requests", "resident memory (MiB)"],
            *([f"{n:,}", f"{marks[n] / 2**20:.1f}"] for n in (250, 1_000, 2_000, 5_000, 10_000))]
    seconds = time.perf_counter() - began
    return [f"10,000 requests of 2 to 16 tokens of prompt and 8 new ones in one process, {seconds:.0f} s: memory grew "
            f"by **{grown:+.2%}** after the first 1,000. Pages: {pages.available} of {pages.count} free or kept for "
            "their prefix.", "", table(rows)], {"resident": marks, "grown": grown}


def parts(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return text.split(",")


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    add_data(parser)
    parser.add_argument("--named", type=Path, help="what named.py trained (default: runs/named/guided/model)")
    parser.add_argument("--demo", type=Path, default=Path("demo-train/model"), help="what `make demo-train` trained")
    parser.add_argument("--only", type=parts, default=list(PARTS), metavar="PART,…", help=", ".join(PARTS))
    args = parser.parse_args()
    real = {"batching", "memory"} & set(args.only)  # the parts that run the model of named.py
    args.data, args.sample = data_folder(args.data) if real else (args.data, "")
    torch.set_num_threads(args.threads)
    where, packages = machine(args.threads), versions("torch")
    for name in args.only:  # a result each, so that one can be measured again
        print(name, flush=True)
        lines, found = globals()[name](args)
        write_result(f"engine-{name}", "\n".join([
            f"# The engine: {name}", "", f"{where['cpu']}, {args.threads} threads, torch {packages['torch']}; "
            f"{args.rounds} rounds, medians.", "", *lines]), {"machine": where, name: found},
            keep=name not in real or (not args.sample and (name == "memory" or "named" in found)))


if __name__ == "__main__":
    main()
