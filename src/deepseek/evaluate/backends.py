"""What runs a model: our engine, or transformers through the harness' own model class."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from ..checkpoint import resolve
from ..errors import ConfigError, NotFoundError
from ..files import read_json
from ..settings import Device
from .options import Backend

BATCH = 1  # texts that transformers runs together; it keeps the logits of all their tokens


def backend_of(model: str, wanted: Backend = "auto") -> Backend:
    """`engine` or `hf`. Raises NotFoundError for a model that there is not, ConfigError for one that the engine cannot
    run and is to."""
    if (path := _gguf(model)) is not None:
        if not path.is_file():
            raise NotFoundError(f"{model}: no such file")
        if wanted == "engine":
            raise ConfigError(f"{model}: backend = 'engine': must be a folder, as `deepseek upcycle` makes of a "
                              "GGUF file")
        return "hf"
    keys = read_json(resolve(model, weights=False) / "config.json", ConfigError, finite=False)
    ours = str(kind := keys.get("model_type")).startswith("deepseek")
    if wanted == "engine" and not ours:
        raise ConfigError(f"{model}: backend = 'engine': the engine runs DeepSeek's architecture, this is {kind!r}")
    return wanted if wanted != "auto" else "engine" if ours else "hf"


def check_hf() -> None:
    """Raises ConfigError without the libraries that transformers runs models with."""
    if missing := [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"backend = 'hf': needs {missing[0]}: pip install 'moe-dr[eval]'")


def hf_model(model: str, device: Device = "cpu", max_length: int | None = None) -> Any:
    """The harness' class for models in transformers, in float32. max_length: tokens that the model sees at a time, if
    not its whole context. Raises ConfigError for a model that it cannot load."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = _gguf(model)
    where = {"pretrained": str(resolve(model))} if path is None else {
        "pretrained": str(path.parent), "gguf_file": path.name}
    try:
        return HFLM(**where, dtype="float32", device=device, batch_size=BATCH, max_length=max_length)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"{model}: backend = 'hf': transformers cannot load it: {error!s:.300}") from None


def fingerprint(*settings: object, model: str, adapter: str | None = None) -> str:
    """Of settings and of the files of a model and its adapter (their sizes and times, not their bytes)."""
    paths = [_gguf(model) or resolve(model), *([] if adapter is None else [Path(adapter).expanduser()])]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    text = repr([settings, [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _gguf(model: str) -> Path | None:
    path = Path(model).expanduser()
    return path if path.suffix == ".gguf" else None
