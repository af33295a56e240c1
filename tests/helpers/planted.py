"""A model whose routing is planted: the letters of a text decide which experts it visits."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from deepseek.checkpoint import save_model
from deepseek.config import ModelConfig
from deepseek.data import Document
from deepseek.ids import ExpertId
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer

LETTERS = {"early": "abcdefgh", "middle": "ijklmnop", "late": "qrstuvwxyz"}
K = 4


@dataclass
class Planted:
    """Text made of the letters of a name visits, in every layer, exactly the name's `experts`."""

    model: CausalLM
    tokenizer: Tokenizer
    experts: dict[str, frozenset[ExpertId]]
    folder: Path


def text(name: str, documents: int = 24, characters: int = 120, seed: int = 0) -> list[Document]:
    """Documents of the letters of `name`."""
    generator = random.Random(f"{name}/{seed}")
    return [Document("".join(generator.choices(LETTERS[name], k=characters)), f"{name}.txt") for _ in range(documents)]


def plant(folder: Path, positions: int = 256) -> Planted:
    """Attention and experts add nothing, so that a token's embedding, which is its name's direction and a little noise,
    reaches every gate; there the planted experts point along the direction."""
    generator = torch.Generator().manual_seed(0)
    everything = [document.text for name in LETTERS for document in text(name, seed=1)]
    tokenizer = Tokenizer.train(everything, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=48, moe_intermediate_size=16, n_routed_experts=16, num_experts_per_tok=K, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12,
        max_position_embeddings=positions, routed_scaling_factor=2.5, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id)
    model = CausalLM(config).init_weights(generator).eval()
    experts: dict[str, set[ExpertId]] = {name: set() for name in LETTERS}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.zero_()
        embed = model.model.embed_tokens.weight
        embed.normal_(0.0, 0.05, generator=generator)
        for token in range(tokenizer.vocab_size):
            letter = tokenizer.decode([token])[:1]
            for place, letters in enumerate(LETTERS.values()):
                embed[token, place] += 1.0 * (letter != "" and letter in letters)
        for layer, block in model.moe_blocks().items():
            block.gate.weight.normal_(0.0, 0.02, generator=generator)
            order = torch.randperm(16, generator=generator)
            for place, name in enumerate(LETTERS):
                for index in order[place * K : (place + 1) * K].tolist():
                    block.gate.weight[index, place] += 1.0
                    experts[name].add(ExpertId(layer, index))
    folder = save_model(model, folder / "model", tokenizer=tokenizer)
    return Planted(model, tokenizer, {name: frozenset(ids) for name, ids in experts.items()}, folder)
