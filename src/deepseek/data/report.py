"""What is in a folder of records: counts, lengths, languages, complexity and label balance per expert, as text for a
terminal, as JSON, and as one HTML page with inline SVG that loads nothing from elsewhere.

Beside the records the report tells what earlier steps did, where their folders lie next to that of the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..domain import language_warning
from ..files import to_json
from .reader import ReadReport
from .records import record_files
from .stage import StageResult, about, input_fingerprint, run_stage

NONE = "unlabelled"
STEPS = ("validate", "dedup", "label", "split", "pack")
BINS = 16  # of text lengths, by powers of two; the last one is open
KINDS = ("given", "rules", "classifier", NONE)


def report(source: str | Path, out: str | Path) -> StageResult:
    """Write report.txt, report.html and report.json about the records of `source`."""
    before = {name: step["counts"] for name in STEPS if (step := about(Path(source).parent / name))}

    def work(folder: Path) -> dict[str, Any]:
        found = {"experts": measure(source), "steps": before}
        (folder / "report.json").write_text(to_json(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "report.txt").write_text(as_text(found) + "\n", encoding="utf-8")
        (folder / "report.html").write_text(as_html(found), encoding="utf-8")
        return {"records": sum(one["records"] for one in found["experts"].values()),
                "experts": {name: one["records"] for name, one in found["experts"].items()}}

    return run_stage("report", out, [input_fingerprint(source), before], work)


def measure(source: str | Path) -> dict[str, dict[str, Any]]:
    """{expert: its numbers}, the largest first, those without a label last."""
    import numpy as np
    import polars as pl

    sizes: dict[str, list[np.ndarray]] = {}
    tallies: dict[str, dict[str, Counter[str]]] = {}
    for path in record_files(source):
        side = path.parent.name if path.parent.name in ("train", "valid") else "all"
        table = pl.read_parquet(path, columns=["text", "turns", "answer_at", "expert", "label_source", "language",
                                               "complexity"]).with_columns(
            pl.col("expert").fill_null(NONE), size=pl.col("text").str.len_chars(), side=pl.lit(side),
            label_source=pl.col("label_source").fill_null(NONE), complexity=pl.col("complexity").fill_null("not given"),
            form=pl.when(pl.col("turns").is_not_null()).then(pl.lit("conversation"))
            .when(pl.col("answer_at").is_not_null()).then(pl.lit("question and answer")).otherwise(pl.lit("text")),
        ).drop("text", "turns", "answer_at")
        for (name,), part in table.partition_by("expert", as_dict=True).items():
            sizes.setdefault(str(name), []).append(part["size"].to_numpy())
            tally = tallies.setdefault(str(name), {})
            for column in ("label_source", "language", "complexity", "form", "side"):
                tally.setdefault(column, Counter()).update(
                    {str(key): count for key, count in part.group_by(column).len().iter_rows()})
    out = {}
    for name in sorted(sizes, key=lambda name: (name == NONE, -sum(map(len, sizes[name])), name)):
        size = np.concatenate(sizes[name])
        bins = np.bincount(np.minimum(np.log2(np.maximum(size, 1)).astype(int), BINS - 1), minlength=BINS)
        quarter, median, most = (int(q) for q in np.quantile(size, [0.25, 0.5, 0.95]))
        out[name] = {"records": len(size), "characters": int(size.sum()), "mean": round(float(size.mean()), 1),
                     "quarter": quarter, "median": median, "p95": most, "longest": int(size.max()),
                     "lengths": bins.tolist(),
                     **{column: dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))
                        for column, tally in tallies[name].items()}}
    return out


def as_text(found: Mapping[str, Any]) -> str:
    """Format the report for a terminal."""
    experts = found["experts"]
    total = sum(one["records"] for one in experts.values())
    lines = _story(found["steps"])
    lines += ["", f"{'expert':<20}{'records':>11}{'share':>8}{'characters':>15}{'median':>8}{'95 %':>8}  "
              "label from | language | complexity"]
    for name, one in experts.items():
        shares = " | ".join(_shares(one[key], one["records"]) for key in ("label_source", "language", "complexity"))
        lines.append(f"{name:<20}{one['records']:>11,}{one['records'] / max(1, total):>8.1%}{one['characters']:>15,}"
                     f"{one['median']:>8,}{one['p95']:>8,}  {shares}")
    lines.append(f"{'all':<20}{total:>11,}{1:>8.0%}{sum(one['characters'] for one in experts.values()):>15,}")
    return "\n".join(lines).strip("\n")


def _shares(tally: Mapping[str, int], total: int, most: int = 3) -> str:
    parts = [f"{key} {count / total:.0%}" for key, count in list(tally.items())[:most]]
    return ", ".join(parts) + (", …" if len(tally) > most else "")


def _story(steps: Mapping[str, Any]) -> list[str]:
    """Return a line about each stage that ran before."""
    lines = []
    if one := steps.get("validate"):
        why = ", ".join(f"{count:,} {reason}" for reason, count in one["reasons"].items())
        lines.append(f"read       {one['read']:,} from {one['files']:,} files: {one['kept']:,} kept, "
                     f"{one['quarantined']:,} quarantined" + (f" ({why})" if why else ""))
        lines += ReadReport(unused=Counter(one["unused"])).notes()
    if one := steps.get("dedup"):
        lines.append(f"duplicates {one['exact']:,} exact, {one['near']:,} near (Jaccard >= {one['threshold']}); "
                     f"{one['kept']:,} stay")
    if one := steps.get("label"):
        lines.append("labels     " + ", ".join(f"{count:,} {by}" for by, count in sorted(
            one["by_source"].items(), key=lambda item: -item[1])))
        stats = one.get("classifier", {})
        if stats.get("trained"):
            lines.append(f"classifier {stats['macro']:.1%} of held-out texts right, "
                         f"mean of {len(stats['names'])} names")
        if stats.get("coincide"):
            lines.append(f"           {language_warning(stats['coincide'])}")
    if one := steps.get("split"):
        held = sum(sides["valid"] for sides in one["by_expert"].values())
        lines.append(f"split      {one['read'] - held:,} to train on, {held:,} held out")
        lines += [f"           {note}" for note in one.get("notes", ())]
    if one := steps.get("pack"):
        lines.append(f"tokens     {one['train_tokens']:,} to train on, {one['valid_tokens']:,} held out")
    return lines


# ---- the page -----------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --line: #d9dee6; --back: #ffffff; --card: #f5f7fa;
  --c0: #2f6db5; --c1: #d9822b; --c2: #3a9a6b; --c3: #a9b1bd; --c4: #8d5fb0; --c5: #c24a55; --c6: #7a6a4f;
  --heat: 47, 109, 181; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #343c49; --back: #14181f;
  --card: #1c222b; --c0: #6aa5e8; --c1: #eaa25a; --c2: #62c193; --c3: #5f6977; --c4: #b793d6; --c5: #e47f88;
  --c6: #b8a583; --heat: 106, 165, 232; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1000px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p, .soft { color: var(--soft) } .tiles { display: flex; flex-wrap: wrap; gap: .7rem }
.tile { background: var(--card); border-radius: 8px; padding: .6rem .9rem; min-width: 8rem }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums } .tile span { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600; color: var(--soft) }
svg { max-width: 100%; height: auto; display: block } svg text { fill: var(--ink); font: 13px system-ui, sans-serif }
svg text.soft { fill: var(--soft) } .legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .3rem 0 }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem }
.grid figure { margin: 0 } figcaption { font-weight: 600 }
"""


