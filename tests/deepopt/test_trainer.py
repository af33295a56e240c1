"""`Trainer` and `deepseek train`: from scratch, from a checkpoint, gone on with, extended."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import Atlas, Trainer, load_model
from deepseek.atlas import profile
from deepseek.checkpoint import base_tensors, save_model
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.convert import quantize
from deepseek.deepopt.run_folder import read_log
from deepseek.deepopt.settings import TrainConfig
from deepseek.errors import ConfigError, DataError, NotFoundError
from deepseek.tokenizer import Tokenizer

QUICK: dict[str, Any] = {"batch_size": 2, "seq_len": 16, "warmup_steps": 2, "eval_every": 50, "eval_batches": 2,
                         "precision": "fp32", "valid_fraction": 0.2}
FLAGS = [word for key, value in QUICK.items() for word in (f"--{key}", str(value))]
NAMES = ("prose_expert", "ledger_expert")
WORDS = {"prose_expert": "the river ran past an old house and nobody saw its windows shine".split(),
         "ledger_expert": "paid 31 coins on 7 may to account 4402 balance 918 credit".split(),
         "code_expert": "def f ( x ) : return x + 1 if else for in range".split()}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.deepopt.loop.plot_run", lambda *_: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of records for every name, a tokenizer and a config.json."""
    root, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, words in WORDS.items():
        (root / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": " ".join(draw.choices(words, k=40))}) + "\n" for _ in range(20)))
    everything = [word for words in WORDS.values() for word in words]
    Tokenizer.train([" ".join(draw.choices(everything, k=4000))], 300).save(root / "words")
    config = ModelConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        moe_intermediate_size=16, n_routed_experts=12, num_experts_per_tok=2, n_group=3, topk_group=1, kv_lora_rank=16,
        qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=128,
        num_nextn_predict_layers=1)
    (root / "config.json").write_text(json.dumps(config.to_dict()))
    return root


