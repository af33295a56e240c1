"""Fully sharded data parallelism: each rank keeps a part of every weight, its gradient and the optimizer's state of it.

A layer's weights are gathered for its forward and its backward pass, and its gradients are summed to the ranks that
have their parts (torch's FSDP2, torch.distributed.fsdp.fully_shard; ZeRO-3, arXiv 1910.02054). What is no layer of the
main model, embeddings, head and MTP modules, is gathered once a forward pass. A tensor is divided along its first
dimension, so ranks have whole experts, and Muon works on these where they are; it gathers the direction of a matrix
that is divided by rows. The steps are those of one process, to rounding.

Checkpoints have the usual layout, so a run goes on in another one: the first rank gathers one tensor after another into
the CPU's memory, which must have room for the whole state, and writes it while training continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..checkpoint import with_state
from ..model import CausalLM
from .loop import TrainingLoop, Windows
from .optimizers import make_optimizer, trained
from .ranks import Ranks
from .settings import TrainConfig
from .shares import check_even

BACKENDS = "gloo", "nccl"  # their names stand in their errors


class FSDPLoop(TrainingLoop):
    """The loop of one rank. Arguments as of TrainingLoop; of the model only this rank's part stays there. Raises
    ConfigError naming setting, rule and value."""

    together = True

    def __init__(self, model: CausalLM, data: Windows, config: TrainConfig, *args: Any, ranks: Ranks, **more: Any
                 ) -> None:
        check_even(config, ranks.size)
        self.parts: dict[str, nn.Parameter] = {}  # none as long as the model is whole
        super().__init__(model, data, config, *args, ranks=ranks, **more)  # all of the model, as any rank begins
        whole, states = trained(model), self.optimizer.state
        shard(model, init_device_mesh(model.device.type, (ranks.size,)))
        self.rows = {name: Rows(_dtensor(p)) for name, p in trained(model).items()}
        self.parts = {name: nn.Parameter(rows.like.to_local()) for name, rows in self.rows.items()}
        self.own = frozenset(self.parts)
        self.optimizer = make_optimizer(self.parts, config)
        for name, part in self.parts.items():
            self.optimizer.gathers[part] = self.rows[name]
            self.optimizer.state[part] = {key: self.rows[name].part(value) if value.ndim else value
                                          for key, value in states[whole[name]].items()}

    def train_step(self) -> dict[str, Any]:
        with self.ranks.named(BACKENDS):
            return super().train_step()

    def evaluate(self) -> dict[str, Any]:
        with self.ranks.named(BACKENDS):
            return super().evaluate()

    def _clip(self) -> Tensor:
        for name, rows in self.rows.items():
            if (gradient := rows.like.grad) is not None:
                self.parts[name].grad, rows.like.grad = _dtensor(gradient).to_local(), None
        square = get_total_norm([part.grad for part in self.parts.values() if part.grad is not None]).square()
        self.ranks.sum_([square])
        clip_grads_with_norm_(self.parts.values(), self.config.clip, norm := square.sqrt())
        return norm

    # ---- checkpoints: gathered by all ranks, written by the first one ------------------------------------------------

    def _optimizer_state(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, parameter in (self.parts or trained(self.model)).items():
            if parameter in self.optimizer.state:
                yield name, self.optimizer.state[parameter]

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of whole tensors in the memory of the CPU, on the first rank."""
        found = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.ranks.first:
                found[name] = whole.detach().to("cpu", copy=True)
        return found

    def _copied(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        moments = {place: self.rows[place.rpartition(".")[0]].divided(value) if value.ndim else value
                   for place, value in self._moments().items()}
        found = self._gathered(self.model.state_dict()), self._gathered(moments)
        return found if self.ranks.first else None

    def _finish(self) -> None:
        if self.guided and self.accuracy is None:
            self.evaluate()
        state = self._gathered(self.model.state_dict())
        if self.ranks.first:
            self.model = with_state(self.model, state)
            super()._finish()


class Rows:
    """How a tensor is divided: along its first dimension."""

    def __init__(self, like: DTensor) -> None:
        self.like = like

    def divided(self, part: Tensor) -> DTensor:
        """The tensor of which each rank has a part."""
        return DTensor.from_local(part, self.like.device_mesh, self.like.placements, shape=self.like.shape,
                                  stride=self.like.stride())

    def gathered(self, part: Tensor) -> Tensor:
        """All of it, from all parts; whole matrices that lie one behind the other are left where they are."""
        return part if self.like.ndim > 2 else self.divided(part).full_tensor()

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part."""
        parts, rank = whole.chunk(self.like.device_mesh.size()), self.like.device_mesh.get_local_rank()
        return parts[rank].clone() if rank < len(parts) else whole[:0].clone()


def shard(model: CausalLM, mesh: DeviceMesh) -> None:
    """Divide a model over the ranks, in place; a gradient is the sum of theirs."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # with the MTP modules, of which parts run outside their forward pass
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for method in ("loss", "row_losses"):
        register_fsdp_forward_method(model, method)


def _dtensor(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor
