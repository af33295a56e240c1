"""Which base a delta or an adapter belongs to: its tensors under their names on disk, their hashes, one fingerprint.

A fingerprint stands for the function that the main model computes: the tensors it runs on, and those values of
config.json that the tensors' names and shapes leave open (a rotary base, the experts a token gets, YaRN). MTP modules
are no part of it: nothing of them is in that function, tuning does not train them, and a checkpoint with its MTP
modules is the same base as one that lost them (transformers loads none). docs/formats.md defines it to the byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..model import CausalLM
from ..model.adapter import UNMERGED
from ..progress import ProgressBar
from ..quant.linear import QuantizedExperts, is_quantized
from .files import TensorFiles, row_blocks
from .names import on_disk

# of config.json, what changes the logits of the same tensors
FUNCTION_KEYS = (
    "num_attention_heads num_experts_per_tok n_group topk_group topk_method scoring_func norm_topk_prob "
    "routed_scaling_factor qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta rope_interleave rms_norm_eps "
    "tie_word_embeddings hidden_act").split()

Progress = Callable[[int, int], None]


def base_tensors(model: CausalLM) -> dict[str, Tensor]:
    """Every tensor of the base under its name on disk, whatever tuning has put around it; views, nothing is copied."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            state |= {f"{name.replace('.base', '')}.{e}.packed": packed for e, packed in enumerate(module.table)}
    for name, tensor in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, UNMERGED):
            state[name.replace(".base.", ".")] = tensor
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        out |= on_disk(name, tensor, model.config)
    return out


def tensor_hashes(model: CausalLM, progress: Progress | None = None) -> dict[str, str]:
    """Name on disk -> SHA-256 of dtype, shape and bytes, of every tensor of the base. progress: (done, all)."""
    tensors = base_tensors(model)
    out: dict[str, str] = {}
    for name, tensor in tensors.items():
        out[name] = digest_of(tensor.dtype, tuple(tensor.shape), [tensor])
        if progress is not None:
            progress(len(out), len(tensors))
    return out


def stored_fingerprint(config: ModelConfig, files: TensorFiles, dtype: torch.dtype, progress: bool = False) -> str:
    """`fingerprint` of the model that `load_model` makes of a plain checkpoint with weights of `dtype`, read some
    megabytes at a time."""
    tensors = base_tensors(CausalLM.on_meta(config.with_(num_nextn_predict_layers=0)))
    out: dict[str, str] = {}
    for name, tensor in ProgressBar(tensors.items(), desc="hash the source", unit="tensor", leave=False,
                                    disable=not progress):
        kind, shape = torch.float32 if name.endswith("correction_bias") else dtype, tuple(tensor.shape)
        out[name] = digest_of(kind, shape, (files.read_rows(name, *rows, kind) for rows in row_blocks(shape)))
    return fingerprint(out, config)


def digest_of(dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(f"{dtype} {list(shape)} ".encode())
    for block in blocks:
        digest.update(block.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(hashes: Mapping[str, str], config: ModelConfig) -> str:
    """One hash of a base, from those of its tensors (`tensor_hashes`) and its configuration; see above."""
    tensors = sorted((name, digest) for name, digest in hashes.items() if not _of_mtp(name, config))
    keys = {key: getattr(config, key) for key in FUNCTION_KEYS} | {
        "rope_scaling": None if (scaling := config.yarn or config.longrope) is None else asdict(scaling)}
    return hashlib.sha256(json.dumps([_with_floats(keys), tensors], sort_keys=True).encode()).hexdigest()


def _with_floats(value: Any) -> Any:
    """10000 and 10000.0 are one number; so they must be in JSON."""
    if isinstance(value, dict):
        return {key: _with_floats(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_with_floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _of_mtp(name: str, config: ModelConfig) -> bool:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= config.num_hidden_layers


def source_of(model: CausalLM) -> str | None:
    """The fingerprint of the checkpoint that a quantized model was made from, where the conversion noted it."""
    if not is_quantized(model):
        return None
    source = (model.config.extra.get("quantization_config") or {}).get("source")
    return source if isinstance(source, str) else None


def fingerprints(model: CausalLM) -> list[str]:
    """Those by which adapters may know a model: its own, and its source's where it is quantized."""
    return [fingerprint(tensor_hashes(model), model.config), *filter(None, [source_of(model)])]


def check_base(there: Sequence[str], made_for: Sequence[str], what: object, name: str = "") -> None:
    """Raises CheckpointError, naming `what`, unless one of the fingerprints `there`, a base's own and its source's, is
    one that the adapter was made for. name: where the adapter's base was."""
    if not set(there) & set(made_for):
        wanted, found = (" or ".join(f"{value[:16]}…" for value in values) for values in (made_for, there))
        raise CheckpointError(f"{what}: made for another base: its hash is {wanted}{f' ({name})' if name else ''}, "
                              f"that of this model {found}: names and shapes are the same; weights, or what "
                              "config.json says of their use, are not")
