"""A pool of experts: one YAML file (docs/routing.md) -> members, and who of them serves a text.

    scorer: keywords                  # or classifier, or gate
    glossary: true                    # words of common domains in two languages count, too (deepseek.glossary)
    bias: 0                           # added to the gates' choice of the experts of a named group; inexact
    include: [more.yaml]              # other pool files, relative to this one
    members:
      - name: law
        kind: adapter                 # experts: a named group of the atlas; adapter and knowledge have a path
        path: adapters/law
        domain: Law, statutes, contracts. 法律、合同与判决。
        keywords: [court, 法院]       # or {court: 2.5}; else TF-IDF weights of the description and the samples
        samples: law.jsonl            # or texts: what requests of this domain look like
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError, MoEDRError, RequestError, nearest, shown
from ..files import read_text, read_yaml
from ..progress import ProgressBar
from ..settings import is_number
from .composite import route_segments
from .knowledge import SUFFIX
from .knowledge import folder as knowledge_folder
from .member import PoolMember
from .routing import READ, TOP, Fusion, RoutedPart, RoutingDecision, fuse_expert_outputs
from .scorers import Gates, SummedScorer, make_scorer

ScorerName = Literal["keywords", "classifier", "gate"]
SCORERS = get_args(ScorerName)
KEYS = ("name", "kind", "domain", "path", "keywords", "samples")
MOST_BIAS = 10.0  # gates' scores lie between 0 and 1
SHOWN_SCORES = 10  # of a decision, in a pool of many


class ExpertPool:
    """Experts of a pool, and who of them serves a text. scorer: `keywords`; `classifier`, which is trained on the
    members' samples when it is first used (seconds); or `gate`, which asks the gates of the model that uses the pool.
    bias: of the decisions (`Fusion.bias`). glossary: whether the built-in words of common domains count for members of
    these. Raises ConfigError for a name that two members bear."""

    def __init__(self, members: Sequence[PoolMember] = (), scorer: ScorerName = "keywords", *, bias: float = 0.0,
                 glossary: bool = True, seed: int = 0) -> None:
        if scorer not in SCORERS:
            raise ConfigError(f"scorer = {shown(scorer)}: must be {', '.join(SCORERS[:-1])} or {SCORERS[-1]}"
                              f"{nearest(str(scorer), SCORERS)}")
        if not is_number(bias) or not 0 <= bias <= MOST_BIAS:
            raise ConfigError(f"bias = {shown(bias)}: must be a number from 0 to {MOST_BIAS:g}")
        if not isinstance(glossary, bool):
            raise ConfigError(f"glossary = {shown(glossary)}: must be true or false")
        self.members, self.scorer_name, self.bias, self.seed = tuple(members), scorer, float(bias), seed
        self.glossary = glossary
        self.gates: Gates | None = None  # of the model that uses the pool, for the scorer `gate`
        self._among: frozenset[str] | None = None  # those that may answer; else all
        self._by_name: dict[str, PoolMember] = {}
        for member in self.members:
            if member.name in self._by_name:
                raise ConfigError(f"name = {member.name!r}: two members bear it: must be unique")
            self._by_name[member.name] = member

    @classmethod
    def load(cls, path: str | Path, scorer: ScorerName | None = None, *, seed: int = 0) -> ExpertPool:
        """The pool of a YAML file, with those that it includes. scorer: instead of the file's. Raises NotFoundError,
        or ConfigError naming file, key, rule and value."""
        path = Path(path).expanduser()
        members: dict[str, PoolMember] = {}
        table = _read(path, (), members, set())
        try:
            return cls(tuple(members.values()), scorer or table.get("scorer") or "keywords",
                       bias=0.0 if table.get("bias") is None else table["bias"],
                       glossary=True if table.get("glossary") is None else table["glossary"], seed=seed)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def bind(self, gates: Gates) -> None:
        """Take the gates of the model that uses this pool. Raises ConfigError where the scorer asks another's."""
        if self.scorer_name == "gate" and self.gates is not None and self.gates.alive:
            raise ConfigError("pool: another model uses it: with the scorer gate each model must have its own")
        if self.scorer_name == "gate":
            self.__dict__.pop("scorer", None)
        self.gates = gates

    @property
    def adapters(self) -> dict[str, Path]:
        """Name -> folder of the adapters among the members."""
        return {one.name: one.path for one in self.members if one.kind == "adapter" and one.path is not None}

    @property
    def groups(self) -> tuple[str, ...]:
        """The members that are named groups of a model."""
        return tuple(one.name for one in self.members if one.kind == "experts")

    def only(self, name: str) -> Fusion:
        """One member alone answers. Raises ConfigError for a name that there is not."""
        return replace(fuse_expert_outputs([self[name]]), bias=self.bias)

    def among(self, names: Collection[str]) -> ExpertPool:
        """The pool, of which these members alone may answer: a text that others fit better is the base's. Raises
        ConfigError for a name that there is not, and for none."""
        if isinstance(names, str) or not names:
            raise ConfigError(f"members = {shown(names)}: must be a list of names, one at least")
        among = frozenset(self[name].name for name in names)
        out = copy(self)
        out.__dict__["scorer"], out._among = self.scorer, among  # the scorer is not made anew
        return out

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, name: str) -> PoolMember:
        """A member by its name. Raises ConfigError listing those that there are."""
        try:
            return self._by_name[name]
        except KeyError:
            known = list(self._by_name)
            raise ConfigError(f"member = {shown(name)}: not in the pool, which has "
                              f"{', '.join(known[:20]) or 'none'}{', …' if len(known) > 20 else ''}"
                              f"{nearest(str(name), known)}") from None

    @cached_property
    def scorer(self) -> SummedScorer:
        """What gives every member its probability. Raises ConfigError for `gate` without a model."""
        if self.scorer_name != "gate":
            return make_scorer(self.members, self.scorer_name, self.seed, glossary=self.glossary)
        with ProgressBar(desc="gate", unit=" samples") as bar:
            return make_scorer(self.members, "gate", self.seed, bar.advance_to, gates=self.gates,
                               glossary=self.glossary)

    def parts(self, text: str) -> list[RoutedPart]:
        """The parts of a composite request that are answered on their own, each with who serves it; one part where the
        request is not composite. Raises RequestError for what is not a text."""
        if not isinstance(text, str):
            raise RequestError(f"text = {shown(text)}: must be a text")
        return route_segments(self, text)

    def route(self, text: str) -> RoutingDecision:
        """Who serves a text, and why. Same pool, seed and text: same decision. The first 2,000 characters count. Raises
        RequestError for what is not a text."""
        if not isinstance(text, str):
            raise RequestError(f"text = {shown(text)}: must be a text")
        if not self.members or not text.strip():
            return RoutingDecision(Fusion(), scorer=self.scorer_name,
                                   abstained="the pool is empty" if not self.members else "the text is empty")
        scorer, text = self.scorer, text[:READ]
        p_M = scorer.probabilities(text)
        if self._among is not None:
            p_M = p_M * [member.name in self._among for member in self.members]
        order = sorted(range(len(p_M)), key=lambda m: (-p_M[m], m)) if len(p_M) <= 64 else [
            int(m) for m in _best(p_M, SHOWN_SCORES)]
        scores = {self.members[m].name: float(p_M[m]) for m in order[:SHOWN_SCORES] if p_M[m] > 0}
        top = float(p_M[order[0]])
        keywords = scorer.keywords(text, order[0]) if top > 0 else {}
        reason = ""
        if top == 0:
            reason = "no member fits"
        elif len(order) > TOP and p_M[order[TOP]] == top:
            reason = "no member fits better than the others"
        elif top < scorer.threshold:
            reason = f"{self.members[order[0]].name} has {top:.2f}, below the threshold {scorer.threshold:.2f}"
        chance = (1 - 1e-6) / len(p_M)  # a member that is no likelier takes no part
        fusion = Fusion() if reason else fuse_expert_outputs(
            [(self.members[m], float(p_M[m])) for m in order[:TOP] if p_M[m] >= chance])
        return RoutingDecision(replace(fusion, bias=self.bias), keywords, scores, scorer.threshold, self.scorer_name,
                               reason)


