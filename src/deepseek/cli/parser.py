"""argparse as all commands use it: both spellings of a flag, flags of settings classes, help without empty defaults."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from ..errors import ConfigError, nearest
from ..files import read_yaml
from ..settings import declared, rename

S = TypeVar("S")
Run = Callable[[argparse.Namespace], None]
METAVARS: dict[Any, str] = {int: "N", float: "X", json.loads: "JSON"}  # of flags that say no other


class Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

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
        self.renamed: dict[str, str] = {}  # former name of a flag -> name
        self.checked: set[str] = set()  # flags whose values a settings class checks

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
        settings = self._read_config(args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for one in self._actions if one.help != argparse.SUPPRESS for flag in one.option_strings]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            hint = nearest(_plain(flag) if flag.startswith("--") else flag, flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        given = rename({name: value for name, value in vars(found).items() if value not in (None, [])}, self.renamed,
                       tell, "--{}")
        for name, value in (settings | given | ({"from_file": settings} if settings else {})).items():
            setattr(found, name, value)
        return found, unknown

    def add_former(self, former: str, name: str, **options: Any) -> None:
        """A flag that was renamed to `name`."""
        self.renamed[former] = name
        self.add_argument(f"--{former}", **options | {"help": argparse.SUPPRESS})

    def add_config(self) -> None:
        """The flag --config: a file with whatever the command line could say, over which flags win."""
        self.add_argument("--config", dest="config_file", metavar="FILE.yaml",
                          help="a file with any of these settings; flags win over it")

    def _read_config(self, args: Any) -> dict[str, Any]:
        """What the file of --config says, by the names that flags have in a namespace; {} without one. Raises
        ConfigError naming file, setting, rule and value."""
        if "--config" not in self._option_string_actions:
            return {}
        first = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?")  # a missing value is said below
        if (path := first.parse_known_args(args)[0].config) is None:
            return {}
        if not isinstance(table := read_yaml(path) or {}, dict):
            raise ConfigError(f"{path}: must be a table of settings, got {type(table).__name__}")
        try:
            return self._settings(rename(table, self.renamed, tell, "`{}`"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def _settings(self, table: Mapping[str, Any]) -> dict[str, Any]:
        actions = {name: one for one in self._actions if one.help != argparse.SUPPRESS
                   for name in ((one.option_strings or [one.dest])[0].lstrip("-"), one.dest)
                   if one.dest not in ("help", "config_file")}
        found = {}
        for name, value in table.items():
            if (action := actions.get(name)) is None:
                raise ConfigError(f"unknown setting {name}; there are {', '.join(actions)}"
                                  f"{nearest(str(name), actions)}")
            if value is None:
                continue
            if isinstance(value, dict) and "NAME=" in str(action.metavar):  # as the words NAME=PATH of the flag
                value = [f"{key}={one}" for key, own in value.items()
                         for one in (own if isinstance(own, list) else [own])]
            if action.dest not in self.checked:
                value = _words(name, value, action)
            action.required = False
            if not action.option_strings and action.nargs is None:
                action.nargs = "?"
            found[action.dest] = value
        return found

    def error(self, message: str) -> NoReturn:
        """The message, below the usage only where that is short."""
        usage = self.format_usage()
        if usage.count("\n") > 4:
            self.exit(2, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")
        super().error(message)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """A text that is no number or JSON stays one: the settings class says what it should be."""
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            if action.dest in self.checked:
                return text
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices and action.dest not in self.checked:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {known})"
                                                 f"{nearest(str(value), map(str, action.choices))}")


def _words(name: str, value: Any, action: argparse.Action) -> Any:
    """A value of a file as the command line would say it."""
    many = action.nargs in ("*", "+")
    words = [value] if many and isinstance(value, str) else value
    if not (isinstance(words, list) and all(isinstance(one, str) for one in words) if many else isinstance(words, str)):
        raise ConfigError(f"{name} = {value!r}: must be {'texts' if many else 'a text'}")
    return words


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


def add_settings(parser: Parser, kind: type, groups: str | Mapping[str, str] = "") -> None:
    """Flags of a settings class; what is not given is None, for `given_settings`.

    groups: the title of all, or title -> names of those that become flags, with blanks between them.
    """
    if isinstance(groups, str):
        groups = {groups: " ".join(one.name for one in declared(kind))}
    titles = {name: title for title, names in groups.items() for name in names.split()}
    for title in filter(None, groups):
        parser.group(title)
    for one in declared(kind):
        if one.name not in titles:
            continue
        parser.checked.add(one.name)
        shown = "" if one.default in (None, (), "") or one.default is False else (
            f" (default: {'on' if one.default is True else one.default})")
        own: dict[str, Any] = {"dest": one.name, "help": one.option.help + shown}
        if one.kind is bool:
            own["action"] = Switch
        else:
            own |= {"type": json.loads if one.kind is dict else one.kind, "metavar": one.option.metavar}
            own |= {"choices": one.choices} if one.choices else {}
            own |= {"action": "extend", "nargs": 1 if one.option.each else "+"} if one.many else {}
        name = one.option.flag or one.name
        place = parser.group(titles[one.name]) if titles[one.name] else parser
        place.add_argument(f"--{name}", *([f"--no_{name}"] if one.default is True else []), **own)
        if one.option.formerly:
            parser.add_former(one.option.formerly, one.name, **own | {"dest": one.option.formerly})


def given_settings(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What `args` say of a settings class."""
    return {one.name: value for one in declared(kind) if (value := getattr(args, one.name, None)) is not None}


def make(args: argparse.Namespace, kind: Callable[..., S], **defaults: Any) -> S:
    """An object of a settings class, of what `args` say and of defaults of the command's own."""
    return kind(**defaults | given_settings(args, kind))  # type: ignore[arg-type]


def tell(message: str) -> None:
    """Warn the user of a command or of a file for it."""
    warnings.warn(message, FutureWarning, stacklevel=2)
