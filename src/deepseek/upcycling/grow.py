"""Named experts grown beside the FFNs of a dense model, which is not touched.

A grown model (convert/grown.py) keeps each dense FFN whole, as the shared expert, and has a routing group for each
name. The new experts start as copies of the FFN's neurons with output zero, so that nothing changes at the start; then
they and the gates' rows learn the text of their names, and to stay closed for all other text. Each name becomes a
package, which works without the others.

    OUT/gates.safetensors       gate rows as fitted before training
    OUT/settings.json, checkpoint-N/, log.jsonl, loss.png      as in training (deepopt/loop.py)
    OUT/packages/NAME.safetensors
    OUT/model                   the base with these packages installed
    OUT/report.json, names.png  loss by name before and after, routing accuracy
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..checkpoint import fingerprint, load_model, resolve, tensor_hashes
from ..checkpoint.packages import PackageInfo, bias_name, gate_name, plain_names, write_package
from ..convert import install, upcycle
from ..convert.grown import GrownModel, grown_config, start
from ..convert.writing import stamps
from ..data import ReadReport, RecordMap
from ..deepopt.device import compute_dtype
from ..errors import CheckpointError, ConfigError, NotFoundError
from ..files import locked, read_json, replace_folder, to_json, write_atomically, write_json
from ..model import CausalLM
from ..tokenizer import Tokenizer
from ..tune.records import RecordSet, each_record
from .gates import fit_rows, sample_inputs
from .loop import GrowTrainer, train_config
from .report import GrowReport
from .settings import GrowConfig
from .streams import NamedText

GATES = "gates.safetensors"


def grow(
    base: str | Path, names: Mapping[str, Any], out: str | Path, config: GrowConfig | None = None, *,
    mapping: RecordMap | None = None,
) -> GrowReport:
    """Grow experts for every name in `names` (name -> its records, as MoEFineTuner.fit takes them) beside the FFNs of
    the dense model `base`, and leave packages and the model with them under `out`. The same call continues a run that
    was stopped.

    Raises ConfigError, CheckpointError or DataError naming what does not fit, before any work.
    """
    config = config or GrowConfig()
    if not names:
        raise ConfigError("names: at least one NAME=DATA must be given")
    out, folder = Path(out), resolve(base)
    with locked(out):
        there = GrownModel(folder)
        if there.grown is not None:
            raise ConfigError(f"{folder}: has the packages {', '.join(there.grown.names)}: give the base without them, "
                              "and install what is grown beside them afterwards")
        if there.quant is not None:
            raise ConfigError(f"{folder}: is quantized: give the model that it was made of")
        infos = _infos(there, names, config)
        tokenizer = Tokenizer.load(folder)
        text = named_text(names, tokenizer, config, mapping)
        out.mkdir(parents=True, exist_ok=True)
        model = load_model(folder, dtype=torch.float32)
        before = tensor_hashes(model)
        grown = _grown(model, infos, text, config, out)
        trainer = GrowTrainer(grown, text, config, out, tokenizer, base=fingerprint(before, model.config))
        first = trainer.before()
        trainer.run()
        _prove(model, grown, before)
        report = GrowReport.of(trainer, first, config, text)
        packages = _write_packages(out, grown, infos, report, config)
        _install(folder, packages, out / "model")
        report.save(out)
    return report


def base_of(source: str | Path, folder: Path, dtype: Literal["auto", "float32", "bfloat16"] = "auto",
            context: int | None = None) -> Path:
    """The base to grow experts in: `source` itself where it is a dense model in DeepSeek-V3's form, else its exact form
    in `folder`, made once. Raises ConfigError where `folder` is of another source, or of one that has changed since."""
    if Path(source).expanduser().suffix != ".gguf" and (found := resolve(source, weights=False)) and (
            read_json(found / "config.json", ConfigError).get("model_type") == "deepseek_v3"):
        if dtype != "auto" or context is not None:
            raise ConfigError(f"{source}: is in DeepSeek-V3's form already: dtype and context have no meaning")
        return resolve(source)
    place = Path(source).expanduser()
    if place.suffix != ".gguf":
        place = resolve(source)
    elif not place.is_file():
        raise NotFoundError(f"{place}: no such file")
    note, made_of = folder.parent / "source.json", {
        "source": str(source), "dtype": dtype, "context": context, "files": stamps(place, "config.json")}
    if note.is_file() and (known := read_json(note, CheckpointError)) != made_of:
        raise ConfigError(f"{folder}: was made of {known}, not of {made_of}: remove the run, or choose another OUT")
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, made_of)  # before the work, which may be stopped
    upcycle(source, folder, dtype, context=context)
    return folder


def _infos(there: GrownModel, names: Mapping[str, Any], config: GrowConfig) -> list[PackageInfo]:
    """A package's text for every name, still without figures. Raises ConfigError for a shape that does not fit."""
    model, of = there.config, start(there)
    first = model.num_hidden_layers // 3 if config.first_layer is None else config.first_layer
    if not 0 <= first < model.num_hidden_layers:
        raise ConfigError(f"first_layer = {first}: must be below the model's {model.num_hidden_layers} layers")
    if model.intermediate_size % config.group_width:
        raise ConfigError(f"group_width = {config.group_width}: must divide the FFN's {model.intermediate_size}")
    if config.group_width * config.group_experts > model.intermediate_size:
        raise ConfigError(f"group_experts = {config.group_experts}: experts of width {config.group_width} are together "
                          f"wider than the FFN's {model.intermediate_size}")
    try:
        return [PackageInfo(
            name, of.base, of.tokenizer, config.package_precision, tuple(range(first, model.num_hidden_layers)),
            config.group_experts, config.group_width, model.hidden_size, config.license) for name in names]
    except CheckpointError as error:
        raise ConfigError(f"names: {error}") from None


