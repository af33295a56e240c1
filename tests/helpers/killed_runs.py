"""Train, be killed, go on: run by test_loop.py in a process of its own.

    python -m tests.helpers.killed_runs FOLDER KILLS SEED

One undisturbed run, then the same run killed with SIGKILL until it has been killed KILLS times and has
finished: two kills in three at instants uniform in time, every third within 10 ms of the start of a checkpoint write.
Prints one JSON line: kills, how many of them hit a checkpoint write, the two weight hashes.

The trainers are forked from this process, which has imported torch and uses one thread: a run then costs its training
alone, and hundreds of kills fit into a minute.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from deepseek.config import ModelConfig
from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.settings import TrainConfig
from deepseek.files import sha256
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer

TINY = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
    moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, num_nextn_predict_layers=1, max_position_embeddings=128)
SETTINGS = TrainConfig(steps=30, batch_size=2, seq_len=32, warmup_steps=5, eval_every=10, eval_batches=2, save_every=2,
                       lr=3e-3)


def train(out: Path, data: TokenShards) -> None:
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    TrainingLoop(model, data, SETTINGS, out).run()


def fork(out: Path, data: TokenShards) -> int:
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        status = 1
        try:
            train(out, data)
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main() -> None:
    folder, wanted, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    words = [f"w{draw.randrange(40)}" for _ in range(4000)]
    documents = [Document(" ".join(words[i : i + 100]), f"text {i}") for i in range(0, 4000, 100)]
    tokenizer = Tokenizer.train((d.text for d in documents), TINY.vocab_size)
    data = pack(documents, tokenizer, folder / "tokens", valid_fraction=0.1)

    began = time.perf_counter()
    _, status = os.waitpid(fork(folder / "calm", data), 0)
    assert status == 0, "the undisturbed run failed"
    alone = time.perf_counter() - began

    kills = writes = 0
    while True:
        pid = fork(folder / "killed", data)
        if kills < wanted:
            if kills % 3 == 2:  # aim at a checkpoint write: wait for its staging folder, then a moment
                while not any((folder / "killed").glob(".checkpoint-*")) and not ended(pid):
                    time.sleep(2e-4)
                time.sleep(draw.uniform(0, 0.01))
            else:
                time.sleep(draw.uniform(0, alone / 3))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            writes += any((folder / "killed").glob(".checkpoint-*"))
            continue
        assert status == 0, "a resumed run failed"
        if kills >= wanted:
            break
        # it finished before it was killed often enough: start over, the count goes on
        for path in sorted((folder / "killed").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    weights = ("model.safetensors", "mtp.safetensors")
    hashes = [[sha256(folder / run / "model" / name) for name in weights] for run in ("calm", "killed")]
    print(json.dumps({"kills": kills, "during_writes": writes, "calm": hashes[0], "killed": hashes[1]}))


if __name__ == "__main__":
    main()
