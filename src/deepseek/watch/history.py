"""Readings, alerts and feedback in one SQLite file. Old readings are thinned: all of the last hour, one a minute of the
last day, one in ten minutes before that, none after `days`."""

from __future__ import annotations

import fcntl
import json
import sqlite3
import threading
from pathlib import Path

from ..errors import ConfigError
from .metrics import Reading

HOUR, DAY = 3600.0, 86400.0
OURS = 0x4D6F4544  # application_id: "MoED"
_TABLES = """
create table if not exists readings (time real primary key, numbers text not null);
create table if not exists alerts (time real, rule text, subject text, begins integer, message text);
create table if not exists feedback (time real, answer text primary key, domain text, rating text, comment text);
"""


class History:
    """path: None keeps it in memory. Raises ConfigError for a file that is no such store."""

    def __init__(self, path: Path | None = None, days: float = 30.0) -> None:
        self.days, self._lock = days, threading.Lock()
        rule = "must be a file that can be written, new or of an earlier server"
        self._file = None
        try:
            if path is not None:  # a lock of the whole file, beside SQLite's own of its parts
                self._file = path.open("ab")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._store = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False,
                                          isolation_level=None)
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

    def add(self, time: float, reading: Reading) -> None:
        with self._lock:
            self._store.execute("insert or replace into readings values (?, ?)", (time, json.dumps(dict(reading))))

    def thin(self, now: float) -> None:
        """Drop what is too old, and what is too close together for its age."""
        with self._lock:
            for table in ("readings", "alerts", "feedback"):
                self._store.execute(f"delete from {table} where time < ?", (now - self.days * DAY,))
            for age, gap in ((HOUR, 60), (DAY, 600)):  # of each gap the first stays
                self._store.execute(
                    "delete from readings where time < ?1 and time not in (select min(time) from readings "
                    "where time < ?1 group by cast(time / ?2 as integer))", (now - age, gap))

    def readings(self, since: float, most: int = 240) -> list[tuple[float, Reading]]:
        """Oldest first, the newest among them; at most so many, evenly taken."""
        with self._lock:
            times = [time for time, in self._store.execute(
                "select time from readings where time >= ? order by time desc", (since,))]
            chosen = times[:: max(1, -(-len(times) // most))]
            places = ",".join("?" * len(chosen))
            rows = self._store.execute(
                f"select time, numbers from readings where time in ({places}) order by time", chosen).fetchall()
        return [(time, json.loads(numbers)) for time, numbers in rows]

    def alert(self, time: float, rule: str, subject: str, begins: bool, message: str) -> None:
        with self._lock:
            self._store.execute("insert into alerts values (?, ?, ?, ?, ?)", (time, rule, subject, begins, message))

    def alerts(self, most: int = 20) -> list[dict[str, object]]:
        """The newest first."""
        with self._lock:
            rows = self._store.execute("select * from alerts order by rowid desc limit ?", (most,)).fetchall()
        return [dict(zip(("time", "rule", "subject", "begins", "message"), row, strict=True)) for row in rows]

    def rate(self, time: float, answer: str, domain: str, rating: str, comment: str | None) -> bool:
        """Keep feedback; False if the answer has been rated before."""
        with self._lock:
            return self._store.execute("insert or ignore into feedback values (?, ?, ?, ?, ?)",
                                       (time, answer, domain, rating, comment)).rowcount == 1

    def comments(self, most: int = 5) -> list[dict[str, object]]:
        """The newest feedback with words."""
        with self._lock:
            rows = self._store.execute("select time, domain, rating, comment from feedback where comment is not null "
                                       "order by time desc limit ?", (most,)).fetchall()
        return [dict(zip(("time", "domain", "rating", "comment"), row, strict=True)) for row in rows]

    def close(self) -> None:
        with self._lock:
            self._store.close()
            if self._file is not None:
                self._file.close()
