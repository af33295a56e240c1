"""GGUF files, written by the library `gguf` as llama.cpp's conversion lays them out: weights, configuration and
vocabulary; upcycled, against transformers' own model; and what is damaged or unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind

from deepseek import Tokenizer
from deepseek.checkpoint import load_model
from deepseek.checkpoint.gguf_file import GGUFFile
from deepseek.cli import main
from deepseek.config import YarnScaling
from deepseek.convert import upcycle
from deepseek.errors import CheckpointError, ConfigError, MoEDRError, NotFoundError
from deepseek.model.layers import inverse_frequencies
from tests.helpers.gguf_files import HEADS, HIDDEN, INNER, KEY_HEADS, VOCABULARY, WIDTH, learnt, weights, write

TEXTS = ("the law of the land 1234", "  a house, by the sea!\n\n\tand more", "naïve façade 東京 😀 don't", "")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_weights_come_back_as_they_were(tmp_path: Path, kind: Kind, architecture: str) -> None:
    tensors = weights(biases=architecture == "qwen2")
    file = GGUFFile(write(tmp_path / "a.gguf", tensors, kind, architecture))
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        want = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)) if (
            tensor.ndim == 2) else tensor
        rows = [file.read_rows(name, start, start + 7, torch.float32) for start in range(0, len(tensor), 7)]
        assert file.shape(name) == tuple(tensor.shape) and torch.equal(torch.cat(rows), want), name


@pytest.mark.parametrize(("architecture", "model"), [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM")])
@pytest.mark.parametrize("tied", [False, True])
def test_the_v3_form_computes_what_the_model_does(tmp_path: Path, architecture: str, model: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = weights(biases=architecture == "qwen2")
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    stored = {name: tensor for name, tensor in tensors.items() if not tied or name != "lm_head.weight"}
    tokenizer = learnt()
    out = upcycle(write(tmp_path / "a.gguf", stored, architecture=architecture, tokenizer=tokenizer), tmp_path / "v3",
                  progress=False).path
    config = getattr(transformers, model.replace("ForCausalLM", "Config"))(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, head_dim=WIDTH,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=256, tie_word_embeddings=tied)
    theirs = getattr(transformers, model)(config).eval()
    theirs.load_state_dict(tensors)
    ids = torch.randint(0, VOCABULARY, (2, 50))
    with torch.no_grad():
        want, got = theirs(ids).logits, load_model(out)(ids)
    assert float((got - want).norm() / want.norm()) < 1e-4
    there = Tokenizer.load(out)
    assert there.chat([{"role": "user", "content": "hi"}]) == "hi!" and there.eos_ids == (1,)
    assert all(there.encode(text) == tokenizer.encode(text) for text in TEXTS[:2])


def test_llama_3s_divisors_become_frequencies(tmp_path: Path) -> None:
    divisors, plain = torch.linspace(1, 8, WIDTH // 2), inverse_frequencies(WIDTH, 1e4, None)
    path = write(tmp_path / "a.gguf", weights() | {"rope_freqs.weight": divisors})
    out = upcycle(path, tmp_path / "v3", progress=False).path
    there = load_model(out).model.rotary.inv_P
    torch.testing.assert_close(there, (plain / divisors).repeat(KEY_HEADS), rtol=1e-6, atol=0)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight: must have 16 numbers and no other scaling"):
        GGUFFile(write(path, weights() | {"rope_freqs.weight": divisors[:4].clone()}))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_positions(tmp_path: Path, kind: str) -> None:
    def scaled(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    rotary = load_model(upcycle(write(tmp_path / "a.gguf", weights(), also=scaled), tmp_path / "v3").path).model.rotary
    yarn = YarnScaling(4.0, 64)
    want = inverse_frequencies(WIDTH, 1e4, None) / 4 if kind == "linear" else inverse_frequencies(WIDTH, 1e4, yarn)
    torch.testing.assert_close(rotary.inv_P, want.repeat(KEY_HEADS), rtol=1e-6, atol=0)
    assert rotary.scale == pytest.approx(KEY_HEADS**0.25 * (1.0 if kind == "linear" else yarn.rotary_scale))


# ---- vocabularies ---------------------------------------------------------------------------------------------------


def test_a_sentence_piece_vocabulary(tmp_path: Path) -> None:
    """Scores give the merges; what is no token falls back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thelawofndsy", "th", "the",
              "▁the", "la", "law", "▁law", "of", "▁of"]
    pieces = list(dict.fromkeys(pieces))
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    tensors = weights()
    tensors |= {name: torch.randn(len(pieces), HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}

    def vocabulary(writer: gguf.GGUFWriter) -> None:
        fields = writer.kv_data[0]
        for key in [key for key in fields if key.startswith("tokenizer.")]:
            del fields[key]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_types(kinds)
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    path = write(tmp_path / "a.gguf", tensors, also=vocabulary)
    out = upcycle(path, tmp_path / "v3", progress=False).path
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("the law of é").tokens == ["<s>", "▁the", "▁law", "▁of", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("the law of é").ids) == "the law of é"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in (TEXTS[0], TEXTS[2]):  # before others it leaves out a space that llama.cpp puts there
        assert tokenizer.encode(text).ids == theirs(text).input_ids


# ---- what is damaged or unknown -------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.gguf", weights()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 10, 30, 100, 1000, 5000, 9000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: not a whole GGUF file"):
            upcycle(cut, tmp_path / "v3", progress=False)
        assert not (tmp_path / "v3").exists()
    with pytest.raises(NotFoundError, match=r"nowhere\.gguf: no such file"):
        upcycle(tmp_path / "nowhere.gguf", tmp_path / "v3")


def test_a_file_with_any_byte_altered_in_its_header_is_read_or_refused(tmp_path: Path) -> None:
    """No other exception, and no allocation that the file's size does not allow."""
    whole = bytearray(write(tmp_path / "a.gguf", weights()).read_bytes())
    odd, refused = tmp_path / "odd.gguf", 0
    for at in torch.randint(0, 12000, (150,)).tolist():
        data = bytearray(whole)
        data[at] ^= 0x80 | 1 << at % 7
        odd.write_bytes(data)
        try:
            GGUFFile(odd)
        except MoEDRError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(("also", "message"), [
    (lambda w: w.add_expert_count(8), "llama.expert_count = 8: is not known here"),
    (lambda w: w.add_rope_dimension_count(16), "llama.rope.dimension_count = 16: must be 32"),
    (lambda w: (w.kv_data[0].pop("llama.attention.key_length", None),
                w.add_array("llama.attention.key_length", [32, 32])), r"attention.key_length = .32, 32.: must be"),
    (lambda w: w.kv_data[0].pop("llama.block_count"), "llama.block_count = None: must be a positive integer"),
    (lambda w: w.kv_data[0].pop("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens: must be a list of texts"),
    (lambda w: w.kv_data[0].pop("tokenizer.ggml.merges"), "tokenizer.ggml.merges: must be pairs of tokens"),
], ids=["experts", "part of a head", "two widths", "no layers", "no tokens", "no merges"])
def test_what_is_not_known_is_named(tmp_path: Path, also: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        upcycle(write(tmp_path / "a.gguf", weights(), also=also), tmp_path / "v3", progress=False)


def test_other_architectures_and_tensors_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"general.architecture = 'gemma': must be one of llama, qwen2"):
        GGUFFile(write(tmp_path / "b.gguf", weights(), architecture="gemma"))
    with pytest.raises(ConfigError, match=r"Qwen3ForCausalLM.*q_norm"):
        upcycle(write(tmp_path / "c.gguf", weights(), architecture="qwen3"), tmp_path / "v3")
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write(tmp_path / "d.gguf", tensors)
    assert main(["upcycle", str(tmp_path / "d.gguf"), str(tmp_path / "v3")]) == 2
    assert "1 tensors are missing, first model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    tensors = weights() | {"model.layers.0.self_attn.k_proj.weight": torch.randn(32, HIDDEN)}
    with pytest.raises(CheckpointError, match=r"k_proj.weight has shape .32, 64., its configuration asks for .64, 64."):
        upcycle(write(tmp_path / "e.gguf", tensors), tmp_path / "v3")
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.pre = 'odd': how it cuts text is not known here"):
        GGUFFile(write(tmp_path / "f.gguf", weights(), pre="odd"))