def _best(p_M: Any, most: int) -> Any:
    import numpy as np

    some = np.argpartition(-p_M, most)[:most]
    return some[np.lexsort((some, -p_M[some]))]


def _read(path: Path, including: tuple[Path, ...], members: dict[str, PoolMember], read: set[Path]) -> dict[str, Any]:
    """Add the members of a file and of those that it includes, in their order; returns the file's own table. read: the
    files so far; one that several include counts once."""
    here = path.resolve()
    if here in including:
        circle = " -> ".join(str(one) for one in (*including[including.index(here):], here))
        raise ConfigError(f"{including[-1]}: include = {path}: files include one another: {circle}")
    table = read_yaml(path)
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: must be a table with `members`, got {type(table).__name__}")
    _no_others(table, ("members", "include", "scorer", "bias", "glossary"), f"{path}: ")
    for other in _list(table, "include", f"{path}: "):
        if not isinstance(other, str) or not (file := path.parent / Path(other).expanduser()).is_file():
            raise ConfigError(f"{path}: include = {shown(other)}: must be a pool file; there is none")
        if file.resolve() not in read:
            _read(file, (*including, here), members, read)
    read.add(here)
    for number, entry in enumerate(_list(table, "members", f"{path}: ")):
        where = f"{path}: members[{number}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} = {shown(entry)}: must be a table with {', '.join(KEYS)}")
        where += f" ({entry['name']}): " if isinstance(entry.get("name"), str) else ": "
        _no_others(entry, KEYS, where)
        for key in ("name", "kind", "domain"):
            if entry.get(key) is None:
                raise ConfigError(f"{where}{key}: must be given")
        try:
            member = _member(entry, path.parent)
        except MoEDRError as error:
            raise ConfigError(f"{where}{error}") from None
        if member.name in members:
            raise ConfigError(f"{where}name = {member.name!r}: another member bears it: must be unique")
        members[member.name] = member
    if (scorer := table.get("scorer")) is not None and scorer not in SCORERS:
        raise ConfigError(f"{path}: scorer = {shown(scorer)}: must be {', '.join(SCORERS[:-1])} or {SCORERS[-1]}"
                          f"{nearest(str(scorer), SCORERS)}")
    return table


