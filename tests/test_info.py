"""The accounts of `deepseek info`, against the model itself, published figures and fabricated machines."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import info as accounts
from deepseek import memory
from deepseek.config import PRESETS, ModelConfig
from deepseek.errors import RequestError
from deepseek.info import (
    Fit,
    Gpu,
    Machine,
    ModelInfo,
    accounting,
    cost,
    describe,
    fit,
    measure_machine,
    render,
    to_json,
)
from deepseek.info import machine as machine_module
from deepseek.model import CausalLM
from deepseek.ops.panels import matrix_bytes, mlp_bytes

NANO = ModelConfig.preset("nano")
GIB = 1 << 30
CONFIGS = {
    **{name: ModelConfig.preset(name) for name in PRESETS},
    "tied": NANO.with_(tie_word_embeddings=True),
    "q_lora": NANO.with_(q_lora_rank=24),
    "biased": NANO.with_(attention_bias=True),
    "biased q_lora": NANO.with_(attention_bias=True, q_lora_rank=24),
    "no shared, two MTP, sparse": NANO.with_(n_shared_experts=0, num_nextn_predict_layers=2, moe_layer_freq=2),
    "odd widths": NANO.with_(hidden_size=200, moe_intermediate_size=72, kv_lora_rank=40, v_head_dim=24),
    "v2": NANO.with_(model_type="deepseek_v2", topk_method="group_limited_greedy", scoring_func="softmax",
                     num_nextn_predict_layers=0, n_shared_experts=2),
}


def preset(name: str) -> ModelInfo:
    return describe(ModelConfig.preset(name), name=name)


def machine(ram: float = 16, bandwidth: float = 50e9, gpus: tuple[Gpu, ...] = (), **more: Any) -> Machine:
    size = int(ram * GIB)
    return Machine("a processor", 8, 8, size, size, bandwidth, gpus=gpus, **{"disk_free": 10**12} | more)


def by_format(fits: list[Fit]) -> dict[str, Fit]:
    return {f.format: f for f in fits}


# ---- the model


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_the_models(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = CausalLM(config)
    info = describe(config)
    mtp = sum(p.numel() for p in model.model.mtp.parameters())
    assert info.mtp.total == mtp
    assert info.total == sum(p.numel() for p in model.parameters()) - mtp

    blocks: list[Any] = [layer.mlp for i, layer in enumerate(model.model.layers) if config.is_moe(i)]
    idle = config.n_routed_experts - config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert info.active == info.total - len(blocks) * idle * expert
    parts = {part.name: part.total for part in info.parts}
    assert parts["routed experts"] == sum(p.numel() for b in blocks for p in b.experts.parameters())
    assert parts["gate"] == sum(p.numel() for b in blocks for p in b.gate.parameters())
    assert parts["attention"] + parts["norms"] == sum(
        p.numel() for n, p in model.named_parameters() if "mtp" not in n and ("self_attn" in n or "norm" in n))
    # a buffer: in no parameter count, yet in the bytes
    buffers = dict(model.model.layers.named_buffers())
    assert info.gate_bias == sum(b.numel() for n, b in buffers.items() if n.endswith("correction_bias"))
    assert info.in_format("FP32").weights == 4 * (info.total + info.gate_bias)


@pytest.mark.parametrize("name", CONFIGS)
def test_monotonic_facts(name: str) -> None:
    info = describe(CONFIGS[name])
    sizes = [info.in_format(format).weights for format in ("NF4", "FP8", "BF16", "FP32")]
    assert sizes == sorted(set(sizes))
    for own in info.memory:
        assert own.read <= own.resident < own.weights
        assert own.read < own.dense_read <= own.weights
    assert info.active < info.total and info.flops < info.dense_flops and info.latency_bound > 1
    assert info.cache_per_token < info.plain_cache_per_token


def test_published_figures() -> None:
    """arXiv 2412.19437 and README_WEIGHTS.md: 671 B, 37 B active, 11.5 B in the MTP module."""
    info = preset("deepseek-v3")
    assert info.total == pytest.approx(671.0e9, rel=5e-4)
    assert info.active == pytest.approx(37.6e9, rel=2e-3)
    assert info.active_beyond_lookup == pytest.approx(36.7e9, rel=5e-3)
    assert info.mtp.total == pytest.approx(11.5e9, rel=0.02)
    assert info.cache_per_token == 61 * 576 * 2
    assert info.plain_cache_per_token == 61 * 2 * 128 * 128 * 2


def test_the_users_figures() -> None:
    """67 B total, 11 B active, 16.4 %, each within 2 %; 60 % fewer FLOPs; 3x lower latency lies within the bound."""
    info = preset("v3-67b")
    assert info.total == pytest.approx(67e9, rel=0.02)
    assert info.active == pytest.approx(11e9, rel=0.02)
    assert info.active_share == pytest.approx(0.164, rel=0.02)
    assert info.flops_saved >= 0.60
    assert info.latency_bound >= 3
    assert info.in_format("NF4").weights / info.in_format("FP32").weights == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 24, "tie_word_embeddings": True}])
def test_flops_are_those_that_torch_counts(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's counter sees the products with weights; the attention's have a test by hand below."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("deepseek.ops.native.native", None)  # the counter does not see into native kernels
    config, tokens = NANO.with_(**changes), 64
    model = CausalLM(config).init_weights()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long), attn_impl="naive")
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    one, two = describe(config, context=1).flops, describe(config, context=2).flops
    assert counted == tokens * (one - (two - one))


def test_flops_by_hand() -> None:
    config = NANO.with_(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    one, two = describe(config, context=1), describe(config, context=2)
    heads = config.num_attention_heads
    assert two.flops - one.flops == 2 * heads * (config.qk_head_dim + config.v_head_dim)
    norms = next(p.total for p in one.parts if p.name == "norms")
    assert one.flops == 2 * (one.active_beyond_lookup - norms) + 2 * heads * (config.qk_head_dim + config.v_head_dim)
    assert two.dense_flops - one.dense_flops == two.flops - one.flops
    assert describe(config).context == config.max_position_embeddings  # capped
    with pytest.raises(RequestError, match="context = 0"):
        describe(config, context=0)


def test_recipes_by_hand() -> None:
    """FP8 blocks round up at ragged edges; NF4 is what panels take; tied tables are read whole, others by the row."""
    weight = accounting.Weight("attention", "linear", 130, 200)
    assert weight.bytes("FP8") == 130 * 200 + 4 * 2 * 2
    assert weight.bytes("NF4") == 9 * (16 * 4 + 64 + 16 * 256 // 2)  # panels of 16 rows, 4 blocks of 64 columns
    for rows, columns in ((130, 200), (16, 64), (1, 1), (1408, 2048), (7168, 18432)):
        assert accounting.Weight("attention", "linear", rows, columns).bytes("NF4") == matrix_bytes(rows, columns)
        mlp = accounting.Weight("dense FFN", "mlp", rows, columns)
        assert 0 <= mlp.bytes("NF4") - mlp_bytes(columns, rows) < 4096 and mlp.bytes("NF4") % 4096 == 0
        assert mlp.numbers == 3 * rows * columns
        assert mlp.bytes("FP8") == 3 * accounting.Weight("dense FFN", "linear", rows, columns).bytes("FP8")
    table = accounting.Weight("embedding", "table", 100, 64)
    assert [table.bytes(f) for f in accounts.FORMATS] == [25600, 12800, 12800, 6400 + 400]
    untied, tied = describe(NANO), describe(NANO.with_(tie_word_embeddings=True))
    assert untied.in_format("BF16").read == tied.in_format("BF16").read + 2 * NANO.hidden_size
    assert untied.flops == tied.flops


def test_torch_is_not_imported() -> None:
    code = "import sys; from deepseek.info import describe; from deepseek.config import ModelConfig as C; " \
           "describe(C.preset('deepseek-v3')); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# ---- machines


def test_fit_follows_the_memory() -> None:
    info = preset("v3-16b-a3b")
    small = by_format(fit(info, machine(ram=1)))
    assert {f.place for f in small.values()} == {"none", "storage"} and not any(f.fits for f in small.values())
    assert all(f.tokens_per_second is None for f in small.values())

    laptop = by_format(fit(info, machine(ram=16)))
    assert laptop["NF4"].place == "ram" and laptop["NF4"].fits
    assert laptop["BF16"].place == "disk" and not laptop["BF16"].fits  # its shared part and active experts would fit
    assert laptop["FP8"].place == "storage"

    server = by_format(fit(info, machine(ram=256)))
    assert all(server[f].place == "ram" for f in ("FP32", "BF16", "NF4"))
    speeds = [server[f].tokens_per_second for f in ("FP32", "BF16", "NF4")]
    assert speeds == sorted(speeds, key=float)
    memory = info.in_format("BF16")
    assert speeds[1] == pytest.approx(50e9 / (memory.read + info.cache_per_token * 4096))
    assert server["BF16"].need == pytest.approx(1.1 * (memory.weights + info.cache_per_token * 4096))


def test_fit_prefers_a_gpu_that_holds_it() -> None:
    info = preset("v3-16b-a3b")
    card = Gpu("a card", 24 * GIB, 23 * GIB, 900e9)
    fits = by_format(fit(info, machine(ram=256, gpus=(card, replace(card, name="slow", bandwidth=100e9)))))
    assert fits["NF4"].place == "gpu" and fits["NF4"].note == "a card"
    assert fits["BF16"].place == "ram"  # 29 GiB
    assert fits["NF4"].tokens_per_second == pytest.approx(
        900e9 / (info.in_format("NF4").read + info.cache_per_token * 4096))
    assert by_format(fit(info, machine(ram=256, gpus=(replace(card, available=GIB),))))["NF4"].place == "ram"


def test_fit_context_cache_and_disk() -> None:
    info = preset("v3-63m")
    short, long = by_format(fit(info, machine(), 16)), by_format(fit(info, machine(), 1024))
    assert short["NF4"].tokens_per_second > long["NF4"].tokens_per_second
    assert long["FP32"].cache == 2 * long["BF16"].cache == 2 * 1024 * info.cache_per_token
    assert fit(info, machine(), 10**6)[0].context == 2048  # what the model was made for
    with pytest.raises(RequestError, match="context = -1"):
        fit(info, machine(), -1)
    # a model that a processor's cache may hold is not bound by main memory
    assert long["BF16"].bound and not by_format(fit(info, machine(cache=32 << 20)))["BF16"].bound
    assert "free disk" in by_format(fit(info, machine(disk_free=1)))["FP8"].note


def test_this_machine() -> None:
    here = measure_machine()
    assert here.bandwidth > 1e8
    assert here.cpu and here.cores_available >= 1 and here.cores_physical >= 1
    assert 0 < here.available <= here.memory and here.disk_free > 0
    assert by_format(fit(describe(NANO), here))["BF16"].fits


def test_container_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"memory.max": f"{2 * GIB}\n", "memory.current": f"{GIB}\n", "cpu.max": "150000 100000\n",
                       "memory.stat": f"anon 5\ninactive_file {GIB // 2}\n"}.items():
        (tmp_path / name).write_text(text)
    found = lambda _, file: [p for p in [tmp_path / file] if p.exists()]  # noqa: E731
    monkeypatch.setattr(machine_module, "cgroups", found)
    monkeypatch.setattr(memory, "cgroups", found)
    total, available = memory.ram()
    assert total == 2 * GIB and available <= 2 * GIB - GIB + GIB // 2
    assert machine_module.count_cores() <= 2


# ---- money and output


def test_cost() -> None:
    assert cost(3.6, 1000) == pytest.approx(100)
    assert cost(0, 5) == 0
    for price, speed, named in ((-1, 5, "price_per_hour = -1"), (float("nan"), 5, "price_per_hour"),
                                (1, 0, "tokens_per_second = 0"), (1, -3, "tokens_per_second = -3"),
                                (1, float("inf"), "tokens_per_second")):
        with pytest.raises(RequestError, match=named):
            cost(price, speed)


def test_a_price_needs_a_speed() -> None:
    info = preset("v3-16b-a3b")
    with pytest.raises(RequestError, match="needs tokens_per_second"):
        render(info, price_per_hour=1.0)
    with pytest.raises(RequestError, match="only with price_per_hour"):
        to_json(info, tokens_per_second=5.0)
    assert "10^8 tokens cost 100.00" in render(info, price_per_hour=3.6, tokens_per_second=1000)

    here = machine(ram=16)
    fits = fit(info, here)
    out = to_json(info, fits, here, price_per_hour=2.0)["cost"]
    assert out["basis"] == "bound" and out["format"] == "NF4"
    assert out["per_1e8_tokens"] == pytest.approx(cost(2.0, by_format(fits)["NF4"].tokens_per_second))
    assert "at least" in render(info, fits, here, price_per_hour=2.0)

    tiny = fit(info, machine(ram=1))
    assert to_json(info, tiny, price_per_hour=2.0)["cost"] is None
    assert "no speed to price" in render(info, tiny, price_per_hour=2.0)
    with pytest.raises(RequestError, match="price_per_hour = -2"):
        render(info, tiny, price_per_hour=-2.0)
    with pytest.raises(RequestError, match="price_per_hour = -2"):
        render(info, price_per_hour=-2.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_rendering_is_a_table_of_at_most_100_columns(name: str) -> None:
    info = describe(CONFIGS[name], name=name)
    card = Gpu("NVIDIA GeForce RTX 4090", 24 * GIB, 23 * GIB, 900e9)
    for here in (machine(ram=1), machine(ram=64, gpus=(card,)), machine(ram=4096, cache=10 * GIB)):
        text = render(info, fit(info, here), here, price_per_hour=1234.5)
        assert max(map(len, text.splitlines())) <= 100
        assert not any(line != line.rstrip() for line in text.splitlines())
    for words in ("embedding", "routed experts", "dense twin", "NF4", "MLA", "fewer", "RAM"):
        assert words in text


def test_json_keeps_its_keys_and_survives_the_round_trip() -> None:
    info = preset("deepseek-v3")
    plain = to_json(info)
    here = machine(ram=1024, gpus=(Gpu("a card", 24 * GIB, 23 * GIB, 900e9),))
    full = to_json(info, fit(info, here), here, price_per_hour=2.0)
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain) == list(full) == [
        "name", "model_type", "layers", "moe_layers", "routed_experts", "experts_per_token", "shared_experts",
        "context", "parameters", "flops_per_token", "decode_read_bytes", "latency_ratio_bound", "memory_bytes",
        "cache_bytes_per_token", "machine", "fits", "cost"]
    assert plain["machine"] is plain["fits"] is plain["cost"] is None
    assert full["machine"]["gpus"][0]["name"] == "a card"
    assert full["parameters"]["total"] == sum(p["total"] for p in full["parameters"]["parts"].values())
    assert set(full["memory_bytes"]) == {"fp32", "bf16", "fp8", "nf4"}
    keys = [key for part in (full, full["parameters"]["parts"], full["machine"], full["fits"][0]) for key in part]
    assert all(key == key.lower() and key.isidentifier() for key in keys)
