"""Checkpoints of ours in the tools people already use: transformers with peft, transformers with bitsandbytes.

What was found out about them, and is held here:

- peft takes target modules by the end of their names. MLA has no `v_proj` (values come out of kv_b_proj), so of
  ["q_proj", "v_proj"] only q_proj matches, and peft is content with that. Where q_lora_rank is set there is no q_proj
  either, and peft refuses.
- bitsandbytes replaces nn.Linear alone: attention, dense and shared-expert matrices. Routed experts (fused 3-D
  parameters), gate, embedding and lm_head keep their precision.
- bitsandbytes 0.50 on a CPU with AVX-512 dequantizes matrices wrongly whose input width is a multiple of 16 but not of
  64 (rows then share blocks, and it takes the wrong block's scale). So the model here has every input width at a
  multiple of 64. With AVX512-BF16 it packs 32 output rows at a time and refuses other heights, so every height is a
  multiple of 32 (`kv_a_proj_with_mqa` has kv_lora_rank + qk_rope_head_dim); absmax and products are BF16 there.
  transformers' grouped product wants rows of whole 16 bytes besides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint import save_model
from deepseek.config import ModelConfig
from deepseek.model import CausalLM

transformers = pytest.importorskip("transformers", reason="needs the test extra (transformers)")

WIDE: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, moe_intermediate_size=64, kv_lora_rank=64, num_attention_heads=4,
    qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=16, num_nextn_predict_layers=1)


@pytest.fixture
def checkpoint(tiny_config: Callable, random_model: Callable, tmp_path: Path) -> Callable[..., tuple[CausalLM, Path]]:
    def make(**changes: Any) -> tuple[CausalLM, Path]:
        config: ModelConfig = tiny_config(**(WIDE | changes))
        model = random_model(config)
        return model, save_model(model, tmp_path / "ours")

    return make


def lora(targets: list[str]) -> Any:
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    return peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=targets, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM")


def train(model: Any, ids_BT: torch.Tensor, steps: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(input_ids=ids_BT, labels=ids_BT)
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    return losses


def test_lora_trains_with_peft(checkpoint: Callable, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    _, path = checkpoint(q_lora_rank=None)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = peft.get_peft_model(base, lora(["q_proj", "v_proj"])).train()

    adapted = sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    assert adapted == [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids_BT = torch.randint(0, 96, (4, 24))
    losses = train(model, ids_BT)
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name

    model.eval()
    with torch.no_grad():
        trained = model(ids_BT).logits
        model.save_pretrained(tmp_path / "adapter")
        fresh = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(ids_BT).logits, trained)


def test_peft_refuses_where_no_target_matches(checkpoint: Callable) -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    _, path = checkpoint(q_lora_rank=64)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with pytest.raises(ValueError, match="q_proj"):
        peft.get_peft_model(base, lora(["q_proj", "v_proj"]))


def in_four_bits(path: Path) -> tuple[Any, dict[str, Any]]:
    """The checkpoint through BitsAndBytesConfig, and its 4-bit layers by name."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs the test extra (bitsandbytes)")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    assert not any(report.values()), report
    return model.eval(), {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


@pytest.mark.parametrize("q_lora_rank", [None, 64])
@torch.no_grad()
def test_bitsandbytes_loads_one_in_four_bits(q_lora_rank: int | None, checkpoint: Callable) -> None:
    ours, path = checkpoint(q_lora_rank=q_lora_rank)
    theirs, four_bit = in_four_bits(path)
    from bitsandbytes.functional import dequantize_4bit

    queries = ["q_proj"] if q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    expected = {f"model.layers.{i}.self_attn.{part}" for i in range(3) for part in
                (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    expected |= {f"model.layers.{i}.mlp.{'' if i == 0 else 'shared_experts.'}{part}" for i in range(3) for part in mlp}
    assert four_bit.keys() == expected

    ids_BT = torch.randint(0, 96, (2, 20))
    stored = {name: dequantize_4bit(m.weight.data, m.weight.quant_state).float() for name, m in four_bit.items()}
    units = {m.support_avx512bf16_for_cpu for m in four_bit.values()}
    for module in four_bit.values():  # FP32 products first, on every machine
        module.support_avx512bf16_for_cpu = False
    logits, full = theirs(ids_BT).logits, ours(ids_BT)
    assert logits.isfinite().all()
    for name, rounded in stored.items():
        weight = ours.get_submodule(name).weight
        assert (rounded - weight).norm() < 0.12 * weight.norm(), name  # NF4 of normal numbers: about 9 %
        weight.copy_(rounded)
    # ours with the rounded weights is the same function
    torch.testing.assert_close(logits.float(), ours(ids_BT), atol=1e-4, rtol=0)
    for module in four_bit.values():  # then as this machine computes it: AVX512-BF16 packs the weights anew
        module.support_avx512bf16_for_cpu = any(units)
    for found in (logits, theirs(ids_BT).logits):
        similarity = torch.cosine_similarity(found.float().flatten(), full.flatten(), 0)
        print(f"cosine between 4-bit and FP32 logits: {similarity:.3f}")
        assert similarity > 0.8  # random weights: experts change at near ties, and nothing was trained to forgive it


def test_qlora_on_one_of_ours(checkpoint: Callable) -> None:
    """Both together: LoRA over 4-bit weights."""
    peft = pytest.importorskip("peft", reason="needs the test extra (peft)")
    _, path = checkpoint(q_lora_rank=None)
    base, _ = in_four_bits(path)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), lora(["q_proj", "v_proj"])).train()
    losses = train(model, torch.randint(0, 96, (4, 24)))
    assert losses[-1] < losses[0] - 0.1
