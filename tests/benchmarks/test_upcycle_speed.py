"""The parts of benchmarks/upcycle_speed.py and its workers, on tiny models; no time is asserted."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import upcycle_speed as bench
from deepseek.config import ModelConfig
from deepseek.convert import upcycle
from deepseek.info import describe
from deepseek.ops.panels import matrix_bytes, mlp_bytes
from harness import Worker
from tests.helpers.gguf_files import learnt

ASKED = bench.works(prefill=8, prompt=6, new=4)


def test_contenders_run_what_is_asked_and_know_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    learnt().save(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "v3", progress=False)
    folder = bench.packed(tmp_path / "v3", tmp_path, "nf4")
    made = (folder / "config.json").stat().st_mtime_ns
    assert bench.packed(tmp_path / "v3", tmp_path, "nf4") == folder
    assert (folder / "config.json").stat().st_mtime_ns == made, "made again although nothing had changed"
    where = {"pretrained_model_name_or_path": str(tmp_path / "dense")}
    for make in (partial(bench.transformers, torch.float32, where), partial(bench.own, str(folder))):
        calls: list[tuple[int, ...]] = []

        def counted(make: Callable[[], bench.Pass] = make, calls: list[tuple[int, ...]] = calls) -> bench.Pass:
            run = make()

            def one(*asked: int) -> tuple[float, float]:
                calls.append(asked)
                return run(*asked)

            return one

        contender = bench.speeds(counted, ASKED, 1)
        assert all(contender(work) > 0 for work in ("decode 8", "prefill", "prefill"))
        assert calls == [(8, 6, 4), (8, 6, 5), (1, 8, 1), (1, 8, 1), (1, 8, 1)]
    config = ModelConfig.from_file(folder)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    attention = (matrix_bytes(heads * config.qk_head_dim, config.hidden_size)
                 + matrix_bytes(config.latent_dim, config.hidden_size)
                 + matrix_bytes(heads * config.v_head_dim, config.kv_lora_rank)
                 + matrix_bytes(config.hidden_size, heads * config.v_head_dim))
    assert bench.token_bytes(folder) == matrix_bytes(config.vocab_size, config.hidden_size) + layers * (
        attention + mlp_bytes(config.hidden_size, config.intermediate_size))


def test_the_twin_is_as_large_and_dense(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    for config, close in ((bench.CONFIG, 1e-3), (tiny_config(moe_intermediate_size=64), 0.05)):
        dense = bench.dense_twin(config)
        assert not dense.moe_layers
        assert describe(dense).total == pytest.approx(describe(config).total, rel=close)
    moe = tiny_config(moe_intermediate_size=64)
    folders = {name: bench.random_model(one, tmp_path / name) for name, one in (("moe", moe), ("dense", dense))}
    sizes = {name: bench.token_bytes(folder) for name, folder in folders.items()}
    assert sizes["dense"] > 1.5 * sizes["moe"]
    first, after = bench.own(str(folders["dense"]))(2, 6, 4)
    assert first > 0 and after > 0


def test_factors_stand_beside_the_faster_form_of_each_peer() -> None:
    speed = {"decode 1": {"transformers FP32": [10.0, 20.0, 10.0], "transformers BF16": [5.0, 5.0, 5.0],
                          "llama.cpp Q4_0": [50.0, 50.0, 50.0], "ours": [40.0, 40.0, 60.0]}}
    rows, factors = bench.compared(speed, {"decode 1": [800.0, 800.0, 800.0]}, {"ours": 10}, {"ours": Path()}, 0.36)
    assert factors == {"decode 1: ours: transformers FP32": 4.0, "decode 1: ours: llama.cpp Q4_0": 0.8}
    by_name = {row[1]: row for row in rows[1:]}
    assert by_name["ours"][2:] == ["40.0", "40.0 to 60.0", "250.0", "4.00x, -75%", "0.80x, +25%", "50%"]
    assert by_name["transformers FP32"][4:] == ["1,000.0", "", "", ""]
    without = {"prefill": {"ours": [1.0]}}
    assert bench.compared(without, {"prefill": [1.0]}, {}, {"ours": Path()}, 1.0)[1] == {}


def test_llama_cpp_runs_in_its_fastest_setting() -> None:
    class Peer:
        def __init__(self, speed: float) -> None:
            self.speed, self.asked = speed, list[Any]()

        def variants(self) -> list[Peer]:
            return variants

        def prefill(self, tokens: int) -> float:
            self.asked.append(tokens)
            return self.speed

        def decode(self, batch: int, steps: int, prompt: int) -> float:
            self.asked.append((batch, steps, prompt))
            return -self.speed

    variants, chosen = [Peer(1.0), Peer(3.0), Peer(2.0)], dict[str, Any]()
    speed = partial(bench.llama_speed, variants[0], ASKED, chosen)  # type: ignore[arg-type]
    assert (speed("prefill"), speed("prefill"), speed("decode 8")) == (3.0, 3.0, -1.0)
    assert variants[1].asked == [8, 8, 8, (8, 4, 6)] and variants[2].asked == [8, (8, 4, 6)]
    assert chosen == {"prefill": variants[1], "decode 8": variants[0]}


class InProcess:
    """In a worker's place: a speed a contender."""

    def __init__(self, make: Callable[..., Any], run: partial[bench.Pass], asked: Any, threads: int) -> None:
        self.speed = 10.0 if run.func is bench.transformers else 20.0 if "dense" in str(run.args) else 40.0

    def __call__(self, work: str) -> float:
        return self.speed

    def stop(self) -> None:
        self.speed = 0.0


