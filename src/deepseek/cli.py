"""The command line: one thin function per verb; heavy imports happen inside them, so `--help` is instant."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from .data.settings import named_paths
from .data.verbs import add_verbs
from .deepopt.settings import TrainConfig
from .engine.verbs import add_chat_flags, add_infer_flags, chat, infer
from .errors import ConfigError, MoEDRError, nearest, printable
from .interrupts import Stopped, handled
from .serve.verbs import add_serve_flags, serve
from .tune.verbs import add_tune_flags
from .tune.verbs import run as tune
from .watch.terminal import add_watch_flags
from .watch.terminal import watch as watch_server

if TYPE_CHECKING:
    from .checkpoint import Verdict
    from .config import ModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for what the user can mend, 1 for what failed below (disk, memory, a
    library), 130 for Ctrl-C, 143 for SIGTERM. A failure is one line; DEEPSEEK_DEBUG=1 shows its traceback instead."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    if not hasattr(args, "run"):
        args.usage()
        return 2
    usual, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        with contextlib.nullcontext() if args.run is serve else handled(hard=True):
            _machine(args)
            args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):
            for note in getattr(error, "__notes__", ()):
                print(f"deepseek: stopped: {note}\nresume: {shlex.join(['deepseek', *words])}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
        sys.stdout = None
        return 0
    except Exception as error:
        if os.environ.get("DEEPSEEK_DEBUG", "0") not in ("", "0"):
            raise
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # a full disk: Python's exit would try, and fail, once more
            sys.stdout = None
        with contextlib.suppress(OSError):
            print(f"deepseek: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, MoEDRError) else 1
    finally:
        warnings.showwarning = usual


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None,
                  line: str | None = None) -> None:
    """Ours are for the user; a library's says where it comes from."""
    where = "" if issubclass(category, (UserWarning, FutureWarning)) and f"{os.sep}deepseek{os.sep}" in filename else (
        f" ({category.__name__}, {filename}:{lineno})")
    print(f"deepseek: warning: {message}{where}", file=file or sys.stderr)


def _one_line(error: Exception) -> str:
    """What a failure says to a user. Mistakes of our own are marked, since these want their traceback."""
    if isinstance(error, MoEDRError):
        return printable(str(error))
    said = printable(" ".join(str(error).split()))
    said = said if len(said) <= 1000 else f"{said[:1000]} …"
    kind = type(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in kind.__name__ or (
            isinstance(error, RuntimeError) and ("not enough memory" in said or "allocate memory" in said)):
        return f"not enough memory{': ' if said else ''}{said}"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}: {kind.__name__}"
    return f"{name}{': ' if said else ''}{said} (DEEPSEEK_DEBUG=1 shows where)"


def infer_main() -> int:
    """`deepseek-infer …` is `deepseek infer …`."""
    return main(["infer", *sys.argv[1:]])


# ---- verbs ------------------------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> None:
    from . import info as accounting

    config, judged = _judged(args.model)
    described = accounting.describe(config, name=args.model, context=args.context)
    priced = args.price_per_hour is not None and args.tokens_per_second is None
    machine = accounting.measure_machine() if args.machine or priced else None
    fits = accounting.fit(described, machine, context=args.context) if machine else None
    extra = {"fits": fits, "machine": machine, "price_per_hour": args.price_per_hour,
             "tokens_per_second": args.tokens_per_second}
    if args.json:
        from .files import to_json

        loads = None if judged is None else {"yes": judged.because is None, "because": judged.because or judged.about}
        print(to_json(accounting.to_json(described, **extra) | {"loads_here": loads}, indent=2))
        return
    print(accounting.render(described, **extra))
    if judged is None:
        print(f"try:   deepseek train {args.model} DATA --out runs/first")
        return
    if judged.because is None:
        print(f"try:   deepseek infer --model {args.model} --prompt '…'")
    print(printable(str(judged)))


def data_tokenizer(args: argparse.Namespace) -> None:
    from .data import ReadReport, read_documents
    from .files import locked
    from .tokenizer import Tokenizer

    report = ReadReport()
    with locked(args.out):
        tokenizer = Tokenizer.train((document.text for document in read_documents(args.data, report)), args.vocab_size)
        tokenizer.save(args.out)
    print(report.summary())
    print(f"{tokenizer.vocab_size:,} tokens written to {args.out}\n"
          f"try:   deepseek train nano DATA --tokenizer {args.out} --out runs/first")


