"""Dense checkpoint of Llama's kind -> DeepSeek-V3 that computes the same (checkpoint/dense.py says how)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint import TORCH_DTYPES, TensorFiles, load_model, resolve
from ..checkpoint.dense import WIDEST_KEY, DenseAsV3, DenseConfig
from ..checkpoint.files import Tensors, divide
from ..checkpoint.models import has_own_head
from ..errors import ConfigError
from ..files import locked, read_json
from ..tokenizer import Tokenizer
from .dequantizing import DTYPES, plain_keys
from .writing import SHARD_BYTES, Part, Writer, free_folder

TEXTS = (
    "The law of contract is a body of rules. An offer that is accepted binds both parties, unless",
    "def reverse(text: str) -> str:\n    return text[::-1]\n\n\ndef is_palindrome(text: str) -> bool:\n",
    "Diabetes is a disease in which the blood has too much sugar. Its symptoms are thirst, tiredness and",
    "If 3 x + 5 = 20, then 3 x = 15 and x = 5. If 7 x - 2 = 33, then",
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. When the miller died,",
    "The company's revenue rose by 12 percent to 4.3 billion dollars in the third quarter, while its costs",
    "Gold is a chemical element with the symbol Au and the atomic number 79. It is a soft, yellow metal that",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
)
NEW_TOKENS = 64


@dataclass(frozen=True)
class Upcycled:
    """Result of `upcycle`. parameters: of the source, and of the V3 form."""

    path: Path
    dtype: str
    source_parameters: int
    parameters: int
    key_width: int

    def __str__(self) -> str:
        return (f"DeepseekV3ForCausalLM, {self.dtype}: {self.parameters / 1e6:,.1f} M parameters of the source's "
                f"{self.source_parameters / 1e6:,.1f} M, rotary key {self.key_width} wide")


def upcycle(
    source: str | Path, out: str | Path, dtype: Literal["auto", "float32", "bfloat16"] = "auto", *,
    context: int | None = None, overwrite: bool = False, resume: bool = True, progress: bool = True,
    shard_bytes: int = 5 * SHARD_BYTES,
) -> Upcycled:
    """Write the DeepseekV3ForCausalLM that computes what a dense model does: a LlamaForCausalLM, MistralForCausalLM or
    Qwen2ForCausalLM in a folder, under a hub id, or in a GGUF file, with its tokenizer, chat template and generation
    settings. Memory does not grow with the model.

    dtype: of the weights; auto is the source's if that is bfloat16, else float32. context: how many positions to keep,
    if not all. Other arguments as in `quantize`. Raises ConfigError for what has no exact form, by name, and
    CheckpointError for tensors that are missing, damaged or of another shape.
    """
    check_dtype(dtype)
    with locked(out):
        out = free_folder(out, overwrite, source)
        files, keys, texts = open_dense(source)
        dense = DenseConfig.from_dict(keys, str(files.folder), context)
        made = DenseAsV3(dense, files)
        if (width := dense.key_width) > WIDEST_KEY:
            warnings.warn(f"{files.folder}: {dense.key_heads} key heads of {dense.head_dim} numbers make a rotary key "
                          f"of {width}, more than {WIDEST_KEY}: each head's scores cost {dense.key_heads} times the "
                          f"source's, and so do the queries' weights. --latent RANK keeps less: lossy, needs healing",
                          stacklevel=2)
        name = dtype_name(files, dtype)
        kind = DTYPES[name]
        parts = [Part(tensor, kind, shape, partial(made_rows, made, tensor, TORCH_DTYPES[kind]))
                 for tensor, shape in made.shapes.items()]
        key = {"upcycle": name, "context": dense.context, "shard_bytes": shard_bytes}
        writer = Writer(out, key, files, resume)
        writer.write(divide(parts, Part.size, shard_bytes), {}, progress)
        writer.publish(plain_keys(made.config, name), texts)
    return Upcycled(out, name, made.source_parameters, made.parameters, width)


def check_dtype(dtype: str) -> None:
    """Raises ConfigError for one that is not offered."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype = {dtype!r}: must be auto, float32 or bfloat16")


