"""What four bits cost: perplexity on held-out text of a trained model, before and after.

The model is the demo's (or --model, with --data for the folder of its token shards). Contenders, on the same tensors:

    plain           the checkpoint as trained, FP32 arithmetic
    MoE-DR NF4      `deepseek quantize`, run by the kernels: codes of 4 bits, activations of 8, embedding of 8
    MoE-DR INT8     the same with --format int8
    bitsandbytes    every matrix that MoE-DR gives 4 bits put through bitsandbytes' NF4 (blocks of 64; with and without
                    nested scales) and back, run in FP32: its arithmetic, with the embedding left alone

    python benchmarks/quality.py [--model demo-train/model --data demo-train/tokens]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deepseek.checkpoint import load_model
from deepseek.config import ModelConfig
from deepseek.convert import quantize
from deepseek.data import TokenShards
from deepseek.info import describe
from deepseek.model import CausalLM
from deepseek.ops.native import isa
from harness import machine, table, versions, write_result

LENGTH = 256


@torch.inference_mode()
def losses(model: CausalLM, shards: TokenShards, limit: int) -> Tensor:
    """Cross entropy of every held-out token."""
    parts = []
    for batch in shards.valid_batches(8, LENGTH, limit):
        logits_BTV = model(batch.ids_BT)
        parts.append(torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="none", ignore_index=-100))
    return torch.cat(parts)


def bitsandbytes_twin(path: Path, nested: bool) -> CausalLM:
    """The plain model with its matrices through bitsandbytes' NF4 and back."""
    import bitsandbytes.functional as bnb

    def through(w: Tensor) -> Tensor:
        packed, state = bnb.quantize_4bit(w.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=nested)
        return bnb.dequantize_4bit(packed, state)

    model = load_model(path, torch.float32)
    if model.config.tie_word_embeddings:  # the head gets four bits, the embedding stays
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:
                for matrix in parameter:
                    matrix.copy_(through(matrix))
            elif parameter.ndim == 2 and not name.endswith(("embed_tokens.weight", "gate.weight")):
                parameter.copy_(through(parameter))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("demo-train/model"))
    parser.add_argument("--data", type=Path, default=Path("demo-train/tokens"))
    parser.add_argument("--batches", type=int, default=40, help="of 8 x 256 held-out tokens")
    args = parser.parse_args()
    if not args.model.is_dir():
        raise SystemExit(f"{args.model}: no such folder; `make demo-train` trains that model")
    shards = TokenShards.open(args.data)
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        for format in ("nf4", "int8"):
            made[format] = Path(folder) / format
            quantize(args.model, made[format], format=format)
        contenders: dict[str, Callable[[], CausalLM]] = {
            "plain": lambda: load_model(args.model, torch.float32),
            "MoE-DR NF4": lambda: load_model(made["nf4"]),
            "MoE-DR INT8": lambda: load_model(made["int8"]),
            "bitsandbytes NF4": lambda: bitsandbytes_twin(args.model, False),
            "bitsandbytes NF4, nested": lambda: bitsandbytes_twin(args.model, True),
        }
        loss = {name: losses(build(), shards, args.batches) for name, build in contenders.items()}
    plain = loss["plain"]
    rows = [["model", "perplexity", "rise", "loss rise a token, 1e-3", "its standard error"]]
    for name, values in loss.items():
        rise = values - plain
        rows.append([name, f"{math.exp(values.mean()):.4f}", f"{math.expm1(rise.mean()):+.3%}",
                     f"{1e3 * rise.mean():+.3f}", f"{1e3 * rise.std() / len(rise) ** 0.5:.3f}"])
    where = machine(torch.get_num_threads())
    text = "\n".join(["# Quality of four bits", "",
                      f"{describe(ModelConfig.from_file(args.model)).total / 1e6:.1f} M parameters, {len(plain):,} "
                      f"held-out tokens; kernels {isa()}; bitsandbytes {versions('bitsandbytes')['bitsandbytes']}.", "",
                      table(rows)])
    write_result("quality", text, {"machine": where, "versions": versions("torch", "bitsandbytes"),
                                   "loss": {name: float(values.mean()) for name, values in loss.items()}})


if __name__ == "__main__":
    main()
