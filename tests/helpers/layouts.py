"""Published models of the family, as stand-ins: config.json, the names in the index and the tokenizer's files as the
public files have them, at sizes of a test. Names and keys are written out by hand, not by the code under test.

`python -m tests.helpers.layouts` prints the table of README.md (with `zh`, that of README.zh.md).
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint import INDEX
from deepseek.cli import main
from deepseek.config import ModelConfig
from deepseek.info import Machine, describe, fit
from deepseek.info.units import in_bytes, in_count
from deepseek.tokenizer import BOS, EOS, PAD, Tokenizer
from tests.helpers import ROOT, layouts_tokens

# ---- config.json ----------------------------------------------------------------------------------------------------

_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_INT4 = {
    "config_groups": {"group_0": {
        "input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": {
            "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
            "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}}},
    "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                                           "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed"}


def _code(kind: str) -> dict[str, str]:
    return {"AutoConfig": f"configuration_deepseek.Deepseek{kind}Config",
            "AutoModel": f"modeling_deepseek.Deepseek{kind}Model",
            "AutoModelForCausalLM": f"modeling_deepseek.Deepseek{kind}ForCausalLM"}


def _yarn(factor: float, mscale: float, beta_fast: float = 32) -> dict[str, Any]:
    return {"beta_fast": beta_fast, "beta_slow": 1, "factor": factor, "mscale": mscale, "mscale_all_dim": mscale,
            "original_max_position_embeddings": 4096, "type": "yarn"}


_EVERY: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "first_k_dense_replace": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 512, "moe_layer_freq": 1, "n_group": 1, "num_hidden_layers": 27,
    "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16", "use_cache": True,
    "v_head_dim": 128}
V2_LITE = _EVERY | {
    "architectures": ["DeepseekV2ForCausalLM"], "auto_map": _code("V2"), "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "hidden_size": 2048, "intermediate_size": 10944,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_key_value_heads": 16, "q_lora_rank": None, "rope_scaling": _yarn(40, 0.707),
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "transformers_version": "4.33.1",
    "vocab_size": 102400}
V2_5 = V2_LITE | {
    "ep_size": 1, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "rope_scaling": _yarn(40, 1.0), "routed_scaling_factor": 16.0, "topk_group": 3,
    "topk_method": "group_limited_greedy", "transformers_version": "4.39.3"}
V3 = _EVERY | {
    "architectures": ["DeepseekV3ForCausalLM"], "auto_map": _code("V3"), "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "quantization_config": _FP8, "rope_scaling": _yarn(40, 1.0), "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "transformers_version": "4.33.1",
    "vocab_size": 129280}
MOONLIGHT = V3 | {
    "bos_token_id": 163584, "eos_token_id": 163586, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "quantization_config": None, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "topk_group": 1, "transformers_version": "4.46.3", "vocab_size": 163840}
KIMI_K2 = V3 | {
    "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_scaling": _yarn(32, 1.0, beta_fast=1.0), "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
    "topk_group": 1, "transformers_version": "4.48.3", "vocab_size": 163840}
THINKING = KIMI_K2 | {"eos_token_id": 163586, "max_position_embeddings": 262144, "pad_token_id": 163839,
                      "quantization_config": _INT4, "rope_scaling": _yarn(64, 1.0), "transformers_version": "4.51.0"}
GIGACHAT = V3 | {
    "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 1, "hidden_size": 1536, "intermediate_size": 8960,
    "max_position_embeddings": 262144, "moe_intermediate_size": 1280, "n_group": 1, "n_routed_experts": 64,
    "num_attention_heads": 32, "num_experts_per_tok": 4, "num_hidden_layers": 26, "num_key_value_heads": 32,
    "q_lora_rank": None, "quantization_config": None, "rope_scaling": None, "rope_theta": 100000.0,
    "routed_scaling_factor": 1.0, "topk_group": 1, "v_head_dim": 192, "vocab_size": 128256}
KIMI_VL = {
    "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl", "media_placeholder_token_id": 163605,
    "pad_token_id": 163839, "text_config": MOONLIGHT | {"max_position_embeddings": 131072, "rope_theta": 800000.0},
    "vision_config": {"model_type": "moonvit", "hidden_size": 1152, "num_hidden_layers": 27, "patch_size": 14}}
VL2 = {
    "architectures": ["DeepseekVLV2ForCausalLM"], "model_type": "deepseek_vl_v2", "tile_tag": "2D",
    "candidate_resolutions": [[384, 384]], "language_config": V2_LITE | {"vocab_size": 129280},
    "projector_config": {"model_type": "mlp_projector"}, "vision_config": {"model_type": "vision", "layers": 27}}
V3_2 = V3 | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_head_dim": 128,
             "index_n_heads": 64, "index_topk": 2048}


class Layout(NamedTuple):
    """weights: bf16, fp8 or int4 (routed experts). tokens: tokenizer.json, or the code that comes with tiktoken.model.
    frequencies: whether the files hold the rotary frequencies, as older exports do. prefix: of the tensors' names.
    of: for the README, in English and Chinese."""

    config: dict[str, Any]
    of: tuple[str, str]
    weights: str = "bf16"
    tokens: str = "tokenizer.json"
    frequencies: bool = False
    prefix: str = ""


LAYOUTS: dict[str, Layout] = {
    "DeepSeek-V2-Lite": Layout(V2_LITE, ("V2: softmax gate, no compressed queries", "V2：softmax 门控，查询不压缩")),
    "DeepSeek-Coder-V2-Lite": Layout(V2_LITE | {"ep_size": 1, "transformers_version": "4.39.3"}, (
        "as DeepSeek-V2-Lite", "同 DeepSeek-V2-Lite")),
    "DeepSeek-V2.5": Layout(V2_5, ("V2: softmax gate limited to groups", "V2：分组受限的 softmax 门控")),
    "DeepSeek-V3": Layout(V3, ("V3: FP8 in blocks, MTP", "V3：分块 FP8，MTP"), "fp8"),
    "DeepSeek-R1": Layout(V3, ("as DeepSeek-V3", "同 DeepSeek-V3"), "fp8"),
    "DeepSeek-V3.1": Layout(V3 | {"quantization_config": _FP8 | {"scale_fmt": "ue8m0"}},
                            ("V3: FP8 whose scales are powers of two, MTP", "V3：缩放为 2 的幂的 FP8，MTP"), "fp8"),
    "Moonlight-16B-A3B": Layout(MOONLIGHT, ("V3: BF16, a tiktoken vocabulary", "V3：BF16，tiktoken 词表"),
                                tokens="tokenization_moonshot"),
    "Kimi-K2-Instruct": Layout(KIMI_K2, ("V3 as kimi_k2: FP8 in blocks, tiktoken", "V3（kimi_k2）：分块 FP8，tiktoken"),
                               "fp8", "tokenization_kimi", frequencies=True),
    "Kimi-K2-Thinking": Layout(THINKING, ("V3 as kimi_k2: experts in compressed-tensors' int4, tiktoken",
                                          "V3（kimi_k2）：专家为 compressed-tensors 的 int4，tiktoken"),
                               "int4", "tokenization_kimi"),
    "GigaChat3-10B-A1.8B": Layout(GIGACHAT, ("V3: BF16, wider values, MTP", "V3：BF16，值更宽，MTP")),
    "DeepSeek-V3.2": Layout(V3_2, ("V3 with sparse attention", "V3 加稀疏注意力"), "fp8"),
    "Kimi-VL-A3B": Layout(KIMI_VL, ("a wrapper of images around a text model", "包在图像模型里的文本模型"),
                          tokens="tokenization_moonshot", prefix="language_model."),
    "DeepSeek-VL2-Small": Layout(VL2, ("a wrapper of images around a text model", "包在图像模型里的文本模型"),
                                 prefix="language."),
}

# ---- the stand-in ---------------------------------------------------------------------------------------------------

VOCABULARY = 1024  # of layouts_tokens: 1,000 and 24 special ones


def small(keys: dict[str, Any]) -> dict[str, Any]:
    """The published keys with sizes of a test; what is null, equal, absent or unusual stays so."""
    wrapped = {key: small(keys[key]) for key in ("text_config", "language_config") if key in keys}
    if wrapped:
        return keys | wrapped
    groups = keys["n_group"]
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": keys["first_k_dense_replace"] + 2,
        "intermediate_size": 48, "moe_intermediate_size": 32, "n_routed_experts": 16,
        "num_experts_per_tok": min(keys["num_experts_per_tok"], 6 if groups > 1 else 5), "num_attention_heads": 2,
        "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": keys["v_head_dim"] // 8, "max_position_embeddings": 256}
    if keys["q_lora_rank"] is not None:
        size["q_lora_rank"] = 24
    if keys.get("rope_scaling"):
        size["rope_scaling"] = keys["rope_scaling"] | {"original_max_position_embeddings": 32}
    first = VOCABULARY - 24 if keys["vocab_size"] == 163840 else 0
    ids = {"bos_token_id": first, "eos_token_id": first + 1, **({"pad_token_id": first + 23} if "pad_token_id" in keys
                                                                else {})}
    return keys | size | ids


def tensors(config: dict[str, Any], layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Under the published names, with values that leave logits of magnitude 1-5 and an uneven gate."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    query, rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    v3 = config["topk_method"] == "noaux_tc"

    def vector(name: str, size: int) -> None:
        out[f"{name}.weight"] = (torch.rand(size, generator=generator) + 0.5).bfloat16()

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0, kind: str = "bf16") -> None:
        w = torch.randn(rows, columns, generator=generator) * gain * columns**-0.5
        if kind == "bf16":
            out[f"{name}.weight"] = w.bfloat16()
        elif kind == "fp8":
            scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 1e-3 + 1e-3
            if config["quantization_config"].get("scale_fmt") == "ue8m0":
                scale = scale.log2().round().exp2()
            out[f"{name}.weight"] = (w / scale.max()).clamp(-440, 440).to(torch.float8_e4m3fn)
            out[f"{name}.weight_scale_inv"] = scale
        else:
            code = torch.randint(-8, 8, (rows, columns), generator=generator)
            out[f"{name}.weight_packed"] = _words(code)
            out[f"{name}.weight_scale"] = ((torch.rand(rows, columns // 32, generator=generator) + 0.5)
                                           * gain * columns**-0.5 / 4.6).bfloat16()
            out[f"{name}.weight_shape"] = torch.tensor([rows, columns])

    def ffn(stem: str, inner: int, kind: str) -> None:
        for part, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            matrix(f"{stem}.{part}_proj", rows, columns, kind=kind)

    dense = "fp8" if layout.weights == "fp8" else "bf16"

    def layer(stem: str, moe: bool) -> None:
        vector(f"{stem}.input_layernorm", hidden)
        vector(f"{stem}.post_attention_layernorm", hidden)
        attention = f"{stem}.self_attn"
        if query is None:
            matrix(f"{attention}.q_proj", heads * (nope + rope), hidden, kind=dense)
        else:
            matrix(f"{attention}.q_a_proj", query, hidden, kind=dense)
            vector(f"{attention}.q_a_layernorm", query)
            matrix(f"{attention}.q_b_proj", heads * (nope + rope), query, kind=dense)
        matrix(f"{attention}.kv_a_proj_with_mqa", rank + rope, hidden, kind=dense)
        vector(f"{attention}.kv_a_layernorm", rank)
        matrix(f"{attention}.kv_b_proj", heads * (nope + value), rank, kind=dense)
        matrix(f"{attention}.o_proj", hidden, heads * value, kind=dense)
        if layout.frequencies:
            out[f"{attention}.rotary_emb.inv_freq"] = torch.rand(rope // 2, generator=generator)
        if not moe:
            ffn(f"{stem}.mlp", config["intermediate_size"], dense)
            return
        matrix(f"{stem}.mlp.gate", experts, hidden, gain=2.0)
        if v3:
            out[f"{stem}.mlp.gate.e_score_correction_bias"] = torch.randn(experts, generator=generator) * 0.1
        for e in range(experts):
            ffn(f"{stem}.mlp.experts.{e}", config["moe_intermediate_size"], layout.weights)
        ffn(f"{stem}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"], dense)

    matrix("model.embed_tokens", config["vocab_size"], hidden, gain=hidden**0.5)
    for i in range(config["num_hidden_layers"]):
        layer(f"model.layers.{i}", i >= config["first_k_dense_replace"])
    vector("model.norm", hidden)
    matrix("lm_head", config["vocab_size"], hidden, gain=2.0)
    if config.get("num_nextn_predict_layers"):
        stem = f"model.layers.{config['num_hidden_layers']}"
        layer(stem, True)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            vector(f"{stem}.{name}", hidden)
        matrix(f"{stem}.eh_proj", hidden, 2 * hidden)
        out[f"{stem}.embed_tokens.weight"] = out["model.embed_tokens.weight"].clone()
        out[f"{stem}.shared_head.head.weight"] = out["lm_head.weight"].clone()
    return {layout.prefix + name: tensor for name, tensor in out.items()}


def _words(code: Tensor) -> Tensor:
    """Eight codes of four bits in an int32, the first in the lowest."""
    word = ((code + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def write(folder: Path, name: str, *, weights: bool = True, seed: int = 0) -> Path:
    """The stand-in of a layout, in two files of weights, or (weights: False) with their index alone."""
    layout, config = LAYOUTS[name], small(LAYOUTS[name].config)
    text = config.get("text_config") or config.get("language_config") or config
    folder.mkdir(parents=True, exist_ok=True)
    keys = {key: value for key, value in config.items() if key != "quantization_config" or value is not None}
    (folder / "config.json").write_text(json.dumps(keys))
    (folder / "generation_config.json").write_text(json.dumps(
        {key: text[key] for key in ("bos_token_id", "eos_token_id")} | {"do_sample": True, "temperature": 0.6}))
    stored = tensors(text, layout, seed)
    names = sorted(stored)
    files = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    (folder / INDEX).write_text(json.dumps({
        "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
        "weight_map": {name: file for file, part in files.items() for name in part}}))
    for file, part in files.items() if weights else ():
        save_file({name: stored[name] for name in part}, folder / file, metadata={"format": "pt"})
    if layout.tokens != "tokenizer.json":
        layouts_tokens.write(folder, layout.tokens)
        return folder
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("README*.md"))]
    Tokenizer.train(texts, 700).save(folder)

    def token(content: str) -> dict[str, Any]:
        return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False,
                "single_word": False}

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {
        "add_bos_token": True, "add_eos_token": False, "bos_token": token(BOS), "eos_token": token(EOS),
        "pad_token": token(PAD), "unk_token": None, "legacy": True, "model_max_length": 16384, "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast"}))
    return folder


# ---- the table ------------------------------------------------------------------------------------------------------


def verdict(folder: Path) -> str:
    """The last line that `deepseek info` says of a folder."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as failed:
        main(["info", str(folder)])
    return (said.getvalue() + failed.getvalue()).splitlines()[-1].removeprefix("deepseek: ").replace(f"{folder}/", "")


