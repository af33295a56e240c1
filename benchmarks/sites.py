"""Sites with names of their own: what does it cost that no domain's text leaves its site?

The preset `small` (11 M parameters, 8 routing groups with the names of eight domains) twice, on as many tokens, 4,096 a
step: together, one process with the text of all, and sites, two ranks with four names each, which train and send the
experts of these (`--sites`). Which four is chosen by tokens: every site takes half of a step, so their texts are about
equally large. Then, over the held-out text of all eight domains (3 %, by hash):

    perplexity         of both models, and their ratio
    routing accuracy   as in named.py
    bytes              that a site sends a round, beside those of all weights in the same coding

About an hour each on two cores; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from deepseek.checkpoint import load_model
from deepseek.data import TokenShards
from deepseek.deepopt.compress import CODECS
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import STORE
from domains import TRAIN, add_data, data_folder, places
from harness import arguments, machine, table, versions, write_result
from named import held_out

BATCH, SEQ, ACCUMULATION = 4, 256, 4
STEPS = 3690


def train(out: Path, data: Path, names: tuple[str, ...], args: argparse.Namespace, *more: str,
          environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a run with the text of some names, the others by name alone."""
    words = [word for name, files in TRAIN.items() for word in (
        [f"{name}={place}" for place in places(data, files)] if name in names else [name])]
    return subprocess.Popen(
        [sys.executable, "-m", "deepseek", "train", "small", "--experts", *words, "--out", str(out), "--steps",
         str(args.steps), "--batch_size", str(BATCH), "--seq_len", str(SEQ), "--accumulation", str(ACCUMULATION),
         "--lr", "3e-3", "--warmup_steps", str(min(100, args.steps // 3)), "--eval_every", "410", "--save_every", "205",
         "--eval_batches", "24", "--precision", "bf16", "--valid_fraction", "0.03", *more],
        env=os.environ | (environment or {}))


def halves(shards: TokenShards) -> list[tuple[str, ...]]:
    """The names in two equal parts whose training tokens differ least."""
    names = shards.experts
    tokens = np.bincount(np.fromfile(shards.folder / "train.experts.bin", np.uint8), minlength=len(names))
    half = min((part for part in itertools.combinations(range(len(names)), len(names) // 2) if 0 in part),
               key=lambda part: abs(2 * int(tokens[list(part)].sum()) - int(tokens[: len(names)].sum())))
    return [tuple(names[i] for i in range(len(names)) if (i in half) == first) for first in (True, False)]


def done(*runs: subprocess.Popen[bytes]) -> None:
    statuses = [run.wait() for run in runs]  # of all, as one that fails leaves the other
    if any(statuses):
        raise SystemExit(2)


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    add_data(parser)
    parser.add_argument("--work", type=Path, help="folder of the runs (default: runs/sites)")
    parser.add_argument("--steps", type=int, help=f"of 4,096 tokens (default: {STEPS:,}; 30 on a generated sample)")
    parser.add_argument("--inner_steps", type=int, default=10)
    parser.add_argument("--compress", choices=("local", "sparse"), default="local")
    args = parser.parse_args()
    args.data, sample = data_folder(args.data)
    args.work = args.work or Path(f"runs/sites{sample}")
    args.steps = args.steps or (30 if sample else STEPS)
    together = args.work / "together"
    done(train(together, args.data, tuple(TRAIN), args, "--threads", str(args.threads)))
    shards = TokenShards.open(together / "tokens")
    own = halves(shards)
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    done(*(train(args.work / f"site-{rank}", args.data, names, args, "--sites", "--compress", args.compress,
                 "--inner_steps", str(args.inner_steps), "--tokenizer", str(together / "tokenizer"), "--threads",
                 str(max(1, args.threads // 2)), environment={
                     "RANK": str(rank), "WORLD_SIZE": "2", STORE: f"127.0.0.1:{store.port}"})
           for rank, names in enumerate(own)))
    torch.set_num_threads(args.threads)
    loss, accuracy = {}, {}
    for name, folder in (("together", together), ("sites", args.work / "site-0")):
        model = load_model(folder / "model")
        loss[name], accuracy[name] = held_out(model, shards)
        print(f"\n{name}: held-out perplexity {math.exp(loss[name]):.3f}\n{accuracy[name].table()}", flush=True)
    ratio = math.exp(loss["sites"] - loss["together"])
    sent = [statistics.median(record["bytes_sent"] for record, _ in read_log(args.work / f"site-{rank}" / "log.jsonl")
                              if "round" in record) for rank in range(len(own))]
    codec = CODECS["2bit" if args.compress == "local" else "sparse"]
    every = sum(codec.nbytes(tuple(p.shape)) for p in model.parameters())
    size = sum(p.numel() for p in model.parameters()) / 1e6
    where = machine(args.threads)
    text = ["# Sites with names of their own", "",
            f"Preset small ({size:.1f} M parameters), {args.steps} steps of {BATCH * ACCUMULATION} x {SEQ} "
            f"tokens = {args.steps * BATCH * ACCUMULATION * SEQ / 1e6:.1f} M, "
            f"BF16, compress = {args.compress}, {args.inner_steps} steps a round; {where['cpu']}, "
            f"{args.threads} threads, "
            f"torch {versions('torch')['torch']}.", "",
            table([["run", "held-out perplexity", "routing accuracy (macro)"],
                   *([name, f"{math.exp(loss[name]):.3f}", f"{accuracy[name].macro():.1%}"] for name in loss)]), "",
            f"Perplexity of sites / together: {ratio:.4f}.", "",
            table([["name", "site", "together", "sites"],
                   *([name, str(rank), *(f"{found.by_name().get(name, 0):.1%}" for found in accuracy.values())]
                     for rank, names in enumerate(own) for name in names)]), "",
            f"The sites send {sent[0] / 1e6:.2f} and {sent[1] / 1e6:.2f} MB a round; all weights are "
            f"{every / 1e6:.2f} MB in the same coding."]
    write_result("sites", "\n".join(text), {
        "machine": where, "steps": args.steps, "names": own, "perplexity": {k: math.exp(v) for k, v in loss.items()},
        "ratio": ratio, "macro": {name: found.macro() for name, found in accuracy.items()},
        "accuracy": {name: found.by_name() for name, found in accuracy.items()}, "bytes_sent": sent,
        "bytes_all": every}, keep=not sample and args.steps >= STEPS)


if __name__ == "__main__":
    main()
