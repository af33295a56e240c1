"""One declaration per option, in a dataclass: `name: Annotated[type, Option(help, rule)] = default`.

It gives the default, the check (when a `Settings` is made), the flag on the command line (cli/parser.py), the
key of YAML files and the row in docs/options.md. A bool, a Literal, texts and paths need no rule; None
passes where the type says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial, wraps
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin

from .deprecation import warn
from .errors import ConfigError, nearest

S = TypeVar("S")
Device = Literal["cpu", "cuda"]
Rule = tuple[str, Callable[[Any], bool]]  # as a message says it, and whether a value follows it


@dataclass(frozen=True)
class Option:
    """What a field's type does not say. metavar: of the flag's value, where it is not the usual one of the type.
    formerly: the name of the last release, which works and warns. each: the flag of a sequence takes one value and may
    come several times; else it takes several. flag: its name, where it is another.
    secret: no message shows the value."""

    help: str
    rule: Rule | None = None
    metavar: str | None = None
    formerly: str | None = None
    each: bool = False
    flag: str | None = None
    secret: bool = False


class Declared(NamedTuple):
    """An option as its dataclass declares it. kind: of one value, as a flag takes it; choices: of a Literal; many: a
    sequence of them."""

    name: str
    default: Any
    option: Option
    kind: type
    choices: tuple[str, ...] | None
    rule: Rule | None
    many: bool


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite float, or an integer that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def one_of(*words: str) -> Rule:
    return f"must be {', '.join(words[:-1])} or {words[-1]}", lambda v: isinstance(v, str) and v in words


def between(least: int, most: int) -> Rule:
    return f"must be an integer from {least} to {most}", lambda v: is_int(v) and least <= v <= most


COUNT: Rule = "must be an integer >= 1", lambda v: is_int(v) and v >= 1
NATURAL: Rule = "must be an integer >= 0", lambda v: is_int(v) and v >= 0
ABOVE_ZERO: Rule = "must lie in (0, 1]", lambda v: is_number(v) and 0 < v <= 1
POSITIVE: Rule = "must be a positive number", lambda v: is_number(v) and v > 0
NOT_NEGATIVE: Rule = "must be a number >= 0", lambda v: is_number(v) and v >= 0
SHARE: Rule = "must lie in [0, 1)", lambda v: is_number(v) and 0 <= v < 1
UP_TO_ONE: Rule = "must lie in [0, 1]", lambda v: is_number(v) and 0 <= v <= 1
SWITCH: Rule = "must be true or false", lambda v: isinstance(v, bool)
TEXT: Rule = "must be a text", lambda v: isinstance(v, str)
TEXTS: Rule = "must be texts, none of them empty", lambda v: isinstance(v, tuple) and all(
    isinstance(one, str | Path) and str(one) for one in v)
JSON: Rule = "must be an object of JSON values, {name: value}", lambda v: isinstance(v, dict) and _is_json(v)
PATH: Rule = "must be a word or a path", lambda v: isinstance(v, str | Path) and bool(str(v))


@cache
def declared(settings: type) -> tuple[Declared, ...]:
    """The options of a dataclass, in its order: those of its fields that are Annotated."""
    hints = {name: eval(text, vars(sys.modules[base.__module__]))  # get_type_hints would not let a rule see its module
             for base in reversed(settings.__mro__) for name, text in vars(base).get("__annotations__", {}).items()
             if text.startswith("Annotated[")}
    found = []
    for field in (field for field in fields(settings) if field.name in hints):
        kind, option = get_args(hints[field.name])[:2]
        kinds = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
        choices = next((get_args(one) for one in kinds if get_origin(one) is Literal), None)
        many = any(get_origin(one) in (tuple, Sequence) for one in kinds)
        rule = option.rule or (SWITCH if bool in kinds else one_of(*choices) if choices else TEXTS if many else
                               PATH if Path in kinds else TEXT if {*kinds} <= {str, type(None)} else None)
        if rule and type(None) in kinds:
            rule = rule[0], partial(_is_null_or, rule[1])
        found.append(Declared(field.name, None if field.default is MISSING else field.default, option,
                              next((one for one in (str, bool, int, float) if one in kinds),
                                   dict if any(get_origin(one) is Mapping for one in kinds) else str),
                              choices, rule, many))
    return tuple(found)


def check(settings: Any, error: type[Exception] = ConfigError) -> None:
    """Raises `error` naming option, value and rule, for the first option that breaks its own. A list, or one text, that
    stands for a tuple becomes one."""
    for one in declared(settings.__class__):
        value = getattr(settings, one.name)
        if one.rule is None or one.rule[1](value):
            continue
        if one.many and isinstance(value, list | str) and one.rule[1](
                several := (value,) if isinstance(value, str) else tuple(value)):
            object.__setattr__(settings, one.name, several)
        else:
            hint = nearest(value, one.choices) if one.choices and isinstance(value, str) else ""
            raise error(f"{one.name}{'' if one.option.secret else f' = {value!r}'}: {one.rule[0]}{hint}")


class Settings:
    """Base of a dataclass of options, which are checked when it is made."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Of names and values. Raises ConfigError, which begins with `where`, for an unknown name, listing those that
        there are, and for an impossible value."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in names and name not in former_names(cls):
                raise ConfigError(f"{where}unknown setting {name}; there are {', '.join(names)}"
                                  f"{nearest(str(name), names)}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None


def former_names(settings: type) -> dict[str, str]:
    """Former name -> name, of the options that were renamed."""
    return {one.option.formerly: one.name for one in declared(settings) if one.option.formerly}


def rename(given: dict[str, Any], names: Mapping[str, str], tell: Callable[[str], None] = warn,
           spelled: str = "{}") -> dict[str, Any]:
    """`given` with new names for former ones (names: former -> new); `tell` gets a message for each, `spelled` as a
    user wrote it. Raises ConfigError where both are given."""
    for former in (former for former in names if former in given):
        if (name := names[former]) in given:
            raise ConfigError(f"{name} and {former}: are two names of one setting: leave out {former}")
        tell(f"{spelled.format(former)} is called {spelled.format(name)} now")
    return {names.get(name, name): value for name, value in given.items()}


def takes_former_names(settings: type[S]) -> type[S]:
    """Of a dataclass: it also takes its renamed options by their former names."""
    made = settings.__init__

    @wraps(made)
    def init(self: Any, *args: Any, **given: Any) -> None:
        made(self, *args, **rename(given, former_names(settings)))

    settings.__init__ = init  # type: ignore[method-assign]
    return settings


def table(settings: type) -> str:
    """The options in Markdown, for docs/options.md."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for one in declared(settings):
        words = one.default if isinstance(one.default, tuple) else (one.default,)
        default = "" if one.default is None else ", ".join(
            f"`{str(word).lower() if isinstance(word, bool) else word}`" for word in words if word != "")
        rule = f" ({one.rule[0]})" if one.rule and (one.option.rule or one.choices) else ""
        lines.append(f"| `{one.name}` | {default} | {one.option.help}{rule} |")
    return "\n".join(lines)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_null_or(holds: Callable[[Any], bool], value: Any) -> bool:
    return value is None or holds(value)
