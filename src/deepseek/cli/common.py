"""What commands share: flags, and what they say to LLM. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.options import EngineOptions
from ..engine.sampling_params import SamplingParams
from ..errors import ConfigError
from ..settings import declared
from .parser import Parser, add_settings, given_settings

if TYPE_CHECKING:
    from ..engine.llm import LLM


def add_device_flags(parser: Parser) -> None:
    machine = parser.group("machine")
    machine.add_argument("--device", default="cpu", help="cpu or cuda")
    machine.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")


def add_map_flag(parser: Any) -> None:
    parser.add_argument("--map", metavar="YAML", help="which column of a record is what, where names do not say it")


def apply_device(args: argparse.Namespace) -> None:
    """Check --device and apply --threads, of commands that have them, before anything else is loaded."""
    if not hasattr(args, "threads"):
        return
    import torch

    if args.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device = {args.device!r}: must be cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': this torch finds no GPU")
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"threads = {args.threads}: must be an integer >= 1")
        torch.set_num_threads(args.threads)


def add_model_flags(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("--use_adapter", metavar="NAME", help="which of the adapters with names answers; else the base")
    _add_sampling_flags(parser)
    add_engine_flags(parser)


def add_engine_flags(parser: Parser) -> None:
    engine = parser.group("engine")
    engine.add_argument("--adapter", nargs="+", action="extend", default=[], metavar="[NAME=]DIR",
                        help="a delta or LoRA adapter, made part of the model; NAME=DIR keeps a LoRA adapter beside "
                        "the base, for the requests that choose its name")
    engine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    engine.add_argument("--chat_template_kwargs", type=template_variables, metavar="JSON",
                        help="variables of the chat template, such as '{\"thinking\": true}'")
    add_settings(parser, EngineOptions, {"engine": " ".join(one.name for one in declared(EngineOptions))})


def _add_sampling_flags(parser: Parser) -> None:
    add_settings(parser, SamplingParams, {
        "sampling": "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty "
                    "min_tokens seed stop ignore_eos"}, stop={"action": "append", "metavar": "TEXT"})
    use = parser.group("experts")
    use.add_argument("--show_experts", action="store_true", help="print the experts' use, by name and by layer")
    use.add_argument("--expert_map", metavar="PNG", help="save that table as a heat map")


def template_variables(text: str) -> dict[str, Any]:
    """The value of the flag --chat_template_kwargs, a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: must be an object such as {{\"thinking\": true}}")
    return found


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

    adapter, adapters = named_adapters(args.adapter)
    if (use := getattr(args, "use_adapter", None)) is not None and use not in adapters:
        raise ConfigError(f"use_adapter = {use!r}: must be one of the names given with --adapter NAME=DIR: "
                          f"{', '.join(adapters) or 'there are none'}")
    llm = LLM(args.model, dtype=args.dtype, device=args.device, adapter=adapter, adapters=adapters,
              chat_template_kwargs=args.chat_template_kwargs, **given_settings(args, EngineOptions))
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

    wanted = (named or args.show_experts or args.expert_map or llm.warmup is not None
              or llm.engine.residency is not None)
    return ExpertUsage(llm.model.config) if wanted else None


def experts_text(llm: LLM, usage: Any) -> str:
    """Which experts the tokens visited: by name, where an atlas lies beside the model, then by index."""
    named = "" if llm.engine.atlas is None else usage.named(llm.engine.atlas)
    told = f"{named}\n\n{usage.table()}" if named else usage.table()
    return "\n\n".join([told, *(f"adapter {name}\n{experts_text(llm, own)}" for name, own in usage.adapters.items())])


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
