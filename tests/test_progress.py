"""Progress bars off a terminal, and the OpenMP setting that importing the package makes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek import progress
from deepseek.progress import ProgressBar

SOURCE = Path(progress.__file__).parent


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("leave", [True, False])
def test_a_log_gets_one_line_of_a_short_run(leave: bool) -> None:
    log = io.StringIO()
    with ProgressBar(total=5000, file=log, desc="train", leave=leave, mininterval=0) as bar:
        for step in range(5000):
            bar.set_postfix_str(f"loss {step}")
            bar.update()
        bar.write("a message", file=log)
    bar.close()
    message, state = log.getvalue().splitlines()
    assert message == "a message" and state.startswith("train: 100%") and "5000/5000" in state and "loss 4999" in state
    assert "\r" not in log.getvalue()


def test_a_log_gets_a_line_when_one_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    log = io.StringIO()
    with ProgressBar(total=100, file=log, mininterval=0) as bar:
        for _ in range(50):
            now += 1
            bar.update()
            bar.refresh()
    lines = log.getvalue().splitlines()
    assert [re.search(r"(\d+)/100", line)[1] for line in lines] == ["10", "20", "30", "40", "50", "50"]


def test_a_terminal_is_drawn_in_place_and_a_disabled_bar_writes_nothing() -> None:
    terminal, log = _Terminal(), io.StringIO()
    for bar in (ProgressBar(range(3), file=terminal), ProgressBar(range(3), file=log, disable=True)):
        assert list(bar) == [0, 1, 2]
    assert terminal.getvalue().count("\r") > 1 and log.getvalue() == ""


def test_every_bar_is_made_here() -> None:
    others = [path.name for path in SOURCE.rglob("*.py") if re.search(r"import.*\btqdm|tqdm\(", path.read_text())]
    assert others == ["progress.py"]


def _python(code: str, **given: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    return subprocess.run([sys.executable, "-c", code], env=environment | given, capture_output=True, text=True,
                          check=True)


def test_importing_the_package_sets_short_spins() -> None:
    code = "import deepseek, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert _python(code).stdout == "1000\n"
    assert _python(code, GOMP_SPINCOUNT="7").stdout == "7\n"
    assert _python(code, OMP_WAIT_POLICY="PASSIVE").stdout == "None\n"


@pytest.mark.parametrize(("maps", "told"), [("/lib/libgomp.so.1", True), ("/lib/libomp.so", False)])
def test_torch_before_the_package_is_warned_of(maps: str, told: bool) -> None:
    code = (f"import sys, pathlib; pathlib.Path.read_text = lambda *a, **k: {maps!r}\n"
            "sys.modules['torch'] = object()\nimport deepseek")  # the order is all that matters
    assert ("RuntimeWarning: torch was imported before deepseek" in _python(code).stderr) == told
    assert not _python(code, GOMP_SPINCOUNT="1000").stderr
