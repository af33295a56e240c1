"""`deepseek upcycle`: a dense model as a DeepSeek-V3 that computes the same, or with a compressed latent, or with
experts carved out of its FFN or grown beside it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..data.mapping import RecordMap
from ..data.settings import named_paths
from ..errors import ConfigError
from ..settings import COUNT, Option, Settings, declared
from ..upcycling.carve_settings import CalibrationConfig, CarveConfig, HealConfig, LatentConfig
from ..upcycling.settings import GrowConfig
from .common import MachineOptions, add_map_flag
from .parser import Parser, add_settings, make


@dataclass(frozen=True)
class UpcycleOptions(Settings):
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Option(
        "of the weights; auto is SOURCE's if that is bfloat16, else float32")] = "auto"
    context: Annotated[int | None, Option("positions to keep, if not all", COUNT)] = None
    check: Annotated[bool, Option(
        "compare the result with SOURCE: logits and greedy tokens (needs transformers)")] = False
    overwrite: Annotated[bool, Option("replace what is in OUT")] = False


GROUPS: dict[str, type] = {
    "a compressed latent (lossy)": LatentConfig, "experts out of the dense FFN": CarveConfig,
    "calibration text of both": CalibrationConfig, "their training": HealConfig}


def add_flags(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM: "
                        "a folder, a hub id or a .gguf file")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_settings(parser, UpcycleOptions)
    for title, kind in GROUPS.items():
        add_settings(parser, kind, {title: " ".join(names(kind))})
    parser.group("named experts beside the FFN").add_argument(
        "--grow", nargs="+", action="extend", metavar="NAME=DATA", help="train experts of these names on their "
        "records; OUT is then the folder of the run, and SOURCE may be a dense model in DeepSeek-V3's form already")
    add_settings(parser, GrowConfig, "named experts beside the FFN")
    add_map_flag(parser)
    add_settings(parser, MachineOptions, {"machine": "threads"})


def names(kind: type) -> list[str]:
    """The settings of a group: those of the calibration text are one of their own."""
    shared = {one.name for one in declared(CalibrationConfig)} if kind is not CalibrationConfig else set()
    return [one.name for one in declared(kind) if one.name not in shared]


def run(args: argparse.Namespace) -> None:
    from .. import convert
    from ..convert.upcycling import transformers_library

    options = make(args, UpcycleOptions)
    check_combination(args)
    if args.carve is not None or args.latent is not None:
        _calibrated(args, options)
        return
    if args.grow:
        _grow(args, options)
        return
    if options.check:
        transformers_library()  # before the work
    print(convert.upcycle(args.source, args.out, options.dtype, context=options.context, overwrite=options.overwrite))
    if options.check:
        print(convert.compare(args.source, args.out))
    print(f"model: {args.out}\ntry:   deepseek quantize {args.out} {args.out}-int8 --format int8")


def check_combination(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags that exclude each other, or have a meaning only with one that is not given."""
    def is_given(name: str) -> bool:
        return getattr(args, name) not in (None, [])

    if len(forms := [name for name in ("grow", "carve", "latent") if is_given(name)]) > 1:
        raise ConfigError(f"{', '.join(forms)}: exclude each other: a dense model is given one of them")
    for those, needed in (
            ([*names(GrowConfig), "map"], ("grow",)), (names(LatentConfig), ("latent",)),
            (names(CarveConfig), ("carve",)), (names(HealConfig), ("heal",)), (["anneal"], ("carve",)),
            (names(CalibrationConfig) + names(HealConfig), ("carve", "latent"))):
        for name in filter(is_given, those):
            if not any(map(is_given, needed)):
                raise ConfigError(f"{name} = {getattr(args, name)}: has a meaning only with {' or '.join(needed)}")


def _calibrated(args: argparse.Namespace, options: UpcycleOptions) -> None:
    from ..upcycling.carve import carve
    from ..upcycling.latent import latent_form

    if options.check:
        raise ConfigError(f"check = True: a model with {'carved experts' if args.carve else 'a compressed latent'} "
                          "computes something else than SOURCE (report.json says how far off each layer is)")
    healing = make(args, HealConfig)
    rest: dict[str, Any] = {"context": options.context, "overwrite": options.overwrite}
    if args.carve is not None:
        print(carve(args.source, args.out, make(args, CarveConfig), healing, options.dtype, **rest))
    else:
        print(latent_form(args.source, args.out, make(args, LatentConfig), healing, options.dtype, **rest))
    print(f"model:  {args.out}\nreport: {args.out}/report.md\nrun:    {args.out}.run (may be removed)\n"
          f"try:    deepseek-infer --model {args.out} --prompt '…'")


def _grow(args: argparse.Namespace, options: UpcycleOptions) -> None:
    from ..convert.upcycling import compare, transformers_library
    from ..data import list_files
    from ..upcycling.grow import base_of, grow

    if options.check:
        transformers_library()  # before the work
    names, config = named_paths(args.grow, "grow"), make(args, GrowConfig)
    if options.overwrite:
        raise ConfigError("overwrite = True: a run is continued; remove its folder to begin anew")
    mapping, out = RecordMap.of(args.map), Path(args.out)
    for paths in (*names.values(), config.others):
        [*list_files(paths)]  # a wrong one is said before the work
    base = base_of(args.source, out / "base", options.dtype, options.context)
    print(f"base: {base}")
    if options.check:
        if base != out / "base":
            raise ConfigError(f"check = True: {args.source} is in DeepSeek-V3's form already: nothing to compare")
        print(compare(args.source, base))
    report = grow(base, dict[str, Any](names), out, config, mapping=mapping)
    print(f"{report.table()}\nmodel:    {out / 'model'}\npackages: {out / 'packages'}\n"
          f"pictures: {out / 'loss.png'}, {out / 'names.png'}\n"
          f"try:      deepseek infer --model {out / 'model'} --prompt '…' --show_experts")
