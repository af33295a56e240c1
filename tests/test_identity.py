"""Which base a delta or an adapter belongs to: what changes a fingerprint, and what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint import (
    fingerprint,
    load_model,
    open_checkpoint,
    save_model,
    stored_dtype,
    stored_fingerprint,
    tensor_hashes,
)
from deepseek.checkpoint.identity import FUNCTION_KEYS
from deepseek.config import LongRope, ModelConfig, YarnScaling
from deepseek.model import CausalLM

# in the tensors' names and shapes, or without a part in the main model's logits
LEFT_OUT = set("vocab_size hidden_size num_hidden_layers intermediate_size moe_intermediate_size n_routed_experts "
               "n_shared_experts first_k_dense_replace moe_layer_freq num_nextn_predict_layers q_lora_rank "
               "kv_lora_rank attention_bias max_position_embeddings initializer_range bos_token_id eos_token_id "
               "pad_token_id model_type extra".split())


def of(model: CausalLM) -> str:
    return fingerprint(tensor_hashes(model), model.config)


def test_every_key_of_the_configuration_is_decided_on() -> None:
    """A new key must join one side or the other."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    assert known == LEFT_OUT | set(FUNCTION_KEYS) | {"yarn", "longrope"} and not LEFT_OUT & set(FUNCTION_KEYS)


@pytest.mark.parametrize(("changes", "same"), [
    ({"rope_theta": 5e5}, False), ({"num_experts_per_tok": 3}, False), ({"routed_scaling_factor": 2.5}, False),
    ({"norm_topk_prob": False}, False), ({"topk_group": 3}, False), ({"rms_norm_eps": 1e-5}, False),
    ({"rope_interleave": False}, False), ({"scoring_func": "softmax"}, False),
    ({"num_attention_heads": 1, "qk_nope_head_dim": 32, "v_head_dim": 24}, False),
    ({"yarn": YarnScaling(4.0, 64)}, False), ({"longrope": LongRope((1.0, 1.0, 1.0, 2.0), 64)}, False),
    ({"rope_theta": 10000}, True), ({"routed_scaling_factor": 1}, True),
    ({"max_position_embeddings": 512}, True), ({"eos_token_id": 7}, True), ({"initializer_range": 0.1}, True),
])
def test_what_changes_the_function_changes_the_fingerprint(
    tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM], changes: dict[str, Any], same: bool
) -> None:
    config = tiny_config(num_hidden_layers=2)
    hashes = tensor_hashes(random_model(config))
    assert (fingerprint(hashes, config) == fingerprint(hashes, config.with_(**changes))) == same


def test_mtp_modules_are_no_part_of_it(
    tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM], tmp_path: Path
) -> None:
    model = random_model(tiny_config(num_nextn_predict_layers=1))
    folder = save_model(model, tmp_path / "with")
    with_mtp = load_model(folder)
    (folder / "mtp.safetensors").unlink()
    without = load_model(folder, verify=False)
    assert len(with_mtp.model.mtp) == 1 and len(without.model.mtp) == 0
    assert of(with_mtp) == of(without)
    model.model.layers[2].self_attn.o_proj.weight.data[0, 0] += 1
    assert of(model) != of(without)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 1, "q_lora_rank": 24}, {"attention_bias": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_from_the_files_it_is_the_loaded_models(
    tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM], tmp_path: Path,
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(tiny_config(vocab_size=300, **changes))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = save_model(model, tmp_path / "model")
    monkeypatch.setattr("deepseek.checkpoint.files.CHUNK", 1)  # blocks of 128 rows
    config, _, files = open_checkpoint(folder)
    assert stored_fingerprint(config, files, stored_dtype(files)) == of(load_model(folder))
