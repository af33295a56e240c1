"""Tuning end to end on a tiny model: what moves, what does not, and that a run goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import Atlas, LoRAAdapter, MoEFineTuner, select_experts
from deepseek.atlas import ExpertUsage
from deepseek.checkpoint import base_tensors, load_model, tensor_hashes
from deepseek.convert import quantize
from deepseek.errors import CheckpointError, ConfigError, DataError, NotFoundError, RequestError
from deepseek.ids import ExpertId
from deepseek.model import RoutingRecord
from deepseek.tokenizer import Tokenizer
from deepseek.tune.loop import TuneTrainer
from deepseek.tune.records import read_records
from tests.helpers import ROOT
from tests.helpers.jsonl import write_jsonl
from tests.helpers.records import NAMES, general, records


def changed(base: Path, tuned: Any) -> set[str]:
    """Names on disk of the tensors that differ from the base."""
    before, after = base_tensors(load_model(base)), base_tensors(tuned)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def of_experts(atlas: Atlas, *names: str) -> set[str]:
    return {f"model.layers.{layer}.mlp.experts.{e}.{part}.weight" for name in names for layer, e in atlas[name]
            for part in ("gate_proj", "up_proj", "down_proj")}


def test_tuning_named_experts_moves_them_and_nothing_else(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], plots: None
) -> None:
    folder = base()
    report = MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick).fit(records(), epochs=2)
    tuned = load_model(folder, adapter=tmp_path / "out" / "delta")
    law = of_experts(Atlas.load(folder), "law_expert")
    assert changed(folder, tuned) == law
    assert report.frozen_unchanged == report.frozen_tensors == len(base_tensors(tuned)) - len(law)
    assert report.changed_tensors == len(law) and report.gained > 0.05 and report.mode == "experts"
    # two moments of what is trained, and no more
    assert report.optimizer_bytes == 2 * 4 * report.trained_parameters
    assert report.trained_parameters == sum(base_tensors(tuned)[name].numel() for name in law)
    assert report.result_bytes < 0.5 * sum(t.nbytes for t in base_tensors(tuned).values())
    shown = capsys.readouterr().out
    assert "all unchanged, by SHA-256" in shown and "forgotten" in shown and "held-out records" in shown
    assert json.loads((tmp_path / "out" / "report.json").read_text())["gained"] == report.gained
    assert (tmp_path / "out" / "loss.png").stat().st_size > 5000


def test_freezing_named_experts_moves_everything_but_them_and_the_router(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    folder = base()
    tuner = MoEFineTuner(model_path=str(folder), expert_freeze=["code_expert", "1.0"], out=tmp_path / "out", **quick)
    report = tuner.fit(records(), epochs=3)
    moved = changed(folder, load_model(tmp_path / "out" / "model"))
    frozen = of_experts(Atlas.load(folder), "code_expert")
    gates = {name for name in base_tensors(load_model(folder)) if ".mlp.gate." in name}
    assert gates and not moved & (frozen | gates)
    assert not any(name.startswith("model.layers.1.mlp.experts.0.") for name in moved)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight",
            "model.layers.2.mlp.shared_experts.down_proj.weight", "model.norm.weight"} <= moved
    assert report.frozen_unchanged == report.frozen_tensors and report.mode == "full"
    assert Atlas.load(tmp_path / "out" / "model").names == NAMES


def test_the_router_and_its_biases_move_where_asked(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    folder = base()
    MoEFineTuner(folder, expert_tune=["law_expert"], train_router=True, balance=True, out=tmp_path / "out",
                 **quick).fit(records())
    moved = changed(folder, load_model(folder, adapter=tmp_path / "out" / "delta"))
    extra = moved - of_experts(Atlas.load(folder), "law_expert")
    assert extra == {f"model.layers.{layer}.mlp.gate.{part}" for layer in (1, 2)
                     for part in ("weight", "e_score_correction_bias")}


def test_shared_experts_and_the_rest_where_asked(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    folder = base()
    quick |= {"shared_experts": True, "non_expert_modules": True, "save": "full"}
    MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick).fit(records())
    moved = changed(folder, load_model(tmp_path / "out" / "model"))
    assert any("shared_experts" in name for name in moved) and any("self_attn" in name for name in moved)
    others = of_experts(Atlas.load(folder), *(n for n in NAMES if n != "law_expert"))
    assert not moved & others


def test_auto_selects_as_esft_does_and_keeps_the_choice(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    folder, quick = base(), quick | {"eval_records": 16}  # four times as many are routed: all
    tuner = MoEFineTuner(folder, expert_tune="auto", threshold=0.3, out=tmp_path / "out", **quick)
    report = tuner.fit(records(), steps=2)
    kept = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert kept["threshold"] == 0.3 and kept["tokens"] > 100
    usage, model = ExpertUsage((base_model := load_model(folder)).config), base_model
    data = tuner._record_set(read_records(records()), Tokenizer.load(folder))  # the very split that fit made
    with torch.no_grad():
        for example in data.train:  # one by one, so that nothing is padding
            model(torch.tensor([example.ids[:-1]]), routing=(routing := RoutingRecord()))
            usage.add(routing)
    scores = usage.counts_LE / (usage.tokens * 4)
    assert report.experts == {str(k): v for k, v in select_experts(dict(zip((1, 2), scores, strict=True)), 0.3).items()}
    chosen = {ExpertId.parse(e) for e in kept["experts"]}
    assert {layer for layer, _ in chosen} == {1, 2} and 2 <= len(chosen) < 32
    assert {int(k): set(v) for k, v in report.experts.items()} == {
        layer: {e.index for e in chosen if e.layer == layer} for layer in (1, 2)}
    few = MoEFineTuner(folder, expert_tune="auto", threshold=0.1, out=tmp_path / "few", **quick).fit(records(), steps=1)
    assert sum(map(len, few.experts.values())) < len(chosen)


@pytest.mark.parametrize(("change", "message"), [
    ({"a_new_key": 1}, "a_new_key is an unknown key"), ({"tokens": ...}, "tokens is missing"),
    ({"experts": ["1"]}, r"experts = \['1'\]: must be a list of ids"), ({"experts": [1]}, r"experts = \[1\]: must be"),
    ({"experts": None}, "experts = None: must be"), ({"threshold": float("nan")}, "threshold: nan is no"),
])
def test_a_selection_that_was_changed_is_refused_by_key(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    def tune() -> None:
        MoEFineTuner(base(), expert_tune="auto", out=tmp_path / "out", **quick).fit(records(), steps=1)

    tune()
    path = tmp_path / "out" / "experts.json"
    kept = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))
    with pytest.raises(ConfigError, match=rf"experts\.json: .*{message}"):
        tune()


def test_a_half_precision_base_learns_from_small_steps(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    """A step far below BF16's resolution must add up in the FP32 copies; the delta has the base's dtype."""
    folder = base(torch.bfloat16)
    report = MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick | {"lr": 2e-4}).fit(
        records(), epochs=4)
    tuned = load_model(folder, adapter=tmp_path / "out" / "delta")
    assert report.frozen_unchanged == report.frozen_tensors and report.gained > 0
    assert {t.dtype for n, t in base_tensors(tuned).items() if ".experts." in n} == {torch.bfloat16}
    assert changed(folder, tuned) <= of_experts(Atlas.load(folder), "law_expert")
    assert load_model(folder, torch.float32, adapter=tmp_path / "out" / "delta").lm_head.weight.dtype == torch.float32


def test_print_says_what_is_tuned(base: Callable[..., Path], quick: dict[str, Any]) -> None:
    folder = base()
    for settings, trains in (
            ({"expert_tune": ["law_expert"]}, "8 experts in 2 layers (law_expert)"),
            ({"expert_tune": ["1.3"], "train_router": True, "lr": 3e-4}, "1 expert in 1 layer (1.3), the router"),
            ({"expert_tune": "auto"}, "the experts that the records visit most"),
            ({}, "everything"),
            ({"expert_freeze": ["law_expert"]}, "everything but 8 experts in 2 layers (law_expert)"),
            ({"adapter": LoRAAdapter(r=4, experts=["law_expert"])},
             "LoRA of rank 4 on q_proj, 8 experts in 2 layers (law_expert)")):
        lines = str(MoEFineTuner(folder, out="somewhere", **{"lr": 1e-5, "max_length": 64} | settings)).splitlines()
        assert lines[0].startswith(f"MoEFineTuner of {folder}: ") and lines[0].endswith(
            " K parameters, 3 layers, 2 of them with 16 experts, 4 a token")
        assert lines[1] == f"  trains: {trains}" and f"lr {settings.get('lr', 1e-5):g}, " in lines[2]
        assert "at most 64 tokens" in lines[2] and "law_expert" in lines[3] and lines[4] == "  out: somewhere"


def test_a_delta_refuses_another_base(base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path) -> None:
    folder = base()
    MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick).fit(records(), steps=1)
    delta = tmp_path / "out" / "delta"
    quantize(folder, tmp_path / "four")
    with pytest.raises(CheckpointError, match="a delta belongs to a plain checkpoint"):
        load_model(tmp_path / "four", adapter=delta)
    other = load_model(folder)
    other.model.norm.weight.data[0] += 1e-3
    from deepseek.checkpoint import save_model
    save_model(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"made for another base: its hash is [0-9a-f]{16}…"):
        load_model(tmp_path / "other", adapter=delta)
    assert load_model(tmp_path / "other", adapter=delta, verify=False)
    (delta / "delta.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load_model(folder, adapter=delta)
    with pytest.raises(NotFoundError, match="neither a delta"):
        load_model(folder, adapter=tmp_path)


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"expert_tune": ["low_expert"]}, RequestError,
     "no experts are named 'low_expert'.*text_expert, code_expert, math_expert, law_expert"),
    ({"expert_freeze": ["code"]}, RequestError, "no experts are named 'code'"),
    ({"expert_tune": ["law_expert"], "expert_freeze": ["code_expert"]}, ConfigError, "exclude each other"),
    ({"expert_tune": []}, ConfigError, "must name at least one expert"),
    ({"learning_rate": 1}, ConfigError, "unknown setting learning_rate; there are .*lr"),
    ({"lr": -1}, ConfigError, "lr = -1: must be a positive number"),
    ({"max_length": 256}, ConfigError, "max_length = 256: must be below the model's max_position_embeddings"),
    ({"atlas": "nowhere.json"}, NotFoundError, "nowhere.json: no such file"),
    ({"save": "here"}, ConfigError, "save = 'here': must be auto, delta or full"),
])
def test_bad_settings_are_refused_before_any_work(
    base: Callable[..., Path], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MoEFineTuner(base(), **settings)


def test_other_refusals(base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path) -> None:
    folder = base()
    with pytest.raises(NotFoundError):
        MoEFineTuner(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"expert 1\.99: the model has experts 0\.\.15"):
        MoEFineTuner(folder, expert_tune=["1.99"])
    with pytest.raises(ConfigError, match=r"replay = 0\.5: needs old records"):
        MoEFineTuner(folder, replay=0.5, out=tmp_path / "a", **quick).fit(records())
    with pytest.raises(DataError, match="dataset: holds no record"):
        MoEFineTuner(folder, out=tmp_path / "a", **quick).fit([])
    assert not (tmp_path / "a").exists()
    quantize(folder, tmp_path / "four")
    with pytest.raises(ConfigError, match="is quantized, and quantized weights cannot be trained"):
        MoEFineTuner(tmp_path / "four")
    MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "b", **quick).fit(records(), steps=1)
    with pytest.raises(ConfigError, match="holds a run with expert_tune"):
        MoEFineTuner(folder, expert_tune=["code_expert"], out=tmp_path / "b", **quick).fit(records(), steps=1)
    (folder / "atlas.json").unlink()
    with pytest.raises(ConfigError, match="needs an atlas: there is none beside the model"):
        MoEFineTuner(folder, expert_tune=["law_expert"])


def test_a_folder_with_another_run_is_refused_before_the_base_is_read(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base()
    MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "b", **quick).fit(records(), steps=1)
    MoEFineTuner(folder, expert_tune="auto", out=tmp_path / "a", **quick).fit_stream(records(8), records_a_round=8)
    path = tmp_path / "b" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["tune"]["chat_template_kwargs"], settings["tune"]["parse_special"]  # as an older version left it
    settings["chosen"]["general"] = settings["chosen"].pop("retain_data")
    path.write_text(json.dumps(settings))
    MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "b", chat_template_kwargs={}, **quick).fit(
        records(), steps=1)
    monkeypatch.setattr("deepseek.tune.tuned_model.load_model", lambda *_, **__: pytest.fail("the base was read"))
    for changes, message in (({"expert_tune": ["code_expert"]}, "expert_tune"), ({"lr": 1.0}, "lr = 0.003"),
                             ({"retain_data": general()[:3]}, "retain_data"),
                             ({"adapter": LoRAAdapter()}, "(expert_tune|r)")):
        settings = {"expert_tune": None if "adapter" in changes else ["law_expert"]} | quick | changes
        with pytest.raises(ConfigError, match=f"holds a run with {message}"):
            MoEFineTuner(folder, out=tmp_path / "b", **settings).fit(records(), steps=1)
    with pytest.raises(ConfigError, match="holds a run with fingerprint"):
        MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "b", **quick).fit(records(30), steps=1)
    with pytest.raises(ConfigError, match="holds a run with lr"):
        MoEFineTuner(folder, expert_tune="auto", out=tmp_path / "a", **quick | {"lr": 1.0}).fit_stream(
            records(8), records_a_round=8)


def test_out_and_data_must_lie_apart(base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path) -> None:
    folder = base()
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "law.jsonl", records())
    for out, data, message in (("data/run", tmp_path / "data", "must not lie inside DATA"),
                               ("data", tmp_path / "data", "must not lie inside DATA"),
                               ("data/run", str(tmp_path / "data" / "*.jsonl"), "must not lie inside DATA"),
                               ("data", tmp_path / "data" / "law.jsonl", "must not hold DATA"),
                               (".", [tmp_path / "data"], "must not hold DATA")):
        with pytest.raises(ConfigError, match=message):
            MoEFineTuner(folder, out=tmp_path / out, **quick).fit(data, steps=1)
        with pytest.raises(ConfigError, match=message):
            MoEFineTuner(folder, out=tmp_path / out, **quick | {"retain_data": data}).fit(records(), steps=1)
        with pytest.raises(ConfigError, match=message):
            MoEFineTuner(folder, out=tmp_path / out, replay=0.1, replay_data=data, **quick).fit_stream(records())
    assert not (tmp_path / "data" / "run").exists()


def test_the_seconds_of_a_run_are_those_of_all_its_processes(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, passed, clock, step = base(), [0.0], time.perf_counter, TuneTrainer.train_step

    def slow(self: TuneTrainer) -> dict[str, Any]:
        passed[0] += 1000
        if passed[0] == 3000:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr(TuneTrainer, "train_step", slow)

    def fit() -> float:
        return MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick).fit(
            records(), steps=4).seconds

    with pytest.raises(KeyboardInterrupt):  # in the third step; the checkpoint that is written knows of 3000
        fit()
    assert 5000 <= fit() < 5900
    assert 5000 <= fit() < 5900  # nothing is left to do


KILLED = """
import os, sys
import torch; torch.set_num_threads(1)
from deepseek import LoRAAdapter, MoEFineTuner
from deepseek.deepopt import loop
from deepseek.tune.loop import TuneTrainer
from tests.helpers.records import general, records
base, out, mode, *stops = sys.argv[1:]
ended = []
for stop in stops:  # a process each, forked: this one has imported everything
    if not (child := os.fork()):
        break
    ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    sys.exit(print(ended))
