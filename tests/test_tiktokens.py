"""tiktoken's vocabularies become tokenizer.json with tiktoken's own ids; the code beside them is never run."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoint import save_model
from deepseek.config import ModelConfig
from deepseek.convert import dequantize, quantize
from deepseek.engine import LLM
from deepseek.errors import DataError, NotFoundError
from deepseek.model import CausalLM
from deepseek.tiktokens import FILE, PATTERNS, merges
from deepseek.tokenizer import Tokenizer
from tests.helpers.layouts_tokens import ranks, special, write

tiktoken = pytest.importorskip("tiktoken", reason="parity needs the test extra (tiktoken)")

PATTERN = "|".join(PATTERNS["kimi"])
LANGUAGES = (
    "The quick brown fox can't jump; it's 12345 pounds, we'LL see 3.14!\r\n\r\n  \tdone  ",
    "混合专家模型把每个词元交给少数几个专家，2024年。法律文书：第一百二十三条。\n",
    "日本語のテキスト、ひらがな・カタカナと漢字。々〆", "한국어 문장과 숫자 42개",
    "Übergrößenträger straße ΑΒΓ ёлка ЁЛКА İstanbul ǅ ﬁ", "العربية ١٢٣ نص", "हिन्दी में पाठ", "ไทย",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 \u200b\u00a0\u3000x", "def f(x):\n\treturn {'a': x**2}  # 注释\n", "𠀀𰀀𪛖 Ⅷ ½ ² ㊗",
    "a" * 300 + " " * 300 + "\n" * 50, "I'm I'M 'sS 's's you'Re ſ'ſ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write(place := tmp_path_factory.mktemp("tiktoken"))
    return place


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=dict(ranks()), special_tokens=special())


def any_text(rng: random.Random) -> str:
    kinds = ((32, 127), (0x4E00, 0x9FFF), (0xA0, 0x3100), (1, 0xD800), (0xE000, 0x110000), (32, 33), (10, 11), (39, 40))
    return "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(60)))


def test_ids_equal_tiktokens(folder: Path, theirs: Any) -> None:
    ours, rng = Tokenizer.load(folder), random.Random(0)
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_t*.py")]
    texts = [*LANGUAGES, *sources, *(any_text(rng) for _ in range(500))]
    for text in texts:
        assert ours.encode(text) == theirs.encode_ordinary(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == theirs.n_vocab == len(ranks()) + 24
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (len(ranks()), len(ranks()) + 1, len(ranks()) + 23)
    marked = "a<|im_end|>混[BOS]<|im_middle|><|reserved_token_1005|>[PAD]"
    reserved = special() | {"<|reserved_token_1005|>": 1005}
    encoding = tiktoken.Encoding("k", pat_str=PATTERN, mergeable_ranks=dict(ranks()), special_tokens=reserved)
    assert ours.encode(marked, special=True) == encoding.encode(marked, allowed_special="all")
    assert not set(ours.encode(marked)) & set(reserved.values())


@pytest.mark.parametrize("seed", range(12))
def test_any_ranks(seed: int, tmp_path: Path) -> None:
    """Ranks that no training made: parts that come after the whole, tokens that no merging reaches, overlaps."""
    rng = random.Random(seed)
    tokens: list[bytes] = []
    while len(tokens) < 60:
        token = bytes(rng.choice(b"ab" if seed % 2 else b"abc") for _ in range(rng.randrange(2, 9)))
        tokens += [token] if token not in tokens else []
    every = [*(bytes([b]) for b in range(256)), *tokens]
    rng.shuffle(every)
    (tmp_path / FILE).write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(every)))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TikTokenTokenizer"}')
    ours = Tokenizer.load(tmp_path)
    encoding = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(every)},
                                 special_tokens={})
    for _ in range(300):
        text = "".join(rng.choice("aabbc ") for _ in range(rng.randrange(40)))
        assert ours.encode(text) == encoding.encode_ordinary(text), text


def test_merges_of_overlapping_parts() -> None:
    table = {bytes([b]): b for b in range(256)} | {b"aa": 256, b"aaa": 257, b"ba": 258, b"aab": 259}
    assert merges(table) == [(b"a", b"a"), (b"aa", b"a"), (b"b", b"a"), (b"aa", b"b")]
    assert merges({b"a": 0, b"b": 1, b"c": 2, b"abc": 3}) == []  # nothing leads there: only a whole piece is it


def test_a_checkpoint_with_one_runs_and_converts(
    folder: Path, tmp_path: Path, tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM],
    theirs: Any,
) -> None:
    size = theirs.n_vocab
    model = save_model(random_model(tiny_config(vocab_size=size, bos_token_id=1000, eos_token_id=1001)), tmp_path / "m")
    for file in folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "manifest.json").unlink()
    llm = LLM(model)
    assert llm.encode("混合 a") == [1000, *theirs.encode("混合 a")]
    assert llm.encode([{"role": "user", "content": "a<|im_end|>"}]) == [
        *theirs.encode("<|im_user|>user<|im_middle|>", allowed_special="all"), *theirs.encode_ordinary("a<|im_end|>"),
        *theirs.encode("<|im_end|><|im_assistant|>assistant<|im_middle|>", allowed_special="all")]
    assert llm.generate(["a"])[0].token_ids
    quantize(model, tmp_path / "nf4", progress=False)
    dequantize(tmp_path / "nf4", tmp_path / "back", progress=False)
    for out in (tmp_path / "nf4", tmp_path / "back"):
        assert (out / "tokenizer.json").is_file()
        assert Tokenizer.load(out).fingerprint == llm.tokenizer.fingerprint
        assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    transformers = pytest.importorskip("transformers", reason="parity needs the test extra (transformers)")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "nf4")
    assert hf("混合 it's 12345", add_special_tokens=False)["input_ids"] == theirs.encode("混合 it's 12345")


@pytest.mark.parametrize(("edit", "message"), [
    (lambda f: (f / FILE).write_text("IQ== 0\nIQ== 1\n"), r"tiktoken\.model: line 2 is 'IQ== 1'"),
    (lambda f: (f / FILE).write_text("!!! 0\n"), "line 1 is '!!! 0'"),
    (lambda f: (f / FILE).write_text("IQ== -1\n"), "line 1"), (lambda f: (f / FILE).write_text("IQ==\n"), "line 1"),
    (lambda f: (f / FILE).write_text("IQ== 5\n"), "the ranks of its 1 tokens must be 0 to 0"),
    (lambda f: (f / FILE).write_text("IQ== 0\n"), "byte 0x00 is no token"),
    (lambda f: (f / FILE).write_bytes(b"\xff\xfe"), "not UTF-8"), (lambda f: (f / FILE).write_text(""), "byte 0x00"),
    (lambda f: settings(f, auto_map=None, tokenizer_class="QWenTokenizer"),
     "how its text is cut is not known here .tokenizer_class = 'QWenTokenizer', model_type = None.: known are"),
    (lambda f: settings(f, added_tokens_decoder=[1]), "added_tokens_decoder: '' ="),
    (lambda f: settings(f, added_tokens_decoder={"5": {"content": "x"}}), "'5' = .*must be an id from 1,000 on"),
    (lambda f: settings(f, added_tokens_decoder={"1000": {}}), "'1000' = {}"),
    (lambda f: settings(f, added_tokens_decoder={"1" * 30: {"content": "x"}}), "must be an id from 1,000 on"),
    (lambda f: settings(f, added_tokens_decoder={"x": {"content": "x"}}), "'x' ="),
    (lambda f: (f / "tokenization_moonshot.py").write_text(r"r'\p{L}+|\p{N}'"), "cuts text by another pattern"),
    (lambda f: (f / "tokenization_moonshot.py").write_bytes(b"\xff"), "not UTF-8"),
])
def test_what_is_not_read(folder: Path, tmp_path: Path, edit: Callable[[Path], object], message: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 500


def settings(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt"])
def test_other_vocabularies_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(NotFoundError, match=rf"tokenizer\.json: no such file; {name} is .* format"):
        Tokenizer.load(tmp_path)
