"""`deepseek data …`: a thin function and its flags a step."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.mapping import RecordMap
from ..data.settings import (
    DedupSettings,
    LabelSettings,
    PackSettings,
    PipelineConfig,
    SplitSettings,
    StageOptions,
    ValidateSettings,
    named_paths,
)
from ..errors import ConfigError
from .common import add_map_flag
from .parser import Parser, Run, add_command, add_settings, add_steps, make

if TYPE_CHECKING:
    from ..data.stage import StageResult
    from ..progress import ProgressBar



def add_flags(parser: Parser) -> None:
    steps = add_steps(parser)
    step = add_command(steps, "tokenizer", tokenizer, "train a byte-level BPE tokenizer on text")
    step.add_argument("data", nargs="+", metavar="DATA", help="text, code, JSONL or folders of them")
    add_map_flag(step)
    add_settings(step, PackSettings, {"": "vocab_size"})
    step.add_argument("--out", required=True, help="folder to write")
    step = add_command(steps, "run", run, "all steps in a row, as a YAML says; the same command continues a "
                       "stopped run")
    step.add_argument("config", metavar="CONFIG.yaml", help="sources, out, and settings of the steps (docs/data.md)")

    step = add_command(steps, "validate", validate, "files of every kind into records, bad ones into a quarantine")
    step.add_argument("data", nargs="*", metavar="DATA", help="files, folders, patterns or hf:NAME[:SPLIT]")
    step.add_argument("--sources", nargs="+", action="extend", metavar="NAME=DATA",
                      help="the same, for the expert NAME")
    add_map_flag(step)
    _add_settings(step, "workers experts", ValidateSettings)
    _record_step(steps, dedup, "drop records that say the same as an earlier one, exactly or nearly", "workers",
                 DedupSettings)
    _record_step(steps, label, "name the expert of records: as given, by keywords, by a classifier", "workers experts",
                 LabelSettings)
    _record_step(steps, split, "records by expert into training and held-out ones", "", SplitSettings)
    add_map_flag(_record_step(steps, pack, "records, or with --map any DATA, into token shards for training", "experts",
                              PackSettings, SplitSettings))
    _record_step(steps, report, "counts, lengths, languages, complexity and balance per expert", "")


def _record_step(steps: Any, run: Run, text: str, options: str, *kinds: type) -> Parser:
    step = add_command(steps, run.__name__, run, text)
    step.add_argument("source", metavar="IN", help="folder of records that a stage wrote")
    return _add_settings(step, options, *kinds)


def _add_settings(step: Parser, options: str, *kinds: type) -> Parser:
    step.add_argument("--out", required=True, help="folder to write")
    add_settings(step, StageOptions, {"": options})
    for kind in kinds:
        add_settings(step, kind)
    if "workers" not in options:  # it was taken, and meant nothing
        step.add_argument("--workers", help=argparse.SUPPRESS)
    return step


# ---- the steps ----------------------------------------------------------------------------------------------------


def tokenizer(args: argparse.Namespace) -> None:
    from ..data import ReadReport, read_documents
    from ..files import locked
    from ..tokenizer import Tokenizer

    report, settings = ReadReport(), make(args, PackSettings)
    with locked(args.out):
        documents = read_documents(args.data, report, RecordMap.of(args.map))
        trained = Tokenizer.train((document.text for document in documents), settings.vocab_size)
        trained.save(args.out)
    print(report.summary())
    print(f"{trained.vocab_size:,} tokens written to {args.out}\n"
          f"try:   deepseek train nano DATA --tokenizer {args.out} --out runs/first")


def run(args: argparse.Namespace) -> None:
    from ..data import pipeline
    from ..progress import ProgressBar

    config = PipelineConfig.load(args.config)
    with ProgressBar(unit=" records", unit_scale=True) as bar:
        def note(step: str, records: int) -> None:
            if bar.desc != f"{step}: ":
                bar.reset()
                bar.set_description(step)
            bar.advance_to(records)

        for name, done in pipeline.run(config, note):
            bar.write(_line(name, done))
    print((Path(config.out) / "report" / "report.txt").read_text(encoding="utf-8"))
    print(f"tokens: {Path(config.out) / 'pack'}\npage:   {Path(config.out) / 'report' / 'report.html'}")
    _try_training(Path(config.out) / "split")


def validate(args: argparse.Namespace) -> None:
    from ..data.reader import ReadReport
    from ..data.stages import validate

    sources = ({"": args.data} if args.data else {}) | named_paths(args.sources or (), "sources")
    if not sources:
        raise ConfigError("data: at least one DATA or --sources NAME=DATA must be given")
    settings, mapping, shared = make(args, ValidateSettings), RecordMap.of(args.map), vars(make(args, StageOptions))
    with _bar("validate") as bar:
        done = validate(sources, args.out, settings, mapping=mapping, progress=bar.advance_to, **shared)
    print(_line("validate", done))
    for reason, count in done.counts["reasons"].items():
        print(f"  {count:,} {reason}")
    for kind, count in done.counts["skipped"].items():
        print(f"  left out: {count:,} {kind}")
    for line in ReadReport(unused=Counter(done.counts["unused"])).notes():
        print(line)
    if done.counts["quarantined"]:
        print(f"quarantine: {Path(args.out) / 'quarantine.jsonl'}")
    _try(f"data dedup {args.out} --out DEDUPED")


def dedup(args: argparse.Namespace) -> None:
    from ..data.stages import dedup

    settings, workers = make(args, DedupSettings), make(args, StageOptions).workers
    with _bar("dedup") as bar:
        done = dedup(args.source, args.out, settings, workers=workers, progress=bar.advance_to)
    print(_line("dedup", done))
    print(f"dropped: {Path(args.out) / 'dropped.csv'}")
    _try(f"data label {args.out} --out LABELLED")


def label(args: argparse.Namespace) -> None:
    from ..data.stages import label
    from ..domain import HeldOutReport

    settings, shared = make(args, LabelSettings), vars(make(args, StageOptions))
    with _bar("label") as bar:
        done = label(args.source, args.out, settings, progress=bar.advance_to, **shared)
    print(_line("label", done))
    stats = done.counts.get("classifier", {})
    if stats.get("trained"):
        print(HeldOutReport(tuple(stats["names"]), tuple(map(tuple, stats["confusion"])), {
            float(key): tuple(value) for key, value in stats["at"].items()}, stats["calibration_error"],
            stats.get("coincide", {})).table())
    elif stats:
        print(f"no classifier: {stats['why']}")
    _try(f"data report {args.out} --out REPORT")


def split(args: argparse.Namespace) -> None:
    from ..data.stages import split

    settings = make(args, SplitSettings)
    with _bar("split") as bar:
        done = split(args.source, args.out, settings, progress=bar.advance_to)
    print(_line("split", done))
    _try_training(Path(args.out))


def pack(args: argparse.Namespace) -> None:
    from ..data.stages import pack

    settings, held_out, experts = make(args, PackSettings), make(args, SplitSettings), make(args, StageOptions).experts
    mapping = RecordMap.of(args.map)
    with _bar("pack") as bar:
        done = pack(args.source, args.out, settings, held_out=held_out, experts=experts, mapping=mapping,
                    progress=bar.advance_to)
    print(_line("pack", done))
    _try(f"data report {args.source} --out REPORT" if args.map is None else
         f"train nano {args.source} --map {args.map} --out runs/first")


def report(args: argparse.Namespace) -> None:
    from ..data.report import report

    report(args.source, args.out)
    print((Path(args.out) / "report.txt").read_text(encoding="utf-8"))
    print(f"page: {Path(args.out) / 'report.html'}")
    _try(f"data split {args.source} --out SPLIT")


def _try_training(split: Path) -> None:
    names = sorted(folder.parent.name for folder in split.glob("*/train"))
    _try(f"train small --experts {' '.join(f'{name}={split / name}/train' for name in names)} --out runs/named"
         if len(names) > 1 and all(name.isidentifier() for name in names) else
         f"train nano {split} --out runs/first")


def _try(command: str) -> None:
    """The command that often comes next."""
    print(f"try:   deepseek {command}")


def _bar(name: str) -> ProgressBar:
    from ..progress import ProgressBar

    return ProgressBar(desc=name, unit=" records", unit_scale=True)


def _line(name: str, done: StageResult) -> str:
    counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in done.counts.items()
                     if isinstance(value, int) and key not in ("seed", "files", "characters"))
    line = f"{name}: {counts} ({f'{done.seconds:.1f} s' if done.ran else 'unchanged'})"
    return "\n".join([line, *done.counts.get("notes", ())])
