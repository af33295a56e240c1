"""Expert parallelism: groups of `expert_parallel` ranks share one set of routed experts, each rank has a part of it.

    dispatch   a token goes once to each rank of the group that has experts of its choice, with their weights
    experts    one call on all tokens that came (ops.expert_mlp)
    combine    a rank's sums go back, and a token's are added in FP32, in the order of the ranks

Both ways are an all-to-all with other sizes in every step; its backward pass is the same the other way round (GShard,
arXiv 2006.16668; a token once a rank as in DeepSeek-V3, arXiv 2412.19437, section 3.2.2). Everything but the routed
experts is data parallel, as it is without this: the step is that of one process, to rounding.

An expert's gradient holds the tokens of its group when it is there, so only groups among each other sum it, and its
moments are where it is. Every `place_every` steps experts move with them to other ranks of their group, by the loads
since the last time (placement.py); all groups have the same placement. Checkpoints have the usual layout: the first
rank asks the others for one expert after another while it writes, and sends them one after another when it reads. So a
run goes on in another layout.

Shape letters: T tokens, H hidden, K experts a token, P pairs of a token and a rank it goes to, R ranks of the group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..checkpoint import check_tensors, hf_names, open_checkpoint, save_model, with_state
from ..checkpoint.models import stored_parts
from ..config import ModelConfig
from ..errors import ConfigError
from ..model import CausalLM
from ..model.experts import RoutedExperts
from ..model.gate import Route
from ..ops.moments import BLOCK
from .loop import TrainingLoop, Windows
from .optimizers import SMALL, trained
from .placement import imbalance, move
from .ranks import Group, Ranks
from .settings import TrainConfig
from .shares import check_even


class Swap(torch.autograd.Function):
    """`Ranks.swap` of rows, and of their gradients the other way."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, sent: Sequence[int], came: Sequence[int], group: Group, *rows: Tensor
                ) -> tuple[Tensor, ...]:
        ctx.back = ranks, came, sent, group
        found = ranks.swap(rows, sent, came, group)
        ctx.mark_non_differentiable(*(part for part in found if not part.is_floating_point()))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ranks, *back = ctx.back
        wanted = [i for i, want in enumerate(ctx.needs_input_grad[4:]) if want]
        found: list[Tensor | None] = [None] * len(gradients)
        for i, gradient in zip(wanted, ranks.swap([gradients[i] for i in wanted], *back), strict=True):
            found[i] = gradient
        return None, None, None, None, *found


