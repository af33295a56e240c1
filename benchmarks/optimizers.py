"""The optimizer's step: Muon and moments of 8 bits beside torch's fused AdamW; its time, and the bytes of its state.

Shape: 62.9 M parameters (preset `v3-63m` without its MTP module). Gradients are drawn once; a unit of work is one step
of all parameters. Contenders take turns in processes of their own; a ratio is the median of the rounds'. State: the
memory of the tensors that a step leaves, and by how much the process grew in its first step (scratch included).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek.config import ModelConfig
from deepseek.deepopt.optimizers import make_optimizer
from deepseek.deepopt.settings import TrainConfig
from deepseek.model import CausalLM
from harness import Worker, alternate, arguments, machine, ratio, table, versions, write_result

CONFIG = ModelConfig.preset("v3-63m").with_(num_nextn_predict_layers=0)
PEER = "torch's fused AdamW"
CONTENDERS = {PEER: TrainConfig(), "AdamW, 8 bits": TrainConfig(moments="8bit"),
              "Muon": TrainConfig(optimizer="muon"), "Muon, 8 bits": TrainConfig(optimizer="muon", moments="8bit")}
ROUNDS = 15


def ready(name: str) -> torch.optim.Optimizer:
    """The contender, of a model with gradients."""
    draw = torch.Generator().manual_seed(0)
    model = CausalLM(CONFIG).init_weights(draw)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw) * 1e-3
    return make_optimizer(model, CONTENDERS[name])


def build(name: str, threads: int) -> Callable[[], object]:
    return ready(name).step


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def first_step(name: str, threads: int) -> Callable[[], tuple[int, int]]:
    """Of the contender: a call that takes its first step; returns bytes of the state's tensors, and of the growth."""
    torch.set_num_threads(threads)
    optimizer = ready(name)

    def step() -> tuple[int, int]:
        before = resident()
        optimizer.step()
        tensors = (t for state in optimizer.state.values() for t in state.values())
        return sum(t.untyped_storage().nbytes() for t in tensors), resident() - before

    return step


def memory(name: str, threads: int) -> tuple[int, int]:
    worker = Worker(first_step, name, threads)
    found: tuple[int, int] = worker()
    worker.stop()
    return found


def main() -> None:
    args = arguments(__doc__, ROUNDS).parse_args()
    count = sum(p.numel() for p in CausalLM.on_meta(CONFIG).parameters())
    held = {name: memory(name, args.threads) for name in CONTENDERS}
    seconds, taken = alternate(build, tuple(CONTENDERS), args.threads, args.rounds)

    rows = [["optimizer", "ms a step: median, least to most", f"times {PEER}", "state, MB", "bytes a parameter",
             "growth in the first step, MB"]]
    for name, times in seconds.items():
        median, least, most = (1e3 * f(times) for f in (statistics.median, min, max))
        state, grown = held[name]
        rows.append([name, f"{median:,.0f}, {least:,.0f} to {most:,.0f}", f"{ratio(times, seconds[PEER]):.2f}",
                     f"{state / 1e6:,.1f}", f"{state / count:.2f}", f"{grown / 1e6:,.0f}"])
    where, packages = machine(args.threads), versions("torch")
    text = "\n".join([
        "# Steps of the optimizers", "", f"{where['cpu']} ({', '.join(where['units'])}), {args.threads} threads, "
        f"Python {where['python']}, torch {packages['torch']}; {count / 1e6:.1f} M parameters; {args.rounds} rounds in "
        f"turn, of whose time the host took {max(taken):.1%} at most.", "", table(rows)])
    write_result("optimizers", text, {"machine": where, "versions": packages, "seconds": seconds, "stolen": taken,
                                      "bytes": held, "parameters": count}, keep=args.rounds >= ROUNDS)


if __name__ == "__main__":
    main()
