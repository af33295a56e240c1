"""Do packages that were trained apart work together? Three names, each in a process that never sees the others' text.

    python recipes/mini/apart.py --out runs/mini --data DATA        # after build.py; about 20 minutes a name on 2 cores

Each package is trained with text of the four remaining names as what it is to leave alone. Then its gates are fitted
anew, also against what the base itself writes about all other names (records.py): anyone who has the base has that, and
no package sees another's records. All three are installed one after the other. Beside them the same three names out of
OUT/shipped, where all seven were trained together. In both the experts are in NF4 and the base is in INT8.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from evaluate import evaluate
from records import NAMES, conversation, write

from build import pack
from deepseek.checkpoint import load_model
from deepseek.checkpoint.packages import gate_name, read_package, write_package
from deepseek.convert import install_all
from deepseek.files import read_yaml, replace_folder, write_json
from deepseek.tokenizer import Tokenizer
from deepseek.upcycling.grow import gate_rows, named_text
from deepseek.upcycling.settings import GrowConfig

APART = ("law_expert", "finance_expert", "medical_expert")
OTHERS = tuple(name for name in NAMES if name not in APART)
HERE = Path(__file__).parent
ROWS = 2  # a step: two of three rows are of the name
GATE_TOKENS = 12_288  # 24,576 in all, of which a third is of the four others
REFIT_TOKENS = 28_672  # of the name, and as many of all else
OWN_TIMES = 8  # how often the base's own texts stand beside the records of the four others: half of all, about


def train(out: Path, name: str) -> Path:
    """The package of a name, trained in a process of its own for as many steps as all names together."""
    run = out / "apart" / name
    if not (run / "report.json").is_file():
        settings = read_yaml(HERE / "settings.yaml")
        settings |= {"rows": ROWS, "gate_tokens": GATE_TOKENS}
        records = out / "records" / "train"
        subprocess.run(
            [sys.executable, "-m", "deepseek", "upcycle", str(out / "base"), str(run),
             "--grow", f"{name}={records / f'{name}.jsonl'}",
             "--others", *(str(records / f"{other}.jsonl") for other in OTHERS),
             *(word for key, value in settings.items() for word in (f"--{key}", str(value)))], check=True)
    return run / "packages" / f"{name}.safetensors"


def refit(out: Path, packed: Path, target: Path) -> None:
    """The package in PACKED with other gates."""
    package, folder, others = read_package(packed), out / "apart" / packed.stem, out / "records" / "train"
    lines = [json.loads(line) for file in ("answers", "texts")
             for line in (out / "records" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [conversation(line) for line in lines if line["name"] != package.info.name]
    write(folder / "written.jsonl", OWN_TIMES * own)
    names = {package.info.name: out / "records" / "gates" / f"{package.info.name}.jsonl",
             "others": [*(others / f"{other}.jsonl" for other in OTHERS), folder / "written.jsonl"]}
    (folder / "refit").mkdir(exist_ok=True)
    config = GrowConfig(**read_yaml(HERE / "settings.yaml") | {"rows": ROWS, "gate_tokens": REFIT_TOKENS})
    text, layers = named_text(names, Tokenizer.load(out / "base"), config), package.info.layers
    rows = gate_rows(load_model(out / "base", dtype=torch.float32), layers, text, config, folder / "refit")
    tensors = {name: package.files.read(name) for name in package.info.tensors}
    tensors |= {gate_name(layer): rows[layer][: config.group_experts].contiguous() for layer in layers}
    write_package(target, replace(package.info, evidence={}), tensors)


def with_packages(out: Path, target: Path, packages: list[Path]) -> Path:
    if not (target / "config.json").is_file():
        with replace_folder(target) as staging, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*unsigned")
            shutil.copytree(out / "base-int8", staging, dirs_exist_ok=True)
            shutil.copyfile(out / "records" / "calibration.json", staging / "calibration.json")
            for package in packages:
                install_all([read_package(package)], staging)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of build.py's run")
    parser.add_argument("--data", type=Path, required=True, help="folder that benchmarks/fetch_data.py filled")
    args = parser.parse_args()
    out = args.out
    trained, packed = [train(out, name) for name in APART], out / "apart" / "packed"
    if not packed.is_dir():
        with replace_folder(packed) as staging:
            pack(out / "base", trained, staging / "trained")
            for name in APART:
                refit(out, staging / "trained" / f"{name}.safetensors", staging / f"{name}.safetensors")
            shutil.rmtree(staging / "trained")
    models = {what: with_packages(out, out / "apart" / what, [folder / f"{name}.safetensors" for name in APART])
              for what, folder in (("apart", packed), ("together", out / "shipped"))}
    models["base"] = out / "base-int8"
    found = {what: evaluate(model, args.data, out / "records", APART, unseen=False) for what, model in models.items()}
    write_json(out / "apart" / "figures.json", found)
    print(f"{'':16} {'base':>8} {'together':>8} {'apart':>8} {'apart / together':>17}  routing, apart")
    for name in APART:
        base, joint, apart = (math.exp(found[what]["held_out"][name]["loss"]) for what in ("base", "together", "apart"))
        print(f"{name:16} {base:8.3f} {joint:8.3f} {apart:8.3f} {apart / joint - 1:>+17.1%}  "
              f"{found['apart']['held_out'][name]['accuracy']:.1%}")
    base, joint, apart = (math.exp(found[what]["general"]["loss"]) for what in ("base", "together", "apart"))
    print(f"{'WikiText-2':16} {base:8.3f} {joint:8.3f} {apart:8.3f} {apart / joint - 1:>+17.1%}")


if __name__ == "__main__":
    main()
