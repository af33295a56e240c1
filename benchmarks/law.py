"""Law, end to end, on real data: base -> experts that the records visit -> tuning -> evaluation, in four ways.

Base: the guided model of named.py. Records: the law task that ESFT's authors published (927 case descriptions with
their judgements), a tenth held out. General text: sources of other domains that neither base nor tuning has seen.

    full      every parameter but the router
    experts   ESFT: only the experts that the records visit most (token score, threshold 0.2)
    named     only the experts named law_expert
    LoRA      of rank 16 on attention

All take the same batches in the same order. Each way's learning rate is the best of RATES by held-out loss after the
same steps; all are in the result. Yardstick: ESFT's published pattern (arXiv 2407.01906), most of full tuning's gain
with far less forgetting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepseek import LoRAAdapter, MoEFineTuner
from deepseek.tune import TuneReport
from domains import LAW_CASES, UNSEEN, add_data, data_folder, places
from harness import arguments, machine, table, versions, write_result

RATES = {"full": (1e-4, 3e-4, 1e-3), "experts": (3e-4, 1e-3, 3e-3), "named": (3e-4, 1e-3, 3e-3),
         "LoRA": (1e-3, 3e-3, 1e-2)}  # where the best is the highest of its three, higher ones were not tried
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "experts": {"expert_tune": "auto"},
    "named": {"expert_tune": ["law_expert"]},
    "LoRA": {"adapter": LoRAAdapter(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"])},
}


def tune(way: str, rate: float, args: Any, general: list[Path]) -> TuneReport:
    tuner = MoEFineTuner(
        args.base, out=args.work / f"{way}-{rate:g}", lr=rate, batch_size=8, max_length=384, overlong="cut",
        retain_data=general, eval_records=192, eval_every=args.steps, save_every=args.steps, precision="fp32", seed=0,
        **WAYS[way])
    return tuner.fit(args.data / LAW_CASES, steps=args.steps)


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    add_data(parser)
    parser.add_argument("--base", type=Path, help="the model of named.py (default: runs/named/guided/model)")
    parser.add_argument("--work", type=Path, help="folder of the runs (default: runs/law)")
    parser.add_argument("--steps", type=int, help="of 8 records (default: 202, two epochs; 4 on a generated sample)")
    args = parser.parse_args()
    args.data, sample = data_folder(args.data)
    args.base = args.base or Path(f"runs/named{sample}/guided/model")
    args.work = args.work or Path(f"runs/law{sample}")
    args.steps = args.steps or (4 if sample else 202)
    if not args.base.is_dir():
        raise SystemExit(f"{args.base}: no model: `python benchmarks/named.py` trains it (or give --base)")
    torch.set_num_threads(args.threads)
    general = [place for name, (_, files) in UNSEEN.items() if name != "law_expert"
               for place in places(args.data, files)]
    reports = {way: {rate: tune(way, rate, args, general) for rate in RATES[way]} for way in WAYS}
    best = {way: min(found.values(), key=lambda r: r.domain_after) for way, found in reports.items()}
    rate_of = {way: next(rate for rate, r in reports[way].items() if r is best[way]) for way in WAYS}
    full = best["full"]
    rows = [["way", "rate", "law, held out", "gain", "of full's", "general text", "forgotten", "trained parameters",
             "minutes", "stored MB"],
            ["base", "", f"{full.domain_before:.3f}", "", "", f"{full.general_before:.3f}", "", "", "", ""],
            *([way, f"{rate_of[way]:g}", f"{r.domain_after:.3f}", f"{r.gained:.3f}", f"{r.gained / full.gained:.0%}",
               f"{r.general_after:.3f}", f"{r.forgotten:+.3f}",
               f"{r.trained_parameters:,} ({r.trained_parameters / r.all_parameters:.1%})", f"{r.seconds / 60:.1f}",
               f"{r.result_bytes / 1e6:.1f}"] for way, r in best.items())]
    every = [["way", "rate", "law", "general text", "forgotten"],
             *([way, f"{rate:g}", f"{r.domain_after:.3f}", f"{r.general_after:.3f}", f"{r.forgotten:+.3f}"]
               for way, found in reports.items() for rate, r in found.items())]
    where, torch_version = machine(args.threads), versions("torch")["torch"]
    text = ["# Law, end to end", "",
            f"{full.examples} records ({full.loss_tokens:,} tokens of answers), {args.steps} steps of 8; losses are "
            f"nats a token; {where['cpu']}, {args.threads} threads, torch {torch_version}.", "", table(rows), "",
            "Every frozen tensor of every run kept its SHA-256.", "", "Every rate:", "", table(every)]
    assert all(r.frozen_unchanged == r.frozen_tensors for found in reports.values() for r in found.values())
    write_result("law", "\n".join(text), {"machine": where, "runs": {
        way: {f"{rate:g}": {"domain": r.domain_after, "general": r.general_after, "gained": r.gained,
                            "forgotten": r.forgotten, "trained": r.trained_parameters, "seconds": r.seconds,
                            "bytes": r.result_bytes, "experts": {k: list(v) for k, v in r.experts.items()}}
              for rate, r in found.items()} for way, found in reports.items()}}, keep=not sample)


if __name__ == "__main__":
    main()
