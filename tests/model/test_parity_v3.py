"""DeepSeek-V3 against an independent implementation, transformers' DeepseekV3ForCausalLM, in FP32.

Our model is filled with random numbers (no norm at one, no bias at zero), written as a checkpoint, and read by
transformers; from there on both must say the same. Positions that are padding say nothing and are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepseek.checkpoint import load_model, save_model
from deepseek.config import LongRope, ModelConfig, YarnScaling
from deepseek.model import CausalLM, RoutingRecord

transformers = pytest.importorskip("transformers", reason="parity needs the test extra (transformers)")

TOLERANCE = 1e-4  # on logits of magnitude 1-5; FP32 sums in another order differ by about 1e-5
SAME_SUMS = 2e-5  # between two orders of our own products


def yarn(**changes: Any) -> dict[str, Any]:
    """YaRN whose ramp runs from inside the second rotary pair to inside the sixth, of eight."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 0.5} | changes
    return dict(yarn=YarnScaling(**scaling), rope_theta=100.0, qk_rope_head_dim=16)


CONFIGS: dict[str, dict[str, Any]] = {
    "1 group": dict(n_group=1, topk_group=1),
    "4 groups": dict(q_lora_rank=24),
    "8 groups": dict(n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=6, routed_scaling_factor=2.5),
    "8 groups of 2, one kept": dict(n_group=8, topk_group=1, num_experts_per_tok=2, q_lora_rank=24),
    "all groups kept": dict(n_group=4, topk_group=4, q_lora_rank=24),
    "no dense layer": dict(first_k_dense_replace=0),
    "2 dense layers": dict(first_k_dense_replace=2, q_lora_rank=24),
    "bias": dict(attention_bias=True),
    "bias, q_lora": dict(attention_bias=True, q_lora_rank=24),
    "yarn, mscale equal": dict(yarn(mscale=1.0, mscale_all_dim=1.0), q_lora_rank=24),
    "yarn, mscale unequal": yarn(mscale=0.7, mscale_all_dim=1.3),
    "yarn, no mscale, ramp to the end": yarn(factor=8.0, beta_slow=0.1),
    "yarn, mscale alone": yarn(mscale=0.8),
    "yarn, own factor, not truncated": yarn(attention_factor=1.2, truncate=False, mscale_all_dim=0.5),
    "longrope, nothing but rotary": dict(
        longrope=LongRope((1.0, 0.5, 3.0, 7.0), 256, attention_factor=1.3), qk_nope_head_dim=0, v_head_dim=8,
        attention_bias=True),
    "longrope, factor, no expert": dict(
        longrope=LongRope((1.0, 0.5, 3.0, 7.0), 64, factor=4.0), first_k_dense_replace=3, q_lora_rank=24),
    "tied": dict(tie_word_embeddings=True),
    "weights not normalised": dict(norm_topk_prob=False, routed_scaling_factor=1.5),
    "one expert a token": dict(num_experts_per_tok=1, routed_scaling_factor=1.5),
    "halves rotated": dict(rope_interleave=False),
    "halves rotated, yarn": dict(yarn(mscale=0.7, mscale_all_dim=1.3), rope_interleave=False, q_lora_rank=24),
    "2 shared, wide values": dict(n_shared_experts=2, v_head_dim=28, rope_theta=500.0, rms_norm_eps=1e-5),
    "mtp": dict(num_nextn_predict_layers=1),
    "2 mtp, bias, tied": dict(
        num_nextn_predict_layers=2, attention_bias=True, tie_word_embeddings=True, q_lora_rank=24),
    "everything": dict(
        yarn(mscale=1.0, mscale_all_dim=0.5), n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=5,
        routed_scaling_factor=2.5, q_lora_rank=24, attention_bias=True, first_k_dense_replace=2, num_hidden_layers=4,
        n_shared_experts=2, num_nextn_predict_layers=1),
}
SOME = ["1 group", "8 groups", "bias, q_lora", "yarn, mscale unequal", "longrope, nothing but rotary", "tied",
        "halves rotated", "everything"]

every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
some_configs = pytest.mark.parametrize("changes", [CONFIGS[name] for name in SOME], ids=SOME)


