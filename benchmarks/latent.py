"""What a compressed latent costs a dense model before healing: perplexity of WikiText-2, which was not in the
calibration text, and size of the cache, at several ranks, beside the dense model and truncations of the same size.

Truncation: the keys of the first head stay rotary; those of the others, unturned, and all values become the latent by
a singular value decomposition of their weights; nothing is measured or fitted.

    python benchmarks/latent.py MODEL --work runs/latent [--ranks 128 96 64] [--windows 6]

MODEL: as `deepseek upcycle` takes it. The work lies in WORK and is resumed. --data: the folder of
benchmarks/fetch_data.py.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carve import LENGTH, NAMES, OTHERS, perplexity
from deepseek import Tokenizer
from deepseek.checkpoint import load_model
from deepseek.model import CausalLM
from deepseek.upcycling.carve_settings import LatentConfig
from deepseek.upcycling.compress import Choice, latent_config
from deepseek.upcycling.latent import latent_form
from deepseek.upcycling.source import DenseSource, GroupedAttention
from harness import machine, table, versions, write_result


class Truncated(nn.Module):
    """Grouped attention with the keys and values that a truncated latent gives back."""

    def __init__(self, attn: GroupedAttention, rank: int) -> None:
        super().__init__()
        self.attn, width = attn, attn.dense.head_dim
        w_ZH = torch.cat([attn.k_proj.weight[width:], attn.v_proj.weight])
        u_ZR, s_R, vh_RH = torch.linalg.svd(w_ZH, full_matrices=False)
        w_ZH = u_ZR[:, :rank] * s_R[:rank] @ vh_RH[:rank]
        self.w_k = torch.cat([attn.k_proj.weight[:width], w_ZH[: attn.dense.key_width - width]])
        self.w_v = w_ZH[attn.dense.key_width - width :]

    def forward(self, x_BTH: Tensor, context: Any, layer: int) -> Tensor:
        attn, first = self.attn, self.attn.dense.heads // self.attn.dense.key_heads
        attn.k_proj.weight, attn.v_proj.weight = nn.Parameter(self.w_k, False), nn.Parameter(self.w_v, False)
        still = context._replace(cos=torch.full_like(context.cos, attn.rotary_scale), sin=0 * context.sin)
        q, k, v = attn.heads(x_BTH, context)
        q_still, k_still, _ = attn.heads(x_BTH, still)
        q[:, :, first:], k[:, :, 1:] = q_still[:, :, first:], k_still[:, :, 1:]
        return attn.o_proj(attn.attend(q, k, v).reshape(*x_BTH.shape[:2], -1))


def truncated(source: DenseSource, rank: int) -> CausalLM:
    """Raises ValueError for a model whose keys and values have biases."""
    if source.dense.biases:
        raise ValueError("truncation: of models without biases alone")
    model = source.model()
    for layer in model.model.layers:
        layer.self_attn = Truncated(layer.self_attn, rank)  # type: ignore[arg-type]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".cache" / "data")
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 96, 64])
    parser.add_argument("--rotary", type=int)
    parser.add_argument("--calibration_tokens", type=int, default=LatentConfig().calibration_tokens)
    parser.add_argument("--windows", type=int, default=6, help=f"of {LENGTH} tokens of WikiText-2")
    args = parser.parse_args()
    source = DenseSource(args.model)
    width = args.rotary or min(64, source.dense.head_dim)
    words = tuple(f"{name}={args.data / file}" for name, file in NAMES.items() if name != "wiki")
    folders = {}
    for rank in args.ranks:
        folders[rank] = out = args.work / f"{rank}-{width}"
        if not out.exists():
            print(latent_form(args.model, out, LatentConfig(
                latent=rank, latent_rotary=width, calibrate=words, calibration_tokens=args.calibration_tokens)))
    text = (args.data / OTHERS["WikiText-2"]).read_text(encoding="utf-8")
    ids = Tokenizer.load(folders[args.ranks[0]]).encode(text[: 8 * LENGTH * args.windows])
    ids_BT = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[: args.windows]
    pairs = torch.ones(width // 2, dtype=torch.long)
    numbers = {"dense": 2 * source.dense.key_width, "exact form": source.exact.config.latent_dim}
    found: dict[str, float] = {"dense": perplexity(source.model(), ids_BT, "dense")}
    for rank, folder in folders.items():
        numbers[f"{rank}"] = latent_config(source.dense, rank, Choice(pairs, pairs)).latent_dim
        found[f"{rank}"] = perplexity(load_model(folder, torch.float32), ids_BT, f"latent {rank}")
        if width == source.dense.head_dim:
            numbers[f"{rank}, truncated"] = numbers[f"{rank}"]
            found[f"{rank}, truncated"] = perplexity(truncated(source, rank), ids_BT, f"truncated {rank}")
    rows = [["latent", "numbers a token and layer", "WikiText-2", "nats above dense"]]
    rows += [[name, str(numbers[name]), f"{value:.1f}", f"{math.log(value / found['dense']):.3f}"]
             for name, value in found.items()]
    head = (f"# {args.model.stem}: a compressed latent\n\nPerplexity of {args.windows} windows of {LENGTH} tokens of "
            f"WikiText-2 without healing; rotary key of {width}; {args.calibration_tokens:,} tokens of {len(NAMES)} "
            "names for calibration.")
    write_result("latent", f"{head}\n\n{table(rows)}", {
        "perplexity": found, "numbers": numbers, "machine": machine(torch.get_num_threads()),
        "versions": versions("torch")}, args.windows >= 6)


if __name__ == "__main__":
    main()
