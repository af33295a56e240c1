"""The benchmark model with a SYNTHETIC GATE: text of a domain prefers a quarter of the experts.

Layer shapes of `v3-16b-a3b`, 5 layers and an MTP module (shape.py); weights random but for this: token t belongs to
domain t % 4; the rows of a domain's tokens in embedding and head, and the gate rows of a quarter of the experts, lean
to the domain's direction. PULL says how much the gate leans: as it is, the scores of a domain's quarter stand 2.4
standard deviations above the others'. The share of slots that fall there is measured where the model is used (chance is
a quarter). An atlas beside the checkpoint names the quarters.

    python benchmarks/planted.py [FOLDER]     writes the NF4 checkpoint (about 1.7 GB) unless it is there already
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import torch
from torch import Tensor

from deepseek.atlas import Atlas
from deepseek.convert import quantize
from shape import CACHE, CONFIG, random_tensors, write_model

NAMES = ("law_expert", "code_expert", "medical_expert", "finance_expert")
DOMAINS = len(NAMES)
MODEL = CONFIG.with_(num_nextn_predict_layers=1)
LEAN, PULL = 0.5, 0.12  # of a token's row and of an expert's gate row towards the domain, in deviations of weights
OF_EXPERT = torch.arange(MODEL.n_routed_experts) * DOMAINS // MODEL.n_routed_experts


def directions() -> Tensor:
    """[D H], orthogonal, of root mean square 1."""
    random_HD = torch.randn(MODEL.hidden_size, DOMAINS, generator=torch.Generator().manual_seed(7))
    return torch.linalg.qr(random_HD)[0].t() * MODEL.hidden_size**0.5


def plant(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the random checkpoint as this one has it."""
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        lean_VH = LEAN * directions()[torch.arange(MODEL.vocab_size) % DOMAINS]
        return (tensor.float() + (1.0 if "embed" in name else MODEL.initializer_range) * lean_VH).to(tensor.dtype)
    if name.endswith("mlp.gate.weight"):
        return (tensor.float() + PULL * MODEL.initializer_range * directions()[OF_EXPERT]).to(tensor.dtype)
    return tensor


def planted_model(cache: Path = CACHE) -> Path:
    folder = cache / "planted-nf4"
    if not (folder / "atlas.json").is_file():
        wide = write_model(cache / "planted", MODEL, (
            (name, plant(name, tensor)) for name, tensor in random_tensors(MODEL)))
        quantize(wide, folder)
        shutil.rmtree(wide)
        named = Atlas.built_in(MODEL.with_(n_group=DOMAINS, topk_group=DOMAINS), NAMES)
        Atlas(type(named.shape).of(MODEL), named.groups).save(folder)
    return folder


def prompt(draw: random.Random, domain: int, tokens: int) -> list[int]:
    """Random tokens of one domain."""
    return [draw.randrange(MODEL.vocab_size // DOMAINS) * DOMAINS + domain for _ in range(tokens)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the benchmark model with a synthetic gate.")
    parser.add_argument("cache", type=Path, nargs="?", default=CACHE)
    print(planted_model(parser.parse_args().cache))