def padded(kind: str, config: ModelConfig, tokens: int = 24) -> tuple[Tensor, Tensor]:
    """ids [3, T] and a mask whose rows hold T, T - 7 and 1 tokens, the padding on the side named (or none at all)."""
    ids_BT = torch.randint(0, config.vocab_size, (3, tokens))
    length_B1 = torch.tensor([[tokens], [tokens - 7], [1]])
    place_T = torch.arange(tokens)
    full_BT, right_BT, left_BT = place_T < length_B1 + tokens, place_T < length_B1, place_T >= tokens - length_B1
    return ids_BT, {"none": full_BT, "right": right_BT, "left": left_BT}[kind]


def worst(a: Tensor, b: Tensor, mask_BT: Tensor | None = None) -> float:
    difference = (a - b).detach().abs()
    return float((difference if mask_BT is None else difference[mask_BT]).max())


@every_config
def test_logits(
    changes: dict[str, Any], tiny_config: Callable, random_model: Callable, in_transformers: Callable
) -> None:
    model: CausalLM = random_model(tiny_config(**changes))
    twin = in_transformers(model)
    for padding in ("none", "left", "right"):
        ids_BT, mask_BT = padded(padding, model.config)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        routing = RoutingRecord()
        ours = model(ids_BT, mask_BT=mask_BT, routing=routing)  # the forms with a gradient
        with torch.no_grad():
            ours_inferred = model(ids_BT, mask_BT=mask_BT)
            theirs = twin(ids_BT, attention_mask=mask_BT.long(), position_ids=positions_BT).logits
        assert ours.dtype == torch.float32
        assert 1 < theirs[mask_BT].std() < 5
        errors = worst(ours, theirs, mask_BT), worst(ours_inferred, theirs, mask_BT)
        print(f"padding {padding}: logits to {theirs[mask_BT].abs().max():.1f}, largest difference {max(errors):.1e}")
        assert max(errors) <= TOLERANCE
        for route in routing.routes.values():  # a test of routing needs routing
            assert len(route.index_TK[mask_BT.flatten()].unique()) > model.config.n_routed_experts // 3


@some_configs
def test_gradients(
    changes: dict[str, Any], tiny_config: Callable, random_model: Callable, in_transformers: Callable
) -> None:
    """Every gradient of the hand-written backward passes, relative to the largest of its tensor."""
    model: CausalLM = random_model(tiny_config(**changes))
    twin = in_transformers(model)
    sequence = torch.randint(0, model.config.vocab_size, (2, 25))
    ids_BT, labels_BT = sequence[:, :-1], sequence[:, 1:]
    loss = model.loss(ids_BT, labels_BT).total
    loss.backward()
    their_loss = cross_entropy(twin(ids_BT).logits.flatten(0, 1), labels_BT.flatten())
    their_loss.backward()
    assert worst(loss, their_loss) <= 1e-5
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("model.mtp."):
            continue
        assert parameter.grad is not None, name
        assert worst(parameter.grad, theirs[name].grad) <= 1e-4 * float(theirs[name].grad.abs().max()), name


def greedy(model: CausalLM, ids_BT: Tensor, mask_BT: Tensor | None, count: int, attn_impl: str = "auto") -> Tensor:
    """`count` tokens by arg max, one at a time through the latent cache (which has to grow on the way)."""
    cache = model.new_cache(ids_BT.shape[0], 8)
    out: list[Tensor] = []
    with torch.no_grad():
        logits = model(ids_BT, mask_BT=mask_BT, cache=cache, last_only=True)
        for _ in range(count):
            out.append(logits[:, -1].argmax(-1, keepdim=True))
            logits = model(out[-1], cache=cache, attn_impl=attn_impl)
    return torch.cat(out, 1)


@pytest.mark.parametrize(("name", "padding"), [
    ("8 groups", "left"), ("yarn, mscale unequal", "left"), ("tied", "left"), ("halves rotated", "none"),
    ("everything", "left")])
def test_64_greedy_tokens(
    name: str, padding: str, tiny_config: Callable, random_model: Callable, in_transformers: Callable
) -> None:
    model: CausalLM = random_model(tiny_config(**CONFIGS[name]))
    twin = in_transformers(model)
    ids_BT, mask_BT = padded(padding, model.config, tokens=12)
    twin.generation_config.eos_token_id = None  # neither side stops early
    theirs = twin.generate(
        ids_BT, attention_mask=mask_BT.long(), do_sample=False, max_new_tokens=64, pad_token_id=0)[:, 12:]
    assert theirs.shape == (3, 64)
    assert len(theirs.unique()) > 8  # not one token repeated
    assert torch.equal(greedy(model, ids_BT, mask_BT, 64), theirs)
    assert torch.equal(greedy(model, ids_BT, mask_BT, 64, attn_impl="naive"), theirs)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@some_configs
