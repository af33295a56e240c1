"""Folders that are given as an adapter: what changes the model is refused by name, and every refusal says its cause."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek import LoRAAdapter
from deepseek.atlas import Atlas
from deepseek.checkpoint import MANIFEST, base_tensors, fingerprint, load_model, save_delta, save_model, tensor_hashes
from deepseek.checkpoint.adapter_keys import KNOWN_TO_PEFT
from deepseek.convert import merge, quantize
from deepseek.errors import CheckpointError, MoEDRError, NotFoundError
from deepseek.model import CausalLM
from deepseek.model.adapter import lora_modules

IDS = torch.arange(5, 25).view(1, 20)
Q = "base_model.model.model.layers.1.self_attn.q_proj"
EXPERT = "base_model.model.model.layers.1.mlp.experts.3"


def of(model: CausalLM) -> str:
    return fingerprint(tensor_hashes(model), model.config)


@torch.no_grad()
def lora(folder: Path, *, experts: bool = False, name: str = "adapter") -> Path:
    """An adapter as if trained, in peft's format, or with experts in ours."""
    model = load_model(folder)
    adapter = LoRAAdapter(r=4, target_modules=["q_proj", "o_proj"], experts=["1.3", "2.0"] if experts else ())
    side = adapter.attach(model)
    for _, module in lora_modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.normal_(0.0, 0.05)
    return LoRAAdapter.save(model, side, folder.parent / name, str(folder))


def delta(folder: Path) -> Path:
    model = load_model(folder)
    tensors = {name: 2 * t for name, t in base_tensors(model).items() if ".experts.3." in name}
    return save_delta(folder.parent / "delta", tensors, of(model), {"base_name": str(folder), "mode": "experts",
                                                                   "experts": {"1": [3], "2": [3]}})


def edit(folder: Path, keys: dict[str, Any] | None = None, tensors: Callable[[dict[str, Tensor]], Any] | None = None,
         drop: str = "") -> None:
    """Change settings and tensors of an adapter, as another tool would: no manifest afterwards."""
    about = next(folder / name for name in ("delta.json", "adapter_config.json", "moe_dr_adapter.json")
                 if (folder / name).is_file())
    stored = json.loads(about.read_text()) | (keys or {})
    stored.pop(drop, None)
    about.write_text(json.dumps(stored))
    if tensors is not None:
        file = next(folder.glob("*.safetensors"))
        held = {name: t.clone() for name, t in load_file(file).items()}
        tensors(held)
        save_file({name: t.contiguous() for name, t in held.items()}, file)
    (folder / MANIFEST).unlink(missing_ok=True)


def refused(folder: Path, adapter: Path, message: str) -> None:
    """By loading, merging and quantizing alike, with the adapter's path and the cause; nothing is left behind."""
    before = sorted(folder.parent.iterdir())
    for work in (lambda: load_model(folder, adapter=adapter), lambda: merge(folder, adapter, folder.parent / "x"),
                 lambda: quantize(folder, folder.parent / "x", adapter=adapter)):
        with pytest.raises(MoEDRError) as caught:
            work()
        assert message in str(caught.value) and str(adapter) in str(caught.value)
    assert sorted(folder.parent.iterdir()) == before


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "eva"),
    ("init_lora_weights", "lora_ga"), ("init_lora_weights", "tomorrow"), ("alora_invocation_tokens", [1, 2]),
    ("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}),
    ("modules_to_save", ["norm"]),
    ("layers_to_transform", 1), ("layers_to_transform", [0, 1]), ("layers_pattern", "layers"), ("fan_in_fan_out", True),
    ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True), ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("trainable_token_indices", [3]), ("exclude_modules", "o_proj"), ("peft_type", "IA3"), ("task_type", "SEQ_CLS"),
    ("use_qalora", True), ("eva_config", {"rho": 2.0}), ("loftq_config", {"loftq_bits": 4}), ("corda_config", {"a": 1}),
    ("layer_replication", [[0, 2]]), ("use_bdlora", {"a": 1}), ("kasa_config", {"beta": 1}), ("a_new_key", 3),
    ("a_new_key", {"on": True}), ("use_rslora", "yes"), ("r", 0), ("r", True), ("r", "4"), ("lora_alpha", None),
    ("lora_alpha", -1), ("lora_dropout", 1.0), ("target_modules", None), ("target_modules", [1]), ("base", "0" * 20),
    ("experts", {"1": [3]}), ("format", 1),
])
def test_a_key_of_peft_that_changes_the_model_is_refused_by_name(
    base: Callable[..., Path], key: str, value: Any
) -> None:
    edit(adapter := lora(base()), {key: value})
    with pytest.raises(CheckpointError) as caught:
        load_model(adapter.parent / "base", adapter=adapter)
    assert f"{key} = {value!r}" in str(caught.value) and "adapter_config.json" in str(caught.value)


