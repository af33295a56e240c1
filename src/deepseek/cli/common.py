"""What commands share: flags, and what they say to LLM. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..engine.options import EngineOptions
from ..engine.sampling_params import SamplingParams
from ..errors import ConfigError, printable
from ..settings import COUNT, JSON, Device, Option, Settings
from .parser import Parser, add_settings, given_settings, make

if TYPE_CHECKING:
    from ..engine.llm import LLM

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MachineOptions(Settings):
    device: Annotated[Device, Option("where the model runs")] = "cpu"
    threads: Annotated[int | None, Option("CPU threads; torch's choice if not given", COUNT)] = None


@dataclass(frozen=True)
class ModelOptions(Settings):
    """How a checkpoint is loaded: what the commands say to LLM beside EngineOptions."""

    adapter: Annotated[tuple[str, ...], Option(
        "a delta or LoRA adapter, made part of the model; NAME=DIR keeps a LoRA adapter beside the base, for the "
        "requests that choose its name", metavar="[NAME=]DIR")] = ()
    dtype: Annotated[Dtype, Option("of the weights in memory; auto is the checkpoint's")] = "auto"
    pool: Annotated[Path | None, Option(
        "a pool of named experts, adapters and knowledge bases; each request is routed to the members that fit it",
        metavar="FILE")] = None
    chat_template_kwargs: Annotated[Mapping[str, Any] | None, Option(
        """variables of the chat template, such as '{"thinking": true}'""", JSON)] = None


@dataclass(frozen=True)
class AnswerOptions(Settings):
    """Which experts answer, and whether that is shown."""

    use_adapter: Annotated[str | None, Option(
        "which of the adapters with names answers; else the base", metavar="NAME")] = None
    trace: Annotated[bool, Option(
        "print how a pool's members were chosen: parts, keywords, scores, weights, passages, experts")] = False
    show_experts: Annotated[bool, Option("print the experts' use, by name and by layer")] = False
    expert_map: Annotated[str | Path | None, Option("save that table as a heat map", metavar="PNG")] = None


def add_map_flag(parser: Parser) -> None:
    parser.checked.add("map")
    parser.add_argument("--map", metavar="YAML", help="which column of a record is what, where names do not say it")


def apply_device(args: argparse.Namespace) -> None:
    """Check --device and apply --threads, of commands that have them, before anything else is loaded."""
    if not hasattr(args, "threads"):
        return
    import torch

    machine = make(args, MachineOptions)
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': this torch finds no GPU")
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)


def add_model_flags(parser: Parser) -> None:
    add_settings(parser, SamplingParams, {
        "sampling": "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty "
                    "min_tokens seed stop ignore_eos json_schema"})
    add_settings(parser, AnswerOptions, "experts")
    add_engine_flags(parser)


def add_engine_flags(parser: Parser) -> None:
    add_settings(parser, ModelOptions, "engine")
    add_settings(parser, EngineOptions, "engine")
    add_settings(parser, MachineOptions, "machine")


def named_adapters(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """(the one without a name, the others by name) of `NAME=DIR` and `DIR`; a word that is a folder has none.

    Raises ConfigError where a word is neither, and for a second one of a name, or without.
    """
    unnamed, named = None, dict[str, str]()
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).expanduser().is_dir():
            if unnamed is not None:
                raise ConfigError(f"adapter = {word!r}: {unnamed} is the model's already; several need names: NAME=DIR")
            unnamed = word
        elif not name or not folder:
            raise ConfigError(f"adapter = {word!r}: must read NAME=DIR, or DIR alone")
        elif name in named:
            raise ConfigError(f"adapter = {word!r}: {name} is {named[name]} already")
        else:
            named[name] = folder
    return unnamed, named


def make_llm(args: argparse.Namespace) -> LLM:
    """The LLM of the engine's flags."""
    from ..engine.llm import LLM

    options, answers = make(args, ModelOptions), make(args, AnswerOptions)
    adapter, adapters = named_adapters(options.adapter)
    pool = None
    if options.pool is not None:
        from ..route import ExpertPool

        pool = ExpertPool.load(options.pool)
    elif answers.trace:
        raise ConfigError("trace: tells how a pool was asked: --pool must be given")
    if answers.trace and answers.use_adapter is not None:
        raise ConfigError("trace: tells how a pool was asked: with --use_adapter none is")
    there = {**adapters, **(pool.adapters if pool is not None else {})}
    if (use := answers.use_adapter) is not None and use not in there:
        raise ConfigError(f"use_adapter = {use!r}: must be one of the names given with --adapter NAME=DIR, or an "
                          f"adapter of the pool: {', '.join(there) or 'there are none'}")
    llm = LLM(args.model, dtype=options.dtype, device=make(args, MachineOptions).device, adapter=adapter,
              adapters=adapters, pool=pool, chat_template_kwargs=options.chat_template_kwargs,
              **given_settings(args, EngineOptions))
    if llm.warmup is not None:
        print(llm.warmup, file=sys.stderr)
    return llm


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    given = given_settings(args, SamplingParams)
    if (schema := given.get("json_schema")) is not None:
        try:
            given["json_schema"] = Path(schema).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"json_schema = {schema!r}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"json_schema = {schema!r}: must be UTF-8") from None
    return SamplingParams(**given)


