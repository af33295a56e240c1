"""The weights that the ranks of a run in rounds agree on: how what each has changed is coded, and what they become."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .compress import CODECS, ErrorFeedback, OuterNesterov
from .members import pieces
from .own_state import parts_of
from .settings import TrainConfig

STATE = ("theta.", "error.", "outer.")


class Agreed:
    """theta: the weights, by name. They and the outer momentum are equal on all ranks, what coding has lost is not."""

    def __init__(self, config: TrainConfig) -> None:
        decay, lr, momentum = config.error_decay, config.outer_lr, config.outer_momentum
        assert decay is not None and lr is not None and momentum is not None
        self.feedback = ErrorFeedback(CODECS["2bit" if config.compress == "local" else "sparse"], decay)
        self.outer = OuterNesterov(lr, momentum)
        self.theta: dict[str, Tensor] = {}

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        self.theta = {name: weight.clone() for name, weight in weights.items()}

    def encode(self, weights: Mapping[str, Tensor]) -> bytes:
        """What is sent of weights that began with theta."""
        return b"".join(self.feedback.encode(name, theta - weights[name]).cpu().numpy().tobytes()
                        for name, theta in self.theta.items())

    @torch.no_grad()
    def merge(self, parts: Mapping[int, bytes], shares: Mapping[int, float]) -> dict[int, bytes]:
        """Go on by what the ranks have sent, with the share of each, in their order. Returns what came behind it."""
        codec = self.feedback.codec
        sizes = [codec.nbytes(tuple(theta.shape)) for theta in self.theta.values()]
        change = {name: torch.zeros_like(theta) for name, theta in self.theta.items()}
        rests = {}
        for rank, payload in parts.items():
            *coded, rests[rank] = pieces(payload, [*sizes, len(payload) - sum(sizes)])
            for (name, theta), part in zip(self.theta.items(), coded, strict=True):
                sent = codec.decode(tensor_of(part, np.uint8), theta.shape)
                change[name] += shares[rank] * sent.to(theta.device)
        if parts:
            self.outer.step(self.theta, change)
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
