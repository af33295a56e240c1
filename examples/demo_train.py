"""The whole pipeline on text that every machine has: Python's own library. `make demo-train` runs this.

    sources and docstrings of the standard library -> tokenizer -> token shards -> train `nano` -> complete prompts
    -> which expert saw what -> a server, asked once, and its dashboard
"""

from __future__ import annotations

import argparse
import shlex
import sysconfig
from pathlib import Path

from demo import serve

from deepseek.cli import main as deepseek

PROMPTS = ("def read_file(path):\n", "import os\nimport sys\n\nclass ", '    """Return the ')
# packages of the standard library with much prose beside the code, about 6 MB in all
PACKAGES = ("asyncio", "collections", "concurrent", "ctypes", "email", "encodings", "html", "http", "idlelib", "json",
            "importlib", "logging", "multiprocessing", "re", "sqlite3", "tkinter", "unittest", "urllib", "xml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo-train", help="folder to leave everything in")
    parser.add_argument("--steps", default="200", help="training steps")
    parser.add_argument("--library", default=sysconfig.get_path("stdlib"), type=Path, help="Python's, to train on")
    args = parser.parse_args()
    library: Path = args.library
    data = [str(p) for p in (*sorted(library.glob("*.py")), *(library / name for name in PACKAGES)) if p.exists()]

    def run(*words: str) -> None:
        shown = [w if len(w) < 60 else f"{w[:40]}…" for w in words if w not in data or w == data[0]]
        print(f"\n$ {shlex.join(['deepseek', *shown])}", flush=True)
        if status := deepseek(words):
            raise SystemExit(status)

    run("info", "nano")
    run("train", "nano", *data, "--out", args.out, "--steps", args.steps, "--batch_size", "8", "--lr", "3e-3",
        "--eval_every", "50")
    model = f"{args.out}/model"
    for prompt in PROMPTS:
        run("infer", "--model", model, "--prompt", prompt, "--max_tokens", "60", "--seed", "1")
    run("infer", "--model", model, "--prompt", (library / "textwrap.py").read_text()[:2000], "--max_tokens", "40",
        "--seed", "1", "--expert_map", f"{args.out}/experts.png")
    print(f"\nEverything is in {Path(args.out).resolve()}:\n"
          f"  model/       a Hugging Face checkpoint: deepseek-infer --model {shlex.quote(model)} --prompt '…'\n"
          "  loss.png     the curve of training and the balance of the experts\n"
          "  experts.png  which expert of which layer saw how much of the last prompt\n"
          "  log.jsonl    one line a step")
    serve(["serve", model, "--name", "demo", "--port", "0"], "completions", {
        "model": "demo", "prompt": PROMPTS[0], "max_tokens": 30, "seed": 1}, lambda choice: PROMPTS[0] + choice["text"])


if __name__ == "__main__":
    main()
