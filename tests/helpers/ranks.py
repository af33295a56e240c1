"""What each of several processes does in tests/deepopt: `python -m tests.helpers.ranks WHAT FOLDER`, as torchrun would
start it. FOLDER/tokens has the data; results go beside it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from deepseek.checkpoint import tensor_hashes, write_tensors
from deepseek.config import ModelConfig
from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt.expert_parallel import ExpertParallelLoop
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.ranks import Ranks
from deepseek.deepopt.settings import TrainConfig
from deepseek.deepopt.trainer import loop_in_step
from deepseek.errors import ConfigError, RankError
from deepseek.model import CausalLM, TrainingLoss
from deepseek.tokenizer import Tokenizer
from tests.helpers import ROOT
from tests.helpers.killed_runs import TINY

T = TypeVar("T")
TIMEOUT = 120.0
LONG: dict[str, Any] = dict(steps=15, save_every=5, eval_every=5, balance=True)  # long enough to see who is slow
SHORT: dict[str, Any] = {"steps": 3, "accumulation": 2, "eval_batches": 1, "save_every": 1}  # of divided models
WIDE = TINY.with_(moe_intermediate_size=128)  # whose experts have moments of 8 bits
FOUR = SHORT | {"accumulation": 4}  # of four ranks


def packed(folder: Path) -> TokenShards:
    sentences = [f"the {a} {b} the {c} ." for a in ("red", "old", "big") for b in ("fox sees", "cat eats", "dog likes")
                 for c in ("moon", "river", "bread", "song")]
    documents = [Document(" ".join(sentences[i % 36 : i % 36 + 9]) + f" {i}", f"story {i}") for i in range(60)]
    tokenizer = Tokenizer.train((d.text for d in documents), TINY.vocab_size)
    return pack(documents, tokenizer, folder, valid_fraction=0.1)


@contextmanager
def together(what: str, folder: Path, size: int = 2) -> Iterator[None]:
    """Meanwhile `size` processes do it, and have done it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size),
                                "TORCH_CPP_LOG_LEVEL": "FATAL"}
    started = [subprocess.Popen([sys.executable, "-m", "tests.helpers.ranks", what, str(folder)], cwd=ROOT,
                                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
               for rank in range(size)]
    yield
    for process in started:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()


def in_threads(size: int, train: Callable[[int], T]) -> list[T]:
    """What `train` returns for each of `size` ranks, all at once. Raises the first error of any."""
    found: dict[int, T] = {}
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            found[rank] = train(rank)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank hangs"
    if failed:
        raise failed[0]
    return [found[rank] for rank in range(size)]


def config(**more: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 6, "batch_size": 2, "seq_len": 32, "accumulation": 4, "warmup_steps": 2, "eval_every": 3,
        "save_every": 3, "keep": 3, "precision": "fp32", "lr": 1e-3, "balance": False}
    return TrainConfig(**usual | more)


def train(data: TokenShards, out: Path, ranks: Ranks | None, stop: int | None = None,
          slow: bool = False, shape: ModelConfig = TINY, **settings: Any) -> TrainingLoop:
    """Train a new model, or go on; stop: leave after so many steps, as if killed. slow: rank 1 sleeps in each
    forward pass."""
    model, ranks = CausalLM(shape).init_weights(torch.Generator().manual_seed(0)), Ranks() if ranks is None else ranks
    if slow and ranks.rank == 1:
        forward = model.loss

        def sleepy(*args: Any, **options: Any) -> TrainingLoss:
            began = time.perf_counter()
            found = forward(*args, **options)
            time.sleep(max(0.1, 5 * (time.perf_counter() - began)))  # the other is faster however busy the machine is
            return found

        model.loss = sleepy  # type: ignore[method-assign]
    chosen = config(**settings)
    loop = loop_in_step(chosen)(model, data, chosen, out, ranks=ranks)

    def on_step(record: dict) -> None:
        if record["step"] == stop:
            raise InterruptedError

    try:
        loop.run(on_step)
    except InterruptedError:
        loop._lock.close()
    return loop


def in_step(folder: Path, data: TokenShards, ranks: Ranks) -> None:
    for compress in ("none", "bf16", "int8", "powersgd"):
        train(data, folder / compress, ranks, compress=compress)
    narrow = train(data, folder / "narrow", ranks, moments="8bit", weights="bf16").model
    train(data, folder / "again", ranks, compress="int8", stop=5)
    train(data, folder / "again", ranks, compress="int8")
    train(data, folder / "even", ranks, slow=True)
    train(data, folder / "slow", ranks, slow=True, stop=11, **LONG)
    train(data, folder / "slow", ranks, **LONG)
    found: dict[str, Any] = {"narrow": tensor_hashes(narrow)}
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


def experts(folder: Path, data: TokenShards, ranks: Ranks) -> None:
    """Runs of test_expert_parallel.py."""
    loop = train(data, folder / "adamw", ranks, expert_parallel=2, **SHORT)
    kept = {f"{name}.{key}": [*value.shape] for name, p in loop.model.named_parameters() if ".experts." in name
            for key, value in {"weight": p, **loop.optimizer.state[p]}.items()}
    (folder / f"kept-{ranks.rank}.json").write_text(json.dumps(kept))
    shuffle(loop)
    train(data, folder / "muon", ranks, expert_parallel=2, optimizer="muon", gradient_checkpointing=True, **SHORT)
    train(data, folder / "divided", ranks, expert_parallel=2, **SHORT)  # where one process has begun
    train(data, folder / "joined", ranks, stop=2, expert_parallel=2, **SHORT)
    for out, stops in (("placed", [None]), ("placed-again", [2, 3, None])):
        for stop in stops:
            train(data, folder / out, ranks, stop, expert_parallel=2, place_every=2, **SHORT)
    for optimizer in ("adamw", "muon"):
        shuffle(train(data, folder / f"{optimizer}-8bit", ranks, expert_parallel=2, optimizer=optimizer,
                      moments="8bit", shape=WIDE, **SHORT | {"steps": 1}))


def fsdp(folder: Path, data: TokenShards, ranks: Ranks) -> None:
    """Runs of test_fsdp.py."""
    from deepseek.deepopt.fsdp import FSDPLoop

    loop = train(data, folder / "adamw", ranks, fsdp=True, **SHORT)
    assert isinstance(loop, FSDPLoop)
    kept = {f"{name}.{key}": [*value.shape] for name, p in loop.parts.items()
            for key, value in {"weight": p, **loop.optimizer.state[p]}.items() if value.ndim}
    (folder / f"kept-{ranks.rank}.json").write_text(json.dumps(kept))
    train(data, folder / "muon", ranks, fsdp=True, optimizer="muon", gradient_checkpointing=True, **SHORT)
    train(data, folder / "bf16", ranks, fsdp=True, precision="bf16", **SHORT)
    train(data, folder / "divided", ranks, fsdp=True, **SHORT)  # where one process has begun
    for stop in (1, 2, None):
        train(data, folder / "again", ranks, stop, fsdp=True, optimizer="muon", **SHORT)
    train(data, folder / "joined", ranks, 2, fsdp=True, **SHORT)


def fsdp3(folder: Path, data: TokenShards, ranks: Ranks) -> None:
    train(data, folder / "uneven", ranks, fsdp=True, optimizer="muon", **SHORT | {"accumulation": 3})


def shuffle(loop: TrainingLoop) -> None:
    """Let all experts go somewhere, and write once more what is there."""
    assert isinstance(loop, ExpertParallelLoop)
    loop.slot_LE = torch.rand(loop.slot_LE.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    loop._place()
    with loop._served():
        if loop.ranks.first:
            loop._write(loop.out / "moved", lambda path: write_tensors(
                path / "optimizer.safetensors", loop._moments(), loop._elsewhere))


def groups(folder: Path, data: TokenShards, ranks: Ranks) -> None:
    train(data, folder / "groups", ranks, expert_parallel=2, stop=3, place_every=1, **FOUR)
    train(data, folder / "groups", ranks, expert_parallel=4, **FOUR)


WHAT: dict[str, Callable[[Path, TokenShards, Ranks], None]] = {
    "in_step": in_step, "experts": experts, "groups": groups, "fsdp": fsdp, "fsdp3": fsdp3}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    WHAT[sys.argv[1]](folder, TokenShards.open(folder / "tokens"), Ranks.of_environment("cpu", TIMEOUT))
