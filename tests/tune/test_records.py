"""What is learnt of a record, and what is refused."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.data import Document
from deepseek.data.records import to_documents, to_table
from deepseek.errors import DataError
from deepseek.ops.loss import IGNORE
from deepseek.tokenizer import Tokenizer
from deepseek.tune import records as tune_records
from deepseek.tune.examples import Example, Examples, pad
from deepseek.tune.records import POOL, RecordSet, digest, each_record, encode, places, read_records
from deepseek.tune.streams import iter_new, next_round
from tests.helpers.jsonl import write_jsonl
from tests.helpers.records import general, records


def learnt(record: Any, tokenizer: Tokenizer, max_length: int = 200) -> str:
    """The text of the labels of one record."""
    (document,) = read_records([record])
    batch = pad(encode(document, tokenizer, max_length))
    return tokenizer.decode(batch.labels_BT[batch.labels_BT != IGNORE].tolist(), skip_special=False)


EOS = "<|end_of_sentence|>"


@pytest.mark.parametrize(("record", "answer"), [
    ({"input": "pay 3?", "output": "pay 4 coins."}, f"pay 4 coins.{EOS}"),
    ({"question": "pay 3?", "answer": "pay 4 coins."}, f"pay 4 coins.{EOS}"),
    ({"messages": [{"role": "system", "content": "act"}, {"role": "user", "content": "pay?"},
                   {"role": "assistant", "content": "Section 1"}, {"role": "user", "content": "and?"},
                   {"role": "assistant", "content": "coins"}]}, f"Section 1{EOS}coins{EOS}"),
    ({"text": "The river ran"}, f"The river ran{EOS}"),
])
def test_answers_are_learnt_and_questions_are_not(record: Any, answer: str, tokenizer: Tokenizer) -> None:
    assert learnt(record, tokenizer) == answer


def test_without_a_chat_template(tokenizer: Tokenizer) -> None:
    plain = Tokenizer(tokenizer.definition, {}, None)
    assert not plain.has_chat_template
    assert learnt({"input": "pay 3?", "output": "pay 4 coins."}, plain) == f"pay 4 coins.{EOS}"
    said = learnt({"messages": [{"role": "user", "content": "pay?"}, {"role": "assistant", "content": "coins"}]}, plain)
    assert said == f"coins\n\n{EOS}"


def test_the_label_is_the_next_token_of_an_unchanged_prompt(tokenizer: Tokenizer) -> None:
    (document,) = read_records([{"input": "pay 3?", "output": "pay 4 coins."}])
    (example,) = encode(document, tokenizer, 200)
    batch = pad([example, example])
    ids = torch.tensor(example.ids)
    assert torch.equal(batch.ids_BT[0], ids[:-1]) and batch.real_BT is None
    here = batch.labels_BT[0] != IGNORE
    assert torch.equal(batch.labels_BT[0][here], ids[1:][here]) and 0 < int(here.sum()) < len(here)


def test_long_plain_text_is_cut_into_windows_that_lose_nothing(tokenizer: Tokenizer) -> None:
    text = " ".join(r["text"] for r in general())
    (document,) = read_records([{"text": text}])
    windows = encode(document, tokenizer, 20)
    assert all(len(w.ids) <= 21 for w in windows) and len(windows) > 5
    labels = [i for w in windows for i in pad([w]).labels_BT[0].tolist()]
    assert tokenizer.decode(labels) == text


@pytest.mark.parametrize(("dataset", "message"), [
    ([], "dataset: holds no record"),
    ({"train": [1]}, "dataset: must be a path, a list or an iterable of records, got one object"),
    ([{"input": "q"}], "record 1: "),
    ([{"input": "q", "output": "a"}, {"input": "q", "output": ""}], "record 2: "),
    ([{"messages": [{"role": "user", "content": "hello"}]}], "no output to learn .no turn of an assistant"),
    ([{"input": "q", "output": "a " * 300}], r"1 of 1 records are longer than max_length = 64 tokens .first records:1"),
    ([3], "record 1: must be an object"),
])
def test_what_is_refused(dataset: Any, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=message):
        RecordSet.of(read_records(dataset), tokenizer, max_length=64, valid_fraction=0.0)


def test_overlong_records_are_cut_or_skipped_where_asked(tokenizer: Tokenizer) -> None:
    long = {"input": "q", "output": "pay coins " * 100}
    documents = read_records([*records(5), long])
    cut = RecordSet.of(documents, tokenizer, max_length=64, overlong="cut", valid_fraction=0.0)
    assert sorted(len(e.ids) for e in cut.train)[-1] == 65 and len(cut.train) == 6
    skipped = RecordSet.of(documents, tokenizer, max_length=64, overlong="skip", valid_fraction=0.0)
    assert len(skipped.train) == 5
    with pytest.raises(DataError, match=r"none of its 1 records is left to train on .1 are longer"):
        RecordSet.of(read_records([long]), tokenizer, max_length=64, overlong="skip")
    with pytest.raises(DataError, match="none of its 1 records is left"):  # nothing but the question fits
        RecordSet.of(read_records([{"input": "pay " * 200, "output": "a"}]), tokenizer, max_length=64, overlong="cut")


def test_the_split_depends_on_the_text_alone(tokenizer: Tokenizer) -> None:
    documents = read_records(records())
    one = RecordSet.of(documents, tokenizer, max_length=64, valid_fraction=0.2)
    turned = RecordSet.of(documents[::-1], tokenizer, max_length=64, valid_fraction=0.2)
    assert set(one.valid) == set(turned.valid) and 2 < len(one.valid) < 20
    assert not set(one.valid) & set(one.train) and len(one.train) + len(one.valid) == 40
    with pytest.raises(DataError, match="has a single record; at least two are needed"):
        RecordSet.of(read_records(records(1)), tokenizer, max_length=64)
    fewer = RecordSet.of(read_records(records(2)), tokenizer, max_length=64, valid_fraction=0.01)
    assert (len(fewer.train), len(fewer.valid)) == (1, 1)
    assert len(RecordSet.of(documents, tokenizer, max_length=64, valid_fraction=0.0).train) == 40


def test_an_epoch_has_every_record_once_and_is_a_function_of_the_step(tokenizer: Tokenizer) -> None:
    data = RecordSet.of(read_records(records(23)), tokenizer, max_length=64, valid_fraction=0.0)
    again = RecordSet(data.train, data.valid)

    def texts(which: RecordSet, step: int) -> list[str]:
        batch = which.batch(step, 4, 64, seed=3)
        rows = batch.ids_BT if batch.real_BT is None else [ids[real] for ids, real in zip(batch.ids_BT, batch.real_BT,
                                                                                          strict=True)]
        return [tokenizer.decode(ids.tolist()) for ids in rows]

    epochs = [[text for step in range(6) for text in texts(data, 6 * epoch + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 23 and epochs[0] != epochs[1]
    assert [texts(again, step) for step in (7, 0, 11)] == [texts(data, step) for step in (7, 0, 11)]


def test_examples_come_back_from_their_arrays_and_take_four_bytes_a_token() -> None:
    drawn = np.random.default_rng(0)
    rows = [Example(tuple(drawn.integers(0, 120_000, n).tolist()), ((1, n // 2), (n // 2 + 1, n)))
            for n in drawn.integers(4, 200, 2000)]
    assert list(Examples(rows)) == rows and len(Examples(rows)) == 2000
    assert Examples(rows).loss_tokens == sum(end - start for row in rows for start, end in row.loss_spans)
    tracemalloc.start()
    data = RecordSet(iter(rows), ())
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(len(row.ids) for row in rows)
    assert size < 4 * 1.2 * tokens + 50 * len(rows)  # a tuple of Python's integers takes 36 a token
    assert data.fingerprint == RecordSet(rows, ()).fingerprint
    for other in (RecordSet(rows[:-1], ()), RecordSet(rows[:-1], rows[-1:]), RecordSet((), rows)):
        assert other.fingerprint != data.fingerprint


def test_documents_are_let_go_when_they_are_tokenised(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[weakref.ref[Document]] = []
    real = tune_records.encode

    def encode(document: Document, *rest: Any) -> list[Example]:
        known.append(weakref.ref(document))
        assert sum(ref() is not None for ref in known) <= 2
        return real(document, *rest)

    monkeypatch.setattr(tune_records, "encode", encode)
    RecordSet.of(each_record(iter(records(30))), tokenizer, max_length=64)
    assert len(known) == 30


@pytest.mark.parametrize("count", [1, 7, 64, 203])
def test_batches_are_the_slow_twins(count: int) -> None:
    drawn, size = np.random.default_rng(1), 4
    rows = [Example(tuple(range(n)), ((1, n),)) for n in drawn.integers(2, 12, count)]
    data = RecordSet(rows, rows)
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(b"3/2", digest_size=8).digest(), "little") >> 1)
    order = torch.randperm(count, generator=generator).tolist()
    pools = [sorted(order[i : i + POOL * size], key=lambda n: len(rows[n].ids)) for i in range(0, count, POOL * size)]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    for number, batch in enumerate(shuffled):
        ours, theirs = data.batch(2 * len(batches) + number, size, 12, seed=3), pad([rows[n] for n in batch])
        assert torch.equal(ours.ids_BT, theirs.ids_BT) and torch.equal(ours.labels_BT, theirs.labels_BT)
    for limit in (None, 1, 3, 100):
        kept = rows if limit is None or limit * size >= count else [
            rows[i * count // (limit * size)] for i in range(limit * size)]
        lengths = [len(row.ids) - 1 for row in sorted(kept, key=lambda row: len(row.ids))]
        found = [n for batch in data.valid_batches(size, 12, limit)
                 for n in (batch.labels_BT != IGNORE).sum(1).tolist()]
        assert found == lengths


def test_where_a_data_set_is_read_from(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jsonl").write_text("{}")
    for dataset, found in ((tmp_path / "a", ["a"]), ([str(tmp_path / "a" / "b.jsonl")], ["a/b.jsonl"]),
                           (str(tmp_path / "a" / "*.jsonl"), ["a"]), (records(2), []), ("hf:some/where", []),
                           (["a text", "another"], []), (iter(records(2)), [])):
        assert places(dataset) == [tmp_path / place for place in found]


def test_files_and_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, records(3))
    for dataset in (path, str(path), [str(path)], (Path(path),)):
        assert [d.text for d in read_records(dataset)] == [d.text for d in read_records(records(3))]
    document = Document("text", "here")
    assert read_records(iter([document])) == [document]
    path.write_text('{"input": "q"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        read_records(path)


def test_a_stream_is_stored_as_it_comes(tmp_path: Path) -> None:
    seen: set[str] = set()
    refused = tmp_path / "refused.jsonl"
    rows: list[Any] = [*records(3), *records(3), {"input": "q"}, *records(6)]
    stream = iter_new(iter(rows), seen, refused, lambda _: None)
    first = next_round(tmp_path / "1", stream, 4, seen)
    assert [d.text for d in first] == [d.text for d in read_records(records(4))]
    assert [json.loads(line)["record"] for line in refused.read_text().splitlines()] == [{"input": "q"}]
    part = next_round(tmp_path / "2", stream, 4, seen)
    assert len(part) == 2 and not (tmp_path / "2" / "records.jsonl").exists()
    with (tmp_path / "2" / "incoming.jsonl").open("a") as file:
        file.write('{"text": "torn by a ki')
    known: set[str] = set()
    assert next_round(tmp_path / "1", iter([]), 4, known) == first and len(known) == 4
    rest = next_round(tmp_path / "2", iter_new(records(9), known, refused, lambda _: None), 4, known)
    assert [d.text for d in rest] == [d.text for d in read_records(records(9))][4:8]  # the stream began again


def test_a_round_that_an_earlier_version_stored(tmp_path: Path) -> None:
    document = Document("q\na", "here", response_start=2)
    assert next_round(tmp_path, iter([document]), 1, set()) == [document]
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace("response_start", "answer_at"))
    assert '"answer_at": 2' in path.read_text() and next_round(tmp_path, iter([]), 1, set()) == [document]


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x1c"])
def test_odd_line_ends_in_a_stored_round(odd: str, tmp_path: Path) -> None:
    document = Document(f"one{odd}two", "here")
    assert next_round(tmp_path, iter([document]), 1, set()) == [document]
    assert next_round(tmp_path, iter([]), 1, set()) == [document]


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def test_tools_are_shown_to_the_model_as_in_a_request(tmp_path: Path) -> None:
    plain = Tokenizer.train(["now noon"], 261)
    knows = Tokenizer(plain.definition, {}, "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
                      "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    turns = [{"role": "user", "content": "now?"}, {"role": "assistant", "content": "noon"}]
    for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]], [TOOL | {"strict": None}]):
        record = {"messages": turns, "tools": tools}
        [document] = read_records([record])
        for tokenizer in (plain, knows):
            [example] = encode(document, tokenizer, 999)
            assert list(example.ids) == tokenizer.encode_chat(turns, tools=[TOOL], add_generation_prompt=False)
            assert "noon" in learnt(record, tokenizer, 999) and "clock" not in learnt(record, tokenizer, 999)
        assert knows.decode(example.ids).startswith("[clock]user:now?")
    bare = Tokenizer(plain.definition, {}, None)
    [example] = encode(document, bare, 999)
    assert '"clock"' in bare.decode(example.ids) and learnt(record, bare, 999) == f"noon\n\n{EOS}"
    [without, *others] = read_records([{"messages": turns, "tools": none} for none in (None, [], "[]", " ")])
    assert all(other.turns == without.turns for other in others)
    assert without.turns == document.turns[1:] and tune_records.digest(without) != tune_records.digest(document)
    assert next_round(tmp_path, iter([document]), 1, set()) == next_round(tmp_path, iter([]), 1, set()) == [document]
    for odd, rule in (("clock", "not JSON"), (["clock"], r"tools\[0\] = 'clock': must be a tool"),
                      ({"name": "clock"}, "must be a list"), ([{"function": {}}], r"tools\[0\]")):
        with pytest.raises(DataError, match=rf"record 1: tools.*{rule}|record 1: {rule}"):
            read_records([{"messages": turns, "tools": odd}])


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_of_prompt_and_completion_the_completion_is_learnt(tools: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    prompt: list[Any] = [
              {"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]},
              {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "before\n\nAssistant: x"},
              {"role": "user", "content": "now?"}]
    completion = [{"role": "assistant", "content": "noon"}]
    tokenizer = Tokenizer.train(["now noon"], 261)
    bare = Tokenizer(tokenizer.definition, {}, None)
    for record in ({"prompt": prompt, "completion": completion, "tools": tools},
                   {"prompt": prompt, "completion": "noon", "tools": tools}):
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        [document], [same] = read_records([record]), read_records(tmp_path / "a.jsonl")
        [again] = to_documents(to_table([document]))
        assert document.turns == same.turns == again.turns
        assert document.response_start == same.response_start == again.response_start
        assert document.response_start is not None and document.text[document.response_start :] == "Assistant: noon"
        [example] = encode(document, tokenizer, 999)
        assert list(example.ids) == tokenizer.encode_chat(prompt + completion, tools=tools, add_generation_prompt=False)
        assert learnt(record, tokenizer, 999) == f"noon{EOS}" and learnt(record, bare, 999) == f"noon\n\n{EOS}"
    assert learnt({"prompt": "now?", "completion": completion}, tokenizer) == f"noon{EOS}"
    with pytest.raises(DataError, match="no turn of an assistant"):
        learnt({"prompt": prompt, "completion": [{"role": "user", "content": "?"}]}, tokenizer)


def test_control_tokens_of_a_text_count_where_they_are_asked_for() -> None:
    tokenizer = Tokenizer.train(["now noon"], 261)
    turns = [{"role": "user", "content": "now?"}, {"role": "assistant", "content": "noon"}]
    said = tokenizer.chat(turns, add_generation_prompt=False)
    [document, second] = read_records([{"text": said}, {"text": f"noon {said}"}])
    [example] = encode(document, tokenizer, 99, parse_special=True)
    assert list(example.ids) == tokenizer.encode_chat(turns, add_generation_prompt=False)  # one begin, one end
    with pytest.warns(UserWarning, match=r"records:1 spells out the control token '<\|begin_of_sentence\|>'"):
        data = RecordSet.of([document, second], tokenizer, max_length=999)  # said once
    RecordSet.of([document, second], tokenizer, max_length=999)
    both = [tokenizer.decode(side[0].ids) for side in (data.train, data.valid)]
    assert sorted(both) == sorted([document.text, second.text])
    other = RecordSet.of([document, second], tokenizer, max_length=999, parse_special=True)
    assert data.fingerprint != other.fingerprint and example in (other.train[0], other.valid[0])


def test_a_user_who_has_the_last_word_is_not_learnt(tokenizer: Tokenizer) -> None:
    plain = Tokenizer(tokenizer.definition, {}, None)
    said = (("user", "pay?"), ("assistant", "coins"), ("user", "act"))
    turns = [{"role": role, "content": text} for role, text in said]
    for each, answer in ((plain, "coins\n\n"), (tokenizer, f"coins{EOS}")):
        assert learnt({"messages": turns}, each) == answer


def test_a_template_that_opens_a_thought_for_generation(tokenizer: Tokenizer) -> None:
    template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                "{% if add_generation_prompt %}[assistant]<think>{% endif %}")
    thinking = Tokenizer(tokenizer.definition, {}, template)
    assert learnt({"input": "pay?", "output": "coins"}, thinking) == "coins"


def test_lists_of_strings(tmp_path: Path) -> None:
    texts = ["Is this ok?", "a" * 5000, "x*y"]
    assert [d.text for d in read_records(texts)] == texts
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(records(1)[0]) + "\n")
    with pytest.raises(DataError, match="leads nowhere, though others in the list are paths"):
        read_records([str(path), "b.jsonl"])


def test_a_hugging_face_data_set(tokenizer: Tokenizer) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the test extra (datasets)")
    rows = records(4)
    found = read_records(datasets.Dataset.from_list(rows))
    assert [d.text for d in found] == [d.text for d in read_records(rows)]
    assert found[0].response_start is not None and found[0].metadata["complexity"] == "初级"


def test_tool_turns_are_learnt_as_the_server_reads_them() -> None:
    call = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    trl: list[dict[str, Any]] = [{"role": "developer", "content": "Be brief."},
           {"role": "user", "content": [{"type": "text", "text": "Now?"}]},
           {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "12:00"},
           {"role": "assistant", "content": "Noon.", "tool_calls": []}]
    sharegpt = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Now?"},
                {"from": "function_call", "value": '{"name": "time", "arguments": {"zone": "UTC"}}'},
                {"from": "observation", "value": "12:00"}, {"from": "gpt", "value": "Noon."}]
    tokenizer = Tokenizer.train(["now noon"], 261)
    want = tokenizer.encode_chat(trl, add_generation_prompt=False)
    for messages in (trl, sharegpt):
        [document] = read_records([{"messages": messages}])
        [example] = encode(document, tokenizer, 999)
        assert list(example.ids) == want and len(example.loss_spans) == 2
    said = tokenizer.decode(want[example.loss_spans[0][0] : example.loss_spans[0][1]], skip_special=False)
    assert "time" in said and '{"zone": "UTC"}' in said and "12:00" not in said


def test_every_name_has_held_out_records(tokenizer: Tokenizer) -> None:
    def documents(name: str, count: int) -> list[Document]:
        return [Document(f"{name} {i} pay coins", name, i, expert=name, response_start=6) for i in range(count)]

    plain = Tokenizer(tokenizer.definition, {}, None)
    given = [*documents("law", 30), *documents("act", 5), *documents("one", 1)]
    data = RecordSet.of(given, plain, max_length=64, valid_fraction=0.01)
    held = {document.text for document in given if digest(document) in data.held_out}
    assert {name: sum(text.startswith(name) for text in held) for name in ("law", "act", "one")} == {
        "law": 2, "act": 2, "one": 0}
    assert len(data.valid) == 4 and len(data.train) == 32
    assert {plain.decode(example.ids) for example in data.valid} == held
    assert [note.partition(";")[0] for note in data.split_notes] == [
        "warning: valid_fraction = 0.01 holds out 0 of 5 records of act",
        "warning: valid_fraction = 0.01 holds out 0 of 30 records of law",
        "warning: valid_fraction = 0.01 holds out 0 of 1 records of one, and there is nothing to hold out instead: it "
        "cannot be measured"]
    # a single long text gives its last windows
    book = Document("pay coins of the act " * 60, "book.txt")
    data = RecordSet.of([book], plain, max_length=32, valid_fraction=0.1)
    whole = [*encode(book, plain, 32)]
    assert [*data.train, *data.valid] == whole and len(data.valid) == max(1, round(len(whole) * 0.1))
    assert "the end of one is held out" in data.split_notes[0]
    with pytest.raises(DataError, match="has a single record, 3 times; at least two are needed"):
        RecordSet.of([documents("law", 1)[0]] * 3, plain, max_length=64)
