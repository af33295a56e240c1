"""Records -> padded batches in which answers count in the loss and questions do not.

    a conversation       through the chat template, its tools too; what the assistant says is learnt, reasoning, calls
                         and end token included (spoken.py), where no flag says otherwise; of prompt and completion
                         (TRL's lists of messages) in the completion alone. Where the template writes a turn otherwise
                         when others follow it, as it does with reasoning, a record gives several examples
    prompt and answer    as a conversation of two turns where the tokenizer has a template, else prompt, answer, eos
    plain text           bos, text, eos; all of it is learnt; a long one is cut into windows

Records are held out by a hash of their text, so the split does not depend on their order or company. Batches are a pure
function of (seed, step), and records of like length share one: padding stays small and a killed run goes on with the
very batch it would have had.

Millions of records fit: their tokens lie in flat arrays (examples.py), and documents are read one by one and let go.

Shape letters: B records, T tokens, N records of a set.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..conversation import Style, inline_reasoning, normalize, of_turns, split_reasoning
from ..data import Document, ReadReport, RecordMap, read_documents
from ..data.held_out import count_held, held_out_place, hold_out
from ..data.held_out import notes as split_notes
from ..data.reader import documents_of
from ..data.shards import Batch
from ..data.turns import turns_asked
from ..errors import DataError, LeftOutError, RequestError
from ..spoken import encode_turn
from ..tokenizer import Tokenizer
from .examples import Example, Examples, pad

PROCEED = ("for reasoning give variables of the template that let the model think, such as --chat_template_kwargs "
           """'{"thinking": true}', or set reasoning to drop; for the rest take a tokenizer whose template shows it""")
POOL = 16  # batches whose records are sorted by length together


def places(dataset: Any) -> list[Path]:
    """List the files and folders that a data set is read from; of a pattern, the folder that it starts from."""
    if isinstance(dataset, str | Path):
        dataset = [Path(dataset)]
    if not _is_paths(dataset):
        return []
    found = []
    for place in dataset:
        parts = Path(place).parts
        if not Path(place).exists():
            parts = tuple(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        if not str(place).startswith("hf:"):
            found.append(Path(*parts))
    return found


def read_records(
    dataset: Any, report: ReadReport | None = None, mapping: RecordMap | None = None
) -> list[Document]:
    """`each_record` as a list."""
    return list(each_record(dataset, report, mapping))


def each_record(
    dataset: Any, report: ReadReport | None = None, mapping: RecordMap | None = None
) -> Iterator[Document]:
    """The documents of a path (or several), of records (objects, strings, lists of turns), of documents, or of anything
    that iterates over these, such as a Hugging Face data set; or of a polars or pandas frame, a record a row. A string
    alone is a path; a list of strings is one of paths if they all lead somewhere, else of texts. mapping: what the
    columns of records are.

    Raises DataError for no record at all, and for one that cannot be read, naming its place; problems go to `report`
    instead where one that is not strict is given.
    """
    report = report or ReadReport(strict=True)
    if isinstance(dataset, str | Path):
        dataset = [Path(dataset)]
    dataset = _rows(dataset)
    if isinstance(dataset, Mapping):
        raise DataError(f"dataset: must be a path, a list or an iterable of records, got one object with keys "
                        f"{', '.join(map(str, list(dataset)[:5]))} (a data set by splits? give one of them)")
    if _is_paths(dataset):
        documents = read_documents(dataset, report, mapping)
    else:
        documents = (document for n, record in enumerate(dataset, 1)
                     for document in documents_in(record, n, report, mapping))
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise DataError("dataset: holds no record")


def documents_in(record: Any, number: int, report: ReadReport, mapping: RecordMap | None) -> list[Document]:
    """Parse one record in memory into documents; a problem is reported."""
    if isinstance(record, Document):
        return [record]
    try:
        return documents_of(_native(record), "records", number, report, mapping)
    except RecursionError:
        raise DataError(f"record {number}: is nested too deeply") from None
    except DataError as error:
        if report.strict:
            raise DataError(f"record {number}: {error}") from None
        report.problem("records", number, "unusable record", str(error))
        return []


def _native(value: Any) -> Any:
    """Convert tuples, arrays and numpy's numbers of a record to lists and Python's numbers."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _native(item) for key, item in value.items()}
    return [_native(item) for item in value] if isinstance(value, list | tuple) else value


