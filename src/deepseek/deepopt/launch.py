"""`deepseek train --ranks N`: N processes on this machine.

Ranks in step are torchrun's: one that ends makes it start all of them again, from the last checkpoint. Ranks in rounds
are processes of their own with a store in this one, which trains nothing: one that ends is started again and joins.
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

from ..errors import RankError
from .settings import IN_ROUNDS, STORE

RESTARTS = 10  # of a rank in rounds, and of all in step
POLL = 0.2  # seconds

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
    process = _start([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                      f"--max-restarts={RESTARTS}", *command], environment)
    with _forwarded({0: process}) as came:
        status = process.wait()
    return 128 + came[0] if came else abs(status)


def _in_rounds(ranks: int, command: list[str], environment: dict[str, str]) -> int:
    import torch.distributed as dist

    store: dist.TCPStore
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
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
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
                store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
                ended[:] = [rank for rank in range(ranks) if rank not in running]
                for rank in ended:  # the ranks that are left do not wait for them
                    store.set(f"gone/{rank}", "-1")
                for rank in list(running):
                    again(rank, "no rank has the weights any more, the last checkpoint has")
    return 128 + came[0] if came else max(statuses)


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
