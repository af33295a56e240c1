"""A tuning step through the Python API, as a notebook makes it, against the command's, beside one busy process.

Both tune the same records on a checkpoint of the preset `nano` with random weights; what counts is the median time of a
step in the run's log. What must hold: the API within 1.5 times the command. OMP_ and GOMP_ variables are taken out of
the environment of both, since a notebook has none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from deepseek import ModelConfig, Tokenizer, save_model
from deepseek.model import CausalLM

STEPS, BATCH, LENGTH = 12, 4, 256
WORDS = "the court heard the appeal and the judge wrote down what a party had said of the contract in question".split()
API = """
from deepseek import MoEFineTuner
MoEFineTuner({model!r}, out={out!r}, expert_tune=["1.0", "2.0"], steps={steps}, batch_size={batch},
             max_length={length}, retain_data={data!r}).fit({data!r})
"""


def seconds_a_step(out: Path) -> float:
    """Median over the steps of a run, the first two left out."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:]
    return BATCH * LENGTH / statistics.median(rates)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    folder = Path(tempfile.mkdtemp())
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(200)) for i in range(1, 97)]
    (folder / "records.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.train(iter(texts), 512)
    config = ModelConfig.preset("nano").with_(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=0)
    save_model(CausalLM(config).init_weights(), folder / "model", tokenizer=tokenizer)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    names = {"model": str(folder / "model"), "data": str(folder / "records.jsonl"), "steps": STEPS, "batch": BATCH,
             "length": LENGTH}
    flags = ["--steps", STEPS, "--batch_size", BATCH, "--max_length", LENGTH, "--retain_data", names["data"], "--out"]
    command = [sys.executable, "-m", "deepseek.cli", "tune", names["model"], names["data"], "--expert_tune", "1.0",
               "2.0", *flags]
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    times: dict[str, list[float]] = {"command": [], "API": []}
    try:
        for turn in range(3):
            for name in times:
                out = folder / f"{name}-{turn}"
                api = [sys.executable, "-c", API.format(out=str(out), **names)]
                call = [*command, out] if name == "command" else api
                subprocess.run([str(word) for word in call], env=clean, check=True, stdout=subprocess.DEVNULL)
                times[name].append(seconds_a_step(out))
    finally:
        busy.kill()
    for name, seconds in times.items():
        print(f"{name:<8}{statistics.median(seconds):8.3f} s a step   ({', '.join(f'{s:.3f}' for s in seconds)})")
    print(f"ratio   {statistics.median(times['API']) / statistics.median(times['command']):8.2f}   (at most 1.5)")


if __name__ == "__main__":
    main()