def test_one_command_prints_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "q4.gguf").write_bytes(bytes(50))
    written: list[Any] = []
    replaced: dict[str, Any] = {
        "Worker": InProcess, "own_models": lambda args: {"exact form NF4": tmp_path / "v3-nf4"},
        "random_model": lambda config, folder: folder,
        "token_bytes": lambda folder: 300 if "dense" in folder.name else 100,
        "build": lambda cache, tools: tmp_path, "gguf": lambda cache, source, pure: tmp_path / "q4.gguf",
        "read_bandwidth": lambda device, size: 8000.0, "write_result": lambda *given: written.append(given)}
    for name, new in replaced.items():
        monkeypatch.setattr(bench, name, new)
    monkeypatch.setattr(bench.LlamaCpp, "prefill", lambda self, tokens: 20.0)
    monkeypatch.setattr(bench.LlamaCpp, "decode", lambda self, batch, steps, prompt: 80.0 - 10 * self.flash_attention)
    monkeypatch.setenv(bench.SPINS, "7")
    monkeypatch.setattr(sys, "argv", ["upcycle_speed.py", str(tmp_path / "model.gguf"), "--rounds", "2"])
    threads = torch.get_num_threads()
    bench.main()
    assert torch.get_num_threads() == threads
    (name, text, data, whole), = written
    assert name == "upcycle_speed" and not whole, "two rounds are not the whole benchmark"
    assert "| decode 1 | exact form NF4 | 40.0 | 40.0 to 40.0 | 69.4 | 4.00x, -75% | 0.50x, +100% | 50% |" in text
    assert "| first token of a prompt of 512 (ms) | 12800.0 | 25600.0 | 2.00x faster | 2.9x |" in text
    assert "| 10^8 tokens, decode 8 (USD) | 69 | 139 | 0.50 | 1/4 |" in text
    assert "decode 1: llama.cpp Q4_0, plain attention, long spins" in text
    assert data["twin"]["gains"] == {"prefill": 2.0, "decode 1": 2.0, "decode 8": 2.0}


def test_a_worker_answers_and_its_death_is_seen() -> None:
    worker = Worker(partial, operator.add, 40)
    assert (worker(2), worker(3)) == (42, 43)
    worker.stop()
    worker = Worker(partial, os._exit)
    with pytest.raises(EOFError):
        worker(3)
