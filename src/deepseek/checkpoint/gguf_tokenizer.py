"""The vocabulary of a GGUF file -> tokenizer.json, tokenizer_config.json (with the chat template) and
generation_config.json.

    gpt2     byte-level BPE: tokens and merges are in the file; how text is cut is a name (tokenizer.ggml.pre), whose
             patterns are data below
    llama    SentencePiece's BPE: tokens have scores, and two tokens merge, those of the highest score first, whose
             joined text is a token; characters that are none fall back to bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER, _BEFORE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
_TEKKEN = (f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|" + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
# name -> (pattern whose matches are pieces, None for GPT-2's; whether whole tokens come before merges; normal form)
_CUTS: dict[str, tuple[str | None, bool, str | None]] = {
    **dict.fromkeys(("default", "gpt-2", "olmo"), (None, False, None)),
    **dict.fromkeys(("smollm", "starcoder"), (r"\p{N}", False, None)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx"), (_LLAMA3, True, None)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2, False, "NFC")),
    "tekken": (_TEKKEN, True, None)}
_DIGITS = ("smollm", "starcoder")  # their pattern comes before GPT-2's
_BEGIN = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a text begins with its bos_token where nothing is said of it
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens
_SPACE = "\u2581"


def tokenizer_files(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """File name -> JSON. Raises CheckpointError naming the file for a vocabulary that is not known here."""
    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    tokens, kind = field("tokens"), field("model")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens: must be a list of texts")
    kinds = field("token_type", [1] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens: must be different, with a token_type each")
    if kind == "gpt2":
        definition, begins = _byte_level(field, vocabulary, path)
    elif kind == "llama":
        definition, begins = _sentence_piece(field, vocabulary, path), True
    else:
        raise CheckpointError(f"{path}: tokenizer.ggml.model = {shown(kind)}: must be gpt2 or llama")
    definition["added_tokens"] = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": what == _CONTROL} for i, (token, what) in enumerate(zip(tokens, kinds, strict=True))
        if what in (_CONTROL, _USER_DEFINED)]
    ids = {key: field(f"{name}_token_id") for key, name in (
        ("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"), ("eot", "eot"))}
    for key, i in ids.items():
        if i is not None and not (type(i) is int and 0 <= i < len(tokens)):
            raise CheckpointError(f"{path}: tokenizer.ggml: {key} = {shown(i)}: must be the id of a token")
    definition["post_processor"] = _template(field("add_bos_token", begins), field("add_eos_token", False), tokens, ids)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | {
        f"{key}_token": tokens[i] for key, i in ids.items() if i is not None and key != "eot"}
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    ends = sorted({i for key, i in ids.items() if key in ("eos", "eot") and i is not None})
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
                  "pad_token_id": ids["pad"]}
    return {"tokenizer.json": definition, "tokenizer_config.json": settings,
            "generation_config.json": {key: value for key, value in generation.items() if value is not None}}


def _model(vocabulary: Mapping[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": merges} | changes


def _byte_level(field: Any, vocabulary: Mapping[str, int], path: Path) -> tuple[dict[str, Any], bool]:
    name = field("pre", "default")
    if name not in _CUTS:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre = {shown(name)}: how it cuts text is not known here (known "
                              f"are {', '.join(_CUTS)}): take the model's safetensors")
    pattern, whole, form = _CUTS[name]
    merges = [merge.split(" ") for merge in field("merges", [])]
    if not merges or not all(len(merge) == 2 and {*merge, "".join(merge)} <= vocabulary.keys() for merge in merges):
        raise CheckpointError(f"{path}: tokenizer.ggml.merges: must be pairs of tokens that make a token")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": pattern is None or name in _DIGITS}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [cut, level] if pattern is not None else [level]
    return {"version": "1.0", "truncation": None, "padding": None,
            "normalizer": None if form is None else {"type": form},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": level,
            "model": _model(vocabulary, merges, ignore_merges=whole)}, name in _BEGIN


def _sentence_piece(field: Any, vocabulary: Mapping[str, int], path: Path) -> dict[str, Any]:
    scores = field("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores: must be a number for every token")
    merges = []
    for token, i in vocabulary.items():
        parts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(a, b) for a, b in parts if a in vocabulary and b in vocabulary]
        merges += [(scores[i], len(a), len(b), a, b) for a, b in sorted(
            known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    unknown = field("unknown_token_id", 0)
    name = next((token for token, i in vocabulary.items() if i == unknown), None)
    before = [{"type": "Prepend", "prepend": _SPACE}] if field("add_space_prefix", True) else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
    return {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
            "normalizer": {"type": "Sequence", "normalizers": [
                *before, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, *after]},
            "model": _model(vocabulary, [[a, b] for *_, a, b in merges], unk_token=name, fuse_unk=True,
                            byte_fallback=True)}


def _template(bos: Any, eos: Any, tokens: list[str], ids: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is put around a text."""
    first = [tokens[ids["bos"]]] if bos and ids["bos"] is not None else []
    last = [tokens[ids["eos"]]] if eos and ids["eos"] is not None else []
    if not first and not last:
        return None

    def row(part: str, kind: int) -> list[dict[str, Any]]:
        return [*({"SpecialToken": {"id": token, "type_id": kind}} for token in first),
                {"Sequence": {"id": part, "type_id": kind}},
                *({"SpecialToken": {"id": token, "type_id": kind}} for token in last)]

    named = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in first + last}
    return {"type": "TemplateProcessing", "single": row("A", 0), "pair": row("A", 0) + row("B", 1),
            "special_tokens": named}
