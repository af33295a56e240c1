"""tiktoken's vocabularies -> tokenizer.json with equal ids.

`tiktoken.model` has a line for every token, its bytes in base64 and its rank, which is its id. Text is cut into pieces
by a pattern; a piece that is a token is that token, else its bytes are merged: of all neighbours whose joined bytes are
a token, those of the lowest rank, the leftmost first, until none are left.

The file says nothing of the pattern. Models bring it as Python code (`tokenization_*.py`), which is never run here: the
patterns of known families are data below. A code file that shows another pattern is an error.

tokenizer.json wants the two parts of every merge. Those are what the merging of the token's own bytes comes to last,
and no others: merges inside a stretch of text whose ends nothing crosses take place in the order that they would have
without the rest of the text, so wherever a token is merged, it is of the same two parts. A token that its own bytes
do not come to has no merge, and is found as a whole piece alone (`ignore_merges`).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import DataError, shown
from .files import read_json, read_text

FILE = "tiktoken.model"
# The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, then U+0100 and on
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}
_CHARACTERS = {b: character for character, b in BYTES.items()}

_UPPER, _LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_START, _END = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Moonlight, Kimi-VL, Kimi-K2: Chinese; words that end in small letters, and others; digits by threes; the rest
PATTERNS: dict[str, tuple[str, ...]] = {"kimi": (
    r"[\p{Han}]+", f"{_START}{_UPPER}*{_LOWER}+{_END}", f"{_START}{_UPPER}+{_LOWER}*{_END}", r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")}
# by tokenizer_config.json's auto_map, its tokenizer_class, and config.json's model_type
FAMILIES = {"tokenization_moonshot": "kimi", "tokenization_kimi": "kimi", "TikTokenTokenizer": "kimi",
            "kimi_k2": "kimi", "kimi_vl": "kimi", "kimi_k25": "kimi"}


def convert(folder: Path, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json's text, tokenizer_config.json's keys for it) of a folder with a `tiktoken.model`. settings: the
    keys of its tokenizer_config.json. Raises DataError naming the file."""
    ranks = read_ranks(folder / FILE)
    pattern = "|".join(PATTERNS[_family(folder, settings)])
    added = _added(settings.get("added_tokens_decoder"), len(ranks), folder / "tokenizer_config.json")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": level, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {_spelt(token): rank for token, rank in ranks.items()},
            "merges": [[_spelt(part) for part in pair] for pair in merges(ranks)]}}
    kept = {key: value for key, value in settings.items() if key != "auto_map"}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return json.dumps(definition, ensure_ascii=False, allow_nan=False), kept


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank, by rank. Raises DataError naming the file and the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not token or token in ranks or not rank.isdecimal():
                raise ValueError
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{file}: line {number} is {shown(line)}: must be a token in base64, new, and its rank"
                            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{file}: the ranks of its {len(ranks):,} tokens must be 0 to {len(ranks) - 1:,}, each once")
    if missing := [b for b in range(0xF5) if b not in (0xC0, 0xC1) and bytes([b]) not in ranks]:  # those of UTF-8
        raise DataError(f"{file}: byte {missing[0]:#04x} is no token, so not every text has tokens")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of every token that merging makes, by rank."""
    out = []
    for token in ranks:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, -1) for a, b in pairwise(parts)]
            if (best := min((rank for rank in joined if rank >= 0), default=-1)) < 0:
                break
            at = joined.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            out.append((parts[0], parts[1]))
    return out


def _spelt(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))


def _family(folder: Path, settings: Mapping[str, Any]) -> str:
    """Which of the known patterns a folder's text is cut by."""
    places = settings.get("auto_map")
    code = places.get("AutoTokenizer") if isinstance(places, dict) else None
    code = code[0] if isinstance(code, list) and code else code
    about = folder / "config.json"
    model = read_json(about, finite=False).get("model_type") if about.is_file() else None
    names = [str(code).partition(".")[0].rpartition("--")[2], settings.get("tokenizer_class"), model]
    found = next((FAMILIES[name] for name in names if isinstance(name, str) and name in FAMILIES), None)
    if found is None:
        raise DataError(f"{folder / FILE}: how its text is cut is not known here (tokenizer_class = "
                        f"{shown(names[1])}, model_type = {shown(model)}): known are {', '.join(FAMILIES)}; put a "
                        "tokenizer.json beside it")
    for file in sorted(folder.glob("tokenization_*.py")):
        if "\\p{" in (text := read_text(file)) and not all(part in text for part in PATTERNS[found]):
            raise DataError(f"{file}: cuts text by another pattern than is known here for {found}: put a "
                            "tokenizer.json beside it")
    return found


def _added(decoder: Any, first: int, origin: Path) -> list[dict[str, Any]]:
    """The special tokens: those that are named, and the places between them, which have names too."""
    named: dict[int, dict[str, Any]] = {}
    for key, entry in (decoder or {}).items() if isinstance(decoder, dict | None) else [("", decoder)]:
        if not (key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
                and entry["content"] and first <= int(key) < first + (1 << 16)):
            raise DataError(f"{origin}: added_tokens_decoder: {key!r:.40} = {shown(entry)}: must be an id from "
                            f"{first:,} on, after the vocabulary's, and an object with content")
        named[int(key)] = entry
    return [{"id": i, "content": named[i]["content"] if i in named else f"<|reserved_token_{i}|>",
             "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": bool(named.get(i, {}).get("special", True))} for i in range(first, max(named, default=-1) + 1)]
