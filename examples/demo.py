"""`mini`, from the download to a tuned expert and a server. `make demo` runs this.

    the ready model is put together -> answers, and which named experts gave them -> 16 bits beside 4
    -> law_expert learns forty rules of a housing cooperative, everything else stays -> a server, asked once
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepseek
from deepseek.atlas import ExpertUsage
from deepseek.cli import main as command

QUESTIONS = ("What are the symptoms of diabetes?", "Write a Python function that reverses a string.",
             "What is a contract in law?")
RECORDS = Path(__file__).with_name("northgate.jsonl")  # written for this project: the cooperative does not exist
RULE = "How much notice must the board of Northgate give before it ends a lease?"
BEGAN = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder to leave everything in")
    parser.add_argument("--epochs", default="8", help="times through the records")
    args = parser.parse_args()
    run("pull", "mini")
    answers()
    bits()
    tune(Path(args.out), args.epochs)
    serve(["serve", "mini", "--port", "0"], "chat/completions", {
        "model": "mini", "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 60, "temperature": 0},
        lambda choice: choice["message"]["content"].strip())


def run(*words: str) -> None:
    print(f"\n[{time.perf_counter() - BEGAN:.0f} s] $ {shlex.join(['deepseek', *words])}", flush=True)
    if status := command(words):
        raise SystemExit(status)


def answers() -> None:
    """Three questions, and whose experts answered."""
    llm = deepseek.LLM("mini")
    print("\nAnswers of `mini` (8 bits), and the share of the experts' weight that each name has in them:")
    for question in QUESTIONS:
        usage = ExpertUsage(llm.model.config)
        answer = llm.chat([{"role": "user", "content": question}], temperature=0, max_tokens=80, usage=usage)
        print(f"\n> {question}\n{answer.text.strip()}\n  {shares(usage, llm)}", flush=True)


def shares(usage: ExpertUsage, llm: deepseek.LLM) -> str:
    atlas = llm.engine.atlas
    assert atlas is not None
    named = sorted(usage.by_name(atlas).items(), key=lambda one: -one[1].weight)[:3]
    return " · ".join(f"{name} {use.weight:.0%}" for name, use in named)


def bits() -> None:
    """Size and speed of the same model in 16 and in 4 bits."""
    print(f"\n[{time.perf_counter() - BEGAN:.0f} s]\n{'':10}  {'on disk':>8}  tokens/s, one request")
    for name in ("mini-bf16", "mini-4bit"):
        folder, llm = deepseek.pull(name), deepseek.LLM(name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        speeds = []
        for question in QUESTIONS:
            begin = time.perf_counter()
            done = llm.chat([{"role": "user", "content": question}], temperature=0, max_tokens=64, ignore_eos=True)
            speeds.append(len(done.token_ids) / (time.perf_counter() - begin))
        print(f"{name:10}  {size / 1e6:5.0f} MB  {sorted(speeds)[1]:8.1f}", flush=True)


def tune(out: Path, epochs: str) -> None:
    """law_expert learns the records; the report says what was gained, what was forgotten, and what did not change."""
    if (out / "law" / "settings.json").is_file():  # of an earlier demo, and nothing else of that name
        shutil.rmtree(out / "law")
    print(f"\n{RECORDS.name}: {sum(1 for _ in RECORDS.open())} questions about the statutes of a housing cooperative")
    run("tune", "mini-bf16", str(RECORDS), "--expert_tune", "law_expert", "--epochs", epochs, "--lr", "1e-3",
        "--eval_records", "8", "--general_records", "4", "--out", str(out / "law"))
    for adapter in (None, str(out / "law" / "delta")):
        llm = deepseek.LLM("mini-bf16", adapter=adapter)
        answer = llm.chat([{"role": "user", "content": RULE}], temperature=0, max_tokens=60)
        print(f"\n{'after' if adapter else 'before'}> {RULE}\n{answer.text.strip()}", flush=True)


def serve(words: Sequence[str], route: str, body: dict[str, Any], answer: Callable[[Any], str]) -> None:
    """Start the server, ask it once, say where its pages are; it runs until Ctrl-C where there is a terminal. answer:
    the text in what it returns."""
    print(f"\n[{time.perf_counter() - BEGAN:.0f} s] $ {shlex.join(['deepseek', *words])}", flush=True)
    with subprocess.Popen([sys.executable, "-m", "deepseek.cli", *words], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            if " on " not in said:
                raise SystemExit(f"the server did not start: {said}")
            url = f"{said.split(' on ')[1].split(',')[0].strip()}/{route}"
            print(said.strip(), flush=True)
            request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as found:
                print(f"\n$ curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}\n"
                      f"{answer(json.load(found)['choices'][0])}")
            print("\n" + server.stdout.readline().strip(), flush=True)  # where the pages are
            if sys.stdin.isatty():
                print("The server runs until Ctrl-C.", flush=True)
                server.wait()
            else:
                print(f"The server has been ended: `{shlex.join(['deepseek', *words[:2]])}` starts it again.")
        except KeyboardInterrupt:
            pass
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
