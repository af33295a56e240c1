"""Tuning beside full tuning, and beside peft on the same checkpoint: tokens per second and peak memory.

A checkpoint of the preset `v3-63m` (random weights: speed and memory do not depend on them), FP32, batches of 8 x 256.
One unit of work is one optimizer step: loss, backward pass, AdamW.

    full       every parameter but the router
    experts    ESFT: four of the 32 experts of every layer
    LoRA       rank 16 on q_proj
    LoRA +     the same and four experts of every layer, which peft cannot express
    peft       the first LoRA through transformers and peft, in both of transformers' forms of the experts

Speed: contenders take turns (harness.py). Memory: peak resident memory of a process that does nothing else, less that
of one that only loads the libraries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import alternate, arguments, machine, ratio, table, versions, write_result

BATCH, SEQ, EXPERTS = 8, 256, range(4)
OURS = ("full", "experts", "LoRA", "LoRA + experts")
PEFT = ("peft LoRA, eager", "peft LoRA, grouped_mm")
FOLDER = Path(tempfile.gettempdir()) / "moe-dr-tune-benchmark"


def checkpoint() -> None:
    from deepseek.checkpoint import save_model
    from deepseek.config import ModelConfig
    from deepseek.model import CausalLM

    config = ModelConfig.preset("v3-63m").with_(num_nextn_predict_layers=0)
    save_model(CausalLM(config).init_weights(torch.Generator().manual_seed(0)), FOLDER)


def ours(name: str) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    from deepseek import LoRAAdapter
    from deepseek.checkpoint import load_model
    from deepseek.model.adapter import TunedExperts

    model = load_model(FOLDER, torch.float32).train()
    model.requires_grad_(name == "full")
    for block in model.moe_blocks().values():
        block.gate.weight.requires_grad_(False)
        if name == "experts":
            block.experts = TunedExperts(block.experts, EXPERTS)  # type: ignore[assignment]
    if name.startswith("LoRA"):
        chosen = [f"{layer}.{e}" for layer in model.config.moe_layers for e in EXPERTS] if "experts" in name else []
        LoRAAdapter(r=16, target_modules=["q_proj"], experts=chosen).attach(model)
    return model, lambda ids: model.loss(ids[:, :-1], ids[:, 1:]).total


def peft(name: str) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    base.set_experts_implementation(name.rpartition(" ")[2])
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj"])).train()
    return model, lambda ids: model(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss


def build(name: str, threads: int) -> Callable[[], object]:
    model, loss = ours(name) if name in OURS else peft(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        ids = torch.randint(16000, (BATCH, SEQ + 1), generator=generator)
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(name: str, threads: int) -> float:
    """MB of resident memory at the peak of three steps, in a process of its own; "" loads the libraries alone."""
    code = ("import json, resource, sys, torch; sys.path.insert(0, sys.argv[1]); import tune; "
            "torch.set_num_threads(int(sys.argv[3])); name = sys.argv[2]\n"
            "if name:\n    step = tune.build(name, int(sys.argv[3])); [step() for _ in range(3)]\n"
            "else:\n    import deepseek.checkpoint, peft, transformers\n"
            "print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))")
    out = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), name, str(threads)], check=True,
                         capture_output=True, text=True).stdout
    return float(json.loads(out.strip().splitlines()[-1]))


def main() -> None:
    args = arguments(__doc__, rounds=5).parse_args()
    checkpoint()
    names = (*OURS, *PEFT)
    idle = peak("", args.threads)
    memory = {name: peak(name, args.threads) - idle for name in names}
    seconds, shares = alternate(build, names, args.threads, args.rounds)
    trained: dict[str, int] = {}
    for name in names:
        model, _ = ours(name) if name in OURS else peft(name)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = {name: BATCH * SEQ / sorted(took)[len(took) // 2] for name, took in seconds.items()}
    fastest = max(PEFT, key=lambda name: rate[name])
    rows: list[list[Any]] = [["way", "tokens/s", "against full", "peak memory above idle, MB", "trained parameters"],
                             *([name, f"{rate[name]:,.0f}", f"{ratio(seconds['full'], seconds[name]):.2f}x",
                                f"{memory[name]:,.0f}", f"{trained[name]:,}"] for name in names)]
    where, version = machine(args.threads), versions("torch", "peft", "transformers")
    gain = ratio(seconds[fastest], seconds["LoRA"])
    text = ["# Tuning: speed and memory", "",
            f"Preset v3-63m without MTP, FP32, steps of {BATCH} x {SEQ} tokens; {where['cpu']}, {args.threads} "
            f"threads, torch {version['torch']}, peft {version['peft']}, transformers {version['transformers']}; the "
            f"host took {max(shares):.1%} at most.", "", table(rows), "",
            f"LoRA against the faster of peft's ({fastest}): {gain:.2f}x the speed, "
            f"{memory['LoRA'] / memory[fastest]:.2f} of its memory."]
    write_result("tune", "\n".join(text), {"machine": where, "versions": version, "seconds": seconds,
                                           "memory_mb": memory, "trained": trained, "stolen": shares})


if __name__ == "__main__":
    main()
