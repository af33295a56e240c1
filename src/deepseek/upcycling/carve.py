"""A dense model -> a DeepSeek-V3 of which a share of the FFN is active for a token (grouping.py has the mathematics).

    OUT.run/asked.json         what is carved, and how; another one in the same folder is refused
    OUT.run/dense/             the exact form of the source, all of it active
    OUT.run/calibration.safetensors   token ids, [windows, tokens]
    OUT.run/layers/            the carved FFN of each layer; states.safetensors is what goes into the next one
    OUT.run/carved/            the model before healing (heal.py says what else is there)
    OUT                        the model, with report.json and report.md

One layer is in memory at a time, with its states of the calibration text. The text goes through the carved layers, so
each is fitted to what it will be given. What was stopped goes on at its layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..atlas.sample import draw
from ..checkpoint import TORCH_DTYPES, TensorFiles, load_model, save_model
from ..checkpoint.files import divide
from ..checkpoint.models import plain_keys, stored_dtype, stored_parts
from ..checkpoint.names import on_disk
from ..config import ModelConfig
from ..convert import upcycle
from ..convert.upcycling import open_dense
from ..convert.writing import SHARD_BYTES, Part, Writer, copied, free_folder
from ..data import ReadReport, list_files, read_documents
from ..data.settings import named_paths
from ..errors import ConfigError, DataError
from ..files import locked, read_json, to_json, write_atomically, write_json
from ..info import describe
from ..interrupts import kept
from ..model import CausalLM
from ..model.decoder import DecoderLayer
from ..model.experts import MoE
from ..model.layers import Rotary
from ..model.mla import AttentionContext
from ..progress import ProgressBar
from ..tokenizer import Tokenizer
from .carve_settings import CalibrationConfig, CarveConfig, HealConfig
from .grouping import Division, divide_layer
from .heal import heal

WINDOW = 512  # tokens, or the whole context where that is shorter
ROWS = 8  # windows that go through attention, and texts that are written, at a time


@dataclass(frozen=True)
class Carved:
    """Result of `carve`. share: of the FFN's weights that is active, over all layers; errors: of each carved layer's
    output on the calibration text, |y' - y|^2 / |y|^2; parameters, active: of the whole model; flops: a token's, at a
    context of 512; bytes: that decoding a token reads, by format; losses: held-out nats a token by name, of the dense
    model, before and after healing."""

    path: Path
    share: float
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    errors: dict[int, float]
    parameters: int
    active: int
    flops: int
    bytes: dict[str, int]
    dense_flops: int
    dense_bytes: dict[str, int]
    losses: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n\n".join([self.about(), *([self.table()] if self.losses else [])])

    def table(self) -> str:
        """Held-out perplexity of each name's text, in Markdown."""
        lines = ["| perplexity | " + " | ".join(self.losses["dense"]) + " |",
                 "| --- |" + " --- |" * len(self.losses["dense"])]
        for kind, losses in self.losses.items():
            lines.append(f"| {kind} | " + " | ".join(f"{math.exp(loss):.2f}" for loss in losses.values()) + " |")
        return "\n".join(lines)

    def about(self) -> str:
        saved = ", ".join(f"{name} {self.dense_bytes[name] / 2**20:.1f} -> {self.bytes[name] / 2**20:.1f} MiB"
                          for name in self.bytes)
        return (f"{self.share:.1%} of the FFN active: {self.experts_per_token} of {self.experts} experts of "
                f"{self.expert_width} neurons and {self.shared_width} shared ones a layer; a token reads {saved}, "
                f"{self.dense_flops / 1e6:.0f} -> {self.flops / 1e6:.0f} MFLOPs")


def carved_config(dense: ModelConfig, asked: CarveConfig) -> ModelConfig:
    """The configuration that comes nearest to the share asked for. Raises ConfigError, naming the setting, where the
    FFN cannot be divided so."""
    assert asked.carve is not None
    wide, width, layers, first = (dense.intermediate_size, asked.expert_width, dense.num_hidden_layers,
                                  asked.dense_layers)
    if wide % width:
        raise ConfigError(f"expert_width = {width}: must divide the FFN's {wide} neurons")
    if first >= layers:
        raise ConfigError(f"dense_layers = {first}: must be less than the model's {layers} layers")
    shared = round(asked.always_active * wide / width)
    experts = wide // width - shared
    if experts < 2:
        raise ConfigError(f"expert_width = {width}, always_active = {asked.always_active}: must leave at least 2 "
                          f"experts of the FFN's {wide} neurons")
    per_layer = (asked.carve * layers - first) * wide / (layers - first)
    top = min(experts, round(per_layer / width) - shared)
    if top < 1:
        least = (first + (layers - first) * (shared + 1) * width / wide) / layers
        raise ConfigError(f"carve = {asked.carve}: must be at least {least:.3f} with dense_layers = {first} of {layers}"
                          f", always_active = {asked.always_active} and one expert of {width}")
    return dense.with_(
        first_k_dense_replace=first, moe_intermediate_size=width, n_routed_experts=experts, num_experts_per_tok=top,
        n_shared_experts=shared, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=float(top))


