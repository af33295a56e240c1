"""The tests that depend on the instruction set, as if on other machines: `make test-isa`, --short as CI runs it.

One entry is one setting of DEEPSEEK_ISA, DEEPSEEK_BF16 or ONEDNN_MAX_CPU_ISA. `amx_emulated` is a build of the native
kernels whose AMX tiles and AVX512-BF16 are emulated (csrc/amx_emulated.h); emulated/sitecustomize.py puts it in place
of the installed one; `bf16_emulated` is the same build without its tiles. An entry that this machine cannot run
is reported with what it needs, and counts neither as passed nor as failed. Exit code 1 where an entry failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from tests.helpers import ROOT

SHORT = ["tests/ops/test_panels.py", "tests/ops/test_training_kernels.py::test_norm",
         "tests/tune/test_lora.py::test_merging_says_when_it_would_do_nothing_or_lose_too_much"]
FULL = ["tests/ops", "tests/quant", "tests/model/test_mla.py", "tests/deepopt/test_loop.py",
        "tests/tune/test_lora.py", "tests/engine/test_engine.py"]
NEEDS = {"avx2": "AVX2 and FMA", "avx512_vnni": "AVX512-VNNI", "amx": "AMX-INT8"}
EMULATED = "amx_emulated"
PATH = os.pathsep.join(filter(None, (str(ROOT / "tests/emulated"), os.environ.get("PYTHONPATH"))))
SETTINGS = {**{isa: {"DEEPSEEK_ISA": isa} for isa in ("scalar", *NEEDS)},
            EMULATED: {"DEEPSEEK_ISA": EMULATED, "PYTHONPATH": PATH},
            "bf16_emulated": {"DEEPSEEK_ISA": "avx512_vnni", "PYTHONPATH": PATH},
            "bf16_fp32": {"DEEPSEEK_BF16": "fp32"}, "bf16_torch": {"DEEPSEEK_BF16": "torch"},
            "onednn_avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
OF_BUILD = {name for name, setting in SETTINGS.items() if "PYTHONPATH" in setting}  # of the build with emulated units


def here() -> list[str]:
    """The instruction sets of this machine and build, best first: as the error for an unknown one lists them."""
    said = subprocess.run([sys.executable, "-c", "from deepseek import _native; _native.isa()"], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"DEEPSEEK_ISA": "none"}).stderr.rstrip()
    _, marker, names = said.rpartition("this machine and build have ")
    if not marker:
        sys.exit(f"the native kernels do not load:\n{said}")
    return names.split(", ")


def run(*command: str, **environment: str) -> tuple[bool, str]:
    """Whether the command succeeded, and its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("DEEPSEEK_ISA", "DEEPSEEK_BF16", "ONEDNN_MAX_CPU_ISA")}
    done = subprocess.run(command, cwd=ROOT, env=env | environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    return not done.returncode, done.stdout


_building = Lock()


def build_emulated() -> tuple[bool, str]:
    """The module with emulated tiles, in build/emulated, if its sources changed. pip brings what the build needs."""
    library = ROOT / "build/emulated" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(ROOT / "csrc").iterdir()]
    if library.is_file() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return True, ""
    return run(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", ".",
               "--wheel-dir", "build/emulated", "--config-settings", "build-dir=build/emulated",
               "--config-settings", "cmake.define.DEEPSEEK_EMULATE_AMX=ON")


def entry(name: str, short: bool, known: list[str]) -> tuple[str, str]:
    """(verdict, what is to be said about it) of one entry."""
    needs = "avx512_vnni" if name in OF_BUILD else name
    if needs in NEEDS and needs not in known:
        return "cannot run here", f"needs {NEEDS[needs]}"
    if name in OF_BUILD:
        if short:
            return "left out", "the short form builds no module"
        with _building:
            built, output = build_emulated()
        if not built:
            return "FAILED", output
    tests = SHORT if short else FULL if name != "bf16_emulated" else ["tests/ops/test_training_kernels.py"]
    passed, output = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests,
                         **SETTINGS[name])
    return "passed" if passed else "FAILED", output if not passed else output.rstrip().rpartition("\n")[2]


def main(short: bool) -> int:
    known, start = here(), time.monotonic()
    with ThreadPoolExecutor(2) as pool:  # each is a process of one thread
        results = dict(zip(SETTINGS, pool.map(lambda name: entry(name, short, known), SETTINGS), strict=True))
    for name, (verdict, output) in results.items():
        if verdict == "FAILED":
            print(f"---- {name}\n{output}")
    for name, (verdict, note) in results.items():
        print(f"{name:<14}{verdict}" + (f": {note}" if verdict != "FAILED" else ""))
    counts = [sum(verdict == kind for verdict, _ in results.values()) for kind in ("passed", "FAILED")]
    print(f"{counts[0]} entries passed, {counts[1]} failed, {len(results) - sum(counts)} were not run "
          f"({time.monotonic() - start:.0f} s)")
    return int(counts[1] > 0)


if __name__ == "__main__":
    sys.exit(main("--short" in sys.argv[1:]))
