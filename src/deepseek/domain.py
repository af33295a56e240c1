"""Text -> domain: keyword rules that say nothing when unsure, and a small trained classifier that says how sure it is.

Rules. A domain has keywords, Chinese and English. The domain with the most different keywords in a text wins if there
are at least MIN_WORDS of them and twice as many as of the next one. Keywords that begin with a Latin letter are looked
up by their first word among the words of the text; all others are one regular expression in the shape of a trie.

Classifier. Multinomial logistic regression over the 2-, 3- and 4-character sequences of the lower-cased text (runs of
white space are one space), hashed into 2^bits rows:

    logits_K = sum over the sequences s of W[hash(s)] / sqrt(number of sequences) + b

trained by AdaGrad on pieces of MIN_PIECE to PIECE characters cut at random out of every text, so that a short prompt
and a long document are judged alike. A share of the texts is held out by a hash of their content; a temperature is
fitted on one half of it, accuracy and calibration are reported on the other. Same texts, same seed, same bytes.

Where nearly all texts in a language bear one name, the classifier can tell the name by the language, and then every
text in it gets that name: training says so.

Left out: words and their inverse frequencies (Chinese has no spaces), and hidden layers (a linear model over
character sequences separates domains nearly as well, and costs a table look-up a character).

Shape letters: N texts, C characters, S sequences, K names.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DataError, NotFoundError
from .files import read_yaml, write_atomically
from .language import NONE, language

if TYPE_CHECKING:
    import numpy as np

MIN_WORDS = 2
LENGTHS = (2, 3, 4)  # of hashed sequences, in characters
READ = 1000  # characters that the classifier looks at; the rest of a text is taken to be like them
MIN_PIECE, PIECE = 24, 400
BATCH = 256  # texts a step
LOOKED_AT = 100  # texts of a name whose language is determined
ALONE = 0.9  # a language coincides with a name that has so much of it, were all names equally frequent
NOTABLE = 0.2  # and whose own texts are in it as often as that

KEYWORDS: dict[str, str] = {  # separated by |
    "text_expert": "chapter|said he|said she|preface|volume|novel|poem|poet|essay|narrator|once upon a time|"
                   "小说|散文|诗歌|诗人|序言|章回|作家|文学|曰：|之曰|词牌|绝句|律诗",
    "code_expert": "def |import |return |self.|#include|public static|void |fn |let mut|println|std::|=> |==|!=|();|"
                   "const |function(|lambda|null|none:|traceback|compiler|python|javascript|java|rust|algorithm|"
                   "boolean|recursion|api|json|stdout|runtime|debug|elif |typeerror|代码|函数|编程|编译|变量|数组|"
                   "递归|接口|算法|调试|报错|边界条件|线程|数据库",
    "math_expert": "equation|theorem|triangle|\\frac|\\times|\\sqrt|\\div|\\left(|fraction|polynomial|integer|"
                   "divisible|remainder|perimeter|probability|multiply|subtract|arithmetic|algebra|geometry|calculus|"
                   "derivative|integral|how many|quotient|prime number|least common|方程|三角形|分数|小数|整除|余数|"
                   "周长|面积|概率|定理|求证|几何|代数|微积分|导数|积分|多少个|质数|倍数|平方|乘法|除法|数列|正方形|圆柱|自然数",
    "law_expert": "plaintiff|defendant|court|statute|contract|clause|liability|licensor|licensee|lawsuit|attorney|"
                  "jurisdiction|hereby|herein|thereof|legislature|constitution|indemnify|warranty|sublicense|copyright|"
                  "litigation|verdict|felony|appellant|原告|被告|法院|判决|刑法|民法|诉讼|合同|条款|法律|律师|起诉|"
                  "上诉|罪名|有期徒刑|规定|当事人|仲裁|侵权|违约|赔偿|犯罪|检察|公诉|司法|刑事|民事|条例|第一条|法规",
    "finance_expert": "revenue|revenues|net income|dividend|dividends|shareholders|fiscal|assets|liabilities|equity|"
                      "balance sheet|bond|bonds|interest rate|investment|investors|stock|stocks|earnings|cash flow|"
                      "capital|currency|bank|banks|profit|profits|tax|amortization|depreciation|goodwill|million|"
                      "share-based|receivable|payable|inventories|股票|基金|投资|利率|银行|收益|利润|资产|负债|股东|"
                      "财报|营收|融资|债券|分红|市盈率|汇率|会计|审计|净利润|现金流|理财",
    "medical_expert": "patient|patients|disease|diseases|symptom|symptoms|treatment|diagnosis|clinical|cancer|tumor|"
                      "surgery|surgical|therapy|dose|chronic|syndrome|infection|blood|hospital|physician|gene|genes|"
                      "inherited|disorder|medicine|medicines|doctor|prognosis|randomized|cohort|患者|病人|症状|治疗|"
                      "诊断|疾病|医院|医生|药物|手术|癌|肿瘤|感染|血压|糖尿病|临床|剂量|副作用|综合征|发烧|咳嗽",
    "teaching_expert": "student|students|teacher|teachers|lesson|lesson plan|homework|curriculum|classroom|worksheet|"
                       "syllabus|quiz|exercise|exercises|pedagogy|tutor|tutoring|grade|learning objectives|学生|老师|"
                       "教师|教案|课堂|作业|课程|教学|习题|课后|备课|教材|练习题|知识点|年级|小学|中学|教学目标|辅导",
    "dialogue_expert": "user:|assistant:|hello|hi there|thanks|thank you|okay|you're welcome|good morning|goodbye|bye|"
                       "anything else|would you like|can i help|sounds good|你好|您好|谢谢|再见|不客气|好的|请问|"
                       "没问题|嗯|哈哈|是呀|是吗|推荐一|还有什么",
}
NAMES = tuple(KEYWORDS)
_WORD = re.compile("[a-z]+")


class KeywordRules:
    """Keywords by domain. Raises ConfigError for a name without a keyword."""

    def __init__(self, keywords: Mapping[str, Sequence[str]] | None = None) -> None:
        self.keywords = {name: tuple(words) for name, words in (
            keywords or {name: words.split("|") for name, words in KEYWORDS.items()}).items()}
        self._of: dict[str, list[str]] = {}
        for name, words in self.keywords.items():
            if not words or not all(isinstance(word, str) and word.strip() for word in words):
                raise ConfigError(f"rules: {name} = {list(words)!r}: must be a list of keywords")
            for word in words:
                self._of.setdefault(word.lower(), []).append(name)
        self._by_first: dict[str, list[str]] = {}
        for word in self._of:
            if first := _WORD.match(word):
                self._by_first.setdefault(first[0], []).append(word)
        self._trie = trie(word for word in self._of if not _WORD.match(word))
        self._find = re.compile(self._trie or "(?!)")

    @classmethod
    def load(cls, path: str | Path) -> KeywordRules:
        """The built-in rules with those of a YAML or JSON file, {name: [keywords]}, added. Raises NotFoundError, or
        ConfigError naming the file."""
        value = read_yaml(path)  # JSON is YAML too
        if not isinstance(value, dict) or not all(isinstance(words, list) for words in value.values()):
            raise ConfigError(f"{path}: must be an object of names, each with a list of keywords")
        keywords = {name: words.split("|") for name, words in KEYWORDS.items()}
        for name, words in value.items():
            keywords[str(name)] = [*keywords.get(str(name), []), *words]
        try:
            return cls(keywords)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.keywords).encode()).hexdigest()

    def counts(self, text: str) -> dict[str, int]:
        """Different keywords of each domain in the text, those with none left out."""
        low = text[: 4 * READ].lower()
        found = set(self._find.findall(low))
        for first in self._by_first.keys() & set(_WORD.findall(low)):
            found.update(word for word in self._by_first[first] if word == first or word in low)
        counts: dict[str, int] = {}
        for word in found:
            for name in self._of[word]:
                counts[name] = counts.get(name, 0) + 1
        return counts

    def predict(self, text: str) -> str | None:
        """The domain that the keywords agree on, or None."""
        ranked = sorted(((n, name) for name, n in self.counts(text).items()), reverse=True)
        if not ranked or ranked[0][0] < max(MIN_WORDS, 2 * (ranked[1][0] if len(ranked) > 1 else 0)):
            return None
        return ranked[0][1]

    def predict_batch(self, texts: Sequence[str]) -> list[str | None]:
        """`predict` of each text, by the block and mostly without the interpreter, so that threads share the work."""
        import numpy as np
        import polars as pl

        low_N = pl.Series("text", [text[: 4 * READ].lower() for text in texts], pl.String)
        words = list(self._of)
        table = pl.DataFrame({"word": words, "number": range(len(words)), "first": [
            first[0] if (first := _WORD.match(word)) else None for word in words]})

        def found(pattern: str, column: str) -> pl.DataFrame:
            """(row, number, word) where a match of the pattern is the `column` of a keyword."""
            said = pl.DataFrame({"row": np.arange(len(texts)), column: low_N.str.extract_all(pattern)}).explode(column)
            return said.join(table.filter(pl.col(column).is_not_null()), on=column).unique(["row", "number"])

        hits = [found(self._trie, "word").select("row", "number")] if self._trie else []
        for (word, first), part in found(_WORD.pattern, "first").partition_by("word", "first", as_dict=True).items():
            if word != first:
                part = part.filter(low_N.gather(part["row"]).str.contains(str(word), literal=True))
            hits.append(part.select("row", "number"))
        row, number = pl.concat(hits).to_numpy().T if hits else np.zeros((2, 0), np.int64)
        names = sorted(self.keywords)
        count_NK = np.zeros((len(texts), max(2, len(names))), np.int64)
        for k, name in enumerate(names):
            of_name = np.array([name in self._of[word] for word in words])
            count_NK[:, k] = np.bincount(row[of_name[number]], minlength=len(texts))
        second_N, top_N = np.partition(count_NK, -2, axis=1)[:, -2:].T
        sure_N = top_N >= np.maximum(MIN_WORDS, 2 * second_N)
        return [names[k] if sure else None for k, sure in zip(count_NK.argmax(1), sure_N, strict=True)]


def trie(words: Iterable[str]) -> str:
    """A regular expression that matches the longest of the words at a place."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def write(node: dict[str, Any]) -> str:
        branches = [re.escape(c) + write(below) for c, below in sorted(node.items()) if c]
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
        return joined + ("?" if "" in node else "")

    return write(root)


