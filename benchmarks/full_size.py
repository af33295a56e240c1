"""Models on the machine they are meant for: what a 4-bit checkpoint takes in memory, and a 16 B model decoding.

Two checkpoints of random weights: the one of inference.py (2.5 B parameters), and the whole preset `v3-16b-a3b`
(27 layers, 16 B parameters). The second is never there in BF16, for which many a machine has no room: its tensors are
drawn row block by row block and go straight into NF4.

Resident memory is counted above that of the process after its imports, as VmRSS after loading and after a prompt of 512
tokens and 64 decoded ones, caches and scratch memory included; the mapped file counts as far as it was touched.

    python benchmarks/full_size.py [--cache FOLDER] [--rounds 5]
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
import zlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from deepseek.checkpoint import TensorFiles, load_model
from deepseek.config import ModelConfig
from deepseek.convert import REPORT, quantize, quantize_tensors
from deepseek.files import write_json
from deepseek.info.machine import read_bandwidth
from deepseek.ops.native import isa
from deepseek.quant.linear import QuantConfig
from harness import arguments, machine, table, versions, write_result
from shape import CACHE, CONFIG, deviation, tensor_shapes, write_model

PROMPT, STEPS = 512, 64
FULL = ModelConfig.preset("v3-16b-a3b").with_(num_nextn_predict_layers=0)


class RandomTensors(TensorFiles):
    """Reads like a BF16 checkpoint of `config`; a block of rows is drawn when it is asked for, always the same one."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self.config, self.shapes = folder, config, tensor_shapes(config)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[name])

    def dtype(self, name: str) -> str:
        return "F32" if name.endswith("e_score_correction_bias") else "BF16"

    def file(self, name: str) -> Path:
        return self.folder

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        _, *rest = shape = self.shape(name)
        rows = (min(stop, shape[0]) - start, *rest)
        if (spread := deviation(name, shape, self.config)) is None:
            made = torch.zeros(rows) if name.endswith("e_score_correction_bias") else torch.ones(rows)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {start}".encode()))
            made = torch.empty(rows).normal_(0, spread, generator=generator).bfloat16()
        return made.to(dtype or made.dtype)


def resident() -> int:
    """Bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:", 1)[1].split()[0])


def measure(checkpoint: str, threads: int, rounds: int, result: Connection) -> None:
    torch.set_num_threads(threads)
    torch.zeros(1).sum()
    before = resident()
    began = time.perf_counter()
    model = load_model(checkpoint)
    load_s, loaded = time.perf_counter() - began, resident()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill, decode = [], []
    with torch.inference_mode():
        for _ in range(rounds):
            cache = model.new_cache(1, PROMPT + STEPS)
            began = time.perf_counter()
            logits = model(ids, cache=cache, last_only=True)
            prefill.append(PROMPT / (time.perf_counter() - began))
            began = time.perf_counter()
            for _ in range(STEPS):
                logits = model(logits[:, -1:].argmax(-1), cache=cache)
            decode.append(STEPS / (time.perf_counter() - began))
    worked = resident()
    bandwidth = [read_bandwidth("cpu", 1 << 30) for _ in range(3)]
    result.send({"load_s": load_s, "loaded": loaded - before, "worked": worked - before, "imports": before,
                 "prefill": prefill, "decode": decode, "bandwidth": bandwidth})


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    small, full = args.cache / "model-nf4", args.cache / "full-nf4"
    if not small.is_dir():
        quantize(write_model(args.cache / "model"), small)
    if not full.is_dir():
        print("drawing the 16 B model into four bits", flush=True)
        source = args.cache / "full-source"  # its configuration alone
        source.mkdir(parents=True, exist_ok=True)
        write_json(source / "config.json", FULL.to_dict())
        quantize_tensors(FULL, RandomTensors(source, FULL), full, QuantConfig("nf4"))
    rows = [["model", "parameters", "bits a weight", "checkpoint", "resident after loading", "after work",
             "after work / checkpoint", "loading", "prefill of 512, tokens/s", "decoding, tokens/s"]]
    data = {}
    for name, folder in ((f"5 layers of {CONFIG.hidden_size}", small), ("v3-16b-a3b, whole", full)):
        report = json.loads((folder / REPORT).read_text())
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(str(folder), args.threads, args.rounds, theirs))
        process.start()
        got = data[name] = ours.recv()
        process.join()
        got |= {"bytes": size, "parameters": report["parameters"]}
        prefill, decode = (statistics.median(got[work]) for work in ("prefill", "decode"))
        rows.append([name, f"{report['parameters'] / 1e9:.2f} B", f"{8 * size / report['parameters']:.3f}",
                     f"{size / 1e9:.2f} GB", f"{got['loaded'] / 1e9:.2f} GB", f"{got['worked'] / 1e9:.2f} GB",
                     f"{got['worked'] / size:.3f}", f"{got['load_s']:.1f} s", f"{prefill:.0f}", f"{decode:.1f}"])
        print(rows[-1], flush=True)
    where = machine(args.threads)
    lines = ["# Full size", "", f"{where['cpu']} ({', '.join(where['units'])}; kernels {isa()}), {args.threads} "
             "threads; " + ", ".join(f"{k} {v}" for k, v in versions("torch").items())
             + f"; medians of {args.rounds} rounds. NF4, random weights.", "", table(rows)]
    write_result("full_size", "\n".join(lines), {"machine": where, "isa": isa(), "versions": versions("torch"),
                                                 "models": data})


if __name__ == "__main__":
    main()