def _member(entry: Mapping[str, Any], folder: Path) -> PoolMember:
    given = {key: value for key, value in entry.items() if value is not None}
    if "path" in given:
        if not isinstance(given["path"], str):
            raise ConfigError(f"path = {shown(given['path'])}: must be a path")
        path = folder / Path(given["path"]).expanduser()
        if given["kind"] == "knowledge" and "/" not in given["path"] and path.suffix != SUFFIX:
            path = knowledge_folder() / f"{given['path']}{SUFFIX}"  # a base that is called by its name
        if not path.exists():
            raise ConfigError(f"path = {given['path']!r}: must be a file or folder; there is none at {path}")
        given["path"] = path
    if isinstance(samples := given.get("samples"), str):
        given["samples"] = _samples(folder / Path(samples).expanduser(), samples)
    return PoolMember(**given)


def _samples(path: Path, said: str) -> list[str]:
    """Texts of a file: of .jsonl, a text, or an object with `text` or `messages`, a line; else paragraphs."""
    if not path.is_file():
        raise ConfigError(f"samples = {said!r}: must be a file of texts; there is none at {path}")
    text = read_text(path, ConfigError)
    if path.suffix not in (".jsonl", ".ndjson"):
        return [part.strip() for part in text.split("\n\n") if part.strip()]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ConfigError(f"samples = {said!r}: line {number}: not JSON: {error}") from None
        if isinstance(value, dict):
            turns = value.get("messages")
            value = value["text"] if "text" in value else "\n".join(
                str(turn.get("content") or "") for turn in turns if isinstance(turn, dict)
            ) if isinstance(turns, list) else value
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"samples = {said!r}: line {number}: must be a text, or an object with text or messages")
        if value and value.strip():
            found.append(value)
    return found


def _no_others(table: Mapping[Any, Any], keys: Sequence[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise ConfigError(f"{where}unknown key {shown(key)}; there are {', '.join(keys)}{nearest(str(key), keys)}")


def _list(table: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = table.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{where}{key} = {shown(value)}: must be a list")
    return value
