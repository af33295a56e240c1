"""The settings of the pipeline's stages: one table for the checks, the command line and the YAML of a run. Nothing
heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, nearest
from ..files import read_yaml
from .mapping import RecordMap

S = TypeVar("S")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


class _Checked:
    def _need(self, key: str, rule: str, holds: Any) -> None:
        if not holds(value := getattr(self, key)):
            raise ConfigError(f"{key} = {value!r}: {rule}")


@dataclass(frozen=True)
class ValidateSettings(_Checked):
    """Limits that a record must meet."""

    min_characters: int = _setting(1, "a shorter text is set aside")
    max_characters: int = _setting(8_000_000, "a longer text is set aside")
    max_damage: float = _setting(0.05, "largest share of control and replacement characters")

    def __post_init__(self) -> None:
        self._need("min_characters", "must be an integer >= 1", lambda v: isinstance(v, int) and v >= 1)
        self._need("max_characters", "must be an integer >= min_characters",
                   lambda v: isinstance(v, int) and v >= self.min_characters)
        self._need("max_damage", "must lie in [0, 1]", lambda v: isinstance(v, int | float) and 0 <= v <= 1)


@dataclass(frozen=True)
class DedupSettings(_Checked):
    """Rules of duplicates."""

    exact_only: bool = _setting(False, "drop equal texts only, not near-duplicates")
    threshold: float = _setting(0.8, "Jaccard similarity from which texts are near-duplicates")

    def __post_init__(self) -> None:
        self._need("exact_only", "must be true or false", lambda v: isinstance(v, bool))
        self._need("threshold", "must lie in [0.5, 1]", lambda v: isinstance(v, int | float) and 0.5 <= v <= 1)


@dataclass(frozen=True)
class LabelSettings(_Checked):
    """Sources of labels for records that have none."""

    rules: str = _setting("builtin", "builtin, none, or a YAML or JSON file of keywords that are added to them")
    classifier: str = _setting("train", "train (on the records that have an expert), none, or a classifier.npz")
    confidence: float = _setting(0.6, "a classifier that is less sure leaves a record unlabelled")
    texts: int = _setting(4000, "texts a name to train on at most")
    seed: int = _setting(0, "seed of the classifier's training")

    def __post_init__(self) -> None:
        for key in ("rules", "classifier"):
            self._need(key, "must be a word or a path", lambda v: isinstance(v, str) and v)
        self._need("confidence", "must lie in [0, 1]", lambda v: isinstance(v, int | float) and 0 <= v <= 1)
        self._need("texts", "must be an integer >= 20", lambda v: isinstance(v, int) and v >= 20)
        self._need("seed", "must be an integer >= 0", lambda v: isinstance(v, int) and v >= 0)


@dataclass(frozen=True)
class SplitSettings(_Checked):
    """The held-out share; the same records are held out when packing."""

    valid_fraction: float = _setting(0.01, "share of the records held out")
    seed: int = _setting(0, "another one holds out other records")

    def __post_init__(self) -> None:
        self._need("valid_fraction", "must be at least 0 and below 1",
                   lambda v: isinstance(v, int | float) and 0 <= v < 1)
        self._need("seed", "must be an integer >= 0", lambda v: isinstance(v, int) and v >= 0)


@dataclass(frozen=True)
class PackSettings(_Checked):
    """The tokenizer."""

    tokenizer: str | None = _setting(None, "folder of a tokenizer; else one is trained on the records")
    vocab_size: int = _setting(16384, "tokens of the one that is trained")

    def __post_init__(self) -> None:
        self._need("tokenizer", "must be a folder", lambda v: v is None or (isinstance(v, str) and v))
        self._need("vocab_size", "must be an integer > 256", lambda v: isinstance(v, int) and v > 256)


@dataclass(frozen=True)
class PipelineConfig(_Checked):
    """The settings of a whole run. sources: {expert name: its paths}, under the name "" those without a label."""

    out: str
    sources: Mapping[str, Sequence[str]]
    experts: tuple[str, ...] = ()
    map: RecordMap | None = None
    workers: int = 2
    validate: ValidateSettings = ValidateSettings()
    dedup: DedupSettings = DedupSettings()
    label: LabelSettings = LabelSettings()
    split: SplitSettings = SplitSettings()
    pack: PackSettings = PackSettings()

    def __post_init__(self) -> None:
        self._need("out", "must be a folder", lambda v: isinstance(v, str) and v)
        self._need("workers", "must be an integer >= 1", lambda v: isinstance(v, int) and v >= 1)
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
            kinds = {"validate": ValidateSettings, "dedup": DedupSettings, "label": LabelSettings,
                     "split": SplitSettings, "pack": PackSettings}
            for name, kind in kinds.items():
                if name in keys:
                    keys[name] = settings_of(kind, _mapping(name, keys[name]), f"{name}: ")
            return settings_of(cls, keys)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def settings_of(kind: type[S], keys: Mapping[str, Any], where: str = "") -> S:
    """Make a settings object from a mapping. Raises ConfigError for an unknown key or an impossible value."""
    names = [setting.name for setting in fields(kind)]  # type: ignore[arg-type]
    for key in keys:
        if key not in names:
            raise ConfigError(f"{where}unknown key {key!r}: the keys are {', '.join(names)}{nearest(str(key), names)}")
    try:
        return kind(**keys)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


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


def named_paths(words: Sequence[str], flag: str) -> dict[str, list[str]]:
    """Parse `name=PATH` words into {name: [PATH, …]}; a name may occur several times."""
    named: dict[str, list[str]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (equals and path and name.isidentifier()):
            raise ConfigError(f"{flag} = {word!r}: must read NAME=PATH (for example law_expert=data/law), the name "
                              "made of letters, digits and _")
        named.setdefault(name, []).append(path)
    return named
