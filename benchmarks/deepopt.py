"""Two machines on a slow line: what each way of sending costs in bytes, time and loss.

Ranks with a core each, in network namespaces joined by a veth pair that `tc tbf` limits; the model is the preset
`small` (11 M parameters, 8 named routing groups) on the eight domains of domains.py, 4,096 tokens a step.

    sudo python benchmarks/deepopt.py --work runs/deepopt [--only loss] [--rate 100mbit 10mbit] [--modes none local]

loss   each mode trains for --steps steps in WORK, and the same command goes on with what is left. What it learns and
       what it sends depend neither on the line's rate nor on other work on the machine, so the line has 1 Gbit/s here.
       Wire bytes are the interface's own counters, both directions, with all headers. `local-4` and `sparse-4` are
       four ranks on the two cores, without a line. --add: beside the modes of the newest result with these settings;
       the table says which machine trained what.
speed  the modes in turn, --rounds times, a few steps of each at each --rate; "alone" are two ranks that do not talk,
       half of the tokens each. Efficiency is tokens a second over theirs of the same round, the median of the rounds.
       Losses at equal minutes are those of the newest result of `loss` with these settings, where a step of a mode
       takes as long as its tokens a second say.

Needs root, `ip` and `tc` (iproute2).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import IN_ROUNDS, STORE
from domains import TRAIN, add_data, data_folder, places
from harness import RESULTS, machine, quiet_rounds, table, versions, write_result

MODES = ("none", "bf16", "int8", "powersgd", "local", "sparse")
MORE = ("local-4", "sparse-4")  # ranks that share cores: no figure of theirs is a speed
BATCH, SEQ, MICRO = 4, 256, 4  # 4 batches of 4 windows a step, divided among the ranks
ENDS, DEVICES = ("dr-a", "dr-b"), ("dr-va", "dr-vb")
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
        for number, (end, device) in enumerate(zip(ENDS, DEVICES, strict=True), 1):
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


class Slowed(threading.Thread):
    """Stops a process for half of the time, PERIOD by PERIOD, until it ends."""

    PERIOD = 0.05  # seconds

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.process = process

    def run(self) -> None:
        for number in itertools.cycle((signal.SIGSTOP, signal.SIGCONT)):
            time.sleep(self.PERIOD)
            if self.process.poll() is not None:
                return
            self.process.send_signal(number)


def command(mode: str, out: Path, data: Path, args: argparse.Namespace, steps: int) -> list[str]:
    named = [f"{name}={place}" for name, files in TRAIN.items() for place in places(data, files)]
    compress, _, ranks = mode.partition("-")
    batches = args.accumulation // 2 if mode == "alone" else args.accumulation
    return [sys.executable, "-m", "deepseek", "train", "small", "--experts", *named, "--out", str(out),
            "--steps", str(steps), "--batch_size", str(BATCH), "--seq_len", str(SEQ),
            "--accumulation", str(batches), "--lr", str(args.lr),
            "--warmup_steps", str(min(100, steps // 2)), "--eval_every", str(min(args.eval_every, steps)),
            "--save_every", str(min(args.eval_every, steps)), "--eval_batches", "24" if steps >= 300 else "1",
            "--optimizer", args.optimizer, "--precision", args.precision, "--valid_fraction", "0.03", "--seed", "0",
            *([] if mode == "alone" else ["--compress", compress]), *(["--ranks", ranks] if ranks else []),
            *(["--inner_steps", str(args.inner_steps), "--overlap_steps", str(args.overlap_steps)]
              if compress in IN_ROUNDS else []),
            *([] if args.balance else ["--no_balance"]), *args.train]


def prepare(data: Path, args: argparse.Namespace) -> None:
    """Packs the data, and takes one step."""
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "data" / "settings.json").exists():
        subprocess.run(command("alone", args.work / "data", data, args, 1), check=True)


def share_data(work: Path, out: Path) -> Path:
    """`out`, with the tokens that are packed already."""
    out.mkdir(parents=True, exist_ok=True)
    for part in ("tokens", "tokenizer"):
        if not (out / part).exists():
            (out / part).symlink_to((work / "data" / part).resolve())
    return out


def run(mode: str, folder: Path, data: Path, args: argparse.Namespace, rate: str, steps: int) -> dict[str, Any]:
    """Take the steps that are left of a run in `folder`; its cost on the wire is added up in a file beside it."""
    file = folder.with_suffix(".json")
    cost: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"bytes": 0, "seconds": 0.0}
    if cost.get("steps", 0) >= steps:
        return cost
    began = time.monotonic()
    if mode in MORE:
        statuses = [subprocess.run(command(mode, share_data(args.work, folder), data, args, steps),
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode]
        cost["bytes"] = None
    else:
        statuses, sent = on_a_line(mode, folder, data, args, rate, steps)
        cost["bytes"] += sent
    cost["seconds"] += time.monotonic() - began
    file.write_text(json.dumps(cost | ({} if any(statuses) else {"steps": steps})))
    if any(statuses):
        raise SystemExit(f"{mode}: ended with {statuses}; the same command goes on")
    return cost


def on_a_line(
    mode: str, folder: Path, data: Path, args: argparse.Namespace, rate: str, steps: int
) -> tuple[list[int], int]:
    """(statuses of two ranks that train, bytes on the line between them)."""
    line, holder = Line(rate), None
    common = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": "2"}
    if mode in IN_ROUNDS:
        holder = line.start(0, [sys.executable, "-c", HOLD, str(PORT)], {}, stdout=subprocess.PIPE)
        assert holder.stdout is not None
        holder.stdout.readline()
        common |= {STORE: f"10.77.0.1:{PORT}"}
    ranks = []
    for rank, device in enumerate(DEVICES):
        if args.slowed and mode == "alone" and rank == 1:
            steps //= 2  # both are at it for about the same time
        own = {} if mode == "alone" else common | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": device}
        out = share_data(args.work, folder / str(rank) if mode == "alone" else folder)
        ranks.append(line.start(rank, command(mode, out, data, args, steps), own))
    if args.slowed:
        Slowed(ranks[1]).start()
    statuses = [rank.wait() for rank in ranks]
    if holder is not None:
        holder.terminate()
    sent = line.bytes()
    line.close()
    return statuses, sent


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for record, _ in read_log(folder / "log.jsonl")]


def speed(mode: str, data: Path, args: argparse.Namespace, rate: str) -> float:
    """Tokens a second of all ranks, in the second half of their steps."""
    folder = args.work / "speed" / mode
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".json").unlink(missing_ok=True)
    run(mode, folder, data, args, rate, (4 * args.inner_steps if mode in IN_ROUNDS else 12) * (1 + args.slowed))
    total = 0.0
    for out in (folder / "0", folder / "1") if mode == "alone" else (folder,):
        rates = [record["tokens_per_second"] for record in records(out) if "tokens_per_second" in record]
        total += statistics.harmonic_mean(rates[len(rates) // 2 :])
    return total


def speeds(data: Path, args: argparse.Namespace, rate: str) -> dict[str, dict[str, float]]:
    """By mode: tokens a second and efficiency, medians."""
    modes = ("alone", *(mode for mode in args.modes if mode not in MORE))
    rounds, stolen = quiet_rounds(args.rounds, lambda: {mode: speed(mode, data, args, rate) for mode in modes})
    return {mode: {"tokens_per_second": statistics.median(one[mode] for one in rounds),
                   "efficiency": statistics.median(one[mode] / one["alone"] for one in rounds),
                   "stolen": max(stolen)} for mode in modes}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What results that stand in one table have in common."""
    return {key: getattr(args, key) for key in (
        "steps", "optimizer", "lr", "precision", "inner_steps", "overlap_steps", "train")}


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    """What the newest result of `loss` has of each mode; nothing where its settings were others."""
    files = sorted(RESULTS.glob("deepopt-loss-*.json"))
    found: dict[str, Any] = json.loads(files[-1].read_text()) if files else {"settings": None, "modes": {}}
    modes: dict[str, Any] = found["modes"] if found["settings"] == settings(args) else {}
    return modes


