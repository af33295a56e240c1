"""A knowledge base on disk: one SQLite file, in which a file's passages are all there or not at all.

Every file that is added is part of one transaction, and so is an index with the vectors that belong to it. A process
that is killed leaves what was committed; SQLite takes the rest back when the file is opened next.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, DataError, NotFoundError

APPLICATION, FORMAT = 0x6B6E6F77, 2  # in the header of the file; FORMAT grows where terms or tables change
_SCHEMA = """
CREATE TABLE facts(name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE files(id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, bytes INTEGER NOT NULL,
                   modified INTEGER NOT NULL, sha256 TEXT NOT NULL, encoding TEXT NOT NULL);
CREATE TABLE passages(id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL REFERENCES files,
                      section TEXT NOT NULL, start INTEGER NOT NULL, end INTEGER NOT NULL, text TEXT NOT NULL);
CREATE INDEX passages_of_file ON passages(file);
CREATE TABLE vocabulary(term TEXT PRIMARY KEY, id INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE rows(passage INTEGER PRIMARY KEY REFERENCES passages, terms BLOB NOT NULL, counts BLOB NOT NULL,
                  vector BLOB);
"""


class FileEntry(NamedTuple):
    """A file of a base. modified: in nanoseconds, 0 where it was written while it was read."""

    path: str
    kind: str
    bytes: int
    modified: int
    sha256: str
    encoding: str
    passages: int = 0


class PassageRow(NamedTuple):
    """What is stored of a passage: its place, its text, int32 ids of its terms, int32 counts of them, its vector in
    float16, if it has one yet."""

    section: str
    start: int
    end: int
    text: str
    terms: bytes
    counts: bytes
    vector: bytes | None


class Store:
    """An open file of a base. Raises NotFoundError, and DataError for what is no base or one of another format."""

    def __init__(self, path: Path, create: bool = False) -> None:
        if not create and not path.is_file():
            raise NotFoundError(f"{path}: no such knowledge base")
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.failing():
            self.db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self.db.execute("PRAGMA trusted_schema = OFF")
            application, version, pages = (self.one(f"PRAGMA {name}") for name in (
                "application_id", "user_version", "page_count"))
            if not pages and not create:  # a process was killed before it had made one
                raise NotFoundError(f"{path}: no such knowledge base")
            if not pages:
                self.db.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION}; "
                                      f"PRAGMA user_version = {FORMAT}; {_SCHEMA} COMMIT;")
            elif application != APPLICATION:
                raise DataError(f"{path}: not a knowledge base")
            elif version != FORMAT:
                raise DataError(f"{path}: is of format {version}, this version reads {FORMAT}: make it anew")
            self._file = path.stat()

    @property
    def there(self) -> bool:
        """Whether the path still leads to the file that is open: another process may have removed the base."""
        try:
            return os.path.samestat(self.path.stat(), self._file)
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self.db.close()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """DataError, or ConfigError for a locked file, with the file's name, of what SQLite says."""
        try:
            yield
        except sqlite3.OperationalError as error:
            kind = ConfigError if "locked" in str(error) else DataError
            raise kind(f"{self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: not a knowledge base: {error}") from None

    def one(self, question: str, values: Sequence[Any] = ()) -> Any:
        """The first column of the first row; None without one."""
        found = self.db.execute(question, values).fetchone()
        return None if found is None else found[0]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self.failing():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is read inside is of one state, while other processes write."""
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("COMMIT")

    # ---- facts ------------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        return self.one("SELECT value FROM facts WHERE name = ?", [name])

    def set_facts(self, **facts: Any) -> None:
        self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    @property
    def version(self) -> int:
        """Changes when another connection has written."""
        return self.one("PRAGMA data_version")

    # ---- files and passages -----------------------------------------------------------------------------------------

    def files(self) -> list[FileEntry]:
        return [FileEntry(*row) for row in self.db.execute(
            "SELECT path, kind, bytes, modified, sha256, encoding, "
            "(SELECT count(*) FROM passages WHERE file = files.id) FROM files ORDER BY path")]

    def put(self, entry: FileEntry, rows: Iterable[PassageRow]) -> None:
        """A file with its passages, in place of what was there of it."""
        self.drop(entry.path)
        file = self.db.execute("INSERT INTO files(path, kind, bytes, modified, sha256, encoding) "
                               "VALUES (?, ?, ?, ?, ?, ?)", entry[:6]).lastrowid
        for row in rows:
            passage = self.db.execute("INSERT INTO passages(file, section, start, end, text) VALUES (?, ?, ?, ?, ?)",
                                      [file, *row[:4]]).lastrowid
            self.db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", [passage, *row[4:]])

    def touch(self, path: str, modified: int) -> None:
        self.db.execute("UPDATE files SET modified = ? WHERE path = ?", [modified, path])

    def drop(self, path: str) -> None:
        file = self.one("SELECT id FROM files WHERE path = ?", [path])
        self.db.execute("DELETE FROM rows WHERE passage IN (SELECT id FROM passages WHERE file = ?)", [file])
        self.db.execute("DELETE FROM passages WHERE file = ?", [file])
        self.db.execute("DELETE FROM files WHERE id = ?", [file])

    def passages(self, ids: Sequence[int]) -> list[tuple[int, str, str, int, int, str]]:
        """(id, file, section, start, end, text) of each that is there."""
        return self.db.execute(
            "SELECT passages.id, path, section, start, end, text FROM passages JOIN files ON files.id = file "
            f"WHERE passages.id IN ({', '.join('?' * len(ids))})", list(ids)).fetchall()

    def rows(self, unfinished: bool = False) -> list[tuple[int, bytes, bytes, bytes | None]]:
        """(passage, terms, counts, vector) of all, or of those without a vector, by passage."""
        return self.db.execute(f"SELECT * FROM rows {'WHERE vector IS NULL ' if unfinished else ''}"
                               "ORDER BY passage").fetchall()

    def set_vectors(self, vectors: Iterable[tuple[bytes, int]]) -> None:
        self.db.executemany("UPDATE rows SET vector = ? WHERE passage = ?", vectors)

    # ---- terms ------------------------------------------------------------------------------------------------------

    def vocabulary(self) -> dict[str, int]:
        return dict(self.db.execute("SELECT term, id FROM vocabulary"))

    def add_terms(self, terms: Iterable[tuple[str, int]]) -> None:
        self.db.executemany("INSERT INTO vocabulary VALUES (?, ?)", terms)

    def ids_of(self, terms: Sequence[str]) -> list[int]:
        """Ids of the terms that there are."""
        return [found for term in terms
                if (found := self.one("SELECT id FROM vocabulary WHERE term = ?", [term])) is not None]
