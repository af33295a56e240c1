"""A dense model against its DeepSeek-V3 form, which `deepseek upcycle` writes: what the conversion costs in accuracy.

The reference is the dense model in transformers, FP32. Of every contender: relative error of the logits, share of equal
best tokens, and KL divergence to the reference, over texts of five domains. Then greedy continuations.

    dense BF16             transformers' own rounding
    V3 FP32, BF16          transformers' DeepseekV3, and here
    dense INT8, NF4        the dense model's matrices through the kernels that run the V3 form, activations included
    V3 INT8, NF4           `deepseek quantize` of the V3 form

    python benchmarks/upcycle.py MODEL [--data benchmarks/.cache/data]      (MODEL: as `deepseek upcycle` takes it)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deepseek import Tokenizer
from deepseek.checkpoint import load_model
from deepseek.convert import quantize, upcycle
from deepseek.ops.native import isa
from deepseek.quant import int8
from deepseek.quant.linear import QuantizedEmbedding, QuantizedLinear
from deepseek.quant.pack import quantize_panels
from harness import machine, table, versions, write_result

SETS = ("text/books_en", "text/peps_en", "code/code_python", "law/books_law_en", "finance/books_finance_en")
LENGTH, PROMPT, NEW = 64, 32, 64  # tokens: of a text, of a prompt, that follow it
SLOW = 10  # texts in BF16, which transformers emulates on most CPUs
Logits = Callable[[Tensor], Tensor]


def texts(data: Path, tokenizer: Tokenizer, count: int) -> Tensor:
    """[count, LENGTH] ids: beginnings of records, spread over the sets."""
    rows, each = [], -(-count // len(SETS))
    for name in SETS:
        records = (data / name / "text.jsonl").read_text(encoding="utf-8").splitlines()
        found = (tokenizer.encode(json.loads(line)["text"][: 16 * LENGTH])
                 for line in records[:: max(1, len(records) // (2 * each))])
        rows += [ids[:LENGTH] for ids in found if len(ids) >= LENGTH][:each]
    return torch.tensor(rows[:count])


def rounded(model: Any, bits: int) -> nn.Module:
    """The dense model with its matrices in 8 or 4 bits, its embedding in 8, as `deepseek quantize` rounds them."""
    table = int8.quantize(model.get_input_embeddings().weight.float())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            packed, _, _ = quantize_panels(module.weight.detach().float().contiguous(), bits)
            model.set_submodule(name, QuantizedLinear(packed.flatten(), module.out_features, module.in_features,
                                                      module.bias, bits))
    model.set_input_embeddings(QuantizedEmbedding(table.code_OK, table.step_O))
    return model


class Sums:
    """Error, agreement and KL of logits against the reference's, over texts."""

    def __init__(self) -> None:
        self.lost = self.whole = 0.0
        self.same: list[Tensor] = []
        self.kl: list[Tensor] = []

    def add(self, want_BTV: Tensor, got_BTV: Tensor) -> None:
        self.lost += float((got_BTV - want_BTV).double().square().sum())
        self.whole += float(want_BTV.double().square().sum())
        self.same.append((got_BTV.argmax(-1) == want_BTV.argmax(-1)).flatten())
        p, q = want_BTV.log_softmax(-1), got_BTV.log_softmax(-1)
        self.kl.append((p.exp() * (p - q)).sum(-1).mean(-1))

    def figures(self) -> dict[str, float]:
        kl = torch.cat(self.kl)  # a number a text
        return {"relative_error": (self.lost / self.whole) ** 0.5, "same": float(torch.cat(self.same).float().mean()),
                "kl": float(kl.mean()), "kl_error": float(kl.std() / len(kl) ** 0.5)}


