"""argparse as all commands use it: both spellings of a flag, flags of settings classes, help without empty defaults."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import nearest
from ..settings import declared, former_names, rename

S = TypeVar("S")
Run = Callable[[argparse.Namespace], None]
METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "FILE"}  # of flags that say no other


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """A default that is none, and one that the help states itself, are not worth a word."""
        plain = action.default is None or action.default is False or action.default in ("", [])
        return action.help if plain or "(default: " in (action.help or "") else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type) or super()._get_default_metavar_for_optional(action).rpartition("_")[2]


class Switch(argparse.Action):
    """`--name` and `--no-name`, in any spelling; help shows those that are declared."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith(("--no-", "--no_")))

    def format_usage(self) -> str:
        return " | ".join(self.option_strings)


class Flags(dict[str, argparse.Action]):
    """A parser's flags, in any mixture of hyphens and underscores."""

    def __contains__(self, flag: object) -> bool:
        return super().__contains__(_plain(str(flag)))

    def __getitem__(self, flag: str) -> argparse.Action:
        return super().__getitem__(_plain(flag))

    def __setitem__(self, flag: str, action: argparse.Action) -> None:
        super().__setitem__(_plain(flag), action)


def _plain(flag: str) -> str:
    return flag[:2] + flag[2:].replace("-", "_")


class Parser(argparse.ArgumentParser):
    """Takes flags with hyphens or underscores and no abbreviated ones; suggests the nearest spelling of a flag or a
    command that it does not know."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)
        flags = Flags(self._option_string_actions)
        for place in (self, *self._action_groups):
            place._option_string_actions = flags
        self.fill: Callable[[Parser], None] | None = None  # adds the flags when they are needed first
        self.commands: dict[str, Parser] = {}

    def filled(self) -> Parser:
        """Itself, with its flags."""
        if self.fill is not None:
            self.fill(self)
            self.fill = None
        return self

    def group(self, title: str) -> Any:
        """The place in the help of flags that belong together."""
        return next((group for group in self._action_groups if group.title == title), None) or (
            self.add_argument_group(title))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.filled()
        for flag, action in [*self._option_string_actions.items()]:
            if isinstance(action, Switch):
                self._option_string_actions.setdefault(f"--no_{flag[2:]}", action)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for one in self._actions if one.help != argparse.SUPPRESS for flag in one.option_strings]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            hint = nearest(_plain(flag) if flag.startswith("--") else flag, flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
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


def add_settings(parser: Parser, kind: type, groups: str | Mapping[str, str] = "", **special: dict[str, Any]) -> None:
    """Flags of a settings class; what is not given is None, for `given_settings`.

    groups: the title of all, or title -> names of those that become flags, with blanks between them. special: what
    argparse is told of a field's flag instead of what its declaration says.
    """
    if isinstance(groups, str):
        groups = {groups: " ".join(one.name for one in declared(kind))}
    titles = {name: title for title, names in groups.items() for name in names.split()}
    for title in filter(None, groups):
        parser.group(title)
    for one in declared(kind):
        if one.name not in titles:
            continue
        own: dict[str, Any] = {"action": Switch} if one.kind is bool else {
            "type": one.kind, "choices": one.choices, "metavar": one.option.metavar}
        if one.many:
            own |= {"action": "extend", "type": str} | ({"nargs": 1} if one.option.each else {"nargs": "+"})
        shown = "" if one.default in (None, (), "") or one.default is False else f" (default: {one.default})"
        flags = [f"--{one.name}", f"--no_{one.name}"] if one.default is True else [f"--{one.name}"]
        place = parser.group(titles[one.name]) if titles[one.name] else parser
        place.add_argument(*flags, default=None, help=one.option.help + shown, **special.get(one.name) or own)
        if one.option.formerly:
            parser.add_argument(f"--{one.option.formerly}", help=argparse.SUPPRESS, **own)


def given_settings(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What `args` say of a settings class."""
    names = former_names(kind)
    given = {name: value for name in (*names, *(one.name for one in declared(kind)))
             if (value := getattr(args, name, None)) is not None}
    return rename(given, names, tell, "--{}")


def make(args: argparse.Namespace, kind: Callable[..., S], **defaults: Any) -> S:
    """An object of a settings class, of what `args` say and of defaults of the command's own."""
    return kind(**defaults | given_settings(args, kind))  # type: ignore[arg-type]


def tell(message: str) -> None:
    """Warn whoever types a command or writes a file for it."""
    warnings.warn(message, FutureWarning, stacklevel=2)
