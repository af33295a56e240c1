"""Dense models of transformers against their DeepSeek-V3 form, in transformers' DeepseekV3 and here; and what has none.

Every number of the sources is random: no norm at one, no bias at zero.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek import Tokenizer
from deepseek.checkpoint import MANIFEST, load_model
from deepseek.cli import main
from deepseek.convert import compare, quantize, upcycle
from deepseek.errors import CheckpointError, ConfigError, NotFoundError
from deepseek.info import describe

transformers = pytest.importorskip("transformers", reason="the sources are transformers' own models")

EXACT = 1e-4  # relative error of the logits; FP32 sums in another order make 1e-6
SHAPE: dict[str, Any] = dict(
    vocab_size=300, hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=1e4)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 5e3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, one key head": ("Llama", dict(num_key_value_heads=1)),
    "Llama, two key heads, wide": ("Llama", dict(head_dim=64)),
    "Llama, four key heads": ("Llama", dict(num_attention_heads=8, num_key_value_heads=4)),
    "Llama, as many key heads, tied": ("Llama", dict(
        num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True)),
    "Llama, biases": ("Llama", dict(attention_bias=True)),
    "Llama, linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4})),
    "Llama, llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "Llama, YaRN": ("Llama", dict(rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4})),
    "Llama, longrope": ("Llama", dict(rope_parameters={
        "rope_type": "longrope", "short_factor": [1.5] * 16, "long_factor": [1.5] * 16, "rope_theta": 1e4,
        "attention_factor": 1.2, "original_max_position_embeddings": 128})),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "Mistral, window as long as the context": ("Mistral", dict(sliding_window=128, num_key_value_heads=1)),
    "Qwen2": ("Qwen2", dict(num_attention_heads=6)),
    "Qwen2, one key head of 128, tied": ("Qwen2", dict(
        num_key_value_heads=1, head_dim=128, tie_word_embeddings=True)),
    "Qwen2, one window for no layer": ("Qwen2", dict(sliding_window=16, use_sliding_window=False)),
}
every_model = pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS.keys())


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., Path]:
    """`dense("Llama", torch.float32, head_dim=64, …)`: the folder of a random model of transformers."""
    def make(kind: str = "Llama", dtype: torch.dtype = torch.float32, save: Any = None, **changes: Any) -> Path:
        keys = SHAPE | changes
        if "rope_parameters" in keys:
            keys.pop("rope_theta")
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**keys))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
            else:
                torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.3)
        model.to(dtype).save_pretrained(tmp_path / "dense", **(save or {}))
        return tmp_path / "dense"

    return make


def made(source: Path, *arguments: Any, **options: Any) -> Path:
    return upcycle(source, source.parent / "v3", *arguments, progress=False, **options).path


def change(folder: Path, **keys: Any) -> Path:
    about = folder / "config.json"
    old = json.loads(about.read_text())
    about.write_text(json.dumps({k: v for k, v in (old | keys).items() if v != "gone"}))
    return folder


@torch.no_grad()
def check_equal(source: Path, out: Path) -> None:
    """Logits of random texts, and greedy tokens, in float32."""
    theirs, v3 = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                  for path in (source, out))
    assert type(v3).__name__ == "DeepseekV3ForCausalLM"
    ours = load_model(out, "float32")
    ids = torch.randint(0, theirs.config.vocab_size, (3, 70))
    want = theirs(ids).logits
    errors = [float((got - want).norm() / want.norm()) for got in (v3(ids).logits, ours(ids))]
    print("relative errors", *errors)
    assert want.std() > 0.5 and max(errors) <= EXACT
    start = ids[:1, :20]
    rest = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(start))
    chosen = theirs.generate(start, **rest)
    assert torch.equal(v3.generate(start, **rest), chosen)
    assert torch.equal(ours(chosen)[0, 19:-1].argmax(-1), chosen[0, 20:])


@every_model
def test_the_v3_form_computes_the_same(dense: Callable[..., Path], kind: str, changes: dict[str, Any]) -> None:
    source = dense(kind, **changes)
    out = made(source)
    check_equal(source, out)
    assert (out / MANIFEST).is_file() and (out / "generation_config.json").is_file()
    about = json.loads((out / "config.json").read_text())
    assert about["architectures"] == ["DeepseekV3ForCausalLM"] and "auto_map" not in about
    assert about["first_k_dense_replace"] == about["num_hidden_layers"] == 2 and about["qk_nope_head_dim"] == 0


@pytest.mark.parametrize(("kind", "heads"), [("Llama", 2), ("Qwen2", 2), ("Llama", 4), ("Qwen2", 1)])
def test_bf16_weights_are_kept_exactly(dense: Callable[..., Path], kind: str, heads: int) -> None:
    """In the source's own dtype nothing is rounded, whatever the number of key heads."""
    source = dense(kind, torch.bfloat16, num_key_value_heads=heads)
    out = made(source)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    check_equal(source, out)