def _rows(dataset: Any) -> Any:
    """Convert a frame to records without its missing values; return anything else unchanged."""
    if hasattr(dataset, "collect") and hasattr(dataset, "collect_schema"):  # polars, lazy
        dataset = dataset.collect()
    if hasattr(dataset, "iter_rows"):  # polars
        rows = dataset.iter_rows(named=True)
        return ({key: value for key, value in row.items() if value is not None} for row in rows)
    if hasattr(dataset, "itertuples") and hasattr(dataset, "to_dict"):  # pandas, where NaN is a missing value
        rows = dataset.astype(object).where(dataset.notna(), None).to_dict("records")
        return ({str(key): value for key, value in row.items() if value is not None} for row in rows)
    return dataset


def _is_paths(dataset: Any) -> bool:
    strings = isinstance(dataset, Sequence) and bool(dataset) and all(isinstance(item, str | Path) for item in dataset)
    return strings and _all_paths(dataset)


def _all_paths(items: Sequence[str | Path]) -> bool:
    """Whether strings are paths. Raises DataError where some lead somewhere and some do not."""
    there = [isinstance(item, Path) or item.startswith("hf:") or (len(item) < 256 and Path(item).exists())
             for item in items]
    if any(there) and not all(there):
        raise DataError(f"dataset: {str(items[there.index(False)])[:80]!r} leads nowhere, though others in the list "
                        "are paths")
    return all(there)


def encode(document: Document, tokenizer: Tokenizer, max_length: int, parse_special: bool = False,
           reasoning: str = "learn", notes: Counter[str] | None = None) -> list[Example]:
    """One example, or several: windows of plain text, turns of a conversation that the template writes otherwise when
    others follow them. parse_special: control tokens that plain text spells out count; else they are ordinary text, and
    a warning says so once. reasoning: learn, or drop. notes: counts what is to be said of turns.

    Raises DataError for a record with nothing to learn, LeftOutError where the template leaves out what is to be.
    """
    turns = document.turns
    if not turns and document.response_start is not None:
        prompt, answer = document.text[: document.response_start], document.text[document.response_start :]
        if not answer.strip():
            raise DataError(f"{place(document)}: the record has no output to learn")
        turns = (("user", prompt.removesuffix("\n")), ("assistant", answer))
        if not tokenizer.has_chat_template:
            [message] = _messages(turns[1:], reasoning)
            return [_joined([(prompt, False), (message["content"], True)], tokenizer)]
        document = replace(document, response_start=None)
    if not turns:
        if not parse_special:
            tokenizer.warn_of_control(document.text, place(document))
        ids = _framed(tokenizer.encode(document.text, special=parse_special), tokenizer)
        if len(ids) < 2:
            raise DataError(f"{place(document)}: the text is empty")
        starts = range(0, max(len(ids) - 1, 1), max_length)
        return [Example(tuple(piece), ((1, len(piece)),)) for start in starts
                if len(piece := ids[start : start + max_length + 1]) > 1]
    said, tools, variables = of_turns(turns)
    asked = 0 if document.response_start is None else turns_asked(turns, document.response_start)
    messages = _messages(turns, reasoning)
    learnt = [n for n, message in enumerate(messages) if n >= asked and message["role"] == "assistant"
              and said[n].get("learn", True) and _says(message)]
    if not learnt:
        raise DataError(f"{place(document)}: the record has no output to learn (no turn of an assistant"
                        + (" that its flags leave to learn)" if any("learn" in message for message in said) else ")"))
    try:
        if not tokenizer.has_chat_template:
            if variables:
                raise RequestError("chat_template_kwargs: the tokenizer has no chat template")
            return [_bare(messages, tools, learnt, tokenizer)]
        tokenizer.check_variables(variables)
        return _spoken(messages, tools, variables, learnt, tokenizer, Counter() if notes is None else notes)
    except LeftOutError as error:
        raise LeftOutError(f"{place(document)}: {error}") from None
    except RequestError as error:
        raise DataError(f"{place(document)}: {error}") from None


def _messages(turns: Sequence[Sequence[str]], reasoning: str) -> list[dict[str, Any]]:
    """Normalized messages of turns, without reasoning where it is to be dropped."""
    messages = normalize(of_turns(turns).messages)
    return messages if reasoning == "learn" else [
        split_reasoning(message)[2] if message["role"] == "assistant" else message for message in messages]


def _says(message: Mapping[str, Any]) -> bool:
    return bool((message["content"] or "").strip() or message.get("reasoning_content") or message.get("tool_calls"))


def place(document: Document) -> str:
    """Return the place of a record, for messages."""
    return document.source if document.line is None else f"{document.source}:{document.line}"


def digest(document: Document) -> str:
    """SHA-256 of a document's text."""
    return hashlib.sha256(document.text.encode()).hexdigest()


