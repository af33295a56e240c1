"""A dense model -> a DeepSeek-V3 with a compressed latent: lossy, to be healed (compress.py has the mathematics).

    OUT.run/asked.json                what is made, and how; another one in the same folder is refused
    OUT.run/calibration.safetensors   token ids, [windows, tokens]; every eighth window is held out, to measure the loss
    OUT.run/dense.safetensors         states of that text in the dense model, and the energy of its rotary numbers
    OUT.run/states.safetensors        states of the text in the latent form
    OUT.run/layers/                   the attention of each layer
    OUT.run/unhealed/                 the model before healing (heal.py says what else is there)
    OUT                               the model, with report.json and report.md

The dense model is read twice, a layer at a time; nothing but that layer and the states of the text is in memory, unless
the model writes the text itself or is a teacher. The text goes through the compressed layers, so each is fitted to what
it will be given. What was stopped goes on at its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..checkpoint import TORCH_DTYPES, TensorFiles, save_model, to_dtype
from ..checkpoint.dense import DenseConfig
from ..checkpoint.files import divide
from ..checkpoint.models import plain_keys
from ..config import ModelConfig
from ..convert.dequantizing import DTYPES
from ..convert.upcycling import check_dtype, dtype_name, made_rows
from ..convert.writing import SHARD_BYTES, Part, Writer, copied, free_folder
from ..errors import ConfigError, DataError
from ..files import locked, replace_folder, to_json, write_atomically, write_json
from ..interrupts import kept
from ..model import CausalLM
from ..model.layers import Rotary
from ..model.mla import AttentionContext
from ..ops import linear_cross_entropy, rms_norm
from ..progress import ProgressBar
from ..tokenizer import Tokenizer
from .carve import beside, calibration, claim, layer_file, named, run_folder
from .carve_settings import HealConfig, LatentConfig
from .compress import ROWS, Choice, choose, compressed, fit_output, latent_config, layer_numbers
from .heal import heal
from .source import DenseSource, read

HELD_OUT = 8  # one window of so many
ROTARY = 64  # widest rotary key that is not asked for


@dataclass(frozen=True)
class LatentForm:
    """Result of `latent_form`, which is lossy. rank: numbers of the latent, beside its constant channels; frequencies:
    of the rotary key, how many pairs each of the source's has; errors: of each layer's attention on held-out text,
    |y' - y|^2 / |y|^2; loss: nats a token of that text, of the dense model and of this one before any healing;
    cache: bytes that a token takes there in BF16, of the dense model, its exact form and this one; healing: held-out
    nats a token by name, of the dense model, before and after."""

    path: Path
    rank: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    frequencies: list[int]
    errors: list[float]
    loss: dict[str, float]
    cache: dict[str, int]
    healing: dict[str, dict[str, float]] = field(default_factory=dict)
    lossy: bool = True

    @property
    def healed(self) -> bool:
        return bool(self.healing)

    def __str__(self) -> str:
        lines = [f"lossy: DeepseekV3ForCausalLM with a latent of {self.kv_lora_rank} ({self.rank} numbers and constant "
                 f"channels) and a rotary key of {self.qk_rope_head_dim}",
                 "cache of a token, BF16: " + ", ".join(f"{name} {size:,} bytes" for name, size in self.cache.items()),
                 f"held-out calibration text: {self.loss['dense']:.3f} nats a token, "
                 f"{self.loss['latent']:.3f} after{' (before healing)' if self.healed else ''}"]
        for name in self.healing.get("dense", {}):
            losses = ", ".join(f"{kind} {losses[name]:.3f}" for kind, losses in self.healing.items())
            lines += [f"{name}, held out: {losses} nats a token"]
        if not self.healed:
            lines.append("it needs healing: train it on text, with --heal DATA or `deepseek train`")
        return "\n".join(lines)


def check_latent(dense: DenseConfig, asked: LatentConfig, origin: str) -> tuple[int, int]:
    """(rank, width of the rotary key). Raises ConfigError for what makes no sense for this model."""
    rank, width = asked.latent, asked.latent_rotary or min(dense.head_dim, ROTARY)
    assert rank is not None
    if width % 2 or width > dense.key_width:
        raise ConfigError(f"latent_rotary = {width}: must be even and at most {dense.key_width}, the width of all keys "
                          f"of a token in {origin}")
    most = 2 * dense.key_width - width
    if not 16 <= rank <= most:
        raise ConfigError(f"latent = {rank}: must lie in 16..{most}: beside a rotary key of {width}, keys and values "
                          f"of a token in {origin} have no more numbers")
    return rank, width


def latent_form(
    source: str | Path, out: str | Path, asked: LatentConfig, healing: HealConfig | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto", *, context: int | None = None, overwrite: bool = False,
) -> LatentForm:
    """Write a dense model as a DeepseekV3ForCausalLM with a compressed latent, lossy, and train its attention where
    `healing` has text.

    Other arguments and errors as in `upcycle`; DataError for text that cannot be read or is less than two windows. What
    a stopped call leaves in OUT.run is used by the next one.
    """
    healing = HealConfig() if healing is None else healing
    check_dtype(dtype)
    with locked(out):
        out = free_folder(out, overwrite, source)
        run, places = run_folder(out), named(healing.heal)
        texts = named(asked.calibrate) or places
        model = DenseSource(source, context)
        rank, width = check_latent(model.dense, asked, str(model.files.folder))
        kind = dtype_name(model.files, dtype)
        claim(run, source, texts, asked, dtype, context, places)
        with kept(lambda: f"what is done so far is in {run}"):
            ids_BT = calibration(run, asked, texts, tokenizer_of(model, run),
                                 model.exact.config, model.model)
            if len(ids_BT) < 2:
                raise DataError(f"the calibration text has {len(ids_BT)} window of {ids_BT.shape[1]} tokens: must have "
                                "at least 2 (one measures the loss)")
            result = make_layers(run, model, ids_BT, rank, width, out)
            config = latent_config(model.dense, rank, choice_of(run, model, width))
            if not places:
                publish(out, run, model, config, kind, result)
                return result
            if not (made := run / "unhealed").exists():
                publish(made, run, model, config, kind, result)
            trained, losses = heal(run, lambda dtype: to_dtype(model.model(), dtype), made, places, healing,
                                   ids_BT.shape[1], attention_of)
            result = replace(result, healing=losses)
            save_model(trained, out, tokenizer=Tokenizer.load(made), extra_files=beside(made, run), add=partial(
                add_report, result))
            return result


def attention_of(model: CausalLM) -> list[Tensor]:
    """What healing trains: all projections of attention that are no constants."""
    ends = ("q_proj.weight", "q_b_proj.weight", "mqa.weight", "kv_b_proj.weight", "o_proj.weight", "o_proj.bias")
    return [parameter for name, parameter in model.model.layers.named_parameters() if name.endswith(ends)]


def tokenizer_of(source: DenseSource, run: Path) -> Tokenizer:
    if not source.texts:
        return Tokenizer.load(source.files.folder)
    if not (folder := run / "tokenizer").exists():
        with replace_folder(folder) as staging:
            for name, value in source.texts.items():
                write_json(staging / name, value)
            write_json(staging / "config.json", plain_keys(source.exact.config, "float32"))
    return Tokenizer.load(folder)


# ---- layer by layer -----------------------------------------------------------------------------------------------


def through(file: Path, state: Callable[[], dict[str, Tensor]], layers: int, desc: str,
            step: Callable[[int, dict[str, Tensor]], str]) -> dict[str, Tensor]:
    """Change a state layer by layer, in place; `file` keeps it after each."""
    found, begin = None, 0
    if file.is_file():
        with safe_open(file, framework="pt") as stored:
            begin = int(stored.metadata()["layer"])
        found = load_file(file)
    found = state() if found is None else found
    with ProgressBar(total=layers, initial=begin, desc=desc, unit="layer") as bar:
        for number in range(begin, layers):
            bar.set_postfix_str(step(number, found))
            write_atomically(file, save(found, {"layer": str(number + 1)}))
            bar.update()
    return found


@torch.no_grad()
def make_layers(run: Path, source: DenseSource, ids_BT: Tensor, rank: int, width: int, out: Path) -> LatentForm:
    """Fill OUT.run/layers."""
    held = torch.arange(len(ids_BT)) % HELD_OUT == HELD_OUT - 1
    held[-1] |= not bool(held.any())
    ids_BT = torch.cat([ids_BT[~held], ids_BT[held]])
    fitted = int((~held).sum())
    dense, angles = source.dense, torch.arange(ids_BT.shape[1])[None]
    context = AttentionContext(*Rotary(source.exact.config)(angles))

    def begin() -> Tensor:
        return read(source.files, "model.embed_tokens.weight")[ids_BT]

    def through_dense(number: int, state: dict[str, Tensor]) -> str:
        layer, x_BTH = source.layer(number), state["x"]
        normed_BTH = layer.input_layernorm(x_BTH)
        state["energy"] += layer_numbers(layer.self_attn, normed_BTH[:fitted]).energy_PG
        for x, normed in zip(x_BTH.split(ROWS), normed_BTH.split(ROWS), strict=True):
            x += layer.self_attn(normed, context, number)
            x += layer.mlp(layer.post_attention_layernorm(x))
        return ""

    first = through(run / "dense.safetensors", lambda: {
        "x": begin(), "energy": torch.zeros(dense.head_dim // 2, dense.key_heads)}, dense.layers, "measure",
        through_dense)
    choice = choose(first["energy"], dense, width)
    config = latent_config(dense, rank, choice)
    mine = AttentionContext(*Rotary(config)(angles))
    (run / "layers").mkdir(exist_ok=True)

    def through_latent(number: int, state: dict[str, Tensor]) -> str:
        layer, x_BTH = source.layer(number), state["x"]
        normed_BTH = layer.input_layernorm(x_BTH)
        want_BTH = torch.cat([layer.self_attn(x, context, number) for x in normed_BTH.split(ROWS)])
        mla = compressed(layer.self_attn, normed_BTH[:fitted], context, config, choice, rank)
        stem = f"model.layers.{number}.self_attn."
        for name, tensor in mla.state_dict().items():
            if name.startswith("q_a_"):
                tensor.copy_(torch.cat([*source.exact.rows(stem + name)]))
        got_BTH = fit_output(mla, normed_BTH, want_BTH, mine, fitted)
        error = float((got_BTH - want_BTH)[fitted:].square().sum() / want_BTH[fitted:].square().sum().clamp(min=1e-30))
        write_atomically(run / "layers" / layer_file(number), save(
            {stem + name: tensor for name, tensor in mla.state_dict().items()}, {"error": str(error)}))
        for x, got in zip(x_BTH.split(ROWS), got_BTH.split(ROWS), strict=True):
            x += got
            x += layer.mlp(layer.post_attention_layernorm(x))
        return f"error {error:.3f}"

    second = through(run / "states.safetensors", lambda: {"x": begin()}, dense.layers, "compress", through_latent)
    errors = []
    for number in range(dense.layers):
        with safe_open(run / "layers" / layer_file(number), framework="pt") as file:
            errors.append(float(file.metadata()["error"]))
    cache = {"dense": 2 * dense.key_width, "exact form": source.exact.config.latent_dim, "this": config.latent_dim}
    loss = {name: held_out_loss(source, state["x"][fitted:], ids_BT[fitted:])
            for name, state in (("dense", first), ("latent", second))}
    return LatentForm(out, rank, config.kv_lora_rank, config.qk_rope_head_dim, choice.count_P.tolist(), errors, loss,
                      {name: 2 * numbers * dense.layers for name, numbers in cache.items()})


def choice_of(run: Path, source: DenseSource, width: int) -> Choice:
    return choose(load_file(run / "dense.safetensors")["energy"], source.dense, width)


def held_out_loss(source: DenseSource, x_BTH: Tensor, ids_BT: Tensor) -> float:
    """Nats a token, of states behind the last layer."""
    head = read(source.files, "model.embed_tokens.weight" if source.dense.tied else "lm_head.weight")
    x_BTH = rms_norm(x_BTH, read(source.files, "model.norm.weight"), source.dense.eps)
    return float(linear_cross_entropy(x_BTH[:, :-1].flatten(0, 1), head, ids_BT[:, 1:].flatten()))


# ---- the result ---------------------------------------------------------------------------------------------------


def publish(out: Path, run: Path, source: DenseSource, config: ModelConfig, dtype: str, result: LatentForm) -> None:
    """Write the layers' attention, and the rest of the dense model as it is."""
    layers = TensorFiles(run / "layers", verify=False, names=[layer_file(n) for n in range(source.dense.layers)])
    kind = DTYPES[dtype]
    parts = []
    for name, tensor in CausalLM.on_meta(config).state_dict(keep_vars=True).items():
        if name != "lm_head.weight" or not source.dense.tied:
            rows = partial(copied, layers, name, kind) if name in layers else partial(
                made_rows, source.exact, name, TORCH_DTYPES[kind])
            parts.append(Part(name, kind, tuple(tensor.shape), rows))
    writer = Writer(out, {"latent": config.to_dict(), "dtype": dtype}, source.files, True)
    writer.write(divide(parts, Part.size, 5 * SHARD_BYTES), {}, True)
    add_report(result, writer.folder)
    writer.publish(plain_keys(config, dtype), source.texts)


def add_report(result: LatentForm, folder: Path) -> None:
    keys: dict[str, Any] = asdict(result)
    del keys["path"]
    write_atomically(folder / "report.json", to_json(keys, indent=2) + "\n")
    write_atomically(folder / "report.md", f"{result}\n")
