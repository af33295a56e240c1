"""LoRAAdapter: low-rank adapters by peft's fields, on attention and on named experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from ..atlas import Atlas
from ..checkpoint import attach_adapter, fingerprint, save_adapter, tensor_hashes
from ..config import ModelConfig
from ..errors import ConfigError
from ..ids import ExpertId, ExpertSet
from ..model import CausalLM
from ..model.adapter import LoraSpec, fold, lora_modules
from ..quant.linear import is_quantized
from ..settings import COUNT, POSITIVE, SHARE, TEXTS, Option, Settings

# How much of the adapter's effect merging may lose: in FP32 only sums are ordered differently; half precision rounds
# the merged weight, and what lies below its resolution is lost.
LOSS = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass(frozen=True)
class LoRAAdapter(Settings):
    """peft's LoraConfig fields (r, lora_alpha, lora_dropout, bias, target_modules, task_type) and `experts`: names of
    an atlas, or ids such as "3.17", whose gate, up and down are adapted too.

    target_modules: names of linear modules, "all-linear", or friendly ones: q_proj, k_proj and v_proj stand for MLA's
    own projections where the model has no such module (model/adapter.py). Raises ConfigError naming field and rule.
    """

    r: Annotated[int, Option("rank of the matrices", COUNT)] = 8
    target_modules: Annotated[Sequence[str] | str, Option("modules that are adapted, or all-linear", (
        "must be names", lambda v: TEXTS[1]((v,) if isinstance(v, str) else v)))] = ("q_proj",)
    experts: Annotated[Sequence[str], Option("names or ids of experts that are adapted", (
        "must be names, or ids in quotes such as \"3.10\"", lambda v: isinstance(v, tuple)))] = ()
    lora_alpha: Annotated[float, Option("the adapter is scaled by lora_alpha / r", POSITIVE)] = 8
    lora_dropout: Annotated[float, Option("share of the adapter's inputs that is dropped in training", SHARE)] = 0.0
    bias: Annotated[str, Option("a trained bias would be no LoRA matrix", ("must be none", lambda v: v == "none"))] = (
        "none")
    task_type: Annotated[str | None, Option("of peft", ("must be CAUSAL_LM", lambda v: v == "CAUSAL_LM"))] = "CAUSAL_LM"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spec({})

    @classmethod
    def of(cls, settings: LoRAAdapter | Mapping[str, Any], where: str = "adapter: ") -> LoRAAdapter:
        """From a table of the fields, as in a YAML file. Raises ConfigError for a field that there is not."""
        if isinstance(settings, LoRAAdapter):
            return settings
        if not isinstance(settings, Mapping):
            there = " (an adapter is trained from its start: merge a trained one into the model first)" if isinstance(
                settings, str | Path) else ""
            raise ConfigError(f"adapter = {settings!r:.60}: must be a LoRAAdapter, or a table of its fields such as "
                              f"{{r: 16, target_modules: [q_proj]}}{there}")
        return super().of(settings, where)

    def spec(self, experts: dict[int, list[int]]) -> LoraSpec:
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
        return LoraSpec(self.r, self.lora_alpha, self.lora_dropout, targets, experts)

    def attach(self, model: CausalLM, atlas: Atlas | None = None) -> LoraSpec:
        """Put an untrained adapter into `model`, freeze all else; returns what was put where.

        Raises ConfigError for a target that matches nothing, RequestError for an unknown name of experts.
        """
        spec = self.spec(named_experts(self.experts, atlas).by_layer())
        attach_adapter(model, spec)
        return spec

    @staticmethod
    def save(model: CausalLM, spec: LoraSpec, folder: str | Path, base_name: str = "", base: str | None = None) -> Path:
        """Write the adapter: in peft's format where peft can express them, else in ours (docs/formats.md)."""
        return save_adapter(folder, model, spec, base_name, base or fingerprint(tensor_hashes(model), model.config))

    @staticmethod
    @torch.no_grad()
    def merge(model: CausalLM, *, tokens: int = 64, seed: int = 0) -> float:
        """Merge the adapter into the weights, in place, and compare logits before and after on random tokens.

        Returns the share of the adapter's effect on the logits that merging lost: the median over the tokens that it
        reaches, 0 where it reaches none. Activations are FP32 for this, whatever the weights are: in half precision an
        effect below their resolution looks like none, and how much is seen depends on the machine's products. Raises
        ConfigError where there is nothing to merge or into what, or where the loss is more than rounding explains; the
        model is then what it was, adapter included.
        """
        paths = dict(lora_modules(model))
        if not paths:
            raise ConfigError("the model has no LoRA adapter to merge")
        if is_quantized(model):
            raise ConfigError("a LoRA adapter cannot be merged into quantized weights: merge into the plain "
                              "checkpoint, then quantize that")
        if not any(bool(parameter.any()) for module in paths.values()
                   for name, parameter in module.named_parameters(recurse=False) if name.endswith("_B")):
            raise ConfigError("merging would change nothing: every B is zero, the adapter was never trained")
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(model.device)
        precision, model.compute_dtype = model.compute_dtype, torch.float32
        scales = {name: module.scale for name, module in paths.items()}
        dtype = model.model.norm.weight.dtype
        kept = {name: [weight.clone() for weight in module.folds_into()] for name, module in paths.items()}
        try:
            beside = model(ids_BT)
            try:
                for module in paths.values():
                    module.scale = 0.0
                without = model(ids_BT)
            finally:
                for name, module in paths.items():
                    module.scale = scales[name]
            fold(model)
            lost_T, effect_T = (model(ids_BT) - beside).norm(dim=-1), (beside - without).norm(dim=-1)
            reached_T = effect_T > 0
            lost = float((lost_T / effect_T)[reached_T].median()) if reached_T.any() else 0.0
            if not lost <= (limit := LOSS.get(dtype, 0.02)):
                raise ConfigError(f"merging would lose {min(lost, 1.0):.1%} of the adapter's effect (at most "
                                  f"{limit:.0%} is rounding in {dtype}); load the base in float32 and merge there")
        except BaseException:
            for name, module in paths.items():
                for weight, was in zip(module.folds_into(), kept[name], strict=True):
                    weight.copy_(was)
                model.set_submodule(name, module)
            raise
        finally:
            model.compute_dtype = precision
        return lost


def named_experts(names: Sequence[str], atlas: Atlas | None) -> ExpertSet:
    """The experts of names in an atlas, and of ids such as "3.17". Raises RequestError listing the names there are."""
    found = ExpertSet()
    for name in names:
        if isinstance(name, ExpertId):
            found = found | ExpertSet([name])
        elif not isinstance(name, str):
            raise ConfigError(f"experts = {name!r}: must be a name, or an id in quotes such as \"3.10\"")
        elif re.fullmatch(r"\d+\.\d+", name):
            found = found | ExpertSet([ExpertId.parse(name)])
        elif atlas is None:
            raise ConfigError(f"experts = {name!r}: is a name, so it needs an atlas: there is none beside the model "
                              "(`deepseek atlas profile` makes one)")
        else:
            found = found | atlas[name]
    return found


def validate_experts(experts: Iterable[ExpertId], config: ModelConfig) -> None:
    """Raises ConfigError for the first expert that a model of this configuration does not have."""
    for expert in experts:
        if expert.layer not in config.moe_layers or not 0 <= expert.index < config.n_routed_experts:
            raise ConfigError(f"expert {expert}: the model has experts 0..{config.n_routed_experts - 1} in layers "
                              f"{list(config.moe_layers)}")
