"""Ctrl-C and SIGTERM: the finished step is saved, a second signal leaves at once, and the message says what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from deepseek.cli import main
from deepseek.interrupts import Stopped, handled, held, kept
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, and tests too."""
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
              signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tests.helpers.stopped_runs", str(tmp_path_factory.mktemp("stopped"))],
                          cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_signal_lets_the_step_be_finished_and_saved(results: dict[str, Any]) -> None:
    status, said = results["int"]
    assert status == 130
    assert "SIGINT: step 3 is finished and saved first; a second one leaves at once" in said
    assert "stopped: step 3 of 6 is saved in int/checkpoint-000003, the run goes on from there\nresume: deep" in said
    assert "checkpoint-000003" in results["checkpoints"]["int"]
    status, said = results["term"]
    assert status == 143 and "step 3 of 6 is saved" in said
    # the same command, or --out alone, goes on, and ends in the bytes of a run that was not stopped
    assert [results[case][0] for case in ("calm", "int again", "term again", "evaluating again")] == [0] * 4
    assert "continuing after step 3" in results["term again"][1]
    assert results["weights"] == [True] * 3


def test_a_second_signal_leaves_at_once(results: dict[str, Any]) -> None:
    status, said = results["twice"]
    assert status == 130 and "no step is finished, so nothing is kept" in said
    assert results["checkpoints"]["twice"] == []


def test_outside_a_step_nothing_is_waited_for(results: dict[str, Any]) -> None:
    status, said = results["evaluating"]
    assert status == 130 and "step 4 of 6 is saved in evaluating/checkpoint-000004" in said
    status, said = results["packing"]
    assert status == 130 and "no step is finished, so nothing is kept but what lies prepared in packing" in said


def test_tuning_is_stopped_as_training_is(results: dict[str, Any]) -> None:
    status, said = results["tune"]
    assert status == 143 and "step 3 of 6 is saved in tune/checkpoint-000003" in said
    assert "resume: deepseek tune calm/model" in said
    assert results["tune calm"][0] == results["tune again"][0] == 0
    assert results["adapters"] == [True]


def test_other_commands_say_what_is_kept(results: dict[str, Any]) -> None:
    status, said = results["quantize"]
    assert status == 130 and "0 of 1 files are whole in" in said and "resume: deepseek quantize calm/model four" in said
    status, said = results["data"]
    assert status == 143
    assert "dedup is not written, as its stage was not finished; the stages before it are kept" in said
    status, said = results["infer"]
    assert status == 130 and "stopped: 1 of 3 answers are in out.jsonl" in said


BUSY = """
import ctypes, os, signal, sys
from deepseek import cli
from deepseek.cli import info
def busy(args):
    print("here", flush=True)
    ctypes.CDLL(None).sleep(60)  # a call of a library, in which Python's handlers do not run
info.run = busy
sys.exit(cli.main(["info", "nano"]))
"""


def test_a_second_signal_ends_a_long_call_of_a_library() -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    for _ in range(2):
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


# ---- the rules, one by one ----------------------------------------------------------------------------------------


def test_a_signal_waits_for_what_is_held() -> None:
    done = []
    with pytest.raises(Stopped) as caught, handled():
        with held("outer"):
            with held("inner"):
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"] and caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_is_raised_at_once_in_a_program_of_others() -> None:
    done = []
    with pytest.raises(Stopped), handled(), held("a step"):
        os.kill(os.getpid(), signal.SIGINT)
        done.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("second")
    assert done == ["first"]
    with handled(), held("another"):
        done.append("later")
    assert done == ["first", "later"]


def test_the_innermost_note_counts_and_an_error_is_not_hidden() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, kept("outer"), kept(lambda: "inner"):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == ["inner"]
    with pytest.raises(ValueError, match="mine"), handled(), held("a step"):
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("mine")


def test_handlers_of_the_host_and_ignored_signals_are_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with handled():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    found = []

    def elsewhere() -> None:
        with handled():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_stop_without_a_note_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepseek.info.describe", stop)
    assert main(["info", "nano"]) == 130
    assert capsys.readouterr().err == ""