def contenders(where: dict[str, Any], v3: Path, folder: Path) -> Iterator[tuple[str, Logits]]:
    """One after the other, so that only two models are in memory."""
    def transformers(kind: torch.dtype, **source: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(**(source or where), dtype=kind).eval()

    yield "V3 FP32, here", load_model(v3, torch.float32)
    yield "V3 FP32, transformers", logits_of(transformers(torch.float32, pretrained_model_name_or_path=v3))
    for format in ("int8", "nf4"):
        yield f"dense {format.upper()}", logits_of(rounded(transformers(torch.float32), 8 if format == "int8" else 4))
        quantize(v3, folder / format, format, progress=False)
        yield f"V3 {format.upper()}", load_model(folder / format)
    yield "V3 BF16, here", load_model(v3, torch.bfloat16)
    yield "V3 BF16, transformers", logits_of(transformers(torch.bfloat16, pretrained_model_name_or_path=v3))
    yield "dense BF16", logits_of(transformers(torch.bfloat16))


def logits_of(model: nn.Module) -> Logits:
    return lambda ids: model(ids).logits.float()


def greedy(reference: Any, ids: Tensor) -> Tensor:
    """Prompts and the NEW tokens with which the dense model continues them."""
    start = ids[:, :PROMPT]
    return reference.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=NEW, min_new_tokens=NEW,
                              do_sample=False, pad_token_id=0)


def goes_on(logits: Logits, said: Tensor) -> int:
    """Texts that greedy decoding continues with the same tokens: each of them is the best one after those before it."""
    best = torch.cat([logits(part).argmax(-1) for part in said.split(10)])
    return int((best[:, PROMPT - 1 : -1] == said[:, PROMPT:]).all(-1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".cache" / "data")
    parser.add_argument("--texts", type=int, default=50)
    args = parser.parse_args()
    where: dict[str, Any] = {"pretrained_model_name_or_path": args.model}
    if args.model.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    with tempfile.TemporaryDirectory() as folder:
        v3 = Path(folder) / "v3"
        about = str(upcycle(args.model, v3, progress=False))
        ids = texts(args.data, Tokenizer.load(v3), args.texts)
        reference = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
        found: dict[str, dict[str, float]] = {}
        with torch.no_grad():
            want = [reference(part).logits for part in ids.split(2)]
            said = greedy(reference, ids)
            for name, logits in contenders(where, v3, Path(folder)):
                sums = Sums()
                for part, known in zip(ids.split(2), want[: SLOW // 2 if "BF16" in name else None], strict=False):
                    sums.add(known, logits(part))
                found[name] = sums.figures()
                if "FP32" in name:
                    found[name]["greedy"] = goes_on(logits, said)
                print(name, found[name], flush=True)
    rows = [["model", "relative logit error", "same best token", "KL, nats a token", "its standard error",
             f"{NEW} greedy tokens equal"]]
    rows += [[name, f"{one['relative_error']:.1e}", f"{one['same']:.2%}", f"{one['kl']:.2e}", f"{one['kl_error']:.1e}",
              f"{one['greedy']} of {len(ids)}" if "greedy" in one else ""] for name, one in found.items()]
    pairs = {"BF16, transformers": ("V3 BF16, transformers", "dense BF16"),
             "BF16, here": ("V3 BF16, here", "dense BF16"), "INT8": ("V3 INT8", "dense INT8"),
             "NF4": ("V3 NF4", "dense NF4")}
    ratios = {name: found[a]["kl"] / found[b]["kl"] for name, (a, b) in pairs.items()}
    text = "\n\n".join([
        f"# {args.model.stem} as a DeepSeek-V3", f"{about}. {len(ids)} texts of {LENGTH} tokens (of them {SLOW} in "
        f"BF16); kernels {isa()}.",
        table(rows), "KL of the V3 form over that of the dense model with the same rounding: " + ", ".join(
            f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + "."])
    write_result("upcycle", text, {
        "figures": found, "kl_ratios": ratios,
        "machine": machine(torch.get_num_threads()), "versions": versions("torch", "transformers")},
        args.texts >= 50)


if __name__ == "__main__":
    main()
