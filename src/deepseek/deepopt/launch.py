"""`deepseek train --ranks N`: N processes on this machine.

The store by which they find each other is in this process, which trains nothing. Where a rank in step is killed or does
not answer, all start again from the last checkpoint; of ranks in rounds it alone is started again, and joins. A rank
that has said what is wrong, and ends by itself, is not started again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from ..errors import RankError
from .settings import IN_ROUNDS, STORE

RESTARTS = 10  # of a rank in rounds, and of all in step
POLL = 0.2  # seconds
GRACE = 5.0  # seconds in which ranks may end by themselves when another has

if TYPE_CHECKING:
    from torch.distributed import TCPStore

Process = subprocess.Popen[bytes]


def is_rank() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(ranks: int, compress: str, words: Sequence[str]) -> int:
    """Run `deepseek WORDS` as several ranks; returns the exit status, 128 + N after signal N."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    command = ["-m", "deepseek", *words]
    if compress in IN_ROUNDS:
        return _in_rounds(ranks, [sys.executable, *command], environment)
    return _in_step(ranks, [sys.executable, *command], environment)


def _in_step(ranks: int, command: list[str], environment: dict[str, str]) -> int:
    running: dict[int, Process] = {}
    with _forwarded(running) as came:
        for left in reversed(range(RESTARTS + 1)):
            if came:
                break
            store = _new_store()
            for rank in range(ranks):
                running[rank] = _start(command, environment | {
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
            while any(process.poll() is None for process in running.values()) and (
                    not any(process.poll() for process in running.values())):
                time.sleep(POLL)
            until = time.monotonic() + GRACE
            while not came and time.monotonic() < until and any(one.poll() is None for one in running.values()):
                time.sleep(POLL)  # the others notice, and say so
            statuses = [process.wait() if came else process.poll() for process in running.values()]
            if came:
                break
            if not any(statuses):
                return 0
            for process in running.values():
                process.kill()
                process.wait()
            if said := [status for status in statuses if status and status > 0 and status != RankError.status]:
                return max(said)
            lost = ", ".join(f"rank {rank} was ended by signal {-status}" for rank, status in enumerate(statuses)
                             if status is not None and status < 0) or "a rank does not answer"
            if not left:
                raise RankError(f"{lost}, after all had been started {RESTARTS + 1} times")
            print(f"{lost}; all start again from the last checkpoint", file=sys.stderr, flush=True)
    return 128 + came[0]


def _in_rounds(ranks: int, command: list[str], environment: dict[str, str]) -> int:
    store: TCPStore
    running: dict[int, Process] = {}
    left, statuses = dict.fromkeys(range(ranks), RESTARTS), [0]
    ended: list[int] = []  # before the store that is there now

    def start(rank: int) -> None:
        running[rank] = _start(command, environment | {
            STORE: f"127.0.0.1:{store.port}", "RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank - sum(other < rank for other in ended))})

    def again(rank: int, why: str) -> None:
        if not left[rank]:
            raise RankError(f"rank {rank}: {why}, after it had been started {RESTARTS + 1} times")
        left[rank] -= 1
        print(f"rank {rank}: {why}; it starts again", file=sys.stderr, flush=True)
        start(rank)

    with _forwarded(running) as came:
        store = _new_store()
        for rank in range(ranks):
            start(rank)
        while running:
            time.sleep(POLL)
            for rank, process in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                store.set(f"gone/{rank}", str(status))
                del running[rank]
                if status >= 0 or came:  # it has said what is wrong, or was told to end
                    statuses.append(abs(status))
                else:
                    again(rank, f"was ended by signal {-status}")
            if running and not came and all(store.check([f"join/{rank}"]) for rank in running):
                for process in running.values():  # no rank is left that could admit them
                    process.kill()
                    process.wait()
                store = _new_store()
                ended[:] = [rank for rank in range(ranks) if rank not in running]
                for rank in ended:  # the ranks that are left do not wait for them
                    store.set(f"gone/{rank}", "-1")
                for rank in list(running):
                    again(rank, "no rank has the weights any more, the last checkpoint has")
    return 128 + came[0] if came else max(statuses)


def _new_store() -> TCPStore:
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)


def _start(command: list[str], environment: dict[str, str]) -> Process:
    # in a session of its own: Ctrl-C in a terminal reaches it once, by this process
    return subprocess.Popen(command, env=environment, start_new_session=True)


@contextlib.contextmanager
def _forwarded(processes: Mapping[int, Process]) -> Iterator[list[int]]:
    """Forward SIGINT and SIGTERM to the processes; gives the signals that came. None of them outlives the block."""
    came: list[int] = []

    def forward(number: int, _: object) -> None:
        came.append(number)
        for process in processes.values():
            process.terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for process in processes.values():
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
