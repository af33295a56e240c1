"""DeepSeek-V2 against transformers' DeepseekV2ForCausalLM, in FP32: the softmax gate under the same attention.

transformers does not read norm_topk_prob in V2 (no published V2 sets it), so it stays False here; the normalised form
is held to the formula in test_gate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig, YarnScaling
from deepseek.model import CausalLM, RoutingRecord

transformers = pytest.importorskip("transformers", reason="parity needs the test extra (transformers)")

TOLERANCE = 1e-4  # on logits of magnitude 1-5
SAME_SUMS = 5e-5  # between two orders of our own products; a routed_scaling_factor of 16 magnifies differences

V2 = dict(model_type="deepseek_v2", scoring_func="softmax", norm_topk_prob=False, n_shared_experts=2)
CONFIGS: dict[str, dict[str, Any]] = {
    "greedy": dict(topk_method="greedy", n_group=1, topk_group=1),
    "group-limited": dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
    "q_lora, bias, tied": dict(
        topk_method="group_limited_greedy", n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=6,
        routed_scaling_factor=4.0, q_lora_rank=24, attention_bias=True, tie_word_embeddings=True,
        first_k_dense_replace=0),
    "as V2-Lite": dict(
        topk_method="greedy", n_group=1, topk_group=1, num_experts_per_tok=6, rope_theta=100.0, qk_rope_head_dim=16,
        yarn=YarnScaling(factor=40.0, original_max_position_embeddings=256, mscale=0.707, mscale_all_dim=0.707)),
    "yarn, mscale unequal": dict(
        topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=24,
        yarn=YarnScaling(
            factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.5)),
}
every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_v2(
    changes: dict[str, Any], tiny_config: Callable, random_model: Callable, in_transformers: Callable, tmp_path: Path
) -> None:
    """Logits under both paddings, the cache in chunks, both orders, 64 greedy tokens, and the way back."""
    config: ModelConfig = tiny_config(**(V2 | changes))
    model: CausalLM = random_model(config)
    assert not any(name.endswith("e_score_correction_bias") for name in model.state_dict())
    twin = in_transformers(model, shard_bytes=40_000)
    ids_BT = torch.randint(0, config.vocab_size, (3, 24))
    place_T, length_B1 = torch.arange(24), torch.tensor([[24], [17], [1]])
    for mask_BT in (place_T < length_B1 + 24, place_T < length_B1, place_T >= 24 - length_B1):
        routing = RoutingRecord()
        ours = model(ids_BT, mask_BT=mask_BT, routing=routing).detach()
        with torch.no_grad():
            positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
            theirs = twin(ids_BT, attention_mask=mask_BT.long(), position_ids=positions_BT).logits
            cache = model.new_cache(3, 4)
            pieces = [model(i, mask_BT=m, cache=cache) for i, m in
                      zip(ids_BT.split([9, 1, 14], 1), mask_BT.split([9, 1, 14], 1), strict=True)]
            absorbed = model(ids_BT, mask_BT=mask_BT, attn_impl="absorbed")
        assert 1 < theirs[mask_BT].std() < 5
        error = float((ours - theirs)[mask_BT].abs().max())
        print(f"largest logit {theirs[mask_BT].abs().max():.1f}, largest difference {error:.1e}")
        assert error <= TOLERANCE
        assert float((torch.cat(pieces, 1) - ours)[mask_BT].abs().max()) <= SAME_SUMS
        assert float((absorbed - ours)[mask_BT].abs().max()) <= SAME_SUMS
        assert all(len(route.index_TK.unique()) > config.n_routed_experts // 3 for route in routing.routes.values())

    twin.generation_config.eos_token_id = None
    prompt = ids_BT[:2, :8]
    theirs = twin.generate(prompt, do_sample=False, max_new_tokens=64, pad_token_id=0)[:, 8:]
    cache, tokens = model.new_cache(2), []
    with torch.no_grad():
        logits = model(prompt, cache=cache)
        for _ in range(64):
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            logits = model(tokens[-1], cache=cache)
    assert torch.equal(torch.cat(tokens, 1), theirs)

    twin.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "theirs")(ids_BT), model(ids_BT))
