"""The model that the inference benchmarks run: layers as large as those of `v3-16b-a3b`, few of them, random weights.

Speed does not depend on what the weights say, but it does depend on which experts the tokens choose. These spread
their choice nearly evenly over random tokens (512 of them load the experts of a layer with a coefficient of variation
of 0.14 to 0.18; chance alone gives 0.14). That takes embeddings of deviation 1 where matrices have 0.02: with small
ones attention's average over the context outweighs the token itself, all tokens look alike to the gate, and the fullest
expert gets four times its share.

    python benchmarks/shape.py [FOLDER]     writes the checkpoint (about 5 GB) unless it is there already
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint import INDEX, hf_names
from deepseek.config import ModelConfig
from deepseek.files import replace_folder, write_json
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer

CACHE = Path(__file__).parent / ".cache"
# 1 dense + 4 MoE layers; 2.5 B parameters, 0.47 B of them active. q_lora_rank is set because llama.cpp takes a model
# without one for "lite" only at 26, 27 or 48 layers. YaRN stays: every contender reads it.
CONFIG = ModelConfig.preset("v3-16b-a3b").with_(
    num_hidden_layers=5, q_lora_rank=768, vocab_size=32768, num_nextn_predict_layers=0)
SHARD_BYTES = 512 << 20  # what is in memory at once


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name on disk -> shape, for every tensor of a checkpoint of `config`, in the model's order."""
    with torch.device("meta"):
        model = CausalLM(config)
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict().items():
        for disk_name, part in hf_names(name, config):
            shapes[disk_name] = (tensor if part is None else tensor[part[0]][part[1]]).shape
    return shapes


def deviation(name: str, shape: Sequence[int], config: ModelConfig) -> float | None:
    """Standard deviation of a random matrix; None for norms, which are ones, and gate biases, which are zeros."""
    if len(shape) == 1:
        return None
    return 1.0 if name.endswith("embed_tokens.weight") else config.initializer_range


def random_tensors(config: ModelConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a random checkpoint one at a time, BF16: matrices normal with deviation initializer_range (the
    embedding 1), norms one; gate biases zero and FP32. Equal seeds give equal tensors."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in tensor_shapes(config).items():
        spread = deviation(name, shape, config)
        if spread is not None:
            yield name, torch.empty(shape).normal_(0, spread, generator=generator).to(torch.bfloat16)
        elif name.endswith("e_score_correction_bias"):
            yield name, torch.zeros(shape)
        else:
            yield name, torch.ones(shape, dtype=torch.bfloat16)


def write_model(
    folder: Path = CACHE / "model", config: ModelConfig = CONFIG, tensors: Iterator[tuple[str, Tensor]] | None = None
) -> Path:
    """A Hugging Face checkpoint of random weights (or of `tensors`, in the model's order) with a tokenizer, in shards;
    returns `folder`.

    A folder that already holds a checkpoint of `config` is left as it is. Never more than one shard is in memory.
    """
    if (folder / "config.json").is_file() and ModelConfig.from_file(folder) == config:
        return folder
    print(f"writing the benchmark model to {folder}", flush=True)
    files: list[list[str]] = [[]]
    total = room = 0
    for name, shape in tensor_shapes(config).items():  # which tensor goes where: file names carry the count of files
        size = shape.numel() * (4 if name.endswith("e_score_correction_bias") else 2)
        if size > room:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(name)
        room, total = room - size, total + size
    files = files[1:]
    tensors = tensors or random_tensors(config)
    weight_map: dict[str, str] = {}
    with replace_folder(folder) as staging:
        for number, names in enumerate(files, 1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            save_file(dict(next(tensors) for _ in names), staging / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(staging / "config.json", config.to_dict() | {"torch_dtype": "bfloat16"})
        # llama.cpp's converter wants a tokenizer; no benchmark looks at the text
        Tokenizer.train(_texts(), config.vocab_size).save(staging)
    return folder


def _texts() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py")):
        if file.parent.name not in ("site-packages", "test"):
            yield file.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the model that the inference benchmarks run.")
    parser.add_argument("folder", type=Path, nargs="?", default=CACHE / "model")
    print(write_model(parser.parse_args().folder))