def test_harmless_values_of_the_same_keys_are_taken(base: Callable[..., Path]) -> None:
    adapter = lora(folder := base())
    want = load_model(folder, adapter=adapter)(IDS)
    odd = sorted(KNOWN_TO_PEFT - {"r", "lora_alpha", "lora_dropout", "target_modules", "peft_type", "task_type"})
    empty: list[Any] = [None, False, {}, []]
    for value in empty:
        keys = {key: value for key in odd if key not in ("init_lora_weights", "use_rslora") or value in (None, False)}
        edit(adapter, keys | {"bias": "none", "a_new_key": value, "use_rslora": False, "init_lora_weights": True})
        assert torch.equal(load_model(folder, adapter=adapter)(IDS), want)
    edit(adapter, {"auto_mapping": {"parent_library": "x"}, "peft_version": "9", "megatron_core": "x",
                   "revision": "main", "qalora_group_size": 16, "runtime_config": {"ephemeral_gpu_offload": True},
                   "task_type": None, "init_lora_weights": "gaussian", "inference_mode": False, "lora_dropout": None})
    assert torch.equal(load_model(folder, adapter=adapter)(IDS), want)


def test_every_key_of_the_installed_peft_is_decided_on() -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= KNOWN_TO_PEFT


def test_an_initialisation_that_changes_the_base_is_refused_until_it_is_converted(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    """PiSSA, made by peft: as it is it belongs to a base that was never saved; converted it is an adapter of ours."""
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    transformers = pytest.importorskip("transformers", reason="needs the test extra (transformers)")
    folder = base()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config)
    theirs.peft_config["default"].init_lora_weights = True  # as peft's manual says: to save the start itself
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.02 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "raw")
    refused(folder, tmp_path / "raw", "init_lora_weights = 'pissa': not supported here")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder, adapter=tmp_path / "converted")(IDS), theirs.eval()(IDS).logits,
                                   rtol=1e-3, atol=1e-3)