def expert_usage(args: argparse.Namespace, llm: LLM, named: bool = False) -> Any:
    """Counted for --show_experts and --expert_map, where experts come and go, for the next warm-up, and in any case if
    they are to be `named`."""
    from ..atlas import ExpertUsage

    wanted = (named or args.trace or args.show_experts or args.expert_map or llm.warmup is not None
              or llm.engine.residency is not None)
    return ExpertUsage(llm.model.config) if wanted else None


def experts_text(llm: LLM, usage: Any) -> str:
    """Which experts the tokens visited: by name, where an atlas lies beside the model, then by index."""
    named = "" if llm.engine.atlas is None else usage.named(llm.engine.atlas)
    text = f"{named}\n\n{usage.table()}" if named else usage.table()
    return "\n\n".join([text, *(f"adapter {name}\n{experts_text(llm, own)}" for name, own in usage.adapters.items())])


def named_shares(llm: LLM, usage: Any) -> dict[str, float]:
    """Each named group's share of the gates' weight; empty where nothing was counted, or no expert has a name."""
    return {} if usage is None or llm.engine.atlas is None else usage.shares(llm.engine.atlas)


def decision_lines(about: Mapping[str, Any], trace: bool = True) -> list[str]:
    """A decision of a pool, as `to_dict` gives it: its members, and with `trace` the reasons before them."""
    lines = []
    if trace:
        for title in ("keywords", "scores"):
            table = ", ".join(f"{key} {value:.3f}" for key, value in about[title].items())
            lines.append(f"{title + ':':<10} {table or 'none'}")
        lines.append(f"threshold: {about['threshold']:.3f} ({about['scorer']})")
    why = f": {about['abstained']}" if about["abstained"] else ""
    bias = f"; inexact, bias {about['bias']:g}" if "bias" in about else ""
    lines += [f"{one['weight']:.3f}  {one['name']}{'' if why else ' (' + one['kind'] + ')'}{why}{bias}"
              for one in about["members"]]
    return [printable(line) for line in lines]


def trace_text(trace: Sequence[Mapping[str, Any]], experts: Mapping[str, float] | None = None) -> str:
    """How the parts of a request were routed, for the terminal. experts: share of the gates' weight by name."""
    lines = []
    for number, part in enumerate(trace, 1):
        if len(trace) > 1:
            lines.append(f"part {number}: {part.get('text', '')}")
        if "error" in part:
            lines.append(f"  not answered: {part['error']}")
            continue
        lines += [f"  {line}" for line in decision_lines(part)]
        lines += [f"  [{one['number']}] {one['file']}{', ' + one['section'] if one['section'] else ''} "
                  f"({one['start']}-{one['end']})" for one in part.get("passages", ())]
    if experts:
        lines.append("experts:   " + ", ".join(f"{name} {share:.3f}" for name, share in experts.items()))
    return "\n".join(map(printable, lines))


def report_usage(args: argparse.Namespace, llm: LLM, usage: Any) -> None:
    if usage is None:
        return
    if llm.warmup is not None:
        print(f"warm-up: {llm.warmup.measured(usage):.1%} measured coverage", file=sys.stderr)
    if llm.engine.residency is not None:
        from ..checkpoint import resolve
        from ..engine.residency import report
        from ..engine.warmup import record_use

        print(report(llm.engine.residency.stats), file=sys.stderr)
        folder = resolve(args.model)
        try:
            record_use(usage, folder)
        except OSError as error:  # the answers are out, and a shared model may well be read-only
            print(f"the experts' use is not recorded in {folder}: {error.strerror}", file=sys.stderr)
    if args.show_experts or args.expert_map:
        print(experts_text(llm, usage), file=sys.stderr)
    if args.expert_map:
        usage.save_heat_map(args.expert_map)
        print(f"heat map: {args.expert_map}", file=sys.stderr)