# ---- the classifier -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutReport:
    """What the classifier makes of texts it has not seen, each cut to a piece of up to PIECE characters.

    confusion: [true name][predicted name] counts. at: {confidence: (share of texts at least so sure, accuracy among
    them)}. calibration_error: mean distance of confidence and accuracy over ten equal ranges of confidence. coincide:
    {language: the name that nearly all of its texts bear}."""

    names: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    at: Mapping[float, tuple[float, float]] = field(default_factory=dict)
    calibration_error: float = 0.0
    coincide: Mapping[str, str] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of each name's texts that got it, names without a held-out text left out."""
        return {name: row[i] / sum(row) for i, (name, row) in enumerate(zip(self.names, self.confusion, strict=True))
                if sum(row)}

    @property
    def macro(self) -> float:
        """Mean of the names' accuracies."""
        return sum(self.accuracy.values()) / max(1, len(self.accuracy))

    def table(self) -> str:
        """Accuracy and confusion for people."""
        short = [name.removesuffix("_expert")[:9] for name in self.names]
        lines = [f"{'':<18}{'accuracy':>9}  " + "".join(f"{name:>10}" for name in short)]
        for name, row in zip(self.names, self.confusion, strict=True):
            share = f"{self.accuracy[name]:.1%}" if name in self.accuracy else "-"
            lines.append(f"{name[:17]:<18}{share:>9}  " + "".join(f"{count:>10,}" for count in row))
        lines.append(f"{'macro':<18}{self.macro:>9.1%}  over {sum(map(sum, self.confusion)):,} held-out texts; "
                     f"calibration error {self.calibration_error:.1%}")
        lines += [f"  confidence >= {sure:.2f}: {share:.1%} of the texts, {right:.1%} of them right"
                  for sure, (share, right) in self.at.items()]
        return "\n".join([*lines, *([warning] if (warning := language_warning(self.coincide)) else [])])


