"""Small random bases and packages for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from torch import Tensor

from deepseek.checkpoint import PackageInfo, save_model, write_package
from deepseek.checkpoint.packages import packed_size
from deepseek.config import ModelConfig
from deepseek.convert.grown import GrownModel, start
from deepseek.model import CausalLM
from deepseek.ops import panels
from deepseek.quant.pack import quantize_panels
from deepseek.tokenizer import Tokenizer

HIDDEN, WIDTH, EXPERTS, LAYERS = 64, 16, 4, (1, 2)
GENERAL = [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10] * 20]  # general text, as ids


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, shard_bytes: int = 5 << 30,
              **changes: Any) -> Path:
    """A dense V3 model of three layers with a tokenizer."""
    config = ModelConfig(**dict(
        vocab_size=300, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=3, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=64) | changes)
    model, generator = CausalLM(config), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        parameter.data = parameter.data.to(dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    tokenizer = Tokenizer.train(["the quick brown fox 12345\n混合专家模型 " * 8], 300)
    return save_model(model, folder, tokenizer=tokenizer, shard_bytes=shard_bytes)


def about(base: Path, name: str, **changes: Any) -> PackageInfo:
    """What a package for this base, or for one grown of it, says of itself."""
    model = GrownModel(base)
    grown = model.grown or start(model)
    return PackageInfo(**{**dict[str, Any](
        name=name, base=grown.source or grown.base, tokenizer=grown.tokenizer, precision="float32", layers=LAYERS,
        experts=EXPERTS, width=WIDTH, hidden=HIDDEN, license="MIT", card={"summary": "random numbers"},
        evidence={"perplexity": 1.5}), **changes})


def random_tensors(info: PackageInfo, seed: int = 0, *, zero_down: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, (dtypes, shape) in info.shapes().items():
        if dtypes == ("U8",):
            parts = [torch.randn(shape, generator=generator) * 0.2 for shape in (
                (info.width, info.hidden), (info.width, info.hidden), (info.hidden, info.width))]
            out[name] = pack(parts, info.bits or 4)
            continue
        tensor = 0.2 * torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            tensor = tensor.abs()
        if zero_down and "down_proj" in name:
            tensor.zero_()
        out[name] = tensor.to({"BF16": torch.bfloat16, "F16": torch.float16}.get(dtypes[0], torch.float32)
                              if len(dtypes) == 1 else torch.float32)
    return out


def pack(parts: list[Tensor], bits: int) -> Tensor:
    gate, up, down = (quantize_panels(part.contiguous(), bits)[0] for part in parts)
    size = packed_size(parts[0].shape[1], parts[0].shape[0], bits)
    data = torch.cat((torch.stack((gate, up), 1).flatten(), down.flatten()))
    assert len(data) == panels.mlp_bytes(parts[0].shape[1], parts[0].shape[0], bits)
    return torch.cat((data, data.new_zeros(size - len(data))))


def make_package(path: Path, base: Path, name: str, seed: int = 0, *, zero_down: bool = False,
                 key: Path | None = None, **changes: Any) -> Path:
    info = about(base, name, **changes)
    tensors = random_tensors(info, seed, zero_down=zero_down)
    return write_package(path / f"{name}.safetensors", info, tensors, key=key).path


def make_keys(folder: Path, name: str = "me") -> tuple[Path, Path]:
    """PEM files of a private key and of its public key."""
    key = Ed25519PrivateKey.generate()
    secret, public = folder / f"{name}.key", folder / f"{name}.pem"
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return secret, public


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def forge(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change the text and the header of a package consistently, hashes included:
    edit(keys of the text, header)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    keys = json.loads(header["__metadata__"]["package"])
    edit(keys, header)
    meta = header["__metadata__"]
    meta["package"] = json.dumps(keys, sort_keys=True)
    meta["sha256"] = hashlib.sha256(meta["package"].encode()).hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
