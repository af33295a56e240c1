"""Text -> the probability of each member of a pool. Two scorers, both calibrated on samples that they have not seen.

keywords    BM25 with weights of its own for each member, and the glossary's (weights.py). A text without a known term
            has no member.

classifier  the same, plus the logits of a linear classifier over hashed character sequences (deepseek.domain), trained
            on the samples, times n / (n + FORM) for a text of n characters: the one knows what words mean for a domain,
            the other the form of its texts, of which a short request has little. In a pool of more than TRAINED
            members, or where a member has fewer than SAMPLES samples, centroids take its place: hashed sequences with
            inverse frequencies, added up with signs into WIDTH numbers, and cosines with the members' means.

gate        the terms' logits plus what a model's own gates say: which experts of each layer they choose for the tokens
            of the text, as shares h, and COSINE times a ridge regression of the members on sqrt(h); or, where a member
            has fewer than SAMPLES samples, cosines with the members' means, for a named group without any with its
            experts. It costs a prefill of the text for each decision, and one for each of GATE_SAMPLES samples at the
            start.

Probabilities are softmax(logits / temperature). Temperature and threshold come from HELD_OUT of the samples: the
temperature of least cross-entropy, and the threshold that COVERAGE of them reach, at most ENOUGH: a member that is
likelier than all others together always answers. With too few samples the temperature is 1 and the threshold 0.

Shape letters: M members, D numbers of a centroid or of (layer, expert) pairs, N texts.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..domain import READ as CLASSIFIED
from ..domain import DomainClassifier, fit_temperature, held_out_rows, piece, sequences, softmax
from ..errors import ConfigError, DataError, NotFoundError
from ..files import cache_folder
from .routing import READ
from .weights import Terms

if TYPE_CHECKING:
    from .member import PoolMember

KEPT, MOST_KEPT = 1000, 16  # samples of a classifier that is kept in the user's cache; how many of them are
FORM = 200  # characters of which half the classifier's evidence counts
HELD_OUT = 0.1
COVERAGE, ENOUGH = 0.98, 0.5
SAMPLES = 4  # of a member, to hold some out
TRAINED = 64  # members that a classifier tells apart
BITS = 16  # of the classifier's hash
CENTROID_BITS, WIDTH, COSINE = 18, 512, 10.0  # COSINE: what one is worth in logits
GATE_SAMPLES, GATE_READ, RIDGE = 48, 500, 0.03  # of a member; characters of one; of the mean square of sqrt(h)
Progress = Callable[[int, int], None]


class Gates(Protocol):
    """A model's gates. alive: whether the model is still there; histogram: of the tokens of a text, the share of each
    (layer, expert) in its layer, [D]; group: the same of a named group's experts, None where the model has none of that
    name."""

    @property
    def alive(self) -> bool: ...

    def histogram(self, text: str) -> np.ndarray: ...

    def group(self, name: str) -> np.ndarray | None: ...


class Evidence(Protocol):
    """Logits of every member, and whether the text says anything."""

    def logits(self, text: str) -> tuple[np.ndarray, bool]: ...


class Sequences:
    """The trained classifier's evidence."""

    def __init__(self, members: Sequence[PoolMember], seed: int = 0, progress: Progress | None = None,
                 bits: int = BITS) -> None:
        texts = [text for member in members for text in member.samples]
        names = [f"{m:06d}" for m, member in enumerate(members) for _ in member.samples]  # sorted as members are

        def train() -> DomainClassifier:
            return DomainClassifier.train(texts, names, bits=bits, held_out=HELD_OUT, seed=seed, progress=progress)[0]

        self.model = train() if len(texts) < KEPT else _kept(texts, names, f"{seed} {bits} {HELD_OUT}", train)

    def logits(self, text: str) -> tuple[np.ndarray, bool]:
        logits_NM, empty_N = self.model.logits([text])
        return logits_NM[0] * np.float32(form_share(text)), not empty_N[0]


def form_share(text: str) -> float:
    """How much of the classifier's evidence counts in a text."""
    size = min(len(text), READ)
    return size / (size + FORM)


