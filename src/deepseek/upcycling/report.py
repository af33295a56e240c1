"""What growing experts gained: loss by name, routing accuracy; a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atlas.plot import save_png
from ..deepopt.optimizers import trained
from ..files import write_json

if TYPE_CHECKING:
    from .loop import GrowTrainer
    from .settings import GrowConfig
    from .streams import NamedText


@dataclass(frozen=True)
class GrowReport:
    """Figures of a run. before, after: nats a token on held-out records, by name; accuracy: routing accuracy by name;
    tokens: shown in training, by name ("" for text of none); parameters: trained, and of the whole model; seconds: of
    all processes of the run."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    accuracy: Mapping[str, float]
    tokens: Mapping[str, int]
    steps: int
    trained_parameters: int
    all_parameters: int
    active_parameters: int
    seconds: float

    @classmethod
    def of(cls, trainer: GrowTrainer, before: Mapping[str, Any], config: GrowConfig, text: NamedText) -> GrowReport:
        after = trainer.last if trainer.last.get("step") == trainer.step else trainer.evaluate()
        parameters = sum(p.numel() for p in trained(trainer.model).values())
        total = sum(p.numel() for p in trainer.model.parameters())
        return cls(
            before["loss_of"], after["loss_of"], after["routing_accuracy_of"],
            text.tokens(config.steps, config.rows, config.seq_len), config.steps, parameters, total,
            total - parameters + parameters // len(text.experts),
            round(trainer.worked(), 1))

    def change(self, name: str) -> float:
        """Of the perplexity, as a share of the one before."""
        return math.exp(self.after[name] - self.before[name]) - 1

    def evidence(self, name: str) -> dict[str, float]:
        return {"perplexity_before": round(math.exp(self.before[name]), 4),
                "perplexity_after": round(math.exp(self.after[name]), 4)} | (
            {"routing_accuracy": round(self.accuracy[name], 4)} if name in self.accuracy else {})

    def card(self, name: str) -> dict[str, Any]:
        return {"summary": f"perplexity {self.change(name):+.1%} on held-out records", "steps": self.steps,
                "tokens": self.tokens[name], "hours": round(self.seconds / 3600, 2)}

    def table(self) -> str:
        width = max(map(len, self.after))
        lines = [f"{'':{width}}  {'tokens':>9}  {'before':>8} {'after':>8} {'perplexity':>10}  routing"]
        for name, loss in self.after.items():
            lines.append(f"{name:{width}}  {self.tokens[name]:>9,}  {self.before[name]:8.4f} {loss:8.4f} "
                         f"{self.change(name):>+10.1%}  {self.accuracy.get(name, math.nan):7.1%}")
        share = self.active_parameters / self.all_parameters
        lines.append(f"{self.trained_parameters:,} parameters trained, those of the base unchanged, by SHA-256; a "
                     f"token uses {share:.0%} of {self.all_parameters:,}; {self.seconds:,.0f} s")
        return "\n".join(lines)

    def save(self, out: Path) -> None:
        """OUT/report.json and names.png."""
        from matplotlib.figure import Figure

        write_json(out / "report.json", asdict(self))
        figure = Figure(figsize=(7.5, 0.5 + 0.45 * len(self.after)), dpi=110, layout="constrained")
        axis = figure.subplots()
        names = list(self.after)
        axis.barh(names, [math.exp(self.before[name]) for name in names], color="0.85", label="before")
        axis.barh(names, [math.exp(self.after[name]) for name in names], height=0.45, color="tab:blue", label="after")
        axis.invert_yaxis()
        axis.set_xlabel("perplexity of held-out records")
        axis.legend(frameon=False)
        save_png(figure, out / "names.png")
