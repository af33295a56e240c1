"""Two machines on a slow line: what each way of sending costs in bytes, time and loss.

Two ranks, a core each, in network namespaces of their own joined by a veth pair that `tc tbf` limits to --rate; the
model is the preset `small` (11 M parameters, 8 named routing groups) on the eight domains of domains.py, 4,096 tokens a
step. Each mode of `compress` is a run of its own in WORK, which the same command continues; "alone" are two ranks that
do not talk, half of the tokens each: the efficiency of the others is their tokens a second over its.

    sudo python benchmarks/deepopt.py --work runs/deepopt [--steps 1500] [--rate 100mbit] [--modes none local]

Wire bytes are the interface's own counters, both directions, with all headers. Needs root, `ip` and `tc` (iproute2).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import IN_ROUNDS, STORE
from domains import TRAIN, add_data, data_folder, places
from harness import machine, table, versions, write_result

MODES = ("alone", "none", "bf16", "int8", "powersgd", "local", "sparse")
BATCH, SEQ, MICRO = 4, 256, 4  # 4 batches of 4 windows a step, two for each rank
ENDS = ("dr-a", "dr-b")
PORT = 29517
HOLD = ("import sys, time, torch.distributed as d; from datetime import timedelta as t\n"
        "s = d.TCPStore('10.77.0.1', int(sys.argv[1]), None, True, t(seconds=30), wait_for_workers=False)\n"
        "print('ready', flush=True); time.sleep(1e6)")


def shell(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class Line:
    """Two network namespaces, one core each, and the line between them."""

    def __init__(self, rate: str) -> None:
        self.close()
        for end in ENDS:
            shell("ip", "netns", "add", end)
        shell("ip", "link", "add", "dr-va", "netns", ENDS[0], "type", "veth", "peer", "name", "dr-vb", "netns", ENDS[1])
        for number, (end, device) in enumerate(zip(ENDS, ("dr-va", "dr-vb"), strict=True), 1):
            shell("ip", "-n", end, "addr", "add", f"10.77.0.{number}/24", "dev", device)
            shell("ip", "-n", end, "link", "set", "lo", "up")
            shell("ip", "-n", end, "link", "set", device, "up")
            shell("tc", "-n", end, "qdisc", "add", "dev", device, "root", "tbf", "rate", rate, "burst", "64kb",
                  "latency", "400ms")

    def close(self) -> None:
        for end in ENDS:
            subprocess.run(["ip", "netns", "del", end], capture_output=True)

    def bytes(self) -> int:
        """That have gone through, both ways."""
        (link,) = json.loads(shell("ip", "-n", ENDS[0], "-s", "-j", "link", "show", "dr-va"))
        return sum(link["stats64"][way]["bytes"] for way in ("rx", "tx"))

    def start(self, end: int, words: list[str], environment: dict[str, str], **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(["ip", "netns", "exec", ENDS[end], "taskset", "-c", str(end), *words], text=True,
                                env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, **more)


def command(mode: str, out: Path, data: Path, args: argparse.Namespace) -> list[str]:
    named = [f"{name}={place}" for name, files in TRAIN.items() for place in places(data, files)]
    alone = mode == "alone"
    return [sys.executable, "-m", "deepseek", "train", "small", "--experts", *named, "--out", str(out),
            "--steps", str(args.steps), "--batch_size", str(BATCH), "--seq_len", str(SEQ),
            "--accumulation", str(MICRO // 2 if alone else MICRO), "--lr", str(args.lr), "--warmup_steps", "100",
            "--eval_every", str(args.eval_every), "--save_every", str(args.eval_every), "--eval_batches", "24",
            "--precision", "fp32", "--valid_fraction", "0.03", "--seed", "0",
            *([] if alone else ["--compress", mode]),
            *(["--inner_steps", str(args.inner_steps)] if mode in IN_ROUNDS else []), *args.train]


def run(mode: str, work: Path, data: Path, args: argparse.Namespace) -> None:
    """Take the steps of a mode that are left; what they cost on the wire is added up in WORK/MODE.json."""
    file = work / f"{mode}.json"
    before = json.loads(file.read_text()) if file.is_file() else {"bytes": 0, "seconds": 0.0}
    if before.get("steps", 0) >= args.steps:
        return
    for part in ("tokens", "tokenizer"):
        for rank in range(2 if mode == "alone" else 1):
            out = work / (f"{mode}-{rank}" if mode == "alone" else mode)
            if not (out / part).exists():
                out.mkdir(parents=True, exist_ok=True)
                (out / part).symlink_to((work / "data" / part).resolve())
    line, began, holder = Line(args.rate), time.monotonic(), None
    common = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": "2"}
    if mode in IN_ROUNDS:
        holder = line.start(0, [sys.executable, "-c", HOLD, str(PORT)], {}, stdout=subprocess.PIPE)
        assert holder.stdout is not None
        holder.stdout.readline()
        common |= {STORE: f"10.77.0.1:{PORT}"}
    ranks = []
    for rank in range(2):
        own = {} if mode == "alone" else common | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": ("dr-va", "dr-vb")[rank]}
        out = work / (f"{mode}-{rank}" if mode == "alone" else mode)
        ranks.append(line.start(rank, command(mode, out, data, args), own))
    statuses = [rank.wait() for rank in ranks]
    if holder is not None:
        holder.terminate()
    cost = {"bytes": before["bytes"] + line.bytes(), "seconds": before["seconds"] + time.monotonic() - began}
    line.close()
    if any(statuses):
        file.write_text(json.dumps(cost))
        raise SystemExit(f"{mode}: ended with {statuses}; the same command goes on")
    file.write_text(json.dumps(cost | {"steps": args.steps}))


def figures(mode: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Of a finished run: tokens a second of the steps after the first ones, losses by tokens and by seconds."""
    found: dict[str, Any] = json.loads((work / f"{mode}.json").read_text())
    rates = []
    for out in [work / f"alone-{rank}" for rank in range(2)] if mode == "alone" else [work / mode]:
        records = [record for record, _ in read_log(out / "log.jsonl")]
        steps = [record for record in records if "tokens_per_second" in record]
        last = steps[len(steps) // 10 :]
        taken = [step["step"] - before["step"] for before, step in pairwise(last)]
        tokens = BATCH * SEQ * MICRO // (2 if mode == "alone" else 1)
        seconds = sum(count * tokens / step["tokens_per_second"] for count, step in zip(taken, last[1:], strict=True))
        rates.append(sum(taken) * tokens / seconds)
        clock, at = 0.0, []
        for before, record in zip([{"step": 0}, *records], records, strict=False):
            if "tokens_per_second" in record:
                clock += (record["step"] - before["step"]) * tokens / record["tokens_per_second"]
            if "eval_loss" in record:
                at.append((record["step"], clock, record["eval_loss"], record["routing_accuracy"]))
        found["evaluations"] = at
    return found | {"tokens_per_second": sum(rates)}


def loss_at(found: dict[str, Any], seconds: float) -> float | None:
    """The last held-out loss by then."""
    losses = [loss for _, clock, loss, _ in found["evaluations"] if clock <= seconds]
    return losses[-1] if losses else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    add_data(parser)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", default="100mbit", help="of the line, as tc writes it")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--inner_steps", type=int, default=30)
    parser.add_argument("--eval_every", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further flags of `deepseek train`")
    args = parser.parse_args()
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    data, sample = data_folder(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "data" / "settings.json").exists():  # packs the data, and takes one step
        words = command("alone", args.work / "data", data, argparse.Namespace(**vars(args) | {"steps": 1}))
        subprocess.run(words, check=True)
    found = {}
    for mode in args.modes:
        run(mode, args.work, data, args)
        found[mode] = figures(mode, args.work, args)
    base = found.get("none")
    rows = [["mode", "MB on the wire a step", "fewer than FP32", "tokens/s", "efficiency", "held-out loss",
             "at equal minutes", "routing accuracy"]]
    minutes = min(one["evaluations"][-1][1] for mode, one in found.items() if mode != "alone") if base else 0.0
    for mode, one in found.items():
        _, _, loss, accuracy = one["evaluations"][-1]
        alone = found.get("alone", {}).get("tokens_per_second")
        then = loss_at(one, minutes)
        rows.append([mode, f"{one['bytes'] / args.steps / 1e6:.3f}",
                     f"{1 - one['bytes'] / base['bytes']:.2%}" if base and mode != "none" else "",
                     f"{one['tokens_per_second']:,.0f}",
                     f"{one['tokens_per_second'] / alone:.3f}" if alone else "", f"{loss:.4f}",
                     f"{then:.4f}" if then and mode != "alone" else "", f"{accuracy:.1%}"])
    text = "\n\n".join([
        f"# Two ranks on a line of {args.rate}", f"`small`, {args.steps:,} steps of {BATCH * SEQ * MICRO:,} tokens, a "
        f"core each, FP32, {args.inner_steps} steps a round in local modes.", table(rows)])
    write_result("deepopt" + sample, text, {"figures": found, "machine": machine(1), "versions": versions("torch")},
                 args.steps >= 1500)


if __name__ == "__main__":
    main()
