"""What goes in comes out, whole, once an epoch, in an order that depends on nothing but seed and step."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek.data import Document, ReadReport, TokenShards, pack, pack_cached
from deepseek.data import shards as module
from deepseek.errors import ConfigError, DataError, NotFoundError
from deepseek.tokenizer import Tokenizer


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words, 一些字\n" * 9], 300)


def documents(count: int, length: int = 30) -> list[Document]:
    return [Document(f"document {i} " + "words " * (i % length), f"f{i % 3}.txt") for i in range(count)]


def split(shards: TokenShards, name: str) -> list[int]:
    return np.fromfile(shards.folder / f"{name}.bin", shards.about["dtype"]).tolist()


def texts(shards: TokenShards, name: str) -> list[str]:
    ids = tokenizer().decode(split(shards, name), skip_special=False)
    return [part.removesuffix("<|end_of_sentence|>") for part in ids.split("<|begin_of_sentence|>")[1:]]


def counting(folder: Path, tokens: int) -> TokenShards:
    """Shards whose tokens are 0, 1, 2, …: a token says where it came from."""
    folder.mkdir()
    np.arange(tokens, dtype="<u4").tofile(folder / "train.bin")
    np.arange(23, dtype="<u4").tofile(folder / "valid.bin")
    (folder / "shards.json").write_text(json.dumps(
        {"format": 1, "dtype": "<u4", "train_tokens": tokens, "valid_tokens": 23}))
    return TokenShards.open(folder)


# ---- packing ----------------------------------------------------------------------------------------------------


def test_every_document_is_in_one_split_between_bos_and_eos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    seen: list[tuple[int, int]] = []
    given = documents(300)
    shards = pack(given, tokenizer(), tmp_path / "t", valid_fraction=0.1, progress=lambda *at: seen.append(at))
    train, valid = texts(shards, "train"), texts(shards, "valid")
    assert sorted(train + valid) == sorted(d.text for d in given)
    assert 15 <= len(valid) <= 50
    assert split(shards, "train")[0] == 0
    assert split(shards, "train")[-1] == 1
    assert shards.about["dtype"] == "<u2"
    assert shards.about["sources"] == {"f0.txt": 100, "f1.txt": 100, "f2.txt": 100}
    assert shards.about["documents"] == 300
    assert shards.about["tokenizer"] == tokenizer().fingerprint
    assert len(seen) == 43
    assert seen[-1] == (300, shards.train_tokens + shards.valid_tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_the_split_follows_the_text_not_the_order(tmp_path: Path) -> None:
    given = documents(200)
    first = pack(given, tokenizer(), tmp_path / "a", valid_fraction=0.1)
    turned = pack(given[::-1] + documents(250)[200:], tokenizer(), tmp_path / "b", valid_fraction=0.1)
    assert set(texts(first, "valid")) == set(texts(turned, "valid")) & {d.text for d in given}
    other = pack(given, tokenizer(), tmp_path / "c", valid_fraction=0.1, seed=1)
    assert set(texts(other, "valid")) != set(texts(first, "valid"))
    again = pack(given, tokenizer(), tmp_path / "d", valid_fraction=0.1)
    assert split(again, "train") == split(first, "train")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_little_data_still_has_both_splits(count: int, fraction: float, tmp_path: Path) -> None:
    given = [Document(f"{i} " + "words " * 100, "x") for i in range(count)]
    shards = pack(given, tokenizer(), tmp_path / "t", valid_fraction=fraction)
    whole = sum(len(tokenizer().encode(d.text)) + 2 for d in given)
    assert shards.train_tokens + shards.valid_tokens == whole
    assert shards.train_tokens > 0
    assert shards.valid_tokens >= 2
    assert next(shards.valid_batches(2, 8))
    if count == 1:  # split by position
        ids = [0, *tokenizer().encode(given[0].text), 1]
        assert split(shards, "train") + split(shards, "valid") == ids
        assert shards.valid_tokens == max(2, round(whole * fraction))


def test_nothing_held_out_if_so_asked(tmp_path: Path) -> None:
    shards = pack(documents(3), tokenizer(), tmp_path / "t", valid_fraction=0)
    assert (shards.valid_tokens, list(shards.valid_batches(2, 8))) == (0, [])
    with pytest.raises(ConfigError, match=r"valid_fraction = 1: must be at least 0 and below 1"):
        pack(documents(3), tokenizer(), tmp_path / "t", valid_fraction=1)


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    talk = Document("User: a\n\nAssistant: b", "c.jsonl", 4, (("user", "a<|User|>"), ("assistant", "b")))
    shards = pack([talk], tokenizer(), tmp_path / "t", valid_fraction=0)
    ids = split(shards, "train")
    assert tokenizer().decode(ids, skip_special=False) == (
        "<|begin_of_sentence|><|User|>a<|User|><|Assistant|>b<|end_of_sentence|>")
    assert [i for i in ids if i < 5] == [0, 3, 4, 1], "quoted control tokens stay text"
    bare = Tokenizer(tokenizer().definition)
    plain = pack([talk], bare, tmp_path / "u", valid_fraction=0)
    assert texts(plain, "train") == [talk.text]


def test_a_refused_conversation_is_reported(tmp_path: Path) -> None:
    strict = Tokenizer(tokenizer().definition, {}, "{{ raise_exception('no') }}")
    talk = Document("User: a", "c.jsonl", 4, (("user", "a"),))
    with pytest.raises(DataError, match=r"c\.jsonl: the chat template refuses the messages: no"):
        pack([talk], strict, tmp_path / "t")
    report = ReadReport()
    shards = pack([talk, *documents(3)], strict, tmp_path / "t", report=report)
    assert shards.about["documents"] == 3
    assert [str(p) for p in report.problems] == [
        "c.jsonl:4: refused conversation: the chat template refuses the messages: no"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to pack"):
        pack([], tokenizer(), tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_packing_is_skipped_when_nothing_changed(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some words " * 50)
    (text / "bad.txt").write_bytes(b"\xff")
    out = tmp_path / "tokens"
    shards, report = pack_cached([text], tokenizer(), out)
    assert report is not None
    assert report.counts == {"not UTF-8": 1}
    again, nothing = pack_cached([text], tokenizer(), out)
    assert nothing is None
    assert again.about == shards.about
    changes: list[dict[str, Any]] = [dict(valid_fraction=0.5), dict(seed=1), {}]
    for change in changes:
        assert pack_cached([text], tokenizer(), out, **change)[1] is not None
    assert pack_cached([text], Tokenizer.train(["other"], 262), out)[1] is not None
    pack_cached([text], tokenizer(), out)
    os.utime(text / "a.txt", ns=(1, 1))
    assert pack_cached([text], tokenizer(), out)[1] is not None
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8"):
        pack_cached([text], tokenizer(), tmp_path / "strict", strict=True)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Large(Tokenizer):
        def __init__(self) -> None:
            super().__init__(tokenizer().definition)
            self.vocab_size = 65537

    shards = pack(documents(3), Large(), tmp_path / "t")
    assert shards.about["dtype"] == "<u4"
    assert (tmp_path / "t" / "train.bin").stat().st_size == 4 * shards.train_tokens


def test_damaged_shards_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"shards\.json: no such file"):
        TokenShards.open(tmp_path)
    shards = counting(tmp_path / "t", 100)
    os.truncate(shards.folder / "train.bin", 396)
    with pytest.raises(DataError, match=r"train\.bin: truncated or altered: 396 bytes, shards\.json says 400"):
        TokenShards.open(shards.folder)
    (shards.folder / "shards.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match=r"shards\.json: format = 2: must be 1"):
        TokenShards.open(shards.folder)
    (shards.folder / "shards.json").write_text("[]")
    with pytest.raises(DataError, match=r"shards\.json: not a description"):
        TokenShards.open(shards.folder)


# ---- windows ----------------------------------------------------------------------------------------------------


def epoch(shards: TokenShards, number: int, seq_len: int, seed: int = 0) -> Tensor:
    windows = shards.windows(seq_len)
    return torch.cat([shards.batch(number * windows + i, 1, seq_len, seed=seed)[0] for i in range(windows)])


@pytest.mark.parametrize(
    ("tokens", "seq_len"), [(1000, 10), (1009, 10), (101, 7), (15, 10), (11, 10), (20, 10), (9, 1)])
def test_an_epoch_visits_every_window_once(tokens: int, seq_len: int, tmp_path: Path) -> None:
    shards = counting(tmp_path / "t", tokens)
    offsets = set()
    for number in range(6):
        ids = epoch(shards, number, seq_len)
        offset = int(ids.min())
        offsets.add(offset)
        assert 0 <= offset < seq_len
        n = shards.windows(seq_len) * seq_len
        assert sorted(ids.flatten().tolist()) == list(range(offset, offset + n)), "a partition of the tokens"
        assert tokens - n <= 2 * seq_len
    if tokens > 100:
        assert len(offsets) > 1


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    ids, labels = counting(tmp_path / "t", 200).batch(3, 4, 16, seed=5)[:2]
    assert ids.shape == labels.shape == (4, 16)
    assert ids.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, ids + 1)


def test_the_order_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    shards = counting(tmp_path / "t", 1000)
    forward = [shards.batch(step, 4, 10, seed=1)[0] for step in range(60)]
    fresh = TokenShards.open(shards.folder)
    torch.manual_seed(99)
    for step in (59, 0, 31, 24, 25):
        assert torch.equal(fresh.batch(step, 4, 10, seed=1)[0], forward[step])
    assert not torch.equal(epoch(shards, 0, 10), epoch(shards, 0, 10, seed=1))
    assert not torch.equal(epoch(shards, 0, 10), epoch(shards, 1, 10))


def test_batches_straddle_epochs(tmp_path: Path) -> None:
    shards = counting(tmp_path / "t", 110)
    assert shards.windows(10) == 10
    one_by_one = torch.cat([shards.batch(i, 1, 10, seed=0)[0] for i in range(32)])
    assert torch.equal(torch.cat([shards.batch(i, 4, 10, seed=0)[0] for i in range(8)]), one_by_one)
    assert torch.equal(shards.batch(0, 32, 10, seed=0)[0], one_by_one)
    assert shards.epochs(5, 4, 10) == 2.0


def test_too_little_data_says_how_much_is_needed(tmp_path: Path) -> None:
    shards = counting(tmp_path / "t", 10)
    with pytest.raises(DataError, match="a window of seq_len 10 needs 11 training tokens, there are 10"):
        shards.batch(0, 1, 10, seed=0)
    with pytest.raises(ConfigError, match="seq_len = 0"):
        shards.windows(0)


def test_held_out_windows(tmp_path: Path) -> None:
    shards = counting(tmp_path / "t", 10)  # 23 held-out tokens: 22 labels
    batches = list(shards.valid_batches(2, 5))
    assert [ids.shape[0] for ids, *_ in batches] == [2, 2, 1]
    labels = torch.cat([labels for _, labels, *_ in batches]).flatten()
    assert labels.tolist() == [*range(1, 23), -100, -100, -100]
    ids = torch.cat([ids for ids, *_ in batches]).flatten()
    assert ids.tolist() == [*range(23), 0, 0]
    assert len(list(shards.valid_batches(2, 5, 1))) == 1
    assert list(shards.valid_batches(2, 5, 0)) == []
