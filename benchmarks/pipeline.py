"""The data pipeline on two million records: seconds and records a second of every step, and the peak of memory.

The records are natural language: sentences of the sets that fetch_data.py fetches, put together anew to about 200
characters, each record out of one domain, drawn from a fixed seed. Of the records a fifth are exact copies of earlier
ones and a twenty-fifth are near-duplicates (an earlier record with one to three small edits); a third carry their
label. So of 2 million 1.6 million are distinct. Where each came from is kept aside, which gives the recall on the
planted near-duplicates and the accuracy of the labels.

The pipeline runs in a process of its own on two cores; resident memory is summed over it and its children five times a
second (shared pages count as often as they are mapped, so the true peak is lower). The tokenizer is trained
beforehand; it is not part of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from domains import add_data, data_folder
from harness import machine, table, versions, write_result

CACHE = Path(__file__).parent / ".cache" / "pipeline"
DOMAINS = {
    "law_expert": ["law/laws_zh", "law/licences_en", "law/books_law_en", "law/lawbench/zero_shot"],
    "code_expert": ["code/code_python", "code/code_other"],
    "finance_expert": ["finance/books_finance_en", "finance/finance_tatqa"],
    "medical_expert": ["medicine/medicine_medquad", "medicine/medicine_pubmedqa"],
    "math_expert": ["math/math_tal", "eval/gsm8k", "eval/cmath"],
    "dialogue_expert": ["dialogue/dialogue_zh", "dialogue/dialogue_sgd", "dialogue/dialogue_taskmaster"],
    "text_expert": ["text/books_en", "chinese/poetry_zh", "chinese/howtocook_zh"],
}
COPIES, NEAR, LABELLED, FILES = 0.2, 0.04, 1 / 3, 8


def sentences(data: Path) -> dict[str, list[str]]:
    """The sentences of each domain, of 30 to 160 characters, each once."""
    from deepseek.data import ReadReport, read_documents

    out = {}
    for name, places in DOMAINS.items():
        found: dict[str, None] = {}
        for document in read_documents([data / place / "*.jsonl" for place in places], ReadReport()):
            for line in document.text.split("\n"):
                found.update(dict.fromkeys(s.strip() for s in re.split(r"(?<=[.!?;])\s+|(?<=[。！？；])", line)
                                           if 30 <= len(s.strip()) <= 160))
        out[name] = list(found)
    return out


def records(count: int, data: Path, seed: int = 0) -> Iterator[tuple[str, str, int | None]]:
    """(text, domain, number of the record that it is a near-duplicate of)."""
    draw = random.Random(seed)
    pool = sentences(data)
    names = list(pool)
    written: list[tuple[str, str]] = []
    seen: set[int] = set()
    for number in range(count):
        kind = draw.random()
        if number > 100 and kind < COPIES:
            written.append(written[draw.randrange(number)])
            yield *written[-1], None
            continue
        if number > 100 and kind < COPIES + NEAR:
            at = draw.randrange(number)
            text, name = written[at]
            letters = list(text)
            for _ in range(draw.randint(1, 3)):
                place = draw.randrange(len(letters))
                letters[place] = draw.choice(["", letters[place] * 2, "x", " "])
            text = "".join(letters)
            written.append((text, name))
            yield text, name, at
            continue
        name = draw.choice(names)
        while True:
            text = draw.choice(pool[name])
            while len(text) < 158:
                text += (" " if text.isascii() else "") + draw.choice(pool[name])
            if (mark := hash(text)) not in seen:
                break
        seen.add(mark)
        written.append((text, name))
        yield text, name, None


def make(count: int, data: Path, cache: Path) -> Path:
    """The input and what is known of it, in a folder; made once."""
    import polars as pl

    folder = cache / f"{count}"
    if (folder / "truth.parquet").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    draw, truth = random.Random(1), []
    files = [(folder / "in" / f"{i}.jsonl").open("w", encoding="utf-8") for i in range(FILES)]
    per_file = -(-count // FILES)
    for number, (text, name, near) in enumerate(records(count, data)):
        record: dict[str, Any] = {"text": text}
        if labelled := draw.random() < LABELLED:
            cut = text.find(" ", len(text) // 2)
            record = {"input": text[:cut], "output": text[cut + 1 :]} if cut > 0 else record
            record |= {"expert": name, "metadata": {"complexity": draw.choice(["初级", "中级", "高级"])}}
        files[number // per_file].write(json.dumps(record, ensure_ascii=False) + "\n")
        truth.append((number // per_file, number % per_file + 1, name, near, labelled, len(text)))
    for file in files:
        file.close()
    pl.DataFrame(truth, ["file", "line", "name", "near", "labelled", "characters"], orient="row",
                 infer_schema_length=None).write_parquet(folder / "truth.parquet")
    return folder


def tokenizer(data: Path, cache: Path) -> Path:
    from deepseek.data import ReadReport, read_documents
    from deepseek.tokenizer import Tokenizer

    folder = cache / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        texts = [document.text[:4000] for places in DOMAINS.values() for document in read_documents(
            [data / place / "*.jsonl" for place in places], ReadReport())]
        Tokenizer.train(random.Random(0).sample(texts, min(8000, len(texts))), 16384).save(folder)
    return folder


def child(folder: Path, workers: int) -> None:
    """Run the pipeline; a line of JSON a step."""
    from deepseek.data.pipeline import run
    from deepseek.data.settings import PackSettings, PipelineConfig, SplitSettings

    config = PipelineConfig(out=str(folder / "out"), sources={"": [str(folder / "in")]}, workers=workers,
                            split=SplitSettings(valid_fraction=0.01),
                            pack=PackSettings(tokenizer=str(folder.parent / "tokenizer")))
    for name, done in run(config):
        print(json.dumps({"step": name, "seconds": done.seconds, "counts": done.counts}), flush=True)


def measured(folder: Path, workers: int) -> tuple[list[dict[str, Any]], float, dict[str, float]]:
    """(steps, seconds in all, peak GiB by step) of a fresh run on `workers` cores."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    cores = sorted(os.sched_getaffinity(0))[:workers]
    env = os.environ | {"POLARS_MAX_THREADS": str(workers), "RAYON_NUM_THREADS": str(workers),
                        "OMP_NUM_THREADS": str(workers)}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--child", str(folder), "--workers", str(workers)],
                               stdout=(folder / "steps.jsonl").open("w"), env=env)
    psutil.Process(process.pid).cpu_affinity(cores)
    peak: dict[int, float] = {}
    while process.poll() is None:
        size = 0
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            try:
                size += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        at = (folder / "steps.jsonl").read_text().count("\n")
        peak[at] = max(peak.get(at, 0.0), size / 2**30)
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the pipeline failed: exit status {process.returncode}")
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return steps, seconds, {step["step"]: peak.get(i, 0.0) for i, step in enumerate(steps)}


