"""Whether a checkpoint's layout loads here: config.json, names, shapes and kinds of the tensors, tokenizer. Of the
weights only headers are read; where none of them is there (a download to come), the index tells their names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..config import ModelConfig
from ..errors import CheckpointError, MoEDRError
from ..model import CausalLM
from ..quant.linear import QuantConfig
from ..tokenizer import Tokenizer
from .files import TensorFiles
from .models import check_names, check_tensors, fitted
from .names import INDEX, Names, on_disk, other_weights, packed_bytes, quantized_targets, units, weight_map_of


class Verdict(NamedTuple):
    """because: why the layout does not load; None where it does. about: what was looked at."""

    because: str | None
    about: str = ""

    def __str__(self) -> str:
        """The last line of `deepseek info`."""
        return f"loads here: no, because {self.because}" if self.because else f"loads here: yes ({self.about})"


def verdict(folder: Path) -> Verdict:
    """Check a checkpoint folder; faults are reported in the verdict, not raised."""
    try:
        config = ModelConfig.from_file(folder)
        config, weights = _weights(folder, config, QuantConfig.of(config, str(folder)))
        tokenizer = Tokenizer.load(folder)
    except MoEDRError as error:
        return Verdict(str(error))
    read = "tokenizer.json" if list(folder.glob("tokenizer.json*")) else "tiktoken.model, converted"
    more = tokenizer.vocab_size - config.vocab_size
    return Verdict(None, f"{weights}; {read}: {tokenizer.vocab_size:,} tokens"
                   + (f", {more:,} more than the model has: a prompt with one of them is refused" if more > 0 else ""))


def _weights(folder: Path, config: ModelConfig, quant: QuantConfig | None) -> tuple[ModelConfig, str]:
    """The configuration as loading would have it, and what the weights are. Raises CheckpointError."""
    index = folder / INDEX
    wanted = sorted(set(weight_map_of(index).values())) if index.is_file() else []
    missing = [name for name in wanted if not (folder / name).is_file()]
    to_come = not other_weights(folder) if missing == wanted else folder.parent.name == "snapshots"  # the hub's cache
    if missing and to_come:
        names = Names(weight_map_of(index), folder)
        config = fitted(config, names)
        _check(config, quant, names)
        return config, f"by its index: {len(missing)} of its {len(wanted)} files of weights are not here"
    files = TensorFiles(folder, verify="small")
    config = fitted(config, files)
    _check(config, quant, files)
    kinds = {files.dtype(name) for name in files}
    scaled = [text for kind, text in (("I4", "compressed-tensors' int4"), ("F8_E4M3", "FP8")) if kind in kinds]
    return config, quant.format if quant else " and ".join(scaled) or "/".join(sorted(kinds))


def _check(config: ModelConfig, quant: QuantConfig | None, files: Names | TensorFiles) -> None:
    model = CausalLM.on_meta(config)
    if quant is None and isinstance(files, TensorFiles):
        check_tensors(model, files)
        return
    stored = list(_stored(model, quant))
    used = {"lm_head.weight"} if config.tie_word_embeddings and quant is None else set()
    check_names(files, used.union(name for name, *_ in stored), [name for name, *_ in stored if name not in files])
    if isinstance(files, TensorFiles):
        for name, shape, kind in stored:
            got, of = files.shape(name), files.dtype(name)
            if got != shape or kind not in ("", of):
                raise CheckpointError(f"{files.file(name)}: {name} is {list(got)} of {of}, must be {list(shape)}"
                                      + (f" of {kind}" if kind else ""))


def _stored(model: CausalLM, quant: QuantConfig | None) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name on disk, shape, dtype or "" for any) of everything that a checkpoint of such a model holds."""
    config, chosen = model.config, [] if quant is None else quantized_targets(model, quant)
    for target in chosen:
        assert quant is not None
        for unit in units(target, config):
            if target.kind == "table":
                yield f"{unit.stem}.codes", (target.rows, target.columns), "I8"
                yield f"{unit.stem}.step", (target.rows,), "F32"
            else:
                yield f"{unit.stem}.packed", (packed_bytes(target, quant.bits),), "U8"
    inside = tuple(f"{target.module}." for target in chosen)
    apart = {"lm_head", "model.embed_tokens"} & {target.module for target in chosen}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (name.startswith(inside) and not name.endswith(".bias")) or (
                name == "lm_head.weight" and config.tie_word_embeddings and not apart):
            continue
        yield from ((disk_name, tuple(piece.shape), "") for disk_name, piece in on_disk(name, tensor, config).items())