class OwnExperts(RoutedExperts):
    """A rank's part of the routed experts of a layer; tokens of the group come to them and go back.

    slot_E: of each expert the rank of the group that has it, times experts a rank, plus its place there."""

    slot_E: Tensor

    def __init__(self, whole: RoutedExperts, ranks: Ranks, group: Group, size: int, place: int) -> None:
        nn.Module.__init__(self)
        self.ranks, self.group, self.size, self.place = ranks, group, size, place
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(part.chunk(size)[place].detach().clone()) for part in (whole.gate_up_proj, whole.down_proj))
        self.register_buffer("slot_E", torch.arange(len(whole.down_proj), device=whole.down_proj.device),
                             persistent=False)

    def forward(self, x_TH: Tensor, route: Route) -> Tensor:
        count = len(self.gate_up_proj)
        slot_TK = self.slot_E[route.index_TK].where(route.index_TK >= 0, -1)  # -1: no expert
        rank_TK = slot_TK // count
        goes_RT = torch.stack([(rank_TK == rank).any(1) for rank in range(self.size)])
        rank_P, token_P = goes_RT.nonzero(as_tuple=True)
        one = [1] * self.size
        (came,) = self.ranks.swap([goes_RT.sum(1, keepdim=True)], one, one, self.group)
        sent, back = goes_RT.sum(1).tolist(), came.flatten().tolist()
        index_PK = slot_TK[token_P].sub(rank_P[:, None] * count)
        index_PK.masked_fill_((index_PK < 0) | (index_PK >= count), -1)
        x_PH, weight_PK, index_PK = self._swap(
            sent, back, x_TH.index_select(0, token_P), route.weight_TK.index_select(0, token_P), index_PK)
        (y_PH,) = self._swap(back, sent, super().forward(x_PH, Route(index_PK, weight_PK, weight_PK)))
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        for tokens, part in zip(token_P.split(sent), y_PH.split(sent), strict=True):
            out_TH.index_add_(0, tokens, part.float())
        return out_TH.to(x_TH.dtype)

    def where(self, expert: int) -> tuple[int, int]:
        """The rank of the group that has an expert, and its place there."""
        return divmod(int(self.slot_E[expert]), len(self.down_proj))

    @torch.no_grad()
    def move(self, slot_E: Tensor, kept: Iterable[Tensor]) -> None:
        """Let all ranks of the group swap experts until they have the slots `slot_E`. kept: what the optimizer keeps
        of those that are here, each tensor in equal parts."""
        count = len(self.down_proj)
        rows = [part.view(count, -1) for part in (self.gate_up_proj, self.down_proj, *kept)]
        here_C, mine_C = (at_E.argsort().chunk(self.size)[self.place] for at_E in (self.slot_E, slot_E))
        to_C, from_C = slot_E[here_C], self.slot_E[mine_C]
        sent, came = (at_C.div(count, rounding_mode="floor").bincount(minlength=self.size).tolist()
                      for at_C in (to_C, from_C))
        order_C = to_C.argsort()
        found = self.ranks.swap([part[order_C] for part in rows], sent, came, self.group)
        place_C = (from_C // count).argsort(stable=True)  # of what came: by ranks, from each by new slots
        for part, new in zip(rows, found, strict=True):
            part[place_C] = new
        self.slot_E.copy_(slot_E)

    def _swap(self, sent: Sequence[int], came: Sequence[int], *rows: Tensor) -> tuple[Tensor, ...]:
        return Swap.apply(self.ranks, sent, came, self.group, *rows)


class Piece(NamedTuple):
    """Of an expert: rows of its weight `name`, or (all rows) what the optimizer keeps of it under `key`. expert None: a
    number that is kept once for the parameter."""

    name: str
    expert: int | None
    rows: slice = slice(None)
    key: str = ""


class ExpertParallelLoop(TrainingLoop):
    """The loop of one rank. Arguments as of TrainingLoop; of the model's routed experts only its part stays there.
    Raises ConfigError naming setting, rule and value."""

    together = True

    def __init__(self, model: CausalLM, data: Windows, config: TrainConfig, *args: Any, ranks: Ranks, **more: Any
                 ) -> None:
        check_layout(model.config, config, ranks.size)
        self.size, self.place = config.expert_parallel, ranks.rank % config.expert_parallel
        self.group, self.others = ranks.groups(self.size)
        self.experts = list[OwnExperts]()
        for block in model.moe_blocks().values():
            self.experts.append(OwnExperts(block.experts, ranks, self.group, self.size, self.place))
            block.experts = self.experts[-1]
        self.slot_LE = torch.arange(model.config.n_routed_experts).repeat(len(self.experts), 1)  # as ranks have agreed
        self.load_LE = torch.zeros_like(self.slot_LE)  # since they have
        self.own = frozenset(f"{prefix}.{name}" for prefix, module in model.named_modules()
                             if isinstance(module, OwnExperts) for name, _ in module.named_parameters())
        self.on_disk = {stored: Piece(name, *part) for name in self.own
                        for stored, part in hf_names(name, model.config) if part is not None}
        self.count = model.config.n_routed_experts // self.size
        super().__init__(model, data, config, *args, ranks=ranks, **more)

    def _exchange(self, sums: dict[str, float], load_LE: Tensor, tokens: Sequence[int], seconds: float) -> Tensor:
        if self.ranks.size > self.size:
            self.ranks.sum_([p.grad for name, p in self._own() if p.grad is not None], self.others)
        return super()._exchange(sums, load_LE, tokens, seconds)

    def _clip(self) -> Tensor:
        parameters = trained(self.model)
        own, all_ = ([p.grad for name, p in parameters.items() if p.grad is not None and (name in self.own) == is_own]
                     for is_own in (True, False))
        square = get_total_norm(own).square() * (self.size / self.ranks.size)
        self.ranks.sum_([square])
        norm = (get_total_norm(all_).square() + square).sqrt()
        clip_grads_with_norm_(parameters.values(), self.config.clip, norm)
        return norm

    def train_step(self) -> dict[str, Any]:
        return super().train_step() | self.noted

    def _balance(self, load_LE: Tensor) -> None:
        super()._balance(load_LE)
        seen = slice(len(load_LE))  # without MTP loss its gate saw nothing
        self.noted: dict[str, Any] = {"imbalance": round(imbalance(load_LE.cpu(), self.slot_LE[seen], self.size), 4)}
        if not self.config.place_every:
            return
        self.load_LE[seen] += load_LE.cpu()
        if (self.step + 1) % self.config.place_every == 0:
            before, self.slot_LE = self.slot_LE, move(self.load_LE, self.slot_LE, self.size)
            old, new = (round(imbalance(self.load_LE, at_LE, self.size), 4) for at_LE in (before, self.slot_LE))
            gone = int((before // self.count != self.slot_LE // self.count).sum())
            self.noted["placed"] = {"experts": gone, "before": old, "after": new}
            self._place()
            self.load_LE.zero_()

    def _place(self) -> None:
        """Bring experts to the slots that are agreed."""
        for experts, slot_E in zip(self.experts, self.slot_LE.to(self.model.device), strict=True):
            if not torch.equal(experts.slot_E, slot_E):
                experts.move(slot_E, [value for p in experts.parameters()
                                      for _, value in sorted(self.optimizer.state.get(p, {}).items()) if value.ndim])

    def _own(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in trained(self.model).items() if name in self.own)

    def _spread(self) -> None:
        super()._spread()
        if self.ranks.size > self.size:
            self.ranks.copy_from_first([p.detach() for _, p in self._own()], self.others)
        self._place()

    def _division(self) -> dict[str, Any]:
        return super()._division() | {"placement": {
            "ranks": self.size, "slots": self.slot_LE.tolist(), "loads": self.load_LE.tolist()}}

    def _divide(self, about: Mapping[str, Any]) -> None:
        super()._divide(about)
        if (placement := about.get("placement")) and placement["ranks"] == self.size:
            self.slot_LE, self.load_LE = torch.tensor(placement["slots"]), torch.tensor(placement["loads"])

    # ---- checkpoints: the first rank and the experts of all ------------------------------------------------------

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        if not self.ranks.first:
            while (asked := self.ranks.receive(0)) is not None:
                piece, value = asked
                if value is None:
                    self.ranks.send(self._here(piece).cpu().clone(), 0)
                else:
                    self._put_here(piece, value)
        yield
        if self.ranks.first:
            for rank in range(1, self.ranks.size):
                self.ranks.send(None, rank)

    def _where(self, piece: Piece) -> tuple[int, int]:
        assert piece.expert is not None
        experts = self.model.get_submodule(piece.name.rpartition(".")[0])
        assert isinstance(experts, OwnExperts)
        return experts.where(piece.expert)

    def _here(self, piece: Piece) -> Tensor:
        """A view of what this rank has."""
        parameter, (_, place) = self.model.get_parameter(piece.name), self._where(piece)
        if not piece.key:
            return parameter.detach()[place][piece.rows]
        kept = self.optimizer.state[parameter][piece.key]
        return kept.view(self.count, -1, *kept.shape[1:])[place]

    def _put_here(self, piece: Piece, value: Tensor) -> None:
        if piece.key:
            parameter = self.model.get_parameter(piece.name)
            state, value = self.optimizer.state[parameter], value.to(parameter.device)
            if piece.expert is None:
                state[piece.key] = value.clone()
                return
            if piece.key not in state:
                state[piece.key] = value.new_empty(self.count * len(value), *value.shape[1:])
        self._here(piece).copy_(value)

    def _read_piece(self, piece: Piece) -> Tensor:
        if (owner := self._where(piece)[0]) == 0:
            return self._here(piece)
        self.ranks.send((piece, None), owner)
        return self.ranks.receive(owner)

    def _put(self, piece: Piece, value: Tensor) -> None:
        """Give a piece to all ranks that have the expert."""
        for rank in range(self.ranks.size):
            if piece.expert is None or rank % self.size == self._where(piece)[0]:
                if rank == 0:
                    self._put_here(piece, value)
                else:
                    self.ranks.send((piece, value.clone()), rank)

    def _elsewhere(self, name: str) -> Iterable[Tensor]:
        if name in self.on_disk:
            return [self._read_piece(self.on_disk[name])]
        parameter, _, key = name.rpartition(".")
        return (self._read_piece(Piece(parameter, expert, key=key)) for expert in range(self.count * self.size))

    def _moments(self) -> dict[str, Tensor]:
        return {name: torch.empty(self.size * len(value), *value.shape[1:], dtype=value.dtype, device="meta")
                if name.rpartition(".")[0] in self.own and value.ndim else value
                for name, value in super()._moments().items()}

    def _whole(self) -> CausalLM:
        """The model with its routed experts on the meta device."""
        return with_state(self.model, {name: tensor for name, tensor in self.model.state_dict().items()
                                       if name not in self.own})

    def _write(self, path: Path, add: Callable[[Path], None], state: Mapping[str, Tensor] | None = None) -> Path:
        assert state is None  # the first rank has not all of it
        return save_model(self._whole(), path, tokenizer=self.tokenizer, add=add, elsewhere=self._elsewhere)

    def _read(self, folder: Path) -> None:
        _, _, files = open_checkpoint(folder)
        whole, state = self._whole(), self.model.state_dict()
        check_tensors(whole, files)
        for name, stored, _ in stored_parts(whole):
            if stored in self.on_disk:
                self._put(self.on_disk[stored], files.read(stored))
            else:
                state[name].copy_(files.read(stored))
        self.model.check_gates()

    def _restore(self, name: str, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        if name not in self.own:
            return super()._restore(name, parameter, state)
        for key, value in state.items():
            if not value.ndim:
                self._put(Piece(name, None, key=key), value)
                continue
            for expert, part in enumerate(value.chunk(self.count * self.size)):
                self._put(Piece(name, expert, key=key), part)


def check_layout(model: ModelConfig, config: TrainConfig, ranks: int) -> None:
    """Raises ConfigError where the experts cannot be divided so."""
    size, experts = config.expert_parallel, model.n_routed_experts
    for what, count in (("the number of ranks", ranks), ("n_routed_experts", experts)):
        if count % size:
            raise ConfigError(f"expert_parallel = {size}: must divide {what} ({count})")
    check_even(config, ranks)
    narrow = model.moe_intermediate_size * model.hidden_size
    if config.moments == "8bit" and (narrow % BLOCK or narrow * experts // size < SMALL):
        raise ConfigError(f"expert_parallel = {size}: with moments = 8bit an expert's matrix must be a multiple of "
                          f"{BLOCK} numbers and a rank's part of them at least {SMALL}, this one has {narrow} and "
                          f"{narrow * experts // size}")
