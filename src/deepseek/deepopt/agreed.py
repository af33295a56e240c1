"""The weights that the ranks of a run in rounds agree on: how what each has changed is coded, and what they become.

A weight that bears a name is sent by the ranks that own the name, and becomes what they have, or their mean (sites.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from .compress import CODECS, ErrorFeedback, OuterNesterov
from .members import pieces
from .own_state import parts_of
from .settings import TrainConfig

STATE = ("theta.", "error.", "outer.")


class Agreed:
    """theta: the weights. They and the outer momentum are equal on all ranks, what coding has lost is not. owner: the
    name that some of them bear."""

    def __init__(self, config: TrainConfig) -> None:
        decay, lr, momentum = config.error_decay, config.outer_lr, config.outer_momentum
        assert decay is not None and lr is not None and momentum is not None
        self.feedback = ErrorFeedback(CODECS["2bit" if config.compress == "local" else "sparse"], decay)
        self.outer = OuterNesterov(lr, momentum)
        self.theta: dict[str, Tensor] = {}
        self.owner: Mapping[str, str] = {}

    def begin(self, weights: Mapping[str, Tensor], owner: Mapping[str, str]) -> None:
        self.theta, self.owner = {name: weight.clone() for name, weight in weights.items()}, owner

    def sent(self, own: Collection[str]) -> dict[str, Tensor]:
        """theta of what a rank sends that owns these names."""
        return {name: theta for name, theta in self.theta.items() if self.owner.get(name) in (None, *own)}

    def encode(self, weights: Mapping[str, Tensor], own: Collection[str]) -> bytes:
        """What is sent of weights that began with theta."""
        return b"".join(self.feedback.encode(name, theta, weights[name]).cpu().numpy().tobytes()
                        for name, theta in self.sent(own).items())

    @torch.no_grad()
    def merge(self, parts: Mapping[int, bytes], tokens: Mapping[int, int], own: Mapping[int, Collection[str]]
              ) -> dict[int, bytes]:
        """Go on by what the ranks have sent, weighted by their tokens, in their order. own: the names that each owns.
        Returns what came behind it."""
        codec = self.feedback.codec
        total = {name: sum(tokens[rank] for rank in parts if name in (None, *own[rank]))
                 for name in {None, *self.owner.values()}}
        change: dict[str, Tensor] = {}
        rests = {}
        for rank, payload in parts.items():
            sent = self.sent(own[rank])
            sizes = [codec.nbytes(tuple(theta.shape)) for theta in sent.values()]
            *coded, rests[rank] = pieces(payload, [*sizes, len(payload) - sum(sizes)])
            for (name, theta), part in zip(sent.items(), coded, strict=True):
                change[name] = codec.add(tensor_of(part, np.uint8).to(theta.device), theta.shape,
                                         tokens[rank] / total[self.owner.get(name)], change.get(name))
        self.outer.step(self.theta, {name: d for name, d in change.items() if name not in self.owner})
        for name in self.owner.keys() & change.keys():
            self.theta[name] -= change[name]
        return rests

    # ---- kept ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """By STATE and name; `error` is what only this rank has."""
        found = self.theta, self.feedback.state_dict(), self.outer.state_dict()
        return {part + name: tensor for part, tensors in zip(STATE, found, strict=True)
                for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """theta is left as it is where the state has none."""
        device = next(iter(self.theta.values())).device
        parts = parts_of({key: tensor.to(device) for key, tensor in state.items() if key.startswith(STATE)})
        self.theta = self.theta | parts["theta"]
        self.feedback.load_state_dict(parts["error"])
        self.outer.load_state_dict(parts["outer"])


def tensor_of(payload: bytes, dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.frombuffer(payload, dtype).copy())