class DomainClassifier:
    """names_K, weights_SK (float32), bias_K: what `train` found. temperature divides the logits before the softmax."""

    def __init__(self, names: Sequence[str], weights_SK: np.ndarray, bias_K: np.ndarray, temperature: float) -> None:
        self.names = tuple(names)
        self.weights_SK, self.bias_K, self.temperature = weights_SK, bias_K, temperature

    @classmethod
    def train(
        cls, texts: Sequence[str], names: Sequence[str], *, bits: int = 18, epochs: int = 4, held_out: float = 0.1,
        learning_rate: float = 0.5, seed: int = 0, progress: Callable[[int, int], None] | None = None,
    ) -> tuple[DomainClassifier, HeldOutReport]:
        """Learn from texts and their names. Raises DataError where there are fewer than two names, or a name has too
        few texts to hold one out; warns where a name and a language coincide. progress: called with (batches done,
        batches)."""
        import numpy as np

        if len(texts) != len(names):
            raise DataError(f"{len(texts)} texts and {len(names)} names: must be as many")
        labels = tuple(sorted(set(names)))
        if len(labels) < 2:
            raise DataError(f"a classifier needs at least two names, got {', '.join(labels) or 'none'}")
        y_N = np.searchsorted(np.array(labels), np.array(names))
        out_N = held_out_rows(texts, y_N, labels, held_out)
        rng = np.random.default_rng(seed)
        model = cls(labels, np.zeros((1 << bits, len(labels)), np.float32), np.zeros(len(labels), np.float32), 1.0)
        model._fit(texts, y_N, np.flatnonzero(~out_N), rng, epochs, learning_rate, progress)
        held = np.flatnonzero(out_N)
        pieces = [piece(texts[int(i)], rng.random(), rng.random()) for i in held]
        logits_NK = np.concatenate([model._logits(*sequences(pieces[i : i + BATCH], bits))
                                    for i in range(0, len(pieces), BATCH)])
        half = np.zeros(len(held), bool)
        for k in range(len(labels)):
            half[np.flatnonzero(y_N[held] == k)[::2]] = True
        model.temperature = fit_temperature(logits_NK[half], y_N[held][half])
        coincide = coincidences({name: [texts[int(i)] for i in np.flatnonzero(y_N == k)[np.linspace(
            0, (y_N == k).sum() - 1, LOOKED_AT, dtype=int)]] for k, name in enumerate(labels)})
        if coincide:
            warnings.warn(language_warning(coincide), stacklevel=2)
        return model, _report(labels, softmax(logits_NK[~half] / model.temperature), y_N[held][~half], coincide)

    def _fit(self, texts: Sequence[str], y_N: np.ndarray, train: np.ndarray, rng: np.random.Generator, epochs: int,
             learning_rate: float, progress: Callable[[int, int], None] | None) -> None:
        """AdaGrad over pieces of the texts whose rows are in `train`; rare names count more, up to ten times."""
        import numpy as np

        names, bits = len(self.names), len(self.weights_SK).bit_length() - 1
        class_weight = (len(train) / (names * np.bincount(y_N[train], minlength=names))).astype(np.float32)
        class_weight = np.minimum(class_weight, 10.0)
        squares = np.full_like(self.weights_SK, 1e-6)
        bias_squares = np.full_like(self.bias_K, 1e-6)
        total, done = epochs * -(-len(train) // BATCH), 0
        for _ in range(epochs):
            order = rng.permutation(train)
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                pieces = [piece(texts[int(i)], rng.random(), rng.random()) for i in rows]
                idx_S, starts_N, scale_N = sequences(pieces, bits)
                p_NK = softmax(self._logits(idx_S, starts_N, scale_N))
                p_NK[np.arange(len(rows)), y_N[rows]] -= 1.0
                p_NK *= (class_weight[y_N[rows]] / len(rows))[:, None]
                owner_S = np.repeat(np.arange(len(rows)), np.diff(np.append(starts_N, len(idx_S))))
                order_S = np.sort(idx_S.astype(np.int64) << 32 | np.arange(len(idx_S))) & 0xFFFFFFFF  # stable argsort
                first = np.flatnonzero(np.diff(idx_S[order_S], prepend=-1))
                touched = idx_S[order_S[first]]
                g_SK = np.take(p_NK * scale_N[:, None], owner_S[order_S], axis=0)
                g_UK = np.add.reduceat(g_SK, first, axis=0)  # of the U rows that this batch touches
                squares_UK = np.take(squares, touched, axis=0) + g_UK * g_UK
                squares[touched] = squares_UK
                self.weights_SK[touched] -= learning_rate * g_UK / np.sqrt(squares_UK)
                g = p_NK.sum(0)
                bias_squares += g * g
                self.bias_K -= 0.1 * learning_rate * g / np.sqrt(bias_squares)
                done += 1
                if progress is not None:
                    progress(done, total)

    def predict(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """(names, confidences_N) of the likeliest domains; a text without a sequence gets confidence 0."""
        import numpy as np

        p_NK, empty_N = self.probabilities(texts)
        best = p_NK.argmax(1)
        sure = np.where(empty_N, 0.0, p_NK[np.arange(len(best)), best]).astype(np.float32)
        return [self.names[k] for k in best], sure

    def probabilities(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(p_NK in the order of `names`, empty_N: which texts are too short to say anything)."""
        logits_NK, empty_N = self.logits(texts)
        return softmax(logits_NK / self.temperature), empty_N

    def logits(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(logits_NK in the order of `names`, before the temperature; empty_N as of `probabilities`)."""
        import numpy as np

        bits = len(self.weights_SK).bit_length() - 1
        logits, empty = [np.zeros((0, len(self.names)), np.float32)], [np.zeros(0, bool)]
        for i in range(0, len(texts), 512):
            idx_S, starts_N, scale_N = sequences([text[:READ] for text in texts[i : i + 512]], bits)
            logits.append(self._logits(idx_S, starts_N, scale_N))
            empty.append(scale_N == 0)
        return np.concatenate(logits), np.concatenate(empty)

    def _logits(self, idx_S: np.ndarray, starts_N: np.ndarray, scale_N: np.ndarray) -> np.ndarray:
        import numpy as np

        if not len(starts_N):
            return np.zeros((0, len(self.names)), np.float32)
        rows_SK = np.take(self.weights_SK, idx_S, axis=0)  # five times as fast as weights_SK[idx_S]
        return np.add.reduceat(rows_SK, starts_N, axis=0) * scale_N[:, None] + self.bias_K

    def save(self, path: str | Path, *, exact: bool = False) -> None:
        """A .npz without pickled objects, whole or not at all. exact: with weights of 32 bits, not 16."""
        import numpy as np

        buffer = io.BytesIO()
        about = json.dumps({"format": 1, "names": self.names, "temperature": self.temperature, "lengths": LENGTHS},
                           allow_nan=False)
        np.savez(buffer, about=np.frombuffer(about.encode(), np.uint8), bias=self.bias_K,
                 weights=self.weights_SK.astype(np.float32 if exact else np.float16))
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> DomainClassifier:
        """What `save` wrote. Raises NotFoundError, or DataError naming the file."""
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                if about["format"] != 1 or tuple(about["lengths"]) != LENGTHS:
                    raise DataError(f"{path}: a classifier of another format")
                weights, bias = file["weights"].astype(np.float32), file["bias"]
            names = about["names"]
            if weights.ndim != 2 or len(weights).bit_count() != 1 or weights.shape[1:] != (len(names),) != bias.shape:
                raise DataError(f"{path}: {len(names)} names do not fit weights of shape {weights.shape}")
            return cls(names, weights, bias, float(about["temperature"]))
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such file") from None
        except DataError:
            raise
        except Exception as error:  # zip, JSON and numpy each have their own for a damaged file
            raise DataError(f"{path}: not a domain classifier: {error}") from None


def held_out_rows(texts: Sequence[str], y_N: np.ndarray, labels: Sequence[str], share: float) -> np.ndarray:
    """Which texts are held out, bool [N]: by rank of hash, so that every name has its share."""
    import numpy as np

    place = np.array([int.from_bytes(hashlib.blake2b(t.encode(), digest_size=4, key=b"held out").digest(), "little")
                      for t in texts])
    out_N = np.zeros(len(texts), bool)
    for k, name in enumerate(labels):
        of_name = np.flatnonzero(y_N == k)
        take = max(2, round(share * len(of_name)))
        if len(of_name) <= take + 1:
            raise DataError(f"{name}: has {len(of_name)} texts: a classifier needs at least 4 of each name")
        out_N[of_name[np.argsort(place[of_name], kind="stable")[:take]]] = True
    return out_N


def piece(text: str, where: float, how_long: float) -> str:
    """A stretch of `text`: lengths even on a logarithmic scale between MIN_PIECE and PIECE."""
    length = int(MIN_PIECE * (PIECE / MIN_PIECE) ** how_long)
    start = int(where * max(0, len(text) - length))
    return text[start : start + length]


def sequences(texts: Sequence[str], bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row_S of every sequence, text after text; first_N; scale_N). A text too short for one has a row with scale 0."""
    import numpy as np

    clean = [" ".join(text.lower().split()) for text in texts]
    clean = [text if len(text) >= LENGTHS[-1] else text.ljust(LENGTHS[-1]) for text in clean]
    codes_C = np.frombuffer("".join(clean).encode("utf-32-le", "replace"), np.uint32)
    size_N = np.array([len(text) for text in clean], np.int64)
    begin_N = np.cumsum(size_N) - size_N
    rows_CL = np.zeros((len(codes_C), len(LENGTHS)), np.int32)
    hash_C = codes_C.copy()
    for step in range(1, LENGTHS[-1]):
        hash_C = hash_C[:-1] * np.uint32(0x9E3779B1) + codes_C[step:]
        if step + 1 in LENGTHS:
            mixed = (hash_C ^ (hash_C >> np.uint32(15))) * np.uint32(0x85EBCA77 + 2 * step)
            rows_CL[: len(mixed), LENGTHS.index(step + 1)] = mixed >> np.uint32(32 - bits)
    use_CL = np.ones(rows_CL.shape, bool)  # a sequence must not reach into the next text
    for column, length in enumerate(LENGTHS):
        for back in range(1, length):
            use_CL[begin_N + size_N - back, column] = False
    count_N = sum(size_N - length + 1 for length in LENGTHS)
    blank_N = np.array([not text.strip() for text in clean], bool)
    first_N = np.cumsum(count_N) - count_N
    return rows_CL[use_CL], first_N, np.where(blank_N, 0, 1 / np.sqrt(count_N)).astype(np.float32)


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    import numpy as np

    e = np.exp(logits_NK - logits_NK.max(1, keepdims=True)) if len(logits_NK) else logits_NK
    return e / e.sum(1, keepdims=True)


def fit_temperature(logits_NK: np.ndarray, y_N: np.ndarray) -> float:
    """The temperature of least cross-entropy, by golden-section search over its logarithm. As in Platt's scaling the
    targets keep 1 / (N + 2) back, or N texts without an error would make the classifier certain of everything."""
    import numpy as np

    names = logits_NK.shape[1]
    kept_back = 1 / (len(y_N) + 2)
    target_NK = np.full(logits_NK.shape, kept_back / (names - 1))
    target_NK[np.arange(len(y_N)), y_N] = 1 - kept_back

    def loss(log_t: float) -> float:
        return float(-(target_NK * np.log(np.maximum(softmax(logits_NK / np.exp(log_t)), 1e-12))).sum(1).mean())

    low, high, golden = -3.0, 3.0, (5**0.5 - 1) / 2
    for _ in range(40):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def coincidences(texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """{language: the name that nearly all texts in it bear}, of the texts of every name."""
    share: dict[str, dict[str, float]] = {}  # of each language in a name's texts
    for name, own in texts.items():
        for code, count in Counter(map(language, own)).items():
            share.setdefault(code, {})[name] = count / len(own)
    return {code: best for code, of in sorted(share.items()) if code != NONE
            if of[best := max(of, key=of.__getitem__)] >= max(NOTABLE, ALONE * sum(of.values()))}


def language_warning(coincide: Mapping[str, str]) -> str:
    """Names and languages that coincide, as a warning; nothing where none do."""
    pairs = ", ".join(f"nearly all texts in {code} are {name}" for code, name in coincide.items())
    return pairs and (f"names and languages coincide: {pairs}; the classifier may learn the language instead of the "
                      "domain: add texts of other names in it")


def _report(names: tuple[str, ...], p_NK: np.ndarray, y_N: np.ndarray, coincide: Mapping[str, str]) -> HeldOutReport:
    import numpy as np

    best, sure = p_NK.argmax(1), p_NK.max(1)
    confusion = np.bincount(y_N * len(names) + best, minlength=len(names) ** 2).reshape(len(names), -1)
    right = best == y_N
    at = {t: (float((sure >= t).mean()), float(right[sure >= t].mean())) for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
          if (sure >= t).any()}
    bins = np.minimum((sure * 10).astype(int), 9)
    error = sum(abs(float(right[bins == b].mean() - sure[bins == b].mean())) * float((bins == b).mean())
                for b in range(10) if (bins == b).any())
    return HeldOutReport(names, tuple(tuple(map(int, row)) for row in confusion), at, error, coincide)
