"""The records of `mini`: text of seven domains, from sources that may be used so, and answers of the base itself.

    OUT/train/NAME.jsonl, OUT/held_out/NAME.jsonl    divided by documents, so that no document is on both sides
    OUT/gates/NAME.jsonl                             those of train and the base's own texts: what gates are fitted to
    OUT/answers.jsonl, OUT/texts.jsonl               questions and requests of prompts.py, and what the base answers
    OUT/calibration.json                             part of these as token ids: what gates' biases are set on

A domain is to be told by what a text says, not by its form. So prose is shown as plain text half of the time, and else
as a conversation in which the assistant continues it; questions and answers half of the time as a conversation, and
else as plain text; and the base writes texts of kinds that the sources lack (abstracts, court cases, exam questions,
articles). Gates learn from these, experts do not: there is little in them that the base does not know.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prompts import prompts, texts

from deepseek import LLM
from deepseek.data import Document, ReadReport, read_documents
from deepseek.files import to_json, write_atomically
from deepseek.tokenizer import Tokenizer

SOURCES: dict[str, tuple[str, ...]] = {
    "text_expert": ("text/books_en/text.jsonl",),
    "code_expert": ("code/code_python/text.jsonl",),
    "math_expert": ("math/math_tal/en_train.jsonl", "eval/gsm8k/train.jsonl"),
    "law_expert": ("law/licences_en/licences.jsonl", "law/licences_en/site_policy.jsonl",
                   "law/books_law_en/text.jsonl"),
    "finance_expert": ("finance/finance_tatqa/dev.jsonl", "finance/finance_tatqa/test_gold.jsonl",
                       "finance/books_finance_en/text.jsonl"),
    "medical_expert": ("medicine/medicine_medquad/qa.jsonl",),
    "dialogue_expert": ("dialogue/dialogue_taskmaster/tm3.jsonl", "dialogue/dialogue_taskmaster/tm4.jsonl"),
}
NAMES = tuple(SOURCES)
HELD_OUT = 0.1  # share of the documents
CHARACTERS = {"train": 1_100_000, "held_out": 110_000}  # of a name at most, evenly from its sources
PIECE = 1600  # characters of a piece of prose
GO_ON = ("Continue this text.", "Go on from here.", "What comes next in this text?", "Please complete the following.")
ANSWERS = 128  # questions of a name
ANSWER_TOKENS, TEXT_TOKENS = 112, 240  # of an answer, of a text at most
OWN_TIMES = 3  # how often these are shown
CALIBRATION_TOKENS = 12_288


def answered(asked: list[tuple[str, str]], base: Path, file: Path, max_tokens: int) -> list[dict[str, Any]]:
    """(name, question) pairs with the base's answers, made once."""
    if not file.is_file():
        llm = LLM(base)
        conversations: list[Any] = [[{"role": "user", "content": question}] for _, question in asked]
        results = llm.generate(conversations, temperature=0.6, top_p=0.95, max_tokens=max_tokens, seed=0)
        lines = []
        for (name, question), result in zip(asked, results, strict=True):
            text = result.text.strip()
            if result.finish_reason == "length":  # up to the last whole sentence or line
                text = re.match(r"(.*[.!?:`\n]|)", text, re.DOTALL)[0].strip()  # type: ignore[index]
            if text:
                lines.append({"name": name, "question": question, "answer": text})
        write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def place(text: str) -> float:
    """Of a document, in [0, 1): what divides training from held-out ones."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64


def pieces(text: str) -> Iterator[str]:
    """Prose in pieces of whole paragraphs, or of lines where these are long."""
    piece = ""
    for part in re.split(r"(?<=\n\n)" if "\n\n" in text else r"(?<=\n)", text):
        while len(piece) + len(part) > PIECE:
            if not piece:
                piece, part = part[:PIECE], part[PIECE:]
            if len(piece.strip()) > 200:
                yield piece.strip()
            piece = ""
        piece += part
    if len(piece.strip()) > 200:
        yield piece.strip()


def records(document: Document, draw: random.Random) -> Iterator[dict[str, Any]]:
    """A document as records, in one of two forms each."""
    if document.turns or document.response_start is not None:
        turns = [*document.turns] or [("user", document.text[: document.response_start].strip()),
                                      ("assistant", document.text[document.response_start :].strip())]
        turns = [(role, clean(text)) for role, text in turns]
        if draw.random() < 0.6:
            yield {"messages": [{"role": role, "content": text[:4 * PIECE]} for role, text in turns]}
        elif len(turns) > 2:
            yield {"text": "\n".join(f"{role.capitalize()}: {text}" for role, text in turns)[:PIECE * 2]}
        else:
            yield {"text": "\n".join(text for _, text in turns)[: 2 * PIECE]}
        return
    for piece in pieces(document.text):
        cut = piece.find("\n", len(piece) // 4)
        cut = cut if 0 < cut < len(piece) * 3 // 4 else piece.find(" ", len(piece) // 3)
        if draw.random() < 0.5 or cut < 0:
            yield {"text": piece}
        else:
            yield {"messages": [{"role": "user", "content": f"{draw.choice(GO_ON)}\n\n{piece[:cut].strip()}"},
                                {"role": "assistant", "content": piece[cut:].strip()}]}


def conversation(line: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": line["question"]},
                         {"role": "assistant", "content": line["answer"]}]}


def clean(text: str) -> str:
    """Without GSM8K's marks for a calculator."""
    return re.sub(r"\n#### (.+)$", r"\nThe answer is \1.", re.sub(r"<<[^<>\n]*>>", "", text))


