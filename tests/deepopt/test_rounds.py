"""Training in rounds: ranks are threads of this process here, with a store between them, as processes have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepseek.checkpoint import load_model
from deepseek.data import TokenShards
from deepseek.deepopt.compress import CODECS
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.members import PIECE, Members, Solo, Verdict
from deepseek.deepopt.predict import predict
from deepseek.deepopt.rounds import RoundLoop
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import Compress, Line, TrainConfig
from deepseek.errors import ConfigError, RankError
from deepseek.files import sha256
from deepseek.model import CausalLM
from tests.helpers.killed_runs import TINY
from tests.helpers.ranks import in_threads, packed

GRACE = 20.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return packed(tmp_path_factory.mktemp("rounds") / "tokens")


@pytest.fixture
def store() -> dist.TCPStore:
    return new_store()


def new_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=GRACE), wait_for_workers=False)


def config(**changes: Any) -> TrainConfig:
    keys: dict[str, Any] = dict(
        steps=12, batch_size=2, seq_len=32, accumulation=4, warmup_steps=2, eval_every=6, save_every=3, keep=9,
        precision="fp32", rank_timeout=GRACE, lr=1e-3)
    rounds = dict(compress="local", inner_steps=3, balance=False) if "compress" not in changes else {}
    return TrainConfig(**keys | rounds | changes)


OnStep = Callable[[RoundLoop, int], None]


class KilledError(Exception):
    """Ends a rank without a word to the others."""


def train(rank: int, size: int, port: int, data: TokenShards, out: Path, asked: TrainConfig,
          on_step: OnStep | None = None) -> RoundLoop:
    """What one rank does. on_step: told of every step of its own before it is taken."""
    members = Members.at(f"127.0.0.1:{port}", rank, size, asked.rank_timeout)
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    loop = RoundLoop(model, data, asked, out, ranks=Solo(members, rank))
    step = loop.train_step

    def told() -> dict[str, Any]:
        if on_step is not None:
            on_step(loop, loop.step)
        return step()

    loop.train_step = told  # type: ignore[method-assign]
    try:
        loop.run()
    except KilledError:
        pass
    finally:
        loop._lock.close()
    return loop


def all_of(size: int, data: TokenShards, out: Path, asked: TrainConfig, store: dist.TCPStore, *,
           told: Mapping[int, OnStep] | None = None) -> dict[int, RoundLoop]:
    """Run the ranks. told: `on_step` of some of them."""
    return dict(enumerate(in_threads(size, lambda rank: train(
        rank, size, store.port, data, out, asked, (told or {}).get(rank)))))


def rounds(out: Path) -> list[dict[str, Any]]:
    return [record for record, _ in read_log(out / "log.jsonl") if "round" in record]


def weights(out: Path) -> str:
    return sha256(out / "model" / "model.safetensors")


def test_two_ranks_end_with_the_same_weights_and_learn(data: TokenShards, tmp_path: Path, store: dist.TCPStore) -> None:
    loops = all_of(2, data, tmp_path, config(), store)
    one, two = (loops[rank].model.state_dict() for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    log = rounds(tmp_path)
    assert [record["step"] for record in log] == [3, 6, 9, 12] and all(r["ranks"] == [0, 1] for r in log)
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    plain = 4 * sum(p.numel() for p in loops[0].model.parameters())
    assert all(record["bytes_sent"] < plain / 4 for record in log)
    assert (tmp_path / "loss.png").is_file() and load_model(tmp_path / "model")


@pytest.mark.parametrize("compress", ["local", "sparse"])
def test_bytes_are_those_predicted(data: TokenShards, tmp_path: Path, store: dist.TCPStore, compress: Compress) -> None:
    asked = config(steps=6, compress=compress, inner_steps=3, balance=False)
    all_of(2, data, tmp_path, asked, store)
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    (mode,) = (mode for mode in predict(model, asked, 2, Line()).modes if mode.compress == compress)
    for record in rounds(tmp_path):
        assert 3 * mode.sent == pytest.approx(record["bytes_sent"], rel=0.03)
        assert 3 * mode.received == pytest.approx(record["bytes_received"], rel=0.05)


def test_rounds_of_one_rank_and_plain_merging_are_its_own_training(
    data: TokenShards, tmp_path: Path, store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.deepopt import agreed as module

    monkeypatch.setitem(module.CODECS, "2bit", module.CODECS["none"])
    asked = config(outer_lr=1.0, outer_momentum=0.0, accumulation=2)
    loops = all_of(1, data, tmp_path / "rounds", asked, store)
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    TrainingLoop(model, data, config(compress="none", accumulation=2), tmp_path / "plain").run()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(loops[0].model.state_dict()[name], tensor, atol=1e-5), name


def test_batches_of_a_round_are_divided_without_gap_or_overlap(data: TokenShards, tmp_path: Path, store: dist.TCPStore
                                                               ) -> None:
    taken: dict[int, list[int]] = {0: [], 1: []}

    def note(loop: RoundLoop, step: int) -> None:
        taken[loop.members.rank].extend(loop._numbers())

    all_of(2, data, tmp_path, config(steps=6), store, told={0: note, 1: note})
    assert sorted(taken[0] + taken[1]) == [*range(24)] and len(taken[0]) == len(taken[1]) == 12


def test_the_biases_go_as_the_sum_of_the_loads_says(data: TokenShards, tmp_path: Path, store: dist.TCPStore) -> None:
    loads: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def note(loop: RoundLoop, step: int) -> None:
        if not loads[loop.members.rank]:  # its list is filled until the round ends, and another begun then
            loads[loop.members.rank] = loop.loads

    loops = all_of(2, data, tmp_path, config(steps=3, bias_speed=0.01), store, told={0: note, 1: note})
    model = CausalLM(TINY).init_weights(torch.Generator().manual_seed(0))
    gates = [block.gate for block in model.moe_blocks().values()]
    for one, two in zip(*loads.values(), strict=True):
        for gate, load_E in zip(gates, one + two, strict=True):
            gate.update_bias(load_E, 0.01)
    for gate, other in zip(gates, loops[0].gates, strict=True):
        assert torch.equal(gate.e_score_correction_bias, other.e_score_correction_bias)


@pytest.mark.parametrize("overlap", [0, 2])
def test_all_killed_and_started_again_end_in_the_same_bytes(data: TokenShards, tmp_path: Path, store: dist.TCPStore,
                                                            overlap: int) -> None:
    asked = config(overlap_steps=overlap, bias_speed=0.01)
    all_of(2, data, tmp_path / "calm", asked, store)

    def die(loop: RoundLoop, step: int) -> None:
        if step == 7:
            raise KilledError

    all_of(2, data, tmp_path / "killed", asked, new_store(), told={0: die, 1: die})
    assert not (tmp_path / "killed" / "model").exists()
    all_of(2, data, tmp_path / "killed", asked, new_store())
    assert weights(tmp_path / "calm") == weights(tmp_path / "killed")
    logs = [[(record["step"], record.get("loss"), record.get("eval_loss")) for record, _ in read_log(out / "log.jsonl")]
            for out in (tmp_path / "calm", tmp_path / "killed")]
    assert logs[0] == logs[1] and [step for step, loss, _ in logs[0] if loss] == [3, 6, 9, 12]


def test_a_rank_that_starts_again_after_the_end_does_not_wait(data: TokenShards, tmp_path: Path, store: dist.TCPStore
                                                              ) -> None:
    all_of(2, data, tmp_path, config(steps=3), store)
    before = weights(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert train(1, 2, store.port, data, tmp_path, config(steps=3)).step == 3
    assert weights(tmp_path) == before


@pytest.mark.parametrize("overlap", [1, 3])
def test_a_merge_under_way_is_taken_in_as_the_equations_say(data: TokenShards, tmp_path: Path, store: dist.TCPStore,
                                                            overlap: int) -> None:
    asked = config(steps=9, overlap_steps=overlap, bias_speed=0.01)
    found = all_of(2, data, tmp_path / "run", asked, store)[0].model.state_dict()

    class Rank(TrainingLoop):  # alone, with the batches that it would have
        rank = 0

        def _numbers(self) -> range:
            first = 12 * (self.step // 3) + 6 * self.rank + 2 * (self.step % 3)
            return range(first, first + 2)

        def _balance(self, load_LE: torch.Tensor) -> None:
            loads[self.rank][-1].append(load_LE)
            super()._balance(load_LE)

    loads: list[list[list[torch.Tensor]]] = [[], []]
    loops = [Rank(CausalLM(TINY).init_weights(torch.Generator().manual_seed(0)), data, asked, tmp_path / str(rank))
             for rank in range(2)]
    loops[1].rank = 1
    named = [dict(loop.model.named_parameters()) for loop in loops]
    codec, lr, momentum, decay = CODECS["2bit"], 0.8, 0.5, 0.95
    theta = {name: p.detach().clone() for name, p in named[0].items()}
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    error = [{name: torch.zeros_like(p) for name, p in theta.items()} for _ in loops]
    bias = [gate.e_score_correction_bias.clone() for gate in loops[0].gates]
    sent: list[dict[str, torch.Tensor]] = [{}, {}]
    rows: list[dict[str, torch.Tensor]] = [{}, {}]

    def take_in(rank: int) -> None:
        for name, p in named[rank].items():
            p.data = theta[name] + (p.data - sent[rank][name])
            own, mean, v = rows[rank][name], (rows[0][name] + rows[1][name]) / 2, second(rank, name)
            v.copy_(torch.where(mean < own, v * mean / own, v + mean - own))

    def second(rank: int, name: str) -> torch.Tensor:
        return loops[rank].optimizer.state[named[rank][name]]["exp_avg_sq"]

    for rank in range(2):
        loops[rank].optimizer.summed = dict.fromkeys(named[rank].values(), 2.0)

    def balance(rank: int) -> None:
        for gate, agreed, number in zip(loops[rank].gates, bias, range(99), strict=False):
            gate.e_score_correction_bias.copy_(agreed)
            for load_LE in loads[rank][-1]:
                gate.update_bias(load_LE[number], 0.01)

    for turn in range(3):
        for rank, loop in enumerate(loops):
            loads[rank].append([])
            for step in range(3):
                if turn and step == overlap:
                    take_in(rank)
                    balance(rank)
                loop.train_step()
            if turn and overlap == 3:
                take_in(rank)
                balance(rank)
        change = {name: torch.zeros_like(p) for name, p in theta.items()}
        for rank in range(2):
            for name, p in named[rank].items():
                wanted = theta[name] - p.data + decay * error[rank][name]
                coded = codec.decode(codec.encode(wanted), wanted.shape)
                error[rank][name] = wanted - coded
                change[name] += 0.5 * coded
                sent[rank][name] = p.data.clone()
                rows[rank][name] = second(rank, name).mean(-1, keepdim=True).bfloat16().float()
        for name, d in change.items():
            velocity[name] = momentum * velocity[name] + d
            theta[name] = theta[name] - lr * (d + momentum * velocity[name])
        for step in range(3):
            both_LE = loads[0][-1][step] + loads[1][-1][step]
            for gate, agreed, load_E in zip(loops[0].gates, bias, both_LE, strict=False):
                now, gate.e_score_correction_bias = gate.e_score_correction_bias, agreed
                gate.update_bias(load_E, 0.01)
                gate.e_score_correction_bias = now
    for name, tensor in theta.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    for name, agreed in zip([name for name in found if name.endswith("correction_bias")], bias, strict=True):
        assert torch.equal(found[name], agreed), name
    for loop in loops:
        loop._lock.close()


def test_overlap_learns_as_much_and_evaluates_merged_weights(data: TokenShards, tmp_path: Path, store: dist.TCPStore
                                                             ) -> None:
    found = []
    for overlap, place in ((0, store), (2, new_store())):
        out = tmp_path / str(overlap)
        one, two = all_of(2, data, out, config(steps=24, overlap_steps=overlap), place).values()
        assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))
        found.append([record for record, _ in read_log(out / "log.jsonl")])
        assert [record["step"] for record in rounds(out)] == [*range(3, 25, 3)]
    losses = [[record["eval_loss"] for record in log if "eval_loss" in record] for log in found]
    first = [log[0]["loss"] for log in found]
    assert len(losses[0]) == len(losses[1]) == 4
    assert all(loss[-1] < before - 0.3 for loss, before in zip(losses, first, strict=True))
    plain, delayed = losses
    assert delayed[-1] < plain[-2]  # two steps late, not six
    loop = TrainingLoop(load_model(tmp_path / "2" / "model"), data, config(compress="none"), tmp_path / "again")
    assert loop.evaluate()["eval_loss"] == pytest.approx(losses[1][-1], abs=1e-6)
    loop._lock.close()


def all_but_one(dies: int, data: TokenShards, out: Path, asked: TrainConfig, store: dist.TCPStore,
                dead: threading.Event, die: OnStep, survive: OnStep) -> tuple[RoundLoop, RoundLoop]:
    """(the loop of the rank that stays, that of the one which dies, and comes back after round 2)."""
    back: list[RoundLoop] = []

    def come_back() -> None:
        dead.wait(60)
        until(lambda: store.check(["r2/verdict"]))
        back.append(train(dies, 2, store.port, data, out, asked))

    thread = threading.Thread(target=come_back, daemon=True)
    thread.start()
    loops = all_of(2, data, out, asked, store, told={dies: die, 1 - dies: survive})
    thread.join(60)
    return loops[1 - dies], back[0]


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("told", [False, True])
def test_a_rank_that_dies_while_its_part_is_under_way(
    data: TokenShards, tmp_path: Path, store: dist.TCPStore, dies: int, told: bool
) -> None:
    """told: its part has come to the store."""
    asked, dead = config(steps=24, eval_every=24, overlap_steps=2, rank_timeout=60.0), threading.Event()

    def die(loop: RoundLoop, step: int) -> None:
        if dead.is_set():
            return
        if step == 3 and not told:
            def silent(*_: Any) -> None:
                raise RankError("never came")
            loop.members.finish = silent  # type: ignore[method-assign,assignment]
        if step == 6:
            assert loop.flight is not None and loop.flight.number == 1
            if told:
                until(lambda: store.check([f"r1/about/{dies}"]))
            store.set(f"gone/{dies}", "-9")
            dead.set()
            raise KilledError

    def survive(loop: RoundLoop, step: int) -> None:
        if step == 12:
            until(lambda: dies in loop.taking or store.check([f"join/{dies}"]))

    survivor, back = all_but_one(dies, data, tmp_path, asked, store, dead, die, survive)
    ranks = {record["round"]: record["ranks"] for record in rounds(tmp_path)}
    alone = [1 - dies]
    assert ranks[0] == [0, 1] and ranks.get(1, [0, 1]) == ([0, 1] if told else alone) and ranks[2] == ranks[3] == alone
    assert ranks[6] == ranks[7] == [0, 1] and len(ranks) >= 7  # the leader's death may cost a line
    one, two = survivor.model.state_dict(), back.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rounds(tmp_path)[-1]["loss"] < rounds(tmp_path)[0]["loss"]


def until(holds: Callable[[], bool]) -> None:
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_does_not_end_the_run_and_may_come_back(
    data: TokenShards, tmp_path: Path, store: dist.TCPStore, dies: int
) -> None:
    asked, dead = config(steps=24, eval_every=24), threading.Event()

    def die(loop: RoundLoop, step: int) -> None:
        if step == 7 and not dead.is_set():
            store.set(f"gone/{dies}", "-9")  # as the launcher does
            dead.set()
            raise KilledError

    def survive(loop: RoundLoop, step: int) -> None:
        if step == 12:
            until(lambda: dies in loop.taking or store.check([f"join/{dies}"]))

    survivor, back = all_but_one(dies, data, tmp_path, asked, store, dead, die, survive)
    log = rounds(tmp_path)
    assert [record["step"] for record in log] == [*range(3, 25, 3)]
    ranks = [record["ranks"] for record in log]
    assert ranks[:3] == [[0, 1], [0, 1], [1 - dies]] and ranks[5:] == [[0, 1]] * 3
    assert log[-1]["loss"] < log[0]["loss"]
    one, two = survivor.model.state_dict(), back.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert load_model(tmp_path / "model")


def test_a_rank_that_hangs_is_left_out_and_joins_again(data: TokenShards, tmp_path: Path, store: dist.TCPStore) -> None:
    hung = threading.Event()

    def hang(loop: RoundLoop, step: int) -> None:
        if step == 7 and not hung.is_set():
            hung.set()
            until(lambda: store.check(["r3/verdict"]))

    def survive(loop: RoundLoop, step: int) -> None:
        if step == 15:
            until(lambda: 1 in loop.taking or store.check(["join/1"]))

    loops = all_of(2, data, tmp_path, config(steps=24, eval_every=24, rank_timeout=4.0), store,
                   told={1: hang, 0: survive})
    ranks = [record["ranks"] for record in rounds(tmp_path)]
    assert ranks[:4] == [[0, 1], [0, 1], [0], [0]] and ranks[6:] == [[0, 1]] * 2
    one, two = (loops[rank].model.state_dict() for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_slow_rank_takes_fewer_steps(data: TokenShards, tmp_path: Path, store: dist.TCPStore) -> None:
    def slow(loop: RoundLoop, step: int) -> None:
        time.sleep(0.4)

    all_of(2, data, tmp_path, config(steps=24, inner_steps=6, balance=True), store, told={1: slow})
    steps = [record["steps"] for record in rounds(tmp_path)]
    assert steps[0] == {"0": 6, "1": 6} and all(one["1"] < one["0"] == 6 for one in steps[1:])


def test_the_first_verdict_counts(store: dist.TCPStore) -> None:
    one, two = (Members.at(f"127.0.0.1:{store.port}", rank, 2, 1.0) for rank in range(2))
    first, second = (Verdict([rank], [rank], [], {rank: 3}, 7) for rank in range(2))
    assert one.decide(4, first) == two.decide(4, second) == first


def test_values_of_any_size_and_errors_that_say_who(store: dist.TCPStore) -> None:
    one, two = (Members.at(f"127.0.0.1:{store.port}", rank, 2, 0.3) for rank in range(2))
    for number, value in enumerate((b"", b"x" * (2 * PIECE + 5))):
        one.put(f"r1/part/{number}", value)
        assert two.get(f"r1/part/{number}") == value
    one.forget("r1/")
    assert not one.there("r1/part/1") and not one.there("r1/part/1/0")
    with pytest.raises(RankError, match=r"rank 1: no rank has set r9 within 0\.3 s"):
        two.get("r9")
    store.set("gone/0", "2")
    with pytest.raises(RankError, match="rank 1: rank 0 has ended before there was data"):
        two.prepared("prepared/here/0")
    with pytest.raises(RankError, match=r"rank 0: no store answers at 127\.0\.0\.1:1 "):
        Members.at("127.0.0.1:1", 0, 2, 0.5)


def test_what_makes_no_sense_is_refused() -> None:
    for changes, words in (({"inner_steps": 0}, "inner_steps = 0"), ({"outer_lr": -1.0}, "outer_lr = -1.0"),
                           ({"compress": "zip"}, "compress = 'zip'"), ({"error_decay": 2.0}, "error_decay = 2.0"),
                           ({"overlap_steps": 4}, r"overlap_steps = 4: must be at most inner_steps \(3\)"),
                           ({"powersgd_rank": 2}, "powersgd_rank = 2: has a meaning only with compress = powersgd"),
                           ({"momentum": 0.9}, "momentum = 0.9: has a meaning only with optimizer = muon")):
        with pytest.raises(ConfigError, match=words):
            config(**changes)
    rounds: dict[str, Any] = {"inner_steps": 3, "overlap_steps": 2, "outer_lr": 1.0, "error_decay": 0.5}
    for name, value in rounds.items():
        with pytest.raises(ConfigError, match=f"{name} = {value}: has a meaning only with compress = local or sparse"):
            config(compress="none", **dict.fromkeys(rounds) | {name: value})
    assert (config().outer_lr, config(compress="sparse").outer_lr, TrainConfig().outer_lr) == (0.8, 1.0, None)
    json.dumps(config().__dict__)
