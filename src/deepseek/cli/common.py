"""What commands share: flags, and what they say to LLM. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.sampler import SamplingParams

Run = Callable[[argparse.Namespace], None]


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """A default that is none, and one that the help states itself, are not worth a word."""
        plain = action.default in (None, False, "", []) or "(default: " in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and suggests the nearest spelling of a flag or a command that it does not know."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)
        self.fill: Callable[[Parser], None] | None = None  # adds the flags when they are needed first

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.fill is not None:
            self.fill(self)
            self.fill = None
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(flag.partition('=')[0], flags)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """The message, below the usage only where that is short."""
        usage = self.format_usage()
        if usage.count("\n") > 4:
            self.exit(2, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")
        super().error(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {known})"
                                                 f"{nearest(str(value), map(str, action.choices))}")


def add_command(commands: Any, name: str, run: Run | None, text: str) -> Parser:
    """A parser of its own for `name`, among commands or steps of one."""
    parser: Parser = commands.add_parser(name, help=text, description=text)
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_steps(parser: Parser) -> Any:
    """A place for the steps of a command; without one of them the command shows its help."""
    parser.set_defaults(usage=parser.print_help)
    return parser.add_subparsers(title="steps", metavar="STEP")


def add_device_flags(parser: Parser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")


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
    parser.add_argument("--model", required=True, help="a checkpoint folder or a hub id")
    add_engine_flags(parser)
    parser.add_argument("--use_adapter", metavar="NAME", help="which of the adapters with names answers; else the base")
    add_sampling_flags(parser)


def add_engine_flags(parser: Parser) -> None:
    parser.add_argument("--adapter", nargs="+", action="extend", default=[], metavar="[NAME=]DIR",
                        help="a delta or an adapter that `deepseek tune` left, to put in; with names, LoRA adapters "
                        "beside the base, of which each request goes through one or none")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--chat_template_kwargs", type=template_variables, metavar="JSON",
                        help="variables of the chat template, such as '{\"thinking\": true}'")
    parser.add_argument("--batch_size", type=int, default=32, help="requests that run together at most")
    parser.add_argument("--step_tokens", type=int, default=512, help="tokens of a step; longer prompts go in pieces")
    parser.add_argument("--policy", choices=("fcfs", "expert"), default="fcfs",
                        help="which waiting request is next: the first, or the one whose experts are in use")
    parser.add_argument("--expert_memory", metavar="SIZE",
                        help="memory for routed experts of a quantized model, such as 4GiB; the others stay on disk")
    parser.add_argument("--warmup_experts", default="", metavar="NAMES",
                        help="names, or auto (those of recorded use), in memory before the first request")
    parser.add_argument("--no_prefetch", action="store_true", help="do not read the next layer's experts ahead")


def add_sampling_flags(parser: Parser) -> None:
    parser.add_argument("--max_tokens", type=int, default=256, help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.95, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--top_k", type=int, default=0, help="keep this many tokens; 0 keeps all")
    parser.add_argument("--min_p", type=float, default=0.0, help="drop tokens below this share of the likeliest one")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages what has been said")
    parser.add_argument("--presence_penalty", type=float, default=0.0, help="above 0 discourages what the answer said")
    parser.add_argument("--frequency_penalty", type=float, default=0.0, help="as above, as often as it said it")
    parser.add_argument("--min_tokens", type=int, default=0, help="tokens before which the text does not end")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--stop", action="append", default=[], help="end at this text; may be given several times")
    parser.add_argument("--show_experts", action="store_true", help="print the experts' use, by name and by layer")
    parser.add_argument("--expert_map", metavar="PNG", help="save that table as a heat map")


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
              chat_template_kwargs=args.chat_template_kwargs, batch_size=args.batch_size,
              step_tokens=args.step_tokens, policy=args.policy, expert_memory=args.expert_memory,
              warmup_experts=args.warmup_experts, prefetch=not args.no_prefetch)
    if llm.warmup is not None:
        print(llm.warmup, file=sys.stderr)
    return llm


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    from ..engine.sampler import SamplingParams

    schema = getattr(args, "json_schema", None)
    try:
        text = None if schema is None else Path(schema).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"json_schema = {schema!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"json_schema = {schema!r}: must be UTF-8") from None
    return SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                          min_p=args.min_p, repetition_penalty=args.repetition_penalty,
                          presence_penalty=args.presence_penalty, frequency_penalty=args.frequency_penalty,
                          min_tokens=args.min_tokens, seed=args.seed,
                          stop=tuple(args.stop), json_schema=text)


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
