"""Programs that a model wrote, each in a Python process of its own with limits of time, memory and files.

The limits are those of a process: they stop programs that loop, allocate or write too much by mistake. It is no
sandbox: a program may read what the user may read, use the network, and leave processes in a session of their own
behind, each with the same limits; so nothing runs unless it is asked for.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

SECONDS, MEMORY, FILE_BYTES, OPEN_FILES = 10.0, 1 << 30, 1 << 20, 32
PASSED = 93  # exit status after the program's last line: one that leaves before, by sys.exit(0) say, has not passed
# the process limits itself before it reads the program
_CODE = f"""
import os, resource, sys
for kind, most in ((resource.RLIMIT_AS, {MEMORY}), (resource.RLIMIT_FSIZE, {FILE_BYTES}), (resource.RLIMIT_CORE, 0),
                   (resource.RLIMIT_NOFILE, {OPEN_FILES}), (resource.RLIMIT_CPU, {math.ceil(SECONDS)})):
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
os._exit({PASSED})
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program reaches its end, without an exception, within `seconds`."""
    with tempfile.TemporaryDirectory(prefix="deepseek-eval-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=folder, start_new_session=True,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"})
        try:
            process.communicate(program.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what the program has started
            process.wait()
        return process.returncode == PASSED


class CodeEval:
    """Replaces the metric `code_eval` of the library `evaluate`, which the harness' tasks load by name."""

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,),
                **_: Any) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """(pass@k of all problems, problem -> whether each of its programs passed). references: a test a problem."""
        passed = {n: [passes(f"{program}\n{test}") for program in programs]
                  for n, (test, programs) in enumerate(zip(references, predictions, strict=True))}
        return {f"pass@{one}": sum(pass_at(len(runs), sum(runs), one) for runs in passed.values()) / len(passed)
                for one in k if all(len(runs) >= one for runs in passed.values())}, passed


def pass_at(count: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k programs passes, from `count` programs of which `passed` did (arXiv
    2107.03374)."""
    return 1.0 - math.comb(count - passed, k) / math.comb(count, k)