def named_text(names: Mapping[str, Any], tokenizer: Tokenizer, config: GrowConfig,
               mapping: RecordMap | None = None) -> NamedText:
    """The records of every name, and those of `config.others`, divided into training and held-out ones."""

    def records(data: Any) -> RecordSet:
        return RecordSet.of(each_record(data, ReadReport(strict=True), mapping), tokenizer, max_length=config.seq_len,
                            overlong="cut", valid_fraction=config.valid_fraction, seed=config.seed)

    others = records(list(config.others)) if config.others else None
    return NamedText({name: records(data) for name, data in names.items()}, others, config.seq_len)


# ---- the model ------------------------------------------------------------------------------------------------------


def _grown(base: CausalLM, infos: list[PackageInfo], text: NamedText, config: GrowConfig, out: Path) -> CausalLM:
    """The base's tensors, shared with it and frozen, with new experts and fitted gates."""
    first, count, experts = infos[0].layers[0], len(infos), config.group_experts
    made, _ = grown_config(base.config, None, infos[0], count, out)
    model = CausalLM.on_meta(made)
    state = {_grown_name(name, first): tensor for name, tensor in base.state_dict().items()}
    rows = gate_rows(base, infos[0].layers, text, config, out)
    generator = torch.Generator().manual_seed(config.seed)
    for layer in infos[0].layers:
        stem, dense = f"model.layers.{layer}.mlp", base.model.layers[layer].mlp
        gates_up, downs = zip(*(_copied(dense, experts, config.group_width, generator) for _ in range(count)),
                              strict=True)
        state[f"{stem}.experts.gate_up_proj"] = torch.cat(gates_up)
        state[f"{stem}.experts.down_proj"] = torch.cat(downs)
        state[f"{stem}.gate.weight"] = rows[layer]
        state[f"{stem}.gate.e_score_correction_bias"] = torch.zeros(count * experts)
    model.load_state_dict(state, assign=True)
    if made.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    for block in model.moe_blocks().values():
        block.experts.requires_grad_(True)
        block.gate.weight.requires_grad_(True)
    return model


def _grown_name(name: str, first: int) -> str:
    """The name that a tensor of the base has in the grown model."""
    head, dot, part = name.partition(".mlp.")
    if not dot or int(head.rpartition(".")[2]) < first:
        return name
    return f"{head}.mlp.shared_experts.{part}"


