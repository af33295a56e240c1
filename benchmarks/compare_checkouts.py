"""One checkout against another on the same work in turn: is a change slower?

    python benchmarks/compare_checkouts.py OLD NEW [--presets nano,v3-63m] [--cases 1,8,32,train] [--rounds 20]

OLD and NEW are folders with a repository and its `.venv` (`make test` makes one). Each runs in a process of its own;
one works at a time, and who begins changes from pair to pair. Models have random weights. Cases:

    1, 8, 32    so many greedy requests at once through LLM.generate, NF4, 16 + 64 tokens each, without drafts
    train       steps of `deepseek train` (its defaults: 16 sequences of 256 tokens) in FP32 on random tokens

A ratio is NEW's tokens/s over OLD's in one pair. The table has the median with the quartiles, by the wall clock and by
processor time, which a busy machine disturbs less (best with --threads 1: waiting threads spin). Both must compute the
same tokens and losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

PROMPT, NEW_TOKENS = 16, 64
# units of work a measurement, so that it takes about half a second with `nano`
REPEAT = {"1": 4, "8": 2, "32": 1, "train": 1}


def generating(preset: str, count: int, folder: Path) -> Callable[[], tuple[int, Any]]:
    """One unit: `count` requests at once; returns tokens and what they were."""
    import torch

    from deepseek import LLM, ModelConfig, SamplingParams, load_model, quantize, save_model
    from deepseek.model import CausalLM

    config = ModelConfig.preset(preset)
    if not folder.is_dir():
        plain = folder.with_name(folder.name + "-plain")
        save_model(CausalLM(config).init_weights(torch.Generator().manual_seed(0)), plain)
        quantize(plain, folder)
    llm, draw = LLM(load_model(folder), speculate=False, cache_tokens=16384), torch.Generator().manual_seed(count)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)

    def unit() -> tuple[int, Any]:
        outputs = llm.generate(torch.randint(0, config.vocab_size, (count, PROMPT), generator=draw).tolist(), params)
        return count * NEW_TOKENS, [output.token_ids for output in outputs]

    return unit


def training(preset: str, folder: Path) -> Callable[[], tuple[int, Any]]:
    """One unit: a training step; returns tokens and the loss."""
    import torch

    from deepseek import ModelConfig
    from deepseek.data.shards import Batch
    from deepseek.deepopt.loop import TrainingLoop
    from deepseek.deepopt.settings import TrainConfig
    from deepseek.model import CausalLM

    config = ModelConfig.preset(preset)

    class Windows:
        experts, fingerprint = (), "random"

        def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int) -> Batch:
            draw = torch.Generator().manual_seed(step)
            ids = torch.randint(0, config.vocab_size, (batch_size, seq_len + 1), generator=draw)
            return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.full((batch_size, seq_len), -1))

    model = CausalLM(config).init_weights(torch.Generator().manual_seed(0))
    loop = TrainingLoop(model, Windows(), TrainConfig(precision="fp32"), folder)  # type: ignore[arg-type]

    def unit() -> tuple[int, Any]:
        return loop.config.batch_size * loop.config.seq_len, loop.train_step()["loss"]

    return unit


def work(threads: int) -> None:
    """A worker: for each line "preset case" one measurement as a line of JSON: wall and processor seconds, tokens."""
    import deepseek  # noqa: F401, I001  before torch: its threads then spin shortly
    import torch

    torch.set_num_threads(threads)
    known, unit = "", cast(Any, None)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            preset, case = line.split()
            if line != known:  # one model at a time: a cache and moments are much memory
                known, unit = line, None
                unit = (training(preset, Path(folder, f"{preset}-run")) if case == "train" else
                        generating(preset, int(case), Path(folder, preset)))
            wall, processor = time.perf_counter(), time.process_time()
            done = [unit() for _ in range(REPEAT[case])]
            print(json.dumps([time.perf_counter() - wall, time.process_time() - processor,
                              sum(tokens for tokens, _ in done), str(done)]), flush=True)


class Measured(NamedTuple):
    wall: float
    processor: float
    tokens: int
    result: str


def measure(worker: subprocess.Popen[str], preset: str, case: str) -> Measured:
    assert worker.stdin and worker.stdout
    worker.stdin.write(f"{preset} {case}\n")
    worker.stdin.flush()
    if not (line := worker.stdout.readline()):
        raise SystemExit(f"a worker failed at {preset} {case}")
    return Measured(*json.loads(line))


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--presets", default="nano,v3-63m")
    parser.add_argument("--cases", default="1,8,32,train")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    workers = [subprocess.Popen([folder / ".venv/bin/python", __file__, "--work", str(args.threads)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE) for folder in (args.old, args.new)]
    print("| preset | case | old tokens/s | new tokens/s | ratio, wall clock | ratio, processor time |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for preset in args.presets.split(","):
        for case in args.cases.split(","):
            rounds = []
            for i in range(args.rounds + 1):
                pair = {j: measure(workers[j], preset, case) for j in ((0, 1), (1, 0))[i % 2]}
                if pair[0].result != pair[1].result:
                    raise SystemExit(f"{preset} {case}: the two computed different things")
                rounds.append((pair[0], pair[1]))
            old, new = ([pair[j] for pair in rounds[1:]] for j in (0, 1))  # the first warms up
            speeds = [f"{statistics.median(one.tokens / one.wall for one in own):,.0f}" for own in (old, new)]
            pairs = [*zip(old, new, strict=True)]
            ratios = [spread([a.wall / b.wall for a, b in pairs]),
                      spread([a.processor / b.processor for a, b in pairs])]
            print("| " + " | ".join([preset, case, *speeds, *ratios]) + " |", flush=True)
    for worker in workers:
        worker.communicate()


if __name__ == "__main__":
    work(int(sys.argv[2])) if sys.argv[1:2] == ["--work"] else main()
