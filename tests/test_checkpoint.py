"""Checkpoints: what is written comes back bit for bit, and whatever is not whole is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek import checkpoint
from deepseek.checkpoint import INDEX, MANIFEST, TensorFiles, hf_names, load_model, resolve, save_model
from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError, ConfigError, NotFoundError
from deepseek.model import CausalLM

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=8,
    qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, num_nextn_predict_layers=1)


def make_model(config: ModelConfig = CONFIG, seed: int = 0) -> CausalLM:
    """Random weights, and gate biases that BF16 cannot hold."""
    generator = torch.Generator().manual_seed(seed)
    model = CausalLM(config).init_weights(generator)
    for block in model.moe_blocks().values():
        if config.topk_method == "noaux_tc":
            block.gate.e_score_correction_bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def assert_same(a: CausalLM, b: CausalLM) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(a.model.rotary.inv_P, b.model.rotary.inv_P)


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> None:
    """Change the tensors of a file as a foreign tool would: no manifest afterwards."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)
    (folder / MANIFEST).unlink(missing_ok=True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(make_model(), tmp_path / "m")


# ---- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [5 << 30, 2000])
@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 2},
    {"q_lora_rank": 6, "attention_bias": True, "n_shared_experts": 0},
    {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax"},
], ids=lambda c: ",".join(c))
def test_save_and_load_are_bit_identical(tmp_path: Path, changes: dict[str, Any], shard_bytes: int) -> None:
    model = make_model(CONFIG.with_(**changes))
    assert save_model(model, tmp_path / "m", shard_bytes=shard_bytes) == tmp_path / "m"
    again = load_model(tmp_path / "m")
    assert again.config == model.config and not again.training
    assert_same(model, again)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids))


def test_bf16_keeps_its_bits_and_gate_biases_stay_fp32(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path / "fp32")
    half = load_model(tmp_path / "fp32", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_model(half, tmp_path / "bf16")
    again = load_model(tmp_path / "bf16")  # "auto" takes the file's dtype
    assert_same(half, again)
    for block, original in zip(again.moe_blocks().values(), model.moe_blocks().values(), strict=True):
        bias = block.gate.e_score_correction_bias
        assert bias.dtype == torch.float32 and torch.equal(bias, original.gate.e_score_correction_bias)
    assert again.model.rotary.inv_P.dtype == torch.float32
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight.bfloat16()), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("float16", torch.float16),
                                                 (torch.bfloat16, torch.bfloat16)])
def test_dtype(saved: Path, dtype: Any, expected: torch.dtype) -> None:
    assert {p.dtype for p in load_model(saved, dtype=dtype).parameters()} == {expected}


def test_an_unknown_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="dtype = 'int3': must be auto, float32, bfloat16 or float16"):
        load_model(saved, dtype="int3")  # type: ignore[arg-type]