def test_rank_stabilised_lora_is_scaled_as_peft_does(base: Callable[..., Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    transformers = pytest.importorskip("transformers", reason="needs the test extra (transformers)")
    folder = base()
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
        theirs.save_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(load_model(folder, adapter=tmp_path / "adapter")(IDS), theirs.eval()(IDS).logits,
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "keys", "message"), [
    ("delta", {"a_new_key": None}, "unknown key a_new_key = None"), ("delta", {"format": 2}, "format = 2: this"),
    ("delta", {"format": True}, "format = True"), ("delta", {"base": "x"}, "base = 'x'"),
    ("delta", {"experts": {"1": [3, 3]}}, "experts = {'1': [3, 3]}"), ("delta", {"experts": [3]}, "experts = [3]"),
    ("delta", {"mode": 3}, "mode = 3"), ("delta", {"base_name": ["x"]}, "base_name = ['x']"),
    ("ours", {"a_new_key": None}, "unknown key a_new_key = None"), ("ours", {"format": "1"}, "format = '1'"),
    ("ours", {"use_dora": True}, "use_dora = True: not supported here"), ("ours", {"base": None}, "base = None"),
    ("ours", {"experts": {"1": [-1]}}, "experts = {'1': [-1]}"), ("ours", {"experts": {"x": [1]}}, "experts = {'x'"),
    ("ours", {"experts": {"1": [3]}}, "names the experts 1.3, the tensors those of 1.3, 2.0"),
    ("ours", {"experts": {}}, "names the experts none, the tensors those of 1.3, 2.0"),
])
def test_our_own_settings(base: Callable[..., Path], kind: str, keys: dict[str, Any], message: str) -> None:
    folder = base()
    edit(adapter := delta(folder) if kind == "delta" else lora(folder, experts=True), keys)
    refused(folder, adapter, message)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not valid"), ("[]", "must be a JSON object"), ('{"r": NaN}', "nan is no number"), ("[" * 99999, "not valid"),
    ("{}", "peft_type = None: must be 'LORA'"), ('{"peft_type": "LORA"}', "r is missing"),
])
def test_settings_that_are_none(base: Callable[..., Path], text: str, message: str) -> None:
    adapter = lora(base())
    (adapter / "adapter_config.json").write_text(text)
    (adapter / MANIFEST).unlink()
    refused(adapter.parent / "base", adapter, message)
    (adapter / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    refused(adapter.parent / "base", adapter, "not valid")


@pytest.mark.parametrize("key", ["format", "base"])
def test_settings_that_are_not_there(base: Callable[..., Path], key: str) -> None:
    edit(adapter := delta(base()), drop=key)
    refused(adapter.parent / "base", adapter, f"delta.json: {key} is missing")


# ---- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(f"{Q}.lora_B.weight"), "layers.1.self_attn.q_proj.lora_B.weight is missing, its partner is there"),
    (lambda t: t.pop(f"{Q}.lora_A.weight"), "layers.1.self_attn.q_proj.lora_A.weight is missing, its partner is there"),
    (lambda t: [t.pop(name) for name in list(t) if Q in name], "1 modules that target_modules names have no tensors, "
     "first model.layers.1.self_attn.q_proj"),
    (lambda t: [t.pop(name) for name in list(t) if ".o_proj." in name], "3 modules that target_modules names have no"),
    (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][:2]}), "r = 4 in adapter_config.json, but"),
    (lambda t: t.update({n: x[:2] if "_A" in n else x[:, :2] for n, x in t.items()}), "their rank must be r"),
    (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][:, :20]}),
     "made for a base of other sizes: model.layers.1.self_attn.q_proj is a matrix [40, 20] there, the model's is [40,"),
    (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][0]}), "must be matrices"),
    (lambda t: t[f"{Q}.lora_B.weight"].view(-1)[5:6].fill_(torch.nan), "lora_B.weight holds values that are not"),
    (lambda t: t[f"{Q}.lora_A.weight"].view(-1)[5:6].fill_(torch.inf), "lora_A.weight holds values that are not"),
    (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.float8_e4m3fn)}), "is of F8_E4M3"),
    (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].int()}), "is of I32: must be F32"),
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(40)}), "a magnitude of DoRA"),
    (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}), "on an embedding"),
    (lambda t: t.update({f"{Q}.bias": torch.ones(40)}), "a trained bias"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(4, 4)}), "no matrix of LoRA"),
    (lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": torch.ones(2)}), "a whole module"),
    (lambda t: t.update({n.replace(".weight", ".default.weight"): t.pop(n) for n in list(t)}), "named as in memory"),
    (lambda t: t.update({n.removeprefix("base_model.model."): t.pop(n) for n in list(t)}), "no matrix of LoRA"),
    (lambda t: t.update({n.replace("layers.1.", "layers.7."): t.pop(n) for n in list(t) if "layers.1." in n}),
     "made for a base of more layers: has model.layers.7.self_attn.o_proj, the model's layers are 0..2"),
    (lambda t: t.update({n.replace("q_proj", "q_b_proj"): t.pop(n) for n in list(t)}),
     "made for another architecture: the model has no such tensor or linear module as model.layers.0.self_attn.q_b_"),
    (lambda t: t.update({n.replace("self_attn.q_proj", "mlp.gate"): t.pop(n) for n in list(t)}), "no such tensor or"),
    (lambda t: t.update({f"base_model.model.lm_head.lora_{x}.weight": torch.ones(s) for x, s in (
        ("A", (4, 32)), ("B", (400, 4)))}), "1 modules have tensors and are not named by target_modules"),
    (lambda t: t.clear(), "hold no tensor"),
])
def test_tensors_of_an_adapter_of_peft(
    base: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit(adapter := lora(base()), tensors=change)
    refused(adapter.parent / "base", adapter, message)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: [t.pop(f"{EXPERT}.up_proj.lora_{x}.weight") for x in "AB"], "expert 1.3 has no tensors for up_proj"),
    (lambda t: t.update({n.replace("experts.3", "experts.16"): t.pop(n) for n in list(t)}), "names the experts 1.3"),
    (lambda t: t.update({n.replace(".mlp.experts", ".mlp.experts.x"): t.pop(n) for n in list(t)}), "no matrix of an"),
])
def test_tensors_of_an_adapter_on_experts(
    base: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit(adapter := lora(base(), experts=True), tensors=change)
    refused(adapter.parent / "base", adapter, message)


def test_experts_beyond_the_model(base: Callable[..., Path]) -> None:
    for wrong, message in (("1.mlp.experts.16", "made for a base of more experts: has model.layers.1.mlp.experts.16"),
                           ("0.mlp.experts.3", "and layer 0 of the model has no routed experts")):
        layer, _, expert = wrong.partition(".mlp.experts.")

        def rename(tensors: dict[str, Any], to: str = wrong) -> None:
            tensors.update({name.replace("1.mlp.experts.3", to): tensors.pop(name) for name in list(tensors)})

        edit(adapter := lora(base(), experts=True, name=wrong), {"experts": {layer: [int(expert)], "2": [0]}}, rename)
        refused(adapter.parent / "base", adapter, message)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.update(odd=torch.ones(2)), "made for another architecture: the model has no such tensor or linear"),
    (lambda t: t.update({n.replace("experts.3", "experts.30"): t.pop(n) for n in list(t)}), "of more experts"),
    (lambda t: t.update({n.replace("layers.2", "layers.9"): t.pop(n) for n in list(t)}), "of more layers"),
    (lambda t: t.update({n: x.t() for n, x in t.items()}), "made for a base of other sizes"),
    (lambda t: next(iter(t.values())).view(-1)[:1].fill_(torch.nan), "holds values that are not finite"),
    (lambda t: t.update({n: x.to(torch.float8_e5m2) for n, x in t.items()}), "is of F8_E5M2: must be F32"),
])
def test_tensors_of_a_delta(
    base: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit(adapter := delta(base()), tensors=change)
    refused(adapter.parent / "base", adapter, message)


def test_another_base_of_the_same_shape_and_of_another(
    base: Callable[..., Path], random_model: Callable[..., CausalLM]
) -> None:
    folder = base()
    adapters = [lora(folder), lora(folder, experts=True, name="ours"), delta(folder)]
    model = load_model(folder)
    other = folder.parent / "other"
    few = dict(n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=2)
    for config, message in ((model.config.with_(rope_theta=5e5), "made for another base: its hash is"),
                            (model.config.with_(num_hidden_layers=2), "made for a base of more layers"),
                            (model.config.with_(hidden_size=40), "made for a base of other sizes"),
                            (model.config.with_(**few), None)):
        save_model(random_model(config), other)
        for adapter in adapters:
            cause = message or ("made for another base: its hash" if adapter == adapters[0] else "of more experts")
            refused(other, adapter, cause)
    assert str(folder) in _message(other, adapters[0])


def _message(folder: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, adapter=adapter)
    return str(caught.value)


def test_targets_that_match_nothing(base: Callable[..., Path]) -> None:
    """V3's queries are compressed where q_lora_rank is set: q_proj is then two modules of other names."""
    edit(adapter := lora(folder := base()), {"target_modules": ["query", "value"]})
    refused(folder, adapter, "target_modules = query, value: match nothing in this model, whose linear modules are")
    edit(adapter, {"target_modules": ["q_proj", "o_proj", "v_proj"]})  # of which peft made nothing either
    assert any(lora_modules(load_model(folder, adapter=adapter)))
    edit(adapter, {"target_modules": r".*self_attn\.(q|o)_proj"})
    assert any(lora_modules(load_model(folder, adapter=adapter)))


def test_a_tied_head_takes_no_adapter(base: Callable[..., Path]) -> None:
    edit(adapter := lora(folder := base(tie_word_embeddings=True)), {"target_modules": ["q_proj", "o_proj", "lm_head"]},
         lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
                             "base_model.model.lm_head.lora_B.weight": torch.ones(400, 4)}))
    refused(folder, adapter, "adapts lm_head, which is tied to the embeddings")


