"""Records -> padded batches that teach answers, not questions.

    a conversation       through the chat template, its tools too; what the assistant says is learnt, its end token
                         included; of prompt and completion (TRL's lists of messages) in the completion alone
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
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..conversation import Style, normalize, of_turns
from ..data import Document, ReadReport, read_documents
from ..data.shapes import shape, turns_asked
from ..data.shards import Batch, held_out_place
from ..errors import DataError, RequestError
from ..files import write_atomically
from ..tokenizer import Tokenizer
from .examples import Example, Examples, pad

SPEAKING = ("assistant", "function_call")  # roles whose turns are learnt
POOL = 16  # batches whose records are sorted by length together


def places(dataset: Any) -> list[Path]:
    """The files and folders that a data set is read from; of a pattern, the folder that it starts from."""
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


def read_records(dataset: Any, report: ReadReport | None = None) -> list[Document]:
    """`each_record` as a list."""
    return list(each_record(dataset, report))


def each_record(dataset: Any, report: ReadReport | None = None) -> Iterator[Document]:
    """The documents of a path (or several), of records (objects, strings, lists of turns), of documents, or of anything
    that iterates over these, such as a Hugging Face data set; or of a polars or pandas frame, a record a row. A string
    alone is a path; a list of strings is one of paths if they all lead somewhere, else of texts.

    Raises DataError for no record at all, and for one that cannot be read, naming its place; problems of files go to
    `report` instead where one that is not strict is given.
    """
    if isinstance(dataset, str | Path):
        dataset = [Path(dataset)]
    dataset = _rows(dataset)
    if isinstance(dataset, Mapping):
        raise DataError(f"dataset: must be a path, a list or an iterable of records, got one object with keys "
                        f"{', '.join(map(str, list(dataset)[:5]))} (a data set by splits? give one of them)")
    if _is_paths(dataset):
        documents = read_documents(dataset, report or ReadReport(strict=True))
    else:
        documents = (document for n, record in enumerate(dataset, 1) for document in document_of(record, n))
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise DataError("dataset: holds no record")


def document_of(record: Any, number: int) -> list[Document]:
    """The documents of one record that lies in memory."""
    if isinstance(record, Document):
        return [record]
    try:
        return [Document(one.text, "records", number, one.turns, one.expert, one.metadata, one.answer_at)
                for one in shape(record)]
    except DataError as error:
        raise DataError(f"record {number}: {error}") from None


def _rows(dataset: Any) -> Any:
    """The rows of a frame as records, without its missing values; anything else as it is."""
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


def encode(document: Document, tokenizer: Tokenizer, max_length: int, parse_special: bool = False) -> list[Example]:
    """One example, or several windows of plain text. parse_special: control tokens that plain text spells out count;
    else they are ordinary text, and a warning says so once. Raises DataError for a record with nothing to learn."""
    turns = document.turns
    if not turns and document.answer_at is not None:
        prompt, answer = document.text[: document.answer_at], document.text[document.answer_at :]
        if not answer.strip():
            raise DataError(f"{place(document)}: the record has no output to learn")
        if not tokenizer.has_chat_template:
            return [_joined([(prompt, False), (answer, True)], tokenizer)]
        turns = (("user", prompt.removesuffix("\n")), ("assistant", answer))
        document = replace(document, answer_at=None)
    if not turns:
        if not parse_special:
            tokenizer.warn_of_control(document.text, place(document))
        ids = _framed(tokenizer.encode(document.text, special=parse_special), tokenizer)
        if len(ids) < 2:
            raise DataError(f"{place(document)}: the text is empty")
        starts = range(0, max(len(ids) - 1, 1), max_length)
        return [Example(tuple(piece), ((1, len(piece)),)) for start in starts
                if len(piece := ids[start : start + max_length + 1]) > 1]
    messages, tools = of_turns(turns)
    asked = 0 if document.answer_at is None else turns_asked(turns, document.answer_at)
    if not any(message["role"] in SPEAKING and message["content"].strip() for message in messages[asked:]):
        raise DataError(f"{place(document)}: the record has no output to learn (no turn of an assistant)")
    if not tokenizer.has_chat_template:
        fitted, _ = Style().fit(normalize(messages), tools)
        asked += len(fitted) - len(messages)  # tools may stand in front
        parts = [part for n, message in enumerate(fitted)
                 for part in ((f"{message['role'].capitalize()}: ", False),
                              (f"{message['content']}\n\n", n >= asked and message["role"] == "assistant"))]
        return [_joined(parts, tokenizer)]
    return [_spoken(document, messages, tools, asked, tokenizer)]


def place(document: Document) -> str:
    """Where a record stands, for messages."""
    return document.source if document.line is None else f"{document.source}:{document.line}"


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


def _spoken(document: Document, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
            asked: int, tokenizer: Tokenizer) -> Example:
    """asked: so many messages are the prompt, of which nothing is learnt."""
    try:
        ids = tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=False)
        spans = []
        for n, message in enumerate(messages):
            if n < asked or message["role"] not in SPEAKING:
                continue
            before = tokenizer.encode_chat(messages[:n], tools=tools, add_generation_prompt=True)
            through = tokenizer.encode_chat(messages[: n + 1], tools=tools, add_generation_prompt=False)
            # a prompt for generation may open what a record writes otherwise (DeepSeek-R1's begins to think)
            start = next((i for i, (a, b) in enumerate(zip(before, through, strict=False)) if a != b),
                         min(len(before), len(through)))
            if ids[: len(through)] != through:
                raise DataError(f"{place(document)}: the chat template writes turn {n + 1} differently when others "
                                "follow it, so what is to be learnt cannot be told apart; split the record there")
            spans.append((start, len(through)))
    except RequestError as error:
        raise DataError(f"{place(document)}: {error}") from None
    return Example(tuple(ids), tuple(spans))


class RecordSet:
    """Training and held-out examples of one data set, as `Trainer` wants them."""

    experts: tuple[str, ...] = ()

    def __init__(
        self, train: Iterable[Example], valid: Iterable[Example], held_out: frozenset[str] = frozenset()
    ) -> None:
        """held_out: digests of the texts behind `valid`, which nothing may train on."""
        self.train, self.valid = (side if isinstance(side, Examples) else Examples(side) for side in (train, valid))
        self.held_out = held_out
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @classmethod
    def of(cls, documents: Iterable[Document], tokenizer: Tokenizer, *, max_length: int, overlong: str = "error",
           valid_fraction: float = 0.1, seed: int = 0, parse_special: bool = False) -> RecordSet:
        """Tokenise, hold out, check. Raises DataError for a record without output, for over-long ones (overlong
        "error"), and where nothing is left to train on."""
        sides = (Examples(), Examples())
        held_out: set[str] = set()
        long: list[tuple[str, int]] = []
        waiting: tuple[float, list[Example], str] | None = None
        count = 0
        for document in documents:
            count += 1
            examples = encode(document, tokenizer, max_length, parse_special)
            if max(len(e.ids) for e in examples) > max_length + 1:
                long.append((place(document), len(examples[0].ids)))
                if overlong != "cut":
                    continue
                examples = [cut for e in examples if (cut := _cut(e, max_length))]
            one = held_out_place(document.text, f"{seed}".encode()), examples, digest(document)
            if waiting is None or one > waiting:  # the least likely to be held out stands in for an empty side
                waiting, one = one, waiting or (2.0, [], "")
            sides[one[0] < valid_fraction].extend(one[1])
            if one[0] < valid_fraction:
                held_out.add(one[2])
        if long and overlong == "error":
            raise DataError(f"{len(long)} of {count} records are longer than max_length = {max_length} tokens (first "
                            f"{long[0][0]} with {long[0][1]}); raise max_length, or set overlong to cut or skip")
        if waiting is not None:
            held = bool(valid_fraction and not sides[1] and sides[0])
            sides[held].extend(waiting[1])
            held_out |= {waiting[2]} if held else set()
        if not sides[0]:
            raise DataError(f"dataset: none of its {count} records is left to train on"
                            + (f" ({len(long)} are longer than max_length = {max_length})" if long else ""))
        if valid_fraction and not sides[1]:
            raise DataError("dataset: has a single record; at least two are needed, one to learn and one to hold out")
        return cls(*sides, frozenset(held_out))

    @property
    def fingerprint(self) -> str:
        """Hash of all examples and of their split."""
        digest = hashlib.sha256()
        for side in (self.train, self.valid):
            side.add_to(digest)
        return digest.hexdigest()

    @property
    def learnt_tokens(self) -> int:
        """Tokens of the training records that count in the loss."""
        return self.train.learnt_tokens

    @property
    def held_out_tokens(self) -> int:
        """The same of the held-out records."""
        return self.valid.learnt_tokens

    def batches(self, batch_size: int) -> int:
        """In an epoch."""
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
        """The records of a step; seq_len has done its work when they were tokenised."""
        epoch, number = divmod(step, self.batches(batch_size))
        order_N, batches = self._order(seed, epoch, batch_size)
        start = int(batches[number]) * batch_size
        return pad([self.train[int(n)] for n in order_N[start : start + batch_size]])

    def valid_batches(self, batch_size: int, seq_len: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out records, at most `limit` batches of them, evenly spread and sorted by length."""
        chosen, kept = np.arange(len(self.valid)), (limit or 0) * batch_size
        if limit is not None and kept < len(chosen):
            chosen = np.arange(kept) * len(chosen) // kept
        chosen = chosen[np.argsort(self.valid.lengths()[chosen], kind="stable")]
        for i in range(0, len(chosen), batch_size):
            yield pad([self.valid[int(n)] for n in chosen[i : i + batch_size]])