def test_the_dtype_a_download_was_in_does_not_survive_in_config_json(tmp_path: Path) -> None:
    model = make_model()
    model.config = CONFIG.with_(extra={"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    keys = json.loads((save_model(model, tmp_path / "m") / "config.json").read_text())
    assert {keys.get("dtype", "float32"), keys.get("torch_dtype", "float32")} == {"float32"}


def test_names_on_disk() -> None:
    assert hf_names("model.norm.weight", CONFIG) == [("model.norm.weight", None)]
    assert hf_names("model.mtp.0.input.eh_proj.weight", CONFIG) == [("model.layers.2.eh_proj.weight", None)]
    assert hf_names("model.mtp.1.norm.weight", CONFIG) == [("model.layers.3.norm.weight", None)]
    parts = hf_names("model.layers.1.mlp.experts.gate_up_proj", CONFIG)
    assert parts[:2] == [("model.layers.1.mlp.experts.0.gate_proj.weight", (0, slice(0, 8))),
                         ("model.layers.1.mlp.experts.0.up_proj.weight", (0, slice(8, 16)))]
    assert len(parts) == 8
    last = hf_names("model.mtp.0.mlp.experts.down_proj", CONFIG)[3]
    assert last == ("model.layers.2.mlp.experts.3.down_proj.weight", (3, slice(None)))


# ---- layout -------------------------------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = save_model(make_model(), tmp_path / "m", shard_bytes=2000)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards == sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        tensors = load_file(folder / shard)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 2000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {shard}
        total += size
    assert index["metadata"]["total_size"] == total
    assert not any(name.startswith("model.layers.2.") for name in index["weight_map"])  # the MTP module


def test_mtp_lies_outside_the_index_but_for_61_layers(tmp_path: Path) -> None:
    folder = save_model(make_model(), tmp_path / "small")
    assert all(name.startswith("model.layers.2.") for name in load_file(folder / "mtp.safetensors"))
    assert not any(name.startswith("model.layers.2.") for name in load_file(folder / "model.safetensors"))

    tall = make_model(CONFIG.with_(
        num_hidden_layers=61, first_k_dense_replace=60, hidden_size=4, intermediate_size=2, vocab_size=8))
    folder = save_model(tall, tmp_path / "tall", shard_bytes=8000)
    assert not (folder / "mtp.safetensors").exists()
    assert "model.layers.61.eh_proj.weight" in json.loads((folder / INDEX).read_text())["weight_map"]
    assert_same(tall, load_model(folder))


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    class FakeTokenizer:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    def add(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "rng").write_bytes(b"\x01")

    note = tmp_path / "note.txt"
    note.write_text("hello")
    folder = save_model(make_model(), tmp_path / "m", tokenizer=FakeTokenizer(), extra_files=[note], add=add)
    assert (folder / "note.txt").read_text() == "hello" and (folder / "tokenizer.json").exists()
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(listed) == [
        "config.json", "model.safetensors", "mtp.safetensors", "note.txt", "state/rng", "tokenizer.json"]
    (folder / "state" / "rng").write_bytes(b"\x02")
    with pytest.raises(CheckpointError, match="state/rng: altered"):
        checkpoint.check_manifest(folder)


def test_a_failing_save_keeps_the_old_checkpoint(saved: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_model(make_model(seed=1), saved, add=fail)
    assert_same(make_model(), load_model(saved))
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


# ---- damage -------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("model-00002-of-*", lambda p: os.truncate(p, p.stat().st_size - 1), "truncated or altered: .* the manifest says"),
    ("model-00002-of-*", lambda p: flip(p, -3), "altered: its SHA-256 is not the manifest's"),
    ("model-00003-of-*", Path.unlink, "the file is missing"),
    ("mtp.safetensors", lambda p: flip(p, -3), "altered"),
    ("mtp.safetensors", Path.unlink, "the file is missing"),
    (INDEX, lambda p: flip(p, 30), "altered"),
    ("config.json", lambda p: p.write_text(p.read_text().replace("1e-06", "1e-05")), "altered"),
    (MANIFEST, lambda p: p.write_text("{"), "not a manifest"),
    (MANIFEST, lambda p: p.write_text('{"files": []}'), "not a manifest"),
    (MANIFEST, lambda p: p.write_text('{"files": {"config.json": {}}}'), "not a manifest"),
])
def test_damage_is_refused_naming_the_file(
    tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = save_model(make_model(), tmp_path / "m", shard_bytes=2000)
    [path] = folder.glob(file)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert str(path) in str(caught.value)


def test_verification_can_be_left_out(saved: Path) -> None:
    whole = load_model(saved).state_dict()
    flip(saved / "model.safetensors", -3)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(saved)
    damaged = load_model(saved, verify=False).state_dict()
    assert sum(not torch.equal(tensor, whole[name]) for name, tensor in damaged.items()) == 1


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_download_is_refused_by_name(saved: Path, keep: int) -> None:
    (saved / MANIFEST).unlink()
    file = saved / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        load_model(saved)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight",
                                  "model.layers.1.mlp.experts.3.up_proj.weight",
                                  "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_a_missing_tensor_is_named(saved: Path, name: str) -> None:
    rewrite(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing, first {name}") as caught:
        load_model(saved)
    assert str(saved) in str(caught.value)


def test_an_extra_tensor_is_named(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({"model.layers.0.mlp.odd.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"1 tensors have no place .*, first model.layers.0.mlp.odd.weight"):
        load_model(saved)


def test_a_wrong_shape_is_named(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(17)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(17,\), config.json asks for \(16,\)"):
        load_model(saved)
    rewrite(saved, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}))
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].t().contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(8, 16\), config.json asks for \(16, 8\)"):
        load_model(saved)


def test_mtp_announced_but_absent_is_left_out(saved: Path) -> None:
    """transformers writes the count into config.json but not the modules."""
    (saved / "mtp.safetensors").unlink()
    (saved / MANIFEST).unlink()
    model = load_model(saved)
    assert model.config.num_nextn_predict_layers == 0 and len(model.model.mtp) == 0


@pytest.mark.parametrize(("index", "message"), [
    ('{"weight_map": {"a": "../other/model.safetensors"}}', "'../other/model.safetensors' leads out of the folder"),
    ('{"weight_map": {"a": "/etc/x.safetensors"}}', "leads out of the folder"),
    ('{"weight_map": {"a": ".."}}', "leads out of the folder"),
    ('{"weight_map": {"a": "model.safetensors/../../x"}}', "leads out of the folder"),
    ('{"weight_map": {"a": "sub/x.safetensors"}}', "leads out of the folder"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: the file is missing"),
    ('{"weight_map": {"a": "model.safetensors"}}', "the index names 1 tensors that its files do not hold, first a"),
    ("{", "not a weight index"),
    ("{}", "not a weight index"),
    ("[]", "not a weight index"),
    ('{"weight_map": []}', "not a weight index"),
    ('{"weight_map": {"a": 3}}', "not a weight index"),
])
def test_an_index_that_cannot_be_followed(saved: Path, index: str, message: str) -> None:
    (saved / MANIFEST).unlink()
    (saved / INDEX).write_text(index)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    assert message in str(caught.value) and str(saved) in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/passwd", "a\0b"])
def test_a_manifest_that_leads_out(saved: Path, name: str) -> None:
    (saved.parent / "secret").touch()
    entries = json.loads((saved / MANIFEST).read_text())
    entries["files"][name] = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    (saved / MANIFEST).write_text(json.dumps(entries))
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    assert str(caught.value) == f"{saved / MANIFEST}: {name!r} leads out of the folder"


def test_weights_quantized_by_other_tools_are_refused(saved: Path) -> None:
    (saved / MANIFEST).unlink()
    keys = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(keys | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ConfigError, match="quant_method = 'awq'"):
        load_model(saved)


class Trap:
    """Unpickling this creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickles_are_never_read(saved: Path, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in ("pytorch_model.bin", "optimizer.pt", "model.safetensors.bin"):
        (saved / name).write_bytes(trap)
    load_model(saved)
    (saved / MANIFEST).unlink()
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is missing"):
        load_model(saved)
    (saved / "model.safetensors").write_bytes(trap)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(saved)
    assert not (tmp_path / "sprung").exists()


# ---- reading one tensor -------------------------------------------------------------------------------------------


def test_reading_one_tensor_does_not_read_the_others(tmp_path: Path) -> None:
    """Beside a small tensor lies one of 2 GiB (a hole on the disk); memory must not follow."""
    big = 2 << 30
    header = json.dumps({"big": {"dtype": "U8", "shape": [big], "data_offsets": [8, 8 + big]},
                         "small": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0))
    os.truncate(file, 8 + len(header) + 8 + big)
    before = psutil.Process().memory_info().rss
    files = TensorFiles(tmp_path)
    assert sorted(files) == ["big", "small"] and files.shape("big") == (big,) and files.dtype("small") == "F32"
    assert files.read("small").tolist() == [1.5, -2.0]
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_reading_in_another_dtype(saved: Path) -> None:
    files = TensorFiles(saved)
    name = "model.norm.weight"
    assert name in files and "nothing" not in files
    assert files.read(name).dtype == torch.float32 and files.read(name, torch.bfloat16).dtype == torch.bfloat16


# ---- names --------------------------------------------------------------------------------------------------------


def test_a_local_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "deepseek-v3"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve("deepseek-v3").resolve() == folder and resolve(folder) == folder
    assert resolve("~/deepseek-v3") == folder


@pytest.mark.parametrize(("name", "message"), [
    ("empty", "empty: the folder has no config.json"),
    ("file", "file: a checkpoint is a folder, this is a file"),
    ("nowhere", "nowhere: no such folder here, and not the form of a hub id (owner/name)"),
    ("./no/where", "./no/where: no such folder here"),
    ("~/where", "~/where: no such folder here"),
    ("a/b/c", "a/b/c: no such folder here"),
    ("v3-63m", "it is a preset"),
    ("owner/na..me", "owner/na..me: "),
    ("owner/-name", "owner/-name: "),
])
def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFoundError) as caught:
        resolve(name)
    assert message in str(caught.value)


RESOLVE = """
import json, os, sys
from deepseek.checkpoint import resolve
from deepseek.errors import NotFoundError
assert "huggingface_hub" not in sys.modules
for environment in json.loads(sys.argv[1]):  # a process each, forked: this one has imported torch
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
        continue
    os.environ |= environment
    for name in sys.argv[2:]:
        try:
            print(resolve(name))
        except NotFoundError as error:
            print("refused:", error)
    break
"""


def cached(home: Path, repo: str, files: dict[str, str]) -> Path:
    """A copy of the repository `repo` in huggingface_hub's cache, made by hand."""
    revision = "0" * 40
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot


def test_offline_a_whole_copy_is_taken_and_the_error_says_what_was_tried(tmp_path: Path) -> None:
    """In processes of their own, because huggingface_hub reads its environment when it is imported.

    Other programs share the cache and leave copies there that are not whole: a lone config.json, half of the shards.
    """
    index = '{"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}'
    half = {"config.json": "{}", INDEX: index, "x-1.safetensors": ""}
    cached(tmp_path, "owner/config-only", {"config.json": "{}"})
    cached(tmp_path, "owner/half", half)
    whole = cached(tmp_path, "deepseek-ai/DeepSeek-V2-Lite", half | {"x-2.safetensors": ""})
    names = ["deepseek-v3", "deepseek-v2-lite", "owner/config-only", "owner/half"]
    environments = [{"HF_HUB_OFFLINE": "1"},
                    {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}]  # nothing listens on port 9
    done = subprocess.run([sys.executable, "-c", RESOLVE, json.dumps(environments), *names], cwd=tmp_path, check=True,
                          capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HOME": str(tmp_path)})
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for (nowhere, found, lone, partial), reason in ((lines[:4], "disabled"), (lines[4:], "Connection refused")):
        assert nowhere.startswith("refused: deepseek-v3: no such folder here, hub id deepseek-ai/DeepSeek-V3 is not in "
                                  "the local cache, and the hub gave no answer: ")
        assert reason in nowhere
        assert found == str(whole)
        assert lone.startswith("refused: owner/config-only: ") and "model.safetensors" in lone
        assert partial.startswith("refused: owner/half: ") and "x-2.safetensors" in partial