def test_half_precision_becomes_float32_unless_asked(dense: Callable[..., Path]) -> None:
    source = dense("Llama", torch.float16)
    assert load_model(made(source)).lm_head.weight.dtype == torch.float32
    assert load_model(made(source, "bfloat16", overwrite=True)).lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"dtype = 'float16': must be auto, float32 or bfloat16"):
        made(source, "float16")


def test_shards_on_both_sides(dense: Callable[..., Path]) -> None:
    source = dense(save={"max_shard_size": "100KB"})
    assert len(list(source.glob("*.safetensors"))) > 3
    out = made(source, shard_bytes=1 << 17)
    assert len(list(out.glob("*.safetensors"))) > 2
    check_equal(source, out)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_v3_form_runs_quantized(dense: Callable[..., Path], format: Any) -> None:
    """In one native call for all layers, near the same weights made dense; prompt and later tokens."""
    from deepseek.convert import dequantize

    out = made(dense("Qwen2", num_attention_heads=6, tie_word_embeddings=True))
    quantize(out, out.parent / "q", format, progress=False)
    model = load_model(out.parent / "q")
    plain = load_model(dequantize(out.parent / "q", out.parent / "plain", "float32", progress=False))
    ids = torch.randint(0, 300, (2, 60))
    cache = model.new_cache(2, 60)
    with torch.no_grad():
        want = plain(ids)
        got = torch.cat([model(ids[:, :40], cache=cache), *(model(ids[:, t : t + 1], cache=cache)
                                                            for t in range(40, 60))], 1)
    assert float((got - want).norm() / want.norm()) < 0.2  # int8 activations under random weights


def test_the_accounts_know_the_form(dense: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = dense("Qwen2")
    found = upcycle(source, source.parent / "v3", progress=False)
    assert found.source_parameters == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert found.parameters == describe(load_model(found.path).config).total
    Tokenizer.train(["the law of the land"] * 9, 300).save(found.path)
    assert main(["info", str(found.path)]) == 0
    said = capsys.readouterr().out
    assert "DeepseekV3ForCausalLM, 2 layers, all of them dense" in said and "loads here: yes" in said


# ---- what is carried along ------------------------------------------------------------------------------------------


def test_tokenizer_template_and_generation_settings_come_along(dense: Callable[..., Path],
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    source = dense(max_position_embeddings=256)
    tokenizer = Tokenizer.train(["the law of the land", "a house by the sea"] * 20, 300)
    tokenizer.save(source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.6}')
    (source / "LICENSE").write_text("free")
    change(source, bos_token_id=3, eos_token_id=[1, 7], pad_token_id=2)
    assert main(["upcycle", str(source), str(source.parent / "v3"), "--check"]) == 0
    said, out = capsys.readouterr().out, source.parent / "v3"
    assert "relative logit error" in said and "64 greedy tokens equal for 8 of 8 texts" in said
    there = Tokenizer.load(out)
    assert there.encode("the sea") == tokenizer.encode("the sea") and there.eos_ids == (1, 7)
    assert there.chat([{"role": "user", "content": "hi"}]) == "hi!"
    assert (out / "LICENSE").read_text() == "free" and not (out / "model.safetensors.index.json").exists()
    config = load_model(out).config
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (3, (1, 7), 2)
    found = compare(source, out, ["the law of the sea", "a land"])
    assert found.equal == found.texts == 2 and all(error < EXACT and same == 1 for error, same in found.errors.values())
    short = upcycle(source, source.parent / "short", context=20, progress=False).path
    found = compare(source, short, ["the law of the sea " * 9])
    assert (found.equal, found.new_tokens) == (1, 10) and "10 greedy tokens equal for 1 of 1" in str(found)
    (change(out, rms_norm_eps=0.5) / MANIFEST).unlink()
    worse = compare(source, out, ["the law of the sea", "a land"])
    assert all(error > EXACT for error, _ in worse.errors.values())


def test_fewer_positions_let_a_window_pass(dense: Callable[..., Path]) -> None:
    source = dense("Mistral", sliding_window=64)
    with pytest.raises(ConfigError, match=r"sliding_window = 64: is shorter than the context of 128 tokens"):
        made(source)
    out = made(source, context=64)
    assert load_model(out).config.max_position_embeddings == 64
    with pytest.raises(ConfigError, match=r"context = 129: must lie in 1..128"):
        made(source, context=129, overwrite=True)


def test_a_wide_rotary_key_is_warned_of(dense: Callable[..., Path]) -> None:
    source = dense(hidden_size=144, num_attention_heads=9, num_key_value_heads=9, head_dim=64)
    with pytest.warns(UserWarning, match="rotary key of 576, more than 512.*--latent RANK keeps less: lossy"):
        out = made(source)
    check_equal(source, out)


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["Qwen3ForCausalLM"]}, r"Qwen3ForCausalLM.*RMS norm of every head \(q_norm, k_norm\)"),
    ({"architectures": ["MixtralForCausalLM"]}, "must be one of LlamaForCausalLM, MistralForCausalLM, Qwen2"),
    ({"architectures": None}, "architectures = None: must be one of"),
    ({"mlp_bias": True}, "mlp_bias = True: has no exact form"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0: is not known here and may change"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads"),
    ({"head_dim": 31}, "head_dim = 31: must be even"),
    ({"hidden_size": "96"}, "hidden_size = '96': must be a positive integer"),
    ({"vocab_size": "gone"}, "vocab_size = None: must be a positive integer"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps = 1000.*: must be a positive number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps = 0: must be a positive number"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*change with the length of the text"),
    ({"rope_parameters": {"rope_type": "linear"}}, "must have factor and no other keys"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor = -1: must be a positive number"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "odd": 1}}, "odd"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: must be 1"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}},
     "two lists of factors differ"),
    ({"rope_parameters": [1]}, r"rope_parameters = \[1\]: must be an object or null"),
    ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': must be an object or null"),
    ({"quantization_config": "fp8"}, "quantization_config = 'fp8': must be an object or null"),
    ({"layer_types": 5}, "layer_types = 5: must be a list or null"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq': such weights are not read here"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_has_no_exact_form_is_refused_by_name(
    dense: Callable[..., Path], keys: dict[str, Any], message: str
) -> None:
    source = change(dense(), **keys)
    with pytest.raises(ConfigError, match=message) as caught:
        made(source)
    assert str(source) in str(caught.value) and not (source.parent / "v3").exists()


