"""Names built in by training: text of a domain goes to the group of its name, without being told."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek.atlas import Atlas, RoutingAccuracy, profile
from deepseek.atlas.accuracy import settled
from deepseek.atlas.profile import doubts
from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig
from deepseek.data import Document, TokenShards, pack
from deepseek.deepopt.loop import TrainingLoop
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import TrainConfig
from deepseek.errors import ConfigError
from deepseek.model import CausalLM, Route, RoutingRecord, group_weight
from deepseek.model.gate import Gate, group_guidance_loss
from deepseek.tokenizer import Tokenizer
from deepseek.watch.counters import ServingCounters
from deepseek.watch.metrics import MetricKey, key

NAMES = ("prose_expert", "ledger_expert", "code_expert")
WORDS = {"prose_expert": "the river ran past an old house and nobody saw its windows shine".split(),
         "ledger_expert": "paid 31 coins on 7 may to account 4402 balance 918 credit".split(),
         "code_expert": "def f ( x ) : return x + 1 if else for in range".split()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenShards, Tokenizer]:
    draw = random.Random(0)
    documents = [Document(" ".join(draw.choices(WORDS[name], k=60)), "made up", expert=name)
                 for _ in range(60) for name in NAMES]
    tokenizer = Tokenizer.train((d.text for d in documents), 300)
    folder = tmp_path_factory.mktemp("named") / "tokens"
    return pack(documents, tokenizer, folder, valid_fraction=0.15, experts=NAMES), tokenizer


def run(shards: tuple[TokenShards, Tokenizer], config: ModelConfig, out: Path, **changes: Any) -> list[dict[str, Any]]:
    data, tokenizer = shards
    config = config.with_(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id)
    model = CausalLM(config).init_weights(torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"steps": 40, "batch_size": 8, "seq_len": 64, "lr": 1e-2, "warmup_steps": 5,
                                "eval_every": 40, "save_every": 20, "precision": "fp32", "balance_weight": 0.0,
                                "bias_speed": 1e-2} | changes
    TrainingLoop(model, data, TrainConfig(**settings), out, tokenizer).run()
    return [record for record, _ in read_log(out / "log.jsonl")]


@pytest.fixture(scope="module")
def guided(shards: tuple[TokenShards, Tokenizer], tiny_config: Callable[..., ModelConfig],
           tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A trained model, and the log of its training."""
    out = tmp_path_factory.mktemp("guided")
    return out / "model", run(shards, tiny_config(), out)


