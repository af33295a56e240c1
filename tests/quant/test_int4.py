"""compressed-tensors' int4: the values, and what is refused. Checked by hand against compressed_tensors 0.20, whose
packing this writes out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint import TensorFiles
from deepseek.errors import CheckpointError, ConfigError
from deepseek.quant import int4

CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": None, "ignore": ["lm_head"],
    "quantization_status": "compressed", "config_groups": {"group_0": {
        "input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": {
            "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
            "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}}}}


def pack(code_OI: Tensor) -> Tensor:
    """Column by column, four bits each, the first in the lowest."""
    rows, columns = code_OI.shape
    out = torch.zeros(rows, -(-columns // 8), dtype=torch.int64)
    for i in range(columns):
        out[:, i // 8] |= (code_OI[:, i].long() + 8) << 4 * (i % 8)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


@pytest.mark.parametrize(("columns", "groups"), [(64, 2), (72, 1), (96, 3), (20, 1)])
def test_values(columns: int, groups: int, tmp_path: Path) -> None:
    code = torch.randint(-8, 8, (300, columns))
    scale = torch.rand(300, groups).bfloat16() / 10
    save_file({"a.weight_packed": pack(code), "a.weight_scale": scale, "b": torch.ones(2),
               "a.weight_shape": torch.tensor([300, columns])}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    want = code * scale.float().repeat_interleave(columns // groups, 1)
    assert sorted(files) == ["a.weight", "b"] and "a.weight" in files and "a.weight_scale" in files
    assert files.shape("a.weight") == (300, columns) and files.dtype("a.weight") == "I4"
    assert torch.equal(files.read("a.weight", torch.float32), want)
    assert torch.equal(files.read("a.weight"), want.bfloat16())
    assert torch.equal(files.read_rows("a.weight", 130, 400, torch.float32), want[130:])


@pytest.mark.parametrize(("edit", "message"), [
    (lambda t: t.pop("a.weight_scale"), r"a\.weight_packed is there and a\.weight_scale is not"),
    (lambda t: t.update({"a.weight_shape": torch.tensor([9, 64])}), r"a\.weight_shape is \[9, 64\]"),
    (lambda t: t.update({"a.weight_shape": torch.tensor([8.0, 64])}), r"weight_shape is \[8\.0, 64\.0\]"),
    (lambda t: t.update({"a.weight_shape": torch.tensor([8, -64])}), "weight_shape is"),
    (lambda t: t.update({"a.weight_shape": torch.tensor([8, 80])}), r"weight_packed is \[8, 8\] of torch\.int32"),
    (lambda t: t.update({"a.weight_packed": t["a.weight_packed"].float()}), "weight_packed is .* of torch.float32"),
    (lambda t: t.update({"a.weight_scale": torch.ones(8, 3)}), r"weight_scale is \[8, 3\]"),
    (lambda t: t.update({"a.weight_scale": torch.ones(8, 2, dtype=torch.int32)}), "weight_scale is"),
    (lambda t: t.update({"a.weight_zero_point": torch.ones(1)}), "weight_zero_point: int4 weights with it"),
    (lambda t: t.update({"a.weight_g_idx": torch.ones(1)}), "weight_g_idx: int4 weights with it"),
])
def test_parts_that_do_not_fit(edit: Any, message: str, tmp_path: Path) -> None:
    tensors = {"a.weight_packed": pack(torch.zeros(8, 64)), "a.weight_scale": torch.ones(8, 2),
               "a.weight_shape": torch.tensor([8, 64])}
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorFiles(tmp_path).read("a.weight")
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_the_published_configuration_is_read() -> None:
    int4.check(CONFIG, "here")
    int4.check(CONFIG | {"sparsity_config": {"format": "dense"}, "transform_config": {}, "version": "0.12"}, "here")


@pytest.mark.parametrize(("path", "value"), [
    ("format", "float-quantized"), ("format", None), ("format", "nvfp4-pack-quantized"), ("kv_cache_scheme", {}),
    ("transform_config", {"config_groups": {"R1": {}}}), ("sparsity_config", {"format": "sparse-24-bitmask"}),
    ("config_groups", None), ("config_groups", {}), ("config_groups.group_0", None),
    ("config_groups.group_0.input_activations", {"num_bits": 8}),
    ("config_groups.group_0.format", "int-quantized"), ("config_groups.group_0.weights.num_bits", 8),
    ("config_groups.group_0.weights.num_bits", True), ("config_groups.group_0.weights.type", "float"),
    ("config_groups.group_0.weights.symmetric", False), ("config_groups.group_0.weights.symmetric", 1),
    ("config_groups.group_0.weights.strategy", "block"), ("config_groups.group_0.weights.actorder", "group"),
])
def test_other_arithmetic_is_refused_by_name(path: str, value: Any) -> None:
    keys = copy.deepcopy(CONFIG)
    *above, last = path.split(".")
    inside = keys
    for key in above:
        inside = inside[key]
    inside[last] = value
    with pytest.raises(ConfigError, match=rf"^here: quantization_config\.{path.replace('.', '[.]')} = "):
        int4.check(keys, "here")