@pytest.fixture(scope="module")
def base(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two built-in names of three groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepseek.deepopt.loop.plot_run", lambda *_: None)
        return Trainer(texts / "config.json", out=tmp_path_factory.mktemp("base"), tokenizer=texts / "words", steps=6,
                       **QUICK).fit({name: texts / f"{name}.jsonl" for name in NAMES})


def rates(out: Path) -> list[float]:
    return [record["lr"] for record, _ in read_log(out / "log.jsonl") if "lr" in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return base_tensors(load_model(folder))


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_says_what_it_holds_and_does_what_the_command_does(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = texts / "prose_expert.jsonl"
    trainer = Trainer(texts / "config.json", out=tmp_path / "a", tokenizer=str(texts / "words"), steps=4, **QUICK)
    assert "config.json from scratch" in repr(trainer) and "4 steps of 2 x 16 tokens, lr 0.001" in repr(trainer)
    assert repr(trainer).endswith("nothing is trained yet")
    seen: list[dict[str, Any]] = []
    model = trainer.fit(given, on_step=seen.append)
    assert model == tmp_path / "a" / "model" and [record["step"] for record in seen] == [1, 2, 3, 4]
    assert repr(trainer).endswith(f"finished: {model}")
    assert main(["train", str(texts / "config.json"), str(given), "--out", str(tmp_path / "b"), "--tokenizer",
                 str(texts / "words"), "--steps", "4", *FLAGS]) == 0
    assert "try:   deepseek-infer --model" in capsys.readouterr().out
    assert same(model, tmp_path / "b" / "model")
    names = {field.name for field in fields(Trainer)}
    assert {field.name for field in fields(TrainConfig)} < names and {"config", "out", "from_model"} < names


def test_a_map_says_which_column_is_the_text(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (texts / "prose_expert.jsonl").read_text()
    (tmp_path / "odd.jsonl").write_text(lines.replace('"text"', '"verdict"'))
    (tmp_path / "map.yaml").write_text("text: verdict\n")
    given = {"tokenizer": texts / "words", "steps": 2, **QUICK}
    plain = Trainer(texts / "config.json", out=tmp_path / "a", **given).fit(texts / "prose_expert.jsonl")
    odd = Trainer(texts / "config.json", out=tmp_path / "b", map={"text": "verdict"}, **given)
    assert same(plain, odd.fit(tmp_path / "odd.jsonl"))
    words = ["train", "--out", str(tmp_path / "c"), "--map", str(tmp_path / "map.yaml")]
    assert main([*words, str(texts / "config.json"), str(tmp_path / "odd.jsonl"), "--tokenizer", str(texts / "words"),
                 "--steps", "2", *FLAGS]) == 0
    assert same(plain, tmp_path / "c" / "model")
    capsys.readouterr()
    assert main(words) == 2 and "map: has a meaning only with data" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="map: unknown key 'txt'"):
        Trainer(texts / "config.json", out=tmp_path / "d", map={"txt": "verdict"})


def test_a_finished_run_is_extended_by_more_steps(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = texts / "prose_expert.jsonl", tmp_path / "run"
    command = ["train", str(texts / "config.json"), str(given), "--out", str(out), "--tokenizer", str(texts / "words"),
               *FLAGS]
    assert main([*command, "--steps", "6", "--lr", "1e-2"]) == 0
    first = rates(out)
    assert main([*command, "--steps", "10", "--lr", "1e-2"]) == 0  # the same command with more steps
    assert "extended from 6 to 10 steps: lr from 0.001 up to 0.01 in 2 steps, then down to 0.001" in (
        capsys.readouterr().out)
    assert rates(out)[:6] == first and len(rates(out)) == 10
    assert rates(out)[6:8] == pytest.approx([0.0055, 0.01]) and rates(out)[9] < rates(out)[8] < 0.011
    assert main(["train", "--out", str(out), "--steps", "12", "--lr", "2e-3"]) == 0  # or no more than that
    assert rates(out)[10:] == pytest.approx([0.0015, 0.002])
    assert "warmup_steps = 2: all 2 steps are warm-up, so the learning rate only rises" in capsys.readouterr().out
    assert main(["train", "--out", str(out)]) == 0 and len(rates(out)) == 12  # nothing is left to do
    capsys.readouterr()
    assert main([*command, "--steps", "10", "--lr", "1e-2"]) == 2
    assert "steps = 10:" in (said := capsys.readouterr().err) and "a run of 12 steps, which can grow, not" in said
    for flag, message in (("--lr", "holds a run with lr = 0.002, this one has 5.0"),
                          ("--batch_size", "holds a run with batch_size = 2, this one has 5"),
                          ("--valid_fraction", "valid_fraction = 0.5: the run in")):
        assert main(["train", "--out", str(out), flag, "0.5" if "valid" in flag else "5"]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--steps", "14", "--batch_size", "5"]) == 2
    assert "holds a run with batch_size" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="nowhere: holds no run to go on with"):
        Trainer.resume(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run to go on with"):
        Trainer(out=tmp_path / "nowhere")


def test_an_extension_that_was_stopped_goes_on_and_one_that_has_not_begun_can_be_changed(
    texts: Path, tmp_path: Path
) -> None:
    given = texts / "prose_expert.jsonl"
    for out in ("calm", "stopped"):
        Trainer(texts / "config.json", out=tmp_path / out, tokenizer=texts / "words", steps=4, **QUICK).fit(given)
    Trainer.resume(tmp_path / "calm", steps=9).fit()

    def stop(at: int) -> Any:
        def on_step(record: dict[str, Any]) -> None:
            if record["step"] == at:
                raise KeyboardInterrupt
        return on_step

    with pytest.raises(KeyboardInterrupt) as caught:
        Trainer.resume(tmp_path / "stopped", steps=9).fit(on_step=stop(7))
    assert "step 7 of 9 is saved in" in caught.value.__notes__[0]
    trainer = Trainer.resume(tmp_path / "stopped")
    assert trainer.steps == 9 and repr(trainer).endswith("step 7 is saved")
    trainer.fit()
    assert same(tmp_path / "calm" / "model", tmp_path / "stopped" / "model")
    # a mistyped number of steps, before its first step is saved
    settings = tmp_path / "calm" / "settings.json"
    about = json.loads(settings.read_text())
    assert [leg["steps"] for leg in about["legs"]] == [4]
    about["legs"].append({key: about["train"][key] for key in about["legs"][0]})
    about["train"]["steps"] = 9000
    settings.write_text(json.dumps(about))
    assert Trainer.resume(tmp_path / "calm").steps == 9


def test_other_data_leaves_the_run_as_it_was(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def trainer(steps: int) -> Trainer:
        return Trainer(texts / "config.json", out=out, tokenizer=texts / "words", steps=steps, **QUICK)

    trainer(2).fit(texts / "prose_expert.jsonl")
    with pytest.raises(ConfigError, match="holds a run on other data"):
        trainer(4).fit(texts / "ledger_expert.jsonl")
    Tokenizer.train(["other words"], 262).save(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds a run with another tokenizer"):
        Trainer(texts / "config.json", out=out, tokenizer=tmp_path / "other", steps=4, **QUICK).fit(
            texts / "prose_expert.jsonl")
    Trainer.resume(out, steps=4).fit()
    assert len(rates(out)) == 4


# ---- from a checkpoint --------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_checkpoint(
    base: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights, tokenizer, configuration and names; all parameters move; the rate is its own."""
    out, given = tmp_path / "out", str(texts / "code_expert.jsonl")
    assert main(["train", given, "--from", str(base), "--out", str(out), "--steps", "3", *FLAGS]) == 0
    assert "lr 0.0001" in capsys.readouterr().out and max(rates(out)) == 1e-4
    before, after = load_model(base), load_model(out / "model")
    still = [name for name, tensor in base_tensors(before).items() if torch.equal(tensor, base_tensors(after)[name])]
    assert not [name for name in still if "correction_bias" not in name]
    worst = max(float((a - b).abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert 0 < worst <= 4 * 1e-4  # not from scratch: AdamW moves a weight by about lr a step
    assert Tokenizer.load(out / "model").fingerprint == Tokenizer.load(base).fingerprint
    assert after.config.to_dict() == before.config.to_dict()
    assert Atlas.load(out / "model").names == NAMES  # nothing was said of names: they stay
    # without its base a run goes on, with another one it does not
    assert main(["train", "--out", str(out), "--steps", "4"]) == 0
    assert len(rates(out)) == 4 and rates(out)[3] <= 1e-4
    with torch.no_grad():
        before.model.norm.weight[0] += 1
    other = save_model(before, tmp_path / "other", tokenizer=Tokenizer.load(base))
    assert main(["train", given, "--from", str(other), "--out", str(out), "--steps", "5", *FLAGS]) == 2
    assert "holds a run with base" in capsys.readouterr().err


def test_names_of_a_checkpoint_keep_their_groups(base: Path, texts: Path, tmp_path: Path) -> None:
    """Text of one old name and a new one: the new one gets the next group, the old ones keep theirs."""
    model = Trainer(from_model=base, out=tmp_path / "a", steps=2, **QUICK | {"seq_len": 64}).fit(
        {"code_expert": texts / "code_expert.jsonl", "ledger_expert": texts / "ledger_expert.jsonl"})
    atlas = Atlas.load(model)
    assert atlas.names == (*NAMES, "code_expert")
    assert atlas["code_expert"].by_layer() == {1: [8, 9, 10, 11], 2: [8, 9, 10, 11]}
    assert {name: "routing_accuracy" in atlas.group(name).evidence for name in atlas} == {
        "prose_expert": False, "ledger_expert": True, "code_expert": True}
    about = json.loads((tmp_path / "a" / "tokens" / "shards.json").read_text())
    assert about["experts"] == [*NAMES, "code_expert"]
    with pytest.raises(ConfigError, match=r"one for each of the 4 expert names \(prose_expert, ledger_expert, x, y\)"):
        Trainer(from_model=base, out=tmp_path / "b", steps=2, **QUICK).fit({"x": texts, "y": texts})
    # names that were measured stay beside the built-in ones, with the evidence of the base
    measured = tmp_path / "measured"
    save_model(load_model(base), measured, tokenizer=Tokenizer.load(base))
    tokenizer = Tokenizer.load(base)
    from deepseek.data import ReadReport, read_documents
    found = profile(load_model(base), tokenizer, {
        name: read_documents([texts / f"{name}.jsonl"], ReadReport()) for name in ("code_expert", "prose_expert")},
        seq_len=32, atlas=Atlas.load(base))
    Atlas.load(base).updated(found).save(measured)
    kinds = {group.name: group.kind for group in Atlas.load(measured).groups}
    model = Trainer(from_model=measured, out=tmp_path / "c", steps=1, **QUICK).fit(texts / "code_expert.jsonl")
    assert {group.name: group.kind for group in Atlas.load(model).groups} == kinds


@pytest.mark.parametrize(("words", "message"), [
    (["nano", "TEXT", "--from", "BASE"], "CONFIG = 'nano': does not go with --from"),
    (["CONFIG", "TEXT", "--from", "BASE"], "does not go with --from"),
    (["BASE", "TEXT", "--from", "BASE"], "does not go with --from"),
    (["TEXT", "--from", "BASE", "--tokenizer", "OTHER"], "is another than that of"),
    (["--from", "BASE"], "at least one DATA or --experts NAME=PATH must be given"),
    (["TEXT", "--from", "FOUR"], "is quantized, and quantized weights cannot be trained"),
    (["TEXT", "--from", "nowhere"], "nowhere: no such folder here"),
    (["CONFIG"], "at least one DATA or --experts NAME=PATH must be given"),
    ([], "holds no run to go on with"),
    (["--tokenizer", "OTHER"], "at least one DATA"),
])
def test_what_does_not_go_together_is_refused(
    base: Path, texts: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Tokenizer.train(["other words"], 262).save(tmp_path / "other")
    if "FOUR" in words:
        quantize(base, tmp_path / "four")
    names = {"TEXT": texts / "code_expert.jsonl", "BASE": base, "CONFIG": texts / "config.json",
             "OTHER": tmp_path / "other", "FOUR": tmp_path / "four"}
    words = [str(names.get(word, word)) for word in words]
    assert main(["train", *words, "--out", str(tmp_path / "out"), "--steps", "1", *FLAGS]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokens").exists()


def test_impossible_settings_are_named(texts: Path, base: Path, tmp_path: Path) -> None:
    for settings, message in (({"steps": 0}, "steps = 0: must be"), ({"device": "tpu"}, "device = 'tpu': must be"),
                              ({"valid_fraction": 1.0}, "valid_fraction = 1.0: must be"),
                              ({"from_model": base}, "does not go with from_model")):
        with pytest.raises(ConfigError, match=message):
            Trainer("nano", out=tmp_path, **settings)
    trainer = Trainer(texts / "config.json", out=tmp_path / "out", **QUICK)
    for data, error, message in ((None, ConfigError, "data: must be given"), ([], ConfigError, "at least one path"),
                                 ({"law expert": texts}, ConfigError, "must be made of letters"),
                                 ({"law_expert": []}, ConfigError, "data of law_expert: must name at least one path"),
                                 ("nowhere", NotFoundError, "nowhere: no such file")):
        with pytest.raises(error, match=message):
            trainer.fit(data)
    assert not (tmp_path / "out").exists()


def test_a_half_precision_checkpoint_stays_one(base: Path, texts: Path, tmp_path: Path) -> None:
    from deepseek.checkpoint import to_dtype

    half = save_model(to_dtype(load_model(base), torch.bfloat16), tmp_path / "half", tokenizer=Tokenizer.load(base))
    model = Trainer(from_model=half, out=tmp_path / "out", steps=2, lr=1e-3, **QUICK).fit(texts / "code_expert.jsonl")
    assert load_model(model).lm_head.weight.dtype == torch.bfloat16
    assert load_model(tmp_path / "out" / "checkpoint-000002").lm_head.weight.dtype == torch.float32
    model = Trainer.resume(tmp_path / "out", steps=3).fit()
    assert load_model(model).lm_head.weight.dtype == torch.bfloat16


def test_a_file_under_two_names_is_said(texts: Path, tmp_path: Path) -> None:
    code = texts / "code_expert.jsonl"
    trainer = Trainer(texts / "config.json", out=tmp_path, tokenizer=texts / "words", steps=1, **QUICK)
    with pytest.warns(UserWarning, match="code_expert.jsonl: given under code_expert and under text without a name"):
        trainer.fit({"code_expert": code, "": code})


def test_too_little_data_leaves_the_folder_free(texts: Path, tmp_path: Path) -> None:
    (tiny := tmp_path / "tiny.txt").write_text("the river")
    trainer = Trainer(texts / "config.json", out=tmp_path / "out", tokenizer=texts / "words", steps=1, **QUICK)
    with pytest.raises(DataError, match="too little data"):
        trainer.fit(tiny)
    assert trainer.fit(texts / "code_expert.jsonl").is_dir()
