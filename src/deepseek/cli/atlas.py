"""`deepseek atlas …`: a thin function and its flags a step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ModelConfig
from ..data.settings import named_paths
from ..errors import ConfigError, DataError
from ..files import locked, write_atomically
from ..progress import tokens_bar
from .common import add_device_flags, add_map_flag
from .parser import Parser, add_command, add_steps

if TYPE_CHECKING:
    from ..atlas.compare import Trace


def add_flags(parser: Parser) -> None:
    steps = add_steps(parser)
    step = add_command(steps, "profile", profile, "measure which experts the text of each name visits")
    step.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    step.add_argument("--data", nargs="+", action="extend", required=True, metavar="NAME=FILE",
                      help="text of a name; a name may come several times, and a few names tell more than one")
    step.add_argument("--score", choices=("token", "gate"), default="token", help="what experts are ranked by")
    step.add_argument("--threshold", type=float, help="share to select; else 0.2 for token, 0.1 for gate")
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
    parser.add_argument("--tokens", type=int, default=1 << 16, help="tokens to sample (for each name)")
    parser.add_argument("--seq_len", type=int, help="length of a window at most; else 512, or what the model takes")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    add_device_flags(parser)


def profile(args: argparse.Namespace) -> None:
    from ..atlas.atlas import FILE
    from ..checkpoint import resolve
    from ..data import list_files

    named = named_paths(args.data, "data")
    for _ in list_files([place for places in named.values() for place in places]):
        pass  # a wrong path is said before a large model is loaded
    if args.out is None and not Path(args.model).expanduser().is_dir():
        raise ConfigError(f"out: must be given, because {args.model} is not a local folder to put {FILE} in")
    folder = resolve(args.model)
    out = Path(args.out).expanduser() if args.out else folder / FILE
    out = out / FILE if out.is_dir() else out
    with locked(out):
        _profile(args, named, folder, out)


def _profile(args: argparse.Namespace, named: dict[str, list[str]], folder: Path, out: Path) -> None:
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
    tokenizer, model = Tokenizer.load(folder), load_model(folder, device=args.device)
    with tokens_bar("profile") as advance:
        documents = {name: read_documents(places, report, mapping) for name, places in named.items()}
        measured = profile(model, tokenizer, documents, score=args.score, threshold=args.threshold,
                           seq_len=args.seq_len, tokens=args.tokens, seed=args.seed, progress=advance, atlas=known)
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
    sample = draw("", read_documents(args.data, report, RecordMap.of(args.map)), tokenizer, tokens=args.tokens,
                  seed=args.seed, seq_len=window_length(ModelConfig.from_file(folders[0]), args.seq_len))
    if report.problems:
        print(report.summary())

    def traced(folder: Path) -> Trace:  # one model in memory at a time
        with tokens_bar("route") as advance:
            return trace(load_model(folder, device=args.device), sample, tokenizer, advance)

    print(compare(traced(folders[0]), traced(folders[1]), atlas).table())
    print(f"try:   deepseek atlas show {args.second}")
