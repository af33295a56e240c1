"""Who of a pool serves a text, decided by numpy alone: reads the file that `deepseek route distill POOL OUT` wrote.

    python examples/edge_router.py router.npz "Who may end a contract?"

Nothing of the package is imported, so this file can be copied to a device. docs/routing.md describes the format.
"""

import json
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np


class EdgeRouter:
    """names: of the members. threshold: the probability below which the base model answers alone."""

    def __init__(self, path: str) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.arrays = dict(file)
        self.about = json.loads(self.arrays["about"].tobytes())
        self.names, self.threshold = self.about["names"], self.about["threshold"]
        self.bits = len(self.arrays["sequence"]).bit_length() - 1
        self.row = {name: {int(crc): i for i, crc in enumerate(self.arrays[name])} for name in ("term", "known")}
        self.stop, self.piece = set(self.about["stop"]), re.compile(self.about["piece"])

    def probabilities(self, text: str) -> np.ndarray:
        """Of every member; all 0 where the text says nothing."""
        rows, scale = self.sequences(text[: self.about["sequences_read"]])
        sums = np.take(self.arrays["sequence"], rows, axis=0).sum(0, dtype=np.int32)
        logits = sums * self.arrays["sequence_scale"] * scale + self.arrays["bias"]
        size = min(len(text), self.about["read"])
        logits *= size / (size + self.about["form"])
        counts = Counter(zlib.crc32(term.encode()) for term in self.terms(text[: self.about["read"]]))
        own, known = self.weighed(counts, "term")
        more, also = self.weighed(counts, "known")
        if not scale and not known + also:
            return np.zeros(len(self.names))
        share = self.about["share"] * np.exp(-known / self.about["short"])
        logits += (1 - share) * own + share * more
        e = np.exp((logits - logits.max()) / self.about["temperature"])
        return e / e.sum()

    def weighed(self, counts: dict[int, int], name: str) -> tuple[np.ndarray, int]:
        """(logits of terms, how many are known); name: `term`, or `known` for the glossary's."""
        known = [crc for crc in counts if crc in self.row[name]]
        if not known:
            return np.zeros(len(self.names)), 0
        n = np.array([counts[crc] for crc in known], np.float32)
        weights = np.take(self.arrays[f"{name}_weight"], [self.row[name][crc] for crc in known], axis=0)
        sums = n / (n + self.about["k1"]) @ weights * self.arrays[f"{name}_scale"]
        return sums / np.sqrt(len(known)), len(known)

    def route(self, text: str) -> dict[str, float]:
        """The members that serve a text, with weights that sum to 1; {} where the base answers alone."""
        p = self.probabilities(text)
        best = [i for i in np.argsort(-p, kind="stable")[: self.about["top"]] if p[i] >= (1 - 1e-6) / len(p)]
        if p.max() < self.threshold or not p.any():
            return {}
        kept = [i for i in best if p[i] >= self.about["min_weight"] * p[best].sum()]
        return {self.names[i]: float(p[i] / p[kept].sum()) for i in kept}

    def terms(self, text: str) -> Iterator[str]:
        """Stems of words, and pairs of Chinese characters."""
        for match in self.piece.finditer(unicodedata.normalize("NFKC", text).lower()):
            if chinese := match[1]:
                pairs = [chinese[i : i + 2] for i in range(len(chinese) - 1)] or [chinese]
                yield from (pair for pair in pairs if pair not in self.stop)
            elif (word := self.stem(match[0])) not in self.stop:
                yield word

    def stem(self, word: str) -> str:
        if word.isascii() and word.isalpha():
            for ending in self.about["endings"]:
                if word.endswith(ending) and len(word) - len(ending) >= 4 and not (ending == "s" and word[-2] in "su"):
                    return word[: -len(ending)]
        return word

    def sequences(self, text: str) -> tuple[np.ndarray, float]:
        """(hashes of all sequences of 2, 3 and 4 characters, 1 / the root of their number)."""
        lengths = self.about["lengths"]
        clean = " ".join(text.lower().split())
        codes = np.frombuffer(clean.ljust(lengths[-1]).encode("utf-32-le", "replace"), np.uint32)
        rows, h = [], codes
        for step in range(1, lengths[-1]):
            h = h[:-1] * np.uint32(0x9E3779B1) + codes[step:]
            if step + 1 in lengths:
                mixed = (h ^ (h >> np.uint32(15))) * np.uint32(0x85EBCA77 + 2 * step)
                rows.append(mixed >> np.uint32(32 - self.bits))
        every = np.concatenate(rows)
        return every, 1 / np.sqrt(len(every)) if clean else 0.0


if __name__ == "__main__":
    for name, weight in EdgeRouter(sys.argv[1]).route(sys.argv[2]).items() or [("base", 1.0)]:
        print(f"{weight:.3f}  {name}")
