"""The atlas: the file beside a checkpoint that gives sets of experts their names, and the evidence for each.

    built-in   training bound one of the gate's routing groups to the name: the same experts in every layer; profiling
               adds evidence and leaves the experts as they are
    measured   profiling chose the experts that a domain's text visits most, and held-out text confirmed them
    refused    a name whose experts held-out text did not confirm; kept with the reason

docs/experts.md defines the terms, the figures and the file. An atlas is a value: nothing in it changes once made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..checkpoint import MANIFEST
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, DataError, NotFoundError, RequestError
from ..files import read_json, write_json
from ..ids import ExpertId, ExpertSet
from ..settings import is_number

FORMAT = 1
FILE = "atlas.json"

Kind = Literal["built-in", "measured"]
# what profiling says of a name; all other evidence is of the entry's author
MEASURED = frozenset({"experts", "tokens", "documents", "coverage_slots", "coverage_slots_others", "coverage_weight",
                      "coverage_weight_others", "coverage_uniform", "p", "p_adjusted", "lift_needed",
                      "stability_jaccard", "stability_rank"})


@dataclass(frozen=True)
class Shape:
    """The shape of a model that an atlas fits."""

    layers: tuple[int, ...]  # those with routed experts, MTP layers not counted
    experts: int
    top_k: int
    groups: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        return cls(config.moe_layers, config.n_routed_experts, config.num_experts_per_tok, config.n_group)

    def __str__(self) -> str:
        groups = f", {self.groups} routing groups" if self.groups > 1 else ""
        return f"{len(self.layers)} layers x {self.experts} experts, {self.top_k} a token{groups}"


@dataclass(frozen=True)
class Measurement:
    """How a name was measured: the score and its threshold, the tokens routed, the files (name, SHA-256; None for text
    that lay in no file), the other names measured at the same time, the length of a window, the seed of every draw."""

    score: str
    threshold: float
    tokens: int
    files: tuple[tuple[str, str | None], ...]
    compared_with: tuple[str, ...]
    seq_len: int
    seed: int


@dataclass(frozen=True)
class NamedGroup:
    """A name and its experts: by descending score where they were measured, as the routing group has them where they
    were built in. scores: one for each of them; empty where nothing was measured."""

    name: str
    kind: Kind
    experts: ExpertSet
    scores: tuple[float, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)
    measured: Measurement | None = None


@dataclass(frozen=True)
class RejectedGroup:
    """A name whose experts held-out text did not confirm, and the reason."""

    name: str
    reason: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    measured: Measurement | None = None


class Atlas:
    """Named groups of one model: `atlas["law_expert"]` is an ExpertSet. `load`, `built_in` and `profile` make one."""

    def __init__(self, shape: Shape, groups: Iterable[NamedGroup], refused: Iterable[RejectedGroup] = ()) -> None:
        """Raises ConfigError for a name that comes twice and for experts outside `shape`."""
        self.shape, self.refused = shape, tuple(refused)
        self._groups: dict[str, NamedGroup] = {}
        for group in groups:
            if group.name in self._groups:
                raise ConfigError(f"the name {group.name!r} comes twice")
            if not group.experts:
                raise ConfigError(f"{group.name} has no experts")
            if group.scores and len(group.scores) != len(group.experts):
                raise ConfigError(f"{group.name} has {len(group.scores)} scores for {len(group.experts)} experts")
            for expert in group.experts:
                if expert.layer not in shape.layers or not 0 <= expert.index < shape.experts:
                    raise ConfigError(f"{group.name} names expert {expert}, which a model with {shape.experts} experts "
                                      f"in {_span(shape.layers)} does not have")
            self._groups[group.name] = group

    @classmethod
    def built_in(cls, config: ModelConfig, names: Sequence[str],
                 evidence: Mapping[str, Mapping[str, float]] | None = None) -> Atlas:
        """Routing group i of every layer bears names[i]. MTP layers, whose routes are not reported, are not included.

        evidence: plain numbers by name. Raises ConfigError when there are more names than groups, or one comes twice.
        """
        if len(names) > config.n_group:
            raise ConfigError(f"n_group = {config.n_group}: must be at least {len(names)}, one for each name "
                              f"({', '.join(names)})")
        size = config.n_routed_experts // config.n_group
        return cls(Shape.of(config), [
            NamedGroup(name, "built-in",
                       ExpertSet(ExpertId(layer, i) for layer in config.moe_layers
                                 for i in range(place * size, (place + 1) * size)),
                       evidence=dict((evidence or {}).get(name, {})))
            for place, name in enumerate(names)])

    # ---- names ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._groups)

    def __getitem__(self, name: str) -> ExpertSet:
        return self.group(name).experts

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def group(self, name: str) -> NamedGroup:
        """Raises RequestError listing the names there are."""
        if name not in self._groups:
            refused = next((f" ({name} was refused: {r.reason})" for r in self.refused if r.name == name), "")
            raise RequestError(f"no experts are named {name!r}{refused}; there are {', '.join(self) or 'none'}")
        return self._groups[name]

    @property
    def groups(self) -> tuple[NamedGroup, ...]:
        return tuple(self._groups.values())

    def __repr__(self) -> str:
        """Describe each name in a line: experts, layers, evidence."""
        lines = [f"Atlas of {count(len(self), 'name')} over {self.shape}"]
        width = max(map(len, self), default=0)
        for group in self.groups:
            layers = group.experts.by_layer()
            lines.append(f"  {group.name:{width}}  {group.kind}, {count(len(group.experts), 'expert')} in "
                         f"{count(len(layers), 'layer')}; {_summary(group.evidence)}")
        lines += [f"  refused: {rejected.name}: {rejected.reason}" for rejected in self.refused]
        return "\n".join(lines)

    def check_fits(self, config: ModelConfig) -> None:
        """Raises ConfigError for the first expert that a model of this configuration does not have."""
        for group in self.groups:
            for expert in group.experts:
                if expert.layer not in config.moe_layers or expert.index >= config.n_routed_experts:
                    raise ConfigError(f"the atlas names expert {expert} ({group.name}), which the model does not have: "
                                      f"its {_span(config.moe_layers)} have experts 0..{config.n_routed_experts - 1}")

    def updated(self, newer: Atlas) -> Atlas:
        """This atlas with what `newer` says about the names that it measured; built-in ones keep their places.

        Raises ConfigError for another shape, and for a built-in name that `newer` gives other experts or refuses.
        """
        if newer.shape != self.shape:
            raise ConfigError(f"atlases of models of different shapes: {self.shape}; {newer.shape}")
        said = {*newer.names, *(rejected.name for rejected in newer.refused)}
        kept: list[NamedGroup] = []
        for group in self.groups:
            if group.kind == "built-in" and group.name in said:
                found = newer._groups.get(group.name)
                if found is None or (found.kind, set(found.experts)) != (group.kind, set(group.experts)):
                    raise ConfigError(f"{group.name}: is built into the model, so its experts stay: "
                                      "profile(…, atlas=…) adds evidence to them")
                kept.append(found)
            elif group.name not in said:
                kept.append(group)
        placed = {group.name for group in kept}
        return Atlas(self.shape, [*kept, *(g for g in newer.groups if g.name not in placed)],
                     [*(r for r in self.refused if r.name not in said), *newer.refused])

    def renumbered(self, config: ModelConfig, old: Sequence[int | None], reason: str = "") -> Atlas:
        """The atlas of a model whose expert i is the former one of number old[i] in every layer, or new (None). A name
        whose experts are all gone goes too; one that lost some is refused for `reason`."""
        place = {before: now for now, before in enumerate(old) if before is not None}
        groups, refused = [], [*self.refused]
        for group in self.groups:
            left = [ExpertId(layer, place[index]) for layer, index in group.experts if index in place]
            if len(left) == len(group.experts):
                groups.append(replace(group, experts=ExpertSet(left)))
            elif left:
                refused.append(RejectedGroup(group.name, reason, group.evidence, group.measured))
        return Atlas(Shape.of(config), groups, refused)

    # ---- the file ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Atlas:
        """Read an atlas.json, or the one in a checkpoint folder, or in that of a training run.

        Raises NotFoundError that says how to make one, or DataError naming the file.
        """
        path = Path(path).expanduser()
        file = path / FILE if path.is_dir() else path
        if path.is_dir() and not file.is_file() and (inside := path / "model" / FILE).is_file():
            file = inside  # as a run's folder stands for its model elsewhere
        try:
            return cls._from_dict(read_json(file, what="not an atlas"))
        except NotFoundError as error:
            raise NotFoundError(f"{error}; `deepseek atlas profile MODEL --data NAME=FILE …` measures an atlas, "
                                "`deepseek train --experts NAME=PATH …` builds one in") from None
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            why = str(error) if isinstance(error, ValueError) else repr(error)
            raise DataError(f"{file}: not an atlas: {why}") from None

    def save(self, path: str | Path) -> None:
        """Write the file, or atlas.json into a folder that exists; atomically."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        manifest = file.parent / MANIFEST
        if manifest.is_file():  # a checkpoint's weights do not change; what is known of them may
            listed = read_json(manifest, CheckpointError)
            if isinstance(listed.get("files"), dict) and listed["files"].pop(file.name, None) is not None:
                write_json(manifest, listed)
        write_json(file, self._to_dict())

    def overlap(self) -> dict[str, dict[str, float]]:
        """Compute the Jaccard index of every two names' experts."""
        return {a: {b: jaccard(self[a], self[b]) for b in self} for a in self}

    def _to_dict(self) -> dict[str, Any]:
        groups = {group.name: {"kind": group.kind, "evidence": dict(group.evidence),
                               "measured": _plain(group.measured), "scores": list(group.scores),
                               "experts": [str(expert) for expert in group.experts]} for group in self.groups}
        refused = {rejected.name: {"reason": rejected.reason, "evidence": dict(rejected.evidence),
                                  "measured": _plain(rejected.measured)} for rejected in self.refused}
        return {"format": FORMAT, "model": asdict(self.shape), "groups": groups, "refused": refused,
                "overlap": self.overlap()}

    @classmethod
    def _from_dict(cls, keys: dict[str, Any]) -> Atlas:
        if keys["format"] != FORMAT:
            raise ValueError(f"format = {keys['format']!r}: must be {FORMAT}")
        model = keys["model"]
        shape = Shape(tuple(map(int, model["layers"])), *(int(model[key]) for key in ("experts", "top_k", "groups")))
        groups = []
        for name, group in keys["groups"].items():
            if group["kind"] not in ("built-in", "measured"):
                raise ValueError(f"{name}: kind = {group['kind']!r}: must be built-in or measured")
            groups.append(NamedGroup(name, group["kind"], ExpertSet(map(ExpertId.parse, group["experts"])),
                                     tuple(map(float, group["scores"])), _numbers(name, group["evidence"]),
                                     measurement_of(group["measured"])))
        refused = [RejectedGroup(name, str(rejected["reason"]), _numbers(name, rejected["evidence"]),
                           measurement_of(rejected["measured"])) for name, rejected in keys["refused"].items()]
        return cls(shape, groups, refused)


