"""A knowledge base: files cut into passages, with an index that finds those which answer a question.

    base = KnowledgeBase("law")
    base.add(["statutes/civil_code.md"])
    for passage in base.search("Who may withdraw a declaration of intent?"):
        print(passage.citation, passage.text)

Two rankings are joined (retrieval.py): BM25, which knows names and numbers of clauses, and vectors, which know that
words belong together. The vectors are TF-IDF through a truncated SVD of the base itself, which is fitted again when the
base has doubled, or those of an embedding model of the user's choice.
"""

from __future__ import annotations

import codecs
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, MoEDRError, NotFoundError, RequestError, nearest
from ..files import locked, sha256
from ..progress import ProgressBar
from .embedding import OWN, Embedding, embed, load
from .passages import passages
from .reading import checked, read_document, resolved
from .retrieval import BM25, Counts, Floats, Projection, alone, best, fuse, spread
from .store import FileEntry, PassageRow, Store
from .terms import clauses, terms

Mode = Literal["hybrid", "rrf", "bm25", "dense"]
SUFFIX = ".knowledge"
SIZE = 1000  # characters of a passage at most
_terms = lru_cache(256)(terms)  # of titles, which many passages share
DEPTH = 100  # passages of each ranking that are looked at
DENSE, EMBEDDED = 0.02, 1.0  # of a cosine beside BM25: of own vectors, of an embedding model
FLOOR = 0.1  # of a cosine of own vectors: less is noise
REPEATED = 0.98  # of the score of a passage, for each better one of its section
_BATCH = 256  # texts for an embedding model at a time
HEADINGS = 6  # how often a title above a passage counts
_COMMIT = 0.5  # seconds between two of them
_CHEAP = 0.25  # seconds of reading an index; one that takes longer is read a fifth of the time at most
_RECENT = 2 * 10**9  # nanoseconds: a file that is so new may change again without a new time


def folder() -> Path:
    """Where bases that are called by name lie."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "deepseek" / "knowledge"


def names() -> list[str]:
    """Of the bases in the user's data folder."""
    return sorted(path.name.removesuffix(SUFFIX) for path in folder().glob(f"*{SUFFIX}"))


@dataclass(frozen=True)
class Passage:
    """A passage that was found. file: its path; section: titles, the widest first, with " > " between them; start, end:
    characters of the file's text. score: what it was ranked by; bm25 and similarity (a cosine): of the two rankings."""

    file: str
    section: str
    start: int
    end: int
    text: str
    score: float
    bm25: float
    similarity: float

    @property
    def citation(self) -> str:
        """File, section and range of characters."""
        return ", ".join(filter(None, (self.file, self.section, f"characters {self.start}-{self.end}")))


class Added(NamedTuple):
    """What `add` did, in files."""

    new: int
    changed: int
    unchanged: int


class _Index(NamedTuple):
    """What a search needs in memory. ids: of passages, ascending, as in all other arrays."""

    ids: NDArray[np.int64]
    bm25: BM25
    projection: Projection | None
    vectors: Floats