def dtype_name(files: Tensors, dtype: str) -> str:
    """Of the weights to write."""
    stored = files.dtype("model.embed_tokens.weight")
    return dtype if dtype != "auto" else "bfloat16" if stored in ("BF16", "F8_E4M3", "I4") else "float32"


def open_dense(source: str | Path) -> tuple[Tensors, dict[str, Any], dict[str, Any]]:
    """The tensors of a dense model, the keys of its config.json, and JSON files that are to stand beside it, by name.
    A head that is tied to the embedding, but has other values, counts as untied, with a warning."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        from ..checkpoint.gguf_file import GGUFFile  # its library takes a tenth of a second

        gguf = GGUFFile(path)
        return gguf, gguf.keys, gguf.texts
    folder = resolve(source)
    files, keys = TensorFiles(folder), read_json(folder / "config.json", ConfigError, finite=False)
    if keys.get("tie_word_embeddings") is True and has_own_head(files):
        keys["tie_word_embeddings"] = False
    return files, keys, {}


def made_rows(made: DenseAsV3, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    return (rows.to(dtype) for rows in made.rows(name))


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. errors: who computed the V3 form -> ||x - y|| / ||x|| of the logits of all texts, and the
    share of positions with the same best token. equal: texts whose greedy continuation, of `new_tokens` at most, is the
    same, of `texts`."""

    errors: dict[str, tuple[float, float]]
    equal: int
    texts: int
    new_tokens: int

    def __str__(self) -> str:
        lines = [f"{who}: relative logit error {error:.1e}, same best token at {same:.2%} of positions"
                 for who, (error, same) in self.errors.items()]
        return "\n".join([*lines, f"{self.new_tokens} greedy tokens equal for {self.equal} of {self.texts} texts"])


def transformers_library() -> ModuleType:
    """The library that `compare` needs. Raises ConfigError without it."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("check: needs the transformers library: pip install 'moe-dr[test]'") from None
    return transformers


@torch.inference_mode()
def compare(source: str | Path, out: str | Path, texts: Sequence[str] = TEXTS) -> Comparison:
    """Compare a dense model with its V3 form, in float32: the logits of `texts` through transformers and here, and the
    tokens that transformers continues them with; of a context that is shorter, the beginnings that fit. Raises
    ConfigError without transformers."""
    hf = transformers_library()
    path = Path(source).expanduser()
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name} if (
        path.suffix == ".gguf") else {"pretrained_model_name_or_path": resolve(source)}
    dense = hf.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    v3 = hf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    others: dict[str, Callable[[Tensor], Tensor]] = {
        f"{type(v3).__name__} in transformers": lambda ids: v3(ids).logits, "here": load_model(out, "float32")}
    tokenizer = Tokenizer.load(out)
    sums = {who: [0.0, 0.0, 0] for who in others}
    context = v3.config.max_position_embeddings
    new_tokens = min(NEW_TOKENS, max(1, context // 2))
    greedy, equal, positions = hf.GenerationConfig(max_new_tokens=new_tokens, do_sample=False), 0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)[: max(1, context - new_tokens)]])
        want = dense(ids).logits
        positions += ids.numel()
        for who, other in others.items():
            got = other(ids)
            sums[who][0] += float((got - want).double().square().sum())
            sums[who][1] += float(want.double().square().sum())
            sums[who][2] += int((got.argmax(-1) == want.argmax(-1)).sum())
        mask = torch.ones_like(ids)
        answers = (model.generate(ids, attention_mask=mask, generation_config=greedy) for model in (dense, v3))
        equal += torch.equal(*answers)
    return Comparison({who: ((lost / whole) ** 0.5, same / positions) for who, (lost, whole, same) in sums.items()},
                      equal, len(texts), new_tokens)
