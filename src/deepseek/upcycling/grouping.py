"""One dense FFN -> a shared expert, routed experts and a gate that stands for them, on calibration text.

The FFN is y = D h, h = silu(G x) * (U x). The layer's neurons are divided once, in closed form, without training:

    shared    the neurons n of largest mean square of |h_n| |D_n|, which most tokens need
    experts   what a linear gate cannot tell apart belongs together: a neuron's part |h_n| |D_n| is regressed on x, and
              balanced k-means divides the neurons by their predictions
    gate      an expert's row and bias are the regression of log |y_e| on x, so the largest expected outputs are chosen.
              Rows and bias are scaled so that logits have a standard deviation of LOGIT_STD: a sigmoid is 1/2 plus a
              quarter of its logit there, so a bias outside of it acts as one inside, and the normalised weights, times
              K, are all about 1
    refit     D' minimises |D h - D' (w h)|^2 + lambda |D' - D|^2, w the weight of each neuron's expert, 0 where it was
              not chosen: what is present makes up for what is absent

Markers and balanced clusters are CMoE's (arXiv 2502.04416), which groups neurons by the tokens that they fire for;
grouping by what the gate can predict lost less here, and so did the mean square against the rate of being among the ten
largest (docs/log.md).

Shape letters: T tokens, H hidden, I intermediate, N neurons of routed experts, E experts, W = N / E, S shared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..config import ModelConfig
from ..model.gate import choose

LOGIT_STD = 0.1  # of a gate's logits over tokens
RIDGE = 1e-2  # of the regressions on x, as a share of the mean variance
REFIT_RIDGE = 0.3  # of the down projection's, as a share of the mean square of an active neuron
FLOOR = 0.05  # added to |y_e| within the logarithm, as a share of a token's mean
ROUNDS = 10  # of k-means


class Division(NamedTuple):
    """A layer's neurons and its gate. order_I: shared neurons, then those of each expert; row_EH, bias_E: the gate's;
    down_HI: in that order; error: of the output on the calibration text, |y' - y|^2 / |y|^2."""

    order_I: Tensor
    row_EH: Tensor
    bias_E: Tensor
    down_HI: Tensor
    error: float


def hidden(x_TH: Tensor, gate_IH: Tensor, up_IH: Tensor) -> Tensor:
    return silu(x_TH @ gate_IH.t()).mul_(x_TH @ up_IH.t())


def divide_layer(x_TH: Tensor, stream_TH: Tensor, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor,
                 config: ModelConfig, seed: int, refit: bool = True) -> Division:
    """Divide the neurons of a dense FFN (float32) as `config` says: moe_intermediate_size, n_shared_experts,
    n_routed_experts, num_experts_per_tok. x_TH: inputs of the FFN; stream_TH: what its output is added to. The result
    is the same for the same arguments."""
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    h_TI = hidden(x_TH, gate_IH, up_IH)
    # what follows sees the sum divided by its size: a token of huge numbers counts for no more than another
    h_TI /= (stream_TH + h_TI @ down_HI.t()).norm(dim=1, keepdim=True).clamp(min=1e-12)
    part_TI = h_TI.abs() * down_HI.norm(dim=0)
    rank_I = part_TI.square().mean(0).argsort(descending=True)
    shared = width * (config.n_shared_experts or 0)
    shared_S, routed_N = rank_I[:shared].sort().values, rank_I[shared:].sort().values
    stats = Inputs(x_TH)
    row_NH, _ = stats.regress(part_TI[:, routed_N])
    expert_N = balanced_clusters(row_NH @ stats.root_HH, experts, seed)
    order_I = torch.cat([shared_S, routed_N[expert_N.argsort(stable=True)]])
    h_TI, down_HI = h_TI[:, order_I], down_HI[:, order_I]
    norm_TE = output_norms(h_TI[:, shared:], down_HI[:, shared:], width)
    row_EH, bias_E = stats.regress(norm_TE.add_(FLOOR * norm_TE.mean(1, keepdim=True)).clamp_(min=1e-30).log_())
    if config.num_experts_per_tok == experts:  # nothing to choose: all weights are to be 1
        row_EH.zero_(), bias_E.zero_()
    else:
        scale = LOGIT_STD / (row_EH @ stats.root_HH).norm(dim=1).mean().clamp(min=1e-12)
        row_EH, bias_E = row_EH * scale, (bias_E - bias_E.mean()) * (scale / 4)
    weight_TI = neuron_weights(x_TH, row_EH, bias_E, config)
    target_TH = h_TI @ down_HI.t()
    fitted_HI = refitted(h_TI, weight_TI, down_HI) if refit else down_HI
    lost = (h_TI * weight_TI) @ fitted_HI.t() - target_TH
    error = float(lost.square().sum() / target_TH.square().sum().clamp(min=1e-30))
    return Division(order_I, row_EH, bias_E, fitted_HI, error)


