"""What cannot be converted or loaded is refused by name, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepseek import convert
from deepseek.checkpoint import MANIFEST, TORCH_DTYPES, load_model, save_model
from deepseek.convert import dequantize
from deepseek.convert.writing import Part, write_file
from deepseek.engine import Engine
from deepseek.errors import CheckpointError, ConfigError
from deepseek.files import locked
from tests.helpers.conversions import contents, header, quiet


def test_what_cannot_be_converted(source: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source()
    out, _ = quiet(folder)
    before = contents(out)
    for bad, message in (
        (lambda: quiet(folder, "int3", "x"), "format = 'int3': must be nf4 or int8"),
        (lambda: quiet(folder, name="x", keep=["lm_heat.*"]), "keep = 'lm_heat.*': no weight that could be"),
        (lambda: quiet(folder, name="x", keep=["model.norm.weight"]), "keep = 'model.norm.weight': no weight"),
        (lambda: quiet(folder), f"out = {out}: must be a new or an empty folder"),
        (lambda: quiet(folder, name=folder.name, overwrite=True), "must not be the source"),
        (lambda: quiet(folder, name="q/config.json"), "must be a folder, this is a file"),
        (lambda: quiet(out, name="x"), f"{out}: is quantized already (nf4)"),
        (lambda: dequantize(out, folder.parent / "x", "int8"), "dtype = 'int8': must be one of"),  # type: ignore
    ):
        with pytest.raises(ConfigError) as caught:
            bad()
        assert message in str(caught.value)
    assert contents(out) == before and not list(folder.parent.glob("x*"))
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(CheckpointError, match=r"x: 0\.00 GiB are to be written and the disk has 0\.00 GiB free"):
        quiet(folder, name="x")
    assert not list(folder.parent.glob("x*"))
    monkeypatch.undo()
    quiet(folder, "int8", overwrite=True)
    assert contents(out) != before


def test_another_process_writes_the_same_folder(source: Callable) -> None:
    folder = source()
    out = folder.parent / "new" / "x"
    for work in (lambda: convert.quantize(folder, out, "nf4"), lambda: dequantize(folder, out)):
        with locked(out), pytest.raises(ConfigError, match="x: another process is writing it"):
            work()
    assert not out.parent.exists()


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "chat_template.jinja", "LICENSE"])
def test_a_text_that_is_a_link_out_of_the_checkpoint(source: Callable, name: str) -> None:
    folder = source()
    secret = folder.parent / "secret"
    secret.write_text("key")
    (folder / name).symlink_to(secret)
    for work in (lambda: quiet(folder, name="x"), lambda: dequantize(folder, folder.parent / "x", progress=False)):
        with pytest.raises(CheckpointError, match=f"{name}: leads out of the checkpoint, to {secret}"):
            work()
    assert not list(folder.parent.glob("*x*"))
    (folder / name).unlink()
    (folder / "inside.md").write_text("ours")
    (folder / name).symlink_to("inside.md")
    out, _ = quiet(folder, name="x")
    assert (out / name).read_text() == "ours" and not (out / name).is_symlink()


def test_links_of_the_hub_cache_are_followed(source: Callable) -> None:
    folder = source()
    (folder / "README.md").write_text("card")
    cache = folder.parent / "models--owner--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / f"b-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/b-{file.name}")
    quantize = partial(convert.quantize, snapshot, folder.parent / "x", "int8", progress=False)
    quantize()
    assert (folder.parent / "x" / "README.md").read_text() == "card"
    (snapshot / "notes.txt").symlink_to("../../other")
    (cache / "other").write_text("")
    with pytest.raises(CheckpointError, match=r"notes\.txt: leads out of the checkpoint"):
        quantize(overwrite=True)


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint, in the converter's order and alignment, and drop the manifest."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    kinds = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    parts = [Part(name, kinds[t.dtype], tuple(t.shape), partial(iter, [t])) for name, t in tensors.items()]
    write_file(file, sorted(parts, key=lambda part: part.rank), lambda _: None)
    (folder / MANIFEST).unlink()


NAME = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(("edit", "message"), [
    (lambda t: t[NAME][3].fill_(torch.nan), f"{NAME} holds values that are not finite"),
    (lambda t: t[NAME][3, 5:].fill_(-torch.inf), f"{NAME} holds values that are not finite"),
    (lambda t: t.pop(NAME), f"1 tensors are missing, first {NAME}"),
    (lambda t: t.update({NAME: t[NAME].t().contiguous()}), f"{NAME} has shape (72, 24), config.json asks for (24, 72)"),
    (lambda t: t.update(odd=torch.zeros(2)), "1 tensors have no place in the model, first odd"),
])
def test_a_source_that_is_not_whole(source: Callable, edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    folder = source()
    rewrite(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        quiet(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)
    assert not list(folder.parent.glob("q*"))


GATE = "model.layers.2.mlp.gate"
COPIED = ["model.norm.weight", f"{GATE}.weight", f"{GATE}.e_score_correction_bias",
          "model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.kv_a_layernorm.weight",
          "model.layers.2.self_attn.q_a_layernorm.weight"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*COPIED, "lm_head.weight", "model.embed_tokens.weight", NAME])
def test_what_is_copied_is_finite_too(source: Callable, name: str, value: float) -> None:
    """Copied, kept, packed and dequantized alike, and nothing is left of the conversion."""
    folder = source(q_lora_rank=24, attention_bias=True)
    rewrite(folder, lambda t: t[name].view(-1)[-1:].fill_(value))
    keep = ["lm_head.*", "*.embed_tokens.*", "*.mlp.*"]
    for work in (lambda: quiet(folder), lambda: quiet(folder, "int8", keep=keep),
                 lambda: dequantize(folder, folder.parent / "q", progress=False)):
        with pytest.raises(CheckpointError, match=re.escape(f"{name} holds values that are not finite")):
            work()
        assert not list(folder.parent.glob("q*"))
    if "gate" in name:  # nothing in the logits would tell
        with pytest.raises(CheckpointError, match=re.escape(f"{folder}: {name} holds values that are not finite")):
            load_model(folder)


def test_what_float16_cannot_hold(source: Callable) -> None:
    folder = source(torch.float32)
    rewrite(folder, lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"norm.weight holds values that are not finite, or beyond what float16"):
        dequantize(folder, folder.parent / "q", "float16", progress=False)
    assert not list(folder.parent.glob("q*"))


@pytest.mark.parametrize("name", [f"{GATE}.weight", f"{GATE}.e_score_correction_bias", "model.embed_tokens.step",
                                  "lm_head.packed"])
def test_a_quantized_file_with_numbers_that_are_none(source: Callable, name: str) -> None:
    out, _ = quiet(source())
    rewrite(out, lambda t: t[name].view(-1)[:4].copy_(torch.tensor([0, 0, 192, 127], dtype=torch.uint8))  # a NaN
            if name == "lm_head.packed" else t[name].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=re.escape(f"{name} holds values that are not finite")):
        load_model(out) if GATE in name else dequantize(out, out.parent / "x", progress=False)
    assert not list(out.parent.glob("x*"))


def test_a_gate_of_nan_is_an_error_where_requests_run(source: Callable) -> None:
    model = load_model(source())
    model.moe_blocks()[1].gate.e_score_correction_bias[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias holds values that are"):
        Engine(model)
    model.moe_blocks()[1].gate.e_score_correction_bias.zero_()
    Engine(model)


HEAD, EXPERT = "lm_head.packed", "model.layers.1.mlp.experts.5.packed"


@pytest.mark.parametrize(("edit", "message"), [
    (lambda t: t.pop(HEAD), f"1 tensors are missing, first {HEAD}"),
    (lambda t: t.pop("model.norm.weight"), "1 tensors are missing, first model.norm.weight"),
    (lambda t: t.update(odd=torch.zeros(2)), "1 tensors have no place in the model, first odd"),
    (lambda t: t.update({EXPERT: t[EXPERT][:-64]}), f"{EXPERT} is [8128] of U8, must be [8192] of U8"),
    (lambda t: t.update({EXPERT: t[EXPERT].view(torch.int8)}), f"{EXPERT} is [8192] of I8, must be"),
    (lambda t: t.update({"model.embed_tokens.step": torch.ones(3)}),
     "model.embed_tokens.step is [3] of F32, must be [97] of F32"),
    (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight is [3] of F32, must be [72]"),
])
def test_a_quantized_file_that_does_not_fit_is_refused_by_name(
    source: Callable, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    out, _ = quiet(source())
    rewrite(out, edit)
    for read in (load_model, lambda folder: dequantize(folder, folder.parent / "x", progress=False)):
        with pytest.raises(CheckpointError) as caught:
            read(out)
        assert message in str(caught.value) and str(out) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_truncated_file_is_refused_by_name(source: Callable, keep: int, manifest: bool) -> None:
    out, _ = quiet(source())
    if not manifest:
        (out / MANIFEST).unlink()
    file = out / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    with pytest.raises(CheckpointError, match="truncated" if manifest else "not a whole") as caught:
        load_model(out)
    assert str(file) in str(caught.value)


def test_hashes_of_weights_are_compared_on_demand(source: Callable) -> None:
    out, _ = quiet(source())
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    load_model(out)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: altered"):
        load_model(out, verify=True)
    (out / "quantization.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"quantization\.json: truncated or altered"):
        load_model(out)


def test_a_file_of_another_tool_that_is_not_aligned_is_refused(source: Callable) -> None:
    out, _ = quiet(source())
    file = out / "model.safetensors"
    begin, entries = header(file)
    text = json.dumps(entries).encode()
    file.write_bytes((len(text) + 1).to_bytes(8, "little") + text + b" " + file.read_bytes()[begin:])
    (out / MANIFEST).unlink()
    if (9 + len(text)) % 64 == 0:
        pytest.skip("aligned by chance")
    with pytest.raises(CheckpointError, match=r"packed does not begin at a multiple of 64 bytes") as caught:
        load_model(out)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"version": 2}, "quantization_config.version = 2: this program reads 1"),
    ({"version": None}, "quantization_config.version = None: this program reads 1"),
    ({"format": "nf3"}, "quantization_config.format = 'nf3': must be nf4 or int8"),
    ({"quant_method": "awq"}, "quantization_config.quant_method = 'awq': must be moe_dr or"),
])
def test_other_versions_and_formats_are_refused(source: Callable, changes: dict[str, Any], message: str) -> None:
    out, _ = quiet(source())
    keys = json.loads((out / "config.json").read_text())
    keys["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(keys))
    (out / MANIFEST).unlink()
    with pytest.raises(ConfigError) as caught:
        load_model(out)
    assert message in str(caught.value) and str(out) in str(caught.value)


def test_a_quantized_model_is_neither_trained_nor_saved(source: Callable) -> None:
    out, _ = quiet(source())
    model = load_model(out)
    with pytest.raises(ConfigError, match="has no gradients and cannot be trained"):
        model.train()
    with pytest.raises(CheckpointError, match="--format bf16"):
        save_model(model, out.parent / "x")
    with pytest.raises(ConfigError, match="dtype = bfloat16: a quantized checkpoint computes in float32"):
        load_model(out, "bfloat16")
    assert not (out.parent / "x").exists()
