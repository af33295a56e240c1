"""`deepseek atlas …`: a thin function and its flags a step."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ..config import ModelConfig
from ..data.settings import named_paths
from ..errors import ConfigError, DataError
from ..files import locked, write_atomically
from ..progress import ProgressBar
from ..settings import ABOVE_ZERO, COUNT, NATURAL, Option, Settings, is_int
from .common import MachineOptions, add_map_flag
from .parser import Parser, add_command, add_settings, add_steps, make

if TYPE_CHECKING:
    from ..atlas.compare import Trace


@dataclass(frozen=True)
class SampleOptions(Settings):
    tokens: Annotated[int, Option("tokens to sample; of `profile`, for each name", COUNT)] = 1 << 16
    seq_len: Annotated[int | None, Option("length of a window at most; else 512, or what the model takes", (
        "must be an integer >= 2", lambda v: is_int(v) and v >= 2))] = None
    seed: Annotated[int, Option("seed of the sample", NATURAL)] = 0


@dataclass(frozen=True)
class ProfileOptions(SampleOptions):
    score: Annotated[Literal["token", "gate"], Option("what experts are ranked by")] = "token"
    threshold: Annotated[float | None, Option("share to select; else 0.2 for token, 0.1 for gate", ABOVE_ZERO)] = None


def add_flags(parser: Parser) -> None:
    steps = add_steps(parser)
    step = add_command(steps, "profile", profile, "measure which experts the text of each name visits")
    step.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    step.add_argument("--data", nargs="+", action="extend", required=True, metavar="NAME=FILE",
                      help="text of a name; a name may come several times, and a few names tell more than one")
    add_settings(step, ProfileOptions, {"": "score threshold"})
    step.add_argument("--out", metavar="FILE", help="else atlas.json beside the model")
    _sample_flags(step)
    step = add_command(steps, "show", show, "named groups, their evidence and overlap")
    step.add_argument("place", metavar="MODEL|ATLAS", help="a checkpoint folder, a hub id or an atlas.json")
    step.add_argument("--png", metavar="FILE", help="draw layers by experts, coloured by name")
    step.add_argument("--html", metavar="FILE", help="write a page with all of it")
    step = add_command(steps, "compare", compare, "how far routing has moved between two checkpoints of one shape")
    step.add_argument("first", metavar="A", help="a checkpoint folder or a hub id")
    step.add_argument("second", metavar="B", help="another of the same shape")
    step.add_argument("--data", nargs="+", action="extend", required=True, metavar="FILE", help="text to route")
    step.add_argument("--atlas", metavar="FILE", help="names to follow; else the atlas beside B, or A")
    _sample_flags(step)


def _sample_flags(parser: Parser) -> None:
    add_map_flag(parser)
    add_settings(parser, SampleOptions)
    add_settings(parser, MachineOptions, "machine")


def profile(args: argparse.Namespace) -> None:
    from ..atlas.atlas import FILE
    from ..checkpoint import resolve
    from ..checkpoint.ready import is_folder
    from ..data import list_files

    options, named = make(args, ProfileOptions), named_paths(args.data, "data")
    for _ in list_files([place for places in named.values() for place in places]):
        pass  # a wrong path is said before a large model is loaded
    if args.out is None and not is_folder(args.model):
        raise ConfigError(f"out: must be given, because {args.model} is not a local folder to put {FILE} in")
    folder = resolve(args.model)
    out = Path(args.out).expanduser() if args.out else folder / FILE
    out = out / FILE if out.is_dir() else out
    with locked(out):
        _profile(args, options, named, folder, out)


def _profile(args: argparse.Namespace, options: ProfileOptions, named: dict[str, list[str]], folder: Path,
             out: Path) -> None:
    from ..atlas import Atlas, profile
    from ..atlas.atlas import Shape
    from ..atlas.profile import doubts, verdict
    from ..atlas.report import table
    from ..checkpoint import load_model
    from ..data import ReadReport, RecordMap, read_documents
    from ..tokenizer import Tokenizer

    known = Atlas.load(out) if out.is_file() else None
    if known is not None and known.shape != (shape := Shape.of(ModelConfig.from_file(folder))):
        raise ConfigError(f"out = {out}: holds the atlas of another model: {known.shape}; this one has {shape}")
    report, mapping = ReadReport(), RecordMap.of(args.map)
    tokenizer, model = Tokenizer.load(folder), load_model(folder, device=make(args, MachineOptions).device)
    with ProgressBar(desc="profile", unit=" tokens", unit_scale=True) as bar:
        documents = {name: read_documents(places, report, mapping) for name, places in named.items()}
        measured = profile(model, tokenizer, documents, progress=bar.advance_to, atlas=known, **vars(options))
    if report.problems:
        print(report.summary())
    if not measured.names:
        raise DataError("; ".join(verdict(rejected.name, rejected.reason) for rejected in measured.refused))
    (known.updated(measured) if known else measured).save(out)
    print("\n".join([table(measured), *doubts(measured)]))
    if len(named) == 1:
        print("One name alone shows that its experts are stable, not that they are its own: other text, under a second "
              "name, would.")
    print(f"atlas: {out}\ntry:   deepseek atlas show {out} --png experts.png")


def show(args: argparse.Namespace) -> None:
    from ..atlas import Atlas
    from ..atlas.plot import save_group_map
    from ..atlas.report import page, table
    from ..checkpoint import resolve

    atlas = Atlas.load(args.place if Path(args.place).expanduser().exists() else resolve(args.place))
    print(table(atlas))
    if args.png:
        save_group_map(atlas, args.png)
        print(f"map:  {args.png}")
    if args.html:
        write_atomically(args.html, page(atlas))
        print(f"page: {args.html}")
    print(f"try:   deepseek atlas show {args.place} --html atlas.html" if not args.html else
          "try:   deepseek tune MODEL DATA --expert_tune NAME")


def compare(args: argparse.Namespace) -> None:
    from ..atlas import Atlas
    from ..atlas.atlas import FILE, Shape
    from ..atlas.compare import compare, trace
    from ..atlas.sample import draw, window_length
    from ..checkpoint import load_model, resolve
    from ..data import ReadReport, RecordMap, read_documents
    from ..tokenizer import Tokenizer

    options, device = make(args, SampleOptions), make(args, MachineOptions).device
    folders = [resolve(name) for name in (args.first, args.second)]
    shapes = [Shape.of(ModelConfig.from_file(folder)) for folder in folders]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"the models differ in shape: {args.first} has {shapes[0]}; {args.second} {shapes[1]}")
    tokenizer, other = (Tokenizer.load(folder) for folder in folders)
    if tokenizer.fingerprint != other.fingerprint:
        raise ConfigError(f"{args.first} and {args.second} have different tokenizers, so no text is the same to both")
    found = [args.atlas] if args.atlas else [f for folder in reversed(folders) if (f := folder / FILE).is_file()]
    atlas = Atlas.load(found[0]) if found else None
    report = ReadReport()
    sample = draw("", read_documents(args.data, report, RecordMap.of(args.map)), tokenizer, tokens=options.tokens,
                  seed=options.seed, seq_len=window_length(ModelConfig.from_file(folders[0]), options.seq_len))
    if report.problems:
        print(report.summary())

    def traced(folder: Path) -> Trace:  # one model in memory at a time
        with ProgressBar(desc="route", unit=" tokens", unit_scale=True) as bar:
            return trace(load_model(folder, device=device), sample, tokenizer, bar.advance_to)

    print(compare(traced(folders[0]), traced(folders[1]), atlas).table())
    print(f"try:   deepseek atlas show {args.second}")
