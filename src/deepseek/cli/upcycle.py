"""`deepseek upcycle`: a dense model as a DeepSeek-V3 that computes the same, or with experts carved out of its FFN
or grown beside it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..data.mapping import RecordMap
from ..data.settings import named_paths
from ..errors import ConfigError
from ..settings import COUNT, Option, Settings, declared
from ..upcycling.carve_settings import CarveConfig, HealConfig
from ..upcycling.settings import GrowConfig
from .common import MachineOptions, add_map_flag
from .parser import Parser, add_settings, given_settings, make


@dataclass(frozen=True)
class UpcycleOptions(Settings):
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Option(
        "of the weights; auto is SOURCE's if that is bfloat16, else float32")] = "auto"
    context: Annotated[int | None, Option("positions to keep, if not all", COUNT)] = None
    check: Annotated[bool, Option(
        "compare the result with SOURCE: logits and greedy tokens (needs transformers)")] = False
    overwrite: Annotated[bool, Option("replace what is in OUT")] = False


CARVING = {"experts out of the dense FFN": CarveConfig, "their training": HealConfig}


def add_flags(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM: "
                        "a folder, a hub id or a .gguf file")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_settings(parser, UpcycleOptions)
    for title, kind in CARVING.items():
        add_settings(parser, kind, {title: " ".join(one.name for one in declared(kind))})
    parser.group("named experts beside the FFN").add_argument(
        "--grow", nargs="+", action="extend", metavar="NAME=DATA", help="train experts of these names on their "
        "records; OUT is then the folder of the run, and SOURCE may be a dense model in DeepSeek-V3's form already")
    add_settings(parser, GrowConfig, "named experts beside the FFN")
    add_map_flag(parser)
    add_settings(parser, MachineOptions, {"machine": "threads"})


def run(args: argparse.Namespace) -> None:
    from .. import convert
    from ..convert.upcycling import transformers_library

    options, carving = make(args, UpcycleOptions), make(args, CarveConfig)
    growing = given_settings(args, GrowConfig) | ({} if args.map is None else {"map": args.map})
    if args.grow and carving.carve is not None:
        raise ConfigError("grow, carve: exclude each other: grow experts beside the FFN of the dense model")
    if growing and not args.grow:
        raise ConfigError(f"{min(growing)} = {growing[min(growing)]}: has a meaning only with grow")
    healing = make(args, HealConfig)
    given = {kind: given_settings(args, kind) for kind in CARVING.values()}
    for kind, needed in ((HealConfig, "heal"), (CarveConfig, "carve")):
        for name, value in given[kind].items():
            if not given[kind].get(needed) or carving.carve is None:
                raise ConfigError(f"{name} = {value}: has a meaning only with "
                                  f"{'carve' if carving.carve is None else needed}")
    if carving.carve is not None:
        _carve(args, options, carving, healing)
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


def _carve(args: argparse.Namespace, options: UpcycleOptions, carving: CarveConfig, healing: HealConfig) -> None:
    from ..upcycling.carve import carve

    if options.check:
        raise ConfigError("check = True: a model with carved experts computes something else than SOURCE (report.json "
                          "says how far off each layer is)")
    print(carve(args.source, args.out, carving, healing, options.dtype, context=options.context,
                overwrite=options.overwrite))
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
