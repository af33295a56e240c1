"""Files that are either whole or absent: atomic writes, folder replacement, hashes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Pretty JSON, UTF-8, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success it takes the place of `path` in one step, else it vanishes.

    A folder that is already there is exchanged atomically where the kernel can (Linux), and removed afterwards; a link
    stays, and what it leads to is replaced. Raises NotADirectoryError where `path` is a file.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a folder cannot take the place of a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(path)
    staging.mkdir()
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(staging)
        if not path.exists():
            os.rename(staging, path)
        else:
            _exchange(staging, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes (the same as `sha256sum`)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(a: Path, b: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    retired = b.with_name(f".{b.name}.retired-{os.getpid()}")  # two steps where the kernel has no exchange
    os.rename(b, retired)
    os.rename(a, b)
    shutil.rmtree(retired)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside(path: Path) -> Path:
    """A fresh hidden name next to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