def test_real_qwen3_is_refused(dense: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="q_norm"):
        made(dense("Qwen3"))


def test_an_unknown_key_without_meaning_is_named(dense: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="unknown key my_note = 'hello' is left out"):
        made(change(dense(), my_note="hello"))


def test_damaged_sources(dense: Callable[..., Path], tmp_path: Path) -> None:
    source = dense()
    file, name = source / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    whole = load_file(file)
    for tensors, message in (
            ({k: v for k, v in whole.items() if k != name}, f"1 tensors are missing, first {name}"),
            (whole | {name: whole[name][:-2].clone()}, f"{name} has shape .62, 96., its configuration asks for .64"),
            (whole | {name: whole[name].to(torch.int32)}, f"{name} is I32: weights must be"),
            (whole | {name: whole[name] * torch.inf}, f"{name}.* holds values that are not finite"),
            (whole | {"model.layers.1.self_attn.q_norm.weight": torch.ones(32)}, "no place in the model, .*q_norm")):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            made(source)
        assert not (tmp_path / "v3").exists()
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        made(source)
    with pytest.raises(NotFoundError, match="no such folder"):
        made(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        upcycle(source, source.parent)


def test_without_transformers_the_check_says_so_before_the_work(
    dense: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"check: needs the transformers library: pip install"):
        compare(tmp_path, tmp_path)
    assert main(["upcycle", str(source), str(tmp_path / "v3"), "--check"]) == 2
    assert "check: needs the transformers library" in capsys.readouterr().err and not (tmp_path / "v3").exists()


# ---- memory ---------------------------------------------------------------------------------------------------------

WALK = """
import resource, sys
from deepseek.convert import upcycle
upcycle(sys.argv[1], sys.argv[3], progress=False)  # imports and pools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
upcycle(sys.argv[2], sys.argv[4], progress=False)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_does_not_grow_with_the_model(dense: Callable[..., Path], tmp_path: Path) -> None:
    """At most three times the largest tensor, of a model that is four times as large."""
    small = dense().rename(tmp_path / "small")
    source = dense(vocab_size=20000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    largest = 4 * 20000 * 512
    assert (source / "model.safetensors").stat().st_size > 4 * largest
    grown = subprocess.run([sys.executable, "-c", WALK, small, source, tmp_path / "a", tmp_path / "b"], check=True,
                           capture_output=True, text=True).stdout
    print(f"{int(grown) / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB")
    assert 0 <= int(grown) <= 3 * largest
