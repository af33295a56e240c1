"""Files beside and instead of weights that a checkpoint cannot use: one line says what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepseek.checkpoint import TensorFiles, load_model, save_model
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError, ConfigError, DataError, MoEDRError, NotFoundError
from deepseek.files import read_json
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]) -> Path:
    tokenizer = Tokenizer.train(["one two three " * 20], 300)
    return save_model(random_model(tiny_config(vocab_size=300)), tmp_path / "model", tokenizer=tokenizer)


@pytest.mark.parametrize(("names", "message"), [
    (["a.gguf"], r"it has GGUF \(a\.gguf\): `deepseek upcycle FILE OUT`"),
    (["pytorch_model.bin"], r"pickled weights \(pytorch_model\.bin\): they can run code when they are read: let trans"),
    (["model.pt", "other.pth", "x.CKPT"], r"pickled weights \(model\.pt and 2 more\)"),
    (["a.gguf", "b.bin"], r"GGUF \(a\.gguf\).*pickled weights \(b\.bin\)"),
    (["0_0.distcp"], "torch's distributed checkpoints"), (["tf_model.h5"], "weights of another program"),
    (["model0-mp1.safetensors"], r"model0-mp1\.safetensors and no model\.safetensors\.index\.json"),
    ([], "the folder is empty"), (["training_args.bin", "notes.txt"], "not a checkpoint$"),
])
@pytest.mark.parametrize("with_config", [False, True])
def test_what_is_in_the_place_of_safetensors(folder: Path, tmp_path: Path, names: list[str], message: str,
                                             with_config: bool, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in names:
        (other / name).write_bytes(b"GGUF")
    if with_config:
        (other / "config.json").write_bytes((folder / "config.json").read_bytes())
        (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        message = message if "is empty" not in message and "$" not in message else "model.safetensors: the file is mis"
    with pytest.raises((NotFoundError, CheckpointError), match=message):
        load_model(other)
    for words in (["infer", "--model", str(other), "--prompt", "a"], ["quantize", str(other), str(tmp_path / "out")]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(other) in line
    if names and "safetensors" not in names[0] and not names[0].startswith("training"):
        with pytest.raises(NotFoundError, match="a checkpoint is a folder, this is a file of "):
            load_model(other / names[0])


def test_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file: .*git lfs pull"):
        load_model(folder, verify=False)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("chat_template.jinja", "café".encode("latin-1"), r"chat_template\.jinja: not UTF-8: byte 0xe9 at 3"),
    ("chat_template.jinja", "a".encode("utf-16"), "not UTF-8: byte 0xff at 0"),
    ("tokenizer_config.json", b"\xff", r"tokenizer_config\.json: not valid JSON: not UTF-8: byte 0xff at 0"),
    ("tokenizer_config.json", b"[]", "must be a JSON object, got list"),
    ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token = 5: must be a text, an object with its content"),
    ("tokenizer_config.json", b'{"bos_token": {"content": []}}', "bos_token = "),
    ("tokenizer_config.json", b'{"pad_token": {}}', "pad_token = "),
    ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template = 3: must be a text"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": []}]}', "chat_template = "),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "chat_template = 0: must be a text"),
    ("special_tokens_map.json", b'{"eos_token": true}', r"special_tokens_map\.json: eos_token = True"),
    ("special_tokens_map.json", b'{"eos_token": "\\ud800"}', "half a character"),
    *(("generation_config.json", json.dumps({"eos_token_id": value}).encode(), "generation_config.json: ")
      for value in ("1", 1.5, True, -1, [1, "2"], [[1]], {"a": 1}, 2**40, [None, True], float("nan"))),
    ("generation_config.json", b'{"eos_token_id": 1, "eos_token_id": 2}', "comes twice with different values"),
    ("generation_config.json", b"", "not valid JSON"),
    ("tokenizer.json", b"\xff\xfe", r"tokenizer\.json: not a tokenizer: not UTF-8: byte 0xff at 0"),
    ("tokenizer.json", b"{}", "not a tokenizer"), ("tokenizer.json", b"", "not a tokenizer"),
])
def test_the_tokenizers_files(folder: Path, file: str, content: bytes, message: str,
                              capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.json").unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(folder)
    assert str(folder / file) in str(caught.value)
    assert main(["infer", "--model", str(folder), "--prompt", "a"]) == 2
    assert capsys.readouterr().err == f"deepseek: {caught.value}\n"


@pytest.mark.parametrize("ends", [None, 1, [1, 4], []])
def test_ends_that_a_generation_config_may_name(folder: Path, ends: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert Tokenizer.load(folder).eos_ids == ((1, 4) if ends == [1, 4] else (1,))


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.bool, torch.complex64, torch.uint8,
                                  torch.float8_e5m2])
def test_weights_of_a_kind_that_holds_none(folder: Path, tmp_path: Path, kind: torch.dtype) -> None:
    file = folder / "model.safetensors"
    tensors = {name: files.read(name).clone() for files in [TensorFiles(folder)] for name in files}
    tensors["model.norm.weight"] = torch.ones(32).to(kind)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"norm\.weight is (I|BOOL|C|U|F8_E5M2).*: weights must be F64, F32"):
        load_model(folder, verify=False)
    (folder / "manifest.json").unlink()
    with pytest.raises(MoEDRError, match=r"model\.norm\.weight"):
        from deepseek.convert import quantize

        quantize(folder, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_an_index_of_pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin' must be a safetensors file"):
        load_model(folder, verify=False)


def test_a_tensor_in_two_files(folder: Path) -> None:
    (folder / "mtp.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"mtp\.safetensors: .* is also in model\.safetensors"):
        load_model(folder, verify=False)


@pytest.mark.parametrize(("index", "message"), [
    ({}, "weight_map = None"), ({"weight_map": []}, r"weight_map = \[\]"), ({"weight_map": {}}, "weight_map = {}"),
    ({"weight_map": {"a": 1}}, "the file of a is 1"), ({"weight_map": {"a": ""}}, "the file of a is ''"),
    *(({"weight_map": {"a": name}}, "leads out of the folder") for name in ("../b", "/b", "b\x00")),
])
def test_an_index_that_is_none(folder: Path, index: dict[str, Any], message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder, verify=False)
    assert "model.safetensors.index.json: not a weight index" in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    (b'{"a": NaN}', "a: nan is no number of JSON"), (b'{"a": [{"b": -Infinity}]}', "a: 0: b: -inf is no number"),
    (b'{"a": 1e999}', "a: inf"), (b'{"a": 1, "a": 1.0}', "'a' comes twice"), (b'{"a": "\\uDC00"}', "half a character"),
    (b'\xef\xbb\xbf{}', "BOM"), (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    (b"[" * 100_000, "must be nested at most 64 deep"),
    (b'{"a": ' + b"[" * 70 + b"{}" + b"]" * 70 + b"}", "must be nested at most 64 deep"), (b'"a"', "object, got str"),
])
def test_json_that_is_none(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(tmp_path / "a.json", CheckpointError)
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere", "link to itself"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json",
                                  "chat_template.jinja", "special_tokens_map.json"])
def test_what_is_no_file_is_neither_waited_for_nor_passed_over(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    {"pipe": os.mkfifo, "folder": Path.mkdir, "link to nowhere": lambda path: path.symlink_to("nowhere"),
     "link to itself": lambda path: path.symlink_to(path.name)}[kind](folder / name)
    read: Callable[[Path], object] = ModelConfig.from_file if name == "config.json" else Tokenizer.load
    with pytest.raises(MoEDRError, match=r"must be a file|no such file|Too many levels|cannot be read") as caught:
        read(folder)
    assert str(folder / name) in str(caught.value)


def test_weights_that_are_a_pipe(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    for names in ((), ("model.safetensors",)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is missing"):
            TensorFiles(folder, verify=False, names=names)


def test_json_that_says_the_same_twice(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1], "a": [1], "b": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "a.json") == {"a": [1], "b": "😀"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"logit_scale": True}, "logit_scale = True changes the mathematics"), ({"mlp_bias": 0}, "mlp_bias = 0 changes"),
    ({"attention_dropout": False}, "attention_dropout = False"),
    *(({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, **odd}}, message)
      for odd, message in (({"mscale": False}, "rope_scaling.mscale = False"),
                           ({"mscale_all_dim": False}, "mscale_all_dim = False"),
                           ({"attention_factor": True}, "attention_factor = True"), ({"mscale": -1}, "mscale = -1"),
                           ({"factor": True}, "factor = True"), ({"truncate": 0}, "truncate = 0"),
                           ({"rope_theta": "x"}, "rope_scaling.rope_theta = 'x'"),
                           ({"\x1b[2J": 1}, r"unknown key \\x1b\[2J"))),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": True}}, "partial_rotary_factor = True"),
    ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
      "rope_parameters": {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64}},
     "rope_scaling and rope_parameters differ"),
    ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
      "rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_parameters differ"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
     r"rope_parameters\.rope_theta and rope_theta differ: \[50000\.0, 10000\.0\]"),
    ({"extra_key": [1, float("nan")]}, "extra_key: 1: nan"),
])
def test_configurations_that_contradict_themselves(changes: dict[str, Any], message: str,
                                                   tiny_config: Callable[..., ModelConfig]) -> None:
    keys = {k: v for k, v in tiny_config().to_dict().items() if k not in ("moe_dr", "rope_theta")}
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(keys | changes, strict="extra_key" not in changes)


def test_unknown_keys_are_printable(tiny_config: Callable[..., ModelConfig]) -> None:
    keys = {k: v for k, v in tiny_config().to_dict().items() if k != "moe_dr"} | {"\x1b[2J": 1}
    with pytest.raises(ConfigError, match=r"unknown key \\x1b\[2J = 1"):
        ModelConfig.from_dict(keys, strict=True)
    with pytest.warns(UserWarning, match=r"unknown key \\x1b\[2J = 1 is kept"):
        ModelConfig.from_dict(keys, strict=False)


def test_rope_keys_that_agree(tiny_config: Callable[..., ModelConfig]) -> None:
    keys = {k: v for k, v in tiny_config().to_dict().items() if k not in ("moe_dr", "rope_theta")}
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    config = ModelConfig.from_dict(keys | {
        "rope_theta": 50000, "rope_scaling": yarn, "rope_parameters": {**yarn, "rope_type": "yarn", "factor": 4.0,
                                                                       "rope_theta": 50000.0}})
    assert config.rope_theta == 50000 and config.yarn is not None and config.yarn.factor == 4
    plain = ModelConfig.from_dict(keys | {"rope_scaling": yarn, "rope_parameters": {"rope_theta": 7.0}})
    assert plain.rope_theta == 7 and plain.yarn is not None
