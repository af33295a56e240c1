"""The classifier of a pool as one small file that decides with numpy alone.

An .npz without pickled objects, at most MOST bytes:

    about       JSON: format, names, temperature, threshold, and what makes terms and sequences of a text
    sequence    int8 [2^bits, M], sequence_scale [M], bias [M]: the linear classifier over hashed character sequences
    term        uint32 [T]: CRC-32 of the terms' UTF-8, sorted; term_weight uint8 [T, M], term_scale [M]: their weights
    known       the same of the glossary's terms; known_weight, known_scale

The weights are the pool's in 8 bits; of its terms those are kept that change most logits. examples/edge_router.py reads
it without this package.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..domain import LENGTHS, sequences, softmax
from ..domain import READ as CLASSIFIED
from ..errors import ConfigError, DataError, NotFoundError
from ..files import to_json, write_atomically
from .pool import ExpertPool
from .routing import MIN_WEIGHT, READ, TOP
from .scorers import BITS, FORM, SAMPLES, TRAINED, Progress, Sequences, held_out, make_scorer, trained
from .terms import ENDINGS, PIECE, STOP, terms
from .weights import K1, SHORT, TermWeights

MOST = 1_000_000  # bytes of a file
SEQUENCES = 0.6  # of them for the sequences' weights


def distill(pool: ExpertPool, path: str | Path, progress: Progress | None = None) -> float:
    """Write the classifier of a pool as a file of at most MOST bytes; returns on which share of the pool's held-out
    samples file and classifier choose the same. Raises ConfigError where a member has too few samples for a
    classifier, or there are too many members. progress: called with (batches done, batches)."""
    if not trained(pool.members):
        few = [f"{member.name}: {len(member.samples)} samples: each member must have at least {SAMPLES}"
               for member in pool.members if len(member.samples) < SAMPLES]
        raise ConfigError(few[0] if few else f"a pool of {len(pool)} members: must have 2 to {TRAINED}")
    members = len(pool)
    bits = min(BITS, int(np.log2(SEQUENCES * MOST / members)))
    teacher = pool.scorer if pool.scorer_name == "classifier" else (
        make_scorer(pool.members, "classifier", pool.seed, progress, glossary=pool.glossary))
    scorer = teacher if bits == BITS else make_scorer(pool.members, "classifier", pool.seed, progress, bits,
                                                             glossary=pool.glossary)
    [evidence] = scorer.more
    assert isinstance(evidence, Sequences)
    model = evidence.model
    sequence, sequence_scale = _rounded(model.weights_SK, 127)
    weights, glossary = scorer.terms.own, scorer.terms.glossary
    dense_VM, glossary_VM = _dense(weights), _dense(glossary or TermWeights([{}] * members))
    texts, _, out_N = held_out(pool.members)
    seen = Counter(term for text, out in zip(texts, out_N, strict=True) if not out for term in set(terms(text[:READ])))
    seen_V = np.array([1 + seen[term] for term in weights.words])
    most = (MOST - sequence.size - 20_000) // (members + 4) - len(glossary_VM)
    kept = np.argsort(-(np.ptp(dense_VM, axis=1) * seen_V), kind="stable")[:most]
    term, term_weight, term_scale = _hashed([weights.words[i] for i in kept], dense_VM[kept])
    known, known_weight, known_scale = _hashed(glossary.words if glossary else [], glossary_VM)
    about = {"format": 3, "names": [member.name for member in pool.members], "temperature": scorer.temperature,
             "threshold": scorer.threshold, "top": TOP, "min_weight": MIN_WEIGHT, "k1": K1, "read": READ,
             "form": FORM, "sequences_read": CLASSIFIED, "lengths": LENGTHS, "stop": sorted(STOP), "endings": ENDINGS,
             "piece": PIECE, "share": scorer.terms.share if glossary else 0, "short": SHORT}
    buffer = io.BytesIO()
    np.savez(buffer, about=np.frombuffer(to_json(about, ensure_ascii=False).encode(), np.uint8), sequence=sequence,
             sequence_scale=sequence_scale, bias=model.bias_K.astype(np.float32), term=term,
             term_weight=term_weight, term_scale=term_scale, known=known, known_weight=known_weight,
             known_scale=known_scale)
    if (size := buffer.tell()) > MOST:
        raise ConfigError(f"{path}: {size:,} bytes: must be at most {MOST:,}; names are too long")
    write_atomically(path, buffer.getvalue())
    router = DistilledRouter.load(path)
    asked = [texts[i] for i in np.flatnonzero(out_N)]
    return float(np.mean([router.probabilities(text).argmax() == teacher.probabilities(text).argmax()
                          for text in asked]))


def _dense(weights: TermWeights) -> np.ndarray:
    dense_VM = np.zeros((len(weights.words), weights.members), np.float32)
    dense_VM[np.repeat(np.arange(len(dense_VM)), np.diff(weights.first_V)), weights.member_P] = weights.weight_P
    return dense_VM


def _hashed(words: Sequence[str], weight_VM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hashes of terms in their order, weights as integers, scales)."""
    hash_V = np.array([zlib.crc32(word.encode()) for word in words], np.uint32)
    order = np.argsort(hash_V, kind="stable")
    return hash_V[order], *_rounded(weight_VM[order], 255)


