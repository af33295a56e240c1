"""Small random GGUF files, written by the library `gguf` as llama.cpp's conversion lays them out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from deepseek import Tokenizer

HIDDEN, HEADS, KEY_HEADS, WIDTH, INNER, VOCABULARY = 64, 4, 2, 32, 96, 320
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def learnt() -> Tokenizer:
    return Tokenizer.train(["the law of the land", "a house by the sea", "and more, don't 1234"] * 20, VOCABULARY)


def weights(biases: bool = False) -> dict[str, Tensor]:
    """Of a model of two layers, under Hugging Face's names."""
    shapes = {"self_attn.q_proj": HEADS * WIDTH, "self_attn.k_proj": KEY_HEADS * WIDTH,
              "self_attn.v_proj": KEY_HEADS * WIDTH, "mlp.gate_proj": INNER, "mlp.up_proj": INNER}
    out = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": torch.rand(HIDDEN) + 0.5,
           "lm_head.weight": torch.randn(VOCABULARY, HIDDEN)}
    for layer in range(2):
        stem = f"model.layers.{layer}."
        for name, rows in shapes.items():
            out[f"{stem}{name}.weight"] = torch.randn(rows, HIDDEN) / 8
            if biases and name.startswith("self_attn"):
                out[f"{stem}{name}.bias"] = torch.randn(rows) / 3
        out[f"{stem}self_attn.o_proj.weight"] = torch.randn(HIDDEN, HEADS * WIDTH) / 11
        out[f"{stem}mlp.down_proj.weight"] = torch.randn(HIDDEN, INNER) / 10
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{stem}{name}.weight"] = torch.rand(HIDDEN) + 0.5
    return out


def gguf_name(name: str) -> str:
    plain = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "rope_freqs": "rope_freqs"}
    stem, _, kind = name.rpartition(".")
    if stem in plain:
        return f"{plain[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def write(path: Path, tensors: dict[str, Tensor], kind: Kind = Kind.F32, architecture: str = "llama",
          tokenizer: Tokenizer | None = None, pre: str = "llama-bpe",
          also: Callable[[gguf.GGUFWriter], object] = lambda writer: None) -> Path:
    """As convert_hf_to_gguf does: rows of q and k permuted for llama, vectors in FP32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(WIDTH)
    writer.add_value_length(WIDTH)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    about = json.loads((tokenizer or learnt()).definition)
    special = {token["id"] for token in about["added_tokens"]}
    writer.add_token_list(list(about["model"]["vocab"]))
    writer.add_token_types([3 if i in special else 1 for i in range(len(about["model"]["vocab"]))])
    writer.add_token_merges([" ".join(merge) for merge in about["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}!")
    also(writer)
    for name, tensor in tensors.items():
        data = tensor
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            data = tensor.unflatten(0, (-1, 2, WIDTH // 2)).transpose(1, 2).flatten(0, 2)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), data.numpy())
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(data.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
