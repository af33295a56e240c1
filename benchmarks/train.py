"""Training tokens a second: MoE-DR beside transformers' DeepseekV3, same shape, same step, same run.

Shape: 62.9 M parameters (preset `v3-63m` without its MTP module): hidden 384, 8 layers, 32 experts of 192, top-4 of 8
groups, vocabulary 16384. A step: 16 sequences of 256 tokens, forward, loss, backward, clipping, fused AdamW.
transformers runs with each of its experts implementations; the faster one counts. Both precisions are measured:

    bf16   transformers under torch.autocast(bfloat16), its way; MoE-DR with BF16 activations over FP32 weights
    fp32   everything FP32

On a CPU without BF16 instructions BF16 buys nothing: fp32 is then the fastest form of both, and the line
"best against best" is the fair summary. What computes MoE-DR's BF16 products (docs/training.md, "Which units compute")
stands in the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from deepseek.config import ModelConfig
from deepseek.deepopt.optimizers import make_optimizer
from deepseek.deepopt.settings import TrainConfig
from deepseek.info import describe
from deepseek.model import CausalLM
from deepseek.ops.native import bf16_units, bf16_way
from harness import alternate, arguments, gemm_gflops, machine, ratio, table, versions, write_result

BATCH, LENGTH = 16, 256
TOKENS = BATCH * LENGTH
CONFIG = ModelConfig.preset("v3-63m").with_(num_nextn_predict_layers=0)
NAMES = ("MoE-DR bf16", "transformers grouped_mm bf16", "transformers eager bf16",
         "MoE-DR fp32", "transformers grouped_mm fp32", "transformers eager fp32")


def build(name: str, threads: int) -> Callable[[], None]:
    """One training step of the contender `name`."""
    text = torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    ids, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    system, *implementation, precision = name.split()
    bf16 = precision == "bf16"
    model: torch.nn.Module
    if system == "MoE-DR":
        own = model = CausalLM(CONFIG).init_weights(torch.Generator().manual_seed(0)).train()
        own.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        optimizer: torch.optim.Optimizer = make_optimizer(own, TrainConfig())

        def loss() -> torch.Tensor:
            return own.loss(ids, labels).total
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        keys = CONFIG.to_dict()
        peer = model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys)).train()
        assert sum(p.numel() for p in peer.parameters()) == describe(CONFIG).total, "the two shapes differ"
        peer.set_experts_implementation(*implementation)
        optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def loss() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return peer(input_ids=ids, labels=ids, use_cache=False).loss  # it shifts the labels itself

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    args = arguments(__doc__, rounds=5).parse_args()
    torch.set_num_threads(args.threads)
    ceiling = gemm_gflops()
    seconds, taken = alternate(build, NAMES, args.threads, args.rounds)
    ceiling = max(ceiling, gemm_gflops())

    flops = 3 * describe(CONFIG, context=LENGTH // 2).flops * TOKENS
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [["contender", "tokens/s (median)", "seconds a step, min to max", "share of the measured FP32 product rate"]]
    for name, times in seconds.items():
        rows.append([name, f"{TOKENS / median[name]:,.0f}", f"{min(times):.2f} to {max(times):.2f}",
                     f"{flops / median[name] / 1e9 / ceiling:.0%}"])
    ratios: dict[str, float] = {}
    for wanted in ("bf16", "fp32", ""):
        own, peer = (min((n for n in NAMES if n.startswith(system) and n.endswith(wanted)), key=median.__getitem__)
                     for system in ("MoE-DR", "transformers"))
        ratios[f"{wanted or 'best against best'}: {own} against {peer}"] = ratio(seconds[peer], seconds[own])

    where = machine(args.threads)
    way = f"units ({bf16_units()})" if bf16_way() == "units" else bf16_way()
    packages = ", ".join(f"{k} {v}" for k, v in versions("torch", "transformers").items())
    lines = ["# Training throughput", "", f"{where['cpu']} ({', '.join(where['units'])}), {args.threads} threads; "
             f"{packages}; {args.rounds} rounds in turn, of whose time the host took {max(taken):.1%} at most; BF16 "
             f"products of MoE-DR: {way}; FP32 matrix product in the same run: {ceiling:.0f} GFLOP/s.", "",
             table(rows), "",
             table([["comparison", "times as fast (median of the rounds' ratios)"],
                    *([k, f"{v:.2f}"] for k, v in ratios.items())])]
    write_result("train", "\n".join(lines), {
        "machine": where, "versions": versions("torch", "transformers"), "seconds": seconds, "stolen": taken,
        "ratios": ratios, "gemm_gflops": ceiling, "bf16": way})


if __name__ == "__main__":
    main()
