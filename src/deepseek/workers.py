"""Worker processes, for work on what others wrote, which may crash, run without end or take all memory.

A worker answers questions, a line of JSON each. The kernel ends it when it has computed too long, its memory is
limited, and this process's threads go on meanwhile. Idle workers are kept for the next question and end with this
process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from .errors import RequestError

NICENESS = 5  # of a worker: a third of what the process that asks gets of a busy core
_pools: weakref.WeakSet[Workers] = weakref.WeakSet()


class WorkerError(Exception):
    """A worker ended before it answered. late: it computed longer than `seconds`. status: its exit status."""

    def __init__(self, status: int, seconds: float) -> None:
        super().__init__(f"status {status}")
        self.status, self.seconds, self.late = status, seconds, status == -signal.SIGPROF


class Workers:
    """Processes that run `function` of `module`, which calls `serve`. The module is imported without torch."""

    def __init__(self, module: str, function: str = "work", kept: int = 4) -> None:
        """kept: idle workers at most."""
        self._code = (f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import {function}; "
                      f"{function}()")
        self._kept, self._idle = kept, list[subprocess.Popen[bytes]]()
        self.owner, self._lock = os.getpid(), threading.Lock()
        _pools.add(self)

    def start(self) -> None:
        """Have a worker ready for the first question."""
        if not self._idle:
            self._keep(self.take())

    def ask(self, question: Mapping[str, Any], *, seconds: float, memory: int) -> dict[str, Any]:
        """The answer of a worker. seconds: of computing, grown with the question. memory: bytes.

        Raises WorkerError; TypeError, ValueError and RecursionError where the question is not JSON's; RequestError
        where no process can be had.
        """
        line = json.dumps({"seconds": seconds, "memory": memory, "question": question}).encode() + b"\n"
        while True:
            worker = self.take()
            assert worker.stdin is not None and worker.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    worker.stdin.write(line)
                    worker.stdin.flush()
                reply = worker.stdout.readline()
            except BaseException:  # an interrupt, say: its reply must not become another question's
                _end(worker)
                raise
            if reply.endswith(b"\n"):
                self._keep(worker)
                return json.loads(reply)
            with contextlib.suppress(subprocess.TimeoutExpired):  # its pipes are closed, so it is about to end
                worker.wait(1)
            _end(worker)
            if worker.returncode != 0:  # zero: it had reached a limit before, and was leaving when it was asked
                raise WorkerError(worker.returncode, _grown(seconds, len(line)))

    def take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self.owner != os.getpid():  # after a fork the workers are the parent's
                self._idle.clear()
                self.owner = os.getpid()
            while self._idle:
                if (worker := self._idle.pop()).poll() is None:
                    return worker
        try:
            return subprocess.Popen([sys.executable, "-c", self._code, json.dumps(sys.path)], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
        except OSError as error:
            raise RequestError(f"a worker process cannot be started: {error.strerror}") from None

    def _keep(self, worker: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if len(self._idle) < self._kept:
                self._idle.append(worker)
                return
        _end(worker)

    def end(self) -> None:
        """End the idle workers."""
        if self.owner == os.getpid():
            while self._idle:
                _end(self._idle.pop())


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A worker: a question a line in, its answer a line out, until the input ends or an answer has `limit`: memory that
    was full once may be in pieces."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(ValueError, OSError):  # not every system can; the time is limited everywhere
            resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], hard))
        signal.setitimer(signal.ITIMER_PROF, _grown(asked["seconds"], len(line)))  # SIGPROF ends the process
        reply = answer(asked["question"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()
        if "limit" in reply:
            return


def _grown(seconds: float, asked: int) -> float:
    return seconds * (1 + asked // (4 << 20))


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    with contextlib.suppress(BrokenPipeError):
        worker.communicate()


@atexit.register
def _end_all() -> None:
    for pool in list(_pools):
        pool.end()
