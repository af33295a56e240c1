"""Speed and cost after `deepseek upcycle`: V3 forms beside what ran the dense model, a MoE beside its dense twin.

All contenders are measured in turn, each in a process of its own, with the same number of threads.

    transformers    the dense model, sdpa and its cache, FP32 and BF16; greedy decoding by a bare loop
    llama.cpp       the dense model in Q4_0, as llama-quantize makes it and with `--pure` (then its embedding and head
                    have 4 bits, too, as our head in NF4), in the fastest of its settings (peers.py; its build knows
                    no AMX, so on processors that have it, it could be faster on dense models)
    MoE-DR          INT8 and NF4 through `LLM`: the exact form, the ready model `mini`, carved models (--carved)

    prefill         the first token of one prompt of 512
    decode B        B sequences grow by 128 tokens after a prompt of 128; tokens/s over all of them

The twin: the benchmark shape (shape.py; 2.5 B parameters, 0.47 B of them active) and a dense model with the same
attention and as many parameters, both with random weights, in NF4, on the same kernels.

    python benchmarks/upcycle_speed.py MODEL [--carved FOLDER …] [--rounds 5]      (MODEL: a folder or a GGUF file)
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from deepseek import LLM, SamplingParams
from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig
from deepseek.convert import pull, quantize, quantize_tensors, upcycle
from deepseek.files import write_json
from deepseek.info import cost, describe
from deepseek.info.machine import read_bandwidth
from deepseek.model.gate import Gate
from deepseek.ops.native import isa
from deepseek.quant.linear import QuantConfig, QuantizedExperts, QuantizedLinear, QuantizedMLP
from full_size import RandomTensors
from harness import Worker, arguments, machine, quiet_rounds, ratio, table, versions, write_result
from peers import RELEASE, LlamaCpp, build, gguf
from shape import CACHE, CONFIG

SECONDS = 1.5  # of a measurement at least
PRICE = 0.10  # USD an hour; EC2's m7g.large, 2 cores and 8 GiB, was 0.0816 in us-east-1 in June 2026
ASKED = "2.9x", "1/4"  # by the project's user: latency and cost beside a dense model of as many parameters
SPINS = "GOMP_SPINCOUNT"
FORMATS: tuple[Literal["int8", "nf4"], ...] = ("int8", "nf4")
Pass = Callable[[int, int, int], tuple[float, float]]  # (batch, prompt, new) -> seconds to the first token, and after
Contender = Callable[[str], float]  # name of the work -> tokens/s
Speeds = dict[str, dict[str, list[float]]]  # name of the work -> contender -> tokens/s of every round


@dataclass(frozen=True)
class Work:
    """batch: 0 for prefill. prompt: tokens of each prompt; new: that follow it."""

    batch: int
    prompt: int
    new: int


def works(prefill: int, prompt: int, new: int) -> dict[str, Work]:
    return {"prefill": Work(0, prefill, 1), "decode 1": Work(1, prompt, new), "decode 8": Work(8, prompt, new)}


# ---- contenders ------------------------------------------------------------------------------------------------------


def own(folder: str) -> Pass:
    """Through the engine; with a tokenizer beside the checkpoint the text is made, too, which the peers leave out."""
    model: Any = folder if (Path(folder) / "tokenizer.json").is_file() else load_model(folder)
    llm, draw = LLM(model, max_num_seqs=8, max_num_batched_tokens=4096, cache_tokens=16384), random.Random(0)

    def run(batch: int, prompt: int, new: int) -> tuple[float, float]:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        prompts = [[draw.randrange(llm.model.config.vocab_size) for _ in range(prompt)] for _ in range(batch)]
        requests = [one for ids in prompts for one in llm.requests(ids, params)]
        began = time.monotonic()
        llm.driver.generate(*requests)
        first = max(one.first_token or 0.0 for one in requests)
        return first - began, max(one.finished or 0.0 for one in requests) - first

    return run


def transformers(dtype: torch.dtype, source: Mapping[str, Any]) -> Pass:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def run(batch: int, prompt: int, new: int) -> tuple[float, float]:
        ids, cache = torch.randint(0, model.config.vocab_size, (batch, prompt)), None
        began = first = time.perf_counter()
        for step in range(new):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            first = first if step else time.perf_counter()
        return first - began, time.perf_counter() - first

    return run


def speeds(make: Callable[[], Pass], asked: Mapping[str, Work], threads: int) -> Contender:
    """Measures for SECONDS at least, after a shorter run of the same kind when it is asked for the first time."""
    torch.set_num_threads(threads)
    run, warm = make(), set[str]()

    def speed(work: str) -> float:
        batch, prompt, new = asked[work].batch, asked[work].prompt, asked[work].new
        if work not in warm:
            run(max(batch, 1), prompt, min(new, 8))
            warm.add(work)
        rates, end = list[float](), time.perf_counter() + SECONDS
        while not rates or time.perf_counter() < end:
            rates.append(batch * new / run(batch, prompt, new + 1)[1] if batch else prompt / run(1, prompt, 1)[0])
        return statistics.harmonic_mean(rates)

    return speed


def llama_speed(peer: LlamaCpp, asked: Mapping[str, Work], chosen: dict[str, LlamaCpp], work: str) -> float:
    """In the fastest setting, which is found when the work is asked for the first time."""
    one = asked[work]

    def measure(variant: LlamaCpp) -> float:
        return variant.decode(one.batch, one.new, one.prompt) if one.batch else variant.prefill(one.prompt)

    if work not in chosen:
        chosen[work] = max(peer.variants(), key=measure)
    return measure(chosen[work])


def token_bytes(folder: Path) -> int:
    """Bytes of the weights that decoding one token reads, beyond its row of the embedding, norms and biases."""
    model, total = load_model(folder), 0
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            total += module.table[0].nbytes * model.config.num_experts_per_tok
            total += 0 if module.shared is None else module.shared.nbytes
        elif isinstance(module, QuantizedLinear | QuantizedMLP):
            total += module.packed.nbytes
        elif isinstance(module, Gate):
            total += module.weight.nbytes
    return total


# ---- models ----------------------------------------------------------------------------------------------------------


def packed(source: Path, cache: Path, format: Literal["int8", "nf4"]) -> Path:
    """`source` quantized; what was made of it before is used again."""
    folder = cache / f"{source.name}-{format}"
    config, made = source / "config.json", folder / "config.json"
    if not made.is_file() or made.stat().st_mtime < config.stat().st_mtime:
        quantize(source, folder, format, overwrite=folder.is_dir())
    return folder


def own_models(args: argparse.Namespace) -> dict[str, Path]:
    """Contender -> checkpoint."""
    exact = args.cache / f"{args.model.name.removesuffix('.gguf')}-v3"
    if not exact.is_dir():
        upcycle(args.model, exact)
    found = {f"exact form {format.upper()}": packed(exact, args.cache, format) for format in FORMATS}
    if not args.without_mini:
        found |= {"mini INT8": pull("mini"), "mini NF4": pull("mini-4bit")}
    return found | {f"{folder.name} {format.upper()}": packed(folder, args.cache, format)
                    for folder in args.carved for format in FORMATS}


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The same attention, and dense FFNs of as many parameters as all experts and FFNs together."""
    layers, first = config.num_hidden_layers, config.first_k_dense_replace
    experts = config.n_routed_experts + (config.n_shared_experts or 0)
    neurons = first * config.intermediate_size + (layers - first) * experts * config.moe_intermediate_size
    return config.with_(first_k_dense_replace=layers, intermediate_size=round(neurons / layers / 64) * 64)