def test_guided_text_finds_its_group_and_unguided_text_does_not(
    shards: tuple[TokenShards, Tokenizer], tiny_config: Callable[..., ModelConfig], tmp_path: Path,
    guided: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, log = guided
    assert log[-1]["routing_accuracy"] > 0.95
    assert log[-1]["routing_accuracy_of"].keys() == set(NAMES)
    assert log[0]["guide_loss"] > 3 * log[-2]["guide_loss"]
    twin = run(shards, tiny_config(), tmp_path / "unguided", guide_weight=0.0)
    assert twin[-1]["routing_accuracy"] < 0.7 and "guide_loss" not in twin[0]
    # across groups the load follows the domains (the fourth group has none); within them the bias keeps it even
    assert log[-1]["max_vio_across_groups"] > 0.4 > log[-1]["max_vio_within_groups"]
    atlas = Atlas.load(folder)
    assert atlas.names == NAMES and len(atlas["ledger_expert"]) == 2 * 4
    assert atlas["ledger_expert"].by_layer() == {1: [4, 5, 6, 7], 2: [4, 5, 6, 7]}
    assert atlas.group("code_expert").evidence["routing_accuracy"] > 0.9
    assert not (tmp_path / "unguided" / "model" / "atlas.json").exists()


def test_a_trained_model_is_profiled_and_watched(
    shards: tuple[TokenShards, Tokenizer], guided: tuple[Path, list[dict[str, Any]]]
) -> None:
    """Evidence of held-out text joins the names of training; a further name within one of them changes nothing of what
    a server says of their routing; drift is there, and small on text of the kind that was profiled."""
    (_, tokenizer), (folder, _) = shards, guided
    model, trained = load_model(folder), Atlas.load(folder)

    def text(name: str, seed: int, documents: int = 20) -> list[Document]:
        draw = random.Random(f"{name}/{seed}")
        return [Document(" ".join(draw.choices(WORDS[name], k=60)), name) for _ in range(documents)]

    first = profile(model, tokenizer, {name: text(name, 1) for name in NAMES}, seq_len=64, atlas=trained)
    atlas = trained.updated(first)
    assert atlas.names == NAMES and not first.refused and not doubts(first)
    for name in NAMES:
        evidence = atlas.group(name).evidence
        assert atlas[name] == trained[name] and evidence["routing_accuracy"] == trained.group(name).evidence[
            "routing_accuracy"]
        assert evidence["coverage_slots"] > 2 * evidence["coverage_slots_others"] and evidence["documents"] == 20
    code = {"dialect": text("code_expert", 2), "other": text("ledger_expert", 2)}
    more = profile(model, tokenizer, code, threshold=0.3, seq_len=64, atlas=atlas)
    assert set(more["dialect"]) < set(atlas["code_expert"]), "as in the complaint: some of its experts, the busiest"

    def served(atlas: Atlas) -> dict[MetricKey, float]:
        counters = ServingCounters(model.config, atlas)
        for number, name in enumerate(NAMES):
            for document in text(name, 3, 4):
                ids = tokenizer.encode(document.text, bos=True)
                routing = RoutingRecord()
                with torch.no_grad():
                    model.hidden(torch.tensor([ids]), routing=routing)
                works: Any = [SimpleNamespace(request=SimpleNamespace(request_id=number, domain=name, metric_labels={}),
                                              chunk=SimpleNamespace(tokens=len(ids)))]
                counters.step(works, routing, 0.1)
        return counters.snapshot()

    before, after = served(trained), served(atlas.updated(more))
    for name in NAMES:
        right = before[key("correct_tokens_total", name)]
        assert after[key("correct_tokens_total", name)] == right > 0.8 * before[key("labelled_tokens_total", name)]
        assert key("drift", name) not in before and abs(after[key("drift", name)]) < 0.1


def test_more_names_than_groups_are_refused(
    shards: tuple[TokenShards, Tokenizer], tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"3 expert names \(prose_expert, .*\): the model has 2 routing groups"):
        run(shards, tiny_config(n_group=2, topk_group=1), tmp_path / "out")


def test_labels_travel_with_their_tokens(shards: tuple[TokenShards, Tokenizer]) -> None:
    data, tokenizer = shards
    assert data.experts == NAMES and data.fingerprint.count(" ") == 1
    seen = set()
    for batch in [*(data.batch(step, 4, 50, seed=0) for step in range(12)), *data.valid_batches(4, 50)]:
        assert batch.expert_BT.shape == batch.ids_BT.shape
        for ids, places in zip(batch.ids_BT, batch.expert_BT, strict=True):
            for place in set(places.tolist()) - {-1}:
                for text in re.split("<[^>]*>", tokenizer.decode(ids[places == place].tolist(), skip_special=False)):
                    words = text.split()[1:-1]  # a window may cut the outer ones
                    assert set(words) <= set(WORDS[NAMES[place]])
                    seen.add(place) if words else None
    assert seen == {0, 1, 2}


def route(scores_TE: torch.Tensor, index_TK: list[list[int]], weight_TK: list[list[float]]) -> Route:
    return Route(torch.tensor(index_TK), torch.tensor(weight_TK), scores_TE)


def test_the_guidance_loss_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    r = route(scores, [[0], [0], [0]], [[1.0]] * 3)
    # group scores are sums of two: (1.7, 0.8), (1, 1), (0.3, 0.7); the third token has no label
    want = (torch.nn.functional.cross_entropy(torch.tensor([[17.0, 8.0]]), torch.tensor([1])) + torch.log(
        torch.tensor(2.0))) / 2
    loss = group_guidance_loss(r, torch.tensor([1, 0, -1]), 2)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert scores.grad is not None
    assert bool((scores.grad[0] != 0).all()) and not bool(scores.grad[2].any())  # every group of a labelled token
    assert group_guidance_loss(r, torch.tensor([-1, -1, -1]), 2).item() == 0.0


def test_group_weights_are_shares() -> None:
    r = route(torch.rand(2, 6), [[0, 5, 1], [2, 3, 4]], [[1.0, 2.0, 1.0], [0.5, 0.5, 1.0]])
    torch.testing.assert_close(group_weight(r, 3), torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]))


def test_bias_balances_within_groups_and_not_across(tiny_config: Callable[..., ModelConfig]) -> None:
    gate = Gate(tiny_config(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2))
    load = torch.tensor([100, 100, 100, 100, 8, 0, 0, 0])
    for _ in range(3):
        gate.update_bias(load, 0.1, within_groups=True)
    bias_GE = gate.e_score_correction_bias.view(2, 4)
    assert not bool(bias_GE[0].any())  # even among themselves, however many they are
    torch.testing.assert_close(bias_GE.sum(1), torch.zeros(2))
    assert float(bias_GE[1, 0]) < 0 < float(bias_GE[1, 1]) and bias_GE[1, 1] == bias_GE[1, 3]


def test_accuracy_counts_settled_labelled_tokens_by_hand(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1, num_hidden_layers=3,
                         bos_token_id=0)
    ids = torch.ones(1, 80, dtype=torch.long)
    ids[0, 40] = 0  # another document begins
    assert settled(ids, 0)[0].nonzero().flatten().tolist() == [*range(32, 40), *range(72, 80)]
    assert int(settled(ids, None).sum()) == 48
    # the first layer says group 0 with weight 1, the second group 1 with weight 1: a tie goes to group 0, unless the
    # second layer is alone in its vote
    index = {1: torch.full((80, 1), 1), 2: torch.full((80, 1), 2)}
    index[1][72:] = 3
    record = RoutingRecord({layer: Route(i, torch.ones(80, 1), torch.rand(80, 4)) for layer, i in index.items()})
    experts = torch.zeros(1, 80, dtype=torch.long)
    experts[0, 40:] = 1
    experts[0, 75] = -1
    accuracy = RoutingAccuracy(config, ("a", "b", "c"))
    accuracy.add(record, experts, ids)
    assert accuracy.confusion_NG.tolist() == [[8, 0], [0, 7], [0, 0]]
    assert accuracy.by_name() == {"a": 1.0, "b": 1.0} and accuracy.macro() == 1.0
    assert accuracy.load_LE.tolist() == [[0, 8, 0, 7], [0, 0, 15, 0]]
    across, within = accuracy.max_vio()
    assert across == pytest.approx((8 / 7.5 - 1 + 1) / 2) and within == pytest.approx(1.0)
    assert "routing accuracy 100.0%" in accuracy.table() and "c" in accuracy.table()
