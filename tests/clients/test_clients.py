"""Clients that others wrote, in an environment of their own, against `deepseek serve`: every named case passes.

`make clients` installs them and runs this file; `python -m tests.clients.test_clients` prints the table of cases.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoint import save_model
from deepseek.config import ModelConfig
from deepseek.tokenizer import Tokenizer
from tests.helpers import ROOT
from tests.helpers.models import TINY, random_model

INSTALLED = ROOT / ".venv" / "clients"
PROGRAMS = {
    "openai": [str(INSTALLED / "bin" / "python"), "-m", "tests.clients.openai_client"],
    "libraries": [str(INSTALLED / "bin" / "python"), "-m", "tests.clients.libraries_client"],
    "lm_eval": [str(INSTALLED / "bin" / "python"), "-m", "tests.clients.lm_eval_client"],
    "node": ["node", "tests/clients/node_client.mjs"],
}


@contextmanager
def serving(folder: Path, config: Any, random_model: Callable) -> Iterator[dict[str, str]]:
    """`deepseek serve` on a tiny model with random weights; the environment that its clients read."""
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog", "0123456789", '{"a": [true]}'] * 4, 340)
    save_model(random_model(config(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)), folder)
    tokenizer.save(folder)
    server = subprocess.Popen([sys.executable, "-m", "deepseek.cli", "serve", str(folder), "--port", "0", "--api_key",
                               "sk-clients"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" on ")[1].strip()
        yield os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-clients", "MODEL": folder.name,
                            "MODEL_FOLDER": str(folder), "NODE_FOLDER": str(INSTALLED / "node")}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def run(name: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The cases of a program, as it tells them."""
    done = subprocess.run(PROGRAMS[name], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable, random_model: Callable
                ) -> Iterator[dict[str, str]]:
    with serving(tmp_path_factory.mktemp("clients") / "tiny", tiny_config, random_model) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_case_passes(name: str, environment: dict[str, str]) -> None:
    if not (INSTALLED / "node" / "node_modules").is_dir() or shutil.which("node") is None:
        pytest.skip("needs `make clients`, which installs the clients of others")
    cases = run(name, environment)
    assert cases and not [case for case in cases if case["error"]]


def table() -> int:
    """Print the cases with their results; the number of those that failed."""
    cases = []
    with tempfile.TemporaryDirectory() as root, serving(
            Path(root) / "tiny", lambda **changes: ModelConfig(**(TINY | changes)), random_model) as environment:
        for name in PROGRAMS:
            cases += run(name, environment)
    for case in cases:
        print(f"{case['client']:28} {case['case']:52} {case['error'] or 'passes'}")
    failed = sum(case["error"] is not None for case in cases)
    print(f"{len(cases) - failed} of {len(cases)} cases pass")
    return failed


if __name__ == "__main__":
    sys.exit(bool(table()))
