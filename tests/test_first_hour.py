"""What a user meets in the first hour: spelling, folders, next steps, and calls as one would guess them."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from deepseek import cli
from deepseek.checkpoint import resolve
from deepseek.cli.common import sampling_params
from deepseek.cli.main import make_parser
from deepseek.config import ModelConfig
from deepseek.engine import LLM, SamplingParams
from deepseek.engine.options import EngineOptions, EngineSettings
from deepseek.engine.sampling_params import SamplingOptions
from deepseek.errors import ConfigError, NotFoundError, RequestError
from deepseek.model import CausalLM
from deepseek.tokenizer import Tokenizer
from deepseek.tune.records import each_record
from deepseek.tune.settings import TuneConfig, TuneSettings
from deepseek.tune.tuner import MoEFineTuner, run_folder


@pytest.fixture(scope="module")
def llm(tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]) -> LLM:
    tokenizer = Tokenizer.train(["a few words of text"] * 3, 300)
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    return LLM(random_model(config), tokenizer=tokenizer, cache_tokens=2048)


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "hint"), [
    (["quantise", "a", "b"], "did you mean quantize?"), (["atlas", "shwo", "x"], "did you mean show?"),
    (["infer", "--model", "x", "--max_token", "3"], "did you mean --max_tokens?"),
    (["infer", "--model", "x", "--temprature=1"], "did you mean --temperature?"),
    (["train", "nano", "x", "--out", "y", "--step", "3"], "did you mean --steps?"),
    (["quantize", "a", "b", "--format", "int4"], "did you mean int8?"),
    (["data", "dedup", "x", "--out", "y", "--thresold", "1"], "did you mean --threshold?"),
    (["serve", "x", "--prot", "80"], "did you mean --port?")])
def test_words_that_are_nearly_right(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Abbreviations are none of them: a flag that comes later would change what they mean."""
    try:
        status: Any = cli.main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and hint in capsys.readouterr().err


@pytest.mark.parametrize("words", [["info", "nanoo"], ["train", "smal", "x", "--out", "y"]])
def test_a_preset_that_is_nearly_right(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert re.search("did you mean (nano|small)[?]", capsys.readouterr().err)


def test_the_help_states_defaults_once_and_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "tune", "serve", "infer", "quantize"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert not re.search(r"default: (None|False|\[\]|\))|\(default: [^)]*\) \(default", said)
    with pytest.raises(SystemExit):
        cli.main(["train", "nano", "x"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--out" in error and "deepseek train --help" in error


def test_data_without_a_configuration_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (notes := tmp_path / "notes").mkdir()
    (notes / "a.txt").write_text("words")
    for words in ([notes], [notes / "a.txt"], [notes, notes]):
        assert cli.main(["train", *map(str, words), "--out", str(tmp_path / "out")]) == 2
        assert "is no configuration; a preset (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [
    lambda: TuneConfig.of({"expert_tun": ["x"]}), lambda: EngineOptions.of({"max_num_seq": 3})])
def test_settings_that_are_nearly_right(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"did you mean (expert_tune|max_num_seqs)[?]"):
        make()


def test_a_run_stands_for_its_model_and_other_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="the folder is empty"):
        resolve(tmp_path)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(NotFoundError, match="a run that has not finished"):
        resolve(tmp_path)
    (tmp_path / "delta").mkdir()
    with pytest.raises(NotFoundError, match="give the base model, and this as its adapter"):
        resolve(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path / "model"
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path


def test_info_ends_with_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "nano"]) == 0
    assert capsys.readouterr().out.rstrip().rpartition("\n")[2].startswith("try:   deepseek train nano ")


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> None:
        warnings.warn_explicit("twice the tokens", UserWarning, "/x/deepseek/engine/llm.py", 3)
        warnings.warn_explicit("old", FutureWarning, "/x/torch/nn.py", 7)

    monkeypatch.setattr("deepseek.cli.info.run", run)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["info", "nano"]) == 0
    assert capsys.readouterr().err == ("deepseek: warning: twice the tokens\n"
                                       "deepseek: warning: old (FutureWarning, /x/torch/nn.py:7)\n")


