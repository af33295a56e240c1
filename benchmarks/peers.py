"""llama.cpp as a contender: built here from source, given our weights, measured by its own tools.

    build(cache)                    llama-cpp-python's source package -> the llama.cpp tree inside -> its tools
    gguf(cache, source)             our checkpoint -> BF16 GGUF (llama.cpp's converter) -> Q4_0 (llama-quantize)
    LlamaCpp.prefill(), .decode()   one run of llama-bench or llama-batched-bench each -> tokens/s

Everything is kept in the cache folder and reused. What was chosen on llama.cpp's behalf, each for its speed:

- The compiler sees this machine (GGML_NATIVE), OpenMP is on and weights are repacked at load: its own defaults.
  Repacked Q4_0 is its fastest 4-bit format on CPUs with AVX2 or AVX512-VNNI.
- AMX is left out, because the AMX build aborts on models with MLA: its weight buffer refuses the split kv_b.
- Flash attention and the patience of waiting threads are measured, not chosen: `LlamaCpp.variants` has every
  combination, the fastest counts. Which attention wins has not been settled: runs on a busy machine disagree. On two
  free cores libgomp's own long spinning decodes 1.1 times as fast as GOMP_SPINCOUNT=1000; once neighbours take a
  core, a sixth to a half as fast.

    python benchmarks/peers.py [--cache FOLDER]     build, convert and measure it alone
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shape import CACHE, write_model

RELEASE = "0.3.36"  # of llama-cpp-python; results are compared between days, so it moves by hand
TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-server")
_OFF = "LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_APP LLAMA_OPENSSL LLAMA_USE_PREBUILT_UI".split()
# The converter knows tokenizers by a hash and ours is not among them. The answer only names a rule for splitting text.
_CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


class PeerError(RuntimeError):
    """A peer could not be fetched, built or run; the message says which step and shows the end of its output."""


def build(cache: Path = CACHE, tools: Sequence[str] = TOOLS) -> Path:
    """The folder of llama.cpp's tools, fetched and compiled where they are not there yet (ten minutes on 2 cores);
    what was stopped goes on.

    Raises PeerError when a compiler or CMake is missing, or a step fails.
    """
    home = _home(cache)
    binaries = home / "build" / "bin"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in _OFF)]
    if platform.machine() in ("x86_64", "AMD64"):
        no_amx = "-mno-amx-int8 -mno-amx-bf16 -mno-amx-tile"
        options += [f"-DCMAKE_C_FLAGS={no_amx}", f"-DCMAKE_CXX_FLAGS={no_amx}"]
    made = home / "built.json"  # what the tree is configured for
    recipe = json.dumps({"options": options, "cpu": _cpu_flags()})
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    if missing := [tool for tool in ("cmake", compiler) if not shutil.which(tool)]:
        raise PeerError(f"llama.cpp is built from source, which needs CMake and a C++ compiler; "
                        f"not found: {', '.join(missing)}")
    if not made.is_file() or made.read_text(encoding="utf-8") != recipe:
        tree = _fetch(home)
        shutil.rmtree(home / "build", ignore_errors=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _run(["cmake", *generator, "-S", str(tree), "-B", str(home / "build"), *options], "configuring llama.cpp")
        made.write_text(recipe, encoding="utf-8")
    if not all((binaries / tool).is_file() for tool in tools):
        print(f"building llama.cpp in {home} (about ten minutes on two cores)", flush=True)
    _run(["cmake", "--build", str(home / "build"), "--parallel", str(os.cpu_count() or 1), "--target", *tools],
         "building llama.cpp")
    return binaries


def gguf(cache: Path, source: Path, pure: bool = False) -> Path:
    """A checkpoint, or a GGUF file, as a Q4_0 GGUF file: what `llama-quantize … Q4_0` makes of the same weights. pure:
    embedding and head, too, have 4 bits.

    A file that is newer than the source is reused. Raises PeerError when a step fails.
    """
    home, is_file = _home(cache), source.suffix == ".gguf"
    target = home / f"{source.name.removesuffix('.gguf')}-q4_0{'-pure' if pure else ''}.gguf"
    made = (source if is_file else source / "config.json").stat().st_mtime
    if target.is_file() and target.stat().st_mtime > made:
        return target
    binaries, tree = build(cache, ("llama-quantize",)), _fetch(home)
    print(f"converting {source} to {target}", flush=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="convert-") as name:  # the BF16 file (5 GB) goes with it
        wide, narrow = source if is_file else Path(name) / "bf16.gguf", Path(name) / "q4_0.gguf"
        if not is_file:
            _run([sys.executable, "-c", _CONVERT, str(tree), str(source), "--outtype", "bf16", "--outfile", str(wide)],
                 "converting to GGUF")
        _run([str(binaries / "llama-quantize"), "--allow-requantize", *(["--pure"] if pure else []), str(wide),
              str(narrow), "Q4_0", str(os.cpu_count() or 1)], "quantizing to Q4_0")
        narrow.replace(target)
    return target


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on a Q4_0 file. Each method starts a tool, which loads, warms up, measures once, and ends.

    spin_count: how often an OpenMP thread looks before it sleeps at a barrier (GOMP_SPINCOUNT); None is libgomp's own.
    """

    binaries: Path
    model: Path
    threads: int = 2
    flash_attention: bool = False
    spin_count: int | None = None

    @property
    def name(self) -> str:
        flash = "flash attention" if self.flash_attention else "plain attention"
        return f"llama.cpp Q4_0, {flash}, {'long' if self.spin_count is None else 'short'} spins"

    def variants(self) -> tuple[LlamaCpp, ...]:
        """Every setting that may be the fastest, depending on the measurement and on the machine's other work."""
        return tuple(replace(self, flash_attention=flash, spin_count=spins)
                     for flash in (False, True) for spins in (None, 1000))

    @classmethod
    def install(cls, cache: Path = CACHE, checkpoint: Path | None = None, threads: int = 2) -> LlamaCpp:
        """Build it and convert `checkpoint` (the benchmark model by default), each where that is not done yet."""
        return cls(build(cache), gguf(cache, checkpoint or write_model(cache / "model")), threads)

    def prefill(self, tokens: int = 512) -> float:
        """Tokens/s of reading one prompt of `tokens` random tokens in one batch."""
        return self._bench("-p", str(tokens), "-n", "0", "-b", str(tokens), "-ub", str(tokens))

    def decode(self, batch: int = 1, steps: int = 32, prompt: int = 16) -> float:
        """Tokens/s, over all sequences, of `batch` sequences that grow by `steps` tokens after a prompt of `prompt`."""
        if batch == 1:
            return self._bench("-p", "0", "-n", str(steps), "-d", str(prompt))
        output = self._tool(
            "llama-batched-bench", "-npp", str(prompt), "-ntg", str(steps), "-npl", str(batch),
            "-c", str(-(-batch * (prompt + steps) // 256) * 256), "-b", "2048", "-ub", "512",
            "--output-format", "jsonl", "-fa", "on" if self.flash_attention else "off")
        rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        return float(self._only(rows, output)["speed_tg"])

    def server(self, port: int, slots: int, positions: int, step: int = 2048) -> tuple[list[str], dict[str, str]]:
        """(command, environment) of llama-server for `slots` requests at once of `positions` tokens each, `step` tokens
        of prompts at a time (its own default). Its store of earlier prompts, of no use to prompts that share nothing,
        is off, and so are its page and its log."""
        context = slots * -(-positions // 256) * 256
        flash = "on" if self.flash_attention else "off"
        return [str(self.binaries / "llama-server"), "-m", str(self.model), "-t", str(self.threads), "-np", str(slots),
                "-c", str(context), "-b", str(step), "-fa", flash, "--port", str(port), "--cache-ram", "0", "--no-ui",
                "--log-disable"], self._environment()

    def _bench(self, *options: str) -> float:
        output = self._tool("llama-bench", *options, "-r", "1", "-o", "json", "-fa", str(int(self.flash_attention)))
        return float(self._only(json.loads(output[output.index("["):output.rindex("]") + 1]), output)["avg_ts"])

    def _tool(self, tool: str, *options: str) -> str:
        command = [str(self.binaries / tool), "-m", str(self.model), "-t", str(self.threads), *options]
        return _run(command, f"running {tool}", self._environment())

    def _environment(self) -> dict[str, str]:
        """Without our own OpenMP settings: `make` exports one."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
        return kept if self.spin_count is None else kept | {"GOMP_SPINCOUNT": str(self.spin_count)}

    @staticmethod
    def _only(rows: Sequence[dict[str, Any]], output: str) -> dict[str, Any]:
        if len(rows) != 1:
            raise PeerError(f"llama.cpp reported {len(rows)} measurements where one was asked for:\n{_tail(output)}")
        return rows[0]


MEASUREMENTS: dict[str, Callable[[LlamaCpp], float]] = {
    "prefill of 512": LlamaCpp.prefill,
    "decode, batch 1": LlamaCpp.decode,
    "decode, batch 8": lambda peer: peer.decode(8, steps=16),
    "decode, batch 32": lambda peer: peer.decode(32, steps=8),
}


def _home(cache: Path) -> Path:
    return cache.resolve() / f"llama-cpp-python-{RELEASE}"


def _cpu_flags() -> str:
    """What a native build depends on: a cache that moved to another machine is built again."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _fetch(home: Path) -> Path:
    """The llama.cpp tree inside llama-cpp-python's source package."""
    tree = home / "source" / f"llama_cpp_python-{RELEASE}" / "vendor" / "llama.cpp"
    if tree.is_dir():
        return tree
    home.mkdir(parents=True, exist_ok=True)
    print(f"fetching the source package of llama-cpp-python {RELEASE}", flush=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="fetch-") as name:
        _run([sys.executable, "-m", "pip", "download", "--no-binary", "llama-cpp-python", "--no-deps", "--dest", name,
              f"llama-cpp-python=={RELEASE}"], "fetching llama-cpp-python's source package")
        with tarfile.open(next(Path(name).glob("*.tar.gz"))) as archive:
            archive.extractall(Path(name) / "source", filter="data")
        (Path(name) / "source").replace(home / "source")
    return tree


def _run(command: Sequence[str], purpose: str, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of `command`. Raises PeerError with the end of everything it said when it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise PeerError(f"{purpose} failed (exit status {done.returncode}):\n{_tail(done.stdout + done.stderr)}")
    return done.stdout


def _tail(text: str, lines: int = 25) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Build llama.cpp, convert the benchmark model, measure it alone.")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        peer = LlamaCpp.install(args.cache, threads=args.threads)
        for what, measure in MEASUREMENTS.items():
            for contender in peer.variants():
                speeds = [measure(contender) for _ in range(args.rounds)]
                print(f"{what:<18}{contender.name:<48}{statistics.median(speeds):7.1f} tokens/s, "
                      f"{min(speeds):.1f} to {max(speeds):.1f}", flush=True)
    except PeerError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
