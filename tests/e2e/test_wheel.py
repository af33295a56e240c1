"""A wheel as others get it: built from a copy of the sources, alone in an environment, on plain kernels too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import deepseek
from tests.helpers import ROOT
from tests.helpers.tiny_run import write_notes

NEEDED = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "src")
OTHERS = Path(torch.__file__).parents[1]  # where the dependencies are, of which none is fetched again


def call(*words: str | Path, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DEEPSEEK_", "PYTHON"))}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=500, cwd=cwd,
                          env=clean | environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the wheel, an environment with it and without the sources). The package index is asked for the build's tools."""
    here = tmp_path_factory.mktemp("wheel")
    (source := here / "source").mkdir()
    built_before = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=built_before)
        else:
            shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "venv", here / "env", cwd=here)
    pip = (here / "env" / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    call(*pip, "wheel", "--no-deps", "--wheel-dir", here, "-C", f"build-dir={here / 'build'}", source, cwd=here)
    wheel, = here.glob("*.whl")
    call(*pip, "install", "--no-deps", "--no-index", wheel, cwd=here)
    packages, = (here / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{OTHERS}\n")  # behind the environment's own packages
    return wheel, here / "env" / "bin"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data(built: tuple[Path, Path]) -> None:
    wheel, _ = built
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"moe_dr-{deepseek.__version__}-cp")
    assert [name for name in names if name.startswith("deepseek/_native.")]
    for data in (path for path in (ROOT / "src").rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc")):
        assert str(data.relative_to(ROOT / "src")) in names or ".egg-info" in str(data)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepseek", "moe_dr"}
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Project-URL: Repository, " in metadata and "License-Expression: MIT" in metadata


@pytest.mark.slow
def test_the_wheel_trains_and_answers_with_the_same_text_on_every_instruction_set(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    _, programs = built
    where = call(programs / "python", "-c", "import deepseek; print(deepseek.__file__)", cwd=tmp_path)
    assert str(programs.parent) in where
    write_notes(tmp_path, num_hidden_layers=2, hidden_size=64, moe_intermediate_size=64, kv_lora_rank=64,
                qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    ours = programs / "deepseek"
    call(ours, "train", "tiny.json", "data", "--out", "run", "--steps", "6", "--batch_size", "4", "--seq_len", "32",
         "--lr", "1e-2", cwd=tmp_path)
    call(ours, "quantize", "run/model", "nf4", cwd=tmp_path)
    best = call(programs / "python", "-c", "import deepseek._native as n; print(n.isa())", cwd=tmp_path).strip()
    ladder: Sequence[str] = ("scalar", "avx2", "avx512_vnni", "amx")
    texts = {isa: call(programs / "deepseek-infer", "--model", "nf4", "--prompt", "On Monday", "--max_tokens", "12",
                       "--temperature", "0", cwd=tmp_path, DEEPSEEK_ISA=isa)
             for isa in ladder[:ladder.index(best) + 1]}
    assert texts["scalar"].strip() and len(set(texts.values())) == 1, texts


@pytest.mark.slow
def test_no_code_of_newer_processors_is_shared(built: tuple[Path, Path]) -> None:
    """What the linker may take from any object (weak symbols: inline functions, templates) must not come from one that
    is compiled for AVX2 or later: other objects would run it on machines that lack it."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    objects = {path.name: path for path in (built[0].parent / "build").rglob("*.cpp.o")}
    newer = [path for name, path in objects.items() if name.startswith(("avx", "amx", "training_avx"))]
    assert len(newer) == 5 and len(objects) > 10
    for path in newer:
        symbols = call("nm", "-C", "--defined-only", path, cwd=path.parent).splitlines()
        shared = [line for line in symbols if line.split(" ", 2)[1] in "WVu"]
        assert symbols and not shared, (path.name, shared)