def test_chat_refuses_unknown_commands_and_base_models(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from deepseek.cli import chat

    monkeypatch.setattr(chat, "make_llm", lambda args: llm)
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n/Clear all\n/usr/bin is a path\n/exit\n"))
    assert cli.main(["chat", "--model", "x", "--max_tokens", "2"]) == 0
    said = capsys.readouterr()
    assert said.err.count("no such command; /reset forgets") == 2 and "/quit" in said.err and "/Clear" in said.err
    assert said.out  # an answer to the path
    monkeypatch.setattr(Tokenizer, "has_chat_template", False)
    assert cli.main(["chat", "--model", "x"]) == 2
    assert "is a base model" in capsys.readouterr().err


# ---- Python --------------------------------------------------------------------------------------------------------


def test_prompts_and_sampling_as_one_would_guess(llm: LLM) -> None:
    expected = llm.generate(["few words"], SamplingParams(max_tokens=3, temperature=0))
    assert llm.generate("few words", max_tokens=3, temperature=0) == expected
    assert llm.generate(["few words"], SamplingParams(temperature=0), max_tokens=3)[0].text == expected[0].text
    assert "".join(llm.stream("few words", max_tokens=3, temperature=0)) == expected[0].text
    ids = llm.encode("few words")
    assert llm.generate(ids, max_tokens=3, temperature=0)[0].text == expected[0].text
    message = [{"role": "user", "content": "few"}]
    assert llm.generate(message, max_tokens=3, temperature=0)[0].text == llm.chat(
        message, max_tokens=3, temperature=0).text
    assert llm.generate([]) == []
    with pytest.raises(TypeError, match="max_token"):
        llm.generate("few", max_token=3)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="temperature = -1"):
        llm.generate("few", temperature=-1)


def test_more_tokens_than_the_model_has_positions_for_are_a_warning(llm: LLM) -> None:
    with pytest.warns(UserWarning, match="max_tokens = 1000: prompt and text end at the model's context of 64"):
        llm.generate("few", max_tokens=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.generate("few")  # the default asks for nothing in particular
        llm.generate("few", max_tokens=32)


def test_defaults_of_sampling_agree_between_python_and_command_line() -> None:
    parse = make_parser().parse_args
    assert sampling_params(parse(["infer", "--model", "x"])) == SamplingParams()
    assert sampling_params(parse("infer --model x --top-p 0.5 --stop a --stop b --no-ignore-eos".split())) == (
        SamplingParams(top_p=0.5, stop=("a", "b")))


@pytest.mark.parametrize(("options", "settings", "call"), [
    (SamplingOptions, SamplingParams, LLM.generate), (EngineSettings, EngineOptions, LLM.__init__),
    (TuneSettings, TuneConfig, MoEFineTuner.__init__)])
def test_keyword_arguments_are_typed_one_by_one(options: Any, settings: Any, call: Callable[..., Any]) -> None:
    """So that an editor completes them. A list, or one text, may stand for a tuple."""
    def plain(hint: Any) -> set[Any]:
        kinds = {*get_args(hint)} if get_origin(hint) in (UnionType, Union) else {hint}
        kinds = {Sequence[get_args(kind)[0]] if get_origin(kind) is tuple else kind for kind in kinds}  # type: ignore[misc]
        return kinds - {str} if Sequence[str] in kinds else kinds

    given, stored = get_type_hints(options), get_type_hints(settings)
    assert [*given] == [field.name for field in fields(settings)]
    assert {name: plain(hint) for name, hint in given.items()} == {name: plain(stored[name]) for name in given}
    assert options.__name__ in str([*inspect.signature(call).parameters.values()][-1].annotation)


@pytest.mark.parametrize("name", ["expert_tune", "expert_freeze"])
def test_one_name_of_experts_needs_no_list(name: str) -> None:
    assert getattr(TuneConfig.of({name: "code_expert"}), name) == ("code_expert",)
    assert TuneConfig.of({"expert_tune": "auto"}).expert_tune == "auto"


@pytest.mark.parametrize("library", ["polars", "polars lazy", "pandas"])
def test_a_frame_is_a_data_set(library: str) -> None:
    """A record a row; a missing value is no value."""
    name, _, lazy = library.partition(" ")
    frame = pytest.importorskip(name, reason=f"needs {name}").DataFrame(
        {"input": ["a", "b"], "output": ["c", "d"], "system": ["s", None]})
    documents = [*each_record(frame.lazy() if lazy else frame)]
    expected = [*each_record([{"input": "a", "output": "c", "system": "s"}, {"input": "b", "output": "d"}])]
    assert [one.text for one in documents] == [one.text for one in expected] and len(documents) == 2


def test_runs_of_two_models_have_two_folders(tmp_path: Path) -> None:
    folders = [tmp_path / run / "model" for run in ("law", "code", "old/law")]
    for folder in folders:
        folder.mkdir(parents=True)
    runs = [run_folder(str(folder), folder) for folder in folders]
    assert len({*runs}) == 3 and runs[0].name.startswith("law-tuned-")
    assert run_folder(f"{folders[0]}/../model", folders[0]) == runs[0]
    assert run_folder("owner/name", Path("cache/1")).name.startswith("name-tuned-")
    assert run_folder("owner/name", Path("cache/1")) == run_folder("owner/name", Path("cache/2"))
