"""Checkpoints with something wrong in them: tiny whole ones, one change at a time, and what the commands say to each.

    bytes     bits flipped, cut, zeros, noise, insertions, other encodings; an empty file, none, a folder or a pipe
    values    any value of a JSON file (a safetensors header too) becomes one of another type or size, is nested, goes,
              comes twice, moves to another key

A command must run or end with one line that says what is wrong: no traceback, no signal, no endless run, no control
characters for the terminal. `python -m tests.helpers.mutations 1000` prints a table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from deepseek.atlas import Atlas
from deepseek.checkpoint import EXPERT_USE, MANIFEST, load_model, save_delta, save_model
from deepseek.checkpoint.identity import base_tensors, fingerprint, tensor_hashes
from deepseek.cli import main
from deepseek.config import ModelConfig, YarnScaling
from deepseek.convert import install, quantize
from deepseek.model import CausalLM
from deepseek.tokenizer import CHAT_TEMPLATE, Tokenizer
from deepseek.tune import LoRAAdapter
from tests.helpers import layouts
from tests.helpers.expert_packages import make_base, make_package

SECONDS = 60.0  # of a command
PROMPT = "ab 混 12"


class Kind(NamedTuple):
    """A folder to change, and the commands that read it."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]


# ---- whole ones ----------------------------------------------------------------------------------------------------


