"""The command line as a program: how it is started, how flags are spelled, what help says, what shells complete."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from deepseek.cli.main import COMMANDS, make_parser
from deepseek.cli.parser import Parser, Switch
from deepseek.deepopt.settings import RunConfig
from deepseek.settings import declared
from deepseek.tune.settings import TuneConfig


@pytest.mark.parametrize("module", ["deepseek", "deepseek.cli"])
def test_the_command_runs_as_a_module(module: str) -> None:
    said = subprocess.run([sys.executable, "-m", module, "info", "nano"], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "Parameters" in said.stdout, said.stderr


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser and those of its commands and steps, with their flags."""
    yield parser.filled()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


ALL = [*parsers(make_parser())]


def test_every_command_and_step_is_there() -> None:
    names = {parser.prog for parser in ALL}
    assert {f"deepseek {name}" for name in COMMANDS} | {"deepseek data pack", "deepseek atlas show"} <= names


@pytest.mark.parametrize("parser", ALL, ids=lambda parser: parser.prog)
def test_help_is_complete_and_shows_no_empty_default(parser: Parser) -> None:
    said = parser.format_help()
    assert not re.search(r"\(default:\s*(None|False|\[\])?\s*\)", said)
    for action in parser._actions:
        shown = action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction)
        assert action.help or not shown, action.dest
        if shown and action.option_strings:
            assert action.option_strings[-1] in said
            assert f"default: {action.default})" in re.sub(r"\s+", " ", said) or not isinstance(
                action.default, int | float) or isinstance(action.default, bool)


def long_flags(parser: Parser) -> list[tuple[str, argparse.Action]]:
    return [(flag, action) for action in parser._actions for flag in action.option_strings if "_" in flag]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of former names
@pytest.mark.parametrize("parser", [one for one in ALL if long_flags(one)], ids=lambda parser: parser.prog)
def test_flags_are_spelled_with_hyphens_or_underscores(parser: Parser) -> None:
    needed = [action for action in parser._actions if action.required]
    for action in needed:
        action.required = False
    try:
        for flag, action in long_flags(parser):
            value = {int: ["3"], float: ["0.5"]}.get(action.type, [str(next(iter(action.choices or ["a=b"])))])  # type: ignore[call-overload]
            value = [] if action.nargs == 0 else ['{"a": 1}'] if action.type is json.loads else value
            usual = [vars(parser.parse_args(words)) for words in (
                [flag, *value], [flag.replace("_", "-"), *value], [flag, *value][:1] if not value else [
                    f"{flag.replace('_', '-')}={value[0]}"])]
            mixed = vars(parser.parse_args([flag.replace("_", "-", 1), *value]))
            assert usual[0] == usual[1] == usual[2] == mixed
            assert usual[0][action.dest] != vars(parser.parse_args([]))[action.dest] or action.default in ("fcfs", True)
    finally:
        for action in needed:
            action.required = True


@pytest.mark.parametrize(("words", "name", "value"), [
    (["infer", "--model", "x"], "prefetch", None), (["infer", "--model", "x", "--no_prefetch"], "prefetch", False),
    (["infer", "--model", "x", "--no-prefetch"], "prefetch", False),
    (["infer", "--model", "x", "--no-prefetch", "--prefetch"], "prefetch", True),
    (["tune", "m", "d", "--gradient-checkpointing"], "gradient_checkpointing", True),
    (["tune", "m", "d", "--no-gradient-checkpointing"], "gradient_checkpointing", False),
    (["tune", "m", "d", "--no_gradient_checkpointing"], "gradient_checkpointing", False),
    (["infer", "--model", "x", "--expert-memory", "4GiB"], "expert_memory", "4GiB"),
    (["infer", "--model", "x", "--chat-template_kwargs", '{"a": 1}'], "chat_template_kwargs", {"a": 1}),
    (["tune", "m", "d", "--no_gradient-checkpointing"], "gradient_checkpointing", False),
    (["train", "nano", "d", "--out", "o", "--min_lr-ratio=0.5"], "min_lr_ratio", 0.5),
    (["tune", "m", "d"], "gradient_checkpointing", None), (["train", "nano", "d", "--out", "o"], "lr", None),
    (["train", "nano", "d", "--out", "o", "--min-lr-ratio=0.5"], "min_lr_ratio", 0.5),
    (["infer", "--model", "x", "--prompt", "--no-prefetch and --top-p"], "prompt", "--no-prefetch and --top-p"),
])
def test_switches_and_values(words: list[str], name: str, value: object) -> None:
    assert getattr(make_parser().parse_args(words), name) == value


@pytest.mark.parametrize(("words", "hint"), [
    (["train", "nano", "d", "--out", "o", "--batchsize=3"], "did you mean --batch_size?"),
    (["serve", "m", "--api-kee", "3"], "did you mean --api_key?")])
def test_the_nearest_flag_is_found_in_both_spellings(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(words)
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(("command", "kind"), [("train", RunConfig), ("tune", TuneConfig)])
def test_every_setting_has_a_place_in_the_help(command: str, kind: type) -> None:
    [parser] = [parser for parser in ALL if parser.prog == f"deepseek {command}"]
    [rest] = [group for group in parser._action_groups if group.title == "options"]
    assert not {field.name for field in fields(kind)} - {"map"} & {action.dest for action in rest._group_actions}
    assert {one.name for one in declared(kind)} <= {action.dest for action in parser._actions}
    assert {action.dest for action in parser._actions if isinstance(action, Switch)} == {
        one.name for one in declared(kind) if one.kind is bool}


@pytest.mark.parametrize(("line", "expected"), [
    ("deepseek ", {*COMMANDS}), ("deepseek tr", {"train"}), ("deepseek data la", {"label"}),
    ("deepseek quantize --for", {"--format"}), ("deepseek infer --policy ", {"fcfs", "expert"})])
def test_shells_complete_commands_flags_and_choices(line: str, expected: set[str], tmp_path: Path) -> None:
    said = tmp_path / "said"
    subprocess.run([sys.executable, "-m", "deepseek"], check=False, timeout=60, capture_output=True, env=os.environ | {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(said), "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"})
    found = {word.strip() for word in said.read_text(encoding="utf-8").split("\n")}
    assert expected <= found and (len(expected) > 2 or expected == found)
