"""The native library as a guest of the process: its instruction sets, its threads, and what happens without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import deepseek
from deepseek.ops.native import native
from tests.helpers import ROOT
from tests.helpers.operations import random_attention, random_experts, random_naive

pytestmark = pytest.mark.skipif(native is None, reason="needs the native library")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the tests; an empty value unsets a variable."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "DEEPSEEK_ISA": "", "DEEPSEEK_PURE": ""} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- instruction sets -----------------------------------------------------------------------------------------------


DIGESTS = """
import os, runpy, sys
import deepseek, torch
for name, threads in zip(sys.argv[1::2], sys.argv[2::2]):  # a process each, forked: this one has imported torch
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
        continue
    os.environ["DEEPSEEK_ISA"] = name
    torch.set_num_threads(int(threads))
    runpy.run_module("tests.helpers.operations", run_name="__main__")
    break
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    """All operations, all shapes, on one and three threads. Unknown sets are refused, naming the known."""
    unknown = python("-c", "from deepseek import _native; _native.isa()", DEEPSEEK_ISA="sse9")
    found = re.search(r"RuntimeError: DEEPSEEK_ISA = 'sse9': this machine and build have ([\w, ]+)$", unknown.stderr,
                      re.M)
    assert unknown.returncode and found, unknown.stderr
    names = found[1].split(", ")
    assert names[-1] == "scalar"
    lines = lines_of(python("-c", DIGESTS, "", "3", *(word for name in names[1:] for word in (name, "1"))))
    first, *digests = lines[:len(lines) // len(names)]
    assert first == names[0] and len(digests) > 250  # the best one unless told otherwise
    assert lines == [line for name in names for line in (name, *digests)]


# ---- without it -----------------------------------------------------------------------------------------------------

REFERENCES = """
import torch
from tests.helpers.operations import randn, random_attention, random_experts, random_matrix, random_naive
from deepseek import ops
from deepseek.ops.native import isa
from deepseek.ops.panels import pack
from deepseek.ops.quantized import linear_reference

w, x_TK = random_matrix(20, 70, 4), randn(5, 70)
assert torch.equal(ops.quantized_linear(x_TK, pack(w), 20), linear_reference(x_TK, w))
case = random_experts(5, 4)
assert case.run().isfinite().all() and random_attention(5, 16, 3).run().isfinite().all()
assert ops.quantized_mlp(case.x_TH, case.shared, 90).shape == case.x_TH.shape
assert ops.grouped_quantized_linear(x_TK[:, None], pack(w), 0, 0, 20).shape == (5, 1, 20)
assert ops.plain_linear(x_TK, randn(20, 70)).shape == (5, 20)
assert random_naive(2, 3, 8).run().isfinite().all()
rows = torch.zeros(1, 5, 70)
ops.prepare_latents(randn(1, 5, 2, 20), x_TK[None], randn(62), 1e-6, randn(1, 5, 4), randn(1, 5, 4), True, rows, 0)
assert rows.any() and ops.rms_norm(x_TK, randn(70), 1e-6).isfinite().all()
print(isa())
"""


def test_pure_runs_on_the_references_and_says_so_once() -> None:
    done = python("-W", "always", "-c", REFERENCES, DEEPSEEK_PURE="1")
    assert lines_of(done) == ["torch"]
    assert done.stderr.count("native kernels are not in use: DEEPSEEK_PURE is set; operations run their torch") == 1


def test_a_broken_library_is_an_error_and_one_that_was_left_out_is_not(tmp_path: Path) -> None:
    """A copy of the package, ahead of the installed one and of its import hooks (-S)."""
    package = shutil.copytree(Path(deepseek.__file__).parent, tmp_path / "deepseek",
                              ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    path = os.pathsep.join((str(tmp_path), str(ROOT), str(Path(torch.__file__).parents[1])))
    show = "import deepseek.ops; print(deepseek.ops.native.isa())"
    without = python("-S", "-W", "always", "-c", show, PYTHONPATH=path)
    assert lines_of(without) == ["torch"]
    assert without.stderr.count("native kernels are not in use: the package was installed without them") == 1
    (package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF and then nothing sensible")
    broken = python("-S", "-c", show, PYTHONPATH=path)
    assert broken.returncode and "\nImportError: " in broken.stderr and "_native" in broken.stderr
    assert "not in use" not in broken.stderr


# ---- threads and processes ------------------------------------------------------------------------------------------

GUEST = r"""
import os, re, sys
import torch
from tests.helpers.operations import random_experts

def openmp():
    with open("/proc/self/maps") as maps:
        return set(re.findall(r"\S*/lib\w*omp[-.\w]*\.so[.\w]*", maps.read()))

torch.set_num_threads(3)
torch.ones(1 << 20).sum()
alone = openmp()
case = random_experts(40, 4)
want = case.run()
assert openmp() == alone and len(alone) <= 1, (alone, openmp())
assert all(str(path).startswith(os.path.dirname(os.path.dirname(torch.__file__))) for path in alone), alone

for _ in range(3):
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(case.run(), want)
    else:
        os._exit(0 if torch.equal(case.run(), want) and torch.equal(case.run(), want) else 1)
print("fine")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_second_openmp_and_forked_children_compute() -> None:
    """One more OpenMP runtime would fight with torch's over the cores. A child has none of the parent's helpers."""
    assert lines_of(python("-c", GUEST)) == ["fine"]
    library = Path(native.__file__).read_bytes()
    assert not any(name in library for name in (b"GOMP_", b"__kmpc_", b"libgomp", b"libomp", b"libiomp"))


def test_python_threads_take_turns() -> None:
    cases = [random_experts(tokens, bits, seed=tokens) for tokens in (1, 3, 40) for bits in (4, 8)]
    calls = [case.run for case in cases] + [random_attention(5, 16, 3).run, random_attention(20, 48, 1).run,
                                            random_naive(3, 20, 4).run]
    want = [call() for call in calls]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: calls[i % len(calls)](), range(30 * len(calls))))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(result, want[i % len(calls)]) for i, result in enumerate(results))
