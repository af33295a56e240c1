"""Prints training examples decoded, with what counts in the loss apart from what does not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..data import Document
from ..errors import DataError, RequestError
from ..tokenizer import Tokenizer
from .examples import Example
from .records import encode, place


def pieces(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """(whether it is learnt, text) of the parts of an example, in their order."""
    ends = [0, *itertools.chain(*example.loss_spans), len(example.ids)]
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
        if end > start:
            yield n % 2 == 1, tokenizer.decode(example.ids[start:end], skip_special=False)


def show(documents: Iterable[Document], tokenizer: Tokenizer, max_length: int, **settings: Any) -> Iterator[str]:
    """Lines about the examples of each document: its place and tokens, then its parts, `-` before what the model is
    shown and `+` before what it learns; or why nothing can be learnt of it. settings: as of `encode`."""
    for document in documents:
        try:
            examples = encode(document, tokenizer, max_length, **settings)
        except (DataError, RequestError) as error:
            yield f"{error} (refused)"
            continue
        for n, example in enumerate(examples, 1):
            which = f", example {n} of {len(examples)}" if len(examples) > 1 else ""
            learnt = sum(end - start for start, end in example.loss_spans)
            yield f"{place(document)}{which}: {len(example.ids)} tokens, {learnt} of them learnt"
            for is_learnt, text in pieces(example, tokenizer):
                line = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
                yield f"  {'+' if is_learnt else '-'} {line}"
