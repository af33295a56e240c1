"""What each of two processes does in tests/deepopt/test_ranks.py: `python -m tests.helpers.ranks FOLDER`, as torchrun
would start it. FOLDER/tokens has the data; results go beside it."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from deepseek.data import TokenShards
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.ranks import Ranks
from deepseek.deepopt.settings import Compress, TrainConfig
from deepseek.errors import ConfigError, RankError
from deepseek.model import CausalLM, TrainingLoss
from tests.helpers.killed_runs import TINY

TIMEOUT = 20.0
LONG: dict[str, Any] = dict(steps=15, save_every=5, eval_every=5, balance=True)  # long enough to see who is slow


def config(compress: Compress = "none", **more: Any) -> TrainConfig:
    return TrainConfig(**{**dict(steps=6, batch_size=2, seq_len=32, accumulation=4, warmup_steps=2, eval_every=3,
                                 save_every=3, keep=3, precision="fp32", lr=1e-3, balance=False), **more},
                       compress=compress)


def train(data: TokenShards, out: Path, ranks: Ranks | None, compress: Compress = "none", stop: int | None = None,
          slow: bool = False, **more: Any) -> None:
    """Train a new model, or go on; stop: leave after so many steps, as if killed. slow: rank 1 sleeps in each
    forward pass. more: settings."""
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    if slow and ranks is not None and ranks.rank == 1:
        forward = model.loss

        def sleepy(*args: Any, **options: Any) -> TrainingLoss:
            time.sleep(0.1)
            return forward(*args, **options)

        model.loss = sleepy  # type: ignore[method-assign]
    loop = TrainingLoop(model, data, config(compress, **more), out, ranks=ranks)

    def on_step(record: dict) -> None:
        if record["step"] == stop:
            raise InterruptedError

    try:
        loop.run(on_step)
    except InterruptedError:
        loop._lock.close()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks, data = Ranks.of_environment("cpu", TIMEOUT), TokenShards.open(folder / "tokens")
    for compress in ("none", "bf16", "int8", "powersgd"):
        train(data, folder / compress, ranks, compress)
    train(data, folder / "again", ranks, "int8", stop=5)
    train(data, folder / "again", ranks, "int8")
    train(data, folder / "even", ranks, slow=True)
    train(data, folder / "slow", ranks, slow=True, stop=11, **LONG)
    train(data, folder / "slow", ranks, **LONG)
    found: dict[str, Any] = {}
    try:
        ranks.same("colour", ["red", "green"][ranks.rank])
    except ConfigError as error:
        found["differs"] = str(error)
    ranks.timeout = 1.0
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    ranks.at(f"step {7 + ranks.rank}")
    try:
        if ranks.rank:
            time.sleep(4)
        else:
            ranks.sum_([torch.ones(3)])
    except RankError as error:
        found["late"] = str(error)
    (folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
