"""Four bits beside llama.cpp and transformers: prefill and decoding of the same weights, in turn, in one run.

Model: layer shapes of `v3-16b-a3b`, 5 layers, 2.5 B parameters, 0.47 B of them active beyond the embedding's rows
(shape.py). MoE-DR runs the NF4 checkpoint that `deepseek quantize` makes of it, llama.cpp its own Q4_0 of it (peers.py;
its head has 6 bits, ours 4), transformers the BF16 weights.

    prefill     one prompt of 512 tokens
    decode B    B sequences grow by 32 tokens after 16 of prompt; tokens/s over all of them

The bound of decoding is memory: bytes of the weights that a step reads, over the bandwidth measured in the same minute.

    python benchmarks/inference.py [--rounds 5] [--only prefill,decode1] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint import load_model
from deepseek.convert import quantize
from deepseek.info.machine import read_bandwidth
from deepseek.ops.native import isa
from deepseek.ops.panels import matrix_bytes, mlp_bytes
from harness import Worker, arguments, machine, quiet_rounds, ratio, table, versions, write_result
from peers import RELEASE, LlamaCpp
from shape import CACHE, CONFIG, write_model

PROMPT, STEPS = 16, 32
SECONDS = 4.0  # of every contender in every round
WORK = {"prefill": 0, "decode1": 1, "decode8": 8, "decode32": 32}  # name -> batch; 0: prefill of 512 tokens
WORK_OF = {batch: name for name, batch in WORK.items()}
Step = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]  # (ids, cache) -> (logits of the last token, cache)


def own_step(checkpoint: str) -> Step:
    model = load_model(checkpoint)

    def step(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        cache = cache or model.new_cache(len(ids), 1024)
        return model(ids, cache=cache, last_only=True)[:, -1], cache

    return step


def transformers_step(checkpoint: str) -> Step:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    def step(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    return step


def speeds(build: Callable[[str], Step], checkpoint: str, threads: int, steps: int) -> Callable[[int], float]:
    """batch (0: prefill) -> tokens/s; one measurement, after a shorter one of the same kind."""
    torch.set_num_threads(threads)
    step = build(checkpoint)
    ids = torch.randint(0, CONFIG.vocab_size, (64, 512), generator=torch.Generator().manual_seed(0))

    def prefill(tokens: int) -> float:
        began = time.perf_counter()
        step(ids[:1, :tokens], None)
        return tokens / (time.perf_counter() - began)

    def decode(batch: int, steps: int) -> float:
        logits, cache = step(ids[:batch, :PROMPT], None)
        began = time.perf_counter()
        for _ in range(steps):
            logits, cache = step(logits.argmax(-1, keepdim=True), cache)
        return batch * steps / (time.perf_counter() - began)

    @torch.inference_mode()
    def run(batch: int) -> float:
        if batch:
            decode(batch, 2)
            return decode(batch, steps)
        prefill(64)
        return prefill(512)

    return run


def bytes_a_step(batch: int) -> float:
    """Bytes of the checkpoint that one decoding step reads; of the experts by the expectation for uniform routing."""
    c = CONFIG
    heads, values = c.num_attention_heads, c.num_attention_heads * c.v_head_dim
    assert c.q_lora_rank is not None
    attention = (matrix_bytes(c.q_lora_rank, c.hidden_size) + matrix_bytes(heads * c.qk_head_dim, c.q_lora_rank)
                 + matrix_bytes(c.latent_dim, c.hidden_size) + matrix_bytes(c.hidden_size, values)
                 + matrix_bytes(heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank))
    share = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** batch
    moe = (c.n_routed_experts * share * mlp_bytes(c.hidden_size, c.moe_intermediate_size)
           + mlp_bytes(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)
           + 2 * c.n_routed_experts * c.hidden_size)  # the gate is BF16
    dense = c.first_k_dense_replace
    return (c.num_hidden_layers * attention + (c.num_hidden_layers - dense) * moe
            + dense * mlp_bytes(c.hidden_size, c.intermediate_size) + matrix_bytes(c.vocab_size, c.hidden_size))


def steady(run: Callable[[int], float], batch: int) -> float:
    """Tokens/s over SECONDS at least: a neighbour on the machine comes and goes within one."""
    rates: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        rates.append(run(batch))
    return statistics.harmonic_mean(rates)


def works(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in WORK]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such work: {', '.join(unknown)}; there are {', '.join(WORK)}")
    return text.split(",")


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--only", type=works, default=list(WORK), metavar="WORK,…", help=", ".join(WORK))
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain = write_model(args.cache / "model")
    packed = args.cache / "model-nf4"
    if not packed.is_dir():
        quantize(plain, packed)
    llama = LlamaCpp.install(args.cache, plain, args.threads)
    own = Worker(speeds, own_step, str(packed), args.threads, STEPS)

    def run_llama(variant: LlamaCpp, batch: int) -> float:
        return variant.decode(batch, STEPS, PROMPT) if batch else variant.prefill(512)

    contenders: dict[str, Callable[[int], float]] = {
        "MoE-DR NF4": own, "llama.cpp Q4_0": lambda batch: run_llama(chosen[WORK_OF[batch]], batch)}
    workers = [own]
    if not args.without_transformers:
        workers.append(Worker(speeds, transformers_step, str(plain), args.threads, 8))
        contenders["transformers BF16"] = workers[-1]

    speed: dict[str, dict[str, list[float]]] = {}
    bandwidth: dict[str, list[float]] = {}
    taken: dict[str, list[float]] = {}
    chosen: dict[str, LlamaCpp] = {}
    for work in args.only:
        batch = WORK[work]
        trial = {variant: max(run_llama(variant, batch) for _ in range(2)) for variant in llama.variants()}
        chosen[work] = max(trial, key=trial.__getitem__)
        print("  " + ", ".join(f"{variant.name} {value:.1f}" for variant, value in trial.items()), flush=True)

        def one(work: str = work, batch: int = batch) -> tuple[float, dict[str, float]]:
            read = read_bandwidth("cpu", 1 << 30)
            values = {}
            for name, run in contenders.items():
                if batch > 1 and name.startswith("transformers"):
                    continue  # slow, and far from the others
                values[name] = steady(run, batch)
                print(f"  {work:<9}{name:<20}{values[name]:9.1f} tokens/s   (read {read / 1e9:.1f} GB/s)", flush=True)
            return read, values

        kept, taken[work] = quiet_rounds(args.rounds, one)
        bandwidth[work] = [read for read, _ in kept]
        speed[work] = {name: [values[name] for _, values in kept if name in values] for name in contenders}
        report(args.threads, args.rounds, speed, bandwidth, taken,
               {work: variant.name for work, variant in chosen.items()})
    for worker in workers:
        worker.stop()


def report(
    threads: int, rounds: int, speed: dict[str, dict[str, list[float]]], bandwidth: dict[str, list[float]],
    taken: dict[str, list[float]], chosen: dict[str, str]
) -> None:
    rows = [["work", "contender", "tokens/s (median)", "min to max", "MoE-DR is faster by",
             "share of the bandwidth bound"]]
    ratios: dict[str, float] = {}
    for work, by_name in speed.items():
        own = by_name["MoE-DR NF4"]
        for name, values in by_name.items():
            if not values:
                continue
            share = ""
            if name == "MoE-DR NF4" and (batch := WORK[work]):
                bound = [read / bytes_a_step(batch) * batch for read in bandwidth[work]]
                share = f"{ratio(own, bound):.0%} of {statistics.median(bound):.0f}"
            if name != "MoE-DR NF4":
                ratios[f"{work}: {name}"] = ratio(own[: len(values)], values)
            rows.append([work, name, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}",
                         f"{ratios[f'{work}: {name}']:.2f}" if name != "MoE-DR NF4" else "", share])
    where = machine(threads)
    read = [value for values in bandwidth.values() for value in values]
    lines = ["# Four bits: inference", "",
             f"{where['cpu']} ({', '.join(where['units'])}; kernels {isa()}), {threads} threads; llama-cpp-python "
             f"{RELEASE}, " + ", ".join(f"{k} {v}" for k, v in versions("torch", "transformers").items())
             + f"; {rounds} rounds in turn, of whose time the host took {max(map(max, taken.values())):.1%} at most; "
             f"memory read in between: {min(read) / 1e9:.1f} to {max(read) / 1e9:.1f} "
             "GB/s. 2.5 B parameters. llama.cpp runs in the fastest of its variants, tried before: "
             + ", ".join(f"{work} {name}" for work, name in chosen.items()) + ".", "", table(rows)]
    write_result("inference", "\n".join(lines), {
        "machine": where, "isa": isa(), "versions": versions("torch", "transformers") | {"llama-cpp-python": RELEASE},
        "tokens_per_second": speed, "bandwidth": bandwidth, "stolen": taken, "ratios": ratios})


if __name__ == "__main__":
    main()
