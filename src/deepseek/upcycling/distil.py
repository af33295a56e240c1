"""The loss of a student against the best logits of its teacher, without ever holding all of the student's logits.

Of each position the teacher's K best tokens are kept with their probabilities t_k; what it gives all others is one more
outcome, t_r = 1 - sum t_k. With the student's probabilities q, and q_r = 1 - sum q_k,

    KL = sum t_k log(t_k / q_k) + t_r log(t_r / q_r)

and its gradient by the logit of token v is q_v - t_v for one of the K, q_v - t_r q_v / q_r for another. Cross entropy's
is q_v, less 1 for the label. As in ops/loss.py, one pass over chunks of rows makes a chunk of logits, both losses and
the gradient of the hidden states. The head is not trained.

Shape letters: M rows, H hidden, V vocabulary, K best.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.loss import IGNORE, chunk_rows

BEST = 16
LEAST = 1e-6  # of a probability


class Targets(NamedTuple):
    """The teacher's best tokens of each position, int64 and float32 logarithms of probabilities, both [..., K]."""

    ids: Tensor
    log_p: Tensor


def best_of(logits_MV: Tensor) -> Targets:
    """What is kept of a teacher's logits."""
    log_p, ids = logits_MV.log_softmax(-1).topk(min(BEST, logits_MV.shape[-1]), -1)
    return Targets(ids, log_p)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, w_VH: Tensor, labels_M: Tensor, targets: Targets, kl_share: float
                ) -> tuple[Tensor, Tensor, Tensor]:
        keep_M = labels_M != IGNORE
        count = keep_M.sum().clamp(min=1)
        dx_MH = torch.empty_like(x_MH)
        entropy = kl = torch.zeros((), dtype=torch.float32, device=x_MH.device)
        wide = w_VH.to(x_MH.dtype)
        for start in range(0, len(x_MH), rows := chunk_rows(len(w_VH))):
            part = slice(start, start + rows)
            q_MV = (x_MH[part] @ wide.t()).float().log_softmax(-1)
            label_M1 = labels_M[part].masked_fill(~keep_M[part], 0).unsqueeze(1)
            keep_M1 = keep_M[part].unsqueeze(1).float() / count
            entropy = entropy - (q_MV.gather(1, label_M1) * keep_M1).sum()
            ids_MK, log_t_MK = targets.ids[part], targets.log_p[part]
            log_q_MK, t_MK = q_MV.gather(1, ids_MK), log_t_MK.exp()
            q_MV.exp_()
            q_MK = q_MV.gather(1, ids_MK)
            t_M1 = (1 - t_MK.sum(1, keepdim=True)).clamp(min=LEAST)
            q_M1 = (1 - q_MK.sum(1, keepdim=True)).clamp(min=LEAST)
            kl = kl + (((t_MK * (log_t_MK - log_q_MK)).sum(1, keepdim=True) + t_M1 * (t_M1 / q_M1).log())
                       * keep_M1).sum()
            grad_MV = q_MV * (1 - kl_share * t_M1 / q_M1)
            grad_MV.scatter_(1, ids_MK, q_MK - kl_share * t_MK)
            grad_MV.scatter_add_(1, label_M1, torch.full_like(keep_M1, kl_share - 1))
            torch.mm(grad_MV.mul_(keep_M1).to(x_MH.dtype), wide, out=dx_MH[part])
        ctx.save_for_backward(dx_MH)
        ctx.mark_non_differentiable(entropy, kl)
        return (1 - kl_share) * entropy + kl_share * kl, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (dx_MH,) = ctx.saved_tensors
        return dx_MH * scale, None, None, None, None


def distillation_loss(
    x_MH: Tensor, w_VH: Tensor, labels_M: Tensor, targets: Targets, kl_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl_share * KL + (1 - kl_share) * cross entropy, cross entropy, KL), means over labelled rows; the first has a
    gradient by x_MH, the head w_VH gets none. Rows labelled -100 do not count."""
    return _Distillation.apply(x_MH, w_VH.detach(), labels_M, targets, kl_share)
