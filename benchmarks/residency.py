"""Half and a quarter of the experts in memory: warm-up, prefetch, and llama.cpp under the same limit.

Every measurement is a process of its own, in a memory control group where one can be made (cgroup v1, as root): all
weights but the experts that may not stay, and 384 MiB for everything else. MoE-DR reads experts past the page cache
into its budget (`--expert_memory`); llama.cpp maps its file and leaves it to the system what stays. Files are dropped
from the page cache before each.

    planted   layer shapes of `v3-16b-a3b`, 5 layers, NF4, SYNTHETIC GATE (planted.py), two prompts of one domain, 16 +
              48 tokens, one after the other
    named     the preset `small` trained by named.py, NF4: three prompts of code from a source that training never saw;
              here the coverage to expect of a warm-up by name is said and then measured

llama.cpp: llama-bench, 48 tokens, one run each with weights as they are in the file and repacked at load, which is
faster and takes memory that cannot be given back.

    python benchmarks/residency.py [--rounds 3] [--cache FOLDER] [--named MODEL]
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek import LLM, SamplingParams
from deepseek.atlas import ExpertUsage
from deepseek.checkpoint import expert_spans
from deepseek.config import ModelConfig
from deepseek.engine.residency import slot_bytes
from deepseek.engine.warmup import USE, record_use
from domains import add_data, data_folder
from engine import named_model, real_prompts
from harness import arguments, machine, quiet_rounds, table, versions, write_result
from peers import LlamaCpp
from planted import planted_model, prompt
from shape import CACHE, write_model

SHARES = (0.5, 0.25)
TOKENS = 48
OVERHEAD = 384 << 20
GROUP = Path("/sys/fs/cgroup/memory/moe-dr-benchmark")
SETTINGS = {"off, off": ("", False), "by name, off": ("{name}", False), "by name, on": ("{name}", True),
            "auto, off": ("auto", False), "auto, on": ("auto", True)}  # warm-up, prefetch


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(job["threads"])
    llm = LLM(job["folder"], max_num_seqs=1, prefix_cache=False, speculate=False, expert_memory=job["budget"],
              warmup_experts=job["warm"], prefetch=job["prefetch"])
    own, usage = llm.engine.residency, ExpertUsage(llm.model.config)
    assert own is not None
    requests, began = [], time.perf_counter()
    for i, ids in enumerate(job["prompts"]):
        if i == 1:  # by now all that is no expert has been read
            read, before = own.stats.read, read_bytes()
        requests += llm.requests(ids, SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True))
        requests[-1].usage, requests[-1].arrived = usage, time.monotonic()
        llm.driver.generate(requests[-1])
    seconds = time.perf_counter() - began
    return own.stats.to_dict() | {
        "speed": len(requests) * TOKENS / seconds, "first": (requests[0].first_token or 0) - requests[0].arrived,
        "read_later": own.stats.read - read, "system_read_later": read_bytes() - before,
        "expected": llm.warmup and llm.warmup.expected,
        "measured": llm.warmup and llm.warmup.measured(usage), "warmed": llm.warmup and llm.warmup.seconds,
        "texts": [request.token_ids for request in requests]}


def read_bytes() -> int:
    """Bytes that this process had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def limited(command: list[str], limit: int, files: Sequence[Path]) -> str | None:
    """Standard output of a command whose memory is limited (0: it is not); None where it did not live."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # pages that others brought in would not count
        os.close(descriptor)
    enter = None
    if limit:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(limit))

        def enter() -> None:
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=enter, check=False)
    finally:
        if limit:
            GROUP.rmdir()
    if done.returncode and done.returncode != -9:
        raise SystemExit(f"{command[0]}: exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return None if done.returncode else done.stdout


def can_limit() -> bool:
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(1 << 40))
        GROUP.rmdir()
    except OSError:
        return False
    return True


def llama(peer: LlamaCpp, repack: int, limit: int) -> float | None:
    command = [str(peer.binaries / "llama-bench"), "-m", str(peer.model), "-t", str(peer.threads), "-p", "0", "-n",
               str(TOKENS), "-r", "1", "-o", "json", "-lm", "mmap", "--repack", str(repack)]
    output = limited(command, limit, [peer.model])
    return float(json.loads(output[output.index("["):])[0]["avg_ts"]) if output else None


def compare(args: Any, folder: Path, name: str, prompts: list[list[int]], peer: LlamaCpp | None,
            ) -> tuple[list[str], dict[str, Any]]:
    spans = expert_spans(folder)
    routed = ModelConfig.from_file(folder).moe_layers
    spans = {layer: own for layer, own in spans.items() if layer in routed}
    count, slot = sum(map(len, spans.values())), slot_bytes(spans)
    whole = sum(span.size for own in spans.values() for span in own)
    files = list(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    rows = [["experts in memory", "warm-up, prefetch", "tokens/s", "first token (s)", "experts there",
             "read ahead, used", "waited (s)", "MiB read", "of it seen by the system", "coverage expected, measured"]]
    data: dict[str, Any] = {"experts_bytes": whole}

    def bound(share: float) -> int:  # by the smaller file: ours has an MTP module, which nobody runs here
        return min(size, peer.model.stat().st_size if peer else size) - int((1 - share) * whole) + OVERHEAD

    def ours(share: float, setting: str, limit: int) -> dict[str, Any]:
        warm, prefetch = SETTINGS[setting]
        job = {"folder": str(folder), "budget": int(share * count) * slot, "prefetch": prefetch,
               "warm": warm.format(name=name), "prompts": prompts, "threads": args.threads}
        out = limited([sys.executable, __file__, "--child", json.dumps(job)], limit, files)
        assert out is not None, "the budget did not hold: the system ended the process"
        return json.loads(out.strip().splitlines()[-1])

    for share in SHARES:
        limit = bound(share) if peer is not None else 0

        def one(share: float = share, limit: int = limit) -> dict[str, Any]:
            out: dict[str, Any] = {setting: ours(share, setting, limit) for setting in SETTINGS}
            assert len({json.dumps(found.pop("texts")) for found in out.values()}) == 1, "texts differ"
            print("  " + ", ".join(f"{kind} {found['speed']:.1f}" for kind, found in out.items()),
                  flush=True)
            return out

        kept, _ = quiet_rounds(args.rounds, one)
        for kind in SETTINGS:
            middle = {key: statistics.median(r[kind][key] for r in kept) for key in kept[0][kind]
                      if kept[0][kind][key] is not None}
            data[f"{share}: {kind}"] = middle
            covered = f"{middle['measured']:.0%}" if "measured" in middle else ""
            if "expected" in middle:
                covered = f"{middle['expected']:.0%}, {covered}"
            rows.append([
                f"{share:.0%}", kind, f"{middle['speed']:.1f}", f"{middle['first']:.2f}",
                f"{middle['hits'] / middle['wanted']:.0%}",
                f"{middle['prefetch_hits'] / middle['prefetched']:.0%}" if middle["prefetched"] else "",
                f"{middle['stall']:.1f}", f"{middle['read'] / 2**20:,.0f}",
                f"{middle['system_read_later'] / max(middle['read_later'], 1):.1%}", covered])
        for repack, how in enumerate(("as in the file", "repacked") if peer is not None else ()):
            assert peer is not None  # once: it is slower by more than any noise, and takes minutes
            speed = llama(peer, repack, limit)
            data[f"{share}: llama.cpp, {how}"] = speed
            rows.append([f"{share:.0%}", f"llama.cpp, {how}", "ended by the system: more memory than the limit"
                         if speed is None else f"{speed:.1f}", *[""] * 7])
            print("  " + " | ".join(rows[-1][:3]), flush=True)
    bounds = ", ".join(f"{bound(share) >> 20:,} MiB" for share in SHARES)
    where = f"in memory control groups of {bounds}" if peer is not None else "without a limit on the process"
    return [f"{whole / 2**20:,.0f} MiB of experts in files of {size / 2**20:,.0f} MiB, one request at a time, "
            f"{where}; the same texts under every setting.", "", table(rows)], data


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    add_data(parser)
    parser.add_argument("--named", type=Path, help="what named.py trained (default: runs/named/guided/model)")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    args.data, args.sample = data_folder(args.data)
    torch.set_num_threads(args.threads)
    named = named_model(args)
    peer = None
    if can_limit():
        peer = LlamaCpp.install(args.cache, write_model(args.cache / "model"), args.threads)
    planted, draw = planted_model(args.cache), random.Random(3)
    learn(planted, [prompt(random.Random(4), 0, 16) for _ in range(4)])
    print("planted", flush=True)
    one, first = compare(args, planted, "law_expert", [prompt(draw, 0, 16) for _ in range(2)], peer)
    two: list[str] = ["Not measured."]
    second: dict[str, Any] = {}
    if named:
        texts = real_prompts(args, named, 32)["code_expert"]
        learn(named, texts[-8:])
        print("named", flush=True)
        two, second = compare(args, named, "code_expert", texts[:3], None)
    where = machine(args.threads)
    notes = ["`experts there`: in memory, and not on their way, when a layer of a step asked. `auto`: the frequent "
             "experts of other prompts of the domain. `first token`: of a process's first request. Seen by the "
             "system: `read_bytes` of /proc/self/io over what the engine says it read, from the second request on, "
             "when all other weights have been read."]
    write_result("residency", "\n".join([
        "# Experts that are not all in memory", "", f"{where['cpu']}, {args.threads} threads, torch "
        f"{versions('torch')['torch']}; {args.rounds} rounds, medians.", "", *notes, "",
        "## The benchmark shape, synthetic gate", "", *one, "", "## The trained model with names built in", "", *two]),
        {"machine": where, "planted": first, "named": second}, keep=named is not None and not args.sample)


def learn(folder: Path, prompts: list[list[int]]) -> None:
    """Leave recorded use beside a model, of other prompts than those that are measured."""
    (folder / USE).unlink(missing_ok=True)
    llm = LLM(folder, speculate=False)
    usage = ExpertUsage(llm.model.config)
    llm.generate(prompts, SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True), usage=usage)
    record_use(usage, folder)


if __name__ == "__main__":
    main()