@torch.no_grad()
def test_cached_equals_uncached_and_absorbed_equals_naive(
    changes: dict[str, Any], padding: str, tiny_config: Callable, random_model: Callable
) -> None:
    model: CausalLM = random_model(tiny_config(**changes))
    ids_BT, mask_BT = padded(padding, model.config)
    whole = model(ids_BT, mask_BT=mask_BT, attn_impl="naive")
    assert worst(model(ids_BT, mask_BT=mask_BT, attn_impl="absorbed"), whole, mask_BT) <= SAME_SUMS
    chunks = [7, 1, 5, 1, 1, 9]
    assert sum(chunks) == ids_BT.shape[1]
    for attn_impl in ("auto", "naive", "absorbed"):
        cache = model.new_cache(3, 4)
        pieces = [model(i, mask_BT=m, cache=cache, attn_impl=attn_impl)
                  for i, m in zip(ids_BT.split(chunks, 1), mask_BT.split(chunks, 1), strict=True)]
        assert cache.length == ids_BT.shape[1]
        assert worst(torch.cat(pieces, 1), whole, mask_BT) <= SAME_SUMS, attn_impl


@torch.no_grad()
def test_decoding_goes_on_after_right_padding(tiny_config: Callable, random_model: Callable) -> None:
    """Prompts of unequal length, padded on the right, then three tokens each: as if every row had been alone."""
    model: CausalLM = random_model(tiny_config())
    ids_BT, mask_BT = padded("right", model.config, tokens=10)
    more_BT = torch.randint(0, model.config.vocab_size, (3, 3))
    cache = model.new_cache(3)
    model(ids_BT, mask_BT=mask_BT, cache=cache)
    together = torch.cat([model(token_B1, cache=cache) for token_B1 in more_BT.split(1, 1)], 1)
    for row in range(3):
        alone = torch.cat((ids_BT[row][mask_BT[row]], more_BT[row]))[None]
        assert worst(together[row], model(alone)[0, -3:]) <= SAME_SUMS


@torch.no_grad()
def test_padding_changes_nothing(tiny_config: Callable, random_model: Callable) -> None:
    """A row of a padded batch says what it says alone, whatever ids stand in the padding."""
    model: CausalLM = random_model(tiny_config())
    for padding in ("left", "right"):
        ids_BT, mask_BT = padded(padding, model.config)
        batch = model(ids_BT, mask_BT=mask_BT)
        for row in range(3):
            assert worst(batch[row][mask_BT[row]], model(ids_BT[row][mask_BT[row]][None])[0]) <= SAME_SUMS


# ---- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4 groups", "tied", "mtp", "2 mtp, bias, tied", "everything"])
@torch.no_grad()
def test_sharded_checkpoints_there_and_back(
    name: str, tiny_config: Callable, random_model: Callable, in_transformers: Callable, tmp_path: Path
) -> None:
    """ours -> shards -> transformers (no key missing, none unexpected) -> their shards -> ours."""
    model: CausalLM = random_model(tiny_config(**CONFIGS[name]))
    ids_BT, _ = padded("none", model.config)
    twin = in_transformers(model, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    expected = model(ids_BT)
    assert worst(twin(ids_BT).logits, expected) <= TOLERANCE
    again = load_model(tmp_path / "ours")
    assert len(again.model.mtp) == len(model.model.mtp)
    mine, read = model.state_dict(), again.state_dict()
    assert mine.keys() == read.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, read[key]), key

    twin.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    back = load_model(tmp_path / "theirs")
    assert len(back.model.mtp) == 0  # transformers does not carry the MTP modules
    assert torch.equal(back(ids_BT), again(ids_BT))