# ---- folders ------------------------------------------------------------------------------------------------------


def test_folders_that_are_something_else(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    adapter = lora(folder)
    cases: dict[str, tuple[str, list[str]]] = {
        "empty": ("the folder is empty", []), "model": ("a whole checkpoint, neither", ["config.json"]),
        "run": (f"give {tmp_path / 'run' / 'delta'}", ["delta/delta.json"]),
        "step": ("a checkpoint within a run", ["trained.safetensors"]),
        "lost": ("holds adapter_model.safetensors without adapter_config.json", ["adapter_model.safetensors"]),
        "two": ("holds delta.json and adapter_config.json: must be one", ["delta.json", "adapter_config.json"]),
        "notes": ("neither a delta (delta.json) nor an adapter", ["notes.txt"])}
    for name, (message, files) in cases.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        refused(folder, tmp_path / name, message)
    refused(folder, tmp_path / "nowhere", "no such folder")
    refused(folder, folder / "config.json", "an adapter is a folder, this is a file")
    with pytest.raises(NotFoundError):
        load_model(folder, adapter=tmp_path / "empty")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (adapter / MANIFEST).unlink()
    refused(folder, adapter, "adapter_model.bin is a pickle, which may execute code and is not read")
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 99)
    refused(folder, adapter, "not a whole safetensors file")


