"""`deepseek atlas …`: a thin function a step; its flags are in cli.py, since this package loads torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint import load_model, resolve
from ..config import ModelConfig
from ..data import ReadReport, list_files, read_documents
from ..data.settings import named_paths
from ..errors import ConfigError, DataError
from ..files import locked, write_atomically
from ..progress import tokens_bar
from ..tokenizer import Tokenizer
from . import Atlas, profile
from .atlas import FILE, Shape
from .compare import Trace, compare, trace
from .plot import save_group_map
from .profile import doubts, verdict
from .report import page, table
from .sample import draw, window_length


def atlas_profile(args: argparse.Namespace) -> None:
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
    known = Atlas.load(out) if out.is_file() else None
    if known is not None and known.shape != (shape := Shape.of(ModelConfig.from_file(folder))):
        raise ConfigError(f"out = {out}: holds the atlas of another model: {known.shape}; this one has {shape}")
    report = ReadReport()
    tokenizer, model = Tokenizer.load(folder), load_model(folder, device=args.device)
    with tokens_bar("profile") as advance:
        measured = profile(model, tokenizer, {name: read_documents(places, report) for name, places in named.items()},
                           score=args.score, threshold=args.threshold, seq_len=args.seq_len, tokens=args.tokens,
                           seed=args.seed, progress=advance, atlas=known)
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


def atlas_show(args: argparse.Namespace) -> None:
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


def atlas_compare(args: argparse.Namespace) -> None:
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
    sample = draw("", read_documents(args.data, report), tokenizer, tokens=args.tokens, seed=args.seed,
                  seq_len=window_length(ModelConfig.from_file(folders[0]), args.seq_len))
    if report.problems:
        print(report.summary())

    def traced(folder: Path) -> Trace:  # one model in memory at a time
        with tokens_bar("route") as advance:
            return trace(load_model(folder, device=args.device), sample, tokenizer, advance)

    print(compare(traced(folders[0]), traced(folders[1]), atlas).table())
    print(f"try:   deepseek atlas show {args.second}")
