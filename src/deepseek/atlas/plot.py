"""Plots of layers x experts: their common frame, and the map of named groups."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically
from ..ids import ExpertId
from .atlas import Atlas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# told apart with any colour vision, on white and on black
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#009988")
FAINTEST = 0.35  # strength of a group's weakest expert
STRIPES = 12  # pixels a cell, to share between groups


def frame(layers: Sequence[int], experts: int) -> tuple[Figure, Axes]:
    """A figure with one axis, sized and ticked for layers x experts cells; at most about 2,000 x 1,600 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(layers)
    cell = min(0.55, max(11.5 / experts, 0.04))  # inches; few experts get room for figures
    height = min(0.45, max(cell, 0.12))
    figure = Figure(figsize=(max(cell * experts + 2.2, 7.0), height * rows + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, experts, max(1, experts // 32)))
    step = 1 if rows <= 32 else 4
    axis.set_yticks(range(0, rows, step), [str(layer) for layer in layers[::step]])
    return figure, axis


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def colours(count: int) -> list[str]:
    """Return `count` colours, `#rrggbb`."""
    more = [colorsys.hls_to_rgb(0.09 + i * 0.618 % 1, 0.35, 0.7) for i in range(max(0, count - len(COLOURS)))]
    return [*COLOURS, *("#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in more)][:count]


def expert_owners(atlas: Atlas) -> dict[ExpertId, list[tuple[int, float]]]:
    """Map each named expert to its groups, the strongest first: (index of the group, strength).

    Strength is 1 for a group's best expert of the layer and FAINTEST where its score would be 0; 1 without scores.
    """
    found: dict[ExpertId, list[tuple[int, float]]] = {}
    for place, group in enumerate(atlas.groups):
        scores = dict(zip(group.experts, group.scores or [1.0] * len(group.experts), strict=True))
        best: dict[int, float] = {}
        for expert, score in scores.items():
            best[expert.layer] = max(best.get(expert.layer, 0.0), score)
        for expert, score in scores.items():
            share = score / best[expert.layer] if best[expert.layer] else 1.0
            found.setdefault(expert, []).append((place, FAINTEST + (1 - FAINTEST) * share))
    return {expert: sorted(those, key=lambda claim: -claim[1]) for expert, those in found.items()}


def save_group_map(atlas: Atlas, path: str | Path) -> None:
    """Draw layers x experts as a PNG, coloured by group, the stronger the higher the score; an expert of several groups
    is striped."""
    import numpy as np
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    layers, experts = atlas.shape.layers, atlas.shape.experts
    palette = colours(len(atlas))
    image = np.full((len(layers), experts * STRIPES, 3), 0.94)
    for (layer, index), those in expert_owners(atlas).items():
        cuts = np.linspace(0, STRIPES, len(those) + 1).round().astype(int) + index * STRIPES
        for (place, strength), begin, end in zip(those, cuts, cuts[1:], strict=False):
            image[layers.index(layer), begin:end] = 1 - strength * (1 - np.array(to_rgb(palette[place])))
    figure, axis = frame(layers, experts)
    axis.imshow(image, extent=(-0.5, experts - 0.5, len(layers) - 0.5, -0.5), aspect="auto", interpolation="nearest")
    if experts <= 64:
        axis.set_xticks([e - 0.5 for e in range(1, experts)], minor=True)
        axis.set_yticks([row - 0.5 for row in range(1, len(layers))], minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="minor", length=0)
    axis.set_title("Experts by name: darker is a higher score, stripes are shared", fontsize=11)
    figure.legend(handles=[Patch(color=colour, label=f"{group.name} ({len(group.experts)})")
                           for colour, group in zip(palette, atlas.groups, strict=True)],
                  loc="outside lower center", ncols=min(4, max(len(atlas), 1)), frameon=False, fontsize=9)
    save_png(figure, path)
