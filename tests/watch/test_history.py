"""The store: thinning, feedback that counts once, and files that are none."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from deepseek.errors import ConfigError
from deepseek.watch.history import DAY, HOUR, History, HistoryError
from deepseek.watch.metrics import METRICS, RENAMED, delta, key
from deepseek.watch.state import rates

NOW = 1e9


def test_old_readings_are_thinned_and_then_dropped() -> None:
    history = History(days=10)
    for age, gap in ((HOUR, 5), (DAY, 20), (5 * DAY, 300), (20 * DAY, 300)):
        for i in range(int(min(age, DAY) / gap)):
            history.add(NOW - age + i * gap, {key("steps_total"): float(i)})
    history.thin(NOW)
    times = [time for time, _ in history.snapshots(0, most=20_000)]
    assert min(times) >= NOW - 10 * DAY
    assert sum(t >= NOW - HOUR for t in times) == HOUR / 5  # all of the last hour
    of_day = [t for t in times if NOW - DAY <= t < NOW - HOUR]
    assert len({t // 60 for t in of_day}) == len(of_day) and len(of_day) in (23 * 60, 23 * 60 + 1)
    history.thin(NOW)
    assert [time for time, _ in history.snapshots(0, most=20_000)] == times  # once is enough
    few = history.snapshots(0, most=50)
    assert len(few) <= 50 and few[-1][0] == max(times) and few == sorted(few, key=lambda entry: entry[0])
    history.close()


def test_what_is_kept_outlives_the_server(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    history.add(NOW, {key("steps_total"): 3.0})
    history.alert(NOW, "share_low", "code_expert", True, "a message")
    assert history.rate(NOW, "cmpl-1", "law_expert", "up", "good")
    assert not history.rate(NOW + 1, "cmpl-1", "law_expert", "down", None)
    history.close()
    again = History(tmp_path / "h.sqlite")
    assert again.snapshots(0) == [(NOW, {key("steps_total"): 3.0})]
    assert again.alerts()[0]["message"] == "a message" and again.comments()[0]["comment"] == "good"
    assert not again.rate(NOW, "cmpl-1", "law_expert", "up", None)
    again.close()


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "h").write_text("something else entirely " * 100)
    for path in (tmp_path / "h", tmp_path / "none" / "h"):
        with pytest.raises(ConfigError, match="must be a file that can be written"):
            History(path)


def test_a_damaged_file_is_refused_at_start(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    history = History(path)
    for i in range(200):
        history.add(NOW + i, {key("steps_total"): float(i)})
    history.close()
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xa5" * 8192
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"must be an undamaged file|malformed"):
        History(path)


def test_a_full_disk_is_said_once_and_what_came_meanwhile_is_kept(tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    history = History(tmp_path / "h.sqlite")
    history.add(NOW, {key("steps_total"): 0.0})
    # the disk is full for this connection alone, which nothing but a test wants
    pages = history._store.execute("pragma page_count").fetchone()[0]
    history._store.execute(f"pragma max_page_count = {pages}")
    comment = "x" * 20_000
    for i in range(1, 200):
        history.add(NOW + i, {key("steps_total"): float(i), key("slots_total", "x" * 1000): 1.0})
    history.alert(NOW, "share_low", "code_expert", True, "a message")
    with pytest.raises(HistoryError, match="cannot be written"):
        history.rate(NOW, "cmpl-1", "law_expert", "up", comment)
    history.thin(NOW)
    assert len(caplog.records) == 1 and "full" in caplog.text
    assert history.snapshots(0)[-1][1][key("steps_total")] == 199 and history.alerts()
    history._store.execute("pragma max_page_count = 100000")
    assert history.rate(NOW, "cmpl-1", "law_expert", "up", comment)
    assert "written again" in caplog.text and len(caplog.records) == 2
    assert len(history.snapshots(0, most=1000)) == 200 and len(history.alerts()) == 1
    history.close()


def test_a_file_that_is_deleted_or_damaged_while_the_server_runs(tmp_path: Path,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    history = History(tmp_path / "h.sqlite")
    (tmp_path / "h.sqlite").unlink()
    history.add(NOW, {key("steps_total"): 1.0})
    assert history.snapshots(0) == [(NOW, {key("steps_total"): 1.0})]
    with pytest.raises(HistoryError, match="deleted or replaced"):
        history.rate(NOW, "cmpl-1", "law_expert", "up", None)
    history.close()
    history = History(tmp_path / "i.sqlite")

    def damaged(_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    # a file that is damaged under an open connection is noticed at a page that is read again, in no fixed order
    history._on_file = damaged  # type: ignore[method-assign, assignment]
    for i in range(3):
        history.add(NOW + i, {key("steps_total"): 1.0})
    assert len(history.snapshots(0)) == 3 and not history.comments()
    assert len(caplog.records) == 2
    history.close()


def test_a_file_of_an_earlier_release_has_curves_and_alerts(tmp_path: Path) -> None:
    """Its rows bear metrics' former names: the first minute's waits of 10 to 25 ms, then some of 50 to 100 ms."""
    History(tmp_path / "h.sqlite").close()
    with sqlite3.connect(tmp_path / "h.sqlite") as store:
        for minute, slow in enumerate((0, 10)):
            waits = {f"{name}|{bound}": float(4 + (float(bound) >= 0.1) * slow)
                     for name, metric in METRICS.items() if metric.kind == "histogram"
                     for bound in (*map(str, metric.bounds), "inf")}
            row = waits | {"right_tokens_total|law_expert": 5.0 * minute, "joules_total|cpu": 60.0 * minute,
                           "tokens_total|computed": 30.0 * minute, "cpu_share": 0.5}
            former = {new: old for old, new in RENAMED.items()}
            row = {(former.get(name.split("|")[0], name.split("|")[0]) + name[len(name.split("|")[0]):]).replace(
                "|inf", "|+Inf"): value for name, value in row.items()}
            assert "first_token_seconds|0.1" in row
            store.execute("insert into readings values (?, ?)", (NOW + 60 * minute, json.dumps(row)))
        store.execute("insert into alerts values (?, 'unhappy', '', 1, 'a message')", (NOW,))
    history = History(tmp_path / "h.sqlite")
    (start, old), (end, now) = history.snapshots(0)
    assert now[key("cpu_ratio")] == 0.5 and delta(now, old, "correct_tokens_total", "law_expert") == 5.0
    curve = rates(start, old, end, now)
    assert curve.joules_per_token == 2.0 and curve.first_p50 == pytest.approx(0.075)
    assert curve.each_p50 == pytest.approx(0.0875)
    assert history.alerts()[0]["rule"] == "negative_feedback_high"
    history.close()
