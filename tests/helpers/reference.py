"""What the engine is compared with: the model called by itself; and prompts to compare on."""

from __future__ import annotations

import random

import torch

from deepseek.model import CausalLM


@torch.inference_mode()
def plain(model: CausalLM, prompt: list[int], count: int) -> tuple[int, ...]:
    """Greedy tokens by the model alone: the prompt in one call, then token by token."""
    cache = model.new_cache(1, len(prompt) + count)
    logits, out = model(torch.tensor([prompt]), cache=cache, attn_impl="naive", last_only=True), []
    while True:
        out.append(int(logits[0, -1].argmax()))
        if len(out) == count:
            return tuple(out)
        logits = model(torch.tensor([[out[-1]]]), cache=cache, attn_impl="absorbed", last_only=True)


def mixed_prompts(draw: random.Random, vocabulary: int, count: int) -> list[list[int]]:
    """Short and long ones; some begin alike, in the middle of a page, just before its end and beyond it."""
    stems = [[draw.randrange(vocabulary) for _ in range(n)] for n in (0, 124, 128, 150, 252)]
    return [draw.choice(stems) + [draw.randrange(vocabulary) for _ in range(draw.choice([1, 2, 9, 40]))]
            for _ in range(count)]
