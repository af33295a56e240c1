"""What a tiny training run reads: thirty notes, and a configuration beside them."""

from __future__ import annotations

import json
from pathlib import Path


def write_notes(folder: Path, **changes: int) -> None:
    """`data/` and `tiny.json` in the folder. changes: of the configuration."""
    (folder / "data").mkdir()
    for i in range(30):
        (folder / "data" / f"note{i}.txt").write_text(f"On Monday the cat number {i} sat on the mat. " * 40)
    (folder / "tiny.json").write_text(json.dumps({
        "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8} | changes))
