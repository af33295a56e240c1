"""The whole model as its callers see it: caches, padding, positions, refusals, gradients, determinism.

Shape letters: B batch, T tokens, V vocabulary, E experts, K experts a token, L layers with experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepseek.config import ModelConfig
from deepseek.errors import RequestError
from deepseek.model import CausalLM, RoutingRecord
from deepseek.model.transformer import IGNORE

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40,
    moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, kv_lora_rank=12,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, num_nextn_predict_layers=2, initializer_range=0.2)
LENGTHS = (5, 2, 7)  # of the sequences in a batch


def make(seed: int = 0, **changes: Any) -> CausalLM:
    return CausalLM(CONFIG.with_(**changes)).init_weights(torch.Generator().manual_seed(seed)).eval()


def tokens(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> tuple[Tensor, Tensor, list[slice]]:
    """ids_BT with rubbish in the padding, its mask, and where each sequence lies."""
    width = max(LENGTHS)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, place in enumerate(places):
        mask[row, place] = True
    return tokens(len(LENGTHS), width), mask, places


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make().requires_grad_(False)


# ---- inference ----------------------------------------------------------------------------------------------------


def test_logits_are_fp32_and_the_last_row_can_be_had_alone(model: CausalLM) -> None:
    ids = tokens(2, 6)
    logits = model(ids)
    assert logits.shape == (2, 6, CONFIG.vocab_size) and logits.dtype == torch.float32
    close(model(ids, last_only=True), logits[:, -1:])


@pytest.mark.parametrize("attn_impl", ["auto", "naive", "absorbed"])
@pytest.mark.parametrize("steps", [(8,), (5, 1, 1, 1), (1,) * 8, (2, 3, 3)])
def test_cached_equals_uncached(model: CausalLM, steps: tuple[int, ...], attn_impl: Any) -> None:
    ids = tokens(2, 8)
    cache = model.new_cache(2, 1)
    parts, start = [], 0
    for n in steps:
        parts.append(model(ids[:, start : start + n], cache=cache, attn_impl=attn_impl))
        start += n
        assert cache.length == start
    close(torch.cat(parts, 1), model(ids))


@pytest.mark.parametrize(("count", "cached", "chosen"), [
    (1, True, "absorbed"), (3, True, "naive"), (1, False, "naive")])
def test_one_new_token_is_absorbed(model: CausalLM, count: int, cached: bool, chosen: str) -> None:
    """The bits say which it was: the two round differently."""
    ids = tokens(1, 5 + count)

    def run(impl: Any) -> torch.Tensor:
        cache = model.new_cache(1) if cached else None
        if cache is not None:
            model(ids[:, :5], cache=cache)
        return model(ids[:, 5:], cache=cache, attn_impl=impl)

    auto, naive, absorbed = map(run, ("auto", "naive", "absorbed"))
    assert torch.equal(auto, {"naive": naive, "absorbed": absorbed}[chosen]) and not torch.equal(naive, absorbed)
    close(naive, absorbed)


def test_padding_takes_no_room_and_gets_no_route(model: CausalLM) -> None:
    ids, mask, _ = padded("left")
    cache, routing = model.new_cache(3), RoutingRecord()
    logits = model(ids, mask_BT=mask, cache=cache, routing=routing)
    assert cache.lengths == list(LENGTHS) and not logits[~mask].any() and logits[mask].any(-1).all()
    for route in routing.routes.values():
        assert bool((route.index_TK[~mask.flatten()] == -1).all()) and bool((route.index_TK[mask.flatten()] >= 0).all())
    assert not model(ids[:, :1], mask_BT=torch.zeros(3, 1), cache=cache).any() and cache.lengths == list(LENGTHS)


def test_causal(model: CausalLM) -> None:
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % CONFIG.vocab_size
    close(model(ids)[:, :5], model(changed)[:, :5])


def test_the_sequences_of_a_batch_do_not_touch(model: CausalLM) -> None:
    ids = tokens(3, 6)
    together = model(ids)
    for row in range(3):
        close(together[row : row + 1], model(ids[row : row + 1]))
    close(model(ids.flip(0)).flip(0), together)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.bool, torch.long])
def test_padding_changes_nothing(model: CausalLM, side: str, kind: torch.dtype) -> None:
    ids, mask, places = padded(side)
    logits = model(ids, mask_BT=mask.to(kind))
    assert bool(logits.isfinite().all())
    for row, place in enumerate(places):
        close(logits[row, place], model(ids[row : row + 1, place])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_padding(model: CausalLM, side: str) -> None:
    """The new tokens of each sequence follow its own, whatever padding lies between in the cache."""
    ids, mask, places = padded(side)
    more = tokens(3, 3, seed=4)
    cache = model.new_cache(3, 4)
    model(ids, mask_BT=mask, cache=cache)
    steps = [model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)]
    for row, place in enumerate(places):
        whole = torch.cat((ids[row, place], more[row]))[None]
        close(torch.cat(steps, 1)[row], model(whole)[0, -3:])


def test_a_mask_of_ones_is_no_mask(model: CausalLM) -> None:
    ids = tokens(2, 5)
    cache = model.new_cache(2)
    assert torch.equal(model(ids, mask_BT=torch.ones_like(ids)), model(ids, cache=cache))
    assert cache.lengths == [5, 5]


def test_selected_rows_go_on_as_if_alone(model: CausalLM) -> None:
    ids, mask, places = padded("left")
    cache = model.new_cache(3)
    model(ids, mask_BT=mask, cache=cache)
    cache.select(torch.tensor([2, 0]))
    more = tokens(2, 1, seed=4)
    logits = model(more, cache=cache)
    for new, old in enumerate((2, 0)):
        close(logits[new], model(torch.cat((ids[old, places[old]], more[new]))[None])[0, -1:])


def test_positions_count_tokens_and_only_distances_matter(model: CausalLM) -> None:
    ids = tokens(2, 6)
    own = torch.arange(6).unsqueeze(0)
    want = model(ids)
    assert torch.equal(model(ids, positions_BT=own), want)
    close(model(ids, positions_BT=own + 17), want)
    assert not torch.allclose(model(ids, positions_BT=own * 2), want, atol=1e-3)


def test_nothing_is_remembered_between_calls(model: CausalLM) -> None:
    ids = tokens(2, 6)
    first = model(ids)
    model(tokens(1, 9, seed=8), cache=model.new_cache(1), routing=RoutingRecord())
    assert torch.equal(model(ids), first)


def test_routing_record(model: CausalLM) -> None:
    ids = tokens(2, 5)
    record = RoutingRecord()
    model(ids, routing=record)
    assert list(record.routes) == list(CONFIG.moe_layers) == [1, 2]
    for route in record.routes.values():
        assert route.index_TK.shape == route.weight_TK.shape == (10, 2) and route.scores_TE.shape == (10, 8)
        assert route.index_TK.dtype == torch.int64 and route.weight_TK.dtype == torch.float32


def test_a_cache_outside_no_grad_keeps_no_graph() -> None:
    """Generation without `torch.no_grad()` must not hold on to every step it ever made."""
    trainable = make()
    cache = trainable.new_cache(1)
    for _ in range(3):
        trainable(tokens(1, 2), cache=cache)
    assert not cache.pool.data.requires_grad


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ids", "message"), [
    (torch.tensor([[0, 50]]), "token id 50 is outside the vocabulary 0..49"),
    (torch.tensor([[-1, 3]]), "token id -1 is outside the vocabulary 0..49"),
    (torch.tensor([1, 2]), "ids must have shape [batch, tokens]"),
    (torch.zeros(2, 0, dtype=torch.long), "got (2, 0)"),
    (torch.zeros(0, 2, dtype=torch.long), "got (0, 2)"),
    (torch.zeros(1, 2), "torch.float32"),
])
def test_ids_that_are_none(model: CausalLM, ids: Tensor, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        model(ids)
    assert message in str(caught.value)


def test_shapes_that_do_not_fit(model: CausalLM) -> None:
    ids = tokens(2, 4)
    with pytest.raises(RequestError, match=r"mask has shape \(2, 5\), ids have \(2, 4\)"):
        model(ids, mask_BT=torch.ones(2, 5))
    with pytest.raises(RequestError, match="cache was made for batch 3, ids have batch 2"):
        model(ids, cache=model.new_cache(3))
    with pytest.raises(RequestError, match=r"positions have shape \(1, 5\), ids have \(2, 4\)"):
        model(ids, positions_BT=torch.arange(5)[None])


def test_a_refused_call_leaves_the_cache_as_it_was(model: CausalLM) -> None:
    cache = model.new_cache(1)
    ids = tokens(1, 4)
    model(ids, cache=cache)
    with pytest.raises(RequestError):
        model(torch.tensor([[99]]), cache=cache)
    assert cache.length == 4
    close(model(ids[:, :1], cache=cache), model(torch.cat((ids, ids[:, :1]), 1))[:, -1:])


# ---- training -----------------------------------------------------------------------------------------------------


def test_the_main_loss_is_cross_entropy_of_the_logits(model: CausalLM) -> None:
    ids, labels = tokens(2, 6), tokens(2, 6, seed=5)
    labels[0, 2:4] = IGNORE
    loss = model.loss(ids, labels)
    close(loss.main, cross_entropy(model(ids).flatten(0, 1), labels.flatten()))
    assert loss.total is loss.main and loss.mtp is None and loss.balance is None
    assert loss.load_LE.sum(1).tolist() == [24, 24]


def test_the_total_is_the_weighted_sum(model: CausalLM) -> None:
    loss = model.loss(tokens(2, 6), tokens(2, 6, seed=5), mtp_weight=0.3, balance_weight=0.01)
    assert loss.mtp is not None and loss.balance is not None
    close(loss.total, loss.main + 0.3 * loss.mtp + 0.01 * loss.balance)
    assert loss.load_LE.shape == (4, 8)  # two layers, then two modules that see one and two tokens less
    assert loss.load_LE.sum(1).tolist() == [24, 24, 20, 16]


@pytest.mark.parametrize("kind", [torch.bool, torch.long])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted_as_load(model: CausalLM, side: str, kind: torch.dtype) -> None:
    ids, mask, _ = padded(side)
    labels = tokens(*ids.shape, seed=5).masked_fill(~mask, IGNORE)
    loss = model.loss(ids, labels, mask_BT=mask.to(kind), mtp_weight=0.1, balance_weight=0.1)
    assert bool(loss.total.isfinite())
    assert loss.load_LE[:2].sum(1).tolist() == [2 * sum(LENGTHS)] * 2


@pytest.mark.parametrize("length", [1, 2])
def test_sequences_too_short_for_an_mtp_module(model: CausalLM, length: int) -> None:
    loss = model.loss(tokens(2, length), tokens(2, length, seed=5), mtp_weight=0.3, balance_weight=0.01)
    assert bool(loss.total.isfinite()) and loss.load_LE[:2].sum(1).tolist() == [4 * length] * 2


@pytest.mark.parametrize("changes", [
    {}, {"q_lora_rank": 8, "attention_bias": True}, {"n_shared_experts": 0, "tie_word_embeddings": True},
    {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "scoring_func": "softmax"},
], ids=lambda c: ",".join(c) or "plain")
def test_the_gradient_reaches_every_parameter(changes: dict[str, Any]) -> None:
    trainable = make(**changes).train()
    loss = trainable.loss(tokens(4, 16), tokens(4, 16, seed=5), mtp_weight=0.3, balance_weight=0.01)
    loss.total.backward()
    for name, parameter in trainable.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), name


def test_without_mtp_weight_its_modules_are_not_run() -> None:
    trainable = make().train()
    trainable.loss(tokens(2, 8), tokens(2, 8, seed=5)).total.backward()
    untouched = {name for name, p in trainable.named_parameters() if p.grad is None}
    assert untouched == {name for name, _ in trainable.named_parameters() if name.startswith("model.mtp.")}


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    """Through the hand-written backward passes together: a step along the gradient changes the loss as it says."""
    trainable = make().train()
    ids, labels = tokens(2, 8), tokens(2, 8, seed=5)
    for block in trainable.moe_blocks().values():  # far apart, so that no choice flips under a small step
        block.gate.e_score_correction_bias += torch.arange(8.0)

    def total() -> Tensor:
        return trainable.loss(ids, labels, mtp_weight=0.3).total

    total().backward()
    step = 2e-3
    norm = torch.stack([p.grad.square().sum() for p in trainable.parameters() if p.grad is not None]).sum().sqrt()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p in trainable.parameters():
                assert p.grad is not None
                p.add_(p.grad, alpha=sign * step / float(norm))
            values.append(float(total()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(norm), rel=2e-2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(dtype: torch.dtype | None) -> None:
    results = []
    for _ in range(2):
        trainable = make(seed=7).train()
        trainable.compute_dtype = dtype
        loss = trainable.loss(tokens(2, 32), tokens(2, 32, seed=5), mtp_weight=0.3, balance_weight=0.01)
        loss.total.backward()
        results.append([loss.total.detach(), loss.load_LE, *(p.grad for p in trainable.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_activations_over_fp32_weights() -> None:
    trainable = make().train()
    ids, labels = tokens(2, 8), tokens(2, 8, seed=5)
    wide = trainable.loss(ids, labels).total
    trainable.compute_dtype = torch.bfloat16
    assert trainable.hidden(ids).dtype == torch.bfloat16 and trainable(ids).dtype == torch.float32
    half = trainable.loss(ids, labels).total
    torch.testing.assert_close(half.detach(), wide.detach(), rtol=0.05, atol=0)  # FP32 too
    half.backward()
    assert {p.grad.dtype for p in trainable.parameters() if p.grad is not None} == {torch.float32}


# ---- initial weights ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_initial_weights() -> None:
    model = make(hidden_size=64, vocab_size=500, initializer_range=0.02, attention_bias=True, q_lora_rank=32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert abs(float(parameter.mean())) < 0.004 and abs(float(parameter.std()) / 0.02 - 1) < 0.15, name
        else:
            assert bool((parameter == (0.0 if name.endswith("bias") else 1.0)).all()), name
    assert all(not block.gate.e_score_correction_bias.any() for block in model.moe_blocks().values())
    assert all(torch.equal(a, b) for a, b in zip(make(1).parameters(), make(1).parameters(), strict=True))
    assert not torch.equal(make(1).lm_head.weight, make(2).lm_head.weight)


def test_tied_embeddings_are_one_parameter() -> None:
    model = make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_moe_blocks_by_layer(model: CausalLM) -> None:
    assert list(model.moe_blocks()) == [1, 2, 3, 4]  # two layers, then the two MTP modules
