"""Whether a checkpoint's layout loads here: config.json, names, shapes and kinds of the tensors, tokenizer. Of the
weights only headers are read; where none of them is there (a download to come), the index tells their names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..config import ModelConfig
from ..errors import MoEDRError
from ..model import CausalLM
from ..quant.linear import QuantConfig
from ..tokenizer import Tokenizer
from .files import TensorFiles
from .models import check_layout, check_tensors, fitted
from .names import INDEX, Names, other_weights, weight_map_of


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
    else:
        check_layout(model, quant, files)
