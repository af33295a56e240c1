"""The command line as a program: how it is started, and what its help says."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["deepseek", "deepseek.cli"])
def test_the_command_runs_as_a_module(module: str) -> None:
    said = subprocess.run([sys.executable, "-m", module, "info", "nano"], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "Parameters" in said.stdout, said.stderr