def _cut(example: Example, max_length: int) -> Example | None:
    """The first max_length + 1 tokens; None where nothing is learnt in them."""
    ids = example.ids[: max_length + 1]
    spans = tuple((start, min(end, len(ids))) for start, end in example.learnt if start < len(ids))
    return Example(ids, spans) if spans else None


# ---- streams ----------------------------------------------------------------------------------------------------


def fresh(
    stream: Iterable[Any], seen: set[str], refused: Path, check: Callable[[Document], object]
) -> Iterator[Document]:
    """The documents of a stream whose text is new; their hashes join `seen`. What cannot be used (`check` raises
    DataError) is appended to the file `refused`, with the reason."""
    for number, record in enumerate(stream, 1):
        try:
            documents = document_of(record, number)
            for document in documents:
                check(document)
        except DataError as error:
            refused.parent.mkdir(parents=True, exist_ok=True)
            with refused.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"reason": str(error), "record": record}, default=str) + "\n")
            continue
        for document in documents:
            if (known := digest(document)) not in seen:
                seen.add(known)
                yield document


def take_round(folder: Path, waiting: Iterator[Document], size: int, seen: set[str]) -> list[Document]:
    """`size` documents, or what is left of the stream: those that the folder has, then new ones, each written to it as
    it comes, so that a killed run loses none."""
    whole, partly = folder / "records.jsonl", folder / "incoming.jsonl"
    if whole.is_file():
        return stored(whole, seen)
    documents = stored(partly, seen) if partly.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(partly, "".join(map(_line, documents)))  # without a line that a kill has torn
    with partly.open("a", encoding="utf-8") as file:
        for document in itertools.islice(waiting, max(0, size - len(documents))):
            file.write(_line(document))
            file.flush()
            documents.append(document)
    if len(documents) == size:
        partly.rename(whole)
    return documents


def stored(path: Path, seen: set[str]) -> list[Document]:
    """What `take_round` wrote; the hashes join `seen`. A last line that is not whole is left out."""
    documents = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        keys = json.loads(line)
        documents.append(Document(**keys | {"turns": tuple((role, said) for role, said in keys["turns"])}))
        seen.add(digest(documents[-1]))
    return documents


def _line(document: Document) -> str:
    return json.dumps(asdict(document), default=str) + "\n"


def digest(document: Document) -> str:
    """SHA-256 of a document's text."""
    return hashlib.sha256(document.text.encode()).hexdigest()
