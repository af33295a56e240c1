"""Ranks that are slow, killed or hang: what it costs.

    sudo python benchmarks/deepopt_faults.py --work runs/deepopt [--only slow kills resume]

slow    one of two ranks is stopped for half of the time. Tokens a second of ranks in step and in rounds beside the sum
        of what two such ranks reach that do not talk; and the held-out loss after equal tokens, beside two whole ranks.
kills   of a run in rounds: --kills times kill -9 at a random instant, of a random rank, and one rank hangs (SIGSTOP)
        for longer than --rank_timeout; the rounds that it missed, and the held-out loss beside two undisturbed runs
        whose data stand in other orders.
resume  kill -9 of all processes at three random instants, each time the same command goes on: the same bytes as an
        undisturbed run, in step and in rounds, with --no_balance.

The model, the data and the line are those of deepopt.py. Needs root for `slow`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepopt
from domains import add_data, data_folder
from harness import machine, quiet_rounds, table, versions, write_result

PARTS = ("slow", "kills", "resume")
MODES = ("none", "local")
TIMEOUT = 20.0  # seconds that ranks wait for another


def slow(data: Path, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """In step and in rounds, with a rank at half speed."""
    args.accumulation, args.balance = 6, True  # 4 and 2 batches are in proportion to the speeds
    args.slowed = True
    modes = ("alone", *MODES)
    rounds, _ = quiet_rounds(args.rounds, lambda: {mode: deepopt.speed(mode, data, args, "1gbit") for mode in modes})
    rows = [["mode", "tokens/s", "of the sum", "held-out loss", "with two whole ranks"]]
    found: dict[str, dict[str, float]] = {}
    for mode in modes:
        ratio = statistics.median(one[mode] / one["alone"] for one in rounds)
        found[mode] = {"tokens_per_second": statistics.median(one[mode] for one in rounds), "ratio": ratio}
        if mode != "alone":
            tokens = {}
            for kind, slowed in (("slowed", True), ("whole", False)):
                args.slowed = slowed
                folder = args.work / "slow" / f"{mode}-{kind}"
                deepopt.run(mode, folder, data, args, "1gbit", args.slow_steps)
                tokens[kind] = by_tokens(folder, mode, args)
            last = min(curve[-1][0] for curve in tokens.values())
            found[mode] |= {kind: at(curve, last) for kind, curve in tokens.items()}
        rows.append([mode, f"{found[mode]['tokens_per_second']:,.0f}", f"{ratio:.3f}",
                     *(f"{found[mode][kind]:.4f}" for kind in ("slowed", "whole") if mode != "alone")])
    return table(rows), found


def by_tokens(folder: Path, mode: str, args: argparse.Namespace) -> list[tuple[int, float]]:
    """(tokens that all ranks have trained on, held-out loss) at each evaluation."""
    batch, tokens, step, curve = deepopt.BATCH * deepopt.SEQ, 0, 0, []
    for record in deepopt.records(folder):
        if "loss" in record:
            tokens += batch * (args.accumulation * (record["step"] - step) if mode == "none" else
                               args.accumulation // 2 * sum(record["steps"].values()))
            step = record["step"]
        if "eval_loss" in record:
            curve.append((tokens, record["eval_loss"]))
    return curve


def at(curve: list[tuple[int, float]], tokens: int) -> float:
    """The loss after so many tokens, between the evaluations around them."""
    for (before, one), (after, two) in pairwise(curve):
        if before <= tokens <= after:
            return one + (two - one) * (tokens - before) / (after - before)
    return curve[-1][1]


def start(mode: str, folder: Path, data: Path, args: argparse.Namespace, *more: str) -> subprocess.Popen[bytes]:
    """Two ranks, by `--ranks`."""
    words = deepopt.command(f"{mode}-2", deepopt.share_data(args.work, folder), data, args, args.fault_steps)
    return subprocess.Popen([*words, "--rank_timeout", str(TIMEOUT), *more],
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """{rank: process id} of the ranks that a launcher has started."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(stat.parent.name))
    found: dict[int, int] = {}
    waiting = [process.pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            with contextlib.suppress(OSError):
                own = dict(word.split("=", 1) for word in
                           Path(f"/proc/{child}/environ").read_text(errors="replace").split("\0") if "=" in word)
                if "RANK" in own:
                    found.setdefault(int(own["RANK"]), child)
    return found


def last_round(folder: Path) -> int:
    return max((record.get("round", 0) for record in deepopt.records(folder)), default=0)


def kills(data: Path, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """In rounds."""
    args.accumulation, args.balance, args.slowed = deepopt.MICRO, False, False
    ends, began = {}, time.monotonic()
    for name, seed in (("undisturbed", "0"), ("undisturbed, other order", "1")):
        folder = args.work / "kills" / seed
        if not (folder / "model").exists():
            began = time.monotonic()
            assert start("local", folder, data, args, "--seed", seed).wait() == 0
            (folder / "seconds").write_text(str(time.monotonic() - began))
        ends[name] = deepopt.records(folder)[-1]
    seconds = float((args.work / "kills" / "0" / "seconds").read_text())
    folder, draw = args.work / "kills" / "killed", random.Random(args.draw)
    events: list[dict[str, Any]] = []
    shutil.rmtree(folder, ignore_errors=True)
    process = start("local", folder, data, args)
    instants = sorted(draw.uniform(0.1, 0.9) * seconds for _ in range(args.kills))
    hang, began = args.kills // 2, time.monotonic()
    for number, instant in enumerate(instants):
        time.sleep(max(0.0, began + instant - time.monotonic()))
        victim, there = draw.randrange(2), ranks_of(process)
        while victim not in there and process.poll() is None:
            time.sleep(0.2)
            there = ranks_of(process)
        if process.poll() is not None:
            break
        kind = "hangs" if number == hang else "killed"
        events.append({"rank": victim, "round": last_round(folder), "kind": kind})
        os.kill(there[victim], signal.SIGSTOP if number == hang else signal.SIGKILL)
        if number == hang:
            time.sleep(2 * TIMEOUT)
            os.kill(there[victim], signal.SIGCONT)
    status = process.wait()
    assert status == 0, status
    log = deepopt.records(folder)
    took_part = {record["round"]: record["ranks"] for record in log if "round" in record}
    rows = [["", "rank", "in round", "rounds that it missed"]]
    for event in events:
        missed = 0
        while event["rank"] not in took_part.get(event["round"] + 1 + missed, [event["rank"]]):
            missed += 1
        event["missed"] = missed
        rows.append([event["kind"], str(event["rank"]), str(event["round"] + 1), str(missed)])
    ends[f"{len(events) - 1} kills and a hang"] = log[-1]
    empty = [number for number, ranks in took_part.items() if not ranks]
    ending = [["run", "rounds", "held-out loss", "routing accuracy"], *(
        [name, str(max(took_part)), f"{end['eval_loss']:.4f}", f"{end['routing_accuracy']:.1%}"]
        for name, end in ends.items())]
    return "\n\n".join([table(ending), table(rows), f"Rounds that no rank finished: {len(empty)}."]), {
        "events": events, "ends": ends}


def resume(data: Path, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Kill everything, three times."""
    args.accumulation, args.balance, args.slowed = deepopt.MICRO, False, False
    rows, found = [["mode", "kills", "model"]], dict[str, Any]()
    for mode in MODES:
        whole = args.work / "kills" / "0" if mode == "local" else args.work / "resume" / f"{mode}-whole"
        if not (whole / "model").exists():
            began = time.monotonic()
            assert start(mode, whole, data, args).wait() == 0
            (whole / "seconds").write_text(str(time.monotonic() - began))
        seconds = float((whole / "seconds").read_text())
        folder, draw = args.work / "resume" / mode, random.Random(args.draw)
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(3):
            process = start(mode, folder, data, args)
            time.sleep(draw.uniform(0.15, 0.35) * seconds)
            assert process.poll() is None, "the run has ended before it was to be killed"
            victims = ranks_of(process)
            for victim in (process.pid, *victims.values()):
                os.kill(victim, signal.SIGKILL)
            process.wait()
        assert start(mode, folder, data, args).wait() == 0
        same = digest(folder / "model") == digest(whole / "model")
        found[mode] = same
        rows.append([mode, "3", "the same bytes" if same else "other bytes"])
    return table(rows), found


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    add_data(parser)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of speed")
    parser.add_argument("--slow_steps", type=int, default=600)
    parser.add_argument("--fault_steps", type=int, default=600)
    parser.add_argument("--kills", type=int, default=11)
    parser.add_argument("--draw", type=int, default=0, help="seed of the instants and ranks")
    parser.set_defaults(inner_steps=10, overlap_steps=0, eval_every=60, lr=3e-3, optimizer="muon", precision="fp32",
                        steps=0, train=[], slowed=False, balance=False, accumulation=deepopt.MICRO)
    args = parser.parse_args()
    if os.geteuid() and "slow" in args.only:
        raise SystemExit("network namespaces need root")
    data, sample = data_folder(args.data)
    deepopt.prepare(data, args)
    whole = args.slow_steps >= 600 and args.fault_steps >= 600 and args.kills >= 11 and set(args.only) == set(PARTS)
    parts, found = [f"# Ranks that are slow, killed or hang\n\n`small`, two ranks, {args.inner_steps} steps a round in "
                    "local mode."], dict[str, Any]()
    for name, part, title in (("slow", slow, "A rank at half speed"), ("kills", kills, "Kills and a hang"),
                              ("resume", resume, "All killed, and the same command again")):
        if name in args.only:
            text, found[name] = part(data, args)
            parts.append(f"## {title}\n\n{text}")
    write_result("deepopt-faults" + sample, "\n\n".join(parts),
                 {"figures": found, "machine": machine(1), "versions": versions("torch")}, whole)


if __name__ == "__main__":
    main()