class KnowledgeBase:
    """Passages of files, and search in them. Threads may share one; one process at a time writes.

    name: of a base in the user's data folder, or a path (with a `/`, or one that ends in `.knowledge`). The file is
    made by the first `add`. passage_size: characters of a passage at most, 1,000 if the base is new. embedding: of a
    new base, a function of a list of texts that returns (N, D) numbers, or a model, such as `model2vec:FOLDER` or
    `sentence-transformers:HUB_ID`, which the base remembers.

    Raises ConfigError for a name that cannot be one, and for a size or an embedding that is not the base's.
    """

    def __init__(self, name: str | Path, *, passage_size: int | None = None,
                 embedding: Embedding | str | None = None) -> None:
        self.path = _path_of(name)
        self.passage_size = passage_size
        self._given = embedding
        self._embedding: Embedding | None = None if isinstance(embedding, str) else embedding
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._index: _Index | None = None
        self._version: int | None = None
        self._due = 0.0  # when the index may be read again

    # ---- reading ----------------------------------------------------------------------------------------------------

    def files(self) -> list[FileEntry]:
        """The files of the base, by path."""
        with self._lock, self._opened().failing():
            return self._opened().files()

    def search(self, query: str, top_k: int = 3, *, mode: Mode = "hybrid") -> list[Passage]:
        """The passages that fit a query best, the best first; none where no term of it stands in the base. A passage
        that stands in several places is found once.

        mode: hybrid, rrf (reciprocal rank fusion), or one of the two rankings alone."""
        if not isinstance(query, str):
            raise RequestError(f"query = {query!r:.60}: must be a text")
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise RequestError(f"top_k = {top_k!r}: must be an integer >= 1")
        if mode not in get_args(Mode):
            raise RequestError(f"mode = {mode!r}: must be one of {', '.join(get_args(Mode))}")
        said = terms(query)
        with self._lock, self._opened().failing(), alone():
            index = self._loaded()
            ids, named = self._opened().ids_of(said), self._opened().ids_of(clauses(said))
        bm25, depth = index.bm25.scores(ids), max(DEPTH, 2 * top_k)
        similarity = self._similarity(index, ids, query)
        if mode == "rrf":
            scores = fuse([best(bm25, depth), best(similarity, depth),
                           *([best(bm25 * index.bm25.has(named), depth)] if named else [])], len(bm25))
        elif mode == "hybrid":
            scores = bm25 / max(float(bm25.max(initial=0)), 1e-9) + (
                EMBEDDED if self._embedding else DENSE) * similarity + index.bm25.has(named)
        else:
            scores = bm25 if mode == "bm25" else similarity
        return self._read(index, scores, best(scores, depth), bm25, similarity, top_k,
                          REPEATED if mode == "hybrid" else 1)

    def _read(self, index: _Index, scores: Floats, places: NDArray[np.int64], bm25: Floats, similarity: Floats,
              top_k: int, repeated: float) -> list[Passage]:
        """The best of some places. repeated: what a score is multiplied by for each passage of the same section that
        is better."""
        with self._lock, self._opened().failing():
            rows = {row[0]: row[1:] for row in self._opened().passages(index.ids[places].tolist())}
        there = {int(place): rows[one] for place in places if (one := int(index.ids[place])) in rows}
        found: dict[str, Passage] = {}
        for place, score in spread(places, scores, {place: row[:2] for place, row in there.items()}, repeated):
            if there[place][-1] not in found:
                found[there[place][-1]] = Passage(*there[place], score, float(bm25[place]), float(similarity[place]))
                if len(found) == top_k:
                    break
        return list(found.values())

    def _similarity(self, index: _Index, ids: Sequence[int], query: str) -> Floats:
        if self._embedding is not None and query.strip() and index.vectors.shape[1]:
            return index.vectors @ embed(self._embedding, [query], index.vectors.shape[1])[0]
        if index.projection is None:
            return np.zeros(len(index.ids), np.float32)
        counted = sorted(Counter(ids).items())
        asked = Counts(np.array([one for one, _ in counted], np.int32), np.array([n for _, n in counted], np.int32),
                       np.array([len(counted)]))
        with alone():
            similarity = index.vectors @ index.projection.project(asked)[0]
        similarity[similarity < FLOOR] = 0
        return similarity

    def _opened(self) -> Store:
        if self._store is not None and not self._store.there:
            self._store.close()
            self._store = self._index = None
        if self._store is None:
            try:
                self._store = Store(self.path)
            except NotFoundError as error:
                known = names() if self.path.parent == folder() else []
                raise NotFoundError(f"{error}{nearest(self.path.stem, known)}") from None
        return self._store

    def _loaded(self) -> _Index:
        store = self._opened()
        if self._index is None or (self._version != store.version and time.monotonic() >= self._due):
            version, began = store.version, time.thread_time()
            with store.snapshot():
                self._index = self._load(store)
            took, self._version = time.thread_time() - began, version
            self._due = time.monotonic() + (4 * took if took > _CHEAP else 0)
        return self._index

    def _load(self, store: Store) -> _Index:
        rows = store.rows()
        counts = Counts.of_rows(rows)
        self._check_embedding(store)
        projection = _projection(store)
        if projection is None and rows and self._embedding is None:  # killed before the first one was written
            projection = Projection.fit(counts)
        dims = projection.vectors.shape[1] if projection else store.fact("dimensions") or 0
        there = np.array([row[3] is not None for row in rows], bool)
        vectors = np.zeros((len(rows), dims), np.float32)
        if there.any():
            vectors[there] = np.frombuffer(b"".join(row[3] or b"" for row in rows), np.float16).reshape(-1, dims)
        if projection is not None and not there.all():
            vectors[~there] = projection.project(Counts.of_rows([row for row in rows if row[3] is None]))
        return _Index(np.array([row[0] for row in rows], np.int64), BM25(counts), projection, vectors)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def add(self, files: Iterable[str | Path], *, encoding: str = "utf-8", progress: bool = False) -> Added:
        """Put files into the base. One that is in it and has not changed is not read again; one that has changed
        replaces its passages. encoding: of text and HTML that do not say theirs.

        Raises NotFoundError for a missing file before anything is read, and at the end DataError with the files that
        could not be read, while the others are in the base."""
        paths = resolved(files)
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ConfigError(f"encoding = {encoding!r}: no such encoding") from None
        if isinstance(self._given, str) and self._embedding is None:
            self._embedding = load(self._given)  # before there is a base that needs it
        with self._lock, locked(self.path), alone():
            if self._store is None:
                self._store = Store(self.path, create=True)
            store = self._store
            size = self._size(store)
            self._check_embedding(store)
            done, failed = self._add(store, paths, encoding, size, progress)
            self._finish(store)
            self._index = None
        if failed:
            more = f" (and {len(failed) - 3} more)" if len(failed) > 3 else ""
            raise DataError(f"{len(failed)} of {len(paths)} files not added, the others are in the base: "
                            f"{'; '.join(failed[:3])}{more}")
        return done

    def _size(self, store: Store) -> int:
        stored = store.fact("passage_size")
        if stored is None:
            stored = SIZE if self.passage_size is None else self.passage_size
            with store.transaction():
                store.set_facts(passage_size=stored, embedding=self._name() or "")
        elif self.passage_size not in (None, stored):
            raise ConfigError(f"passage_size = {self.passage_size}: the base has {stored}; a new base may have another")
        return stored

    def _name(self) -> str | None:
        return self._given if isinstance(self._given, str) else None if self._given is None else OWN

    def _check_embedding(self, store: Store) -> None:
        """Have the embedding of the base. Raises ConfigError where another is given, or a function that is needed is
        not."""
        stored = store.fact("embedding") or None
        if self._given is not None and self._name() != stored:
            raise ConfigError(f"embedding = {self._name()!r}: the base has {stored or 'vectors of its own'}; a new "
                              "base may have another")
        if stored == OWN and self._given is None:
            raise ConfigError(f"{self.path}: was made with an embedding function, which must be given: embedding")
        if stored is not None and self._embedding is None:
            self._embedding = load(stored)

    def _embed(self, store: Store, embedding: Embedding) -> None:
        """Vectors of the embedding model for the passages that have none, a transaction a batch."""
        todo = [row[0] for row in store.rows(unfinished=True)]
        for start in range(0, len(todo), _BATCH):
            found = {row[0]: f"{row[2]}\n{row[5]}" for row in store.passages(todo[start : start + _BATCH])}
            vectors = embed(embedding, [*found.values()], store.fact("dimensions"))
            with store.transaction():
                store.set_facts(dimensions=vectors.shape[1])
                store.set_vectors((vector.astype(np.float16).tobytes(), one)
                                  for one, vector in zip(found, vectors, strict=True))

    def _add(self, store: Store, paths: list[Path], encoding: str, size: int, progress: bool,
             ) -> tuple[Added, list[str]]:
        known = {entry.path: entry for entry in store.files()}
        vocabulary = store.vocabulary()
        sizes = {path: path.stat().st_size for path in paths}
        states, failed, todo = Counter[str](), list[str](), deque(paths)
        with ProgressBar(total=sum(sizes.values()), unit="B", unit_scale=True, desc="reading",
                         disable=not progress) as bar:
            while todo:
                began, before = time.monotonic(), len(vocabulary)
                with store.transaction():
                    while todo and time.monotonic() - began < _COMMIT:
                        path = todo.popleft()
                        try:
                            states[self._put(store, path, known.get(str(path)), encoding, size, vocabulary)] += 1
                        except ConfigError:  # a library that is absent: true of other files, too
                            raise
                        except MoEDRError as error:
                            failed.append(str(error))
                        bar.update(sizes[path])
                    store.add_terms([*vocabulary.items()][before:])
        return Added(states["new"], states["changed"], states["unchanged"]), failed

    def _put(self, store: Store, path: Path, entry: FileEntry | None, encoding: str, size: int,
             vocabulary: dict[str, int]) -> str:
        now = time.time_ns()
        stat = checked(path)
        if entry and (entry.bytes, entry.modified, entry.encoding) == (stat.st_size, stat.st_mtime_ns, encoding):
            return "unchanged"
        modified = stat.st_mtime_ns if stat.st_mtime_ns < now - _RECENT else 0
        digest = sha256(path)
        if entry and entry.sha256 == digest and entry.encoding == encoding:
            store.touch(entry.path, modified)
            return "unchanged"
        document = read_document(path, encoding)
        rows = list(_rows(document.text, passages(document, size), vocabulary))
        store.put(FileEntry(str(path), document.kind, stat.st_size, modified, digest, encoding), rows)
        return "changed" if entry else "new"

    def _finish(self, store: Store) -> None:
        """Vectors for the passages that have none; for all, if as many are new as were there at the last fit."""
        if self._embedding is not None:
            return self._embed(store, self._embedding)
        unfinished = store.rows(unfinished=True)
        if not unfinished:
            return
        projection, fitted = _projection(store), store.fact("fitted") or 0
        rows = unfinished
        facts = {}
        newer = store.one("SELECT count(*) FROM rows WHERE passage > ?", [fitted])
        if projection is None or newer >= store.one("SELECT count(*) FROM rows") - newer:
            rows = store.rows()
            projection = Projection.fit(Counts.of_rows(rows))
            facts = {"fitted": rows[-1][0], "features": projection.features.tobytes(), "idf": projection.idf.tobytes(),
                     "projection": projection.vectors.tobytes(), "dimensions": projection.vectors.shape[1]}
        vectors = projection.project(Counts.of_rows(rows)).astype(np.float16)
        with store.transaction():
            store.set_vectors((vector.tobytes(), row[0]) for vector, row in zip(vectors, rows, strict=True))
            store.set_facts(**facts)

    def remove(self, files: Iterable[str | Path] = ()) -> None:
        """Take files out of the base; without files, delete the base. Raises NotFoundError for one not in it."""
        given = [str(Path(file).expanduser().resolve()) for file in files]
        with self._lock, locked(self.path):
            store = self._opened()
            if not given:
                store.close()
                self.path.unlink()
                self._store = self._index = None
                return
            known = [entry.path for entry in store.files()]
            for path in given:
                if path not in known:
                    raise NotFoundError(f"{path}: not in {self.path}{nearest(path, known)}")
            with store.transaction():
                for path in given:
                    store.drop(path)
            self._index = None


