"""The gates of packages fitted to other records than those of their training, with the experts as they are.

    python recipes/mini/refit.py --out runs/mini --packages FOLDER

FOLDER has NAME.safetensors for every name; OUT/base and OUT/records are build.py's. The rows are those that
`deepseek upcycle --grow` fits before its first step, with settings.yaml. Then OUT/shipped has the packages and their
manifest, and build.py adds figures and card; called once more, this writes these figures into the packages. The weights
in src/deepseek/weights/mini are made so: their experts were trained before records.py wrote texts of further kinds.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from records import NAMES

from build import SETTINGS, manifest_of
from deepseek.checkpoint import load_model
from deepseek.checkpoint.packages import PackageInfo, gate_name, read_package, write_package
from deepseek.files import read_json, read_yaml, replace_folder
from deepseek.tokenizer import Tokenizer
from deepseek.upcycling.grow import gate_rows, named_text
from deepseek.upcycling.settings import GrowConfig


def measured(info: PackageInfo, file: Path) -> PackageInfo:
    """With the figures of build.py in place of those of training, or with none."""
    if not file.is_file():
        return replace(info, evidence={})
    found: dict[str, Any] = read_json(file)
    base, here = (found[what]["held_out"][info.name] for what in ("base INT8", "mini INT8"))
    before, after = math.exp(base["loss"]), math.exp(here["loss"])
    return replace(
        info, card={**info.card, "summary": f"perplexity {after / before - 1:+.1%} on held-out records"},
        evidence={"perplexity_before": round(before, 4), "perplexity_after": round(after, 4),
                  "routing_accuracy": round(here["accuracy"], 4)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of build.py's run")
    parser.add_argument("--packages", type=Path, required=True, help="folder with NAME.safetensors for every name")
    args = parser.parse_args()
    base, config = args.out / "base", GrowConfig(**read_yaml(SETTINGS))
    packages = [read_package(args.packages / f"{name}.safetensors") for name in NAMES]
    text = named_text({name: args.out / "records" / "train" / f"{name}.jsonl" for name in NAMES},
                      Tokenizer.load(base), config)
    layers = packages[0].info.layers
    rows = gate_rows(load_model(base, dtype=torch.float32), layers, text, config, args.out)
    with replace_folder(args.out / "shipped") as staging, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unsigned")
        for place, package in enumerate(packages):
            own = slice(place * config.group_experts, (place + 1) * config.group_experts)
            tensors = {name: package.files.read(name) for name in package.info.tensors}
            tensors |= {gate_name(layer): rows[layer][own] for layer in layers}
            info = measured(package.info, args.out / "figures.json")
            write_package(staging / package.path.name, info, tensors)
        manifest_of(base, staging, args.out / "records" / "calibration.json")


if __name__ == "__main__":
    main()
