"""Maps columns of records to their meaning, where keys do not tell it. A column is a name, a dotted path into nested
objects, or the number of a column, from 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..files import read_yaml
from .record_formats import (
    VARIABLES,
    ParsedRecord,
    asked_and_answered,
    checked,
    conversation,
    expert_of,
    joined,
    parsed,
    part_text,
    says,
)
from .turns import filled, is_talk

_JOINED = ("text", "prompt", "answer", "reasoning")
_BESIDE = ("system", "tools", "history", "reasoning", VARIABLES)

Column = str | int


@dataclass(frozen=True)
class RecordMap:
    """Which columns of a record are what: `text`, or `messages`, or `prompt` and `answer` (several are joined by
    newlines; each may be a message or a list of them). Beside the last two: system, tools, chat_template_kwargs, and
    beside prompt and answer history and reasoning. metadata: {name: column}. header: whether the first row of a table
    names its columns; if not given, it does unless all columns here are numbers. Raises ConfigError for a combination
    that says nothing."""

    text: tuple[Column, ...] = ()
    prompt: tuple[Column, ...] = ()
    answer: tuple[Column, ...] = ()
    messages: tuple[Column, ...] = ()
    system: tuple[Column, ...] = ()
    history: tuple[Column, ...] = ()
    reasoning: tuple[Column, ...] = ()
    tools: tuple[Column, ...] = ()
    chat_template_kwargs: tuple[Column, ...] = ()
    expert: tuple[Column, ...] = ()
    metadata: tuple[tuple[str, Column], ...] = ()
    header: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("text", "messages", "prompt") if getattr(self, name)]
        if len(given) != 1 or bool(self.prompt) != bool(self.answer):
            raise ConfigError(f"map: must have one of text, messages, or prompt with answer; it has "
                              f"{', '.join([*given, *(['answer'] if self.answer else [])]) or 'none'}")
        for name in _BESIDE:
            where = ("prompt",) if name in ("history", "reasoning") else ("prompt", "messages")
            if getattr(self, name) and given[0] not in where:
                raise ConfigError(f"map: {name}: has no place beside {given[0]}, only beside {' or '.join(where)}")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (*(c for field in fields(self) if field.name not in ("metadata", "header")
                  for c in getattr(self, field.name)), *(c for _, c in self.metadata))

    @classmethod
    def from_dict(cls, keys: Any) -> RecordMap:
        """Make a map from the keys of a YAML mapping. Raises ConfigError for an unknown key or a value of another
        kind."""
        names = [field.name for field in fields(cls)]
        if not isinstance(keys, Mapping) or (unknown := set(keys) - set(names)):
            what = f"unknown key {min(map(str, unknown))!r}" if isinstance(keys, Mapping) else "not a mapping"
            raise ConfigError(f"map: {what}: the keys are {', '.join(names)}")
        values: dict[str, Any] = {}
        for name, value in keys.items():
            if name == "header":
                good, out = isinstance(value, bool), value
            elif name == "metadata":
                value = {c: c for c in value} if isinstance(value, list) else value
                good = isinstance(value, Mapping) and all(_is_column(c) for c in value.values())
                out = tuple((str(k), c) for k, c in value.items()) if good else ()
            else:
                out = tuple(value) if isinstance(value, list) else (value,)
                good = all(map(_is_column, out)) and (len(out) == 1 or (bool(out) and name in _JOINED))
            if not good:
                raise ConfigError(f"map: {name} = {value!r}: must be "
                                  + {"header": "true or false", "metadata": "{name: column} or a list of columns"}.get(
                                      name, "a column or a list of them"))
            values[name] = out
        return cls(**values)

    @classmethod
    def of(cls, value: RecordMap | Mapping[str, Any] | str | Path | None) -> RecordMap | None:
        """Return a map from its keys or its YAML file; a map and None are returned unchanged."""
        if value is None or isinstance(value, RecordMap):
            return value
        return cls.load(value) if isinstance(value, str | Path) else cls.from_dict(value)

    @classmethod
    def load(cls, path: str | Path) -> RecordMap:
        """Read a map from a YAML file. Raises NotFoundError, or ConfigError naming the file."""
        try:
            return cls.from_dict(read_yaml(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None

    def parse(self, record: Any) -> list[ParsedRecord]:
        """Parse a record by this map. Raises DataError where a column is missing or empty."""
        used: set[str] = set()

        def look(column: Column) -> Any:
            if isinstance(record, Mapping) and str(column) in record:
                used.add(str(column))
                return checked(record[str(column)], str(column))
            value = list(record.values()) if isinstance(record, Mapping) and isinstance(column, int) else record
            steps = [column] if isinstance(column, int) else column.split(".")
            used.add(list(record)[column] if isinstance(column, int) and isinstance(record, Mapping)
                     and column < len(record) else str(steps[0]))
            for step in steps:
                if isinstance(value, Mapping) and step in value:
                    value = value[step]
                elif isinstance(value, list) and str(step).isdecimal() and int(step) < len(value):
                    value = value[int(step)]
                else:
                    raise DataError(f"there is no column {column!r}")
            return checked(value, str(column))

        expert = expert_of(look(self.expert[0])) if self.expert else None
        metadata = {name: look(column) for name, column in self.metadata}
        beside = {name: look(columns[0]) for name in _BESIDE if (columns := getattr(self, name))}
        if self.reasoning:
            beside["reasoning"] = joined([part_text(look(c)) for c in self.reasoning], []).text
        if self.messages:
            said = look(self.messages[0])
            said = parsed(said) if isinstance(said, str) else said
            if not isinstance(said, list):
                raise DataError(f"column {self.messages[0]!r} must be a list of turns")
            found = conversation(said, **beside)
        else:
            asked, answered = ([look(c) for c in columns] for columns in (self.text or self.prompt, self.answer))
            if not any(map(says, asked)) or (self.answer and not any(map(says, answered))):
                empty = self.answer if any(map(says, asked)) else self.text or self.prompt
                raise DataError(f"no text under {', '.join(map(str, empty))}")
            if self.text and any(map(is_talk, asked)):
                raise DataError(f"column {self.text[0]!r} is a conversation: map it as messages")
            found = asked_and_answered(asked, answered, **beside)
        unused = [] if not isinstance(record, Mapping) else [
            key for key, value in record.items() if key not in used and filled(value)]
        return [found._replace(metadata=metadata, expert=expert, unused=(*found.unused, *unused))]


def _is_column(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != "" and not (
        isinstance(value, int) and value < 0)