def _kept(texts: Sequence[str], names: Sequence[str], settings: str,
          train: Callable[[], DomainClassifier]) -> DomainClassifier:
    """A classifier from the user's cache, or a trained one, which is put there. Its key: texts, names, settings and the
    code that trains. A damaged file is made anew."""
    key = hashlib.sha256(settings.encode() + Path(inspect.getfile(DomainClassifier)).read_bytes())
    for name, text in zip(names, texts, strict=True):
        own = text.encode("utf-8", "surrogatepass")
        key.update(f"{name} {len(own)} ".encode() + own)
    path = cache_folder() / "classifiers" / f"{key.hexdigest()}.npz"
    try:
        model = DomainClassifier.load(path)
        if model.names == tuple(sorted(set(names))):
            return model
    except NotFoundError:
        pass
    except DataError as error:
        warnings.warn(f"{error}; it is trained anew", stacklevel=2)
    model = train()
    try:
        model.save(path, exact=True)
        for old in sorted(path.parent.glob("*.npz"), key=lambda one: one.stat().st_mtime)[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path}: the classifier is not kept: {error.strerror or error}", stacklevel=2)
    return model


class Centroids:
    """Cosines with the means of the members' texts, as evidence."""

    def __init__(self, members: Sequence[PoolMember], samples: Sequence[Sequence[str]]) -> None:
        texts = [[member.domain, *member.keywords, *own] for member, own in zip(members, samples, strict=True)]
        shared_R = np.zeros(1 << CENTROID_BITS, np.int32)
        for own in texts:
            shared_R[np.unique(sequences([text[:CLASSIFIED] for text in own], CENTROID_BITS)[0])] += 1
        self.inverse_R = np.log1p(len(members) / (1.0 + shared_R)).astype(np.float32)
        self.centroid_MD = np.stack([_unit(np.sum([self._sketch(text) for text in own], axis=0)) for own in texts])

    def _sketch(self, text: str) -> np.ndarray:
        row_S = sequences([text[:CLASSIFIED]], CENTROID_BITS)[0]
        sign_S = np.where(row_S & WIDTH, np.float32(1), np.float32(-1))
        return _unit(np.bincount(row_S % WIDTH, sign_S * self.inverse_R[row_S], WIDTH).astype(np.float32))

    def logits(self, text: str) -> tuple[np.ndarray, bool]:
        return self.centroid_MD @ self._sketch(text) * np.float32(COSINE), bool(text.strip())


class GateEvidence:
    """What a model's gates do with the text, as evidence. Raises ConfigError for a member of which nothing is known."""

    def __init__(self, members: Sequence[PoolMember], samples: Sequence[Sequence[str]], gates: Gates,
                 progress: Progress | None = None) -> None:
        self.gates = gates
        total, done, rows_MND = sum(map(len, samples)), 0, list[np.ndarray]()
        for member, own in zip(members, samples, strict=True):
            group_D = None if own else gates.group(member.name)
            if not own and group_D is None:
                raise ConfigError(f"scorer = gate: {member.name}: must have samples, or be a named group of the model")
            rows = [_unit(np.sqrt(group_D))] if group_D is not None else []
            for text in own:
                rows.append(self._features(text))
                if progress is not None:
                    progress(done := done + 1, total)
            rows_MND.append(np.stack(rows))
        self.bias_M = np.zeros(len(members), np.float32)
        if trained(members):
            member_N = np.repeat(np.arange(len(members)), [len(own) for own in rows_MND])
            x_ND, y_NM = np.concatenate(rows_MND), np.eye(len(members), dtype=np.float32)[member_N]
            y_NM = y_NM / y_NM.sum(0)  # every member counts the same
            weight_N = y_NM.sum(1)
            mean_D, mean_M = weight_N @ x_ND / weight_N.sum(), y_NM.sum(0) / weight_N.sum()
            centred_ND = x_ND - mean_D
            gram_DD = (centred_ND * weight_N[:, None]).T @ centred_ND
            ridge = RIDGE * np.trace(gram_DD) / len(gram_DD)
            target_NM = y_NM - weight_N[:, None] * mean_M
            w_DM = np.linalg.solve(gram_DD + ridge * np.eye(len(gram_DD)), centred_ND.T @ target_NM)
            self.weight_MD = w_DM.T.astype(np.float32)
            self.bias_M = (mean_M - mean_D @ w_DM).astype(np.float32)
        else:
            self.weight_MD = np.stack([_unit(rows.mean(0)) for rows in rows_MND])

    def _features(self, text: str) -> np.ndarray:
        return _unit(np.sqrt(self.gates.histogram(text[:GATE_READ])))

    def logits(self, text: str) -> tuple[np.ndarray, bool]:
        return (self.weight_MD @ self._features(text) + self.bias_M) * np.float32(COSINE), bool(text.strip())


