"""What training adds to the forward pass: balance loss, bias update, MaxVio, MTP loss, fused head, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepseek.config import ModelConfig
from deepseek.model import CausalLM, RoutingRecord, TrainingLoss, expert_load, max_violation
from deepseek.model.experts import MoE
from deepseek.model.gate import Gate, Route, choose, sequence_balance_loss
from deepseek.ops import linear_cross_entropy, loss
from deepseek.ops.saved import Saver

# ---- balance ----------------------------------------------------------------------------------------------------


def literal_balance(scores: list[list[float]], top: int) -> float:
    """arXiv 2412.19437, equations 17-20, without alpha, for one sequence: scores[t][i] is s_i,t before any bias."""
    tokens, experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(experts):
        times = 0
        for s_t in scores:
            among_best = sorted(range(experts), key=lambda j: -s_t[j])[:top]
            times += i in among_best
        f_i = experts / (top * tokens) * times
        p_i = sum(s_t[i] / sum(s_t) for s_t in scores) / tokens
        total += f_i * p_i
    return total


def test_balance_loss_is_the_formula(tiny_config: Callable) -> None:
    config: ModelConfig = tiny_config(n_group=1, topk_group=1)
    bias_E = torch.randn(16)  # moves the choice, not the loss
    route = choose(torch.randn(5 * 12, 16) * 2, config, bias_E)
    per_sequence = [literal_balance(s_TE.tolist(), 4) for s_TE in route.scores_TE.view(5, 12, 16)]
    assert float(sequence_balance_loss(route, 5)) == pytest.approx(sum(per_sequence) / 5, rel=1e-5)

    mask_BT = torch.arange(12) < torch.tensor([[12], [7], [1], [3], [12]])
    shorter = [literal_balance(s_TE[mask_T].tolist(), 4)
               for s_TE, mask_T in zip(route.scores_TE.view(5, 12, 16), mask_BT, strict=True)]
    assert float(sequence_balance_loss(route, 5, mask_BT.flatten())) == pytest.approx(sum(shorter) / 5, rel=1e-5)


def test_balance_loss_is_one_for_uniform_scores_and_grows_with_skew() -> None:
    index_TK = torch.arange(4).expand(6, 4)
    uniform = Route(index_TK, torch.ones(6, 4), torch.full((6, 16), 0.3))
    assert float(sequence_balance_loss(uniform, 2)) == pytest.approx(1.0, rel=1e-6)
    skewed_TE = torch.full((6, 16), 0.01)
    skewed_TE[:, :4] = 1.0
    assert float(sequence_balance_loss(Route(index_TK, torch.ones(6, 4), skewed_TE), 2)) > 3


def test_balance_loss_pulls_the_favourites_down(tiny_config: Callable) -> None:
    logits_TE = torch.randn(64, 16)
    logits_TE[:, :4] += 2
    logits_TE.requires_grad_()
    sequence_balance_loss(choose(logits_TE, tiny_config(), torch.zeros(16)), 4).backward()
    assert logits_TE.grad is not None
    pull_E = logits_TE.grad.sum(0)
    assert (pull_E[:4] > 0).all() and float(pull_E[4:].sum()) < 0


def test_bias_update_moves_by_exactly_the_speed(tiny_config: Callable) -> None:
    gate = Gate(tiny_config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1))
    gate.e_score_correction_bias.copy_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
    gate.update_bias(torch.tensor([9, 1, 4, 2]), 2**-7)  # mean 4; a power of two keeps the sums exact
    assert gate.e_score_correction_bias.tolist() == [0.5 - 2**-7, -0.25 + 2**-7, 0.0, 1.0 + 2**-7]


def test_load_and_max_violation() -> None:
    index_TK = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 0]])
    assert expert_load(index_TK, 5).tolist() == [4, 2, 1, 1, 0]
    assert expert_load(index_TK, 5, torch.tensor([True, False, True, False])).tolist() == [2, 1, 0, 1, 0]
    assert max_violation(torch.tensor([[4, 2, 1, 1, 0], [3, 3, 3, 3, 3]])).tolist() == pytest.approx([4 / 1.6 - 1, 0.0])
    assert float(max_violation(torch.zeros(4, dtype=torch.long))) == 0.0


def skewed_run(config: ModelConfig, speed: float, steps: int = 60) -> list[float]:
    """MaxVio per step of one sparse layer that learns to copy clusters of very unequal frequency, by SGD."""
    generator = torch.Generator().manual_seed(3)
    layer = MoE(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    centre_CH = torch.randn(20, config.hidden_size, generator=generator)
    frequency_C = 1.0 / torch.arange(1, 21) ** 1.5
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    curve = []
    for _ in range(steps):
        cluster_T = frequency_C.multinomial(256, replacement=True, generator=generator)
        noise_TH = torch.randn(256, config.hidden_size, generator=generator)
        x_TH = centre_CH[cluster_T] + 0.5 * noise_TH
        y_TH, route = layer(x_TH)
        optimizer.zero_grad()
        (y_TH - x_TH).square().mean().backward()
        optimizer.step()
        load_E = expert_load(route.index_TK, config.n_routed_experts)
        layer.gate.update_bias(load_E, speed)
        curve.append(float(max_violation(load_E)))
    return curve


def test_bias_updates_balance_a_skewed_run(tiny_config: Callable) -> None:
    config = tiny_config(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=2)
    without, with_bias = skewed_run(config, 0.0), skewed_run(config, 0.02)
    late_without, late_with = (sum(curve[-20:]) / 20 for curve in (without, with_bias))
    print(f"MaxVio over the last 20 of 60 steps: {late_without:.2f} without, {late_with:.2f} with bias updates")
    assert without[0] == with_bias[0]
    assert late_with < 0.5 * late_without


# ---- losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_fused_head_is_cross_entropy(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_rows", lambda vocab: chunk_rows)
    x_MH, w_VH = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels_M = torch.randint(0, 50, (40,))
    labels_M[::5] = loss.IGNORE
    fused = linear_cross_entropy(x_MH, w_VH, labels_M)
    grads = torch.autograd.grad(3 * fused, (x_MH, w_VH))
    plain = cross_entropy(x_MH @ w_VH.t(), labels_M)
    expected = torch.autograd.grad(3 * plain, (x_MH, w_VH))
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(grads, expected)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x_MH, w_VH, labels_M), plain)


def test_fused_head_without_any_label_is_zero() -> None:
    x_MH = torch.randn(3, 4, requires_grad=True)
    value = linear_cross_entropy(x_MH, torch.randn(5, 4), torch.full((3,), loss.IGNORE))
    value.backward()
    assert value.item() == 0.0 and x_MH.grad is not None and not x_MH.grad.any()


def by_hand(model: CausalLM, sequence_T: Tensor, depth: int) -> list[Tensor]:
    """Position by position: h of token i and the embedding of token i + depth + 1 tell token i + depth + 2."""
    h_TH = model.hidden(sequence_T[None, :-1])
    for d in range(depth + 1):
        count = h_TH.shape[1] - 1
        h_TH = model.mtp_hidden(d, h_TH[:, :count], sequence_T[None, d + 1 : d + 1 + count])
    logits_TV = model.lm_head(h_TH[0])
    return [cross_entropy(logits_TV[i], sequence_T[i + depth + 2]) for i in range(len(logits_TV))]


def test_mtp_loss_looks_as_far_ahead_as_it_should(tiny_config: Callable, random_model: Callable) -> None:
    model: CausalLM = random_model(tiny_config(num_nextn_predict_layers=2))
    sequence_BT = torch.randint(0, 96, (2, 14))
    result = model.loss(sequence_BT[:, :-1], sequence_BT[:, 1:], mtp_weight=0.3, balance_weight=0.01)
    main = cross_entropy(model(sequence_BT[:, :-1]).flatten(0, 1), sequence_BT[:, 1:].flatten())
    torch.testing.assert_close(result.main, main)
    depths = [torch.stack([t for row in sequence_BT for t in by_hand(model, row, depth)]) for depth in range(2)]
    assert [len(d) for d in depths] == [2 * 12, 2 * 11]
    assert result.mtp is not None and result.balance is not None
    torch.testing.assert_close(result.mtp, (depths[0].mean() + depths[1].mean()) / 2)
    torch.testing.assert_close(result.total, result.main + 0.3 * result.mtp + 0.01 * result.balance)
    # two layers and two modules route; every pair is counted once
    assert result.load_LE.sum(1).tolist() == [4 * 2 * n for n in (13, 13, 12, 11)]


@torch.no_grad()
def test_mtp_does_not_see_what_it_predicts(tiny_config: Callable, random_model: Callable) -> None:
    model: CausalLM = random_model(tiny_config(num_nextn_predict_layers=1))
    ids_BT = torch.randint(0, 96, (1, 12))
    changed = ids_BT.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 96
    a, b = (model.mtp_hidden(0, model.hidden(x)[:, :-1], x[:, 1:]) for x in (ids_BT, changed))
    torch.testing.assert_close(a[:, :7], b[:, :7])  # position 6 has read token 7
    assert (a[:, 7] - b[:, 7]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_any_loss(side: str, tiny_config: Callable, random_model: Callable) -> None:
    """A padded row gives the losses and loads of the row alone."""
    model: CausalLM = random_model(tiny_config(num_nextn_predict_layers=2))
    sequence_T = torch.randint(0, 96, (14,))
    ids_T, labels_T = sequence_T[:-1], sequence_T[1:]
    alone = model.loss(ids_T[None], labels_T[None], mtp_weight=0.3, balance_weight=0.01)

    def join(row_T: Tensor, padding_T: Tensor) -> Tensor:
        return torch.cat((padding_T, row_T) if side == "left" else (row_T, padding_T))[None]

    ids_BT, labels_BT = join(ids_T, torch.randint(0, 96, (5,))), join(labels_T, torch.full((5,), loss.IGNORE))
    mask_BT = join(torch.ones(13), torch.zeros(5)).bool()
    padded = model.loss(ids_BT, labels_BT, mask_BT=mask_BT, mtp_weight=0.3, balance_weight=0.01)
    assert padded.load_LE.tolist() == alone.load_LE.tolist()
    for name in ("main", "mtp", "balance", "total"):
        torch.testing.assert_close(getattr(padded, name), getattr(alone, name), msg=name)


def test_unlabelled_positions_teach_nothing(tiny_config: Callable, random_model: Callable) -> None:
    """Labels of -100 (a prompt, say) are left out of the main loss and of every MTP depth."""
    model: CausalLM = random_model(tiny_config(num_nextn_predict_layers=1))
    sequence_T = torch.randint(0, 96, (14,))
    labels_T = sequence_T[1:].clone()
    labels_T[:6] = loss.IGNORE
    result = model.loss(sequence_T[None, :-1], labels_T[None], mtp_weight=1.0)
    logits_TV = model(sequence_T[None, :-1])[0]
    torch.testing.assert_close(result.main, cross_entropy(logits_TV[6:], sequence_T[7:]))
    torch.testing.assert_close(result.mtp, torch.stack(by_hand(model, sequence_T, 0)[5:]).mean())


def result_and_gradients(model: CausalLM, gradients: list[dict[str, torch.Tensor | None]]) -> TrainingLoss:
    """The losses of one batch; the gradients of all parameters are added to the list."""
    sequence_BT = torch.randint(0, 96, (4, 41), generator=torch.Generator().manual_seed(0))
    result = model.loss(sequence_BT[:, :-1], sequence_BT[:, 1:], mtp_weight=0.3, balance_weight=0.01)
    result.total.backward()
    gradients.append({name: p.grad for name, p in model.named_parameters()})
    return result


# ---- gradient checkpointing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16 activations"])
def test_gradient_checkpointing_changes_no_bit(
    dtype: torch.dtype | None, tiny_config: Callable, random_model: Callable
) -> None:
    results, gradients = [], []
    for checkpointing in (False, True):
        model: CausalLM = random_model(tiny_config(num_nextn_predict_layers=1, q_lora_rank=24)).train()
        model.gradient_checkpointing, model.compute_dtype = checkpointing, dtype
        results.append(result_and_gradients(model, gradients))
    plain, checkpointed = results
    for name in ("total", "main", "mtp", "balance", "load_LE"):
        assert torch.equal(getattr(plain, name), getattr(checkpointed, name)), name
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        recomputed = gradients[1][name]
        assert gradient is not None and recomputed is not None and gradient.any(), name
        assert torch.equal(gradient, recomputed), name


def test_checkpointing_really_recomputes(tiny_config: Callable, random_model: Callable) -> None:
    model: CausalLM = random_model(tiny_config())
    calls: list[int] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_, n=block.layer: calls.append(n))
    sequence_BT = torch.randint(0, 96, (1, 10))
    for model.gradient_checkpointing, expected in ((False, [0, 1, 2]), (True, [0, 1, 2, 2, 1, 0])):
        calls.clear()
        model.loss(sequence_BT[:, :-1], sequence_BT[:, 1:]).total.backward()
        assert calls == expected


# ---- activations in FP8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16 activations"])
def test_activations_in_fp8_change_gradients_alone_and_little(
    dtype: torch.dtype | None, tiny_config: Callable, random_model: Callable
) -> None:
    results, gradients = [], []
    for saver in (None, Saver()):
        model: CausalLM = random_model(tiny_config(num_nextn_predict_layers=1, q_lora_rank=24)).train()
        model.saver, model.compute_dtype = saver, dtype
        results.append(result_and_gradients(model, gradients))
    for name in ("total", "main", "mtp", "balance", "load_LE"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    exact, packed = (torch.cat([g.float().flatten() for g in found.values() if g is not None]) for found in gradients)
    assert 1e-4 < float((packed - exact).norm() / exact.norm()) < 0.05


# ---- routing records --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_routing_record_and_load(tiny_config: Callable, random_model: Callable) -> None:
    model: CausalLM = random_model(tiny_config(num_hidden_layers=4, first_k_dense_replace=1))
    routing = RoutingRecord()
    ids_BT = torch.randint(0, 96, (2, 9))
    model(ids_BT, routing=routing)
    assert list(routing.routes) == [1, 2, 3] == list(model.moe_blocks())
    result = model.loss(ids_BT, ids_BT)
    expected = [expert_load(route.index_TK, 16) for route in routing.routes.values()]
    assert torch.equal(result.load_LE, torch.stack(expected))
    assert all(not torch.equal(a, b) for a, b in pairwise(result.load_LE))