def _rounded(weights: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(integers, scales by column) of weights."""
    scale = np.maximum(np.abs(weights).max(0, initial=0), 1e-9) / most
    return np.rint(weights / scale).astype(np.int8 if most == 127 else np.uint8), scale.astype(np.float32)


class DistilledRouter:
    """What `distill` wrote: probabilities of the members, `names`, for a text. threshold: below it the base answers."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        about = json.loads(arrays["about"].tobytes())
        if about["format"] != 3 or tuple(about["lengths"]) != LENGTHS:
            raise DataError("a router of another format")
        self.names = tuple(about["names"])
        self.temperature, self.threshold = float(about["temperature"]), float(about["threshold"])
        self._rows = {name: {int(h): i for i, h in enumerate(arrays[name])} for name in ("term", "known")}
        self._arrays, self._form, self._share, self._short = arrays, about["form"], about["share"], about["short"]
        self._bits = len(arrays["sequence"]).bit_length() - 1

    @classmethod
    def load(cls, path: str | Path) -> DistilledRouter:
        """Raises NotFoundError, or DataError naming the file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(dict(file))
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such file") from None
        except Exception as error:  # zip, JSON and numpy each have their own for a damaged file
            raise DataError(f"{path}: not a distilled router: {error}") from None

    def probabilities(self, text: str) -> np.ndarray:
        """Of the members, in the order of `names`; 0 for all where the text says nothing."""
        arrays = self._arrays
        row_S, _, scale_N = sequences([text[:CLASSIFIED]], self._bits)
        sums_M = np.take(arrays["sequence"], row_S, axis=0).sum(0, dtype=np.int32)
        logits_M = sums_M * arrays["sequence_scale"] * scale_N[0] + arrays["bias"]
        size = min(len(text), READ)
        logits_M *= size / (size + self._form)
        counts = Counter(zlib.crc32(term.encode()) for term in terms(text[:READ]))
        own_M, known = self._terms(counts, "term")
        more_M, also = self._terms(counts, "known")
        if not scale_N[0] and not known + also:
            return np.zeros(len(self.names))
        share = self._share * np.exp(-known / self._short)
        logits_M = logits_M + (1 - share) * own_M + share * more_M
        return softmax(logits_M[None] / self.temperature)[0]

    def _terms(self, counts: Mapping[int, int], name: str) -> tuple[np.ndarray, int]:
        """(logits of terms, how many of them are known)."""
        row = self._rows[name]
        known = [h for h in counts if h in row]
        if not known:
            return np.zeros(len(self.names)), 0
        n_T = np.array([counts[h] for h in known], np.float32)
        weight_TM = np.take(self._arrays[f"{name}_weight"], [row[h] for h in known], axis=0)
        return (n_T / (n_T + K1)) @ weight_TM * self._arrays[f"{name}_scale"] / np.sqrt(len(known)), len(known)