def mean(values: Any) -> float:
    return float(values.mean() or 0)


def judged(folder: Path) -> dict[str, float]:
    """What the truth that was kept aside says of the result."""
    import polars as pl

    truth = pl.read_parquet(folder / "truth.parquet").with_row_index("number")
    number = (pl.col("source").str.extract(r"(\d+)\.jsonl$").cast(pl.Int64).alias("file"), pl.col("line"))
    dropped = pl.read_csv(folder / "out" / "dedup" / "dropped.csv").select(*number).with_columns(gone=True)
    label = pl.scan_parquet(folder / "out" / "label" / "*.parquet").select(*number, "expert", "label_source").collect()
    known = truth.join(dropped, ["file", "line"], how="left").with_columns(pl.col("gone").fill_null(False))
    gone = known["gone"]
    near = known.filter(pl.col("near").is_not_null())
    found = near["gone"] | gone.gather(near["near"].cast(pl.UInt32))
    said = label.join(truth, ["file", "line"])
    out = {"planted near-duplicates": len(near), "share of them found": mean(found),
           "copies and near-duplicates": known.height - known.filter(~pl.col("gone")).height}
    for source in ("rules", "classifier"):
        part = said.filter(pl.col("label_source") == source)
        out[f"labels from {source}"] = len(part)
        out[f"of {source} right"] = mean(part["expert"] == part["name"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, help="default: 2,000,000; 20,000 on a generated sample")
    add_data(parser)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.workers)
        return
    data, sample = data_folder(args.data)
    args.records = args.records or (20_000 if sample else 2_000_000)
    cache = CACHE.with_name(CACHE.name + sample)
    folder = make(args.records, data, cache)
    tokenizer(data, cache)
    steps, seconds, peak = measured(folder, args.workers)
    truth = judged(folder)
    import polars as pl

    given = pl.read_parquet(folder / "truth.parquet", columns=["characters"])["characters"]
    counts = {step["step"]: step["counts"] for step in steps}
    distinct = counts["validate"]["kept"] - counts["dedup"]["exact"]
    rows = [["step", "seconds", "records in", "records/s", "peak memory (GiB)"]]
    for step in steps:
        name, took = step["step"], step["seconds"]
        size = counts["label"]["read"] if name in ("split", "pack", "report") else step["counts"]["read"]
        rows.append([name, f"{took:.1f}", f"{size:,}", f"{size / took:,.0f}", f"{peak[name]:.2f}"])
    rows.append(["all, with start-up", f"{seconds:.1f}", f"{args.records:,}", f"{args.records / seconds:,.0f}",
                 f"{max(peak.values()):.2f}"])
    where = machine(args.workers)
    packages = versions("polars", "numpy", "tokenizers")
    lines = ["# Data pipeline", "", f"{where['cpu']}, {args.workers} cores; "
             + ", ".join(f"{k} {v}" for k, v in packages.items())
             + f". {args.records:,} records of {mean(given):.0f} characters on average; {distinct:,} distinct, "
             f"{1 - distinct / args.records:.1%} exact copies.", "", table(rows), "",
             table([["against the truth", ""], *([k, f"{v:,}" if isinstance(v, int) else f"{v:.2%}"]
                                                 for k, v in truth.items())])]
    facts = {"machine": where, "versions": packages, "steps": steps, "seconds": seconds, "peak_gib": peak,
            "truth": truth, "distinct": distinct}
    write_result("pipeline", "\n".join(lines), facts, keep=args.records >= 1_000_000 and not sample)


if __name__ == "__main__":
    main()