def train(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from .config import PRESETS
    from .deepopt.trainer import Trainer

    names = [setting.name for setting in fields(TrainConfig)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    words = [word for word in (args.config, *args.data) if word is not None]
    out, where = args.out, {"device": args.device}
    where |= {} if args.valid_fraction is None else {"valid_fraction": args.valid_fraction}
    if not words and args.from_model is None and not args.experts and args.tokenizer is None:
        leg = {key: given.pop(key) for key in ("steps", "lr", "min_lr_ratio", "warmup_steps") if key in given}
        trainer, data = replace(Trainer.resume(out, device=args.device, **leg), **given), None
        if args.valid_fraction not in (None, trainer.valid_fraction):
            raise ConfigError(f"valid_fraction = {args.valid_fraction}: the run in {out} has {trainer.valid_fraction}")
    else:
        if args.from_model is not None and words and _is_config(words[0]):
            raise ConfigError(f"CONFIG = {words[0]!r}: does not go with --from {args.from_model}, which brings its own "
                              "configuration; leave it out")
        if args.from_model is None and words and _is_data(words[0]):
            raise ConfigError(f"config = {words[0]!r}: is no configuration; a preset ({', '.join(PRESETS)}) or a "
                              "config.json goes before DATA, or --from MODEL instead of it")
        config = words.pop(0) if args.from_model is None and words else None
        data = _training_data(words, args.experts)
        trainer = Trainer(config, out=out, from_model=args.from_model, tokenizer=args.tokenizer, **where, **given)
    model = trainer.fit(data)
    print(f"model: {model}\nloss:  {model.parent / 'loss.png'}\nlog:   {model.parent / 'log.jsonl'}\n"
          f"try:   deepseek-infer --model {model} --prompt '…'")


def quantize(args: argparse.Namespace) -> None:
    from . import convert

    if args.format == "bf16":
        if args.keep:
            raise ConfigError(f"keep = {args.keep!r}: has a meaning only with nf4 and int8")
        if args.adapter:
            raise ConfigError(f"adapter = {args.adapter!r}: has a meaning only with nf4 and int8 (`deepseek merge IN "
                              "ADAPTER OUT` writes a plain checkpoint)")
        convert.dequantize(args.source, args.out, overwrite=args.overwrite)
    else:
        report = convert.quantize(args.source, args.out, args.format, keep=args.keep, adapter=args.adapter,
                                  overwrite=args.overwrite)
        print(report.table())
    print(f"model: {args.out}\ntry:   deepseek infer --model {args.out} --prompt '…'")


def merge(args: argparse.Namespace) -> None:
    from . import convert

    print(convert.merge(args.model, args.adapter, args.out, args.dtype, overwrite=args.overwrite))
    print(f"model: {args.out}\ntry:   deepseek quantize {args.out} {args.out}-nf4")


# ---- what verbs share ---------------------------------------------------------------------------------------------


def _is_config(word: str) -> bool:
    """Whether a word that stands where DATA is expected means a configuration."""
    from pathlib import Path

    from .config import PRESETS, ModelConfig

    path = Path(word)
    if not path.exists():
        return word in PRESETS
    try:
        return (path / "config.json").is_file() if path.is_dir() else (
            path.suffix == ".json" and path.stat().st_size < 1 << 20 and bool(ModelConfig.from_file(path)))
    except MoEDRError:
        return path.name == "config.json"


def _is_data(word: str) -> bool:
    """Whether a word that stands where CONFIG is expected can be none: a folder of neither a checkpoint nor a run, or a
    file of another kind."""
    from pathlib import Path

    path = Path(word)
    if path.is_dir():
        return not any((path / name).is_file() for name in ("config.json", "model/config.json"))
    return path.is_file() and path.suffix != ".json"


def _judged(name: str) -> tuple[ModelConfig, Verdict | None]:
    """The configuration that `info` accounts for, and whether the checkpoint loads; None where there is none."""
    from pathlib import Path

    from .config import PRESETS, ModelConfig

    path = Path(name).expanduser()
    if path.is_file():
        return ModelConfig.from_file(path, strict=True), None
    if not path.exists() and name in PRESETS:
        return ModelConfig.preset(name), None
    from .checkpoint import resolve, verdict

    judged = verdict(folder := resolve(name, weights=False))
    if (inside := ModelConfig.of_wrapper(folder)) is not None:  # accounted for all the same
        return inside[0], judged
    try:
        return ModelConfig.from_file(folder), judged
    except ConfigError as error:
        raise ConfigError(f"loads here: no, because {error}") from None


def _training_data(words: Sequence[str], experts: Sequence[str] | None) -> Any:
    """DATA, or {expert name: its paths} of --experts; a bare DATA beside them is text without a name."""
    if not experts:
        if not words:
            raise ConfigError("data: at least one DATA or --experts NAME=PATH must be given (--out alone continues "
                              "the run that it holds)")
        return words
    return named_paths(experts, "experts") | ({"": words} if words else {})


def _machine(args: argparse.Namespace) -> None:
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


# ---- the parser ---------------------------------------------------------------------------------------------------

class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """A default that is none, and one that the help states itself, are not worth a word."""
        plain = action.default in (None, False, "", []) or "(default: " in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and suggests the nearest spelling of a flag or a command that it does not know."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
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


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(prog="deepseek", formatter_class=_Formatter,
                                     description="MoE-DR: an open implementation of the DeepSeek-V3 system")
    parser.add_argument("--version", action="version", version=f"moe-dr {__version__}")
    parser.set_defaults(usage=parser.print_help)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    verb = _verb(verbs, "info", info, "parameters, FLOPs, memory and cost of a model, and what fits this machine")
    verb.add_argument("model", metavar="NAME|PATH", help="a preset, a config.json, a checkpoint folder or a hub id")
    verb.add_argument("--context", type=int, default=4096, help="tokens of context for attention FLOPs and the cache")
    verb.add_argument("--machine", action="store_true", help="measure this machine and say which formats fit")
    verb.add_argument("--price_per_hour", type=float, help="price of the machine, for the cost of 10^8 tokens")
    verb.add_argument("--tokens_per_second", type=float, help="throughput for the cost; else this machine's bound")
    verb.add_argument("--json", action="store_true", help="print JSON")

    verb = _verb(verbs, "data", None, "prepare data")
    steps = verb.add_subparsers(title="steps", metavar="STEP")
    verb.set_defaults(usage=verb.print_help)
    step = _verb(steps, "tokenizer", data_tokenizer, "train a byte-level BPE tokenizer on text")
    step.add_argument("data", nargs="+", metavar="DATA", help="text, code, JSONL or folders of them")
    step.add_argument("--vocab_size", type=int, default=16384, help="tokens in all, special ones included")
    step.add_argument("--out", required=True, help="folder to write")
    add_verbs(steps, _verb)

    verb = _verb(verbs, "train", train, "train a model from scratch or from a checkpoint; the same command, or --out "
                 "alone, continues a stopped run, more --steps extend it")
    verb.add_argument("config", nargs="?", metavar="CONFIG", help="a preset or a config.json; not with --from")
    verb.add_argument("data", nargs="*", metavar="DATA", help="text, code, JSONL or folders of them")
    verb.add_argument("--experts", nargs="+", action="extend", metavar="NAME=PATH",
                      help="text by expert: binds the routing groups to these names; a name may come several times")
    verb.add_argument("--out", required=True, help="folder of the run")
    verb.add_argument("--from", dest="from_model", metavar="MODEL", help="a checkpoint folder or a hub id: starts from "
                      "its weights, with its configuration, tokenizer and names; all parameters are trained")
    verb.add_argument("--tokenizer", help="folder of a tokenizer; else one is trained on the data")
    verb.add_argument("--valid_fraction", type=float, default=argparse.SUPPRESS,
                      help="share of the documents held out (default: 0.01)")
    verb.set_defaults(valid_fraction=None)
    _device_flags(verb)
    for setting in fields(TrainConfig):  # no default here: what is not given is the run's, where one goes on
        kind: dict[str, Any] = {"action": "store_true"} if setting.default is False else {
            "type": type(setting.default or 0.0)}
        shown = f" (default: {setting.default})" if setting.default else ""
        verb.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, help=setting.metadata["help"] + shown, **kind)
        verb.set_defaults(**{setting.name: None})

    verb = _verb(verbs, "atlas", None, "experts by name: measure, show and compare them")
    steps = verb.add_subparsers(title="steps", metavar="STEP")
    verb.set_defaults(usage=verb.print_help)
    _add_atlas_verbs(steps)

    add_tune_flags(_verb(verbs, "tune", tune, "tune experts or side paths on records; the same command continues a "
                         "stopped run"))

    verb = _verb(verbs, "quantize", quantize, "write a checkpoint in fewer bits; the same command goes on after a stop")
    verb.add_argument("source", metavar="IN", help="a checkpoint folder or a hub id (BF16, FP32 or FP8)")
    verb.add_argument("out", metavar="OUT", help="folder to write")
    verb.add_argument("--format", choices=("nf4", "int8", "bf16"), default="nf4",
                      help="bits of a weight; bf16 writes a plain checkpoint of a quantized one")
    verb.add_argument("--keep", nargs="+", action="extend", default=[], metavar="PATTERN",
                      help="weights that stay as they are, such as 'lm_head.*' or 'model.layers.0.*'")
    verb.add_argument("--adapter", metavar="DIR", help="a delta or a LoRA adapter of IN, to merge in first")
    verb.add_argument("--overwrite", action="store_true", help="replace what is in OUT")

    verb = _verb(verbs, "merge", merge, "write the checkpoint that a delta or a LoRA adapter makes of its base; the "
                 "same command goes on after a stop")
    verb.add_argument("model", metavar="MODEL", help="the base: a checkpoint folder or a hub id (BF16, FP32 or FP8)")
    verb.add_argument("adapter", metavar="ADAPTER", help="a delta or an adapter that `deepseek tune` or peft left")
    verb.add_argument("out", metavar="OUT", help="folder to write")
    verb.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                      help="of the weights; auto is MODEL's, or float32 where that would lose what the adapter adds")
    verb.add_argument("--overwrite", action="store_true", help="replace what is in OUT")

    verb = _verb(verbs, "infer", infer, "complete a prompt, printing text as it comes")
    _device_flags(verb)
    add_infer_flags(verb)

    verb = _verb(verbs, "chat", chat, "a conversation in the terminal")
    _device_flags(verb)
    add_chat_flags(verb)

    verb = _verb(verbs, "serve", serve, "answer over HTTP as OpenAI's server does")
    _device_flags(verb)
    add_serve_flags(verb)

    verb = _verb(verbs, "watch", watch_server, "look at a server that runs, from a terminal")
    add_watch_flags(verb)
    return parser


