"""A process that is killed while it adds files leaves every file whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


def killed_adds(folder: Path, kills: int, seed: int) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-m", "tests.helpers.killed_adds", str(folder), str(kills), str(seed)],
                          capture_output=True, text=True, cwd=ROOT, timeout=1200,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_lost_and_nothing_is_there_in_part(tmp_path: Path) -> None:
    found = killed_adds(tmp_path, 10, 0)
    assert found["kills"] == 10


@pytest.mark.slow
def test_nor_in_two_hundred_kills(tmp_path: Path) -> None:
    found = killed_adds(tmp_path, 200, 1)
    assert found["kills"] == 200 and found["parts"] > 10 and found["unfinished"] > 10 and found["journals"] > 0