def active_share(config: ModelConfig) -> float:
    """Share of the FFN's weights that is active for a token, over all layers."""
    first, layers = config.first_k_dense_replace, config.num_hidden_layers
    width = ((config.n_shared_experts or 0) + config.num_experts_per_tok) * config.moe_intermediate_size
    return (first * config.intermediate_size + (layers - first) * width) / (layers * config.intermediate_size)


def carve(
    source: str | Path, out: str | Path, asked: CarveConfig, healing: HealConfig | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto", *, context: int | None = None, overwrite: bool = False,
) -> Carved:
    """Write a dense model as a DeepseekV3ForCausalLM with routed experts made of its own neurons, and train these where
    `healing` has text.

    Other arguments and errors as in `upcycle`; DataError for text that cannot be read. What a stopped call leaves in
    OUT.run is used by the next one.
    """
    healing = HealConfig() if healing is None else healing
    with locked(out):
        out = free_folder(out, overwrite, source)
        run = run_folder(out)
        places = named(healing.heal)
        texts = named(asked.calibrate) or places
        claim(run, source, texts, asked, dtype, context, places)
        with kept(lambda: f"what is done so far is in {run}"):
            dense = dense_form(source, run, dtype, context)
            files = TensorFiles(dense, verify="small")
            config = carved_config(ModelConfig.from_file(dense), asked)
            ids_BT = calibration(run, asked, texts, Tokenizer.load(dense),
                                 ModelConfig.from_file(dense), partial(load_model, dense, torch.float32))
            carve_layers(run, files, config, asked, ids_BT)
            result = figures(out, files, run / "layers", config)
            if not places:
                publish(out, run, files, config, result)
                return result
            if not (made := run / "carved").exists():
                publish(made, run, files, config, result)
            model, losses = heal(run, partial(load_model, dense), made, places, healing, ids_BT.shape[1],
                                 lambda model: [p for block in model.moe_blocks().values() for p in block.parameters()])
            result = replace(result, losses=losses)
            save_model(model, out, tokenizer=Tokenizer.load(dense), extra_files=beside(dense, run), add=partial(
                add_report, result))
            return result


def beside(model: Path, run: Path) -> list[Path]:
    """Files that go along with a healed model."""
    return [path for path in model.iterdir() if path.name.startswith("LICENSE")
            or path.name == "generation_config.json"] + [run / "heal" / "loss.png"]


def add_report(result: Carved, folder: Path) -> None:
    for name, value in reports(result).items():
        write_atomically(folder / name, value)


def reports(result: Carved) -> dict[str, str]:
    """Files by name."""
    keys = asdict(result) | {"errors": {str(layer): error for layer, error in result.errors.items()}}
    del keys["path"]
    return {"report.json": to_json(keys, indent=2) + "\n", "report.md": f"{result}\n"}


def run_folder(out: Path) -> Path:
    """Where the work on OUT lies."""
    return out.with_name(f"{out.resolve().name}.run")


