"""What carving experts out of a dense model's FFN costs and gives, before and after healing.

For each share of the FFN that stays active: held-out perplexity of each name's text and of sources never healed on,
before and after healing; bytes and FLOPs of a token; and tokens a second of greedy decoding in INT8, one sequence.
The work lies in WORK and is resumed: the same command continues a stopped run, or one with more shares.

    python benchmarks/carve.py MODEL --work runs/carve [--shares 0.75 0.5] [--heal_tokens 2000000]
    python benchmarks/carve.py MODEL --work runs/carve --heal_tokens 0            (without healing: minutes)

MODEL: as `deepseek upcycle` takes it. --data: the folder of benchmarks/fetch_data.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepseek import Tokenizer
from deepseek.checkpoint import load_model
from deepseek.convert import quantize
from deepseek.data import ReadReport, read_documents
from deepseek.files import write_json
from deepseek.model import CausalLM
from deepseek.ops.native import isa
from deepseek.progress import ProgressBar
from deepseek.upcycling.carve import Carved, carve, run_folder
from deepseek.upcycling.carve_settings import CarveConfig, HealConfig
from harness import machine, table, versions, write_result

NAMES = {"books": "text/books_en/text.jsonl", "code": "code/code_python/text.jsonl",
         "law": "law/licences_en/licences.jsonl", "finance": "finance/books_finance_en/text.jsonl",
         "medical": "medicine/medicine_medquad/qa.jsonl", "math": "math/math_tal/en_train.jsonl",
         "dialogue": "dialogue/dialogue_taskmaster/tm3.jsonl",
         "wiki": "eval/wikitext2/wiki.valid.tokens"}  # articles, share-alike
OTHERS = {"WikiText-2": "eval/wikitext2/wiki.test.tokens", "PEPs": "text/peps_en/text.jsonl",
          "Shakespeare": "text/tinyshakespeare/input.txt"}  # never healed on
LENGTH, NEW, WINDOWS = 512, 64, 64
SHARES = [0.75, 0.5]


@torch.inference_mode()
def perplexity(model: CausalLM, ids_BT: torch.Tensor, desc: str) -> float:
    """Of the second token of each window and all after it."""
    bar = ProgressBar(ids_BT, desc=desc, unit="window")
    return math.exp(statistics.mean(float(model.loss(ids[None, :-1], ids[None, 1:]).main) for ids in bar))


@torch.inference_mode()
def decoding(models: Sequence[CausalLM], rounds: int) -> list[float]:
    """Tokens a second of each model, the medians of some rounds in which they take turns."""
    rates: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, own in zip(models, rates, strict=True):
            cache, ids = model.new_cache(1, 2 * NEW), torch.arange(100, 100 + NEW)[None]
            ids = model(ids, cache=cache, last_only=True).argmax(-1)
            began = time.perf_counter()
            for _ in range(NEW):
                ids = model(ids, cache=cache).argmax(-1)
            own.append(NEW / (time.perf_counter() - began))
    return [statistics.median(own[1:]) for own in rates]


def carved(model: Path, share: float, args: argparse.Namespace) -> Carved:
    """Carve and heal, unless it is done."""
    out, words = args.work / f"{share:g}", tuple(f"{name}={args.data / file}" for name, file in NAMES.items())
    if (out / "report.json").is_file():
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return Carved(out, **report | {"errors": {int(layer): error for layer, error in report["errors"].items()}})
    healing = HealConfig(heal=words, heal_tokens=args.heal_tokens, heal_evaluated=args.heal_evaluated,
                         kl_share=args.kl_share)
    healing = healing if args.heal_tokens else HealConfig()
    return carve(model, out, CarveConfig(carve=share, calibrate=words, expert_width=args.expert_width,
                                         calibration_tokens=args.calibration_tokens), healing)


def healed_with(one: Carved) -> int:
    """Tokens of the run that healed a model."""
    run = json.loads((run_folder(one.path) / "heal" / "settings.json").read_text(encoding="utf-8"))["train"]
    return run["steps"] * run["batch_size"] * run["seq_len"]


def on_others(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """A checkpoint's perplexity on text that no model is healed on, kept beside it."""
    file = folder.with_name(f"{folder.name}.others-{args.windows}.json")
    if not file.is_file():
        model, tokenizer, found = load_model(folder, torch.float32), Tokenizer.load(folder), {}
        for name, path in OTHERS.items():
            text = " ".join(document.text for document in read_documents([args.data / path], ReadReport()))
            ids = tokenizer.encode(text[: 8 * LENGTH * args.windows])
            ids_BT = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[: args.windows]
            found[name] = perplexity(model, ids_BT, f"{name}, {folder.name}")
        write_json(file, found)
    return json.loads(file.read_text(encoding="utf-8"))