def jaccard(a: Iterable[ExpertId], b: Iterable[ExpertId]) -> float:
    """|a ∩ b| / |a ∪ b|; 1 for two empty sets."""
    first, second = set(a), set(b)
    return len(first & second) / len(first | second) if first | second else 1.0


def count(number: int, what: str) -> str:
    """`1 expert`, `1,234 experts`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _summary(evidence: Mapping[str, float]) -> str:
    """Format the evidence in half a line: the figures of profiling, else all there are."""
    if "coverage_slots" not in evidence:
        return ", ".join(f"{key} {value:.4g}" for key, value in evidence.items()) or "no evidence"
    parts = [f"{evidence['coverage_slots']:.1%} of its own text's slots"]
    parts += [f"{evidence[key]:.1%} {of}" for key, of in (
        ("coverage_slots_others", "of other text's"), ("coverage_uniform", "if routing were even")) if key in evidence]
    parts += [count(int(evidence[key]), key[:-1]) for key in ("documents", "tokens") if key in evidence]
    return ", ".join(parts)


def _span(layers: Sequence[int]) -> str:
    return f"layers {layers[0]}..{layers[-1]}" if layers else "no layers"


def _plain(measured: Measurement | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    keys = asdict(measured) | {"files": [list(file) for file in measured.files]}
    return {"beside" if key == "compared_with" else key: value for key, value in keys.items()}  # the file's older word


def measurement_of(keys: Mapping[str, Any] | None) -> Measurement | None:
    """Read a measurement of an atlas.json. Raises KeyError, TypeError or ValueError for one that is none."""
    if keys is None:
        return None
    files = tuple((str(name), digest) for name, digest in keys["files"])
    rest = {key: value for key, value in keys.items() if key != "beside"}
    return Measurement(**rest | {"files": files, "compared_with": tuple(keys["beside"])})


def _numbers(name: str, evidence: dict[str, Any]) -> dict[str, float]:
    for key, value in evidence.items():
        if not is_number(value):
            raise ValueError(f"{name}: evidence {key} = {value!r}: must be a finite number")
    return dict(evidence)