def _copied(dense: Any, experts: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Experts that compute neurons of the dense FFN, drawn at random, and put out nothing: [E, 2I, H], [E, H, I]."""
    neurons = torch.randperm(len(dense.gate_proj.weight), generator=generator)[: experts * width]
    gate, up = (part.weight.detach()[neurons].float().unflatten(0, (experts, width))
                for part in (dense.gate_proj, dense.up_proj))
    return torch.cat((gate, up), 1), torch.zeros(experts, gate.shape[2], width)


def gate_rows(base: CausalLM, layers: tuple[int, ...], text: NamedText, config: GrowConfig, out: Path) -> dict[
        int, Tensor]:
    """Layer -> rows [G * E, H] in FP32, fitted to the base's inputs of these layers; kept in OUT with what they were
    fitted to. The rows of a group differ by a little noise, so that its experts need not stay alike."""
    file, count = out / GATES, len(text.experts) + (text.others is not None)
    key = to_json([text.fingerprint, list(layers), config.group_experts, config.rows, config.seq_len,
                   config.gate_tokens, config.seed])
    if not file.is_file() or _fitted_to(file) != key:
        batches, rows = -(-config.gate_tokens * count // (config.rows * config.seq_len)), {}
        sample = (text.batch(step, config.rows, config.seq_len, seed=config.seed) for step in range(batches))
        dtype = compute_dtype(train_config(config), base)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            inputs, label_T = sample_inputs(base, layers, sample, batches)
        generator = torch.Generator().manual_seed(config.seed)
        for layer, x_TH in inputs.items():
            row_GH = fit_rows(x_TH, label_T, len(text.experts)).repeat_interleave(config.group_experts, 0)
            noise = torch.randn(row_GH.shape, generator=generator) * row_GH.std(1, keepdim=True)
            rows[f"{layer}"] = (row_GH + 0.01 * noise).contiguous()
        write_atomically(file, save(rows, {"fitted_to": key}))
    return {int(layer): row for layer, row in load_file(file).items()}


def _fitted_to(file: Path) -> str | None:
    with safe_open(file, framework="pt") as rows:
        return (rows.metadata() or {}).get("fitted_to")


def _prove(base: CausalLM, grown: CausalLM, before: Mapping[str, str]) -> None:
    """Raises CheckpointError unless every tensor of the base is what it was, by SHA-256."""
    first, state = grown.config.first_k_dense_replace, grown.state_dict()
    rest = CausalLM.on_meta(base.config)
    rest.load_state_dict({name: state[_grown_name(name, first)] for name in base.state_dict()}, assign=True)
    if rest.config.tie_word_embeddings:
        rest.lm_head.weight = rest.model.embed_tokens.weight
    after = tensor_hashes(rest)
    if changed := [name for name, digest in before.items() if after[name] != digest]:
        raise CheckpointError(f"{len(changed)} tensors of the base changed in training (first {changed[0]})")


# ---- the result -----------------------------------------------------------------------------------------------------


def _write_packages(
    out: Path, grown: CausalLM, infos: list[PackageInfo], report: GrowReport, config: GrowConfig
) -> list[Path]:
    paths = []
    experts, width = config.group_experts, config.group_width
    dtype = getattr(torch, config.package_precision)
    for place, info in enumerate(infos):
        tensors: dict[str, Tensor] = {}
        for layer in info.layers:
            block = grown.moe_blocks()[layer]
            own = slice(place * experts, (place + 1) * experts)
            tensors[gate_name(layer)] = block.gate.weight.detach()[own].float()
            tensors[bias_name(layer)] = torch.zeros(experts)
            for e, number in enumerate(range(own.start, own.stop)):
                gate_up, down = block.experts.dense(number)
                parts = (gate_up[:width], gate_up[width:], down)
                tensors |= {name: part.detach().to(dtype) for name, part in zip(plain_names(layer, e), parts,
                                                                               strict=True)}
        path = out / "packages" / f"{info.name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_package(path, replace(info, card=report.card(info.name), evidence=report.evidence(info.name)), tensors)
        paths.append(path)
    return paths


def _install(base: Path, packages: list[Path], target: Path) -> None:
    """The base with these packages, in their order, at `target`."""
    with replace_folder(target) as staging:
        shutil.copytree(base, staging, dirs_exist_ok=True)
        for package in packages:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*unsigned")  # they are our own
                install(package, staging)
