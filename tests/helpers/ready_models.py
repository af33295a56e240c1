"""A small ready model: a random base in a wheel, packages for it, and the manifest that names them."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind

from deepseek.checkpoint import PackageInfo, open_checkpoint, stored_fingerprint, write_package
from deepseek.convert import upcycle
from deepseek.files import sha256, write_json
from deepseek.tokenizer import Tokenizer
from tests.helpers.expert_packages import random_tensors
from tests.helpers.gguf_files import HIDDEN, weights, write

WHEEL, GGUF = "tiny_base-0.3-py3-none-any.whl", "tiny_base/tiny.gguf"
GENERAL = [[5, 6, 7, 8, 9, 10], [11, 12, 13] * 10]


def make_wheel(folder: Path, *, pad: int = 0) -> tuple[Path, Path]:
    """(the wheel, the GGUF file in it). pad: bytes more."""
    torch.manual_seed(5)
    gguf = write(folder / "tiny.gguf", weights(), Kind.Q4_1)
    about = {"METADATA": b"Metadata-Version: 2.1\nName: tiny-base\nVersion: 0.3\nRequires-Dist: nowhere-to-be-found\n",
             "WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    files = {GGUF: gguf.read_bytes(), "tiny_base/pad": bytes(pad)} | {
        f"tiny_base-0.3.dist-info/{name}": data for name, data in about.items()}
    record = "".join(f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},"
                     f"{len(data)}\n" for name, data in files.items())
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in (files | {"tiny_base-0.3.dist-info/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    return folder / WHEEL, gguf


def make_ready(folder: Path, names: tuple[str, ...] = ("law", "code"), **changes: Any) -> Path:
    """A folder of what ships: `mini`, and beside it the wheel, which does not ship. changes: of the manifest's base."""
    (shipped := folder / "weights" / "mini").mkdir(parents=True)
    wheel, gguf = make_wheel(folder)
    exact = upcycle(gguf, folder / "exact", "float32", progress=False).path
    config, _, files = open_checkpoint(exact)
    entries = []
    for seed, name in enumerate(names):
        info = PackageInfo(
            name=name, base=stored_fingerprint(config, files, torch.float32), precision="nf4", layers=(1,), experts=4,
            tokenizer=Tokenizer.load(exact).fingerprint, width=32, hidden=HIDDEN, license="MIT",
            card={"summary": "random numbers"}, evidence={"perplexity": 1.5})
        path = write_package(shipped / f"{name}.safetensors", info, random_tensors(info, seed)).path
        entries.append({"file": path.name, "sha256": sha256(path)})
    write_json(shipped / "calibration.json", {"format": 1, "tokens": GENERAL})
    base: Mapping[str, Any] = {
        "model": "Tiny", "license": "MIT", "requirement": "tiny-base==0.3", "wheel": WHEEL,
        "bytes": wheel.stat().st_size, "sha256": sha256(wheel), "file": GGUF, "file_bytes": gguf.stat().st_size,
        "file_sha256": sha256(gguf)}
    write_json(shipped / "manifest.json", {
        "format": 1, "base": {**base, **changes}, "packages": entries,
        "calibration": {"file": "calibration.json", "sha256": sha256(shipped / "calibration.json")}})
    return folder / "weights"


def edit_manifest(weights: Path, **changes: Any) -> None:
    file = weights / "mini" / "manifest.json"
    keys = json.loads(file.read_text())
    write_json(file, keys | changes)
