"""Adapters merged into their base: the weights, the bytes beside quantizing at once, what is written, interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.checkpoint import (
    MANIFEST,
    TensorFiles,
    attach_adapter,
    base_tensors,
    fingerprint,
    load_model,
    save_adapter,
    save_delta,
    save_model,
    tensor_hashes,
)
from deepseek.cli import main
from deepseek.convert import PROVENANCE, dequantize, merge
from deepseek.errors import CheckpointError, ConfigError
from deepseek.model.adapter import LoraSpec, fold, lora_modules
from deepseek.quant import fp8
from tests.helpers.adapters import trained
from tests.helpers.conversions import contents, interrupt, quiet

EXPERTS = {1: (0, 5), 2: (15,)}
SIDES: dict[str, dict[str, Any]] = {
    "attention": dict(targets=("q_proj", "o_proj")), "experts": dict(experts=EXPERTS),
    "everything": dict(targets=("all-linear",), experts=EXPERTS), "rslora": dict(targets=("q_proj",), use_rslora=True)}


def of(folder: Path) -> str:
    model = load_model(folder)
    return fingerprint(tensor_hashes(model), model.config)


@torch.no_grad()
def lora(base: Path, kind: str = "everything", scale: float = 0.05) -> Path:
    """An adapter on the checkpoint `base`, as if trained."""
    model = load_model(base, torch.float32)
    side = LoraSpec(3, 6.0, **SIDES[kind])
    attach_adapter(model, side)
    return save_adapter(base.parent / f"lora {kind}", trained(model, scale), side, str(base), of(base))


def delta(base: Path, *parts: str) -> Path:
    """Changed tensors: those with one of `parts` in their names, or some experts and a gate with its bias."""
    parts = parts or ("layers.1.mlp.experts.5.", "layers.2.mlp.experts.0.", "layers.1.mlp.gate.")
    generator = torch.Generator().manual_seed(4)
    tensors = {name: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype)
               for name, t in base_tensors(load_model(base)).items() if any(part in name for part in parts)}
    about = {"base_name": str(base), "mode": "experts", "experts": {}}
    return save_delta(base.parent / "delta", tensors, of(base), about)


def in_fp8(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = fp8.quantize(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    (folder / MANIFEST).unlink()
    return folder


@pytest.mark.parametrize("kind", [*SIDES, "delta"])
@pytest.mark.parametrize(("dtype", "changes"), [
    (torch.float32, {}), (torch.bfloat16, dict(num_nextn_predict_layers=1, q_lora_rank=24, attention_bias=True)),
    (torch.float32, dict(tie_word_embeddings=True)), (torch.float16, {})])
@torch.no_grad()
def test_a_merge_is_the_adapted_model_and_gives_the_same_four_bits(
    source: Callable, kind: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Every number is the one of fold; quantizing with the adapter has the bytes of merging and then quantizing."""
    base = source(dtype, **changes)
    adapter = delta(base) if kind == "delta" else lora(base, kind)
    done = merge(base, adapter, base.parent / "merged", progress=False)
    assert done.dtype == str(dtype).removeprefix("torch.") and done.kept > 0.99
    plain, merged = (TensorFiles(folder) for folder in (base, done.path))
    names = {name for name in plain if not torch.equal(plain.read(name, merged.read(name).dtype), merged.read(name))}
    assert set(plain) == set(merged) and len(names) == done.changed
    want = load_model(base, adapter=adapter)
    assert any(lora_modules(want)) == (kind != "delta")
    fold(want)
    ours = base_tensors(load_model(done.path))
    for name, tensor in base_tensors(want).items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
    once, report = quiet(base, name="once", adapter=adapter)
    twice, other = quiet(done.path, name="twice")
    assert contents(once) == contents(twice) and report == other
    assert not list(base.parent.glob("*.partial")) and load_model(once, verify=True)


@torch.no_grad()
def test_of_an_fp8_base(source: Callable) -> None:
    base = in_fp8(source(hidden_size=136, intermediate_size=140))
    adapter = lora(base)
    done = merge(base, adapter, base.parent / "merged", progress=False)
    assert done.dtype == "bfloat16" and {TensorFiles(done.path).dtype(name) for name in TensorFiles(done.path)} == {
        "BF16", "F32"}
    once, _ = quiet(base, name="once", adapter=adapter)
    assert contents(once) == contents(quiet(done.path, name="twice")[0])


