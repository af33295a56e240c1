"""Experts that come from disk when they are wanted: the same bits, within the budget, read as often as is said."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.atlas import Atlas, ExpertUsage
from deepseek.checkpoint import expert_spans, load_model
from deepseek.convert import dequantize
from deepseek.engine import LLM, ExpertControl, SamplingParams
from deepseek.engine.options import parse_bytes
from deepseek.engine.residency import AHEAD, Residency
from deepseek.engine.warmup import USE, record_use
from deepseek.errors import CheckpointError, ConfigError, RequestError
from deepseek.ops.native import native
from deepseek.tokenizer import Tokenizer
from tests.helpers.engines import nf4

pytestmark = pytest.mark.skipif(native is None, reason="needs the native kernels")
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
EXPERTS, LAYERS = 16, 3


@pytest.fixture(scope="module")
def folder(tiny_config: Callable, random_model: Callable, tmp_path_factory: Any) -> Path:
    """A quantized model of 3 MoE layers x 16 experts, with a tokenizer and an atlas of four names."""
    place = tmp_path_factory.mktemp("residency")
    tokenizer = Tokenizer.train(["the quick brown fox", "0123456789"] * 4, 300)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_hidden_layers=4, n_routed_experts=EXPERTS, n_group=4,
                         topk_group=2, num_experts_per_tok=3, max_position_embeddings=512, qk_nope_head_dim=16,
                         v_head_dim=16)  # such that all layers are one native call, as in a model of use
    folder = nf4(random_model(config), place, tokenizer)
    Atlas.built_in(config, ["a_expert", "b_expert", "c_expert", "d_expert"]).save(folder)
    return folder


def slot(folder: Path) -> int:
    """Bytes of a slot: what the error of a budget too small says."""
    with pytest.raises(ConfigError, match=r"the least that works is ([\d,]+) ") as failure:
        LLM(folder, expert_memory=1)
    return int(str(failure.value).split("works is ")[1].split()[0].replace(",", "")) // LAYERS


def prompts(folder: Path, count: int, seed: int = 0) -> list[list[int]]:
    draw, vocabulary = random.Random(seed), Tokenizer.load(folder).vocab_size
    return [[draw.randrange(vocabulary) for _ in range(draw.choice([1, 3, 20, 140]))] for _ in range(count)]


@pytest.fixture(scope="module")
def want(folder: Path) -> Any:
    return LLM(folder).generate(prompts(folder, 10), GREEDY)


@pytest.mark.parametrize("slots", [1, 2, 5, 12, 16])
@pytest.mark.parametrize("prefetch", [False, True])
def test_any_budget_gives_the_same_tokens(folder: Path, want: Any, slots: int, prefetch: bool) -> None:
    llm = LLM(folder, expert_memory=slots * LAYERS * slot(folder), prefetch=prefetch, max_num_seqs=4)
    assert llm.generate(prompts(folder, 10), GREEDY) == want
    stats = llm.engine.residency.stats
    there = sum(len(layer.slot_of) for layer in llm.engine.residency.layers)
    assert there <= slots * LAYERS and 0 < stats.missed <= stats.wanted
    assert stats.read == (stats.read // there_size(folder)) * there_size(folder)
    assert (slots < EXPERTS) == (stats.read > LAYERS * EXPERTS * there_size(folder))  # nothing is read twice in vain
    assert bool(stats.prefetched) == (prefetch and slots >= 3)  # fewer than a token visits: it would put others out
    assert stats.prefetch_hits <= stats.prefetched


def there_size(folder: Path) -> int:
    return next(iter(expert_spans(folder).values()))[0].size


def test_tables_and_slots_agree_after_many_steps(folder: Path) -> None:
    """No slot for two, none lost; what the tables point to is the expert's own bytes. The invariant is one of private
    details: slots have no public face."""
    llm = LLM(folder, expert_memory=6 * LAYERS * slot(folder), max_num_seqs=3)
    llm.generate(prompts(folder, 6, seed=3), GREEDY)
    own = llm.engine.residency
    with own._changed:
        own._changed.wait_for(lambda: not any(layer.in_flight for layer in own.layers), 10)
    used = [s for layer in own.layers for s in layer.slot_of.values()]
    assert sorted([*used, *own._free]) == list(range(6 * LAYERS))
    assert sum(own.quota) == 6 * LAYERS
    for layer in own.layers:
        assert set(layer.slot_of) == set((layer.table != 0).nonzero().flatten().tolist())
        for expert, place in layer.slot_of.items():
            span = layer.spans[expert]
            with span.file.open("rb") as file:
                file.seek(span.offset)
                data = file.read(span.size)
            begin = int(layer.table[expert]) - own._base
            assert begin // own._slot == place
            assert bytes(own._view[begin : begin + span.size]) == data


def test_warm_names_are_there_before_the_first_request(folder: Path) -> None:
    llm = LLM(folder, expert_memory=8 * LAYERS * slot(folder), warmup_experts="b_expert, d_expert")
    own = llm.engine.residency
    for gate in range(LAYERS):
        assert own.loaded(gate).nonzero().flatten().tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert own.stats.missed == 0 and own.stats.read == 8 * LAYERS * there_size(folder)
    assert llm.warmup.experts == 8 * LAYERS and "b_expert, d_expert: 24 of 48 experts" in str(llm.warmup)
    four = LLM(folder, expert_memory=4 * LAYERS * slot(folder), warmup_experts="a_expert")
    four.generate([[5, 6, 7]], GREEDY)
    four.engine.residency.prefetch(2, [4, 5, 6, 7])  # on their way, they make no room until they have come
    assert four.warm_up(["c_expert"]).names == ("c_expert",)  # while it runs: others make room
    assert four.engine.residency.loaded(2).nonzero().flatten().tolist() == [8, 9, 10, 11]
    half = LLM(folder, expert_memory=4 * LAYERS * slot(folder), warmup_experts=["b_expert", "d_expert"])
    assert half.engine.residency.loaded(0).nonzero().flatten().tolist() == [4, 5, 12, 13]  # names take turns


def test_auto_takes_the_frequent_ones_of_recorded_use(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ConfigError, match="or none that counts its experts"):
        LLM(copy, expert_memory=3 * LAYERS * slot(folder), warmup_experts="auto")
    use = ExpertUsage(load_model(copy).config)
    use.counts_LE[:, [3, 9, 11]] = torch.tensor([50, 30, 20])
    use.tokens = 100
    (copy / USE).write_text(use.to_json())
    llm = LLM(copy, expert_memory=2 * LAYERS * slot(folder), warmup_experts="auto")
    assert llm.engine.residency.loaded(1).nonzero().flatten().tolist() == [3, 9]
    assert llm.warmup.expected == pytest.approx(0.8) and "80.0% expected coverage" in str(llm.warmup)
    named = LLM(copy, warmup_experts="c_expert")  # experts 8 to 11, all in memory as it is: what use says of them
    assert named.warmup.expected == pytest.approx(0.5)
    ran = ExpertUsage(llm.model.config)
    outputs = llm.generate(prompts(copy, 3), SamplingParams(max_tokens=4, temperature=0, routed=True), usage=ran)
    warm = sum(int(((output.routed == 3) | (output.routed == 9)).sum()) for output in outputs)
    assert llm.warmup.measured(ran) == pytest.approx(warm / sum(output.routed.numel() for output in outputs))


def test_controls_work_with_cold_experts_and_approx_takes_what_is_loaded(folder: Path) -> None:
    masked = SamplingParams(max_tokens=4, temperature=0, routed=True, experts=ExpertControl(mask=["a_expert"]))
    ids = [[5, 6, 7, 8]]
    everything = LLM(folder).generate(ids, masked)
    assert not bool((everything[0].routed < 4).any())
    llm = LLM(folder, expert_memory=2 * LAYERS * slot(folder))
    assert llm.generate(ids, masked) == everything
    approx = LLM(folder, expert_memory=8 * LAYERS * slot(folder), warmup_experts="b_expert,d_expert", prefetch=False)
    got = approx.generate(ids, SamplingParams(max_tokens=4, temperature=0, routed=True,
                                              experts=ExpertControl(approx=True)))
    exact = LLM(folder).generate(ids, SamplingParams(max_tokens=4, temperature=0, routed=True))
    named = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    assert torch.isin(got[0].routed, named).float().mean() > torch.isin(exact[0].routed, named).float().mean()


def test_the_most_valuable_stay(folder: Path) -> None:
    """LRFU: of those not wanted now, the least and longest-ago visited goes."""
    own = LLM(folder, expert_memory=4 * LAYERS * slot(folder), prefetch=False).engine.residency
    for wanted in ([0, 1, 2], [0, 3, 1], [0, 1, 4]):
        left = set(wanted)
        while left:
            left -= set(own.fetch(0, sorted(left)))
        record = fake_routes(wanted)
        own.count_routes(record)
    assert set(own.layers[0].slot_of) == {0, 1, 3, 4}
    assert own.stats.missed == 5 and own.stats.hits == 9 * LAYERS - 5


def fake_routes(experts: list[int]) -> Any:
    from deepseek.model import Route, RoutingRecord

    index = torch.tensor([experts])
    return RoutingRecord({layer: Route(index, torch.ones_like(index).float(), torch.zeros(1, EXPERTS))
                          for layer in range(1, 1 + LAYERS)})


def test_a_file_that_shrinks_is_an_error_of_who_waits(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    llm = LLM(copy, expert_memory=2 * LAYERS * slot(folder), prefetch=False)
    spans = expert_spans(copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(min(span.offset for own in spans.values() for span in own) + 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends within expert 3: the file has shrunk"):
        llm.engine.residency.fetch(0, [3])


def test_the_smallest_budget_keeps_a_slot_a_layer_whatever_misses(folder: Path) -> None:
    own = LLM(folder, expert_memory=LAYERS * slot(folder), prefetch=False).engine.residency
    for step in range(300):  # layer 1 misses always, the others never
        for gate, wanted in enumerate(([0], [step % 2], [0])):
            assert own.fetch(gate, wanted) == wanted
        own.count_routes(fake_routes([0]))
    assert own.quota == [1] * LAYERS and own.fetch(0, [1]) == [1]


def test_quotas_move_to_where_misses_are(folder: Path) -> None:
    own = LLM(folder, expert_memory=4 * LAYERS * slot(folder), prefetch=False).engine.residency
    for step in range(300):
        for gate, wanted in enumerate(([0], [step % 8], [0])):
            own.fetch(gate, wanted)
        own.count_routes(fake_routes([0]))
    assert sum(own.quota) == 4 * LAYERS and own.quota[1] > 4 and min(own.quota) >= 1


def test_what_nobody_has_any_more_is_given_back_and_the_model_keeps_what_it_computes_with(folder: Path) -> None:
    def held() -> tuple[int, int]:
        """Threads that read experts, and files of the model that are open."""
        files = 0
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # that of this listing
                files += descriptor.readlink().is_relative_to(folder)
        return sum(thread.name.startswith("experts-") for thread in threading.enumerate()), files

    gc.collect()
    before = held()
    llm = LLM(folder, expert_memory=EXPERTS * LAYERS * slot(folder), warmup_experts="a_expert,b_expert,c_expert")
    model, want = llm.model, llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    assert held()[0] == before[0] + 2 and held()[1] > before[1]
    del llm
    gc.collect()
    assert LLM(model, prefix_cache=False).generate([[5, 6, 7]], GREEDY)[0].token_ids == want
    del model
    gc.collect()
    deadline = time.monotonic() + 10
    while held() != before and time.monotonic() < deadline:  # the thread that freed the model may still be closing
        time.sleep(0.05)
    assert held() == before


def test_after_closing_what_is_there_is_used_and_what_is_not_is_an_error(folder: Path) -> None:
    llm = LLM(folder, expert_memory=4 * LAYERS * slot(folder), warmup_experts="a_expert")
    own = llm.engine.residency
    llm.close()
    assert own.fetch(0, [2]) == [2]
    with pytest.raises(ConfigError, match="expert 9 of MoE layer 0 is not in memory and is not read"):
        own.fetch(0, [9])


def test_a_fork_has_its_own_memory_and_says_that_it_cannot_read(folder: Path) -> None:
    llm = LLM(folder, expert_memory=2 * LAYERS * slot(folder), warmup_experts="a_expert", prefetch=False)
    own = llm.engine.residency
    child = os.fork()
    if child == 0:
        status = 1
        try:
            own.fetch(0, [9])
        except ConfigError:
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert own.fetch(0, [9]) == [9]


def test_a_file_system_without_direct_reads(folder: Path, want: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return plain_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    llm = LLM(folder, expert_memory=2 * LAYERS * slot(folder))
    assert llm.generate(prompts(folder, 10), GREEDY) == want


def test_use_is_recorded_beside_the_model_and_is_no_part_of_it(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    use = ExpertUsage(load_model(copy).config)
    record_use(use, copy)
    assert not (copy / USE).exists()  # nothing ran
    use.counts_LE[0, 3], use.tokens = 8, 8
    record_use(use, copy)
    record_use(use, copy)
    assert use.tokens == 8 and ExpertUsage.from_json((copy / USE).read_text()).tokens == 12
    dequantize(copy, tmp_path / "back", progress=False)
    assert not (tmp_path / "back" / USE).exists()
    (copy / USE).write_bytes(b"\xff\xfe")
    assert LLM(copy, warmup_experts="a_expert").warmup.expected is None  # a damaged record counts as none
    with pytest.raises(ConfigError, match="or none that counts its experts"):
        LLM(copy, warmup_experts="auto")
    Atlas.built_in(load_model(copy).config.with_(n_routed_experts=32), ["a_expert"]).save(copy)
    with pytest.raises(ConfigError, match=r"atlas\.json is of a model with 3 layers x 32 experts"):
        LLM(copy)


def test_bad_options(folder: Path, random_model: Callable, tiny_config: Callable) -> None:
    assert [parse_bytes(text) for text in ("4GiB", "500MB", "0.5 gib", "77")] == [2**32, 5 * 10**8, 2**29, 77]
    wrong: list[dict[str, Any]] = [{"expert_memory": 4e9}, {"expert_memory": [1]}, {"warmup_experts": None},
                                   {"warmup_experts": [3]}]
    for options in wrong:
        with pytest.raises(ConfigError, match=next(iter(options))):
            LLM(folder, **options)
    for text in ("4 parsecs", "", "-3MB", "GiB", "nan"):
        with pytest.raises(ConfigError, match="expert_memory"):
            LLM(folder, expert_memory=text)
    with pytest.raises(ConfigError, match="needs a checkpoint"):
        LLM(random_model(tiny_config()), expert_memory="1GiB")
    with pytest.raises(ConfigError, match="quantized model"):
        Residency(random_model(tiny_config()), {}, 10**9)
    with pytest.raises(RequestError, match="no experts are named 'x_expert'; there are a_expert, b_expert"):
        LLM(folder, warmup_experts="x_expert")
    assert AHEAD > 0
