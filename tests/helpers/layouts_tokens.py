"""A tiktoken vocabulary as Moonlight and Kimi-K2 have one, small, trained on the project's own text."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from deepseek.tiktokens import BYTES, FILE, PATTERNS
from tests.helpers import ROOT

# special tokens by their distance from the vocabulary's end, as Moonlight names them: most places have no name
SPECIAL = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
           17: "<|im_middle|>", 22: "[UNK]", 23: "[PAD]"}
CODE = """# Never run: a checkpoint's code only says how its text is cut.
raise SystemExit("the checkpoint's code was run")
pat_str = "|".join([%s])
"""
TEMPLATE = (
    "{% for message in messages %}<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>"
    "{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}")


@cache
def ranks(size: int = 1000) -> Mapping[bytes, int]:
    """Token -> rank of a byte-level BPE that is trained behind the family's pattern."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("|".join(PATTERNS["kimi"])), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "README.zh.md", Path(__file__))]
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    vocabulary = learner.get_vocab()
    return {bytes(BYTES[character] for character in token): rank
            for rank, token in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))}


def special(size: int = 1000) -> dict[str, int]:
    return {name: len(ranks(size)) + place for place, name in SPECIAL.items()}


def write(folder: Path, module: str = "tokenization_moonshot", size: int = 1000) -> None:
    """tiktoken.model, tokenizer_config.json and the code beside them."""
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text("".join(
        f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks(size).items()))
    named = {str(i): {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                      "special": True} for name, i in special(size).items()}
    settings: dict[str, Any] = {
        "added_tokens_decoder": named, "additional_special_tokens": [*SPECIAL.values()][2:7], "bos_token": "[BOS]",
        "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]", "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30, "tokenizer_class": "TikTokenTokenizer", "chat_template": TEMPLATE,
        "auto_map": {"AutoTokenizer": [f"{module}.TikTokenTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / f"{module}.py").write_text(CODE % ", ".join(f'r"""{part}"""' for part in PATTERNS["kimi"]))