def test_an_adapter_of_esfts_own_code(base: Callable[..., Path], tmp_path: Path) -> None:
    """expert_cfg.json and the tuned experts' tensors: a delta without a fingerprint."""
    folder = base()
    tensors = load_file(delta(folder) / "delta.safetensors")
    want = load_model(folder, adapter=folder.parent / "delta")(IDS)
    adapter = tmp_path / "esft"
    adapter.mkdir()

    def write(keys: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (adapter / "expert_cfg.json").write_text(json.dumps(keys))
        save_file(tensors, adapter / "model.safetensors")

    keys = {"experts": {"1": [3], "2": [3]}, "shared_experts": False, "non_expert_modules": False}
    for names in (tensors, {name.removeprefix("model."): t for name, t in tensors.items()}):
        write(keys, names)
        assert torch.equal(load_model(folder, adapter=adapter)(IDS), want)
        assert merge(folder, adapter, tmp_path / "out", overwrite=True).kind == "ESFT adapter"
    torch.testing.assert_close(load_model(tmp_path / "out")(IDS), want)
    head = {"lm_head.weight": torch.zeros(400, 32)}
    write(keys | {"non_expert_modules": True}, tensors | head)
    assert not load_model(folder, adapter=adapter)(IDS).any()
    for changed, held, message in (
        ({"a_new_key": 1}, tensors, "expert_cfg.json: unknown key a_new_key = 1"),
        ({"experts": {"1": [3, 4], "2": [3]}}, tensors, "3 tensors of the experts that expert_cfg.json names are"),
        ({"experts": {"1": [3]}}, tensors, "layers.2.mlp.experts.3.down_proj.weight, which expert_cfg.json does not"),
        ({}, tensors | head, "holds lm_head.weight, which expert_cfg.json does not name (non_expert_modules)"),
        ({"shared_experts": 1}, tensors, "shared_experts = 1"),
    ):
        write(keys | changed, held)
        refused(folder, adapter, message)


def test_a_delta_goes_into_four_bits_and_says_how(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    adapter = delta(folder)
    quantize(folder, tmp_path / "four", adapter=adapter, progress=False)
    assert Atlas.load(tmp_path / "four").names == Atlas.load(folder).names
    quantize(folder, tmp_path / "plain", progress=False)
    assert not torch.equal(load_model(tmp_path / "four")(IDS), load_model(tmp_path / "plain")(IDS))
    with pytest.raises(CheckpointError, match=r"deepseek quantize PLAIN OUT --adapter DELTA"):
        load_model(tmp_path / "plain", adapter=adapter)