def claim(run: Path, source: str | Path, texts: Mapping[str, Sequence[str]], asked: CalibrationConfig, dtype: str,
          context: int | None, heal: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError where the folder holds another model, or one that is made otherwise or of other text, and
    DataError where a text is not there. What trains it is not asked: the loop of `heal` asks that."""

    def about(files: Iterable[Path]) -> dict[str, list[int]]:
        return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}

    for paths in heal.values():
        [*list_files(paths)]  # a wrong one is said before the work
    files, _, _ = open_dense(source)
    key = asdict(asked) | {
        "calibrate": {name: about(list_files(paths)) for name, paths in texts.items()}, "dtype": dtype,
        "context": context, "source": about(sorted({files.file(name) for name in files}))}
    key, path = json.loads(json.dumps(key, allow_nan=False)), run / "asked.json"
    if path.is_file():
        for name, value in read_json(path, ConfigError).items():
            if key.get(name) != value:
                raise ConfigError(f"{run}: holds the beginning of another model, of {name} = {value!r:.100}: remove it "
                                  "to start this one")
        return
    run.mkdir(parents=True, exist_ok=True)
    write_json(path, key)


def dense_form(source: str | Path, run: Path, dtype: Any, context: int | None) -> Path:
    """The source as a DeepSeek-V3 that computes the same."""
    path = run / "dense"
    if not (path / "config.json").is_file():
        upcycle(source, path, dtype, context=context)
    return path


# ---- calibration text ---------------------------------------------------------------------------------------------


def calibration(run: Path, asked: CalibrationConfig, places: Mapping[str, Sequence[str]], tokenizer: Tokenizer,
                config: ModelConfig, load: Callable[[], CausalLM]) -> Tensor:
    """Windows of token ids, [B, T], drawn once, or written by the model that `load` loads where no text is given."""
    file = run / "calibration.safetensors"
    if not file.is_file():
        length = min(WINDOW, config.max_position_embeddings)
        ids_BT = (sampled(places, tokenizer, asked.calibration_tokens, length, asked.calibration_seed) if places else
                  written(load(), tokenizer, asked.calibration_tokens, length, asked.calibration_seed))
        write_atomically(file, save({"ids": ids_BT}))
    return load_file(file)["ids"]


def named(words: Sequence[str]) -> dict[str, list[str]]:
    """{name: its paths} of words that read NAME=PATH or PATH, which is named "text"."""
    spelled = [word if "=" in word and not Path(word).exists() else f"text={word}" for word in words]
    return named_paths(spelled, "DATA")


def sampled(places: Mapping[str, Sequence[str]], tokenizer: Tokenizer, tokens: int, length: int, seed: int) -> Tensor:
    """Windows of the same number of tokens from each name's text."""
    rows = []
    for name, paths in places.items():
        found = draw(name, read_documents(paths, ReadReport()), tokenizer, seq_len=length,
                     tokens=-(-tokens // len(places)), seed=seed)
        ids = [i for window in found.windows for i in window.ids]
        rows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise DataError(f"the text of {', '.join(places)} has less than one window of {length} tokens")
    return torch.tensor(rows)


@torch.inference_mode()
def written(model: CausalLM, tokenizer: Tokenizer, tokens: int, length: int, seed: int) -> Tensor:
    """Windows that the model writes from the beginning of text, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    windows = -(-tokens // length)
    ids_BT = torch.full((windows, length), 0 if first is None else first)
    with ProgressBar(total=windows * (length - 1), desc="write calibration text", unit="token", unit_scale=True) as bar:
        for rows_BT in ids_BT.split(4 * ROWS):
            cache = model.new_cache(len(rows_BT), length)
            for t in range(1, length):
                logits_BV = model(rows_BT[:, t - 1 : t], cache=cache)[:, -1]
                rows_BT[:, t] = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
                bar.update(len(rows_BT))
    return ids_BT.clone()


# ---- layer by layer -----------------------------------------------------------------------------------------------


@torch.no_grad()
def carve_layers(run: Path, files: TensorFiles, config: ModelConfig, asked: CarveConfig, ids_BT: Tensor) -> None:
    """Fill OUT.run/layers."""
    folder, states = run / "layers", run / "states.safetensors"
    if (folder / "done").is_file():
        return
    folder.mkdir(exist_ok=True)
    begin = 0
    if states.is_file():
        with safe_open(states, framework="pt") as file:
            begin = int(file.metadata()["layer"])
        x_BTH = load_file(states)["x"]
    else:
        x_BTH = files.read("model.embed_tokens.weight")[ids_BT].float()
    cos, sin = Rotary(config)(torch.arange(ids_BT.shape[1])[None])
    context = AttentionContext(cos, sin)
    with ProgressBar(total=config.num_hidden_layers, initial=begin, desc="carve", unit="layer") as bar:
        for number in range(begin, config.num_hidden_layers):
            carved = carve_layer(files, config, asked, number, x_BTH, context)
            if carved is not None:
                write_atomically(folder / layer_file(number), save(*carved))
                bar.set_postfix_str(f"error {float(carved[1]['error']):.3f}")
            write_atomically(states, save({"x": x_BTH}, {"layer": str(number + 1)}))
            bar.update()
    (folder / "done").touch()
    states.unlink()


def layer_file(number: int) -> str:
    return f"layer-{number:04d}.safetensors"


def carve_layer(files: TensorFiles, config: ModelConfig, asked: CarveConfig, number: int, x_BTH: Tensor,
                context: AttentionContext) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """A layer's carved FFN by names on disk, with its error; None of a layer that stays dense. x_BTH goes through."""
    layer = DecoderLayer(config.with_(first_k_dense_replace=config.num_hidden_layers), number)
    for name, tensor in layer.state_dict().items():
        tensor.copy_(files.read(f"model.layers.{number}.{name}"))
    normed_BTH = torch.empty_like(x_BTH)
    for x, normed in zip(x_BTH.split(ROWS), normed_BTH.split(ROWS), strict=True):
        x += layer.self_attn(layer.input_layernorm(x), context, number)
        normed.copy_(layer.post_attention_layernorm(x))
    if not config.is_moe(number):
        for x, normed in zip(x_BTH.split(ROWS), normed_BTH.split(ROWS), strict=True):
            x += layer.mlp(normed)
        return None
    gate_IH, up_IH, down_HI = (getattr(layer.mlp, f"{part}_proj").weight for part in ("gate", "up", "down"))
    found = divide_layer(normed_BTH.flatten(0, 1), x_BTH.flatten(0, 1), gate_IH, up_IH, down_HI, config, number,
                         asked.refit)
    moe = block(found, gate_IH, up_IH, config)
    for x, normed in zip(x_BTH.split(ROWS), normed_BTH.split(ROWS), strict=True):
        x += moe(normed)[0]
    tensors = {disk_name: part.contiguous() for name, tensor in moe.state_dict().items()
               for disk_name, part in on_disk(f"model.layers.{number}.mlp.{name}", tensor, config).items()}
    return tensors, {"error": str(found.error)}


def block(found: Division, gate_IH: Tensor, up_IH: Tensor, config: ModelConfig) -> MoE:
    """The carved FFN of a layer."""
    moe, width = MoE(config), config.moe_intermediate_size
    shared = width * (config.n_shared_experts or 0)
    gate_IH, up_IH = gate_IH[found.order_I], up_IH[found.order_I]
    moe.gate.weight.copy_(found.row_EH)
    moe.gate.e_score_correction_bias.copy_(found.bias_E)
    routed_EIH = (tensor[shared:].unflatten(0, (-1, width)) for tensor in (gate_IH, up_IH))
    moe.experts.gate_up_proj.copy_(torch.cat([*routed_EIH], 1))
    moe.experts.down_proj.copy_(found.down_HI[:, shared:].unflatten(1, (-1, width)).transpose(0, 1))
    if shared:
        for part, tensor in (("gate", gate_IH[:shared]), ("up", up_IH[:shared]), ("down", found.down_HI[:, :shared])):
            getattr(moe.shared_experts, f"{part}_proj").weight.copy_(tensor)
    return moe


# ---- the result ---------------------------------------------------------------------------------------------------


def publish(out: Path, run: Path, files: TensorFiles, config: ModelConfig, result: Carved) -> None:
    """Write the carved layers, and what the dense form has beside its FFN."""
    layers = TensorFiles(run / "layers", verify=False, names=[layer_file(number) for number in config.moe_layers])
    kind = next(name for name, dtype in TORCH_DTYPES.items() if dtype == stored_dtype(files))
    parts = []
    for name, disk_name, tensor in stored_parts(CausalLM.on_meta(config)):
        dtype = "F32" if name.endswith("correction_bias") else kind
        parts.append(Part(disk_name, dtype, tuple(tensor.shape), partial(
            copied, layers if disk_name in layers else files, disk_name, dtype)))
    parts.sort(key=lambda part: part.rank)
    writer = Writer(out, {"carved": config.to_dict()}, files, True)
    writer.write(divide(parts, Part.size, 5 * SHARD_BYTES), {}, True)
    add_report(result, writer.folder)
    writer.publish(plain_keys(config, str(TORCH_DTYPES[kind]).removeprefix("torch.")), {})


def figures(out: Path, files: TensorFiles, layers: Path, config: ModelConfig) -> Carved:
    """The accounts of the carved model and of the dense one."""
    mine, dense = (describe(one, context=WINDOW) for one in (config, ModelConfig.from_file(files.folder)))
    errors = {}
    for number in config.moe_layers:
        with safe_open(layers / layer_file(number), framework="pt") as file:
            errors[number] = float(file.metadata()["error"])
    formats = ("BF16", "NF4")
    return Carved(
        out, active_share(config), config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size,
        config.moe_intermediate_size * (config.n_shared_experts or 0), errors, mine.total, mine.active, mine.flops,
        {name: mine.in_format(name).read for name in formats}, dense.flops,
        {name: dense.in_format(name).read for name in formats})
