"""Generated programs run in a process with limits; only one that reaches its end has passed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deepseek.evaluate.execution import CodeEval, pass_at, passes


@pytest.mark.parametrize("program", [
    "assert 1 == 2", "import sys; sys.exit(0)", "import os; os._exit(0)", "def f(:", "x = bytearray(1 << 31)",
    "open('big', 'wb').write(bytes(1 << 22))", "1 / 0 \ud800", "import os; os.kill(os.getpid(), 9)"])
def test_what_fails(program: str) -> None:
    assert not passes(program)


def test_what_passes(tmp_path: Path) -> None:
    assert passes("import sys\nprint('x' * 100)\nassert sys.stdin.read() == ''\nopen('small', 'w').write('x')")
    assert not (Path.cwd() / "small").exists()


def test_a_program_has_no_more_than_its_time_and_leaves_nothing_running(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    began = time.monotonic()
    assert not passes(f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
                      "while True:\n    time.sleep(1)", seconds=1)
    assert time.monotonic() - began < 9
    time.sleep(1.5)
    assert not late.exists()


def test_the_metric_counts_programs_that_pass() -> None:
    good, bad = "def add(a, b): return a + b", "def add(a, b): return a * b"
    scores, passed = CodeEval().compute(["assert add(2, 3) == 5"] * 2, [[good, bad], [bad, bad]], k=[1, 2, 3])
    assert scores == {"pass@1": 0.25, "pass@2": 0.5} and passed == {0: [True, False], 1: [False, False]}
    assert pass_at(5, 2, 3) == pytest.approx(0.9)