def _unit(v_D: np.ndarray) -> np.ndarray:
    return v_D / max(float(np.sqrt(v_D @ v_D)), 1e-9)


class SummedScorer:
    """Evidence added up, calibrated: the interface of both scorers. terms: the first of it. threshold: the probability
    below which no member fits."""

    def __init__(self, terms: Terms, *more: Evidence) -> None:
        self.terms, self.more = terms, more
        self.temperature, self.threshold = 1.0, 0.0

    def logits(self, text: str) -> tuple[np.ndarray, bool]:
        logits_M, said = self.terms.logits(text)
        for one in self.more:
            also_M, spoken = one.logits(text)
            logits_M, said = logits_M + also_M, said or spoken
        return logits_M, said

    def probabilities(self, text: str) -> np.ndarray:
        """Of every member; 0 for all where the text says nothing."""
        logits_M, said = self.logits(text)
        return softmax(logits_M[None] / self.temperature)[0] if said else np.zeros(len(logits_M))

    def keywords(self, text: str, member: int) -> dict[str, float]:
        return self.terms.keywords(text, member)

    def calibrate(self, texts: Sequence[str], member_N: np.ndarray, seed: int = 0) -> None:
        """Set temperature and threshold by texts that were not looked at, and their members: half of them whole, of the
        others a piece, since many requests are short."""
        draw = np.random.default_rng(seed)
        texts = [text if i % 2 else piece(text, draw.random(), draw.random()) for i, text in enumerate(texts)]
        found = [self.logits(text) for text in texts]
        said_N = np.array([said for _, said in found])
        logits_NM = np.stack([logits for logits, _ in found])[said_N]
        self.temperature = fit_temperature(logits_NM, member_N[said_N])
        sure_N = softmax(logits_NM / self.temperature).max(1)
        self.threshold = min(ENOUGH, float(np.quantile(sure_N, 1 - COVERAGE)))


def trained(members: Sequence[PoolMember]) -> bool:
    """Whether the samples suffice for a trained classifier and for calibration."""
    return 1 < len(members) <= TRAINED and all(len(member.samples) >= SAMPLES for member in members)


def held_out(members: Sequence[PoolMember]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(texts_N of all samples, member_N, out_N: those that no scorer looks at before it is calibrated)."""
    member_N = np.array([m for m, member in enumerate(members) for _ in member.samples], np.int64)
    texts = [text for member in members for text in member.samples]
    return texts, member_N, held_out_rows(texts, member_N, [member.name for member in members], HELD_OUT)


def _some(samples: Sequence[str]) -> list[str]:
    """GATE_SAMPLES of a member's samples, spread over all."""
    step = max(1.0, len(samples) / GATE_SAMPLES)
    return [samples[int(i * step)] for i in range(min(len(samples), GATE_SAMPLES))]


def make_scorer(members: Sequence[PoolMember], name: str, seed: int = 0, progress: Progress | None = None,
                bits: int = BITS, gates: Gates | None = None, glossary: bool = True) -> SummedScorer:
    """A calibrated scorer of some members. name: `keywords`, `classifier` or `gate`. bits: of the classifier's hash.
    gates: of the model, for `gate`; raises ConfigError without. glossary: whether it is asked."""
    if name == "gate":
        if gates is None:
            raise ConfigError("scorer = gate: asks the gates of a model: must be used with one, as LLM(MODEL, pool=…)")
        members = [replace(one, samples=_some(one.samples)) for one in members]
    enough = trained(members)
    if enough:
        texts, member_N, out_N = held_out(members)
        seen = [[texts[i] for i in np.flatnonzero((member_N == m) & ~out_N)] for m in range(len(members))]
    else:
        seen = [list(member.samples) for member in members]
    more: list[Evidence] = []
    if name == "classifier":
        more = [Sequences(members, seed, progress, bits) if enough else Centroids(members, seen)]
    elif gates is not None and name == "gate":
        more = [GateEvidence(members, seen, gates, progress)]
    scorer = SummedScorer(Terms(members, seen, glossary), *more)
    if enough:
        scorer.calibrate([texts[i] for i in np.flatnonzero(out_N)], member_N[out_N], seed)
    return scorer
