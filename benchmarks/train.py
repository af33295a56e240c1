"""Training tokens a second: MoE-DR beside transformers' DeepseekV3, same shape, same step, same run.

Shape: 62.9 M parameters (preset `mini` without its MTP module): hidden 384, 8 layers, 32 experts of 192, top-4 of 8
groups, vocabulary 16384. A step: 16 sequences of 256 tokens, forward, loss, backward, clipping, fused AdamW.
transformers runs with each of its experts implementations; the faster one counts. Both precisions are measured:

    bf16   transformers under torch.autocast(bfloat16), its way; MoE-DR with BF16 activations over FP32 weights
    fp32   everything FP32

On a CPU without BF16 instructions BF16 buys nothing: fp32 is then the fastest form of both, and the line
"best against best" is the fair summary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from deepseek.config import ModelConfig
from deepseek.deepopt.settings import TrainConfig
from deepseek.deepopt.trainer import make_optimizer
from deepseek.info import describe
from deepseek.model import CausalLM
from harness import alternate, arguments, gemm_gflops, machine, ratio, table, versions, write_result

BATCH, LENGTH = 16, 256
TOKENS = BATCH * LENGTH
IMPLEMENTATIONS = ("grouped_mm", "eager")


def ours(config: ModelConfig, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[], None]]:
    model = CausalLM(config).init_weights(torch.Generator().manual_seed(0)).train()
    optimizer = make_optimizer(model, TrainConfig())

    def step(dtype: torch.dtype) -> None:
        model.compute_dtype = dtype
        model.loss(ids, labels).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"MoE-DR bf16": lambda: step(torch.bfloat16), "MoE-DR fp32": lambda: step(torch.float32)}


def theirs(config: ModelConfig, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[], None]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = config.to_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys)).train()
    assert sum(p.numel() for p in model.parameters()) == describe(config).total, "the two shapes differ"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(implementation: str, bf16: bool) -> None:
        model.set_experts_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {f"transformers {name} {'bf16' if bf16 else 'fp32'}": (lambda n=name, b=bf16: step(n, b))
            for bf16 in (True, False) for name in IMPLEMENTATIONS}


def main() -> None:
    args = arguments(__doc__, rounds=5).parse_args()
    torch.set_num_threads(args.threads)
    config = ModelConfig.preset("mini").with_(num_nextn_predict_layers=0)
    text = torch.randint(0, config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    ids, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    ceiling = gemm_gflops(args.threads)
    # transformers shifts the labels itself: it gets the ids
    seconds = alternate(ours(config, ids, labels) | theirs(config, ids, ids), args.rounds)
    ceiling = max(ceiling, gemm_gflops(args.threads))

    flops = 3 * describe(config, context=LENGTH // 2).flops * TOKENS
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [["contender", "tokens/s (median)", "seconds a step, min to max", "share of the measured FP32 GEMM rate"]]
    for name, times in seconds.items():
        rows.append([name, f"{TOKENS / median[name]:,.0f}", f"{min(times):.2f} to {max(times):.2f}",
                     f"{flops / median[name] / 1e9 / ceiling:.0%}"])
    ratios: dict[str, float] = {}
    for precision in ("bf16", "fp32"):
        peers = [n for n in seconds if n.startswith("transformers") and n.endswith(precision)]
        peer = min(peers, key=median.__getitem__)
        ratios[f"{precision}: MoE-DR against {peer}"] = ratio(seconds[peer], seconds[f"MoE-DR {precision}"])
    best_peer = min((n for n in seconds if n.startswith("transformers")), key=median.__getitem__)
    best_own = min((n for n in seconds if n.startswith("MoE-DR")), key=median.__getitem__)
    ratios[f"best against best: {best_own} against {best_peer}"] = ratio(seconds[best_peer], seconds[best_own])

    where = machine(args.threads)
    packages = ", ".join(f"{k} {v}" for k, v in versions("torch", "transformers").items())
    lines = ["# Training throughput", "", f"{where['cpu']} ({', '.join(where['units'])}), {args.threads} threads; "
             f"{packages}; {args.rounds} rounds in turn; FP32 matrix product in the same run: {ceiling:.0f} GFLOP/s.",
             "", table(rows), "",
             table([["comparison", "times as fast (median of the rounds' ratios)"],
                    *([k, f"{v:.2f}"] for k, v in ratios.items())])]
    write_result("train", "\n".join(lines), {"machine": where, "versions": versions("torch", "transformers"),
                                             "seconds": seconds, "ratios": ratios, "gemm_gflops": ceiling})


if __name__ == "__main__":
    main()
