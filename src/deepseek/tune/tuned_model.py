"""A model under tuning: which parts of it are trained, and the hashes of its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..atlas import Atlas, ExpertUsage, select_experts
from ..atlas.profile import gate_scale
from ..atlas.selection import THRESHOLDS
from ..checkpoint import (
    base_tensors,
    fingerprint,
    hf_names,
    load_model,
    save_adapter,
    save_delta,
    save_model,
    tensor_hashes,
    to_dtype,
)
from ..deepopt.optimizers import trained
from ..errors import ConfigError
from ..files import read_json, write_json
from ..ids import ExpertId, ExpertSet
from ..model import CausalLM, RoutingRecord
from ..model.adapter import LoraSpec, TunedExperts, fold
from ..progress import ProgressBar
from ..quant.linear import is_quantized
from ..tokenizer import Tokenizer
from .lora import LoRAAdapter, validate_experts
from .records import RecordSet
from .settings import TuneConfig


@dataclass(frozen=True)
class TunePlan:
    """What a run trains and where its result goes. folder: of the base, which the user called model_path; mode:
    experts, lora or full; named: the experts of expert_tune or expert_freeze, None for "auto" and where none are given;
    save: auto, delta or full."""

    folder: Path
    model_path: str
    out: Path
    mode: str
    save: str
    config: TuneConfig
    adapter: LoRAAdapter | None
    atlas: Atlas | None
    named: ExpertSet | None


class TunedModel:
    """The base with its trained parts, and the hashes of what it was."""

    def __init__(self, plan: TunePlan, model: CausalLM, tokenizer: Tokenizer, hashes: dict[str, str],
                 dtype: torch.dtype, experts: ExpertSet, spec: LoraSpec | None, trainable: set[str]) -> None:
        """hashes: of every tensor of the base; dtype: that of the base's weights; experts: tuned or frozen ones;
        trainable: names on disk of the tensors that training may change."""
        self.plan, self.model, self.tokenizer, self.hashes, self.dtype = plan, model, tokenizer, hashes, dtype
        self.experts, self.spec, self.trainable = experts, spec, trainable
        self.fingerprint = fingerprint(hashes, model.config)
        self.parameters = sum(p.numel() for p in CausalLM.on_meta(model.config).parameters())
        self.hashes_after: dict[str, str] = {}

    @classmethod
    def load(cls, plan: TunePlan, tokenizer: Tokenizer, data: RecordSet) -> TunedModel:
        """Read the base, hash it, select the experts and split the model into trained and frozen parts."""
        config = plan.config
        model = load_model(plan.folder, device=config.device)
        dtype = model.lm_head.weight.dtype if not is_quantized(model) else torch.float32
        hashes = _hashed(model, "hash the base")
        torch.manual_seed(config.seed)
        if plan.adapter is not None:
            spec = plan.adapter.attach(model, plan.atlas)
            return cls(plan, model, tokenizer, hashes, dtype, plan.named or ExpertSet(), spec, set())
        model.requires_grad_(False)
        experts = plan.named
        if config.expert_tune == "auto":
            experts = _auto(model, data, config, plan.out, fingerprint(hashes, model.config))
        if experts is not None:
            validate_experts(experts, model.config)
        if plan.mode == "full":
            frozen = (experts or ExpertSet()).by_layer()
            for layer, block in model.moe_blocks().items():
                chosen = [e for e in range(model.config.n_routed_experts) if e not in frozen.get(layer, ())]
                _part(model, layer, chosen, all_of=len(chosen) == model.config.n_routed_experts)
                block.shared_experts.requires_grad_(True) if hasattr(block, "shared_experts") else None
            _rest(model, True)
        else:
            assert experts is not None
            for layer, chosen in experts.by_layer().items():
                _part(model, layer, chosen, all_of=False)
            for block in model.moe_blocks().values():
                if config.shared_experts and hasattr(block, "shared_experts"):
                    block.shared_experts.requires_grad_(True)
            _rest(model, config.non_expert_modules)
        for block in model.moe_blocks().values():
            if config.train_router:
                block.gate.weight.requires_grad_(True)
        # the MTP modules take no part: nothing of them is in the loss
        model.model.mtp.requires_grad_(False)
        for parameter in trained(model).values():  # FP32 whatever the base: see TunedExperts
            parameter.data = parameter.data.float()
        tuned = cls(plan, model, tokenizer, hashes, dtype, experts or ExpertSet(), None, set())
        tuned.trainable = tuned._trainable_names(config.balance)
        if not trained(model):
            raise ConfigError("nothing is left to train: every expert is frozen")
        return tuned

    def _trainable_names(self, balance: bool) -> set[str]:
        """Names on disk of what has a gradient, and of the gate biases where they balance."""
        out: set[str] = set()
        for name in trained(self.model):
            owner = self.model.get_submodule(name.rpartition(".")[0])
            for disk_name, part in hf_names(name, self.model.config):
                if not isinstance(owner, TunedExperts) or (part is not None and part[0] in owner.chosen):
                    out.add(disk_name)
        if balance:
            out |= {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in self.model.config.moe_layers}
        return out

    def save_so_far(self) -> None:
        """Write the current result without folding the model, between the rounds of a stream."""
        if self.spec is not None:
            save_adapter(self.plan.out / "adapter", self.model, self.spec, self.plan.model_path, self.fingerprint)
        elif self.plan.mode == "experts":
            self._save_delta(dict(self._trained_on_disk()))

    def _trained_on_disk(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained(self.model).items():
            owner, tensor = self.model.get_submodule(name.rpartition(".")[0]), parameter.detach().to(self.dtype)
            for disk_name, part in hf_names(name, self.model.config):
                if part is None:
                    yield disk_name, tensor
                elif not isinstance(owner, TunedExperts):
                    yield disk_name, tensor[part[0]][part[1]]
                elif part[0] in owner.chosen:
                    yield disk_name, tensor[owner.chosen.index(part[0])][part[1]]
        yield from ((name, buffer) for name, buffer in self.model.named_buffers() if name in self.trainable)

    def _save_delta(self, tensors: dict[str, Tensor]) -> Path:
        return save_delta(self.plan.out / "delta", tensors, self.fingerprint, {
            "base_name": self.plan.model_path, "mode": self.plan.mode,
            "experts": {str(k): v for k, v in self.experts.by_layer().items()}})

    def finish(self) -> Path:
        """Fold the trained parts into the model, hash it, and write the result."""
        model, base = self.model.eval(), self.fingerprint
        if self.spec is not None:
            self.hashes_after = _hashed(model, "hash the result")
            if self.plan.save != "full":
                return save_adapter(self.plan.out / "adapter", model, self.spec, self.plan.model_path, base)
            LoRAAdapter.merge(model)
            return save_model(model, self.plan.out / "model", tokenizer=self.tokenizer, add=self._add_atlas)
        fold(model)
        to_dtype(model, self.dtype)
        self.hashes_after = _hashed(model, "hash the result")
        if self.plan.save == "delta" or (self.plan.save == "auto" and self.plan.mode == "experts"):
            return self._save_delta({n: t for n, t in base_tensors(model).items() if n in self.trainable})
        return save_model(model, self.plan.out / "model", tokenizer=self.tokenizer, add=self._add_atlas)

    def _add_atlas(self, folder: Path) -> None:
        if self.plan.atlas is not None:
            self.plan.atlas.save(folder)


# ---- parts ------------------------------------------------------------------------------------------------------


def _part(model: CausalLM, layer: int, chosen: Sequence[int], *, all_of: bool) -> None:
    """Make the chosen experts of a layer separate parameters."""
    experts = model.moe_blocks()[layer].experts
    if all_of:
        experts.requires_grad_(True)
    elif chosen:
        model.moe_blocks()[layer].experts = TunedExperts(experts, chosen)  # type: ignore[assignment]


def _rest(model: CausalLM, wanted: bool) -> None:
    """Everything that is neither expert nor router: embeddings, attention, norms, dense layers, the head."""
    for name, parameter in model.named_parameters():
        if ".experts." not in name and ".shared_experts." not in name and not name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(wanted)


@torch.no_grad()
def _auto(model: CausalLM, data: RecordSet, config: TuneConfig, out: Path, base: str) -> ExpertSet:
    """ESFT's selection from the routes of the training records; kept in OUT/experts.json."""
    path = out / "experts.json"
    threshold = config.threshold or THRESHOLDS["gate" if config.score == "gate" else "token"]
    asked = {"score": config.score, "threshold": threshold, "data": data.fingerprint, "base": base}
    if path.is_file():
        kept = read_json(path, ConfigError)
        if odd := sorted(set(kept) ^ {*asked, "experts", "tokens"}):
            raise ConfigError(f"{path}: {odd[0]} {'is an unknown key' if odd[0] in kept else 'is missing'}: remove the "
                              "file, and the experts are chosen again")
        if {key: kept[key] for key in asked} == asked:
            try:
                return ExpertSet(map(ExpertId.parse, kept["experts"]))
            except (ValueError, TypeError, AttributeError):
                raise ConfigError(f"{path}: experts = {kept['experts']!r:.60}: must be a list of ids such as "
                                  "\"3.17\"") from None
    usage = ExpertUsage(model.config)
    everything = RecordSet((), data.train)
    limit = max(1, config.eval_records * 4 // config.batch_size)
    batches = list(everything.valid_batches(config.batch_size, 0, limit))
    for batch in ProgressBar(batches, desc="route", unit="batch"):
        routing = RoutingRecord()
        batch = batch.to(model.device)
        model.hidden(batch.ids_BT, batch.real_BT, routing=routing)
        usage.add(routing, None if batch.real_BT is None else batch.real_BT.flatten())
    if config.score == "token":
        score_LE = usage.counts_LE.double() / (usage.tokens * usage.top_k)
    else:
        score_LE = usage.weight() / gate_scale(model.config)
    selected = select_experts(dict(zip(usage.layers, score_LE, strict=True)), threshold)
    experts = ExpertSet(ExpertId(layer, e) for layer, chosen in selected.items() for e in chosen)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, asked | {"experts": [str(e) for e in experts], "tokens": usage.tokens})
    return experts


def _hashed(model: CausalLM, what: str) -> dict[str, str]:
    with ProgressBar(desc=what, unit="tensor", leave=False) as bar:
        return tensor_hashes(model, bar.advance_to)
