"""Balance without an auxiliary loss: MaxVio with and without the gate bias, on skewed text.

The text is skewed on purpose: nine documents in ten are server log lines of a few patterns, one in ten is a source file
of Python's library. Two runs of the preset `nano` (without MTP) differ in `bias_speed` alone; the sequence-wise balance
loss is off in both. Recorded: MaxVio at every step, and the held-out loss, which the bias must not harm.
"""

from __future__ import annotations

import io
import random
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from deepseek.config import ModelConfig
from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.plot import smooth
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import TrainConfig
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from harness import RESULTS, arguments, machine, table, versions, write_result

RUNS = {"without": 0.0, "with": 1e-2}  # bias_speed; V3's 1e-3 is for tens of thousands of steps


def skewed_text() -> list[Document]:
    draw = random.Random(0)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    documents = [Document(path.read_text(encoding="utf-8")[:4000], path.name) for path in library]
    for i in range(9 * len(documents)):
        lines = [f"INFO request {draw.randrange(100)} served in {draw.randrange(50)} ms" for _ in range(80)]
        documents.append(Document("\n".join(lines), f"log {i}"))
    return documents


def run(name: str, speed: float, data: TokenShards, settings: TrainConfig, folder: Path) -> list[dict]:
    config = ModelConfig.preset("nano").with_(num_nextn_predict_layers=0)
    model = CausalLM(config).init_weights(torch.Generator().manual_seed(0))
    TrainingLoop(model, data, replace(settings, bias_speed=speed), folder / name).run()
    return [record for record, _ in read_log(folder / name / "log.jsonl")]


def picture(curves: dict[str, list[float]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (name, curve), colour in zip(curves.items(), ("#c8501e", "#1f4e8c"), strict=True):
        axis.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.3, linewidth=0.8)
        axis.plot(range(1, len(curve) + 1), smooth(curve), color=colour, linewidth=2, label=f"{name} the gate bias")
    axis.set(xlabel="step", ylabel="MaxVio, mean over layers", ylim=(0, None))
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = TrainConfig(steps=args.steps, batch_size=8, seq_len=128, lr=3e-3, balance_weight=0.0, eval_every=50,
                           save_every=10**6, precision="fp32")
    documents = skewed_text()
    tokenizer = Tokenizer.train((d.text for d in documents), 4096)
    with tempfile.TemporaryDirectory() as folder:
        data = pack(documents, tokenizer, Path(folder) / "tokens", valid_fraction=0.05)
        logs = {name: run(name, speed, data, settings, Path(folder)) for name, speed in RUNS.items()}
    curves = {name: [r["max_vio"] for r in log if "max_vio" in r] for name, log in logs.items()}
    tail = {name: sum(curve[-50:]) / 50 for name, curve in curves.items()}
    held_out = {name: [r["eval_loss"] for r in log if "eval_loss" in r][-1] for name, log in logs.items()}
    rows = [["gate bias", "MaxVio, mean of the last 50 steps", "held-out loss"],
            *([name, f"{tail[name]:.3f}", f"{held_out[name]:.4f}"] for name in RUNS)]
    where = machine(args.threads)
    text = ["# Bias balancing on skewed text", "",
            f"Preset nano, {args.steps} steps of 8 x 128 tokens, speeds {RUNS}; {where['cpu']}, "
            f"torch {versions('torch')['torch']}.", "", table(rows), "",
            f"The bias divides MaxVio by {tail['without'] / tail['with']:.1f}."]
    path = write_result("balance", "\n".join(text), {"machine": where, "max_vio": curves, "held_out": held_out})
    (RESULTS / f"{path.stem}.png").write_bytes(picture(curves))


if __name__ == "__main__":
    main()