class Inputs:
    """Mean and covariance of a layer's inputs, for regressions on them. root_HH: |row @ root| is the standard deviation
    of row . x."""

    def __init__(self, x_TH: Tensor) -> None:
        self.mean_H = x_TH.mean(0)
        self.centred_TH = x_TH - self.mean_H
        cov_HH = self.centred_TH.t() @ self.centred_TH / len(x_TH)
        cov_HH.diagonal().add_(RIDGE * cov_HH.diagonal().mean().clamp(min=1e-12))
        self.root_HH = torch.linalg.cholesky(cov_HH)

    def regress(self, y_TN: Tensor) -> tuple[Tensor, Tensor]:
        """(row_NH, bias_N) that predict y as row . x + bias."""
        mean_N = y_TN.mean(0)
        row_HN = torch.cholesky_solve(self.centred_TH.t() @ (y_TN - mean_N) / len(y_TN), self.root_HH)
        return row_HN.t().contiguous(), mean_N - self.mean_H @ row_HN


def balanced_clusters(point_NF: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each point, by k-means in which all clusters have N / clusters points."""
    generator = torch.Generator().manual_seed(seed)
    centre_EF = point_NF[torch.randperm(len(point_NF), generator=generator)[:clusters]]
    cluster_N = torch.zeros(len(point_NF), dtype=torch.int64)
    for _ in range(ROUNDS):
        before_N, cluster_N = cluster_N, assign(torch.cdist(point_NF, centre_EF), len(point_NF) // clusters)
        if torch.equal(before_N, cluster_N):
            break
        centre_EF = torch.zeros_like(centre_EF).index_add_(0, cluster_N, point_NF) / (len(point_NF) // clusters)
    return cluster_N


def assign(cost_NE: Tensor, room: int) -> Tensor:
    """A cluster for each point, with `room` points in each: all points ask for their nearest cluster that has room, and
    it takes the nearest of them; the others ask again."""
    points, clusters = cost_NE.shape
    cluster_N = torch.full((points,), -1)
    left_E = torch.full((clusters,), room)
    while len(waiting := (cluster_N < 0).nonzero().flatten()):
        cost, wanted = cost_NE[waiting].masked_fill(left_E == 0, torch.inf).min(1)
        order = cost.argsort(stable=True)
        order = order[wanted[order].argsort(stable=True)]  # by cluster, then by cost
        wanted = wanted[order]
        count_E = torch.bincount(wanted, minlength=clusters)
        place = torch.arange(len(order)) - (count_E.cumsum(0) - count_E)[wanted]
        taken = place < left_E[wanted]
        cluster_N[waiting[order[taken]]] = wanted[taken]
        left_E -= torch.bincount(wanted[taken], minlength=clusters)
    return cluster_N


def output_norms(h_TN: Tensor, down_HN: Tensor, width: int) -> Tensor:
    """|y_e| of each expert, [T, E]: h' (D' D) h, without making y_e."""
    squares = []
    for h_TW, down_HW in zip(h_TN.split(width, 1), down_HN.split(width, 1), strict=True):
        squares.append((h_TW @ (down_HW.t() @ down_HW) * h_TW).sum(1))
    return torch.stack(squares, 1).clamp_(min=0).sqrt_()


def neuron_weights(x_TH: Tensor, row_EH: Tensor, bias_E: Tensor, config: ModelConfig) -> Tensor:
    """The weight that the model's gate gives each neuron's expert, [T, I]; 1 for the shared neurons."""
    route = choose(x_TH @ row_EH.t(), config, bias_E)
    weight_TE = torch.zeros(len(x_TH), len(row_EH)).scatter_(1, route.index_TK, route.weight_TK)
    shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
    return torch.cat([torch.ones(len(x_TH), shared), weight_TE.repeat_interleave(config.moe_intermediate_size, 1)], 1)


def refitted(h_TI: Tensor, weight_TI: Tensor, down_HI: Tensor) -> Tensor:
    """The down projection that comes nearest to the dense output with weighted neurons; `down_HI` itself where all
    weights are 1."""
    present_TI = h_TI * weight_TI
    square_II = present_TI.t() @ present_TI
    square_II.diagonal().add_(REFIT_RIDGE * square_II.diagonal().mean().clamp(min=1e-30))
    lost_TH = (h_TI - present_TI) @ down_HI.t()
    return down_HI + torch.linalg.solve(square_II, present_TI.t() @ lost_TH).t()