def as_html(found: Mapping[str, Any]) -> str:
    """Format the report as an HTML page."""
    experts, steps = found["experts"], found["steps"]
    total = sum(one["records"] for one in experts.values())
    tiles = [("records", total), ("characters", sum(one["characters"] for one in experts.values()))]
    for name, key, title in (("validate", "read", "records read"), ("validate", "quarantined", "quarantined"),
                             ("dedup", "exact", "exact duplicates"), ("dedup", "near", "near-duplicates"),
                             ("pack", "train_tokens", "training tokens"), ("pack", "valid_tokens", "held-out tokens")):
        if name in steps:
            tiles.append((title, steps[name][key]))
    body = ["<h1>Data by expert</h1>", "<p>" + "<br>".join(map(escape, _story(steps))) + "</p>", '<div class="tiles">',
            *(f'<div class="tile"><b>{count:,}</b><span>{title}</span></div>' for title, count in tiles), "</div>",
            "<h2>Records by expert, and who gave the label</h2>",
            _stacked(experts, "label_source", KINDS, lambda one: one["records"] / max(
                1, *(other["records"] for other in experts.values())))]
    rows = ["expert records share characters mean 25% median 95% longest train held-out".split()]
    for name, one in experts.items():
        rows.append([name, f"{one['records']:,}", f"{one['records'] / max(1, total):.1%}", f"{one['characters']:,}",
                     f"{one['mean']:,.0f}", *(f"{one[key]:,}" for key in ("quarter", "median", "p95", "longest")),
                     *(f"{one['side'][side]:,}" if side in one["side"] else "–" for side in ("train", "valid"))])
    body += ["<h2>Counts and lengths (characters)</h2>", _table(rows), "<h2>Lengths</h2>",
             '<p>Share of an expert\'s records by length in characters, by powers of two.</p><div class="grid">',
             *(_histogram(name, one["lengths"]) for name, one in experts.items()), "</div>"]
    for column, title in (("language", "Languages"), ("complexity", "Complexity"), ("form", "Form")):
        keys = sum((Counter(one[column]) for one in experts.values()), Counter[str]())
        ranked = sorted(keys.items(), key=lambda item: (item[0] == "not given", -item[1], item[0]))
        body += [f"<h2>{title}</h2>", _stacked(experts, column, [key for key, _ in ranked[:7]], lambda one: 1.0)]
    stats = steps.get("label", {}).get("classifier", {})
    if stats.get("trained"):
        body += ["<h2>The classifier on held-out texts</h2>", _confusion(stats)]
    if reasons := steps.get("validate", {}).get("reasons"):
        body += ["<h2>Quarantined</h2>", _table([["reason", "records"], *([k, f"{v:,}"] for k, v in reasons.items())])]
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Data by expert</title>"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n")


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _stacked(
    experts: Mapping[str, Any], column: str, keys: Sequence[str], length: Callable[[Mapping[str, Any]], float]
) -> str:
    """A horizontal bar an expert, parted by `column`; what is not among `keys` is `other`."""
    keys = [key for key in keys if key != "other" and any(key in one[column] for one in experts.values())]
    others = any(set(one[column]) - set(keys) for one in experts.values())
    legend = [*keys, *(["other"] if others else [])]
    colour = {key: f"var(--c{3 if key in (NONE, 'not given', 'other') else [0, 1, 2, 4, 5, 6, 0][i % 7]})"
              for i, key in enumerate(legend)}
    left, width, row = 170, 640, 28
    lines = ['<div class="legend">' + "".join(f'<span><i style="background:{colour[key]}"></i>{escape(key)}</span>'
                                              for key in legend) + "</div>",
             f'<svg viewBox="0 0 980 {row * len(experts) + 4}" role="img" aria-label="{column} by expert">']
    for i, (name, one) in enumerate(experts.items()):
        x, y = float(left), i * row + 4
        lines.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        parts = {key: one[column].get(key, 0) for key in keys}
        parts["other"] = one["records"] - sum(parts.values()) if others else 0
        for key, count in parts.items():
            if count:
                w = width * length(one) * count / one["records"]
                title = f"{escape(name)}: {escape(key)} {count:,} ({count / one['records']:.1%})"
                lines.append(f'<rect x="{x:.1f}" y="{y}" width="{max(w, 0.5):.1f}" height="20" fill="{colour[key]}">'
                             f"<title>{title}</title></rect>")
                x += w
        lines.append(f'<text class="soft" x="{x + 8:.1f}" y="{y + 15}">{one["records"]:,}</text>')
    return "\n".join([*lines, "</svg>"])


