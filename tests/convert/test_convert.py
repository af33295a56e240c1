"""Quantized checkpoints: written whole or not at all, mapped when loaded, and convertible back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek import LLM, SamplingParams, Tokenizer, info
from deepseek.checkpoint import MANIFEST, TensorFiles, fingerprint, load_model, save_model, tensor_hashes
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.convert import REPORT, dequantize, writing
from deepseek.errors import ConfigError
from deepseek.ops.panels import Quantized, unpack, unpack_mlp
from deepseek.quant import fp8, int8, nf4
from deepseek.quant.linear import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, QuantizedMLP
from deepseek.quant.pack import quantize_panels
from tests.helpers.conversions import contents, header, interrupt, quiet

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "no shared": dict(n_shared_experts=0), "tied": dict(tie_word_embeddings=True),
    "everything": dict(num_nextn_predict_layers=1, q_lora_rank=24, attention_bias=True, n_shared_experts=2),
    "v2": dict(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, n_group=1,
               topk_group=1, n_shared_experts=2),
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


# ---- what is written ------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_every_weight_is_its_codec_s(source: Callable, format: Any, changes: dict[str, Any]) -> None:
    """The packed bytes are the codec's of the source's matrix; all else is what it was."""
    folder = source(**changes)
    out, report = quiet(folder, format)
    plain = {**load_file(folder / "model.safetensors")}
    if (folder / "mtp.safetensors").exists():
        plain |= load_file(folder / "mtp.safetensors")
    bits = 4 if format == "nf4" else 8

    def codec(w_OK: Tensor) -> Quantized:
        rows, columns = w_OK.shape
        return unpack(quantize_panels(w_OK, bits)[0], rows, columns, bits)

    def expected(name: str) -> Tensor:
        return codec(plain.pop(name).float()).dequantize()

    embedding = plain.pop("model.embed_tokens.weight").float()
    head = embedding if changes.get("tie_word_embeddings") else None
    table = int8.quantize(embedding)
    for name, tensor in load_file(out / "model.safetensors").items():
        stem = name.rpartition(".")[0]
        if name.endswith(".packed") and ".mlp" in name:
            rows, columns = plain[f"{stem}.gate_proj.weight"].shape
            assert len(tensor) % 4096 == 0
            for part, q in zip(("gate", "up", "down"), unpack_mlp(tensor, columns, rows, bits), strict=True):
                assert torch.equal(q.dequantize(), expected(f"{stem}.{part}_proj.weight")), (name, part)
        elif name == "lm_head.packed" and head is not None:
            assert torch.equal(unpack(tensor, 97, 72, bits).dequantize(), codec(head).dequantize())
        elif name.endswith(".packed"):
            rows, columns = plain[f"{stem}.weight"].shape
            assert torch.equal(unpack(tensor, rows, columns, bits).dequantize(), expected(f"{stem}.weight")), name
        elif name.endswith(".codes"):
            assert torch.equal(tensor, table.code_OK)
        elif name.endswith(".step"):
            assert torch.equal(tensor, table.step_O)
        else:
            assert torch.equal(tensor, plain.pop(name)), name
    assert not plain
    assert 0 < report.error < (0.1 if format == "nf4" else 0.01)


@every_variant
def test_the_layout(source: Callable, changes: dict[str, Any]) -> None:
    """Alignments of docs/formats.md, no holes, experts of a layer in a row; the same over several files."""
    folder = source(**changes)
    for out in (quiet(folder)[0], quiet(folder, name="shards", shard_bytes=60_000)[0]):
        files = sorted(out.glob("*.safetensors"))
        assert (len(files) > 2) == (out.name == "shards") == (out / "model.safetensors.index.json").is_file()
        experts = []
        for file in files:
            begin, entries = header(file)
            assert begin % 4096 == 0
            end = 0
            for name, entry in entries.items():
                assert entry["data_offsets"][0] == end, name
                align = 4096 if ".mlp" in name and name.endswith("packed") else 64 if name.endswith("packed") else {
                    "F32": 4, "BF16": 2, "I8": 1}[entry["dtype"]]
                assert end % align == 0, name
                end = entry["data_offsets"][1]
                experts += re.findall(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.packed", name)
            assert begin + end == file.stat().st_size
        assert experts == [(layer, str(e)) for layer in dict(experts) for e in range(16)]
        about = json.loads((out / "config.json").read_text())["quantization_config"]
        base = load_model(folder)
        assert about.pop("source") == fingerprint(tensor_hashes(base), base.config)
        assert about == {"quant_method": "moe_dr", "format": "nf4", "version": 1, "keep": []}


@every_variant
def test_info_accounts_for_exactly_these_bytes(source: Callable, changes: dict[str, Any]) -> None:
    folder = source(**(changes | {"num_nextn_predict_layers": 0}))
    model = load_model(folder, dtype="bfloat16")
    out, report = quiet(save_model(model, folder.parent / "bf16"))
    begin, _ = header(out / "model.safetensors")
    accounts = info.describe(ModelConfig.from_file(out))
    assert accounts.in_format("NF4").weights == (out / "model.safetensors").stat().st_size - begin
    assert accounts.total == report.parameters


def test_the_report(source: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source(num_nextn_predict_layers=1)
    out, report = quiet(folder)
    stored = json.loads((out / REPORT).read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert stored["bits_per_weight"] == 8 * size / stored["parameters"] == report.bits_per_weight
    errors = stored["relative_error"]
    assert set(errors["layers"]) == {"0", "1", "2", "3"}
    assert set(errors["experts"]) == {f"{layer}.{e}" for layer in (1, 2, 3) for e in range(16)}
    assert {"mlp.experts.down_proj", "self_attn.q_proj", "embed_tokens", "lm_head", "eh_proj"} <= set(errors["kinds"])
    w = load_file(folder / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].float()
    relative = (nf4.quantize(w).dequantize() - w).norm() / w.norm()
    assert errors["weights"]["model.layers.0.self_attn.o_proj.weight"] == pytest.approx(float(relative), rel=1e-5)
    worst = max(errors["experts"], key=errors["experts"].__getitem__).split(".")
    assert f"layer {worst[0]} expert {worst[1]} " in report.table() and "bits a weight" in report.table()


def test_large_matrices_are_cut_into_row_blocks(source: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the blocks cannot be seen in the result."""
    folder = source(torch.float32, vocab_size=700, intermediate_size=300)
    whole, _ = quiet(folder)
    monkeypatch.setattr("deepseek.checkpoint.files.CHUNK", 1)  # as few as rows go together: 128
    cut, _ = quiet(folder, name="cut")
    for file in ("model.safetensors", "config.json"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes()
    back, again = (dequantize(folder.parent / name, folder.parent / f"{name} back", "float32", progress=False)
                   for name in ("q", "cut"))
    assert (back / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_a_report_by_its_old_name_is_left_behind(source: Callable) -> None:
    """Checkpoints of 0.1 say quantisation.json; they load, and convert to folders without a stale report."""
    out, _ = quiet(source())
    manifest = json.loads((out / MANIFEST).read_text())
    (out / REPORT).rename(out / writing.OLD_REPORT)
    manifest["files"][writing.OLD_REPORT] = manifest["files"].pop(REPORT)
    (out / MANIFEST).write_text(json.dumps(manifest))
    load_model(out, verify=True)
    back = dequantize(out, out.parent / "back", "float32", progress=False)
    assert not {REPORT, "quantisation.json"} & {*contents(back)} and "quantisation.json" in contents(out)


def test_small_files_come_along(source: Callable) -> None:
    folder = source()
    Tokenizer.train([], 261).save(folder)
    (folder / "weights.bin").write_bytes(b"pickle")
    (folder / MANIFEST).unlink()
    out, _ = quiet(folder)
    assert sorted(contents(out)) == sorted({*contents(folder), MANIFEST, REPORT} - {"weights.bin"})
    entries = json.loads((out / MANIFEST).read_text())["files"]
    assert sorted(entries) == sorted(set(contents(out)) - {MANIFEST})
    load_model(out, verify=True)


KEEPS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "a head": (("lm_head.weight",), {"lm_head"}),
    "a layer": (("model.layers.0.*",), {
        "model.layers.0.mlp", *(f"model.layers.0.self_attn.{p}_proj" for p in ("q", "kv_b", "o")),
        "model.layers.0.self_attn.kv_a_proj_with_mqa"}),
    "one weight of one expert": (("model.layers.1.mlp.experts.3.up_proj.weight",), {"model.layers.1.mlp.experts"}),
    "shared experts": (("*.shared_experts.down_proj.weight",),
                       {f"model.layers.{i}.mlp.shared_experts" for i in (1, 2)}),
    "two patterns": (("*.o_proj.weight", "model.embed_tokens.weight"),
                     {"model.embed_tokens", *(f"model.layers.{i}.self_attn.o_proj" for i in range(3))}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("patterns", "kept"), KEEPS.values(), ids=KEEPS.keys())
def test_what_is_kept(source: Callable, patterns: tuple[str, ...], kept: set[str], tied: bool) -> None:
    folder = source(tie_word_embeddings=tied)
    out, report = quiet(folder, keep=patterns)
    assert set(report.kept) == kept and f"kept as they were: {report.kept[0]}" in report.table()
    files, plain = TensorFiles(out), TensorFiles(folder)
    stems = tuple(f"{stem}." for stem in kept)
    assert not any(name.startswith(stems) and name.endswith((".packed", ".codes")) for name in files)
    for name in plain:
        if name.startswith(stems):
            assert torch.equal(files.read(name), plain.read(name))
    model, full = load_model(out), load_model(dequantize(out, folder.parent / "b", "float32", progress=False))
    ids_BT = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        assert torch.cosine_similarity(model(ids_BT).flatten(), full(ids_BT).flatten(), 0) > 0.95


def test_both_tied_tables_can_be_kept(source: Callable) -> None:
    folder = source(tie_word_embeddings=True)
    out, _ = quiet(folder, keep=["lm_head.weight", "model.embed_tokens.weight"])
    assert "lm_head.weight" not in TensorFiles(out)
    model = load_model(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_official_fp8_is_a_source(source: Callable) -> None:
    """Its values are those of the checkpoint that DeepSeek's formula gives in BF16 first."""
    folder = source(num_nextn_predict_layers=1, intermediate_size=140, hidden_size=136)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = fp8.quantize(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    (folder / MANIFEST).unlink()
    plain = save_model(load_model(folder, "float32"), folder.parent / "plain")
    eight, _ = quiet(folder)
    four, _ = quiet(plain, name="p")
    ours, theirs = load_file(eight / "model.safetensors"), load_file(four / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in ours.items())
    noted = json.loads((eight / "config.json").read_text())["quantization_config"]["source"]
    assert noted == fingerprint(tensor_hashes(base := load_model(folder)), base.config)
    direct = load_model(dequantize(folder, folder.parent / "bf16", progress=False)).state_dict()
    for name, tensor in load_model(folder, "bfloat16").state_dict().items():
        assert torch.equal(direct[name], tensor), name


# ---- what is read ---------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("format", ["nf4", "int8"])
@torch.no_grad()
def test_the_model_computes_what_its_plain_twin_does(source: Callable, format: Any, changes: dict[str, Any]) -> None:
    """But for activations in int8, which the twin has in float32."""
    folder = source(**changes)
    out, _ = quiet(folder, format)
    model, twin = load_model(out), load_model(dequantize(out, folder.parent / "b", "float32", progress=False))
    assert model.config == twin.config and not model.training and model.compute_dtype == torch.float32
    kinds = {type(module) for module in model.modules()}
    assert {QuantizedLinear, QuantizedMLP, QuantizedExperts, QuantizedEmbedding} <= kinds
    ids_BT = torch.randint(0, 97, (2, 20))
    ours, theirs = model(ids_BT), twin(ids_BT)
    assert ours.dtype == torch.float32
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.95  # near ties of the gate go either way
    if len(model.model.mtp):
        h_BTH = model.mtp_hidden(0, model.hidden(ids_BT)[:, :-1], ids_BT[:, 1:])
        assert torch.cosine_similarity(
            h_BTH.flatten(), twin.mtp_hidden(0, twin.hidden(ids_BT)[:, :-1], ids_BT[:, 1:]).flatten(), 0) > 0.95
    block = model.moe_blocks()[1]
    assert not hasattr(block, "shared_experts")
    assert (block.experts.shared is None) == (model.config.n_shared_experts == 0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.endswith("gate.weight") else torch.float32), name
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight.bfloat16()) or changes.get("tie_word_embeddings")


def test_the_file_is_mapped_and_not_copied(source: Callable) -> None:
    out, _ = quiet(source())
    model = load_model(out)
    ranges = [[int(end, 16) for end in line.split()[0].split("-")]
              for line in Path("/proc/self/maps").read_text().splitlines()
              if line.endswith(str(out / "model.safetensors"))]
    experts = [packed for block in model.moe_blocks().values() for packed in block.experts.table]
    buffers = [tensor for name, tensor in model.named_buffers() if name.endswith(("packed", "shared", "codes"))]
    assert len(experts) == 32 and len(buffers) > 10
    for tensor in (*experts, *buffers):
        assert any(low <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= high for low, high in ranges)
        assert tensor.dtype == torch.int8 or tensor.data_ptr() % 64 == 0
    steps = {b.data_ptr() - a.data_ptr() for a, b in pairwise(experts[:16])}
    assert steps == {experts[0].nbytes} and experts[0].data_ptr() % 4096 == 0


def test_generation_and_the_commands(
    source: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = source(vocab_size=261)
    Tokenizer.train([], 261).save(folder)
    (folder / MANIFEST).unlink()

    def deepseek(*words: object) -> tuple[int, str]:
        status = main([*map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out if status == 0 else captured.err

    status, output = deepseek("quantize", folder, tmp_path / "four", "--keep", "lm_head.*", "*.o_proj.*")
    assert status == 0 and all(words in output for words in ("bits a weight", "worst experts", "kept"))
    text = LLM(tmp_path / "four").generate(["abc"], SamplingParams(max_tokens=5, temperature=0))[0].text
    status, output = deepseek("infer", "--model", tmp_path / "four", "--prompt", "abc", "--max_tokens", 5,
                              "--temperature", 0)
    assert status == 0 and output == text + "\n"
    assert deepseek("info", tmp_path / "four")[0] == 0
    assert deepseek("quantize", tmp_path / "four", tmp_path / "back", "--format", "bf16")[0] == 0
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    status, output = deepseek("quantize", folder, tmp_path / "four")
    assert status == 2 and "must be a new or an empty folder" in output
    status, output = deepseek("quantize", tmp_path / "four", tmp_path / "x", "--format", "bf16", "--keep", "*")
    assert status == 2 and "keep = ['*']: has a meaning only with nf4 and int8" in output


@pytest.mark.parametrize("changes", [VARIANTS[name] for name in ("plain", "tied", "everything", "v2")])
@torch.no_grad()
def test_transformers_loads_the_way_back(source: Callable, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the test extra (transformers)")
    out, _ = quiet(source(torch.float32, **changes))
    back = dequantize(out, out.parent / "back", "float32", progress=False)
    assert not (back / REPORT).exists()
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report.values()), report
    ids_BT = torch.randint(0, 97, (2, 12))
    torch.testing.assert_close(theirs(ids_BT).logits, load_model(back)(ids_BT), atol=1e-4, rtol=0)


def test_bf16_is_the_default_and_rounds_once(source: Callable) -> None:
    out, _ = quiet(source())
    wide, narrow = (load_model(dequantize(out, out.parent / dtype, dtype, progress=False))
                    for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for name, tensor in wide.state_dict().items():
        assert torch.equal(narrow.state_dict()[name], tensor if "correction" in name else tensor.bfloat16()), name


# ---- interruption ---------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_gives_the_same_bytes(source: Callable) -> None:
    folder = source(num_nextn_predict_layers=1)
    straight, report = quiet(folder, shard_bytes=100_000)
    code = f"""
import os, signal
from deepseek import convert
from deepseek.convert import writing
write = writing.write_file
writing.write_file = lambda path, parts, progress: write(
    path, parts, progress if "-00004-" not in path.name else lambda n: os.kill(os.getpid(), signal.SIGKILL))
convert.quantize({str(folder)!r}, {str(folder.parent / "killed")!r}, shard_bytes=100_000, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -signal.SIGKILL
    partial = folder.parent / "killed.partial"
    assert not (folder.parent / "killed").exists()
    assert [p.name[:11] for p in sorted(partial.glob("*.safetensors"))] == [f"model-0000{i}" for i in (1, 2, 3)]
    assert [p.name[:11] for p in partial.glob("*.part")] == ["model-00004"]
    os.truncate(next(partial.glob("model-00002-*")), 5000)  # and one of its files is damaged since
    times = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.safetensors")}
    again, resumed = quiet(folder, name="killed", shard_bytes=100_000)
    assert not partial.exists() and contents(again) == contents(straight) and resumed == report
    kept = {name for name, time in times.items() if (again / name).stat().st_mtime_ns == time}
    assert {name[:11] for name in kept} == {"model-00001", "model-00003"}


def test_the_beginning_of_another_conversion_is_refused(source: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source()
    interrupt(monkeypatch, "-00002-")
    with pytest.raises(KeyboardInterrupt):
        quiet(folder, shard_bytes=100_000)
    monkeypatch.undo()
    for options in (dict(format="int8"), dict(keep=["lm_head.weight"]), {}):
        with pytest.raises(ConfigError, match=r"q\.partial: holds the beginning of another conversion"):
            quiet(folder, **options)
    with pytest.raises(ConfigError, match="another conversion"):
        os.utime(folder / "model.safetensors")
        quiet(folder, shard_bytes=100_000)
    quiet(folder, resume=False)
    assert not (folder.parent / "q.partial").exists()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A source of 68 MB, no tensor above 3 MB, takes little more than one with a sixteenth of the experts."""
    code = f"""
import pathlib, resource, torch
from deepseek import convert
from deepseek.checkpoint import hf_names
from deepseek.config import ModelConfig
from deepseek.convert import writing
from deepseek.files import write_json
from deepseek.model import CausalLM

torch.set_num_threads(1)
small = ModelConfig(
    vocab_size=2048, hidden_size=320, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
    moe_intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16)

def write(folder, config):
    with torch.device("meta"):
        tensors = [(on_disk, tuple(t.shape if part is None else t[part[0]][part[1]].shape))
                   for name, t in CausalLM(config).state_dict().items() for on_disk, part in hf_names(name, config)]
    parts = [writing.Part(name, "F32", shape, lambda s=shape: iter([torch.randn(s)])) for name, shape in tensors]
    folder.mkdir()
    write_json(folder / "config.json", config.to_dict())
    return writing.write_file(folder / "model.safetensors", parts, lambda n: None)["bytes"]

def there_and_back(folder):
    convert.quantize(folder, f"{{folder}}4", progress=False)
    convert.dequantize(f"{{folder}}4", f"{{folder}}16", progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

root = pathlib.Path({str(tmp_path)!r})
write(root / "small", small)
size = write(root / "big", small.with_(n_routed_experts=64))
before = there_and_back(root / "small")
print(size, there_and_back(root / "big") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 60e6 and grown < size / 3, f"{grown / 1e6:.0f} MB of {size / 1e6:.0f}"