def make_kinds(root: Path) -> list[Kind]:
    """FOLDER in a command is the changed copy, MODEL a whole checkpoint, BASE a dense one, OUT a fresh name."""
    tokenizer = Tokenizer.train(["the quick brown fox 12345\n混合专家模型 " * 8], 300)
    config = ModelConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, num_nextn_predict_layers=1, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=(1, 2), pad_token_id=2,
        yarn=YarnScaling(4.0, 16, mscale=0.7, mscale_all_dim=0.7))
    model = CausalLM(config).init_weights(torch.Generator().manual_seed(0)).eval()
    usage = {"format": 1, "layers": [1, 2], "experts": 4, "top_k": 2, "tokens": 4, "counts": [[2, 2, 2, 2]] * 2,
             "weights": [[1.0] * 4] * 2}

    def beside(folder: Path) -> None:
        """What published folders have."""
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        settings |= {"model_max_length": 64, "added_tokens_decoder": {"0": {"content": "<|begin_of_sentence|>"}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|begin_of_sentence|>"}}))
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
        (folder / "generation_config.json").write_text(json.dumps(
            {"bos_token_id": 0, "eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}))
        (folder / EXPERT_USE).write_text(json.dumps(usage))
        Atlas.built_in(config, ["law_expert", "code_expert"]).save(folder)

    plain = save_model(model, root / "plain", tokenizer=tokenizer, shard_bytes=40_000, add=beside)
    whole = shutil.copytree(plain, root / "whole")
    (plain / MANIFEST).unlink()
    infer = ("infer", "--model", "FOLDER", "--prompt", PROMPT, "--max_tokens", "2")
    use = (("info", "FOLDER"), infer, (*infer, "--chat", "--show_experts"), ("quantize", "FOLDER", "OUT"),
           ("atlas", "show", "FOLDER"))
    listed = shutil.copytree(whole, root / "listed")
    quantize(whole, root / "nf4", "nf4", progress=False)
    (root / "nf4" / EXPERT_USE).write_text(json.dumps(usage))
    shutil.copytree(root / "nf4", root / "nf4-plain")
    (root / "nf4-plain" / MANIFEST).unlink()
    back = (*use[:2], (*use[1], "--expert_memory", "40KiB", "--warmup_experts", "auto"),
            ("quantize", "FOLDER", "OUT", "--format", "bf16"))

    fresh = load_model(whole)
    base = fingerprint(tensor_hashes(fresh), fresh.config)
    expert = {name: t * 1.1 for name, t in base_tensors(fresh).items() if ".1.mlp.experts.3." in name}
    save_delta(root / "delta", expert, base, {"base_name": "whole", "mode": "experts", "experts": {"1": [3]}})
    for name, adapter in (("peft", LoRAAdapter(r=2, target_modules=["q_proj"])),
                          ("side", LoRAAdapter(r=2, target_modules=["q_proj"], experts=["1.3"]))):
        other = load_model(whole)
        side = adapter.attach(other)
        for path in (parameter for _, parameter in other.named_parameters() if parameter.requires_grad):
            torch.nn.init.normal_(path, std=0.1)
        adapter.save(other, side, root / name, "whole", base)
    esft = root / "esft"
    esft.mkdir()
    save_file({name.removeprefix("model."): tensor for name, tensor in expert.items()}, esft / "model.safetensors")
    (esft / "expert_cfg.json").write_text(json.dumps(
        {"experts": {"1": [3]}, "shared_experts": False, "non_expert_modules": False}))
    attached = (("infer", "--model", "MODEL", "--adapter", "FOLDER", "--prompt", PROMPT, "--max_tokens", "2"),
                ("merge", "MODEL", "FOLDER", "OUT"))
    adapters = ("delta", "peft", "side", "esft")
    for name in adapters[:3]:
        (root / name / MANIFEST).unlink()
    dense = make_base(root / "base")
    package = make_package(root, dense, "law")
    (root / "package").mkdir()
    shutil.copyfile(package, root / "package" / "law.safetensors")
    install(package, dense, out=root / "grown")
    (root / "grown" / MANIFEST).unlink()
    packages = (("experts", "verify", "FOLDER/law.safetensors"),
                ("experts", "install", "BASE", "FOLDER/law.safetensors", "--out", "OUT"))
    groups = (("experts", "list", "FOLDER"), ("experts", "verify", "FOLDER"), infer,
              ("experts", "remove", "FOLDER", "law", "--out", "OUT"))
    often = {"plain": 8, "four bits": 3, "Kimi-K2-Thinking": 2}
    kinds = [Kind("plain", plain, use), Kind("with manifest", listed, use[:2]),
             Kind("four bits", root / "nf4-plain", back),
             *(Kind(name, layouts.write(root / name, name), use[:-1]) for name in ("DeepSeek-V3", "Kimi-K2-Thinking")),
             *(Kind(name, root / name, attached) for name in adapters),
             Kind("package", root / "package", packages), Kind("grown", root / "grown", groups)]
    return [kind for kind in kinds for _ in range(often.get(kind.name, 1))]


# ---- changes -------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 10**19, -(2**63), 2**31, 2**64, float("nan"), float("inf"),
    float("-inf"), "", "x", "1", "\x00", "\x1b[2J\n", "\ud800", "混" * 50, "../../x", "/", [], {}, [[]], [None], [0],
    ["x"], [float("nan")], {"a": 1}, {"content": 5}, {"": None}, [[[[[[1]]]]]], {"a": {"b": {"c": [1, {"d": None}]}}})
RAW = ("9" * 5000, "[" * 900 + "]" * 900, "[" * 100_000, '{"a":' * 20_000, "1e400", "-", "tru", '"\\ud800"', '"\\u00"')
_RAW = "@@raw@@"


def change(folder: Path, rng: random.Random) -> str:
    """Apply one change to one file; says which."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    file = rng.choices(files, [0.4 if path.name.startswith("model-") else 2 if path.suffix == ".json" else 1
                               for path in files])[0]
    as_text = file.suffix in (".json", ".safetensors")
    if as_text and rng.random() < 0.75:
        if file.suffix == ".safetensors":
            return f"{file.name} header: {_change_header(file, rng)}"
        text, what = _change_value(file.read_text(encoding="utf-8"), rng)
        file.write_bytes(text)
        return f"{file.name}: {what}"
    return f"{file.name}: {_change_bytes(file, rng)}"


def _change_header(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.15:
        size = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)))
        file.write_bytes(size.to_bytes(8, "little") + header + body)
        return f"its length is {size}"
    if rng.random() < 0.4:  # what a writer of another kind could have written
        entries = json.loads(header)
        name = rng.choice([key for key in entries if key != "__metadata__"])
        key, value = rng.choice((
            ("dtype", rng.choice("F8_E5M2 F8_E4M3 F8_E8M0 F4 I64 I16 BOOL C64 U16 F64 Q".split())),
            ("shape", rng.choice(([], [0], [1], [2**40], [2**32, 2**32], [-1], entries[name]["shape"][::-1]))),
            ("data_offsets", rng.choice(([0, 0], [0, 2**60], [8, 4], [0, 4], [1, 5])))))
        entries[name][key] = value
        if (key == "dtype" and value == "F8_E4M3") or rng.random() < 0.3:
            size = {"F8_E5M2": 1, "F8_E4M3": 1, "I64": 8, "F64": 8}.get(str(value), 4)
            start, stop = entries[name]["data_offsets"]
            entries[name]["shape"] = [max(0, stop - start) // size]
        what, header = f"{name}.{key} = {value}", json.dumps(entries).encode()
    else:
        header, what = _change_value(header.decode(), rng)
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return what


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _change_value(text: str, rng: random.Random) -> tuple[bytes, str]:
    """Any place of a JSON text, those near the top more often: a vocabulary has thousands of equal ones."""
    value = json.loads(text)
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in _places(value):
        by_depth.setdefault(len(path), []).append(path)
    weights = [min(len(paths), 30) for paths in by_depth.values()]
    path = rng.choice(rng.choices(list(by_depth.values()), weights)[0])
    above = value
    for key in path[:-1]:
        above = above[key]
    shown = ".".join(map(str, path)) or "all of it"
    how = rng.choices(("odd", "raw", "wrap", "remove", "rename", "twice", "text", "negative", "move"),
                      (10, 3, 1, 2, 1, 2, 1, 1, 1))[0]
    if not path:
        new = rng.choice(ODD)
        return json.dumps(new).encode("utf-8", "surrogatepass"), f"{shown} = {new!r:.40}"
    old = above[path[-1]]
    if how == "odd":
        above[path[-1]] = new = rng.choice(ODD)
        what = f"{shown} = {new!r:.40}"
    elif how == "raw":
        raw = rng.choice(RAW)
        above[path[-1]] = _RAW
        return json.dumps(value).replace(f'"{_RAW}"', raw, 1).encode(), f"{shown} = {raw:.20}… as it is"
    elif how == "wrap":
        above[path[-1]] = rng.choice(([old], {"a": old}, [old, old]))
        what = f"{shown} wrapped"
    elif how == "remove":
        del above[path[-1]]
        what = f"{shown} removed"
    elif how == "rename" and isinstance(above, dict):
        above[rng.choice(("x", "", "\x1b[2J", path[-1] + "s", path[-1].upper()))] = above.pop(path[-1])
        what = f"{shown} renamed"
    elif how == "twice" and isinstance(above, dict):
        new = rng.choice(ODD)
        above[_RAW] = new
        key = json.dumps(path[-1])
        return json.dumps(value).replace(f'"{_RAW}"', key, 1).encode(), f"{shown} twice, then {new!r:.40}"
    elif how == "text":
        above[path[-1]] = str(old)
        what = f"{shown} as text"
    elif how == "negative" and isinstance(old, int | float):
        above[path[-1]] = -old
        what = f"{shown} = {-old}"
    else:
        others = list(above) if isinstance(above, dict) else list(range(len(above)))
        other = rng.choice(others)
        above[path[-1]] = above[other]
        what = f"{shown} = that of {other}"
    return json.dumps(value).encode("utf-8", "surrogatepass"), what


def _change_bytes(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 2000) + 1)
    size = rng.choice((1, 2, 8, 64, 1000))
    how = rng.choice(("flip", "flip", "cut", "cut", "insert", "insert", "noise", "zeros", "ones", "remove", "append",
                      "empty", "gone", "folder", "pipe", "loop", "UTF-16", "Latin-1", "mark", "twice"))
    if how == "flip":
        for _ in range(rng.choice((1, 1, 8))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = rng.randbytes(size)
    elif how in ("noise", "zeros", "ones"):
        data[at : at + size] = {"noise": rng.randbytes(size), "zeros": bytes(size), "ones": b"\xff" * size}[how]
    elif how == "remove":
        del data[at : at + size]
    elif how == "append":
        data += rng.choice((b"\0", b"}", b"x" * 100, b"\xff"))
    elif how == "empty":
        data.clear()
    elif how == "UTF-16":
        data = bytearray(data.decode("utf-8", "replace").encode("utf-16"))
    elif how == "Latin-1":
        data[at:at] = b"caf\xe9"
    elif how == "mark":
        data[:0] = b"\xef\xbb\xbf"
    elif how == "twice":
        data *= 2
    if how in ("gone", "folder", "pipe", "loop"):
        file.unlink()
        {"gone": lambda: None, "folder": file.mkdir, "pipe": lambda: os.mkfifo(file),
         "loop": lambda: file.symlink_to(file.name)}[how]()
        return how
    file.write_bytes(data)
    return f"{how} at {at}"


# ---- commands ------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a command came to. fault: what it must not be; None where it ran or said what is wrong."""

    command: str
    status: int
    said: str
    fault: str | None


def fault_of(status: int, errors: str) -> str | None:
    lines = [line for line in errors.splitlines() if re.match("deepseek: (?!warning: )", line)]
    if status < 0:
        return "no answer in time" if status == -signal.SIGKILL else f"signal {-status}"
    if "Traceback" in errors:
        return "traceback"
    if status not in (0, 1, 2):
        return f"status {status}"
    if status and (not lines or not errors.endswith(f"{lines[-1]}\n") or len(lines) > 1):
        return "not one line"
    if "DEEPSEEK_DEBUG" in errors:
        return "a mistake of ours"
    if lines and not all(character.isprintable() for character in lines[-1]):
        return "control characters"
    return f"a line of {len(lines[-1])} characters" if lines and len(lines[-1]) > 1500 else None


def placed(command: tuple[str, ...], places: dict[str, Path]) -> list[str]:
    """The words with the names of places, or those that begin with one and a slash, as paths."""
    parts = [word.partition("/") for word in command]
    return [f"{places[head]}{slash}{rest}" if head in places else head + slash + rest for head, slash, rest in parts]


def run(command: tuple[str, ...], places: dict[str, Path]) -> tuple[int, str]:
    """In this process: (status, standard error)."""
    words = placed(command, places)
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        status = main(words)
    return status, errors.getvalue()


def run_apart(command: tuple[str, ...], places: dict[str, Path], seconds: float = SECONDS) -> tuple[int, str]:
    """In a forked process, which is ended after `seconds`: a signal's number is negative."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as errors:
        if (child := os.fork()) == 0:
            os.setsid()
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            status = 99
            try:
                status = main(placed(command, places))
            except SystemExit as leaving:
                status = int(leaving.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        end = time.monotonic() + seconds
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < end:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # itself or the workers that it left; its number is still its own
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return status, errors.read()


def attempt(kind: Kind, seed: int, root: Path, runner: Callable[..., tuple[int, str]]) -> tuple[str, list[Outcome]]:
    """Change a copy of `kind`, run its commands on it."""
    folder = shutil.copytree(kind.folder, root / f"case-{seed}")
    outcomes = []
    try:
        what = change(folder, random.Random(seed))
        for command in kind.commands:
            out = root / f"out-{seed}"
            places = {"FOLDER": folder, "MODEL": root / "whole", "BASE": root / "base", "OUT": out}
            status, errors = runner(command, places)
            said = next((line for line in errors.splitlines()[::-1] if line.startswith("deepseek: ")), errors[-300:])
            fault = fault_of(status, errors)
            if fault is None and status and (left := list(root.glob(f"out-{seed}*"))):
                fault = f"{left[0].name} left behind"
            outcomes.append(Outcome(command[0], status, said, fault))
            for each in root.glob(f"out-{seed}*"):
                shutil.rmtree(each)
    finally:
        shutil.rmtree(folder)
    return what, outcomes


def table(cases: list[tuple[str, str, list[Outcome]]]) -> str:
    """By file: changes, commands that ran, that said what is wrong, and faults."""
    rows: dict[str, Counter[str]] = {}
    for kind, what, outcomes in cases:
        row = rows.setdefault(f"{kind}: {what.partition(':')[0]}", Counter())
        row["changes"] += 1
        for outcome in outcomes:
            row["fault" if outcome.fault else "ran" if outcome.status == 0 else "said"] += 1
    lines = [f"{'file':<64}{'changes':>8}{'ran':>8}{'refused':>8}{'faults':>8}"]
    total: Counter[str] = Counter()
    for name, row in sorted(rows.items()):
        total += row
        lines.append(f"{name:<64}{row['changes']:>8}{row['ran']:>8}{row['said']:>8}{row['fault']:>8}")
    lines.append(f"{'all':<64}{total['changes']:>8}{total['ran']:>8}{total['said']:>8}{total['fault']:>8}")
    return "\n".join(lines)


def sweep(count: int, first: int, root: Path, runner: Callable[..., tuple[int, str]] = run_apart,
          tell: Callable[[str], object] = lambda _: None) -> list[tuple[str, str, list[Outcome]]]:
    kinds = make_kinds(root)
    cases = []
    for seed in range(first, first + count):
        kind = kinds[seed % len(kinds)]
        what, outcomes = attempt(kind, seed, root, runner)
        cases.append((kind.name, what, outcomes))
        for outcome in outcomes:
            if outcome.fault:
                tell(f"{seed} {kind.name}: {what}\n    {outcome.command}: {outcome.fault}: {outcome.said[:400]}")
    return cases


if __name__ == "__main__":
    os.environ.pop("DEEPSEEK_DEBUG", None)
    torch.set_num_threads(1)
    count, first = map(int, [*sys.argv[1:], *("1000", "0")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as scratch:
        print(table(sweep(count, first, Path(scratch), tell=lambda line: print(line, flush=True))))
