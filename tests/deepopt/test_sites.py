"""Sites with names of their own: ranks are threads here, each with its own data and folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepseek.atlas import Atlas
from deepseek.checkpoint import load_model
from deepseek.cli import main as deepseek
from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt.agreed import Agreed
from deepseek.deepopt.compress import CODECS
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.members import Members, Solo
from deepseek.deepopt.optimizers import trained
from deepseek.deepopt.rounds import RoundLoop
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import TrainConfig
from deepseek.deepopt.sites import check_owners, divide, parts_on
from deepseek.deepopt.trainer import Trainer
from deepseek.errors import ConfigError
from deepseek.files import sha256
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from tests.helpers import ROOT
from tests.helpers.killed_runs import TINY
from tests.helpers.ranks import in_threads

NAMES = ("prose", "ledger", "code")
OWN = (("prose", "code"), ("ledger",))
WORDS = {"prose": "the river ran past an old house and no one saw its windows shine".split(),
         "ledger": "paid 31 coins on 7 may to account 4402 balance 918 credit".split(),
         "code": "def f ( x ) : return x + 1 if else for in range".split()}
MODEL = TINY.with_(n_group=4, topk_group=2)  # the last group bears no name


def documents(names: tuple[str, ...]) -> list[Document]:
    draw = random.Random(0)
    return [Document(" ".join(draw.choices(WORDS[name], k=60)), "made up", expert=name)
            for _ in range(40) for name in names]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[TokenShards]:
    """Of each site."""
    folder = tmp_path_factory.mktemp("sites")
    tokenizer = Tokenizer.train((d.text for d in documents(NAMES)), MODEL.vocab_size)
    return [pack(documents(own), tokenizer, folder / own[0], valid_fraction=0.1, experts=NAMES) for own in OWN]


def new_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**dict[str, Any](
        steps=9, batch_size=2, seq_len=48, accumulation=4, warmup_steps=2, eval_every=24, eval_batches=2,
        save_every=3, keep=9, precision="fp32", rank_timeout=20.0, lr=3e-3, balance=False, compress="local",
        inner_steps=3, sites=True
    ) | changes)


def new_model() -> CausalLM:
    return CausalLM(MODEL).init_weights(torch.Generator().manual_seed(0))


class KilledError(Exception):
    """Ends a rank without a word to the others."""


def train(data: list[TokenShards], out: Path, asked: TrainConfig, *,
          told: Mapping[int, Callable[[RoundLoop, int], None]] | None = None) -> list[RoundLoop]:
    """Run a rank for each data. told: of some, called with every own step before it is taken."""
    store = new_store()

    def work(rank: int) -> RoundLoop:
        members = Members.at(f"127.0.0.1:{store.port}", rank, len(data), asked.rank_timeout)
        loop = RoundLoop(new_model(), data[rank], asked, out / str(rank), ranks=Solo(
            members, 0, apart=bool(asked.sites)))
        step, on_step = loop.train_step, (told or {}).get(rank, lambda loop, step: None)
        loop.train_step = lambda: (on_step(loop, loop.step), step())[1]  # type: ignore[method-assign]
        try:
            loop.run()
        except KilledError:
            store.set(f"gone/{rank}", "-9")  # as the launcher does
        finally:
            loop._lock.close()
        return loop

    return in_threads(len(data), work)


def rounds(out: Path) -> list[dict[str, Any]]:
    return [record for record, _ in read_log(out / "log.jsonl") if "round" in record]


def test_own_gradients_are_those_of_the_whole_and_nothing_else_moves(data: list[TokenShards], tmp_path: Path) -> None:
    whole, site = new_model(), new_model()
    divide(site, NAMES, OWN[0])
    batch = data[0].batch(0, 2, 32, seed=0)
    for model in (whole, site):
        model.loss(batch.ids_BT, batch.labels_BT, mtp_weight=0.3).total.backward()
    groups = (*NAMES, "3")
    for name, group, part in parts_on(site):
        gradient = whole.get_parameter(name.replace(f".{group}.", ".")).grad
        assert gradient is not None and (part.grad is None) == (group == "ledger")
        assert part.grad is None or torch.equal(part.grad, gradient.chunk(4)[groups.index(group)])
    site.zero_grad()
    before = {name: part.detach().clone() for name, _, part in parts_on(site)}
    loop = TrainingLoop(site, data[0], config(compress="none", inner_steps=None, sites=None), tmp_path)
    loop.train_step()
    for name, group, part in parts_on(site):
        assert torch.equal(part, before[name]) == (group == "ledger"), name
    kept = {id(p) for p in loop.optimizer.state}
    assert kept == {id(p) for p in trained(site).values()}
    assert not any(id(part) in kept for _, group, part in parts_on(site) if group == "ledger")
    whole_size, frozen = (sum(p.numel() for p in found) for found in (
        whole.parameters(), [part for _, group, part in parts_on(site) if group == "ledger"]))
    assert sum(p.numel() for p in trained(site).values()) == whole_size - frozen > 0
    loop._lock.close()


def test_a_merge_takes_experts_from_their_owners() -> None:
    owner = {"a": "law", "b": "code", "c": "law"}
    theta = {name: torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abcx")}
    theta["d"] = theta["x"].clone()
    owner["d"] = "absent"
    own = {0: ["law"], 1: ["law", "code"], 2: list[str]()}
    tokens = {0: 10, 1: 30, 2: 60}
    made = {rank: Agreed(config(outer_lr=0.8, outer_momentum=0.9)) for rank in own}
    moved = {rank: {name: value + 0.01 * (rank + 1) * value.flip(0) for name, value in theta.items()} for rank in own}
    parts = {}
    for rank, agreed in made.items():
        agreed.begin(theta, owner)
        parts[rank] = agreed.encode(moved[rank], own[rank]) + bytes([rank])
    assert len(parts[2]) < len(parts[0]) < len(parts[1])
    codec = CODECS["2bit"]
    sent = {rank: {name: codec.decode(codec.encode(theta[name] - w), w.shape) for name, w in weights.items()}
            for rank, weights in moved.items()}
    for agreed in made.values():
        assert agreed.merge(parts, tokens, own) == {rank: bytes([rank]) for rank in own}
        found = agreed.theta
        assert torch.equal(found["b"], theta["b"] - sent[1]["b"])
        assert torch.equal(found["d"], theta["d"])
        for name in "ac":
            assert torch.allclose(found[name], theta[name] - 0.25 * sent[0][name] - 0.75 * sent[1][name], atol=1e-6)
        mean = sum(tokens[rank] / 100 * sent[rank]["x"] for rank in own)
        assert torch.allclose(found["x"], theta["x"] - 0.8 * 1.9 * mean, atol=1e-6)
        assert agreed.outer.velocity.keys() == {"x"}


def test_sites_end_with_one_model_that_has_learnt_from_both_and_send_less(data: list[TokenShards], tmp_path: Path
                                                                          ) -> None:
    loops = train(data, tmp_path, config(steps=24))
    one, two = (loop.model.state_dict() for loop in loops)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sha256(tmp_path / "0/model/model.safetensors") == sha256(tmp_path / "1/model/model.safetensors")
    assert Atlas.load(tmp_path / "1" / "model").names == NAMES
    merged = load_model(tmp_path / "1" / "model")
    alone = config(compress="none", inner_steps=None, sites=None)
    for rank, part in enumerate(data):
        before, after = (TrainingLoop(model, part, alone, tmp_path / f"look-{rank}-{i}") for i, model in enumerate(
            (new_model(), merged)))
        assert after.evaluate()["eval_loss"] < before.evaluate()["eval_loss"] - 0.5
        before._lock.close()
        after._lock.close()
    every = sum(CODECS["2bit"].nbytes(tuple(p.shape)) for p in new_model().parameters())
    for rank, frozen in ((0, 1), (1, 2)):  # of four groups
        log = rounds(tmp_path / str(rank))
        assert [record["step"] for record in log] == [*range(3, 25, 3)] and log[-1]["ranks"] == [0, 1]
        parts = [part for _, group, part in parts_on(loops[rank].model) if group in NAMES and group not in OWN[rank]]
        less = sum(CODECS["2bit"].nbytes(tuple(part.shape)) for part in parts)
        assert len(parts) == 2 * 3 * frozen and less > 0.1 * frozen * every
        besides = loops[rank].second.nbytes + 3 * 3 * MODEL.n_routed_experts * 4  # loads
        assert all(0 < record["bytes_sent"] - (every - less + besides) < 800 for record in log)
        named = [record for record, _ in read_log(tmp_path / str(rank) / "log.jsonl") if "eval_loss" in record]
        assert set(named[-1]["routing_accuracy_of"]) == set(OWN[rank])


@pytest.mark.parametrize("overlap", [0, 2])
def test_sites_that_were_killed_go_on_to_the_same_bytes(data: list[TokenShards], tmp_path: Path, overlap: int) -> None:
    asked = config(overlap_steps=overlap)
    taken: list[list[int]] = [[], []]

    def note(loop: RoundLoop, step: int) -> None:
        taken[loop.members.rank].extend(loop._numbers())

    def die(loop: RoundLoop, step: int) -> None:
        if step == 4:
            raise KilledError

    train(data, tmp_path / "calm", asked, told={0: note, 1: note})
    assert taken == [[*range(18)], [*range(18)]]  # each its own data without a gap
    train(data, tmp_path / "killed", asked, told={0: die, 1: die})
    assert not (tmp_path / "killed" / "0" / "model").exists()
    train(data, tmp_path / "killed", asked)
    calm, killed = ({sha256(tmp_path / name / str(rank) / "model/model.safetensors") for rank in range(2)}
                    for name in ("calm", "killed"))
    assert len(calm) == 1 and calm == killed


def test_a_site_that_ends_leaves_its_experts_and_comes_back(data: list[TokenShards], tmp_path: Path) -> None:
    def die(loop: RoundLoop, step: int) -> None:
        if step == 4:
            raise KilledError

    before: dict[str, torch.Tensor] = {}

    def look(loop: RoundLoop, step: int) -> None:
        if step == 3 and not before:
            before.update(loop._copies())

    _, survivor = train(data, tmp_path, config(steps=6), told={0: die, 1: look})
    assert [record["ranks"] for record in rounds(tmp_path / "1")] == [[0, 1], [1]]
    assert {group: torch.equal(part, before[name]) for name, group, part in parts_on(survivor.model)} == {
        "prose": True, "code": True, "ledger": False, "3": False}
    one, two = train(data, tmp_path, config(steps=9))  # the site with more steps gives the other its weights
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert [record["step"] for record in rounds(tmp_path / "1")] == [3, 6, 9]


def test_what_ranks_must_share_is_said_by_name(data: list[TokenShards], tmp_path: Path) -> None:
    store = new_store()
    one, two = (Members.at(f"127.0.0.1:{store.port}", rank, 2, 1.0) for rank in range(2))
    one.agree({"tokenizer": "abc", "experts": NAMES, "steps": 3})
    two.agree({"tokenizer": "abc", "experts": NAMES, "steps": 3})
    with pytest.raises(ConfigError, match=r"experts = \['law'\]: must be the same on all ranks; rank 0 has \['prose'"):
        two.agree({"tokenizer": "abc", "experts": ["law"], "steps": 4})
    with pytest.raises(ConfigError, match=r"experts = ledger: no rank has text of it.*rank 0: prose, code"):
        train(data[:1], tmp_path, config())
    with pytest.warns(UserWarning, match=r"experts = code: no rank has text of it.*stay as they are until the site"):
        check_owners(("law", "code"), {1: ["law"]}, begun=True)


def test_sites_merge_without_outer_momentum_unless_it_is_asked_for() -> None:
    assert (config().outer_lr, config().outer_momentum) == (1.0, 0.0)
    assert (config(sites=False).outer_lr, config(sites=False).outer_momentum) == (0.8, 0.5)
    assert config(outer_momentum=0.5).outer_momentum == 0.5


def test_what_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a word " * 500)
    text, rounds = str(tmp_path / "text.txt"), dict[str, Any](compress="local", sites=True)

    def fit(places: dict[str, Any], **settings: Any) -> None:
        Trainer(MODEL, out=tmp_path / "out", **settings).fit(places)

    with pytest.raises(ConfigError, match="sites = True: has a meaning only with compress = local or sparse"):
        fit({"law": text}, sites=True)
    with pytest.raises(ConfigError, match="sites = True: has a meaning only with compress = local or sparse"):
        fit({"law": text}, sites=True, compress="powersgd")
    with pytest.raises(ConfigError, match=r"data of code: must name at least one path \(without one, it is a name of"):
        fit({"law": text, "code": []})
    with pytest.raises(ConfigError, match="compress = 'local': has a meaning only with several ranks"):
        fit({"law": text, "code": []}, **rounds)
    with pytest.raises(ConfigError, match="sites = True: what is predicted"):
        Trainer(MODEL, out=tmp_path / "out", **rounds).predict(2)
    command = ["train", "nano", "--experts", f"law={text}", "code", "--out", str(tmp_path / "out")]
    for more, words in ((["--sites", "--compress", "local", "--ranks", "2"], "ranks = 2: with --sites each site"),
                        ([], "experts = 'code': must read NAME=PATH")):
        assert deepseek([*command, *more]) == 2
        assert words in capsys.readouterr().err


def start(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    words = [f"{name}={folder / name}.txt" if name in OWN[rank] else name for name in NAMES]
    return subprocess.Popen(
        [sys.executable, "-m", "deepseek", "train", str(folder / "tiny.json"), "--experts", *words, "--out",
         str(folder / f"out-{rank}"), "--tokenizer", str(folder / "tokenizer"), "--sites", "--compress", "local",
         "--inner_steps", "3", "--steps", "6", "--batch_size", "2", "--seq_len", "32", "--accumulation", "2",
         "--warmup_steps", "2", "--eval_every", "6", "--precision", "fp32", "--rank_timeout", "60"], cwd=ROOT,
        env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "DEEPSEEK_STORE": f"127.0.0.1:{port}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_commands(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.txt").write_text("\n\n".join(d.text for d in documents((name,))))
    (tmp_path / "tiny.json").write_text(json.dumps(MODEL.to_dict()))
    Tokenizer.train((d.text for d in documents(NAMES)), MODEL.vocab_size).save(tmp_path / "tokenizer")
    store = new_store()
    found = [(*process.communicate(timeout=300), process.returncode)
             for process in [start(tmp_path, rank, store.port) for rank in range(2)]]
    for rank, (output, errors, status) in enumerate(found):
        assert status == 0, errors
        assert f"own names: {', '.join(OWN[rank])}" in output and f"out-{rank}/model" in output
    assert len({sha256(tmp_path / f"out-{rank}/model/model.safetensors") for rank in range(2)}) == 1
