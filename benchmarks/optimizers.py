"""What training holds in memory and what a step of the optimizer takes, by optimizer and form of weights and moments.

    python benchmarks/optimizers.py                                       bytes, and seconds of a step
    python benchmarks/optimizers.py --learn 300 --work runs/optimizers    held-out loss after so many steps

Shape: 62.9 M parameters (preset `v3-63m` without its MTP module).

step    of all parameters, along gradients that were drawn once. Contenders take turns in processes of their own; a
        ratio is the median of the rounds'.
bytes   in a process of its own for each: two training steps of 8 x 256 random tokens, forward and backward. Weights,
        gradients, moments: the memory of these tensors. Peak: by how much the process had grown at its largest.
        The allocator gives freed memory back at once (HELD).
        Activations are FP32 in the first row, BF16 in the others, kept in FP8 where the row says so, or recomputed.
loss    the preset `small` on the domains of domains.py, a run for each form with AdamW in WORK; the same command
        continues them.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepseek import Trainer
from deepseek.config import ModelConfig
from deepseek.deepopt.optimizers import make_optimizer, narrow
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import TrainConfig
from deepseek.model import CausalLM
from deepseek.ops.native import bf16_units, bf16_way
from deepseek.ops.saved import Saver
from domains import TRAIN, add_data, data_folder, places
from harness import Worker, alternate, arguments, machine, ratio, table, versions, write_result

CONFIG = ModelConfig.preset("v3-63m").with_(num_nextn_predict_layers=0)
PEER = "torch's fused AdamW"
MUON: dict[str, Any] = {"optimizer": "muon"}
NARROW: dict[str, Any] = {"moments": "8bit", "weights": "bf16"}
CONTENDERS = {PEER: TrainConfig(), "AdamW, 8 bits": TrainConfig(moments="8bit"), "Muon": TrainConfig(**MUON),
              "Muon, 8 bits": TrainConfig(moments="8bit", **MUON), "AdamW, 8 bits, BF16 weights": TrainConfig(**NARROW),
              "Muon, 8 bits, BF16 weights": TrainConfig(**NARROW, **MUON)}
TRAINED = {f"{PEER}, all FP32": TrainConfig(precision="fp32"),
           **{name: replace(config, precision="bf16") for name, config in CONTENDERS.items()},
           **{f"{name}, FP8 activations": replace(CONTENDERS[name], precision="bf16", activations="fp8")
              for name in (PEER, "AdamW, 8 bits, BF16 weights", "Muon, 8 bits, BF16 weights")},
           **{f"{name}, recomputed": replace(CONTENDERS[name], precision="bf16", gradient_checkpointing=True)
              for name in (PEER, "AdamW, 8 bits, BF16 weights")}}
LEARNT = [name for name in TRAINED if "Muon" not in name and "recomputed" not in name
          and name != f"{PEER}, FP8 activations"]
ROUNDS = 15
MIB = 2**20
# glibc gives large tensors back at once; else the peak is that of what it keeps for later
HELD = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def new_model(config: TrainConfig) -> CausalLM:
    model = CausalLM(CONFIG).init_weights(torch.Generator().manual_seed(0))
    if config.weights == "bf16":
        narrow(model)
    return model


def build(name: str, threads: int) -> Callable[[], object]:
    """The contender's step, of a model with gradients."""
    model, draw = new_model(CONTENDERS[name]), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=draw) * 1e-3).to(p.dtype)
    return make_optimizer(model, CONTENDERS[name]).step


def resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def training(name: str, threads: int) -> Callable[[], dict[str, int]]:
    """Of one of TRAINED: a call that takes two steps and returns bytes by what they are."""
    torch.set_num_threads(threads)
    config, before = TRAINED[name], resident("VmRSS")

    def steps() -> dict[str, int]:
        model = new_model(config)
        model.compute_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        model.gradient_checkpointing = config.gradient_checkpointing
        model.saver = Saver() if config.activations == "fp8" else None
        optimizer = make_optimizer(model, config)
        ids_BT = torch.randint(CONFIG.vocab_size, (8, 257), generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            optimizer.zero_grad()
            model.loss(ids_BT[:, :-1], ids_BT[:, 1:]).total.backward()
            optimizer.step()
        weights = [*model.parameters()]
        held: dict[str, list[torch.Tensor]] = {
            "weights": [*weights], "gradients": [p.grad for p in weights if p.grad is not None],
            "moments": [t for state in optimizer.state.values() for t in state.values()]}
        return {what: sum(t.untyped_storage().nbytes() for t in tensors) for what, tensors in held.items()} | {
            "peak": resident("VmHWM") - before}

    return steps


def memory(name: str, threads: int) -> dict[str, int]:
    os.environ |= HELD
    worker = Worker(training, name, threads)
    found: dict[str, int] = worker()
    worker.stop()
    for key in HELD:
        del os.environ[key]
    return found


def learning(name: str, work: Path, data: Path, steps: int, threads: int) -> Callable[[], float]:
    """A call that trains `small` as one of TRAINED, or continues a run that is there: its held-out loss."""
    out = work / "".join(c if c.isalnum() else "-" for c in name)
    config, files = TRAINED[name], [path for each in TRAIN.values() for path in places(data, each)]
    given = {key: getattr(config, key) for key in (
        "optimizer", "moments", "weights", "precision", "activations", "gradient_checkpointing")}

    def train() -> float:
        torch.set_num_threads(threads)
        Trainer("small", out=out, steps=steps, batch_size=8, eval_every=100, save_every=25, **given).fit(files)
        return [record["eval_loss"] for record, _ in read_log(out / "log.jsonl") if "eval_loss" in record][-1]

    return train


def learnt(*args: Any) -> float:
    worker = Worker(learning, *args)
    found: float = worker()
    worker.stop()
    return found


def main() -> None:
    parser = arguments(__doc__, ROUNDS)
    add_data(parser)
    parser.add_argument("--learn", type=int, metavar="STEPS", help="measure held-out loss alone, after so many steps")
    parser.add_argument("--work", type=Path, default=Path("runs/optimizers"), help="folder of these runs")
    args = parser.parse_args()
    if args.learn:
        data, sample = data_folder(args.data)
        losses = {name: learnt(name, args.work, data, args.learn, args.threads) for name in LEARNT}
        of = losses[LEARNT[0]]
        rows = [["training", f"held-out loss after {args.learn} steps", "against FP32"],
                *([name, f"{loss:.4f}", f"{loss / of - 1:+.2%}"] for name, loss in losses.items())]
        where, packages = machine(args.threads), versions("torch")
        text = "\n".join([
            "# Losses of training in fewer bytes", "", f"{where['cpu']} ({', '.join(where['units'])}), {args.threads} "
            f"threads, torch {packages['torch']}; `small`, 8 x 256 tokens a step, BF16 products: {bf16_way()} "
            f"{bf16_units()}.", "", table(rows)])
        write_result("optimizers_loss", text, {"machine": where, "versions": packages, "losses": losses,
                                               "steps": args.learn}, keep=not sample and args.learn >= 300)
        return
    count = sum(p.numel() for p in CausalLM.on_meta(CONFIG).parameters())
    held = {name: memory(name, args.threads) for name in TRAINED}
    kinds = ("weights", "gradients", "moments")
    rows = [["training", *(f"{kind}, MiB" for kind in kinds), "bytes a parameter", "peak, MiB"]]
    rows += [[name, *(f"{found[kind] / MIB:,.1f}" for kind in kinds),
              f"{sum(found[kind] for kind in kinds) / count:.2f}", f"{found['peak'] / MIB:,.0f}"]
             for name, found in held.items()]
    print(table(rows), flush=True)
    seconds, taken = alternate(build, tuple(CONTENDERS), args.threads, args.rounds)
    steps = [["optimizer", "ms a step: median, least to most", f"times {PEER}"]]
    for name, times in seconds.items():
        median, least, most = (1e3 * f(times) for f in (statistics.median, min, max))
        steps.append([name, f"{median:,.0f}, {least:,.0f} to {most:,.0f}", f"{ratio(times, seconds[PEER]):.2f}"])
    where, packages = machine(args.threads), versions("torch")
    text = "\n".join([
        "# Memory of training, and steps of the optimizers", "", f"{where['cpu']} ({', '.join(where['units'])}), "
        f"{args.threads} threads, Python {where['python']}, torch {packages['torch']}; {count / 1e6:.1f} M parameters; "
        f"{args.rounds} rounds in turn, of whose time the host took {max(taken):.1%} at most.", "", table(steps), "",
        "Two steps of 8 x 256 tokens:", "", table(rows)])
    write_result("optimizers", text, {"machine": where, "versions": packages, "seconds": seconds, "stolen": taken,
                                      "bytes": held, "parameters": count}, keep=args.rounds >= ROUNDS)


if __name__ == "__main__":
    main()
