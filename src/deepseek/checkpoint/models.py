"""Checkpoint folder -> CausalLM, and back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..files import replace_folder, write_json
from ..memory import check_memory
from ..model import CausalLM
from ..model.adapter import UNMERGED
from ..model.adapters import names_on
from ..model.layers import rotary_frequencies
from ..quant.linear import QuantConfig, is_quantized, replace_module
from ..quant.native_stack import NativeStack
from .adapters import apply
from .files import Span, TensorFiles, Tensors, divide, row_blocks, write_manifest, write_tensors
from .names import INDEX, Names, on_disk, outside_index, packed_bytes, quantized_targets, resolve, units
from .several import put_beside, read_several

SHARD_BYTES = 5 << 30
_LAYER, _EXPERT = (re.compile(pattern) for pattern in (r"^model\.layers\.(\d+)\.", r"\.experts\.(\d+)\."))

Dtype = torch.dtype | Literal["auto", "float32", "bfloat16", "float16"]


def open_checkpoint(
    path_or_name: str | Path, *, verify: bool | None = None
) -> tuple[ModelConfig, QuantConfig | None, TensorFiles]:
    """The configuration of a checkpoint, how it is quantized if it is, and its tensors, which have the last word: MTP
    modules that the configuration announces and the files lack are taken out of it (transformers writes the count
    alone), and a head that it ties to the embedding, but that has other values, is untied, with a warning.

    verify: as in `load_model`.
    """
    folder = resolve(path_or_name)
    config = ModelConfig.from_file(folder)
    quant = QuantConfig.of(config, str(folder))
    files = TensorFiles(folder, verify=verify if verify is not None else True if quant is None else "small")
    config = fitted(config, files)
    if config.tie_word_embeddings and has_own_head(files):
        config = config.with_(tie_word_embeddings=False)
    return config, quant, files


def fitted(config: ModelConfig, files: Names | TensorFiles) -> ModelConfig:
    """The configuration without MTP modules that the tensors lack. Raises CheckpointError for other layers or experts
    than they have, before a model of that size is made."""
    if config.num_nextn_predict_layers and not any(f"layers.{config.num_hidden_layers}." in name for name in files):
        config = config.with_(num_nextn_predict_layers=0)
    for key, pattern in (("num_hidden_layers", _LAYER), ("n_routed_experts", _EXPERT)):
        found = max((int(match[1]) + 1 for name in files if (match := pattern.search(name))), default=0)
        if found and found < (want := getattr(config, key)):
            raise CheckpointError(f"{files.folder}: config.json has {key} = {want}, the tensors {found}")
    return config


def load_model(
    path_or_name: str | Path, dtype: Dtype = "auto", device: torch.device | str = "cpu", *, verify: bool | None = None,
    adapter: str | Path | None = None, adapters: Mapping[str, str | Path] | None = None,
) -> CausalLM:
    """Read a checkpoint into a CausalLM in evaluation mode.

    dtype: of all parameters; "auto" takes the checkpoint's own (BF16 for official FP8). Gate biases stay FP32. Of a
    quantized checkpoint: of the activations, always float32; its files are mapped and not read.
    verify: compare every file with the manifest's sizes and hashes where there is a manifest, or (False) not at all;
    None leaves out the hashes of a quantized checkpoint's weights, which would be the only reason to read them all.
    adapter: a folder that tuning left, a delta or a LoRA adapter, to put in; one made for another base is refused.
    adapters: name -> folder of a LoRA adapter, to stand beside the base (model/adapters.py), for inference alone.
    Raises NotFoundError, CheckpointError or ConfigError, each naming the file.
    """
    config, quant, files = open_checkpoint(path_or_name, verify=verify)
    model = CausalLM.on_meta(config)
    if quant is not None:
        if dtype not in ("auto", "float32", torch.float32):
            raise ConfigError(f"dtype = {dtype}: a quantized checkpoint computes in float32 (auto)")
        model = _fill_quantized(model, quant, files, device)
    else:
        check_tensors(model, files)
        model.to(_dtype_of("auto" if adapter or adapters else dtype, files))
        if torch.device(device).type == "cpu":
            check_memory(sum(tensor.nbytes for tensor in model.state_dict().values()), str(files.folder))
        model.to_empty(device=device)
        _restore_buffers(model, config)
        _fill(model, files)
    if adapter is not None:
        apply(model, adapter, verify=verify is not False)
    beside = read_several(model, adapters or {}, verify=verify is not False)
    if adapter is not None or adapters:
        model.requires_grad_(False)
        if quant is None and dtype != "auto":
            to_dtype(model, _dtype_of(dtype, files))
    try:
        model.check_gates()
    except CheckpointError as error:
        raise CheckpointError(f"{files.folder}: {error}") from None
    put_beside(model, beside)
    return model.eval()


def has_own_head(files: TensorFiles) -> bool:
    """Whether there is a plain head that differs from the plain embedding, which config.json denies: then a warning."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if head not in files or table not in files:
        return False
    shape = files.shape(head)
    if shape == files.shape(table) and all(
            torch.equal(*(files.read_rows(name, *rows, torch.float32) for name in (head, table)))
            for rows in row_blocks(shape)):
        return False
    warnings.warn(f"{files.folder}: config.json has tie_word_embeddings = true, but lm_head.weight is not the "
                  "embedding: the head is loaded untied", stacklevel=3)
    return True