Run = Callable[[argparse.Namespace], None]


def _verb(verbs: Any, name: str, run: Run | None, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text, formatter_class=_Formatter)
    if run is not None:
        verb.set_defaults(run=run)
    return verb


def _device_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="cpu", help="cpu or cuda")
    verb.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")


def _add_atlas_verbs(steps: Any) -> None:
    step = _verb(steps, "profile", _of_atlas("profile"), "measure which experts the text of each name visits")
    step.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    step.add_argument("--data", nargs="+", action="extend", required=True, metavar="NAME=FILE",
                      help="text of a name; a name may come several times, and a few names tell more than one")
    step.add_argument("--score", choices=("token", "gate"), default="token", help="what experts are ranked by")
    step.add_argument("--threshold", type=float, help="share to select; else 0.2 for token, 0.1 for gate")
    step.add_argument("--out", metavar="FILE", help="else atlas.json beside the model")
    _sample_flags(step)
    step = _verb(steps, "show", _of_atlas("show"), "named groups, their evidence and overlap")
    step.add_argument("place", metavar="MODEL|ATLAS", help="a checkpoint folder, a hub id or an atlas.json")
    step.add_argument("--png", metavar="FILE", help="draw layers by experts, coloured by name")
    step.add_argument("--html", metavar="FILE", help="write a page with all of it")
    step = _verb(steps, "compare", _of_atlas("compare"),
                 "how far routing has moved between two checkpoints of one shape")
    step.add_argument("first", metavar="A", help="a checkpoint folder or a hub id")
    step.add_argument("second", metavar="B", help="another of the same shape")
    step.add_argument("--data", nargs="+", action="extend", required=True, metavar="FILE", help="text to route")
    step.add_argument("--atlas", metavar="FILE", help="names to follow; else the atlas beside B, or A")
    _sample_flags(step)


def _of_atlas(step: str) -> Run:
    """The function of a step, whose room loads torch, when it is run."""
    def run(args: argparse.Namespace) -> None:
        from .atlas import verbs

        getattr(verbs, f"atlas_{step}")(args)

    return run


def _sample_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--tokens", type=int, default=1 << 16, help="tokens to sample (for each name)")
    verb.add_argument("--seq_len", type=int, help="length of a window at most; else 512, or what the model takes")
    verb.add_argument("--seed", type=int, default=0, help="of the sample")
    _device_flags(verb)


if __name__ == "__main__":
    sys.exit(main())