@torch.no_grad()
def test_a_checkpoint_that_transformers_made(tmp_path: Path) -> None:
    """Their configuration class and initialisation, nothing of ours before the loading; default file names."""
    config = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=16, n_group=4, topk_group=2,
        num_experts_per_tok=4, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=12,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 16}, initializer_range=0.2)
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    for block in theirs.model.layers[1:]:
        block.mlp.gate.e_score_correction_bias.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.rope_theta == 1000.0
    ids_BT, mask_BT = padded("right", ours.config)
    expected = theirs(ids_BT, attention_mask=mask_BT.long()).logits
    assert worst(ours(ids_BT, mask_BT=mask_BT), expected, mask_BT) <= TOLERANCE


# ---- multi-token prediction -------------------------------------------------------------------------------------


@torch.no_grad()
def test_mtp_module(tiny_config: Callable, random_model: Callable, in_transformers: Callable) -> None:
    """Two modules in a row against transformers' MtpModel, weights copied by hand."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    model: CausalLM = random_model(tiny_config(
        num_nextn_predict_layers=2, q_lora_rank=24, attention_bias=True, **yarn(mscale=1.0, mscale_all_dim=0.5)))
    twin = in_transformers(model)
    theirs = modeling_layers.MtpModel(twin, 2).eval()
    for ours, layer in zip(model.model.mtp, theirs.layers, strict=True):
        state = ours.state_dict()
        outside = {"input.enorm.": "enorm.", "input.hnorm.": "hnorm.", "input.eh_proj.": "eh_proj.",
                   "shared_head.norm.": "post_norm."}
        renamed = {}
        for name, tensor in state.items():
            prefix = next((p for p in outside if name.startswith(p)), None)
            renamed[outside[prefix] + name[len(prefix):] if prefix else f"mtp_block.{name}"] = tensor
        layer.load_state_dict(renamed)
    ids_BT = torch.randint(0, model.config.vocab_size, (2, 20))
    h_ours, h_theirs = model.hidden(ids_BT), twin.model(ids_BT).last_hidden_state
    for depth in range(2):
        next_ids = ids_BT[:, depth + 1 :]
        positions = torch.arange(depth + 1, 20)[None]  # they count on, we start at 0: rotary attention is relative
        h_ours = model.mtp_hidden(depth, h_ours[:, :-1], next_ids)
        h_theirs = theirs.forward_layer(depth, h_theirs[:, :-1], positions, None, input_ids=next_ids)
        assert worst(h_ours, h_theirs) <= TOLERANCE
        assert worst(model.lm_head(h_ours), theirs.shared_head(h_theirs)) <= TOLERANCE


@torch.no_grad()
def test_mtp_through_a_checkpoint_of_61_layers(
    tiny_config: Callable, random_model: Callable, in_transformers: Callable
) -> None:
    """With V3's depth transformers finds `model.layers.61.*` itself: its own loader and its own generation with MTP."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    model: CausalLM = random_model(tiny_config(
        num_hidden_layers=61, first_k_dense_replace=58, hidden_size=16, intermediate_size=16,
        num_nextn_predict_layers=1))
    twin = in_transformers(model, shard_bytes=60_000)
    theirs = modeling_layers.MtpModel.from_pretrained(twin).eval()
    ids_BT = torch.randint(0, model.config.vocab_size, (1, 12))
    h_ours, h_theirs = model.hidden(ids_BT), twin.model(ids_BT).last_hidden_state
    ours = model.mtp_hidden(0, h_ours[:, :-1], ids_BT[:, 1:])
    got = theirs.forward_layer(0, h_theirs[:, :-1], torch.arange(1, 12)[None], None, input_ids=ids_BT[:, 1:])
    assert worst(ours, got) <= TOLERANCE
    twin.generation_config.eos_token_id = None
    tokens = twin.generate(ids_BT, do_sample=False, max_new_tokens=8, pad_token_id=0, use_mtp=True)[:, 12:]
    assert torch.equal(greedy(model, ids_BT, None, 8), tokens)


def test_one_mark_of_ours_does_not_stop_a_second_trip(
    tiny_config: Callable, random_model: Callable, in_transformers: Callable, tmp_path: Path
) -> None:
    """transformers keeps our mark in config.json and adds keys of its own; what it wrote is still read, and written."""
    model: CausalLM = random_model(tiny_config(num_nextn_predict_layers=1))
    in_transformers(model).save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    save_model(back, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config.num_nextn_predict_layers == 0
    assert again.config.with_(num_nextn_predict_layers=1) == model.config