def _framed(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    return [*(begin if list(ids[:1]) != begin else []), *ids, *(end if list(ids[-1:]) != end else [])]


def _joined(parts: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> Example:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    spans = []
    for number, (text, learnt) in enumerate(parts, 1):
        start = len(ids)
        ids += tokenizer.encode(text) + (end if number == len(parts) else [])
        if learnt:
            spans.append((start, len(ids)))
    return Example(tuple(ids), tuple(spans))


def _bare(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, learnt: Sequence[int],
          tokenizer: Tokenizer) -> Example:
    """A conversation without a chat template: `Role: text` and an empty line, turn by turn."""
    parts: list[tuple[str, bool]] = []
    for n in range(len(messages)):
        fitted, _ = Style().fit([inline_reasoning(messages[n])], tools if n == 0 else None)
        for message in fitted:
            parts += [(f"{message['role'].capitalize()}: ", False), (
                f"{message['content']}\n\n", n in learnt and message["role"] == "assistant")]
    return _joined(parts, tokenizer)


def _spoken(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
            variables: Mapping[str, Any], learnt: Sequence[int], tokenizer: Tokenizer, notes: Counter[str]
            ) -> list[Example]:
    """One example where each turn that is learnt goes on from the one before, else several."""
    out: list[Example] = []
    for n in learnt:
        turn = encode_turn(messages, n, tokenizer, tools=tools, **variables)
        notes.update(turn.notes)
        goes_on = bool(out) and list(out[-1].ids) == turn.ids[: len(out[-1].ids)] and turn.start >= len(out[-1].ids)
        before = out.pop().loss_spans if goes_on else ()
        out.append(Example(tuple(turn.ids), (*before, (turn.start, len(turn.ids)))))
    return out


class RecordSet:
    """Training and held-out examples of one data set, as `Trainer` wants them."""

    experts: tuple[str, ...] = ()
    notes: Mapping[str, int] = {}  # of turns that are learnt, and how many have each
    split_notes: Sequence[str] = ()  # about what is held out

    def __init__(
        self, train: Iterable[Example], valid: Iterable[Example], held_out: frozenset[str] = frozenset()
    ) -> None:
        """held_out: digests of the texts behind `valid`, which nothing may train on."""
        self.train, self.valid = (side if isinstance(side, Examples) else Examples(side) for side in (train, valid))
        self.held_out = held_out
        self.document_V = np.arange(len(self.valid))  # which document each held-out example is of
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @classmethod
    def of(cls, documents: Iterable[Document], tokenizer: Tokenizer, *, max_length: int, overlong: str = "error",
           valid_fraction: float = 0.1, seed: int = 0, parse_special: bool = False, reasoning: str = "learn"
           ) -> RecordSet:
        """Tokenize documents and split them into training and held-out examples. Raises DataError for a record without
        output, for over-long ones (overlong "error") and those of which the chat template leaves something out,
        counted, and where nothing is left to train on."""
        sides = (Examples(), Examples())
        digests, ends = bytearray(), ([0], [0])  # of the documents; where the examples of each end, on its side
        rows: list[tuple[float, int, int]] = []  # of the documents: hash, number of the name, characters
        names: dict[str, int] = {}
        long: list[tuple[str, int]] = []
        lost: list[str] = []
        notes = Counter[str]()
        count = 0
        for document in documents:
            count += 1
            try:
                examples = encode(document, tokenizer, max_length, parse_special, reasoning, notes)
            except LeftOutError as error:
                lost.append(str(error))
                continue
            if (longest := max(len(e.ids) for e in examples)) > max_length + 1:
                long.append((place(document), longest))
                if overlong != "cut":
                    continue
                examples = [cut for e in examples if (cut := _cut(e, max_length))]
            one = held_out_place(document.text, f"{seed}".encode())
            rows.append((one, names.setdefault(document.expert or "", len(names)), len(document.text)))
            digests += bytes.fromhex(digest(document))
            sides[one < valid_fraction].extend(examples)
            ends[one < valid_fraction].append(len(sides[one < valid_fraction]))
        if lost:
            raise DataError(f"{len(lost)} of {count} records have something to learn that the chat template leaves out "
                            f"(first {lost[0]}); {PROCEED}")
        if long and overlong == "error":
            raise DataError(f"{len(long)} of {count} records are longer than max_length = {max_length} tokens (first "
                            f"{long[0][0]} with {long[0][1]}); raise max_length, or set overlong to cut or skip")
        if not rows or not (sides[0] or sides[1]):
            raise DataError(f"dataset: none of its {count} records is left to train on"
                            + (f" ({len(long)} are longer than max_length = {max_length})" if long else ""))
        place_N, name_N, size_N = (np.array(column) for column in zip(*rows, strict=True))
        held_N, cuts = hold_out(place_N, name_N, size_N, valid_fraction)
        windows_N = _windows(ends, place_N < valid_fraction)
        cuts = [row for row in cuts if windows_N[row] > 1]
        valid_N = np.where(held_N, windows_N, 0)
        for row in cuts:
            valid_N[row] = min(max(1, round(windows_N[row] * valid_fraction)), windows_N[row] - 1)
        data = cls(*_moved(sides, ends, place_N < valid_fraction, valid_N),
                   frozenset(digests[32 * row : 32 * row + 32].hex() for row in np.flatnonzero(held_N)))
        if valid_fraction and not data.valid:
            times = f", {len(rows)} times" if len(rows) > 1 else ""
            raise DataError(f"dataset: has a single record{times}; at least two are needed, one to learn and one to "
                            "hold out")
        data.notes = notes
        data.document_V = np.repeat(np.arange(len(rows)), valid_N)
        held = count_held(place_N, name_N, held_N, cuts, valid_fraction, {n: name for name, n in names.items()})
        data.split_notes = split_notes(held, valid_fraction, "records")
        return data

    @property
    def fingerprint(self) -> str:
        """Hash of all examples and of their split."""
        digest = hashlib.sha256()
        for side in (self.train, self.valid):
            side.add_to(digest)
        return digest.hexdigest()

    @property
    def loss_tokens(self) -> int:
        """Tokens of the training records that count in the loss."""
        return self.train.loss_tokens

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the held-out records that count in the loss."""
        return self.valid.loss_tokens

    def batches(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return -(-len(self.train) // batch_size)

    def _draw_order(self, seed: int, epoch: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(records, batches) of an epoch: a shuffle, sorted by length within pools of batches, of which every
        batch_size are a batch, and the order in which these come."""
        key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        order_N = torch.randperm(len(self.train), generator=generator).numpy()
        lengths_N = self.train.lengths()
        for start in range(0, len(order_N), POOL * batch_size):
            pool = order_N[start : start + POOL * batch_size]
            pool[:] = pool[np.argsort(lengths_N[pool], kind="stable")]
        return order_N, torch.randperm(self.batches(batch_size), generator=generator).numpy()

    def batch(self, step: int, batch_size: int, seq_len: int, *, seed: int) -> Batch:
        """Return the batch of a step; seq_len is not used, as records are cut when they are tokenized."""
        epoch, number = divmod(step, self.batches(batch_size))
        order_N, batches = self._order(seed, epoch, batch_size)
        start = int(batches[number]) * batch_size
        return pad([self.train[int(n)] for n in order_N[start : start + batch_size]])

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out records, at most `limit` batches of them, evenly spread and sorted by length."""
        chosen = self.evaluated(batch_size, limit)
        for i in range(0, len(chosen), batch_size):
            yield pad([self.valid[int(n)] for n in chosen[i : i + batch_size]])


    def evaluated(self, batch_size: int, limit: int | None = None) -> np.ndarray:
        """The numbers of the held-out examples in `valid_batches`, in their order."""
        chosen, kept = np.arange(len(self.valid)), (limit or 0) * batch_size
        if limit is not None and kept < len(chosen):
            chosen = np.arange(kept) * len(chosen) // kept
        return chosen[np.argsort(self.valid.lengths()[chosen], kind="stable")]


def _windows(ends: tuple[list[int], list[int]], was_N: np.ndarray) -> np.ndarray:
    """Examples of every document."""
    out_N = np.zeros(len(was_N), np.int64)
    for side in (False, True):
        out_N[was_N == side] = np.diff(ends[side])
    return out_N


def _moved(sides: tuple[Examples, Examples], ends: tuple[list[int], list[int]], was_N: np.ndarray,
           valid_N: np.ndarray) -> tuple[Examples, Examples]:
    """Both sides with the last valid_N examples of every document on the second one. was_N: the side of a document
    before; ends: where its examples end there."""
    if (np.where(was_N, _windows(ends, was_N), 0) == valid_N).all():
        return sides
    at, out = [0, 0], (Examples(), Examples())
    for was, valid in zip(was_N.tolist(), valid_N.tolist(), strict=True):
        start, end = ends[was][at[was] : at[was] + 2]
        at[was] += 1
        out[False].extend(sides[was][n] for n in range(start, end - valid))
        out[True].extend(sides[was][n] for n in range(end - valid, end))
    return out


def _cut(example: Example, max_length: int) -> Example | None:
    """The first max_length + 1 tokens; None where nothing is learnt in them."""
    ids = example.ids[: max_length + 1]
    spans = tuple((start, min(end, len(ids))) for start, end in example.loss_spans if start < len(ids))
    return Example(ids, spans) if spans else None