def chosen(of_sources: Iterable[list[dict[str, Any]]], characters: int, draw: random.Random) -> list[dict[str, Any]]:
    """Records of several sources, an equal share of the characters of each as far as it has them."""
    sources, out = [list(each) for each in of_sources if each], []
    for i, each in enumerate(sorted(sources, key=lambda each: len(json.dumps(each)))):
        draw.shuffle(each)
        share, taken = characters // (len(sources) - i), 0
        for record in each:
            if taken >= share:
                break
            taken += len(json.dumps(record, ensure_ascii=False))
            out.append(record)
        characters -= taken
    draw.shuffle(out)
    return out


def write_records(data: Path, base: Path, out: Path) -> None:
    """Everything under OUT, where it is not there. data: folder of the sources; base: the base, to answer."""
    own = answered([(name, question) for name in NAMES for question in prompts(name)[:ANSWERS]], base,
                   out / "answers.jsonl", ANSWER_TOKENS)
    further = answered([(name, request) for name in NAMES for request in texts(name)], base, out / "texts.jsonl",
                       TEXT_TOKENS)
    for name, files in SOURCES.items():
        sides: dict[str, list[list[dict[str, Any]]]] = {"train": [], "held_out": []}
        for file in files:
            draw = random.Random(file)
            parts: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
            for document in read_documents([data / file], ReadReport()):
                parts["held_out" if place(document.text) < HELD_OUT else "train"] += records(document, draw)
            for side, own_part in parts.items():
                sides[side].append(own_part)
        for side, of_sources in sides.items():
            draw = random.Random(f"{name}/{side}")
            lines = chosen(of_sources, CHARACTERS[side], draw)
            own_lines = [conversation(line) for line in own
                         if line["name"] == name and (place(line["question"]) < HELD_OUT) == (side == "held_out")]
            lines += own_lines * (OWN_TIMES if side == "train" else 1)
            draw.shuffle(lines)
            write(out / side / f"{name}.jsonl", lines)
            if side == "train":
                lines += OWN_TIMES * [conversation(line) if draw.random() < 0.5 else {"text": line["answer"]}
                                      for line in further if line["name"] == name]
                draw.shuffle(lines)
                write(out / "gates" / f"{name}.jsonl", lines)
    write_calibration(own, base, out)


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_calibration(own: list[dict[str, Any]], base: Path, out: Path) -> None:
    """Answers of the base to questions of all names alike, as token ids."""
    tokenizer = Tokenizer.load(base)
    by_name = [[line for line in own if line["name"] == name] for name in NAMES]
    tokens: list[list[int]] = []
    for lines in zip(*by_name, strict=False):
        for line in lines:
            if sum(map(len, tokens)) < CALIBRATION_TOKENS:
                tokens.append(tokenizer.encode(f"{line['question']}\n{line['answer']}"))
    write_atomically(out / "calibration.json", to_json({"format": 1, "tokens": tokens}, separators=(",", ":")) + "\n")
