"""`deepseek experts …`: packages of named experts into a model and out of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import ConfigError, printable
from ..files import read_json
from ..settings import COUNT, NATURAL, Option, Settings
from .common import MachineOptions, add_map_flag
from .parser import Parser, add_command, add_settings, add_steps, make

if TYPE_CHECKING:
    from ..convert import Group


@dataclass(frozen=True)
class SignatureOptions(Settings):
    trust: Annotated[tuple[str | Path, ...], Option(
        "PEM files of public keys, beside those in ~/.config/deepseek/keys", metavar="KEYFILE")] = ()
    require_signature: Annotated[bool, Option("refuse what no trusted key has signed")] = False


@dataclass(frozen=True)
class FolderOptions(Settings):
    out: Annotated[str | Path | None, Option(
        "write the model here; else MODEL itself is changed", metavar="FOLDER")] = None
    overwrite: Annotated[bool, Option("replace what is in FOLDER")] = False


@dataclass(frozen=True)
class CalibrationOptions(Settings):
    calibrate: Annotated[tuple[str | Path, ...], Option(
        "general text to set the gates' biases on; else calibration.json in MODEL; else they are the packages' own",
        metavar="DATA")] = ()
    tokens: Annotated[int, Option("tokens of that text to sample", COUNT)] = 1 << 14
    seed: Annotated[int, Option("seed of the sample", NATURAL)] = 0


@dataclass(frozen=True)
class ExportOptions(Settings):
    license: Annotated[str | None, Option("else that of the package it came in", metavar="TEXT")] = None
    card: Annotated[str | Path | None, Option(
        "file with figures and text for people; else that of the package", metavar="JSON")] = None
    sign: Annotated[str | Path | None, Option("PEM file of an Ed25519 private key", metavar="KEYFILE")] = None


def add_flags(parser: Parser) -> None:
    steps = add_steps(parser)
    step = add_command(steps, "install", install, "put the experts of packages into a model")
    step.add_argument("model", metavar="MODEL", help="a model whose layers are dense, or that has packages already")
    step.add_argument("packages", nargs="+", metavar="PACKAGE", help="package files, installed in this order")
    for options in (FolderOptions, SignatureOptions, CalibrationOptions):
        add_settings(step, options)
    add_map_flag(step)
    add_settings(step, MachineOptions, {"machine": "threads"})
    step = add_command(steps, "remove", remove, "take a package's experts out of a model again")
    step.add_argument("model", metavar="MODEL", help="a model with packages")
    step.add_argument("name", metavar="NAME", help="of the package")
    add_settings(step, FolderOptions)
    step = add_command(steps, "list", show, "what packages a model has")
    step.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    step = add_command(steps, "export", export, "write a model's experts of a name as a package")
    step.add_argument("model", metavar="MODEL", help="a model with packages")
    step.add_argument("name", metavar="NAME", help="of the experts")
    step.add_argument("out", metavar="OUT", help="file to write, such as NAME.safetensors")
    add_settings(step, ExportOptions)
    step = add_command(steps, "verify", verify, "check every byte of packages, or of models with packages")
    step.add_argument("places", nargs="+", metavar="PACKAGE|MODEL", help="package files or checkpoint folders")
    add_settings(step, SignatureOptions)


def install(args: argparse.Namespace) -> None:
    from .. import convert

    folder, signatures, text = make(args, FolderOptions), make(args, SignatureOptions), make(args, CalibrationOptions)
    given = {name: value for name in ("tokens", "seed", "map") if (value := getattr(args, name)) is not None}
    if given and not text.calibrate:
        raise ConfigError("; ".join(f"{name} = {value!r}" for name, value in given.items())
                          + ": has a meaning only with calibrate")
    opened = [convert.open_package(package, **vars(signatures)) for package in args.packages]
    ids = _general_text(args, text) if text.calibrate else None
    for done in convert.install_all(opened, args.model, calibration=ids, **vars(folder)):
        set_on = (f"bias set on {done.group.calibrated:,} tokens of general text" if done.group.calibrated else
                  "bias as the package has it (give general text with --calibrate)")
        print(f"{done.group.info.name}: group {done.place + 1}, {_summary(done.group)}; {set_on}")
    model = folder.out or args.model
    print(f"model: {model}\ntry:   deepseek infer --model {model} --prompt '…' --show_experts")


def _general_text(args: argparse.Namespace, options: CalibrationOptions) -> list[list[int]]:
    from ..atlas.sample import draw, window_length
    from ..checkpoint import resolve
    from ..config import ModelConfig
    from ..data import ReadReport, RecordMap, read_documents
    from ..tokenizer import Tokenizer

    folder, report = resolve(args.model), ReadReport()
    sample = draw("", read_documents(list(options.calibrate), report, RecordMap.of(args.map)), Tokenizer.load(folder),
                  seq_len=window_length(ModelConfig.from_file(folder), None), tokens=options.tokens,
                  seed=options.seed)
    if report.problems:
        print(report.summary())
    return [window.ids for window in sample.windows]


def remove(args: argparse.Namespace) -> None:
    from .. import convert

    options = make(args, FolderOptions)
    folder = convert.remove(args.model, args.name, **vars(options))
    left = convert.installed(folder)
    print(f"{args.name}: removed; there are {', '.join(left.names)}" if left else
          f"{args.name}: removed; the model is its base again")
    print(f"model: {options.out or args.model}")


def show(args: argparse.Namespace) -> None:
    from .. import convert

    grown = convert.installed(args.model)
    if grown is None:
        print(f"{args.model}: no packages are installed")
        return
    for place, group in enumerate(grown.groups, 1):
        print(f"{place}  {group.info.name}: {_summary(group)}")
        figures = [f"{key} {value:.4g}" for key, value in group.info.evidence.items()]
        if text := group.info.card.get("summary"):
            figures.append(str(text))
        if figures:
            print(printable(f"   {'; '.join(figures)}"))
    print(f"base: {grown.base}")


def _summary(group: Group) -> str:
    info = group.info
    return printable(f"{info.experts} experts of width {info.width} in {len(info.layers)} layers, {info.precision}, "
                     f"{info.license}, {group.signer}")


def export(args: argparse.Namespace) -> None:
    from .. import convert

    options = make(args, ExportOptions)
    card = None if options.card is None else read_json(options.card)
    package = convert.export(args.model, args.name, args.out, license=options.license, card=card, key=options.sign)
    size = package.path.stat().st_size
    print(f"{package.info.name}: {package.info.precision}, {size:,} bytes, SHA-256 of its text {package.sha256}"
          f"{', signed' if options.sign else ''}")
    print(f"package: {args.out}\ntry:     deepseek experts verify {args.out}")


def verify(args: argparse.Namespace) -> None:
    from .. import convert
    from ..checkpoint import read_package
    from ..checkpoint.ready import is_folder, is_ready

    signatures = vars(make(args, SignatureOptions))
    folders = [place for place in args.places if is_ready(place) or is_folder(place)]
    if folders and any(signatures.values()):
        raise ConfigError("trust, require_signature: have a meaning only with packages, not with the model "
                          f"{folders[0]}")
    for place in args.places:
        if place in folders:
            grown = convert.verify_model(place)
            print(f"{place}: whole: {', '.join(grown.names)}; the base can be restored")
            continue
        package = read_package(place, **signatures)
        info = package.info
        print(printable(f"{place}: whole: {info.name}, {info.experts} experts in {len(info.layers)} layers, "
                        f"{info.precision}, {info.license}, {package.signer}; for the base {info.base}"))