def losses(data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """By mode: its cost, (step, held-out loss, routing accuracy) at each evaluation, and the machine."""
    found = earlier(args) if args.add else {}
    for mode in args.modes:
        cost = run(mode, args.work / "loss" / mode, data, args, "1gbit", args.steps)
        curve = [(record["step"], record["eval_loss"], record["routing_accuracy"])
                 for record in records(args.work / "loss" / mode) if "eval_loss" in record]
        found[mode] = cost | {"curve": curve, "machine": machine(1)}
    return {mode: found[mode] for mode in (*MODES, *MORE) if mode in found}


def at_equal_minutes(curve: list[tuple[int, float, float]], rate: float, minutes: float) -> str:
    """The held-out loss after so many minutes, between the evaluations around them."""
    steps = minutes * 60 * rate / (BATCH * SEQ * MICRO)
    for (before, one, _), (after, two, _) in itertools.pairwise(curve):
        if before <= steps <= after:
            return f"{one + (two - one) * (steps - before) / (after - before):.3f}"
    return f"{curve[-1][1]:.3f}" if steps >= curve[-1][0] else f"above {curve[0][1]:.3f}"


def loss_table(found: dict[str, Any], args: argparse.Namespace) -> str:
    base, plain = (found["none"]["curve"][-1][1], found["none"]["bytes"]) if "none" in found else (None, None)
    rows = [["mode", "MB on the wire a step", "fewer than none", "held-out loss", "than none", "routing accuracy",
             "trained on"]]
    for mode, one in found.items():
        _, loss, accuracy = one["curve"][-1]
        rows.append([mode, f"{one['bytes'] / args.steps / 1e6:.3f}" if one["bytes"] else "",
                     f"{1 - one['bytes'] / plain:.2%}" if one["bytes"] and plain and mode != "none" else "",
                     f"{loss:.4f}", f"{loss / base - 1:+.2%}" if base and mode != "none" else "", f"{accuracy:.1%}",
                     f"{one['machine']['cpu']} ({', '.join(one['machine']['units'])})"])
    return table(rows)


def speed_table(found: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    learnt = {mode: one["curve"] for mode, one in earlier(args).items() if mode in found}
    fastest = max((found[mode]["tokens_per_second"] for mode in learnt), default=0.0)
    minutes = args.steps * BATCH * SEQ * MICRO / fastest / 60 if fastest else 0.0
    rows = [["mode", "tokens/s", "efficiency", *([f"held-out loss after {minutes:.1f} minutes"] if learnt else [])]]
    for mode, one in found.items():
        loss = at_equal_minutes(learnt[mode], one["tokens_per_second"], minutes) if mode in learnt else ""
        rows.append([mode, f"{one['tokens_per_second']:,.0f}", f"{one['efficiency']:.3f}", *([loss] if learnt else [])])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    add_data(parser)
    parser.add_argument("--only", choices=("loss", "speed"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", nargs="+", default=["100mbit", "10mbit"], help="of the line, as tc writes it")
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of speed")
    parser.add_argument("--modes", nargs="+", default=(*MODES, *MORE), choices=(*MODES, *MORE))
    parser.add_argument("--add", action="store_true", help="to the modes of the newest result")
    parser.add_argument("--inner_steps", type=int, default=5)
    parser.add_argument("--overlap_steps", type=int, default=1)
    parser.add_argument("--eval_every", type=int, default=150)
    parser.add_argument("--optimizer", default="muon", choices=("adamw", "muon"))
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further flags of `deepseek train`")
    parser.set_defaults(accumulation=MICRO, balance=False, slowed=False)
    args = parser.parse_args()
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    data, sample = data_folder(args.data)
    prepare(data, args)
    where = machine(1)
    about = (f"`small`, {BATCH * SEQ * MICRO:,} tokens a step, {args.optimizer}, precision {args.precision}; local "
             f"modes: {args.inner_steps} steps a round, of which {args.overlap_steps} overlap with the merge before"
             f"{'; ' + ' '.join(args.train) if args.train else ''}.")
    if args.only != "speed":
        found = losses(data, args)
        write_result("deepopt-loss" + sample, "\n\n".join([
            f"# Two ranks on a slow line: what {args.steps:,} steps learn and send", about, loss_table(found, args)]),
            {"settings": settings(args), "modes": found, "versions": versions("torch")},
            args.steps >= 1500 and "none" in found)
    for rate in args.rate if args.only != "loss" else ():
        rates = speeds(data, args, rate)
        write_result(f"deepopt-{rate}" + sample, "\n\n".join([
            f"# Two ranks on a line of {rate}", f"{about} {where['cpu']} ({', '.join(where['units'])}), a core a rank; "
            f"medians of {args.rounds} rounds.", speed_table(rates, args)]),
            {"settings": settings(args), "figures": rates, "machine": where, "versions": versions("torch")},
            set(args.modes) >= {*MODES} and args.rounds >= (3 if rate == "100mbit" else 1))


if __name__ == "__main__":
    main()
