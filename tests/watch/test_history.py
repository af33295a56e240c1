"""The store: thinning, feedback that counts once, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.errors import ConfigError
from deepseek.watch.history import DAY, HOUR, History

NOW = 1e9


def test_old_readings_are_thinned_and_then_dropped() -> None:
    history = History(days=10)
    for age, gap in ((HOUR, 5), (DAY, 20), (5 * DAY, 300), (20 * DAY, 300)):
        for i in range(int(min(age, DAY) / gap)):
            history.add(NOW - age + i * gap, {"steps_total": float(i)})
    history.thin(NOW)
    times = [time for time, _ in history.readings(0, most=20_000)]
    assert min(times) >= NOW - 10 * DAY
    assert sum(t >= NOW - HOUR for t in times) == HOUR / 5  # all of the last hour
    of_day = [t for t in times if NOW - DAY <= t < NOW - HOUR]
    assert len({t // 60 for t in of_day}) == len(of_day) and len(of_day) in (23 * 60, 23 * 60 + 1)
    history.thin(NOW)
    assert [time for time, _ in history.readings(0, most=20_000)] == times  # once is enough
    few = history.readings(0, most=50)
    assert len(few) <= 50 and few[-1][0] == max(times) and few == sorted(few, key=lambda entry: entry[0])
    history.close()


def test_what_is_kept_outlives_the_server(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    history.add(NOW, {"steps_total": 3.0})
    history.alert(NOW, "share_low", "code_expert", True, "a message")
    assert history.rate(NOW, "cmpl-1", "law_expert", "up", "good")
    assert not history.rate(NOW + 1, "cmpl-1", "law_expert", "down", None)
    history.close()
    again = History(tmp_path / "h.sqlite")
    assert again.readings(0) == [(NOW, {"steps_total": 3.0})]
    assert again.alerts()[0]["message"] == "a message" and again.comments()[0]["comment"] == "good"
    assert not again.rate(NOW, "cmpl-1", "law_expert", "up", None)
    again.close()


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "h").write_text("something else entirely " * 100)
    for path in (tmp_path / "h", tmp_path / "none" / "h"):
        with pytest.raises(ConfigError, match="must be a file that can be written"):
            History(path)
