"""The official FP8 layout, written here by hand: it must load to exactly what the published formula gives.

    W[o, i] = stored[o, i] * weight_scale_inv[o // 128, i // 128]

Layout facts (deepseek-ai/DeepSeek-V3, README_WEIGHTS.md and its index): every projection is FP8 with FP32 scales;
norms, gate, embedding, head and eh_proj are not; the MTP module is the layer after the last, with copies of embedding
and head.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint import INDEX, TensorFiles, load_model, save_model
from deepseek.errors import CheckpointError
from deepseek.quant import fp8

# no width is a multiple of 128, so every matrix has ragged edges; hidden and expert widths span two blocks
KEYS: dict[str, Any] = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=24, hidden_size=136,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=140, moe_intermediate_size=130,
    n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
    num_nextn_predict_layers=1, q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10,
    max_position_embeddings=64, torch_dtype="bfloat16",
    quantization_config={"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                         "weight_block_size": [128, 128]})
HIDDEN, VOCAB, EXPERTS, LAYERS = (KEYS[k] for k in "hidden_size vocab_size n_routed_experts num_hidden_layers".split())


def formula(stored_OI: Tensor, scale: Tensor) -> Tensor:
    """Element by element; the product of an FP8 and an FP32 number is exact in double, so FP32 rounds it once."""
    values, scales = stored_OI.double().tolist(), scale.double().tolist()
    return torch.tensor([[v * scales[o // 128][i // 128] for i, v in enumerate(row)] for o, row in enumerate(values)],
                        dtype=torch.float64).float()


def official(generator: torch.Generator) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the official files at a tiny size."""
    tensors: dict[str, Tensor] = {}

    def plain(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        tensors[name] = torch.randn(shape, generator=generator).to(dtype)

    def matrix(name: str, rows: int, cols: int) -> None:
        tensors[f"{name}.weight"] = (torch.randn(rows, cols, generator=generator) * 100).to(torch.float8_e4m3fn)
        blocks = -(-rows // 128), -(-cols // 128)
        tensors[f"{name}.weight_scale_inv"] = torch.rand(blocks, generator=generator) * 1e-3 + 1e-5

    def ffn(name: str, inner: int) -> None:
        for part, rows, cols in (("gate", inner, HIDDEN), ("up", inner, HIDDEN), ("down", HIDDEN, inner)):
            matrix(f"{name}.{part}_proj", rows, cols)

    plain("model.embed_tokens.weight", VOCAB, HIDDEN)
    plain("lm_head.weight", VOCAB, HIDDEN)
    plain("model.norm.weight", HIDDEN)
    for layer in range(LAYERS + 1):
        stem = f"model.layers.{layer}"
        for norm, width in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN),
                            ("self_attn.q_a_layernorm", 12), ("self_attn.kv_a_layernorm", 20)):
            plain(f"{stem}.{norm}.weight", width)
        for part, rows, cols in (("q_a_proj", 12, HIDDEN), ("q_b_proj", 2 * (6 + 4), 12),
                                 ("kv_a_proj_with_mqa", 20 + 4, HIDDEN), ("kv_b_proj", 2 * (6 + 10), 20),
                                 ("o_proj", HIDDEN, 2 * 10)):
            matrix(f"{stem}.self_attn.{part}", rows, cols)
        if layer < KEYS["first_k_dense_replace"]:
            ffn(f"{stem}.mlp", KEYS["intermediate_size"])
            continue
        plain(f"{stem}.mlp.gate.weight", EXPERTS, HIDDEN)
        plain(f"{stem}.mlp.gate.e_score_correction_bias", EXPERTS, dtype=torch.float32)
        for expert in range(EXPERTS):
            ffn(f"{stem}.mlp.experts.{expert}", KEYS["moe_intermediate_size"])
        ffn(f"{stem}.mlp.shared_experts", KEYS["moe_intermediate_size"])
    mtp = f"model.layers.{LAYERS}"
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        plain(f"{mtp}.{norm}.weight", HIDDEN)
    plain(f"{mtp}.eh_proj.weight", HIDDEN, 2 * HIDDEN)
    tensors[f"{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{mtp}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


FILES = [f"model-{i:05d}-of-000002.safetensors" for i in (1, 2)]


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(FILES, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(FILES, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(KEYS))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("official")
    tensors = official(torch.Generator().manual_seed(0))
    write(folder, tensors)
    return folder, tensors


@pytest.fixture(scope="module")
def expected(published: tuple[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Disk name -> FP32 value by the formula, for every weight that is not a scale."""
    _, tensors = published
    return {name: formula(t, tensors[f"{name}_scale_inv"]) if t.dtype == torch.float8_e4m3fn else t.float()
            for name, t in tensors.items() if not name.endswith("_scale_inv")}


def in_memory(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names inside the model, written out by hand rather than through checkpoint.hf_names."""
    out = {}
    for name, value in expected.items():
        if ".experts." in name:
            continue
        mtp = f"model.layers.{LAYERS}."
        if name.startswith(mtp):
            rest = name.removeprefix(mtp)
            if rest in ("embed_tokens.weight", "shared_head.head.weight"):
                continue
            inside = "input." if rest.split(".")[0] in ("enorm", "hnorm", "eh_proj") else ""
            name = f"model.mtp.0.{inside}{rest}"
        out[name] = value
    for layer, ours in ((1, "model.layers.1"), (2, "model.mtp.0")):
        stem = f"model.layers.{layer}.mlp.experts"
        out[f"{ours}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([
            expected[f"{stem}.{e}.gate_proj.weight"], expected[f"{stem}.{e}.up_proj.weight"]]) for e in range(EXPERTS)])
        out[f"{ours}.mlp.experts.down_proj"] = torch.stack(
            [expected[f"{stem}.{e}.down_proj.weight"] for e in range(EXPERTS)])
    return out


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_official_layout_loads_to_what_the_formula_gives(
    published: tuple[Path, dict[str, Tensor]], expected: dict[str, Tensor], dtype: Any
) -> None:
    model = load_model(published[0], dtype=dtype)
    want = in_memory(expected)
    assert want.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        fp32 = dtype == "float32" or name.endswith("e_score_correction_bias")
        assert value.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert torch.equal(value, want[name].to(value.dtype)), name
    assert model.config.num_nextn_predict_layers == 1 and len(model.model.mtp) == 1
    assert bool(model(torch.arange(6).view(1, 6)).isfinite().all())


def test_what_was_fp8_is_written_plain_and_read_back(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    model = load_model(published[0])
    folder = save_model(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    again = load_model(folder).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_one_matrix_is_read_dequantized(published: tuple[Path, dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    files = TensorFiles(published[0])
    name = "model.layers.0.mlp.gate_proj.weight"
    assert files.dtype(name) == "F8_E4M3" and files.shape(name) == (140, 136)
    assert files.read(name).dtype == torch.bfloat16
    assert torch.equal(files.read(name, torch.float32), expected[name])


NAME = "model.layers.1.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize(("edit", "message"), [
    (lambda t: t.pop(f"{NAME}_scale_inv"), f"{NAME} is FP8 but {NAME}_scale_inv is missing"),
    (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 1)}),
     f"{NAME}: weight_scale_inv must have shape (2, 2) for a weight (130, 136), got (2, 1)"),
    (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(())}),
     f"{NAME}: weight_scale_inv must have shape (2, 2) for a weight (130, 136), got ()"),
])
def test_scales_that_do_not_fit_are_named(
    published: tuple[Path, dict[str, Tensor]], tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = dict(published[1])
    edit(tensors)
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_truncated_shard_is_named(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    write(tmp_path, published[1])
    data = (tmp_path / FILES[1]).read_bytes()
    (tmp_path / FILES[1]).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=FILES[1]):
        load_model(tmp_path)


# ---- the codec ----------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 260), cols=st.integers(1, 260), seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
@settings(max_examples=30, deadline=None)
def test_the_error_of_a_round_trip_is_bounded(rows: int, cols: int, seed: int, exponent: int) -> None:
    """e4m3 keeps 3 bits after the leading one: half a step is 2^-4 of the value, or of the smallest normal 2^-6."""
    w_OI = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    stored, scale = fp8.quantize(w_OI)
    assert stored.dtype == torch.float8_e4m3fn and stored.shape == w_OI.shape
    assert scale.shape == (-(-rows // 128), -(-cols // 128)) and scale.dtype == torch.float32
    again = fp8.dequantize(stored, scale)
    step = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    bound = torch.maximum(w_OI.abs() * 2**-4, step * 2**-10) * (1 + 1e-5)
    assert bool(((again - w_OI).abs() <= bound).all())
    assert stored.float().abs().max() == 448  # the range is used whole


def test_what_fp8_can_hold_returns_exactly() -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = stored[stored.float().isfinite()].view(2, 127)
    scale = torch.tensor([[0.25]])
    again, rescale = fp8.quantize(fp8.dequantize(finite, scale))
    assert rescale.item() == 0.25 and torch.equal(again.float(), finite.float())


def test_zeros_stay_zeros() -> None:
    stored, scale = fp8.quantize(torch.zeros(3, 130))
    assert bool((fp8.dequantize(stored, scale) == 0).all()) and bool((scale > 0).all())


def test_dequantize_rounds_once() -> None:
    stored = torch.tensor([[1.125]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0039]])
    assert fp8.dequantize(stored, scale, torch.bfloat16) == (stored.double() * scale.double()).bfloat16()