def _histogram(name: str, counts: Sequence[int]) -> str:
    width, height, high = 15, 70, max(1, *counts)
    lines = [f"<figure><figcaption>{escape(name)}</figcaption>",
             f'<svg viewBox="0 0 {width * BINS + 10} {height + 22}" role="img" aria-label="lengths of {escape(name)}">']
    for i, count in enumerate(counts):
        h = height * count / high
        upto = f"{2**i:,} to {2 ** (i + 1) - 1:,}" if i < BINS - 1 else f"{2**i:,} and more"
        lines.append(f'<rect x="{5 + i * width}" y="{height - h:.1f}" width="{width - 2}" height="{h:.1f}" '
                     f'fill="var(--c0)"><title>{upto} characters: {count:,}</title></rect>')
        if i % 5 == 0:
            lines.append(f'<text class="soft" x="{5 + i * width}" y="{height + 16}" font-size="11">{2**i:,}</text>')
    lines.append(f'<line x1="5" x2="{5 + width * BINS}" y1="{height}" y2="{height}" stroke="var(--line)"/>')
    return "\n".join([*lines, "</svg></figure>"])


def _confusion(stats: Mapping[str, Any]) -> str:
    names = [name.removesuffix("_expert") for name in stats["names"]]
    head = ["given ↓ said →", *names, "right"]
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for name, row in zip(stats["names"], stats["confusion"], strict=True):
        cells = "".join(f'<td style="background:rgba(var(--heat),{0.75 * count / max(1, sum(row)):.2f})">{count:,}</td>'
                        for count in row)
        share = f"{stats['accuracy'][name]:.1%}" if name in stats["accuracy"] else "–"
        lines.append(f"<tr><td>{escape(name)}</td>{cells}<td>{share}</td></tr>")
    sure = "; ".join(f"at confidence {key} and above {share:.0%} of the texts, {right:.1%} of them right"
                     for key, (share, right) in stats["at"].items())
    return (f'<div class="wide"><table>{"".join(lines)}</table></div><p>Mean over the names {stats["macro"]:.1%}, '
            f'calibration error {stats["calibration_error"]:.1%}. {escape(sure[:1].upper() + sure[1:])}.</p>')
