"""What turns gradients into weights: AdamW in torch's fused form, or Muon for matrices with AdamW for the rest; moments
in FP32 or in 8 bits (ops/moments.py).

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/): a matrix moves along its momentum with every singular
value brought near 1. The step is scaled by 0.2 * sqrt(larger side), so that its entries are as large as AdamW's and
AdamW's learning rate and decay carry over (Moonlight, arXiv 2502.16982, section 2.2). An expert is a matrix of its own,
its gate and its up projection are two, as they are in a dense MLP.

Shape letters: N matrices of R rows and C columns.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..ops.moments import Moment, adamw8_, hashed, momentum8, moved_, second_of, set_second_
from ..ops.native import fast_bf16
from .settings import TrainConfig
from .sites import parts_on

QUINTIC = 3.4445, -4.7750, 2.0315  # steepest at 0; singular values end in about [0.7, 1.2] (the post above)
STEPS = 5
SMALL = 4096  # numbers of a tensor below which its moments stay FP32
BY_ADAMW = ("embed_tokens.weight", "lm_head.weight", ".gate.weight")  # rows of their own rather than one map


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    parts = ((name, part) for name, _, part in parts_on(model))
    return {name: parameter for name, parameter in (*model.named_parameters(), *parts) if parameter.requires_grad}


def narrow(model: nn.Module) -> None:
    """Put what is trained into BF16, in place; gates, vectors and matrices of less than 4096 numbers stay FP32."""
    for name, p in trained(model).items():
        if p.ndim > 1 and p.numel() >= SMALL and not name.endswith(".gate.weight"):
            p.data = p.data.bfloat16()


def make_optimizer(model: nn.Module | Mapping[str, nn.Parameter], config: TrainConfig) -> MuonAdamW:
    """Make the optimizer of `config`, of a model or of parameters by their names. Matrices decay, norms and biases do
    not."""
    parameters = trained(model) if isinstance(model, nn.Module) else model
    muon = [] if config.optimizer == "adamw" else [
        name for name, p in parameters.items() if p.ndim > 1 and not name.endswith(BY_ADAMW)]
    rest = [p for name, p in parameters.items() if name not in muon]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]
    betas = config.beta1, config.beta2
    groups.extend({"params": [parameters[name] for name in muon if parts_of(name) == parts],
                   "weight_decay": config.weight_decay, "parts": parts} for parts in (1, 2))
    return MuonAdamW(groups, lr=config.lr, betas=betas, momentum=config.momentum or 0.0, small=(
        SMALL if config.moments == "8bit" else None), seed=config.seed)


def parts_of(name: str) -> int:
    """How many matrices lie one above the other in the parameter `name`."""
    return 2 if name.endswith(".gate_up_proj") else 1


class Gathers(Protocol):
    """How a tensor is divided over ranks (fsdp.py)."""

    def gathered(self, part: Tensor, /) -> Tensor:
        """This rank's part -> whole matrices."""

    def part(self, whole: Tensor, /) -> Tensor:
        """This rank's part of all of it."""


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with `parts`, the matrices that lie one above the other in each parameter; AdamW for others.

    small: numbers of a parameter below which its moments are FP32; those of others have 8 bits. None: all are FP32.
    seed: of the rounding of BF16 parameters, which none of less than `small` numbers may be."""

    # torch's own import its compiler to hide from it: seconds of a run's start
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], momentum: float,
                 small: int | None = None, weight_decay: float = 0.0, eps: float = 1e-8, seed: int = 0) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum, "small": small,
                                  "weight_decay": weight_decay, "eps": eps, "parts": 0})
        self.summed: dict[Tensor, float] = {}  # ranks that p.grad is one of (second_moments.py)
        self.gathers: dict[Tensor, Gathers] = {}  # of parameters that are parts of others
        self.seeds = {p: hashed(hashed(seed) + i)
                      for i, p in enumerate(p for group in self.param_groups for p in group["params"])}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            short = [group["small"] is not None and p.numel() >= group["small"] for p in parameters]
            if group["parts"]:
                for p, eight_bits in zip(parameters, short, strict=True):
                    self._by_muon(p, group, eight_bits)
                continue
            for p in itertools.compress(parameters, short):
                self._by_adamw8(p, group)
            whole = [p for p, eight_bits in zip(parameters, short, strict=True) if not eight_bits]
            for ranks in sorted({self.summed.get(p, 1.0) for p in whole}):
                self._by_adamw([p for p in whole if self.summed.get(p, 1.0) == ranks], group, ranks)

    def _by_muon(self, p: Tensor, group: dict[str, Any], eight_bits: bool) -> None:
        assert p.grad is not None
        state, beta = self.state[p], group["momentum"]
        if not state:
            state |= _moment("momentum", p, torch.int8) if eight_bits else {"momentum": torch.zeros_like(p)}
        if eight_bits:
            ahead = momentum8(p.grad.float().contiguous(), _of("momentum", state), beta)
        else:
            ahead = p.grad.lerp(state["momentum"].lerp_(p.grad, 1 - beta), beta)  # Nesterov's
        whole = ahead if (gathers := self.gathers.get(p)) is None else gathers.gathered(ahead)
        if not whole.numel():
            return
        turned_NRC = orthogonalise(whole.view(-1, whole.shape[-2] // group["parts"], whole.shape[-1]))
        size = 0.2 * max(turned_NRC.shape[1:]) ** 0.5
        turned = turned_NRC.reshape(whole.shape)
        if gathers is not None and whole is not ahead:
            turned = gathers.part(turned)
        decay, size = 1 - group["lr"] * group["weight_decay"], group["lr"] * size
        if p.dtype == torch.bfloat16:
            step = state.setdefault("step", torch.zeros((), device=p.device)).add_(1)
            moved_(p, turned, hashed(self.seeds[p] + int(step)), decay=decay, size=size)
        else:
            p.mul_(decay).add_(turned, alpha=-size)

    def _by_adamw8(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state |= {"step": torch.zeros((), device=p.device), **_moment("exp_avg", p), **_moment("exp_avg_sq", p)}
        state["step"] += 1
        adamw8_(p, p.grad.contiguous(), _of("exp_avg", state), _of("exp_avg_sq", state), int(state["step"]),
                betas=group["betas"], seed=hashed(self.seeds[p] + int(state["step"])),
                **_among(self.summed.get(p, 1.0), group))

    def _by_adamw(self, parameters: list[Tensor], group: dict[str, Any], ranks: float) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                 "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(parameters, [p.grad for p in parameters if p.grad is not None], [s["exp_avg"] for s in states],
              [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states], fused=True, amsgrad=False,
              beta1=beta1, beta2=beta2, maximize=False, **_among(ranks, group))  # type: ignore[arg-type]

    def second(self, p: Tensor) -> Tensor | None:
        """AdamW's second moment of a parameter, float32; None before its first step."""
        if "exp_avg_sq" not in (state := self.state[p]):
            return None
        if "exp_avg_sq_scale" not in state:
            return state["exp_avg_sq"]
        return second_of(_of("exp_avg_sq", state)).flatten()[: p.numel()].view_as(p)

    def set_second(self, p: Tensor, second: Tensor) -> None:
        """Put another in its place."""
        state = self.state[p]
        if "exp_avg_sq_scale" in state:
            set_second_(_of("exp_avg_sq", state), second, hashed(self.seeds[p] + int(state["step"])))
        else:
            state["exp_avg_sq"].copy_(second)


def _among(ranks: float, group: dict[str, Any]) -> dict[str, float]:
    """AdamW's settings that make a second moment of v count as v / ranks."""
    root = ranks**0.5
    return {"lr": group["lr"] * root, "weight_decay": group["weight_decay"] / root, "eps": group["eps"] * root}


def _moment(name: str, p: Tensor, dtype: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """A moment of zeros as a parameter's state keeps it."""
    code_BS, scale_B = Moment.zeros(p, dtype)
    return {name: code_BS, f"{name}_scale": scale_B}


def _of(name: str, state: dict[str, Tensor]) -> Moment:
    return Moment(state[name], state[f"{name}_scale"])


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """Bring the singular values of every matrix near 1 and keep its singular vectors: five steps of a quintic
    Newton-Schulz iteration, in BF16 on units for it. FP32 in, FP32 out; zeros stay zeros."""
    if x_NRC.shape[1] > x_NRC.shape[2]:
        return orthogonalise(x_NRC.mT).mT
    x = x_NRC / torch.linalg.matrix_norm(x_NRC, keepdim=True).clamp_min(1e-7)
    if fast_bf16(x.device.type):
        x = x.bfloat16()
    a, b, c = QUINTIC
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.float()