def _path_of(name: str | Path) -> Path:
    said = str(name)
    if isinstance(name, Path) or "/" in said or said.endswith(SUFFIX):
        path = Path(name).expanduser().absolute()
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder: a knowledge base is a file")
        return path
    if not re.fullmatch(r"\w[\w.-]{0,99}", said):
        raise ConfigError(f"name = {said!r}: must be letters, digits, '-', '_' and '.', or a path")
    return folder() / f"{said}{SUFFIX}"


def _rows(text: str, cuts: Iterable[tuple[tuple[str, ...], int, int]], vocabulary: dict[str, int],
          ) -> Iterator[PassageRow]:
    for titles, start, end in cuts:
        section, said = " > ".join(titles), text[start:end]
        counted = Counter(vocabulary.setdefault(term, len(vocabulary))
                          for term in (*HEADINGS * _terms(section), *terms(said)))
        ids = sorted(counted)
        yield PassageRow(section, start, end, said, np.array(ids, np.int32).tobytes(),
                         np.array([counted[one] for one in ids], np.int32).tobytes(), None)


def _projection(store: Store) -> Projection | None:
    if (vectors := store.fact("projection")) is None:
        return None
    features = np.frombuffer(store.fact("features"), np.int32)
    return Projection(features, np.frombuffer(store.fact("idf"), np.float32),
                      np.frombuffer(vectors, np.float32).reshape(len(features), store.fact("dimensions")))
