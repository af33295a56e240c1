"""The curve of a run as a PNG: loss above, balance of the experts below."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ..files import write_atomically


def plot_run(log: Path, picture: Path) -> None:
    """Plot log.jsonl; the file is written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    train = [r for r in records if "loss" in r]
    held_out = [r for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [r["step"] for r in train]
    loss = [r["loss"] for r in train]
    top.plot(steps, loss, color="#9db8d9", linewidth=0.8, label="training, each step")
    top.plot(steps, smooth(loss), color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    if held_out:
        top.plot([r["step"] for r in held_out], [r["eval_loss"] for r in held_out], "o-", color="#c8501e",
                 markersize=4, label=f"held out (last {held_out[-1]['eval_loss']:.3f})")
    if general := [r for r in held_out if "general_loss" in r]:
        top.plot([r["step"] for r in general], [r["general_loss"] for r in general], "s--", color="#7a4da8",
                 markersize=4, label=f"general text (last {general[-1]['general_loss']:.3f})")
    top.set_ylabel("loss (nats a token)")
    top.legend(frameon=False)
    bottom.plot(steps, [r["max_vio"] for r in train], color="#b9c9a5", linewidth=0.8)
    bottom.plot(steps, smooth([r["max_vio"] for r in train]), color="#4d7a1f", linewidth=1.8)
    bottom.set_ylabel("MaxVio")
    bottom.set_xlabel("step")
    bottom.set_ylim(bottom=0)
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(picture, buffer.getvalue())


def smooth(values: list[float], window: int = 20) -> list[float]:
    """Trailing mean over up to `window` values."""
    out: list[Any] = []
    total = 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out