def in_int8(folder: Path) -> CausalLM:
    small = folder.with_name(f"{folder.name}-int8")
    quantize(folder, small, "int8", overwrite=True)
    return load_model(small)


def row(name: str, one: Carved, losses: dict[str, float], own: dict[str, Any], dense: bool = False) -> list[str]:
    size, flops = (one.dense_bytes, one.dense_flops) if dense else (one.bytes, one.flops)
    return [name, *(f"{own['others'][key]:.1f}" for key in OTHERS),
            *(f"{math.exp(losses[key]):.2f}" if key in losses else "" for key in NAMES),
            *(f"{size[key] / 2**20:.0f}" for key in size), f"{flops / 1e6:.0f}", f"{own['tokens_per_second']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".cache" / "data")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--heal_tokens", type=int, default=2_000_000)
    parser.add_argument("--heal_evaluated", type=int, default=HealConfig().heal_evaluated)
    parser.add_argument("--kl_share", type=float, default=HealConfig().kl_share)
    parser.add_argument("--calibration_tokens", type=int, default=CarveConfig().calibration_tokens)
    parser.add_argument("--expert_width", type=int, default=CarveConfig().expert_width)
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {LENGTH} tokens of each text never healed on")
    args = parser.parse_args()
    found = {share: carved(args.model, share, args) for share in args.shares}
    first = next(iter(found.values()))
    rows = [["FFN active", *OTHERS, *NAMES, *(f"MiB a token, {name}" for name in first.bytes),
             "MFLOPs a token", "tokens/s, INT8"]]
    data: dict[str, Any] = {}
    folders = {"dense": (first, run_folder(first.path) / "dense", True)}
    for share, one in found.items():
        if one.losses:
            folders[f"{share:.0%}, before healing"] = one, run_folder(one.path) / "carved", False
            folders[f"{share:.0%}, after {healed_with(one):,} tokens"] = one, one.path, False
        else:
            folders[f"{share:.0%}, without healing"] = one, one.path, False
    others = [on_others(folder, args) for _, folder, _ in folders.values()]
    rates = decoding([in_int8(folder) for _, folder, _ in folders.values()], 5)
    for (name, (one, _, dense)), other, rate in zip(folders.items(), others, rates, strict=True):
        kind = "dense" if dense else next((kind for kind in ("before", "after") if kind in name), "")
        losses = one.losses.get(kind, {})
        data[name] = own = {"others": other, "tokens_per_second": rate}
        rows.append(row(name, one, losses, own, dense))
        data[name] |= {"losses": losses, "errors": one.errors}
    text = "\n\n".join([
        f"# {args.model.stem}: a share of its FFN active",
        f"Perplexity of held-out text; {', '.join(OTHERS)} ({args.windows} windows of {LENGTH} tokens) are never "
        f"healed on, other articles of WikiText-2 (wiki) are; experts of {args.expert_width} neurons; kernels "
        f"{isa()}.", table(rows)])
    shares = "" if args.shares == SHARES else "".join(f"-{100 * share:g}" for share in args.shares)
    write_result("carve" + shares, text, {"figures": data, "machine": machine(torch.get_num_threads()),
                                 "versions": versions("torch")}, args.windows >= WINDOWS)


if __name__ == "__main__":
    main()
