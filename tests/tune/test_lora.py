"""LoRA adapters: what they compute, what peft makes of them, on four bits, and merged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepseek import LoRAAdapter, MoEFineTuner
from deepseek.atlas import Atlas
from deepseek.checkpoint import base_tensors, load_model, save_model, tensor_hashes
from deepseek.convert import quantize
from deepseek.errors import CheckpointError, ConfigError, RequestError
from deepseek.model import CausalLM
from deepseek.model.adapter import LoRAExperts, LoRALinear, lora_modules
from tests.helpers.adapters import trained
from tests.helpers.bf16 import WAYS, computed_by
from tests.helpers.records import records

IDS = torch.arange(5, 45).view(2, 20)


def by_hand(model: CausalLM, folder: Path) -> CausalLM:
    """The same model with the deltas added to its matrices, one expert at a time."""
    plain = load_model(folder, torch.float32)
    for name, module in lora_modules(model):
        if isinstance(module, LoRALinear):
            plain.get_submodule(name).weight.data += module.scale * module.lora_B @ module.lora_A
            continue
        experts = plain.get_submodule(name)
        for place, e in enumerate(module.chosen):
            gate, up, down = (module.scale * getattr(module, f"{p}_B")[place] @ getattr(module, f"{p}_A")[place]
                              for p in ("gate", "up", "down"))
            experts.gate_up_proj.data[e] += torch.cat((gate, up))
            experts.down_proj.data[e] += down
    return plain


@pytest.mark.parametrize("adapter", [
    LoRAAdapter(r=4),
    LoRAAdapter(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"]),
    LoRAAdapter(r=4, target_modules=(), experts=["law_expert"]),
    LoRAAdapter(r=2, target_modules="all-linear", experts=["law_expert", "1.0", "2.15"]),
], ids=["q", "attention", "experts", "everything"])
@pytest.mark.parametrize("rank", [None, 24])
def test_side_paths_are_the_merged_weights(
    base: Callable[..., Path], adapter: LoRAAdapter, rank: int | None, random_model: Callable[..., CausalLM]
) -> None:
    folder = base(q_lora_rank=rank)
    model = load_model(folder)
    untouched = model(IDS)
    adapter.attach(model, Atlas.load(folder))
    torch.testing.assert_close(model(IDS), untouched)  # B is zero
    beside = trained(model)(IDS)
    assert not torch.allclose(beside, untouched, atol=1e-2)
    torch.testing.assert_close(beside, by_hand(model, folder)(IDS), rtol=1e-4, atol=1e-4)
    assert LoRAAdapter.merge(model) < 1e-3
    torch.testing.assert_close(model(IDS), beside, rtol=1e-4, atol=1e-4)
    assert not list(lora_modules(model)) and base_tensors(model).keys() == base_tensors(load_model(folder)).keys()


def test_gradients_are_those_of_the_merged_weights(base: Callable[..., Path]) -> None:
    folder = base()
    model = load_model(folder)
    LoRAAdapter(r=4, target_modules=["q_proj", "v_proj"], experts=["law_expert"]).attach(model, Atlas.load(folder))
    plain = by_hand(trained(model), folder).requires_grad_(True)
    for each in (model, plain):
        each(IDS).pow(2).mean().backward()
    for name, module in lora_modules(model):
        if isinstance(module, LoRALinear):
            dw = plain.get_submodule(name).weight.grad
            torch.testing.assert_close(module.lora_B.grad, module.scale * dw @ module.lora_A.T, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(module.lora_A.grad, module.scale * module.lora_B.T @ dw, rtol=1e-3, atol=1e-5)
        else:
            for place, e in enumerate(module.chosen):
                dw = plain.get_submodule(name).down_proj.grad[e]
                torch.testing.assert_close(module.down_B.grad[place], module.scale * dw @ module.down_A[place].T,
                                           rtol=1e-3, atol=1e-5)
    assert not any(p.grad is not None for name, p in model.named_parameters() if ".base." in name)


@pytest.mark.parametrize(("targets", "rank", "found"), [
    (["q_proj"], None, {"q_proj"}), (["q_proj"], 24, {"q_b_proj"}), (["v_proj"], None, {"kv_b_proj"}),
    (["q_proj", "k_proj", "v_proj"], 24, {"q_b_proj", "kv_b_proj"}),
    (["q_a_proj", "o_proj"], 24, {"q_a_proj", "o_proj"}),
    (["model.layers.1.self_attn.o_proj"], None, {"o_proj"}), (["lm_head"], None, {"lm_head"}),
])
def test_friendly_names_stand_for_mlas_projections(
    base: Callable[..., Path], targets: list[str], rank: int | None, found: set[str]
) -> None:
    model = load_model(base(q_lora_rank=rank))
    LoRAAdapter(r=2, target_modules=targets).attach(model)
    assert {name.rpartition(".")[2] for name, _ in lora_modules(model)} == found
    count = 1 if "." in targets[0] or found == {"lm_head"} else 3 * len(found)
    assert len(list(lora_modules(model))) == count


def test_q_proj_alone_trains_two_parameters_in_a_hundred_at_most(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    from deepseek.config import PRESETS, ModelConfig

    for name in PRESETS:
        config = ModelConfig.preset(name)
        with torch.device("meta"):
            model = CausalLM(config)
            everything = sum(p.numel() for p in model.parameters())
            LoRAAdapter(r=16, target_modules=["q_proj"]).attach(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 0.02 * everything, name


@pytest.mark.parametrize("adapter", [LoRAAdapter(r=4, target_modules=["q_proj"]),
                                     LoRAAdapter(r=4, target_modules=["q_proj", "v_proj", "o_proj"], lora_alpha=16),
                                     LoRAAdapter(r=2, target_modules=["model.layers.1.self_attn.o_proj"])])
def test_attention_adapters_load_in_peft_with_equal_logits(
    base: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    transformers = pytest.importorskip("transformers", reason="needs the test extra (transformers)")
    folder = base()
    model = load_model(folder)
    side = adapter.attach(model)
    LoRAAdapter.save(trained(model), side, tmp_path / "adapter", str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")  # peft, of a key that it does not know
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert len([m for m in theirs.modules() if hasattr(m, "lora_A")]) == len(list(lora_modules(model)))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    again = load_model(folder, adapter=tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
    other = load_model(folder)
    other.config = other.config.with_(rope_theta=5e5)
    save_model(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="adapter: made for another base: its hash is"):
        load_model(tmp_path / "other", adapter=tmp_path / "adapter")
    assert load_model(tmp_path / "other", adapter=tmp_path / "adapter", verify=False)


def test_an_adapter_made_by_peft_loads_here(base: Callable[..., Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    transformers = pytest.importorskip("transformers", reason="needs the test extra (transformers)")
    folder = base()
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder),
                                 peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "kv_b_proj"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder, adapter=tmp_path / "adapter")(IDS), theirs.eval()(IDS).logits,
                                   rtol=1e-4, atol=1e-4)
    keys = (tmp_path / "adapter" / "adapter_config.json").read_text().replace('"use_dora": false', '"use_dora": true')
    (tmp_path / "adapter" / "adapter_config.json").write_text(keys)
    with pytest.raises(CheckpointError, match="use_dora = True: not supported here"):
        load_model(folder, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("adapter", [LoRAAdapter(r=4, experts=["law_expert"]),
                                     LoRAAdapter(r=4, target_modules=["q_proj", "gate_proj", "lm_head"])])
def test_adapters_beyond_attention_are_ours_and_peft_refuses_them(
    base: Callable[..., Path], adapter: LoRAAdapter, tmp_path: Path
) -> None:
    folder = base()
    model = load_model(folder)
    side = adapter.attach(model, Atlas.load(folder))
    LoRAAdapter.save(trained(model), side, tmp_path / "adapter", str(folder))
    again = load_model(folder, adapter=tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
    other = load_model(folder)
    other.model.norm.weight.data[0] += 1e-3
    save_model(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="made for another base"):
        load_model(tmp_path / "other", adapter=tmp_path / "adapter")
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    transformers = pytest.importorskip("transformers", reason="needs the test extra (transformers)")
    with pytest.raises((ValueError, OSError)):
        peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")


@pytest.mark.parametrize("rank", [None, 24])
def test_on_a_four_bit_base(base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, rank: int | None) -> None:
    """Training through four bits lowers the loss, moves no byte of the base, and what was trained is what runs."""
    folder = base(hidden_size=64, moe_intermediate_size=32, q_lora_rank=rank)
    quantize(folder, tmp_path / "four")
    (tmp_path / "four" / "atlas.json").write_text((folder / "atlas.json").read_text())
    before = load_model(tmp_path / "four")(IDS).detach()
    adapter = LoRAAdapter(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], experts=["law_expert"])
    report = MoEFineTuner(tmp_path / "four", adapter=adapter, out=tmp_path / "out", **quick | {"lr": 1e-2}).fit(
        records(), epochs=3)
    assert report.gained > 0.02 and report.frozen_unchanged == report.frozen_tensors > 40
    model = load_model(tmp_path / "four", adapter=tmp_path / "out" / "adapter")
    assert {type(m) for _, m in lora_modules(model)} == {LoRALinear, LoRAExperts}
    after = model(IDS).detach()
    assert not torch.allclose(after, before, atol=1e-3)
    # the kernels round activations to 8 bits, the path with a gradient does not
    model.requires_grad_(True)
    dense = model(IDS)
    assert dense.requires_grad
    assert float((dense.detach() - after).norm() / (after - before).norm()) < 0.5
    with pytest.raises(ConfigError, match="cannot be merged into quantized weights"):
        LoRAAdapter.merge(model)


def test_an_adapter_knows_its_base_and_what_that_was_made_from(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(hidden_size=64, moe_intermediate_size=32)
    other = load_model(folder)
    other.model.norm.weight.data[0] += 1e-3
    save_model(other, tmp_path / "other")
    quantize(folder, tmp_path / "four", progress=False)
    quantize(folder, tmp_path / "eight", "int8", progress=False)
    quantize(tmp_path / "other", tmp_path / "other-four", progress=False)
    for name, experts in (("attention", []), ("experts", ["1.3"])):  # peft's format, and ours
        for trained_on in (tmp_path / "four", folder):
            model = load_model(trained_on)
            side = LoRAAdapter(r=2, experts=experts).attach(model)
            LoRAAdapter.save(trained(model), side, tmp_path / name)
            for fits in (tmp_path / "four", folder, tmp_path / "eight"):
                assert any(lora_modules(load_model(fits, adapter=tmp_path / name)))
            for another in (tmp_path / "other", tmp_path / "other-four"):
                with pytest.raises(CheckpointError, match=f"{name}: made for another base: its hash is"):
                    load_model(another, adapter=tmp_path / name)


@pytest.mark.parametrize("target", ["all-linear", "gate_proj", "model.layers.0.mlp.down_proj"])
def test_packed_mlps_take_no_side_paths_and_are_not_left_out_in_silence(
    base: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    folder = base()
    quantize(folder, tmp_path / "four", keep=["model.layers.1.mlp.shared_experts.*"], progress=False)
    message = rf"target_modules = '{target}': names model\.layers\.0\.mlp\.\w+, which is inside a packed MLP"
    with pytest.raises(ConfigError, match=message):
        MoEFineTuner(tmp_path / "four", adapter=LoRAAdapter(target_modules=[target]))
    with pytest.raises(ConfigError, match=message):
        LoRAAdapter(target_modules=[target]).attach(load_model(tmp_path / "four"))
    quantize(folder, tmp_path / "kept", keep=["*.mlp.*"], progress=False)  # these are modules of their own
    LoRAAdapter(target_modules=[target]).attach(model := load_model(tmp_path / "kept"))
    assert any(".mlp." in name for name, _ in lora_modules(model))


def test_only_active_experts_are_computed(base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base()
    model = load_model(folder)
    LoRAAdapter(r=2, target_modules=(), experts=[f"1.{e}" for e in range(16)]).attach(model)
    called: list[int] = []
    real = LoRAExperts.expert_output
    monkeypatch.setattr(LoRAExperts, "expert_output",
                        lambda self, place, x: called.append(place) or real(self, place, x))
    model(torch.tensor([[7]]))
    assert len(called) == len(set(called)) == model.config.num_experts_per_tok


@pytest.mark.parametrize(("adapter", "error", "message"), [
    ({"target_modules": ["query"]}, ConfigError, r"target_modules = 'query': matches nothing; the model has .*q_proj"),
    ({"target_modules": ()}, ConfigError, "both empty: there is nothing to adapt"),
    ({"experts": ["lawyer"]}, RequestError, "no experts are named 'lawyer'.*law_expert"),
    ({"experts": ["1.77"]}, ConfigError, "layer 1 has no such experts"),
    ({"experts": [1.5]}, ConfigError, r'experts = 1\.5: must be a name, or an id in quotes such as "3\.10"'),
])
def test_what_cannot_be_adapted(
    base: Callable[..., Path], adapter: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = base()
    with pytest.raises(error, match=message):
        LoRAAdapter(**adapter).attach(load_model(folder), Atlas.load(folder))


@pytest.mark.parametrize(("fields", "message"), [
    ({"r": 0}, "r = 0: must be an integer >= 1"), ({"lora_alpha": 0}, "lora_alpha = 0"),
    ({"lora_dropout": 1.0}, "lora_dropout"), ({"bias": "all"}, "bias = 'all': must be none"),
    ({"task_type": "SEQ_CLS"}, "task_type"), ({"experts": 3}, "experts = 3: must be names"),
    ({"target_modules": [""]}, "must be names"), ({"target_modules": 3}, "target_modules = 3: must be names"),
])
def test_impossible_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAAdapter(**fields)


@pytest.fixture(params=WAYS)
def bf16(request: pytest.FixtureRequest) -> Iterator[None]:
    with computed_by(request.param):
        yield


@pytest.mark.usefixtures("bf16")
def test_merging_says_when_it_would_do_nothing_or_lose_too_much(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(torch.bfloat16)
    model = load_model(folder)
    with pytest.raises(ConfigError, match="no LoRA adapter to merge"):
        LoRAAdapter.merge(model)
    LoRAAdapter(r=4, experts=["law_expert"]).attach(model, Atlas.load(folder))
    with pytest.raises(ConfigError, match="every B is zero, the adapter was never trained"):
        LoRAAdapter.merge(model)
    with pytest.raises(CheckpointError, match="is still apart from its base: merge it first"):
        save_model(model, tmp_path / "x")
    trained(model, 1e-5)  # below the resolution of BF16: merging would round it away
    before, logits, paths = tensor_hashes(model), model(IDS), [name for name, _ in lora_modules(model)]
    with pytest.raises(ConfigError, match=r"merging would lose [\d.]+% of the adapter's effect .*float32"):
        LoRAAdapter.merge(model)
    # nothing has been changed by then
    assert model.compute_dtype is None
    assert tensor_hashes(model) == before and [name for name, _ in lora_modules(model)] == paths
    assert torch.equal(model(IDS), logits)
    trained(model, 1e-6)  # so little that BF16 activations would show no effect at all
    with pytest.raises(ConfigError, match=r"merging would lose [\d.]+% of the adapter's effect"):
        LoRAAdapter.merge(model)
    assert 1e-3 < LoRAAdapter.merge(trained(model)) < 0.3 and model.compute_dtype is None


def test_equal_adapters_are_equal_files(base: Callable[..., Path], tmp_path: Path) -> None:
    """safetensors writes several entries of metadata in an order of chance."""
    model = load_model(base())
    side = LoRAAdapter(r=2).attach(model)
    files = set()
    for number in range(12):
        folder = LoRAAdapter.save(model, side, tmp_path / str(number), base="0" * 64)
        files.add((folder / "adapter_model.safetensors").read_bytes())
        assert load_file(folder / "adapter_model.safetensors")
    assert len(files) == 1
