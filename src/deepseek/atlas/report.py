"""Formats an atlas as text and as a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from textwrap import wrap

from ..ids import ExpertId
from .atlas import MEASURED, Atlas, Measurement, NamedGroup, RejectedGroup, count
from .plot import colours, expert_owners

HEAD = ("name", "kind", "experts", "a layer", "slots", "others", "weight", "others", "even", "halves", "ranks", "p")
LEGEND = ("slots, weight: coverage of held-out text of the name's own, beside the mean over the others' and what even "
          "routing gives; halves, ranks: Jaccard index and rank correlation between random halves; p: of chance, "
          "adjusted for the number of names")
_KEYS = (("coverage_slots", ".1%"), ("coverage_slots_others", ".1%"), ("coverage_weight", ".1%"),
         ("coverage_weight_others", ".1%"), ("coverage_uniform", ".1%"), ("stability_jaccard", ".2f"),
         ("stability_rank", ".2f"), ("p_adjusted", ".4f"))


def table(atlas: Atlas) -> str:
    """Format the groups with their evidence, the rejected ones, and the overlap of every two names."""
    lines = [_title(atlas)]
    if atlas.groups:
        lines += [*_aligned([HEAD, *map(_row, atlas.groups)]), *_other_evidence(atlas), "", *wrap(LEGEND, 110)]
    if len(atlas) > 1:
        overlap = atlas.overlap()
        lines += ["", "overlap (Jaccard)",
                  *_aligned([("", *atlas), *((a, *(f"{overlap[a][b]:.2f}" for b in atlas)) for a in atlas)])]
    if atlas.refused:
        lines += ["", *(f"refused: {rejected.name}: {rejected.reason}" for rejected in atlas.refused)]
    return "\n".join(lines)


def _title(atlas: Atlas) -> str:
    return f"{len(atlas)} named groups over {atlas.shape}"


def _row(group: NamedGroup) -> tuple[str, ...]:
    sizes = [len(experts) for experts in group.experts.by_layer().values()]
    a_layer = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)}-{max(sizes)}"
    figures = (format(group.evidence[key], form) if key in group.evidence else "-" for key, form in _KEYS)
    return group.name, group.kind, str(len(group.experts)), a_layer, *figures


def _other_evidence(atlas: Atlas) -> list[str]:
    """What there is beside the table: how much text was measured; of built-in names, what their training wrote down."""
    lines = []
    for group in atlas.groups:
        measured = [count(int(group.evidence[key]), key[:-1]) for key in ("documents", "tokens")
                    if key in group.evidence and group.measured]
        other = [f"{key} {value:.4g}" for key, value in group.evidence.items()
                 if group.kind == "built-in" and not (group.measured and key in MEASURED)]
        if measured or other:
            lines.append(f"{group.name}: {', '.join([*measured, *other])}")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                  zip(row[1:], widths[1:], strict=True))]).rstrip() for row in rows]


# ---- a page -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2330; --faint: #667; --line: #d8dce4 }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --text: #e4e7ec; --faint: #9aa3b2; --line: #333a45 } }
body { margin: 2rem auto; padding: 0 1.2rem; max-width: 76rem; background: var(--back); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p { color: var(--faint) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left }
i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em }
code { font-size: .85em; overflow-wrap: anywhere }
"""
CELL, GAP, LEFT, TOP = 14, 2, 28, 16


def page(atlas: Atlas) -> str:
    """Format the same and a map as one HTML document without scripts or other files, light and dark."""
    palette = dict(zip(atlas.names, colours(len(atlas)), strict=True))
    parts = [f"<h1>Experts by name</h1><p>{_title(atlas)}</p>"]
    if atlas.groups:
        named = [[_mark(group.name, palette), *map(html.escape, _row(group)[1:])] for group in atlas.groups]
        others = (f"<p>{html.escape(line)}</p>" for line in _other_evidence(atlas))
        parts += [_table(HEAD, named), f"<p>{LEGEND}</p>", *others,
                  "<h2>Map</h2><p>Layers by experts; the stronger the colour, the higher the score. An expert of "
                  "several names is striped. Point at a cell for figures.</p>", _map(atlas, palette)]
    if len(atlas) > 1:
        overlap = atlas.overlap()
        rows = [[_mark(a, palette), *(f"{overlap[a][b]:.2f}" for b in atlas)] for a in atlas]
        parts += ["<h2>Overlap (Jaccard)</h2>", _table(("", *map(html.escape, atlas)), rows)]
    if atlas.refused:
        parts += ["<h2>Refused</h2>", *(f"<p><b>{html.escape(rejected.name)}</b>: {html.escape(rejected.reason)}</p>"
                                        for rejected in atlas.refused)]
    items: tuple[NamedGroup | RejectedGroup, ...] = (*atlas.groups, *atlas.refused)
    if measured := [(item.name, item.measured) for item in items if item.measured is not None]:
        parts += ["<h2>How it was measured</h2>", *(_measurement(name, how) for name, how in measured)]
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>Experts by name</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n")


def _mark(name: str, palette: dict[str, str]) -> str:
    return f"<i style='background:{palette[name]}'></i>{html.escape(name)}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table></div>"


def _map(atlas: Atlas, palette: dict[str, str]) -> str:
    shape, fills, claimed = atlas.shape, list(palette.values()), expert_owners(atlas)
    scores = [dict(zip(group.experts, group.scores, strict=False)) for group in atlas.groups]
    step = CELL + GAP
    every = max(1, shape.experts // 32)
    out = [f"<text x={LEFT + e * step + CELL / 2} y=10 text-anchor=middle>{e}</text>"
           for e in range(0, shape.experts, every)]
    for row, layer in enumerate(shape.layers):
        y = TOP + row * step
        out.append(f"<text x={LEFT - 6} y={y + 11} text-anchor=end>{layer}</text>")
        for e in range(shape.experts):
            expert, x = ExpertId(layer, e), LEFT + e * step
            those = claimed.get(expert)
            if those is None:
                out.append(f"<rect x={x} y={y} width={CELL} height={CELL} fill-opacity=.08 />")
                continue
            width = CELL / len(those)
            says = ", ".join(atlas.names[g] + (f" {scores[g][expert]:.4f}" if scores[g] else "") for g, _ in those)
            out += [f"<g><title>layer {layer}, expert {e}: {html.escape(says)}</title>",
                    *(f"<rect x={x + i * width:.2f} y={y} width={width:.2f} height={CELL} fill='{fills[g]}' "
                      f"fill-opacity={strength:.2f} />" for i, (g, strength) in enumerate(those)), "</g>"]
    size = LEFT + shape.experts * step, TOP + len(shape.layers) * step
    style = "role=img fill=currentColor font-size=9 font-family=sans-serif"
    return f"<div class=wide><svg width={size[0]} height={size[1]} {style}>{''.join(out)}</svg></div>"


def _measurement(name: str, how: Measurement) -> str:
    files = ", ".join(html.escape(file) + (f" <code>{digest}</code>" if digest else "") for file, digest in how.files)
    others = f", compared with {html.escape(', '.join(how.compared_with))}" if how.compared_with else ""
    return (f"<p><b>{html.escape(name)}</b>: {how.score} scores, threshold {how.threshold}, {how.tokens:,} tokens in "
            f"windows of {how.seq_len}, seed {how.seed}{others}; {files}</p>")