@torch.no_grad()
def test_what_half_precision_cannot_hold_is_written_in_float32(source: Callable, capsys: Any) -> None:
    base = source(torch.bfloat16)
    keys = json.loads((base / "config.json").read_text())  # as others write it
    del keys["num_key_value_heads"], keys["moe_dr"], keys["torch_dtype"]
    keys |= {"transformers_version": "5", "dtype": "bfloat16", "use_cache": True, "rope_theta": keys.pop("rope_theta")}
    (base / "config.json").write_text(json.dumps(keys))
    (base / MANIFEST).unlink()
    adapter = lora(base, "attention", 1e-4)  # steps below the resolution of BF16
    auto = merge(base, adapter, base.parent / "auto", progress=False)
    assert auto.dtype == "float32" and auto.kept == 1
    assert re.search(r"6 tensors changed, written in float32, as bfloat16 would hold [\d.]+% of what the", str(auto))
    assert json.loads((auto.path / "config.json").read_text())["torch_dtype"] == "float32"
    once, _ = quiet(base, name="once", adapter=adapter)
    assert contents(once) == contents(quiet(auto.path, name="twice")[0])
    assert main(["merge", str(base), str(adapter), str(base.parent / "half"), "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert (share := re.search(r"written in bfloat16, which holds ([\d.]+)% of what the adapter adds", shown))
    assert float(share[1]) < 90
    assert load_model(base.parent / "half").lm_head.weight.dtype == torch.bfloat16


def test_what_is_written(source: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """Index, small files, provenance with the steps before it; another merge goes on from there."""
    base = source(torch.float32)
    for name in ("tokenizer.json", "atlas.json", "LICENSE"):
        (base / name).write_text("{}")
    (base / MANIFEST).unlink()
    first = delta(base)
    assert main(["merge", str(base), str(first), str(base.parent / "one")]) == 0
    shown = capsys.readouterr().out
    assert "delta: 8 tensors changed, written in float32\n" in shown and f"model: {base.parent / 'one'}" in shown
    one = base.parent / "one"
    assert {"tokenizer.json", "atlas.json", "LICENSE", "config.json", MANIFEST, PROVENANCE} <= set(contents(one))
    second = lora(one, "attention")
    two = merge(one, second, base.parent / "two", shard_bytes=100_000, progress=False).path
    assert len(list(two.glob("model-0000*.safetensors"))) > 2 and (two / "model.safetensors.index.json").is_file()
    steps = json.loads((two / PROVENANCE).read_text())["merged"]
    assert [step["base"]["fingerprint"] for step in steps] == [of(base), of(one)]
    assert [step["adapter"]["kind"] for step in steps] == ["delta", "LoRA adapter"]
    assert set(steps[1]["adapter"]["sha256"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert steps[1]["adapter"]["name"] == str(second) and steps[1]["changed"] == 6
    load_model(two, verify=True)
    (one / PROVENANCE).write_text('{"format": 1, "merged": NaN}')
    (one / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"provenance\.json: not a record of merges: .*nan is no"):
        merge(one, second, base.parent / "x", progress=False)
    assert not list(base.parent.glob("x*"))


@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    source: Callable, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = source(torch.float32)
    adapter, other = delta(base), lora(base, "attention")

    def run(out: str, adapter: Path = adapter) -> Path:
        if command == "quantize":
            return quiet(base, name=out, adapter=adapter, shard_bytes=100_000)[0]
        return merge(base, adapter, base.parent / out, shard_bytes=100_000, progress=False).path

    interrupt(monkeypatch, "-00003-")
    with pytest.raises(KeyboardInterrupt):
        run("again")
    monkeypatch.undo()
    partial = base.parent / "again.partial"
    times = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.safetensors")}
    assert len(times) == 2 and not (base.parent / "again").exists()
    with pytest.raises(ConfigError, match="holds the beginning of another conversion"):
        run("again", other)
    assert contents(run("again")) == contents(run("straight")) and not partial.exists()
    assert all((base.parent / "again" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_what_cannot_be_merged(source: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    base = source(torch.float32)
    adapter = delta(base)
    four, _ = quiet(base)
    other = load_model(base)
    other.model.norm.weight.data[0] += 1e-3
    save_model(other, base.parent / "other")
    x = base.parent / "x"
    for work, error, message in (
        (lambda: merge(four, adapter, x), ConfigError, "is quantized (nf4), and a merge would be rounded away"),
        (lambda: merge(base.parent / "other", adapter, x), CheckpointError, "delta: made for another base: its hash "
         f"is {of(base)[:16]}… ({base}), that of this model"),
        (lambda: quiet(base.parent / "other", name="x", adapter=adapter), CheckpointError, "made for another base"),
        (lambda: merge(base, adapter, base, overwrite=True), ConfigError, "must not be the source"),
        (lambda: merge(base, adapter, adapter, overwrite=True), ConfigError, "must not be the source"),
        (lambda: merge(base, adapter, four), ConfigError, "must be a new or an empty folder"),
        (lambda: merge(base, adapter, x, "int8"), ConfigError, "dtype = 'int8': must be one of auto"),  # type: ignore
        (lambda: merge(base, lora(base, "attention", 0.0), x), ConfigError, "every B is zero"),
        (lambda: quiet(four, name="x", adapter=adapter), ConfigError, "is quantized already"),
    ):
        with pytest.raises(error) as caught:
            work()
        assert message in str(caught.value)
        assert not list(base.parent.glob("x*"))
    assert main(["quantize", str(four), str(x), "--format", "bf16", "--adapter", str(adapter)]) == 2
    assert "adapter = " in (said := capsys.readouterr().err) and "deepseek merge IN ADAPTER OUT" in said


def test_a_large_matrix_has_the_same_bits_whatever_its_blocks(
    source: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = source(torch.float32, vocab_size=700, intermediate_size=300)
    adapter = lora(base)
    whole = merge(base, adapter, base.parent / "whole", progress=False).path
    monkeypatch.setattr("deepseek.checkpoint.files.CHUNK", 1)
    cut = merge(base, adapter, base.parent / "cut", progress=False).path
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()


@torch.no_grad()
def test_a_head_that_is_said_to_be_tied_and_is_not(source: Callable) -> None:
    """Loaded untied with a warning, everywhere; one that is the embedding's copy is tied, and a missing one is an error
    that says what may be meant."""
    base = source(torch.float32)
    want, ids_BT = load_model(base), torch.arange(20).view(2, 10)
    fingerprints = {of(base)}
    keys = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(keys | {"tie_word_embeddings": True}))
    (base / MANIFEST).unlink()

    def warned(work: Callable[[], Any]) -> Any:
        with pytest.warns(UserWarning, match="tie_word_embeddings = true, but lm_head.weight is not the embedding"):
            return work()

    model = warned(lambda: load_model(base))
    assert torch.equal(model(ids_BT), want(ids_BT)) and not model.config.tie_word_embeddings
    fingerprints.add(warned(lambda: of(base)))
    plain = warned(lambda: dequantize(base, base.parent / "plain", "float32", progress=False))
    four = warned(lambda: quiet(base, "int8", name="four"))[0]
    adapter = warned(lambda: delta(base, "lm_head.weight", "layers.1.mlp.experts.5."))
    merged = warned(lambda: merge(base, adapter, base.parent / "merged", progress=False)).path
    tuned = warned(lambda: load_model(base, adapter=adapter))(ids_BT)
    once = warned(lambda: quiet(base, name="once", adapter=adapter))[0]
    assert contents(once) == contents(quiet(merged, name="twice")[0])
    for folder in (plain, four, merged):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_model(plain)(ids_BT), want(ids_BT))
    assert torch.cosine_similarity(load_model(four)(ids_BT).flatten(), want(ids_BT).flatten(), 0) > 0.95
    torch.testing.assert_close(load_model(merged)(ids_BT), tuned)
    fingerprints |= {of(plain), json.loads((four / "config.json").read_text())["quantization_config"]["source"]}
    assert len(fingerprints) == 1 and not torch.allclose(tuned, want(ids_BT))
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    assert load_model(base).config.tie_word_embeddings
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(keys))
    for work in (load_model, lambda folder: quiet(folder, name="x"),
                 lambda folder: merge(folder, adapter, folder.parent / "x")):
        with pytest.raises(CheckpointError, match=r"missing, first lm_head\.weight: .*tie_word_embeddings = true"):
            work(base)
