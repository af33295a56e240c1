"""The engine's thread: callers share its steps, nobody waits in vain, and what a caller leaves is aborted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deepseek.config import ModelConfig
from deepseek.engine import LLM
from deepseek.errors import RequestError
from deepseek.model import CausalLM
from tests.helpers import ROOT
from tests.helpers.engines import params


@pytest.fixture
def llm(tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]) -> LLM:
    return LLM(random_model(tiny_config()))


def test_callers_share_steps_and_a_short_one_does_not_wait_for_a_long_one(llm: LLM) -> None:
    long, = llm.requests([1, 2], params(200))
    begun = threading.Event()
    long.on_token = lambda _: begun.set()
    thread = threading.Thread(target=llm.driver.generate, args=(long,))
    thread.start()
    assert begun.wait(30)
    short, = llm.generate([[3]], params(2))
    between = len(long.token_ids)
    thread.join(60)
    assert len(short.token_ids) == 2 and between < 200 == len(long.token_ids)
    assert llm.engine.stats.steps < 200 + 5, "the tokens of both ran in the same steps"


def test_a_fault_in_a_step_reaches_every_caller_and_the_thread_goes_on(
        llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want = llm.generate([[5, 6]], params(3))

    def broken() -> Any:
        raise AssertionError("a page is lost")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "schedule", broken)
        with pytest.raises(AssertionError, match="a page is lost"):
            llm.generate([[5, 6], [7]], params(3))
        with pytest.raises(AssertionError, match="a page is lost"):
            list(llm.stream([5, 6], params(3)))
    assert llm.generate([[5, 6]], params(3)) == want
    assert llm.engine.idle and llm.engine.block_manager.available == llm.engine.block_manager.count


def test_an_llm_made_in_inference_mode_runs_like_any_other(
        tiny_config: Callable[..., ModelConfig], random_model: Callable[..., CausalLM]) -> None:
    with torch.inference_mode():
        llm = LLM(random_model(tiny_config()))
        want = llm.generate([[5, 6, 7, 8]], params(3))
    for _ in range(2):  # the prefix cache copies rows of a page in the engine's thread
        again = llm.generate([[5, 6, 7, 8]], params(3))
        assert [one.token_ids for one in again] == [one.token_ids for one in want]
    assert llm.engine.stats.cached > 0


@pytest.fixture
def usual_handler() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, and tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_handler")
def test_an_interrupted_caller_leaves_nothing_running(llm: LLM) -> None:
    request, = llm.requests([1], params(200))
    main = threading.main_thread().ident
    assert main is not None
    request.on_token = lambda one: signal.pthread_kill(main, signal.SIGINT) if len(one.token_ids) == 2 else None
    with pytest.raises(KeyboardInterrupt):
        llm.driver.generate(request)
    assert request.finish_reason == "abort" and llm.engine.idle
    assert llm.engine.block_manager.available == llm.engine.block_manager.count


def test_a_callback_cannot_wait_for_its_own_thread(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    request, = llm.requests([1], params(5))
    monkeypatch.setattr(request, "on_token", lambda _: llm.generate([[2]], params(1)))
    with pytest.raises(RequestError, match="the callback of a request must not run another"):
        llm.driver.generate(request)
    assert llm.engine.idle


def test_a_call_between_steps_runs_on_the_engines_thread_and_answers_its_caller(llm: LLM) -> None:
    request, = llm.requests([1, 2], params(200))
    request.paused = True
    llm.submit(request)
    assert llm.driver.between_steps(lambda: threading.current_thread().name) == "engine"
    with pytest.raises(KeyError, match="missing"):
        llm.driver.between_steps(lambda: {}["missing"])
    assert llm.driver.between_steps(lambda: request.finish_reason) is None
    llm.close()
    assert llm.driver.between_steps(lambda: threading.current_thread()) is threading.current_thread()


def test_after_closing_requests_are_refused_and_those_under_way_are_aborted(llm: LLM) -> None:
    request, = llm.requests([1], params(200))
    request.paused = True
    llm.submit(request)
    llm.close()
    assert request.finish_reason == "abort" and request.done.is_set()
    with pytest.raises(RequestError, match="this LLM is closed"):
        llm.generate([[1]], params(1))


def test_a_fork_has_a_thread_of_its_own(llm: LLM) -> None:
    want = llm.generate([[5, 6]], params(3))
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = int(llm.generate([[5, 6]], params(3)) != want)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_the_thread_ends_with_its_llm(tiny_config: Callable[..., ModelConfig],
                                      random_model: Callable[..., CausalLM]) -> None:
    llm = LLM(random_model(tiny_config()))
    llm.generate([[1]], params(1))
    thread = llm.driver.thread
    assert thread is not None and thread.is_alive()
    del llm
    thread.join(30)
    assert not thread.is_alive()


def test_the_interpreter_waits_for_a_thread_that_frees_the_model() -> None:
    """A thread that is caught in tensors' destructors ends the process with SIGABRT."""
    script = '''
import os, threading, time
from deepseek.config import ModelConfig
from deepseek.engine import LLM, SamplingParams
from tests.helpers.models import TINY, random_model

class Slow:
    def __del__(self):
        begun.set()
        time.sleep(1)
        os.write(1, b"freed")

begun = threading.Event()
llm = LLM(random_model(ModelConfig(**TINY)))
llm.generate([[1]], SamplingParams(max_tokens=2))
llm.driver.slow = Slow()
del llm
assert begun.wait(30)
'''
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                          cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "freed"), done.stderr