def random_model(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint in NF4 of random weights; the plain weights are nowhere as a whole."""
    if not folder.is_dir():
        source = folder.with_name(f"{folder.name}-source")  # its configuration alone
        source.mkdir(parents=True, exist_ok=True)
        write_json(source / "config.json", config.to_dict())
        quantize_tensors(config, RandomTensors(source, config), folder, QuantConfig("nf4"))
    return folder


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(contenders: Mapping[str, Contender], asked: Mapping[str, Work], rounds: int,
            ) -> tuple[Speeds, dict[str, list[float]], float]:
    """(tokens/s, bandwidth of each round by work, the largest share of a round's time that the host took)."""
    speed: Speeds = {}
    bandwidth: dict[str, list[float]] = {}
    taken = 0.0
    for work in asked:
        for contender in contenders.values():  # warm, and llama.cpp's setting chosen
            contender(work)

        def one(work: str = work) -> tuple[float, dict[str, float]]:
            read, values = read_bandwidth("cpu", 1 << 30), {}
            for name, contender in contenders.items():
                values[name] = contender(work)
                print(f"  {work:<9}{name:<28}{values[name]:9.1f} tokens/s   (read {read / 1e9:.1f} GB/s)", flush=True)
            return read, values

        kept, shares = quiet_rounds(rounds, one)
        bandwidth[work] = [read for read, _ in kept]
        speed[work] = {name: [values[name] for _, values in kept] for name in contenders}
        taken = max(taken, *shares)
    return speed, bandwidth, taken


def fastest(by_name: Mapping[str, list[float]], system: str) -> str | None:
    """The fastest contender of a peer, None where it did not run."""
    return max((name for name in by_name if name.startswith(system)),
               key=lambda name: statistics.median(by_name[name]), default=None)


def upcycled(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    asked = works(args.prefill, args.prompt, args.new)
    models, sizes = own_models(args), dict[str, float]()
    contenders: dict[str, Contender] = {}
    where = {"pretrained_model_name_or_path": str(args.model)}
    if args.model.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(args.model.parent), "gguf_file": args.model.name}
    os.environ.pop(SPINS, None)  # libgomp's own, as its users have it
    for name, dtype in (("FP32", torch.float32), ("BF16", torch.bfloat16)):
        contenders[f"transformers {name}"] = Worker(speeds, partial(transformers, dtype, where), asked, args.threads)
    os.environ[SPINS] = "1000"  # what `import deepseek` sets
    chosen: dict[str, dict[str, LlamaCpp]] = {}
    if not args.without_llama:
        binaries = build(args.cache, ("llama-bench", "llama-batched-bench"))
        for name, pure in (("llama.cpp Q4_0", False), ("llama.cpp Q4_0 --pure", True)):
            peer, chosen[name] = LlamaCpp(binaries, gguf(args.cache, args.model, pure), args.threads), {}
            contenders[name] = partial(llama_speed, peer, asked, chosen[name])
            sizes[name] = peer.model.stat().st_size  # its head is its embedding
    for name, folder in models.items():
        contenders[name] = Worker(speeds, partial(own, str(folder)), asked, args.threads)
        sizes[name] = token_bytes(folder)
    speed, bandwidth, taken = measure(contenders, asked, args.rounds)
    stop(contenders)
    rows, factors = compared(speed, bandwidth, sizes, models, args.price_per_hour)
    settings = {work: {name: by_work[work].name for name, by_work in chosen.items()} for work in asked}
    lines = [
        f"## {args.model.name} and its V3 forms", "",
        f"Prefill of {args.prefill} tokens; decoding {args.new} tokens after {args.prompt}. Speed and cost beside the "
        "faster form of each peer are medians of the rounds' ratios; the cost falls by 1 - 1 / factor. Asked for: 3 "
        "times the speed of transformers and -75 % of its cost. Memory bound: bytes of the weights that a token reads, "
        "over the bandwidth of the same round; the processor's cache is not counted.", "", table(rows), "",
        "llama.cpp ran " + "; ".join(f"{work}: {', '.join(names.values())}" for work, names in settings.items()) + "."]
    return lines, {"tokens_per_second": speed, "bandwidth": bandwidth, "bytes": sizes, "factors": factors,
                   "stolen": taken, "llama": settings}


def compared(speed: Speeds, bandwidth: Mapping[str, list[float]], sizes: Mapping[str, float], ours: Mapping[str, Path],
             price: float) -> tuple[list[list[str]], dict[str, float]]:
    """A row a work and contender; factors of ours by work, contender and peer."""
    rows = [["work", "contender", "tokens/s", "min to max", "USD for 10^8 tokens", "beside transformers",
             "beside llama.cpp", "of the memory bound"]]
    factors: dict[str, float] = {}
    for work, by_name in speed.items():
        peers = {system: fastest(by_name, system) for system in ("transformers", "llama.cpp")}
        for name, values in by_name.items():
            beside, share = dict.fromkeys(peers, ""), ""
            for system, peer in peers.items():
                if name in ours and peer is not None:
                    factor = factors[f"{work}: {name}: {peer}"] = ratio(values, by_name[peer])
                    beside[system] = f"{factor:.2f}x, {1 / factor - 1:+.0%}"
            if work == "decode 1" and name in sizes:
                share = f"{ratio([value * sizes[name] for value in values], bandwidth[work]):.0%}"
            middle = statistics.median(values)
            rows.append([work, name, f"{middle:.1f}", f"{min(values):.1f} to {max(values):.1f}",
                         f"{cost(price, middle):,.1f}", *beside.values(), share])
    return rows, factors


def twin(args: argparse.Namespace, config: ModelConfig = CONFIG) -> tuple[list[str], dict[str, Any]]:
    asked = works(args.prefill, min(args.prompt, 32), min(args.new, 32))  # more would take minutes
    dense = dense_twin(config)
    os.environ[SPINS] = "1000"
    folders = {"MoE": random_model(config, args.cache / "twin-moe-nf4"),
               "dense": random_model(dense, args.cache / "twin-dense-nf4")}
    about = {"MoE": describe(config), "dense": describe(dense)}
    contenders: dict[str, Contender] = {
        name: Worker(speeds, partial(own, str(folder)), asked, args.threads) for name, folder in folders.items()}
    sizes = {name: token_bytes(folder) for name, folder in folders.items()}
    speed, bandwidth, taken = measure(contenders, asked, args.rounds)
    stop(contenders)
    rows = [["", "MoE", "dense twin", "ratio", "asked for"]]
    gains: dict[str, float] = {}
    for work, by_name in speed.items():
        gains[work] = ratio(by_name["MoE"], by_name["dense"])
        middle = {name: statistics.median(values) for name, values in by_name.items()}
        what, tokens = {"prefill": (f"first token of a prompt of {args.prefill} (ms)", args.prefill),
                        "decode 1": ("a token, one sequence (ms)", 1),
                        "decode 8": ("a step of 8 sequences (ms)", 8)}[work]
        took = (f"{1000 * tokens / middle[name]:.1f}" for name in folders)
        price = (f"{cost(args.price_per_hour, middle[name]):,.0f}" for name in folders)
        rows += [[what, *took, f"{gains[work]:.2f}x faster", ASKED[0]],
                 [f"10^8 tokens, {work} (USD)", *price, f"{1 / gains[work]:.2f}", ASKED[1]]]
    share = {name: ratio([value * sizes[name] for value in speed["decode 1"][name]], bandwidth["decode 1"])
             for name in folders}
    lines = [
        "## A MoE and its dense twin", "",
        f"{about['MoE'].total / 1e9:.2f} B parameters, {about['MoE'].active_beyond_lookup / 1e9:.2f} B of them active "
        f"beyond the embedding; the dense twin has {about['dense'].total / 1e9:.2f} B. NF4, random weights, the same "
        f"kernels; decoding {asked['decode 1'].new} tokens after {asked['decode 1'].prompt}. One sequence reads "
        f"{sizes['dense'] / sizes['MoE']:.2f} times fewer bytes a token, at {share['MoE']:.0%} and "
        f"{share['dense']:.0%} of the memory bound.", "", table(rows)]
    return lines, {"tokens_per_second": speed, "bandwidth": bandwidth, "bytes": sizes, "gains": gains, "stolen": taken}


def stop(contenders: Mapping[str, Contender]) -> None:
    for one in contenders.values():
        if isinstance(one, Worker):
            one.stop()


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("model", type=Path, help="the dense model, a folder or a GGUF file")
    parser.add_argument("--carved", type=Path, nargs="+", default=[], metavar="FOLDER",
                        help="what `deepseek upcycle MODEL FOLDER --carve SHARE` left")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--price_per_hour", type=float, default=PRICE, metavar="USD", help="of the machine")
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS", help="before decoding")
    parser.add_argument("--new", type=int, default=128, metavar="TOKENS", help="that a sequence grows by")
    for what in ("mini", "llama", "twin"):
        parser.add_argument(f"--without_{what}", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = [upcycled(args)] + ([] if args.without_twin else [twin(args)])
    where, packages = machine(args.threads), versions("torch", "transformers") | {"llama-cpp-python": RELEASE}
    read = [value for _, data in parts for values in data["bandwidth"].values() for value in values]
    lines = ["# After the conversion: speed and cost", "",
             f"{where['cpu']} ({', '.join(where['units'])}; kernels {isa()}), {args.threads} threads; "
             + ", ".join(f"{name} {version}" for name, version in packages.items())
             + f"; {args.rounds} rounds in turn, medians; the host took {max(data['stolen'] for _, data in parts):.1%} "
             f"of a round's time at most; memory read in between: {min(read) / 1e9:.1f} to {max(read) / 1e9:.1f} GB/s. "
             f"{args.price_per_hour:.2f} USD an hour."]
    whole = (args.prefill, args.prompt, args.new) == (512, 128, 128) and args.rounds >= 5 and not (
        args.without_mini or args.without_llama or args.without_twin)
    write_result("upcycle_speed", "\n".join([*lines, *(line for text, _ in parts for line in ["", *text])]), {
        "machine": where, "isa": isa(), "versions": packages, "price_per_hour": args.price_per_hour,
        "upcycled": parts[0][1], "twin": parts[-1][1] if len(parts) > 1 else None}, whole)


if __name__ == "__main__":
    main()
