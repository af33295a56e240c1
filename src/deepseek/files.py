"""Files that are either whole or absent: atomic writes, folder replacement, locks, hashes; YAML within bounds."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePath
from typing import IO, Any

from .errors import ConfigError, DataError, MoEDRError, NotFoundError

CACHE = "DEEPSEEK_CACHE"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_YAML_BYTES, _DEPTH = 8 << 20, 64
# YAML 1.2, 10.3.2, without integers
_YAML_FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$")


def cache_folder() -> Path:
    """The user's folder for what can be made again."""
    if own := os.environ.get(CACHE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepseek"


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
    write_atomically(path, to_json(value, indent=2, ensure_ascii=False) + "\n")


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for a number that is not finite: JSON has no NaN, though Python writes it."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_nulls(value), allow_nan=False, **options)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key) if isinstance(key, float) else key: _with_nulls(inner) for key, inner in value.items()}
    return [_with_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_json(
    path: str | Path, error: type[MoEDRError] = DataError, what: str = "", *, finite: bool = True
) -> dict[str, Any]:
    """The object of a JSON file. Raises NotFoundError, or `error` with the file, `what` it then is not ("not an index")
    and the mistake: another kind of value, no UTF-8, no JSON (a lone surrogate is none, nor are NaN and numbers beyond
    floats, if `finite`), one key with two values."""
    with reading(path, error, what):
        try:
            text = _text_of(Path(path))
        except UnicodeDecodeError as failure:
            raise ValueError(f"not valid JSON: {not_utf8(failure)}") from None
        return parse_json(text, finite=finite)


@contextlib.contextmanager
def reading(path: str | Path, error: type[MoEDRError], what: str = "") -> Iterator[None]:
    """Raises NotFoundError for a missing file, and for an OSError or ValueError `error` with the file, `what` it then
    is not, and the mistake."""
    start = f"{path}: {what}: " if what else f"{path}: "
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as failure:
        raise error(f"{start}{not_utf8(failure)}") from None
    except OSError as failure:
        raise error(f"{start}cannot be read: {failure.strerror or failure}") from None
    except ValueError as failure:
        raise error(f"{start}{failure}") from None


def parse_json(text: str, *, finite: bool = True) -> dict[str, Any]:
    """The object of a JSON text. Raises ValueError with the mistake, as `read_json` says."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if isinstance(value, dict | list) and (odd := not_finite(value)) and finite:
            raise ValueError(f"{odd} is no number of JSON")
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("not valid JSON: a text has half a character (a lone surrogate)") from None
    except RecursionError:
        raise ValueError(f"not valid JSON: must be nested at most {_DEPTH} deep") from None
    except ValueError as failure:  # a number of thousands of digits, say
        raise ValueError(f"not valid JSON: {failure}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        for key, item in pairs:
            if repr(item) != repr(value[key]):
                raise ValueError(f"the key {key!r:.60} comes twice with different values")
    return value


def not_finite(value: Any) -> str | None:
    """The first number in a value that JSON has not, with the keys that lead to it; None where there is none. Raises
    ValueError for one that is nested more than 64 deep, which other steps could not write again."""
    todo: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while todo:
        path, item = todo.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                return ": ".join(map(str, (*path, item)))
            continue
        inside = item.items() if isinstance(item, dict) else enumerate(item)
        parts = [((*path, key), one) for key, one in inside if isinstance(one, float | dict | list | tuple)]
        if parts and len(path) >= _DEPTH:
            raise ValueError(f"must be nested at most {_DEPTH} deep")
        todo += reversed(parts)
    return None


def _text_of(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "must be a file")  # a pipe would be waited for
    return path.read_text(encoding="utf-8")


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with a text, for a message that names its file."""
    return f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"


def read_text(path: str | Path, error: type[MoEDRError] = DataError) -> str:
    """The text of a UTF-8 file. Raises NotFoundError, or `error` with the file and the mistake."""
    with reading(path, error):
        return _text_of(Path(path))


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
            exchange(staging, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def take_lock(file: IO[Any] | int, path: str | Path) -> None:
    """Lock an open file until it is closed or the process ends. Raises ConfigError where another has it: `path` is what
    the message names."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process
    except BlockingIOError:
        raise ConfigError(f"{path}: another process is writing it") from None


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one process at a time write the file or folder `path`, by a lock on a hidden file beside it, which is removed
    afterwards, and with it the parents made for it that are still empty. A folder whose parent cannot be written (a
    mount of a container) is locked itself. Raises ConfigError where another process (or thread) is writing it."""
    path = Path(path).resolve()
    beside = path.parent / f".{path.name}.lock"
    if path.is_dir() and not os.access(path.parent, os.W_OK):
        folder = os.open(path, os.O_RDONLY)
        try:
            take_lock(folder, path)
            yield
        finally:
            os.close(folder)
        return
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with beside.open("a") as file:
            take_lock(file, path)
            if not is_file_at(file, beside):  # its last holder has removed it in between
                continue
            try:
                yield
            finally:
                beside.unlink(missing_ok=True)
                for parent in made:
                    with contextlib.suppress(OSError):  # in use
                        parent.rmdir()
            return


def is_file_at(file: IO[Any], path: Path) -> bool:
    """Whether `path` still leads to this open file: it has been neither deleted nor replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def leads_out(name: str) -> bool:
    """Whether a file name from a manifest leads out of the manifest's folder, by its spelling."""
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML (or JSON) file. Raises NotFoundError, or ConfigError with the file and the mistake, which may
    be that it is larger than 8 MiB, deeper than 64 levels, has a key twice, or grows many times over by its aliases."""
    import yaml

    try:
        with open(path, "rb") as file:  # a device or a pipe does not tell its size
            if len(raw := file.read(_YAML_BYTES + 1)) > _YAML_BYTES:
                raise ConfigError(f"{path}: must be at most {_YAML_BYTES:,} bytes of YAML")
        loader = _yaml_loader()(raw.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            sizes: dict[int, int] = {}
            grown = _expanded(node, sizes, 0)
            if grown > 10 * len(sizes) + 10_000:
                raise ValueError(f"its aliases make {grown:,} values of {len(sizes):,}")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, OSError, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: must be nested at most {_DEPTH} deep") from None


@cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, which follows YAML 1.1, with YAML 1.2's rule for floats too: 1e-5 is a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_FLOAT, list("-+.0123456789"))
    return Loader


def _expanded(node: Any, sizes: dict[int, int], depth: int) -> int:
    """Values under a YAML node, those of aliases counted wherever they stand. `sizes` is filled: 0 marks a node whose
    inside is being counted."""
    if depth > _DEPTH:
        raise RecursionError
    if (known := sizes.get(id(node))) is not None:
        if not known:
            raise ValueError("an alias stands inside what it names")
        return known
    sizes[id(node)] = 0
    keys = set()
    for key, _ in node.value if node.id == "mapping" else ():
        if isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in keys:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            keys.add(key.value)
    inside = [node.value] if isinstance(node.value, str) else node.value
    parts = (part for item in inside for part in (item if isinstance(item, tuple) else (item,)))
    sizes[id(node)] = total = 1 + sum(_expanded(part, sizes, depth + 1) for part in parts if not isinstance(part, str))
    return total


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes (the same as `sha256sum`)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exchange(a: Path, b: Path) -> None:
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
