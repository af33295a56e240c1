"""The settings of the pipeline's stages: one table for the checks, the command line and the YAML of a run. Nothing
heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..errors import ConfigError
from ..files import read_yaml
from ..settings import COUNT, NATURAL, PATH, SHARE, UP_TO_ONE, Option, Settings, is_int, is_number
from .mapping import RecordMap

S = TypeVar("S")



@dataclass(frozen=True)
class ValidateSettings(Settings):
    """Limits that a record must meet."""

    min_characters: Annotated[int, Option("a shorter text is set aside", COUNT)] = 1
    max_characters: Annotated[int, Option("a longer text is set aside", COUNT)] = 8_000_000
    max_damage: Annotated[float, Option("largest share of control and replacement characters", UP_TO_ONE)] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_characters < self.min_characters:
            raise ConfigError(f"max_characters = {self.max_characters}: must be an integer >= min_characters")


@dataclass(frozen=True)
class DedupSettings(Settings):
    """Rules of duplicates."""

    exact_only: Annotated[bool, Option("drop equal texts only, not near-duplicates")] = False
    threshold: Annotated[float, Option(
        "Jaccard similarity from which texts are near-duplicates", (
        "must lie in [0.5, 1]", lambda v: is_number(v) and 0.5 <= v <= 1))] = 0.8


@dataclass(frozen=True)
class LabelSettings(Settings):
    """Sources of labels for records that have none."""

    rules: Annotated[str, Option(
        "builtin, none, or a YAML or JSON file of keywords that are added to them", PATH)] = "builtin"
    classifier: Annotated[str, Option(
        "train (on the records that have an expert), none, or a classifier.npz", PATH)] = "train"
    confidence: Annotated[float, Option("a classifier that is less sure leaves a record unlabelled", UP_TO_ONE)] = 0.6
    texts: Annotated[int, Option(
        "texts a name to train on at most", (
        "must be an integer >= 20", lambda v: is_int(v) and v >= 20))] = 4000
    seed: Annotated[int, Option("seed of the classifier's training", NATURAL)] = 0


@dataclass(frozen=True)
class SplitSettings(Settings):
    """The held-out share; the same records are held out when packing."""

    valid_fraction: Annotated[float, Option(
        "share of the records held out", ("must be at least 0 and below 1", SHARE[1]))] = 0.01
    seed: Annotated[int, Option("another one holds out other records", NATURAL)] = 0


@dataclass(frozen=True)
class PackSettings(Settings):
    """The tokenizer."""

    tokenizer: Annotated[str | None, Option(
        "folder of a tokenizer; else one is trained on the records", (
        "must be a folder", PATH[1]))] = None
    vocab_size: Annotated[int, Option(
        "tokens of the trained tokenizer", ("must be an integer > 256", lambda v: is_int(v) and v > 256))] = 16384


@dataclass(frozen=True)
class StageOptions(Settings):
    """What stages have in common; their results do not depend on the number of workers."""

    workers: Annotated[int, Option("processes or threads", COUNT)] = os.cpu_count() or 1
    experts: Annotated[tuple[str, ...], Option(
        "names that records may have, in the order of the model's groups; any if not given", metavar="NAME")] = ()


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(StageOptions):
    """The settings of a whole run. sources: {expert name: its paths}, under the name "" those without a label."""

    out: Annotated[str, Option("folder that takes the results", ("must be a folder", PATH[1]))]
    sources: Mapping[str, Sequence[str]]
    map: RecordMap | None = None
    validate: ValidateSettings = ValidateSettings()
    dedup: DedupSettings = DedupSettings()
    label: LabelSettings = LabelSettings()
    split: SplitSettings = SplitSettings()
    pack: PackSettings = PackSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.experts, tuple(filter(None, self.sources)))

    @classmethod
    def load(cls, path: str | Path) -> PipelineConfig:
        """Read a YAML file; relative paths in it are taken from the working directory. Raises NotFoundError, or
        ConfigError naming the file, the key, the rule and the value."""
        value = read_yaml(path)
        try:
            keys = dict(_mapping("", value))
            if isinstance(keys.get("sources"), list | str):
                keys["sources"] = {"": keys["sources"]}
            sources = _mapping("sources", keys.get("sources", {}))
            keys["sources"] = {str(name or ""): [places] if isinstance(places, str) else places
                               for name, places in sources.items()}
            for name, places in keys["sources"].items():
                if not isinstance(places, list) or not places or not all(isinstance(p, str) for p in places):
                    raise ConfigError(f"sources: {name or '(no name)'} = {places!r}: must be a path or a list of paths")
            if not keys["sources"]:
                raise ConfigError("sources: must name at least one path")
            if "out" not in keys:
                raise ConfigError("out: must be given: the folder that takes the results")
            keys["experts"] = tuple(keys.get("experts") or ())
            keys["map"] = RecordMap.of(keys.get("map"))
            kinds: dict[str, type[Settings]] = {
                "validate": ValidateSettings, "dedup": DedupSettings, "label": LabelSettings, "split": SplitSettings,
                "pack": PackSettings}
            for name, kind in kinds.items():
                if name in keys:
                    keys[name] = kind.of(_mapping(name, keys[name]), f"{name}: ")
            return cls.of(keys)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def check_names(experts: Sequence[str], used: Sequence[str] = ()) -> None:
    """Raise ConfigError for a name that is no identifier, or not among `experts` where these are given."""
    for name in (*experts, *used):
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"expert = {name!r}: must be made of letters, digits and _, such as law_expert")
    for name in used:
        if experts and name not in experts:
            raise ConfigError(f"expert = {name!r}: must be one of {', '.join(experts)}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name + ' = ' if name else ''}{value!r}: must be a mapping of keys to values")
    return value


def named_paths(words: Sequence[str], flag: str, *, bare: bool = False) -> dict[str, list[str]]:
    """Parse `name=PATH` words into {name: [PATH, …]}; a name may occur several times. bare: a name alone has []."""
    named: dict[str, list[str]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if bare and not equals and name.isidentifier():
            named.setdefault(name, [])
            continue
        if not (equals and path and name.isidentifier()):
            raise ConfigError(f"{flag} = {word!r}: must read NAME=PATH (for example law_expert=data/law), the name "
                              "made of letters, digits and _")
        named.setdefault(name, []).append(path)
    return named