loop.plot_run = lambda *_: None
real = TuneTrainer.train_step
def step(self):
    if self.step == int(stop):
        os.kill(os.getpid(), 9)
    return real(self)
TuneTrainer.train_step = step
kind = {"adapter": LoRAAdapter(r=4, lora_dropout=0.1, experts=["law_expert"])} if mode == "lora" else {
    "expert_tune": "auto", "balance": True} if mode == "auto" else {"expert_freeze": ["code_expert"]}
MoEFineTuner(base, out=out, lr=3e-3, batch_size=4, max_length=64, eval_records=8, save_every=3, retain_data=general(),
             precision="fp32", **kind).fit(records(), steps=8)
"""


@pytest.mark.parametrize("mode", ["auto", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("lora", "full"))])
def test_a_killed_run_ends_with_the_same_bytes(base: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    folder = base()

    def run(out: str, *stops: str) -> str:
        return subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / out), mode, *stops],
                              capture_output=True, cwd=ROOT, text=True).stdout.splitlines()[-1]

    assert run("whole", "-1") == "[0]" and run("killed", "2", "5", "-1") == "[-9, -9, 0]"
    results = [sorted((tmp_path / out).glob("*/*.safetensors")) for out in ("whole", "killed")]
    last = [[p for p in found if "checkpoint" not in p.parent.name] for found in results]
    assert len(last[0]) == len(last[1]) == 1
    assert last[0][0].read_bytes() == last[1][0].read_bytes()


def test_a_stream_is_learnt_round_by_round(base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path) -> None:
    folder = base()

    def tuner() -> MoEFineTuner:
        return MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", replay=0.3, replay_data=general(),
                            valid_fraction=0.25, **quick)

    report = tuner().fit_stream(iter(records(30)), records_a_round=12, epochs=2)
    assert [len(row) for row in report.rounds] == [1, 2, 3]
    assert len((tmp_path / "out" / "round-0003" / "incoming.jsonl").read_text().splitlines()) == 6
    assert report.frozen_unchanged == report.frozen_tensors and report.backward_transfer is not None
    ours = report.rounds
    assert report.backward_transfer == pytest.approx(((ours[0][0] - ours[2][0]) + (ours[1][1] - ours[2][1])) / 2)
    assert report.gained > 0.02 and report.examples > 22 and report.steps >= 2 * report.examples / 4
    whole = tensor_hashes(load_model(folder, adapter=tmp_path / "out" / "delta"))
    again = tuner().fit_stream(iter(records(30)), records_a_round=12, epochs=2)  # nothing is left to do
    assert again.rounds == report.rounds
    assert tensor_hashes(load_model(folder, adapter=tmp_path / "out" / "delta")) == whole
    with pytest.raises(DataError, match="stream: ended before a round was full"):
        MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "none", **quick).fit_stream([])


def test_what_a_stream_leaves_after_every_round_is_what_folding_gives(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = base(torch.bfloat16), []
    from deepseek.tune.tuned_model import TunedModel
    real = TunedModel.finish

    def finish(self: TunedModel) -> Path:
        seen.append(tensor_hashes(load_model(folder, adapter=tmp_path / "out" / "delta")))
        return real(self)

    monkeypatch.setattr(TunedModel, "finish", finish)
    MoEFineTuner(folder, expert_tune=["law_expert"], train_router=True, balance=True, out=tmp_path / "out",
                 **quick).fit_stream(records(8), records_a_round=8)
    assert seen == [tensor_hashes(load_model(folder, adapter=tmp_path / "out" / "delta"))]


def test_replay_mixes_in_its_share_and_nothing_that_is_held_out(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tuner = MoEFineTuner(base(), expert_tune=["law_expert"], out=tmp_path / "out", replay=0.5,
                         replay_data=records(), **quick)
    # what is drawn is not in any report: the examples themselves
    data = tuner._record_set(read_records(records()), tokenizer)
    drawn = tuner._replayed(read_records(records()), data, [data], tokenizer)
    assert len(drawn) == len(data.train) == 40 - len(data.valid) and not set(drawn) & set(data.valid)
    long = [{"text": " ".join(r["text"] for r in general()) * 3}] * 9
    assert len(tuner._replayed(read_records(long), data, [data], tokenizer)) == len(data.train)


def test_a_run_goes_on_with_the_same_experts_and_texts_alone(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    folder = base()
    MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick).fit(records(), steps=1)
    with pytest.raises(ConfigError, match="holds a run with retain_data"):
        quick["retain_data"] = general()[:3]
        MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick).fit(records(), steps=1)
    quick["retain_data"] = general()
    Atlas.built_in(load_model(folder).config, ("law_expert",)).save(folder)
    with pytest.raises(ConfigError, match="holds a run with experts"):
        MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / "out", **quick).fit(records(), steps=1)


def test_accumulated_batches_are_one_batch(base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path) -> None:
    folder = base()
    rows = [{"input": "q", "output": "pay coins " * (1 + i % 7)} for i in range(9)]
    for name, changes in (("one", {"batch_size": 8}), ("four", {"batch_size": 2, "accumulation": 4})):
        MoEFineTuner(folder, expert_tune=["law_expert"], out=tmp_path / name, clip=1e9,
                     **quick | changes | {"lr": 1e-2}).fit(rows, steps=1)
    one, four = (load_model(folder, adapter=tmp_path / name / "delta") for name in ("one", "four"))
    # AdamW's first step is the sign of the gradient, so equal gradients move alike
    moved = changed(folder, one)
    assert moved
    for name in moved:
        torch.testing.assert_close(base_tensors(one)[name], base_tensors(four)[name], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 1}, {"n_shared_experts": 0}, {"attention_bias": True},
    {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax"}, {"q_lora_rank": 24},
], ids=lambda changes: "-".join(changes))
def test_every_kind_of_model_in_every_mode(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder, quick = base(**changes), quick | {"eval_records": 4}
    ways: dict[str, dict[str, Any]] = {
        "experts": {"expert_tune": [f"1.{e}" for e in range(16)]}, "full": {"expert_freeze": ["1.3"]},
        "lora": {"adapter": LoRAAdapter(r=2, experts=["2.1"])}}
    for mode, how in ways.items():
        report = MoEFineTuner(folder, out=tmp_path / mode, **how, **quick).fit(records(12), steps=2)
        assert report.frozen_unchanged == report.frozen_tensors > 0, mode
        result = Path(report.result)
        tuned = load_model(result) if mode == "full" else load_model(folder, adapter=result)
        moved = changed(folder, tuned)
        assert bool(moved) == (mode != "lora"), mode
        assert not any(".layers.3." in name for name in moved), mode  # the MTP module


def test_an_adapter_excludes_other_training(base: Callable[..., Path], quick: dict[str, Any]) -> None:
    for extra in ("train_router", "balance", "shared_experts", "non_expert_modules"):
        settings: dict[str, Any] = {extra: True}
        with pytest.raises(ConfigError, match="LoRA alone is trained"):
            MoEFineTuner(base(), adapter=LoRAAdapter(r=2), **settings)
    with pytest.raises(ConfigError, match="replay_data: has a meaning only with replay"):
        MoEFineTuner(base(), replay_data=general())
    with pytest.raises(ConfigError, match=r"threshold = 0\.2: has a meaning only with expert_tune = auto"):
        MoEFineTuner(base(), threshold=0.2)
    v2 = base(model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax")
    with pytest.raises(ConfigError, match="this model's gates have no bias to balance with"):
        MoEFineTuner(v2, balance=True)


def test_a_batch_without_the_adapted_experts_is_no_error(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    adapter = LoRAAdapter(r=2, target_modules=(), experts=["1.3"])
    report = MoEFineTuner(base(), adapter=adapter, out=tmp_path / "out", **quick | {"batch_size": 1}).fit(
        [{"input": "q", "output": "a"}, {"input": "w", "output": "b"}, {"input": "e", "output": "c"}], epochs=2)
    assert report.frozen_unchanged == report.frozen_tensors


@pytest.mark.parametrize(("how", "lr"), [
    ({"expert_tune": ["law_expert"]}, 3e-4), ({"adapter": LoRAAdapter(r=2)}, 2e-4),
    ({"expert_freeze": ["code_expert"]}, 1e-5), ({}, 1e-5)])
def test_the_rate_depends_on_what_is_trained(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, how: dict[str, Any], lr: float,
    capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {key: value for key, value in quick.items() if key != "lr"}
    tuner = MoEFineTuner(base(), out=tmp_path / "out", **how, **quick)
    assert tuner.config.lr == lr and MoEFineTuner(base(), out=tmp_path / "b", lr=0.5, **how).config.lr == 0.5
    if "expert_tune" in how:
        report = tuner.fit(records(), steps=1)
        captured = capsys.readouterr()
        assert "lr 0.0003, the default where experts are tuned (--lr)" in captured.out
        assert report.lr == lr and json.loads((tmp_path / "out" / "settings.json").read_text())["train"]["lr"] == lr
        assert "gained: ±" in captured.out and f"{report.held_out} held-out documents" in captured.out
        assert " held-out records: 100%" in captured.err and "windows of general text (of 12 documents)" in captured.err


def test_a_gain_rests_on_the_held_out_documents(
    base: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    """Its error is small where every record gains alike, also when the run goes on in another process."""
    settings = quick | {"lr": 1e-2, "valid_fraction": 0.3, "eval_records": 16, "general_records": 4}

    def fit(steps: int) -> Any:
        return MoEFineTuner(base(), expert_tune=["law_expert"], out=tmp_path / "out", **settings).fit(
            records(60), steps=steps)

    first = fit(8)
    assert first.held_out == 16 and first.standard_error is not None and first.gained > 3 * first.standard_error
    assert first.verdict.startswith("±")
    again = fit(8)  # nothing is left to do
    assert (again.gained, again.standard_error) == pytest.approx((first.gained, first.standard_error))
    more = fit(12)  # and more steps extend it
    assert more.steps == 12 and more.domain_before == first.domain_before and more.gained > first.gained
    with pytest.raises(ConfigError, match=r"steps = 8: .* holds a run of 12 steps, which can grow, not shrink"):
        fit(8)
    none = MoEFineTuner(base(), expert_tune=["law_expert"], out=tmp_path / "none", **settings | {"lr": 1e-12}).fit(
        records(60), steps=1)
    assert "no more than noise; a higher rate may help (--lr 1e-11, this was 1e-12)" in none.verdict
    evaluation = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()][-1]
    assert evaluation.keys() == {"step", "eval_loss", "general_loss"}
