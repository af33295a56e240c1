"""Snapshots, alerts and feedback in one SQLite file.

Old snapshots are thinned: all of the last hour, one a minute of the last day, one in ten minutes before that, none
after `days`.

A file that fails while the server runs (full disk, read-only, damaged, deleted) is logged once; snapshots and alerts go
on in memory. It is tried again every minute, except after damage.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import sqlite3
import threading
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ConfigError, MoEDRError
from ..files import to_json
from .metrics import MetricKey, Snapshot

HOUR, DAY = 3600.0, 86400.0
AGAIN = 60.0  # seconds after which a file that failed is tried again
RENAMED_RULES = {"unhappy": "negative_feedback_high"}
OURS = 0x4D6F4544  # application_id: "MoED"
_TABLES = """
create table if not exists readings (time real primary key, numbers text not null);
create table if not exists alerts (time real, rule text, subject text, begins integer, message text);
create table if not exists feedback (time real, answer text primary key, domain text, rating text, comment text);
"""


log = logging.getLogger("deepseek.watch")
T = TypeVar("T")


class HistoryError(MoEDRError):
    """The history file cannot be written while the server runs."""


class History:
    """The store. path: None keeps it in memory. Raises ConfigError for a file of another kind, or a damaged one."""

    def __init__(self, path: str | Path | None = None, days: float = 30.0) -> None:
        self.path = path = None if path is None else Path(path)
        self.days, self._lock = days, threading.Lock()
        self._spare: sqlite3.Connection | None = None  # in memory, while the file fails
        self._again = 0.0
        rule = "must be a file that can be written, new or of an earlier server"
        self._file = None
        try:
            if path is not None:  # a lock of the whole file, beside SQLite's own of its parts
                self._file = path.open("ab")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._store = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False,
                                          isolation_level=None)
            if (state := self._store.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
                raise ConfigError(f"history = {str(path)!r}: must be an undamaged file; move it away to "
                                  f"begin a new one: {state}")
            self._store.executescript("pragma journal_mode = wal; pragma synchronous = normal;")
            if self._store.execute("pragma application_id").fetchone()[0] != OURS:
                if self._store.execute("select count(*) from sqlite_master").fetchone()[0]:
                    raise ConfigError(f"history = {str(path)!r}: {rule}: it is of another program")
                self._store.execute(f"pragma application_id = {OURS}")
            self._store.executescript(_TABLES)
        except BlockingIOError:
            raise ConfigError(f"history = {str(path)!r}: another server uses it") from None
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"history = {str(path)!r}: {rule}: {error}") from None

    # ---- a file that fails --------------------------------------------------------------------------------------

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on the file, or in memory while the file fails."""
        with self._lock:
            if self._spare is None or clock.monotonic() >= self._again:
                try:
                    return self._on_file(work)
                except sqlite3.Error as error:
                    spare = self._failed(error)
            else:
                spare = self._spare
            return work(spare)

    def _on_file(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._file is not None and self.path is not None:
            try:
                there = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
            except OSError:
                there = False
            if not there:  # SQLite would go on writing into a file without a name
                raise sqlite3.OperationalError("the file was deleted or replaced")
        if self._spare is not None:  # does it take what came meanwhile?
            for table, places in (("readings", "?, ?"), ("alerts", "?, ?, ?, ?, ?")):
                self._store.executemany(f"insert or ignore into {table} values ({places})",
                                        self._spare.execute(f"select * from {table}").fetchall())
                self._spare.execute(f"delete from {table}")
        out = work(self._store)
        if self._spare is not None:
            self._spare.close()
            self._spare = None
            log.warning(to_json({"history": str(self.path), "status": "written again"}))
        return out

    def _failed(self, error: sqlite3.Error) -> sqlite3.Connection:
        # a full disk may get space again; damage stays (and is a plain DatabaseError)
        self._again = clock.monotonic() + AGAIN if isinstance(error, sqlite3.OperationalError) else math.inf
        if self._spare is None:
            log.warning(to_json({"history": str(self.path), "error": str(error),
                                    "status": "snapshots and alerts go on in memory, feedback is refused"}))
            self._spare = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            self._spare.executescript(_TABLES)
        return self._spare

    # ---- what is kept -------------------------------------------------------------------------------------------

    def add(self, time: float, snapshot: Snapshot) -> None:
        row = (time, to_json({key.to_text(): value for key, value in snapshot.items()}))
        self._do(lambda store: store.execute("insert or replace into readings values (?, ?)", row))

    def thin(self, now: float) -> None:
        """Delete snapshots that are too old, or too close together for their age."""
        def work(store: sqlite3.Connection) -> None:
            for table in ("readings", "alerts", "feedback"):
                store.execute(f"delete from {table} where time < ?", (now - self.days * DAY,))
            for age, gap in ((HOUR, 60), (DAY, 600)):  # of each gap the first stays
                store.execute(
                    "delete from readings where time < ?1 and time not in (select min(time) from readings "
                    "where time < ?1 group by cast(time / ?2 as integer))", (now - age, gap))

        self._do(work)

    def snapshots(self, since: float, most: int = 240) -> list[tuple[float, Snapshot]]:
        """(time, snapshot) since a time, oldest first: at most so many, evenly chosen, the newest among them."""
        def work(store: sqlite3.Connection) -> list[tuple[float, str]]:
            times = [time for time, in store.execute(
                "select time from readings where time >= ? order by time desc", (since,))]
            chosen = times[:: max(1, -(-len(times) // most))]
            places = ",".join("?" * len(chosen))
            return store.execute(
                f"select time, numbers from readings where time in ({places}) order by time", chosen).fetchall()

        return [(time, {MetricKey.of_text(text): value for text, value in json.loads(numbers).items()})
                for time, numbers in self._do(work)]

    def alert(self, time: float, rule: str, subject: str, begins: bool, message: str) -> None:
        row = (time, rule, subject, begins, message)
        self._do(lambda store: store.execute("insert into alerts values (?, ?, ?, ?, ?)", row))

    def alerts(self, most: int = 20) -> list[dict[str, object]]:
        """The last alerts, newest first."""
        rows = self._do(lambda store: store.execute("select * from alerts order by rowid desc limit ?",
                                                    (most,)).fetchall())
        return [dict(zip(("time", "rule", "subject", "begins", "message"), row, strict=True)) |
                {"rule": RENAMED_RULES.get(row[1], row[1])} for row in rows]

    def rate(self, time: float, answer: str, domain: str, rating: str, comment: str | None) -> bool:
        """Keep feedback; False if the answer has been rated before. Raises HistoryError where the file fails: memory
        would lose it."""
        with self._lock:
            try:
                return self._on_file(lambda store: store.execute(
                    "insert or ignore into feedback values (?, ?, ?, ?, ?)",
                    (time, answer, domain, rating, comment)).rowcount == 1)
            except sqlite3.Error as error:
                self._failed(error)
                raise HistoryError(f"history = {str(self.path)!r}: cannot be written: {error}") from None

    def comments(self, most: int = 5) -> list[dict[str, object]]:
        """The newest feedback that has a comment."""
        rows = self._do(lambda store: store.execute(
            "select time, domain, rating, comment from feedback where comment is not null order by time desc limit ?",
            (most,)).fetchall())
        return [dict(zip(("time", "domain", "rating", "comment"), row, strict=True)) for row in rows]

    def close(self) -> None:
        with self._lock:
            self._store.close()
            if self._spare is not None:
                self._spare.close()
            if self._file is not None:
                self._file.close()
