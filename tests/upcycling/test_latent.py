"""A compressed latent: exact where it has room for all that the dense model says, near it where it has not."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import Tokenizer
from deepseek.checkpoint import TensorFiles, load_model
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.convert import upcycle
from deepseek.errors import ConfigError, DataError
from deepseek.upcycling import latent as forming
from deepseek.upcycling.carve_settings import HealConfig, LatentConfig
from deepseek.upcycling.compress import as_complex, rotary_numbers, turning
from deepseek.upcycling.latent import latent_form
from deepseek.upcycling.source import DenseSource

transformers = pytest.importorskip("transformers", reason="the sources are transformers' own models")

WORDS = "the law of the land and a house by the sea where people went before the rain came down".split()
SHAPE: dict[str, Any] = dict(
    vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rope_theta=1e3)


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Path]:
    """`dense("Llama", change, num_key_value_heads=4, …)`: the folder of a random model of transformers, its attention
    changed, with a tokenizer, and beside it text.txt."""
    def make(kind: str = "Llama", change: Callable[[Any], None] = lambda model: None, **keys: Any) -> Path:
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SHAPE | keys))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
            for layer in model.model.layers:
                change(layer.self_attn)
        model.save_pretrained(tmp_path / "dense")
        text = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(120)]
        Tokenizer.train(text, 300).save(tmp_path / "dense")
        (tmp_path / "text.txt").write_text("\n".join(text))
        return tmp_path / "dense"

    return make


def asked(source: Path, rank: int, width: int | None = None, **changes: Any) -> LatentConfig:
    keys: dict[str, Any] = dict(latent=rank, latent_rotary=width, calibrate=(str(source.parent / "text.txt"),),
                                calibration_tokens=640)
    return LatentConfig(**keys | changes)


@torch.no_grad()
def errors(source: Path, out: Path) -> tuple[float, float]:
    """Of our logits against transformers' of the dense model, and against transformers' of the result."""
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    want, theirs = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
                    for path in (source, out))
    ours = load_model(out, "float32")(ids)
    return float((ours - want).norm() / want.norm()), float((ours - theirs).norm() / theirs.norm())


# ---- the source -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "keys"), [
    ("Llama", {}), ("Qwen2", dict(tie_word_embeddings=True)), ("Mistral", dict(num_key_value_heads=1)),
    ("Llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                                    "rope_theta": 1e3}))], ids=str)
def test_the_source_runs_as_transformers_runs_it(dense: Callable[..., Path], kind: str, keys: dict[str, Any]) -> None:
    source = dense(kind, **keys)
    ids = torch.randint(0, 300, (2, 40))
    model = DenseSource(source).model()
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(ids).logits
        cache = model.new_cache(2, 40)
        parts = [model(ids[:, :30], cache=cache), *(model(ids[:, t : t + 1], cache=cache) for t in range(30, 40))]
        for got in (model(ids), torch.cat(parts, 1)):
            assert float((got - want).norm() / want.norm()) < 1e-5


# ---- the exact limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "keys"), [
    ("Mistral", dict(num_key_value_heads=4)), ("Qwen2", {}), ("Llama", dict(num_key_value_heads=1)),
    ("Llama", dict(attention_bias=True, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e3}))], ids=str)
def test_with_all_keys_rotary_and_all_values_in_the_latent_nothing_is_lost(
    dense: Callable[..., Path], kind: str, keys: dict[str, Any]
) -> None:
    source = dense(kind, **keys)
    wide = 16 * (SHAPE | keys)["num_key_value_heads"]
    out = latent_form(source, source.parent / "v3", asked(source, wide, wide)).path
    to_source, to_theirs = errors(source, out)
    assert to_source < 1e-4 and to_theirs < 1e-5


def low_rank(attn: Any) -> None:
    """The second key head is the first one turned and scaled, pair by pair, so one rotary number a pair holds both; the
    values have rank 16."""
    key = attn.k_proj.weight.unflatten(0, (2, 2, 8))
    turn = torch.polar(torch.rand(8) + 0.5, 6 * torch.rand(8))[:, None]
    second = torch.complex(key[0, 0], key[0, 1]) * turn
    key[1, 0], key[1, 1] = second.real, second.imag
    attn.v_proj.weight.copy_(torch.randn(32, 16) @ attn.v_proj.weight[:16] / 4)


def test_keys_that_are_one_key_and_values_of_low_rank_cost_nothing(dense: Callable[..., Path]) -> None:
    """Half the cache of the exact form, and the same logits: rotations between key heads are complex."""
    source = dense("Llama", low_rank)
    result = latent_form(source, source.parent / "v3", asked(source, 16, 16))
    assert max(errors(source, result.path)) < 1e-4 and max(result.errors) < 1e-6
    assert result.frequencies == [1] * 8
    assert result.cache == {"dense": 2 * 2 * 64, "exact form": 2 * 2 * (48 + 32), "this": 2 * 2 * (32 + 16)}
    assert math.isclose(result.loss["dense"], result.loss["latent"], rel_tol=1e-4)
    assert errors(source, upcycle(source, source.parent / "exact", progress=False).path)[0] < 1e-4


def test_rotary_numbers_leave_every_score_as_it_is() -> None:
    q, k = (as_complex(torch.randn(50, heads, 12)) for heads in (6, 3))
    found = rotary_numbers(q, k)
    turned = torch.einsum("psg,mgp->mps", found.to_PGG, k)
    assert found.energy_PG[0, 0] >= found.energy_PG[0, 1] and (found.energy_PG > 0).all()
    for head in range(6):
        back = found.back_PGG[:, head // 2].conj()
        want = (q[:, head] * k[:, head // 2].conj()).sum(-1).real
        got = (q[:, head, :, None] * back * turned.conj()).sum((1, 2)).real
        assert torch.allclose(got, want, atol=1e-4)
    assert torch.allclose(found.energy_PG.sum(1), sum(
        (q[:, h].abs().square().mean(0) * k[:, h // 2].abs().square().mean(0) for h in range(6)), torch.zeros(6)),
        rtol=1e-3)


def test_turning_is_one_for_what_hardly_turns_and_small_for_what_turns_fast() -> None:
    slow, fast = turning(torch.tensor([1e-6, 2.0]), 1000).abs().tolist()
    assert slow > 0.999 and fast < 0.2


# ---- what is lost ---------------------------------------------------------------------------------------------------


def test_more_room_loses_less_and_the_report_says_what_is_lost(
    dense: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense("Llama", num_key_value_heads=4)
    found = [latent_form(source, source.parent / f"{rank}-{width}", asked(source, rank, width))
             for rank, width in ((16, 8), (48, 8), (48, 32))]
    lost = [sum(one.errors) for one in found]
    assert lost[0] > lost[1] > lost[2] > 0
    config = ModelConfig.from_file(found[2].path)
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim) == (64, 32, 16)
    assert errors(source, found[2].path)[1] < 1e-5
    report = json.loads((found[2].path / "report.json").read_text())
    assert report["lossy"] is True and report["rank"] == 48 and report["loss"] == found[2].loss
    said = (found[2].path / "report.md").read_text()
    assert said.startswith("lossy: ") and "needs healing" in said and "nats a token" in said
    assert main(["info", str(found[2].path)]) == 0
    assert "lossy: " in capsys.readouterr().out


def test_what_was_stopped_goes_on_bit_for_bit(dense: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = dense(num_hidden_layers=3)
    whole = latent_form(source, source.parent / "whole", asked(source, 24))
    for name, after in (("layer_numbers", 2), ("compressed", 2)):
        function, calls = getattr(forming, name), [0]

        def stopped(*arguments: Any, function: Any = function, calls: list[int] = calls, after: int = after) -> Any:
            calls[0] += 1
            if calls[0] == after:
                raise KeyboardInterrupt
            return function(*arguments)

        monkeypatch.setattr(forming, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            latent_form(source, source.parent / "again", asked(source, 24))
        monkeypatch.setattr(forming, name, function)
    with pytest.raises(ConfigError, match=r"again\.run: holds the beginning of another model, of latent = 24"):
        latent_form(source, source.parent / "again", asked(source, 32))
    again = latent_form(source, source.parent / "again", asked(source, 24))
    assert again.errors == whole.errors and again.loss == whole.loss
    assert all(torch.equal(TensorFiles(again.path).read(name), TensorFiles(whole.path).read(name))
               for name in TensorFiles(whole.path))


def test_one_layer_is_in_memory_at_a_time(dense: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, load = dense(num_hidden_layers=3), DenseSource.layer
    loaded: list[weakref.ref[Any]] = []

    def layer(self: DenseSource, number: int) -> Any:
        assert not any(ref() for ref in loaded)
        loaded.append(weakref.ref(found := load(self, number)))
        return found

    monkeypatch.setattr(DenseSource, "layer", layer)
    latent_form(source, source.parent / "v3", asked(source, 24))
    assert len(loaded) == 6


def test_healing_trains_attention_alone_and_lowers_the_loss(dense: Callable[..., Path]) -> None:
    source = dense("Qwen2", num_key_value_heads=4)
    text = (source.parent / "text.txt").read_text().splitlines()
    (source.parent / "text.jsonl").write_text("".join(
        json.dumps({"text": " ".join(text[i:] + text[:i])}) + "\n" for i in range(60)))
    healing = HealConfig(heal=(f"text={source.parent / 'text.jsonl'}",), heal_tokens=64 * 2 * 10, heal_batch=2,
                         heal_lr=3e-3, heal_evaluated=4)
    out = source.parent / "v3"
    found = latent_form(source, out, asked(source, 16, 8, calibrate=()), healing, "bfloat16")
    assert found.healed and found.healing["after"]["text"] < found.healing["before"]["text"] - 0.02
    made, healed = (load_model(folder, "float32").state_dict()
                    for folder in (source.parent / "v3.run" / "unhealed", out))
    changed = {name.rpartition("self_attn.")[2] for name in made if not torch.equal(made[name], healed[name])}
    assert changed == {"q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight",
                       "o_proj.bias"}
    assert TensorFiles(out).dtype("model.norm.weight") == "BF16" and "needs healing" not in str(found)
    assert json.loads((out / "report.json").read_text())["healing"] == found.healing


def test_the_model_writes_the_text_itself_where_none_is_given(dense: Callable[..., Path]) -> None:
    source = dense()
    found = latent_form(source, source.parent / "v3", asked(source, 24, calibrate=(), calibration_tokens=256))
    assert 0 < found.loss["dense"] < 10 and errors(source, found.path)[1] < 1e-5


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "message"), [
    (dict(latent=8), r"latent = 8: must lie in 16\.\.48: beside a rotary key of 16"),
    (dict(latent=49), r"latent = 49: must lie in 16\.\.48"),
    (dict(latent=16, latent_rotary=15), "latent_rotary = 15: must be even and at most 32"),
    (dict(latent=16, latent_rotary=34), "latent_rotary = 34: must be even and at most 32")])
def test_what_makes_no_sense_is_refused_by_name(dense: Callable[..., Path], keys: dict[str, Any], message: str) -> None:
    source = dense()
    with pytest.raises(ConfigError, match=message):
        latent_form(source, source.parent / "v3", LatentConfig(**keys))
    assert not (source.parent / "v3").exists() and not (source.parent / "v3.run").exists()


def test_too_little_text_is_said(dense: Callable[..., Path]) -> None:
    source, text = dense(), ""
    while len(Tokenizer.load(source).encode(text)) < 80:
        text += f"{WORDS[len(text) % len(WORDS)]} "
    (source.parent / "text.txt").write_text(text)
    with pytest.raises(DataError, match="has 1 window of 64 tokens: must have at least 2"):
        latent_form(source, source.parent / "v3", asked(source, 16))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--latent", "16", "--carve", "0.5"], "carve, latent: exclude each other"),
    (["--latent", "16", "--grow", "a=b"], "grow, latent: exclude each other"),
    (["--latent", "16", "--check"], "check = True: a model with a compressed latent computes something else"),
    (["--latent_rotary", "16"], "latent_rotary = 16: has a meaning only with latent"),
    (["--latent", "16", "--expert_width", "8"], "expert_width = 8: has a meaning only with carve"),
    (["--latent", "16", "--heal", "x", "--anneal", "0.5"], "anneal = 0.5: has a meaning only with carve"),
    (["--latent", "0"], "latent = 0: must be an integer >= 1")])
def test_flags_that_do_not_fit(arguments: list[str], message: str, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upcycle", str(tmp_path), str(tmp_path / "v3"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_says_that_it_is_lossy(dense: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = dense()
    arguments = ["--latent", "24", "--latent_rotary", "8", "--calibrate", str(source.parent / "text.txt"),
                 "--calibration_tokens", "256"]
    assert main(["upcycle", str(source), str(source.parent / "v3"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "lossy: DeepseekV3ForCausalLM with a latent of 32 (24 numbers and constant channels)" in said
    assert "it needs healing" in said and "held-out calibration text" in said and "exact form 320 bytes" in said