_HEAD = {"en": ("model", "total", "active", "NF4", "memory", "experts on disk", "layout"),
         "zh": ("模型", "总参数", "激活", "NF4", "内存", "专家放磁盘", "布局")}
_NOT = {"en": "Not: ", "zh": "不能加载："}
_WHY = {"a wrapper": (" (wraps images; only its text part could)", "（多模态封装，只有其文本部分可以加载）"),
        "V3 with": (" (sparse attention)", "（稀疏注意力）")}
_NOWHERE = Machine("", 1, 1, 0, 0, 1.0)


def rows(language: str, stand_in: Callable[[str], Path]) -> Iterator[str]:
    """The table: sizes by the published config.json, the verdict by `deepseek info` on the stand-in; models of equal
    sizes share a row. Memory: what `deepseek info --machine` says that NF4 needs, and with the experts on disk."""
    at = ("en", "zh").index(language)
    yield "| " + " | ".join(_HEAD[language]) + " |"
    yield "|" + " --- |" * len(_HEAD[language])
    loads: dict[str, tuple[list[str], list[str]]] = {}
    others = []
    for name, layout in LAYOUTS.items():
        if not verdict(stand_in(name)).startswith("loads here: yes"):
            others.append(name + next(said[at] for start, said in _WHY.items() if layout.of[0].startswith(start)))
            continue
        about = describe(ModelConfig.from_dict({k: v for k, v in layout.config.items() if v is not None} | {
            "model_type": "deepseek_v2" if layout.config["model_type"] == "deepseek_v2" else "deepseek_v3",
            "q_lora_rank": layout.config["q_lora_rank"]}, strict=False))
        need = next(one for one in fit(about, _NOWHERE, 4096) if one.format == "NF4")
        names, layouts = loads.setdefault(" | ".join((in_count(about.total), in_count(about.active), *map(
            in_bytes, (need.weights, need.need, need.resident)))), ([], []))
        names.append(name)
        if layout.of[at] not in layouts and not layout.of[0].startswith("as "):
            layouts.append(layout.of[at])
    for sizes, (names, layouts) in loads.items():
        yield f"| {('、' if at else ', ').join(names)} | {sizes} | {('；' if at else '; ').join(layouts)} |"
    yield ""
    yield _NOT[language] + ("、" if at else ", ").join(others) + ("。" if at else ".")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print("\n".join(rows([*sys.argv[1:], "en"][0], lambda name: write(Path(scratch) / name, name))))