def expert_spans(path_or_name: str | Path) -> dict[int, list[Span]]:
    """Where the routed experts of a quantized checkpoint lie, by layer; nothing of layers whose experts are plain, and
    of MTP modules."""
    config, quant, files = open_checkpoint(path_or_name, verify=False)
    if quant is None:
        return {}
    model = CausalLM.on_meta(config)
    layers = {f"model.layers.{layer}.mlp.experts": layer for layer in config.moe_layers}
    return {layers[target.module]: [files.place(f"{unit.stem}.packed") for unit in units(target, config)]
            for target in quantized_targets(model, quant) if target.module in layers}


def to_dtype(model: CausalLM, dtype: torch.dtype) -> CausalLM:
    """Cast the weights in place; gate biases and rotary frequencies stay FP32, as loading leaves them."""
    kept = {name: buffer for name, buffer in model.named_buffers()
            if name.endswith(("e_score_correction_bias", "inv_P"))}
    model.to(dtype)
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    return model


def _restore_buffers(model: CausalLM, config: ModelConfig) -> None:
    """Restore buffers that `to_empty` wiped and the checkpoint does not hold, in FP32."""
    model.model.rotary.inv_P = rotary_frequencies(config).to(model.device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for block in model.moe_blocks().values():
        if config.topk_method == "noaux_tc":
            block.gate.e_score_correction_bias = torch.zeros(config.n_routed_experts, device=model.device)


# Scales were used up with their weights; the others are copies of what the model shares or computes.
_DERIVED = re.compile(
    r".*(_scale_inv|rotary_emb\.inv_freq)|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


def stored_parts(model: CausalLM) -> Iterator[tuple[str, str, Tensor]]:
    """Every tensor as plain files have it: its name here, its name there, and the part of the model that it fills."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield from ((name, *part) for part in on_disk(name, tensor.data, model.config).items())


def check_tensors(model: CausalLM, files: TensorFiles) -> None:
    """Raises CheckpointError where names or shapes are not the model's, which may be on the meta device."""
    used = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing: list[str] = []
    for _, name, place in stored_parts(model):
        if name not in files:
            missing.append(name)
            continue
        used.add(name)
        files.check_plain(name)
        if files.shape(name) != tuple(place.shape):
            raise CheckpointError(f"{files.folder}: {name} has shape {files.shape(name)}, config.json asks for "
                                  f"{tuple(place.shape)}")
    check_names(files, used, missing)


def _fill(model: CausalLM, files: TensorFiles) -> None:
    for _, name, place in stored_parts(model):
        place.copy_(files.read(name, place.dtype))


def check_names(files: Names | Tensors, used: set[str], missing: list[str]) -> None:
    """Raises CheckpointError for tensors that are missing, or that are there and have no place in the model."""
    if missing:
        tied = ": the head of a model whose head is its embedding (then config.json has tie_word_embeddings = true)"
        raise CheckpointError(f"{files.folder}: {len(missing)} tensors are missing, first {missing[0]}"
                              + tied * (missing == ["lm_head.weight"]))
    extra = sorted(name for name in files if name not in used and not _DERIVED.fullmatch(name))
    if extra:
        raise CheckpointError(f"{files.folder}: {len(extra)} tensors have no place in the model, first {extra[0]}")


def _layout(model: CausalLM, quant: QuantConfig | None) -> Iterator[tuple[str, tuple[int, ...], str]]:
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


def check_layout(model: CausalLM, quant: QuantConfig | None, files: Names | TensorFiles) -> None:
    """Raises CheckpointError where names, shapes or kinds are not those of such a checkpoint. Of an index alone, names.
    """
    layout = list(_layout(model, quant))
    used = {"lm_head.weight"} if model.config.tie_word_embeddings and quant is None else set()
    check_names(files, used.union(name for name, *_ in layout), [name for name, *_ in layout if name not in files])
    if isinstance(files, Names):
        return
    for name, shape, kind in layout:
        got, of = files.shape(name), files.dtype(name)
        if got != shape or kind not in ("", of):
            raise CheckpointError(f"{files.file(name)}: {name} is {list(got)} of {of}, must be {list(shape)}"
                                  + (f" of {kind}" if kind else ""))


def _fill_quantized(
    model: CausalLM, quant: QuantConfig, files: TensorFiles, device: torch.device | str
) -> CausalLM:
    """Put quantized modules into a model on the meta device; plain matrices keep their dtype, vectors become FP32."""
    config = model.config
    check_layout(model, quant, files)

    def stored(name: str) -> Tensor:
        tensor = files.read(name)
        if name.endswith(".packed") and tensor.data_ptr() % 64:
            raise CheckpointError(f"{files.file(name)}: {name} does not begin at a multiple of 64 bytes")
        return tensor.to(device)

    tied = config.tie_word_embeddings
    for target in quantized_targets(model, quant):
        parts = [stored(f"{unit.stem}.{part}") for unit in units(target, config)
                 for part in (("codes", "step") if target.kind == "table" else ("packed",))]
        tied = tied and target.module not in ("lm_head", "model.embed_tokens")
        replace_module(model, target, parts, quant.bits)
    plain: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_meta or (name == "lm_head.weight" and tied):
            continue
        pieces = [stored(disk_name) for disk_name in on_disk(name, tensor, config)]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces).view(tensor.shape)
        plain[name] = whole.float() if whole.ndim == 1 else whole
    model.load_state_dict(plain, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary.inv_P = rotary_frequencies(config).to(device)
    model.compute_dtype = torch.float32
    model.layer_runner = NativeStack(model)
    return model.requires_grad_(False).eval()


def _dtype_of(dtype: Dtype, files: TensorFiles) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return stored_dtype(files)
    if dtype not in named:
        raise ConfigError(f"dtype = {dtype!r}: must be auto, float32, bfloat16 or float16")
    return named[dtype]


def stored_dtype(files: TensorFiles) -> torch.dtype:
    """Dtype of a plain checkpoint's weights once loaded: the embedding's; BF16 for anything but FP32 and FP16."""
    stored = next((files.dtype(n) for n in files if n.endswith("embed_tokens.weight")), "BF16")
    return {"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16)


# ---- writing ----------------------------------------------------------------------------------------------------


def save_model(
    model: CausalLM, path: str | Path, *, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES,
    extra_files: Iterable[Path] = (), add: Callable[[Path], None] | None = None,
    elsewhere: Callable[[str], Iterable[Tensor]] = lambda name: (),
) -> Path:
    """Write a checkpoint that transformers loads with no missing and no unexpected tensor; atomic as a folder.

    tokenizer: a Tokenizer to save beside it. extra_files: copied in. add: called with the staging folder, for whatever
    else should appear together with the weights (optimizer state). elsewhere: reads what the model has on the meta
    device, by its name on disk (`write_tensors`). Returns the path.
    """
    if apart := [name for name, module in model.named_modules() if isinstance(module, UNMERGED)]:
        raise CheckpointError(f"{path}: {apart[0]} is still apart from its base: merge it first")
    if beside := list(names_on(model)):
        raise CheckpointError(f"{path}: the adapter {beside[0]} stands beside this model and would not be written: "
                              "load the base without it")
    if is_quantized(model):
        raise CheckpointError(f"{path}: a quantized model is not written again: its checkpoint is what it is, and "
                              "`deepseek quantize IN OUT --format bf16` makes a plain one of it")
    with replace_folder(path) as folder:
        config = model.config.with_(num_nextn_predict_layers=len(model.model.mtp))
        dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
        write_json(folder / "config.json", plain_keys(config, dtype))
        main, mtp = _disk_tensors(model)
        _write_shards(folder, main, shard_bytes, elsewhere)
        if mtp:
            write_tensors(folder / "mtp.safetensors", mtp, elsewhere)
        if tokenizer is not None:
            tokenizer.save(folder)
        for file in extra_files:
            (folder / file.name).write_bytes(file.read_bytes())
        if add is not None:
            add(folder)
        write_manifest(folder)
    return Path(path)


def with_state(model: CausalLM, state: Mapping[str, Tensor]) -> CausalLM:
    """A model of the same shape that has these tensors, and the others on the meta device."""
    other = CausalLM.on_meta(model.config).to(model.lm_head.weight.dtype)
    other.load_state_dict(state, strict=False, assign=True)
    other.model.rotary.inv_P = model.model.rotary.inv_P
    return other


def plain_keys(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Keys of a plain checkpoint's config.json."""
    keys = {k: v for k, v in config.to_dict().items() if k != "dtype"}  # transformers 5's name, of the old file
    return keys | {"torch_dtype": dtype}


def _disk_tensors(model: CausalLM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    main: dict[str, Tensor] = {}
    mtp: dict[str, Tensor] = {}
    for name, disk_name, tensor in stored_parts(model):
        (mtp if outside_index(name, model.config) else main)[disk_name] = tensor
    return main, mtp


def _write_shards(folder: Path, tensors: dict[str, Tensor], shard_bytes: int,
                  elsewhere: Callable[[str], Iterable[Tensor]]) -> None:
    shards = divide(tensors, lambda name: tensors[name].nbytes, shard_bytes)
    for file, names in shards.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, elsewhere)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                                    "weight_map": {name: file for file, names in shards.items() for name in names}})
