"""ModelConfig: what is refused and how, what is carried along, and that foreign files read as they are meant."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.config import FORMAT, PRESETS, LongRope, ModelConfig, YarnScaling
from deepseek.errors import ConfigError, NotFoundError
from tests.helpers.layouts import V2_LITE, V3

BASE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
    moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)


# ---- impossible values ------------------------------------------------------------------------------------------

POSITIVE_INTEGERS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size moe_intermediate_size "
    "n_routed_experts num_experts_per_tok n_group topk_group moe_layer_freq kv_lora_rank "
    "qk_rope_head_dim v_head_dim max_position_embeddings").split()
COUNTS = "n_shared_experts first_k_dense_replace num_nextn_predict_layers qk_nope_head_dim".split()
POSITIVE_NUMBERS = "routed_scaling_factor rope_theta rms_norm_eps initializer_range".split()
FLAGS = "norm_topk_prob attention_bias rope_interleave tie_word_embeddings".split()

IMPOSSIBLE: list[tuple[str, Any, str]] = [
    *((key, value, "positive integer") for key in POSITIVE_INTEGERS for value in (0, -1, 2.0, True, "2")),
    *((key, value, "integer >= 0") for key in COUNTS for value in (-1, 0.5, False, "1")),
    *((key, value, "positive number") for key in POSITIVE_NUMBERS
      for value in (0, -1e-6, math.nan, math.inf, True, "1e-6", None)),
    *((key, value, "true or false") for key in FLAGS for value in (1, 0, "true")),
    *(("q_lora_rank", value, "null or a positive integer") for value in (0, 1.5, True, "8")),
    ("n_group", 3, "divide n_routed_experts (8)"),
    ("topk_group", 5, "at most n_group (4)"),
    ("num_experts_per_tok", 5, "at most the 4 experts of the kept groups"),
    ("qk_rope_head_dim", 5, "even"),
    ("hidden_act", "gelu", "must be 'silu'"),
    ("topk_method", "best", "one of noaux_tc, greedy, group_limited_greedy"),
    ("scoring_func", "tanh", "sigmoid or softmax"),
    ("eos_token_id", 96, "0..vocab_size-1 (95)"),
    ("eos_token_id", -1, "0..vocab_size-1 (95)"),
    ("eos_token_id", "1", "0..vocab_size-1 (95)"),
    ("eos_token_id", True, "0..vocab_size-1 (95)"),
    *((key, value, "null or an integer") for key in ("bos_token_id", "pad_token_id") for value in ("0", 1.0, True)),
]


@pytest.mark.parametrize(("key", "value", "rule"), IMPOSSIBLE, ids=lambda v: repr(v)[:24])
def test_an_impossible_value_is_refused_with_key_rule_and_value(key: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(BASE | {key: value}, strict=True, origin="here.json")
    message = str(caught.value)
    assert message.startswith("here.json: ") and f"{key} = {value!r}" in message and rule in message
    with pytest.raises(ConfigError, match=key):
        ModelConfig(**BASE | {key: value})


def test_one_of_several_end_tokens_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ConfigError, match=r"eos_token_id = 400: .*95"):
        ModelConfig.from_dict(BASE | {"eos_token_id": [1, 400]})


def test_noaux_needs_two_experts_a_group() -> None:
    with pytest.raises(ConfigError, match=r"n_group = 8: .*two experts a group.*n_routed_experts 8"):
        ModelConfig(**BASE | {"n_group": 8, "topk_group": 4})
    ModelConfig(**BASE | {"n_group": 8, "topk_group": 4, "topk_method": "group_limited_greedy"})


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_type = 'llama': must be one of deepseek_v3, deepseek_v2"):
        ModelConfig.from_dict(BASE | {"model_type": "llama"})
    with pytest.raises(ConfigError, match="model_type = 'llama'"):
        ModelConfig(**BASE, model_type="llama")


@pytest.mark.parametrize(("key", "value", "message"), [
    ("model_type", ["deepseek_v3"], "model_type = ['deepseek_v3']"), ("moe_dr", {"format": "1"}, "moe_dr.format"),
    ("yarn", {"factor": 2}, "unknown key yarn")])
def test_values_of_another_type_are_refused_not_tripped_over(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(BASE | {key: value}, strict=True)
    assert message in str(caught.value)


def test_another_model_type_that_publishes_v3_weights_is_v3() -> None:
    config = ModelConfig.from_dict(BASE | {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]})
    assert config.model_type == "deepseek_v3"


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "n_routed_experts", "num_experts_per_tok"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"missing key {key}$"):
        ModelConfig.from_dict({k: v for k, v in BASE.items() if k != key}, strict=True)


@pytest.mark.parametrize(("scaling", "message"), [
    ({"type": "dynamic", "factor": 4}, "rope_scaling.type = 'dynamic'"),
    ({"rope_type": "linear", "factor": 4}, "rope_scaling.type = 'linear'"),
    ({"type": "yarn", "factor": 4}, "rope_scaling.original_max_position_embeddings = None"),
    ({"type": "yarn", "factor": 0, "original_max_position_embeddings": 64}, "rope_scaling.factor = 0"),
    ({"type": "yarn", "factor": math.nan, "original_max_position_embeddings": 64}, "rope_scaling.factor = nan"),
    ({"type": "yarn", "factor": "4", "original_max_position_embeddings": 64}, "rope_scaling.factor = '4'"),
    ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta": 1}, "unknown key beta"),
    ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": "1"}, "mscale = '1'"),
    ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": math.nan}, "beta_fast = nan"),
    ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "truncate": "no"}, "truncate = 'no'"),
    ({"factor": 4}, "rope_scaling has factor but no type"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"type": ["yarn"], "factor": 4}, "rope_scaling.type = ['yarn']"),
    ({"type": "yarn", "rope_type": "linear", "factor": 4}, "rope_scaling.type = "),
    ("yarn", "rope_scaling = 'yarn': must be an object or null"),
])
def test_rope_scaling_that_cannot_be_honoured_is_refused(scaling: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(BASE | {"rope_scaling": scaling})
    assert message in str(caught.value)


# ---- unknown and dangerous keys -----------------------------------------------------------------------------------


def test_an_unknown_key_of_our_own_file_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"unknown key hiden_size = 7; did you mean hidden_size\?"):
        ModelConfig.from_dict(BASE | {"hiden_size": 7, "moe_dr": {"format": FORMAT}})
    with pytest.raises(ConfigError, match=r"unknown key zzz = 1$"):
        ModelConfig.from_dict(BASE | {"zzz": 1}, strict=True)


def test_an_unknown_key_of_a_downloaded_file_is_kept_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="unknown key house_colour = 'blue' is kept but has no effect"):
        config = ModelConfig.from_dict(BASE | {"house_colour": "blue"}, origin="config.json")
    assert config.extra["house_colour"] == "blue"
    written = config.to_dict()
    assert written["house_colour"] == "blue"
    with pytest.warns(UserWarning, match="house_colour"):  # what we wrote ourselves must stay readable
        assert ModelConfig.from_dict(written).extra["house_colour"] == "blue"


@pytest.mark.parametrize(("key", "value"), [
    ("sliding_window", 4096), ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("mlp_bias", True),
    ("index_topk", 2048), ("use_qk_norm", True), ("partial_rotary_factor", 0.5), ("attention_dropout", 0.1),
    ("layer_types", ["sliding_attention"]),
])
@pytest.mark.parametrize("strict", [True, False])
def test_a_key_that_changes_the_mathematics_is_refused(key: str, value: Any, strict: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(BASE | {key: value}, strict=strict)
    assert f"{key} = {value!r} changes the mathematics" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [
    ("sliding_window", None), ("mlp_bias", False), ("index_topk", None), ("partial_rotary_factor", 1.0),
    ("attention_dropout", 0.0)])
def test_the_harmless_value_of_such_a_key_passes(key: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelConfig.from_dict(BASE | {key: value}).extra[key] == value


def test_a_file_from_a_newer_program_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"moe_dr\.format = {FORMAT + 1} is newer"):
        ModelConfig.from_dict(BASE | {"moe_dr": {"format": FORMAT + 1}})


# ---- files --------------------------------------------------------------------------------------------------------


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(NotFoundError, match=r"config\.json: no such file"):
        ModelConfig.from_file(path)
    for text, message in (("{", "not valid JSON"), ("[1]", "must be a JSON object, got list")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            ModelConfig.from_file(tmp_path)
        assert str(path) in str(caught.value)
    path.write_bytes(b'{"\xff": 1}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_file(path)


def test_nan_in_a_file_is_refused_like_any_other_number(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASE | {"rms_norm_eps": math.nan}))
    with pytest.raises(ConfigError, match="rms_norm_eps = nan: must be a positive number"):
        ModelConfig.from_file(path)


# ---- presets and published files ----------------------------------------------------------------------------------


def test_presets() -> None:
    assert list(PRESETS) == ["deepseek-v3", "v3-67b", "v3-16b-a3b", "v3-63m", "small", "nano"]
    shape = {
        name: (c.num_hidden_layers, c.hidden_size, c.n_routed_experts, c.moe_intermediate_size, c.num_experts_per_tok,
               c.n_shared_experts, c.q_lora_rank)
        for name in PRESETS for c in [ModelConfig.preset(name)]}
    assert shape == {
        "deepseek-v3": (61, 7168, 256, 2048, 8, 1, 1536),
        "v3-67b": (44, 5120, 64, 1536, 6, 1, 1536),
        "v3-16b-a3b": (27, 2048, 64, 1408, 6, 2, None),
        "v3-63m": (8, 384, 32, 192, 4, 1, None),
        "small": (6, 256, 32, 64, 4, 1, None),
        "nano": (5, 192, 16, 128, 4, 1, None),
    }
    assert all(ModelConfig.preset(name).num_nextn_predict_layers == (name != "small") for name in PRESETS)
    with pytest.raises(NotFoundError, match="no preset named 'v4'; there are deepseek-v3, v3-67b"):
        ModelConfig.preset("v4")


@pytest.mark.parametrize("published", [V3, V2_LITE], ids=["V3", "V2-Lite"])
def test_published_files_read_without_a_warning(published: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ModelConfig.from_dict(published)
        assert ModelConfig.from_dict(config.to_dict()) == config
    for key, value in published.items():
        ours = getattr(config, key, config.extra.get(key))
        assert ours == value or key == "rope_scaling", key


def test_the_preset_is_the_published_v3() -> None:
    config = ModelConfig.from_dict(V3)
    assert config == ModelConfig.preset("deepseek-v3")
    assert config.yarn == YarnScaling(40, 4096, 32, 1, 1.0, 1.0)
    assert config.yarn.rotary_scale == 1.0
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert config.moe_layers == tuple(range(3, 61)) and config.is_moe(61)
    assert config.latent_dim == 576 and config.qk_head_dim == 192
    assert "quantization_config" not in config.to_dict()  # what we write is not quantized


def test_which_layers_hold_experts() -> None:
    config = ModelConfig(**BASE | {"num_hidden_layers": 7, "first_k_dense_replace": 2, "moe_layer_freq": 2})
    assert config.moe_layers == (2, 4, 6)
    assert ModelConfig(**BASE | {"first_k_dense_replace": 9}).moe_layers == ()


def test_end_tokens_are_always_a_tuple() -> None:
    config = ModelConfig(**BASE)
    assert config.eos_token_ids == (1,)
    assert config.with_(eos_token_id=None).eos_token_ids == ()
    listed = ModelConfig.from_dict(BASE | {"eos_token_id": [1, 5]})
    assert listed.eos_token_ids == (1, 5) and listed.to_dict()["eos_token_id"] == [1, 5]


def test_yarn_scales() -> None:
    plain = YarnScaling(4, 64)
    assert plain.rotary_scale == pytest.approx(0.1 * math.log(4) + 1) and plain.softmax_scale == 1.0
    both = YarnScaling(4, 64, mscale=0.5, mscale_all_dim=1.0)
    assert both.rotary_scale == pytest.approx((0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1))
    assert both.softmax_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    assert YarnScaling(4, 64, attention_factor=1.5, mscale=1.0, mscale_all_dim=1.0).rotary_scale == 1.5
    assert YarnScaling(1, 64, mscale_all_dim=1.0).softmax_scale == 1.0


FACTORS = {"type": "longrope", "short_factor": [1.0, 2.5], "long_factor": [1.0, 2.5],
           "original_max_position_embeddings": 64}


def test_longrope_is_read_where_both_lists_are_equal() -> None:
    config = ModelConfig.from_dict(BASE | {"rope_scaling": FACTORS | {"factor": 4.0}})
    assert config.longrope == LongRope((1.0, 2.5), 64, 4.0)
    assert config.longrope.rotary_scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    stated = ModelConfig.from_dict(BASE | {"rope_scaling": FACTORS | {"attention_factor": 1.5}})
    assert stated.longrope is not None and stated.longrope.rotary_scale == 1.5
    assert LongRope((1.0, 1.0), 64).rotary_scale == 1.0


@pytest.mark.parametrize(("odd", "message"), [
    ({"long_factor": [1.0, 3.0]}, "long_factor = .1.0, 3.0.: must equal short_factor"),
    ({"factor": None}, "rope_scaling.factor = None: must be a positive number"),
    ({"short_factor": 3, "long_factor": 3}, r"rope_scaling.short_factor = \(\): must have .* = 2 numbers"),
    ({"short_factor": [1.0, 0], "long_factor": [1.0, 0]}, "must be a list of positive numbers"),
    ({"short_factor": [1.0], "long_factor": [1.0]}, "must have qk_rope_head_dim / 2 = 2 numbers"),
    ({"mscale": 1.0}, "unknown key mscale"),
])
def test_longrope_of_another_form_is_refused(odd: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(BASE | {"rope_scaling": FACTORS | {"factor": 4.0} | odd})


# ---- round trips --------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any configuration that is possible, small or not."""
    size = st.integers(1, 512)
    groups, per_group = draw(st.integers(1, 8)), draw(st.integers(2, 8))
    kept = draw(st.integers(1, groups))
    number = st.floats(1e-9, 1e9)
    flag = st.booleans()
    vocab = draw(size)
    yarn = draw(st.none() | st.builds(
        YarnScaling, st.floats(1, 100), st.integers(1, 1 << 20), beta_fast=st.floats(1, 64),
        beta_slow=st.floats(0.1, 8), mscale=st.floats(0, 2), mscale_all_dim=st.floats(0, 2),
        attention_factor=st.none() | st.floats(0.1, 4), truncate=flag))
    pairs = draw(size)
    longrope = None if yarn else draw(st.none() | st.builds(
        LongRope, st.just((1.5,) * pairs), st.integers(2, 1 << 20), st.floats(1, 100),
        attention_factor=st.none() | st.floats(0.1, 4)))
    token = st.none() | st.integers(0, vocab - 1)
    return ModelConfig(
        vocab_size=vocab, hidden_size=draw(size), num_hidden_layers=draw(size), num_attention_heads=draw(size),
        intermediate_size=draw(size), moe_intermediate_size=draw(size), n_routed_experts=groups * per_group,
        num_experts_per_tok=draw(st.integers(1, kept * per_group)), n_shared_experts=draw(st.integers(0, 4)),
        n_group=groups, topk_group=kept,
        topk_method=draw(st.sampled_from(["noaux_tc", "greedy", "group_limited_greedy"])),
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])), norm_topk_prob=draw(flag),
        routed_scaling_factor=draw(number), first_k_dense_replace=draw(st.integers(0, 5)),
        moe_layer_freq=draw(st.integers(1, 3)), num_nextn_predict_layers=draw(st.integers(0, 2)),
        q_lora_rank=draw(st.none() | size), kv_lora_rank=draw(size), qk_nope_head_dim=draw(size) - 1,
        qk_rope_head_dim=2 * pairs, v_head_dim=draw(size), attention_bias=draw(flag), rope_theta=draw(number),
        rope_interleave=draw(flag), yarn=yarn, longrope=longrope, max_position_embeddings=draw(size),
        rms_norm_eps=draw(number), tie_word_embeddings=draw(flag), initializer_range=draw(number),
        bos_token_id=draw(token),
        eos_token_id=draw(token | st.lists(st.integers(0, vocab - 1), min_size=1, max_size=3).map(tuple)),
        pad_token_id=draw(token), model_type=draw(st.sampled_from(["deepseek_v3", "deepseek_v2"])))


@given(configs())
@settings(max_examples=150, deadline=None)
def test_to_dict_and_from_dict_round_trip_through_json(config: ModelConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert again.to_dict() == config.to_dict()


# ---- transformers -------------------------------------------------------------------------------------------------


def test_transformers_default_v3_reads_as_transformers_means_it() -> None:
    theirs = pytest.importorskip("transformers").DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"])
    config = _read_quietly(theirs.to_dict())
    same = ("hidden_size num_hidden_layers n_routed_experts n_group topk_group q_lora_rank kv_lora_rank "
            "routed_scaling_factor norm_topk_prob first_k_dense_replace max_position_embeddings").split()
    assert {k: getattr(config, k) for k in same} == {k: getattr(theirs, k) for k in same}
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] and config.yarn is None
    assert (config.topk_method, config.scoring_func) == ("noaux_tc", "sigmoid")


def test_transformers_v2_reads_as_transformers_means_it() -> None:
    theirs = pytest.importorskip("transformers").DeepseekV2Config(num_experts_per_tok=6)
    config = _read_quietly(theirs.to_dict())
    assert config.model_type == "deepseek_v2"
    assert (config.topk_method, config.scoring_func, config.norm_topk_prob) == ("greedy", "softmax", False)
    assert (config.n_group, config.topk_group) == (1, 1)  # null there
    assert (config.n_shared_experts, config.first_k_dense_replace, config.q_lora_rank) == (2, 0, 1536)


@pytest.mark.parametrize("yarn", [
    None,
    YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
    YarnScaling(4.0, 64, beta_fast=16.0, beta_slow=2.0, mscale=0.707, mscale_all_dim=0.5),
    YarnScaling(4.0, 64),
    YarnScaling(4.0, 64, attention_factor=1.25, truncate=False),
])
def test_transformers_reads_our_rope_as_we_do(yarn: YarnScaling | None) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    from deepseek.model.layers import rotary_frequencies

    config = ModelConfig(**BASE | {"qk_rope_head_dim": 16, "rope_theta": 50000.0, "yarn": yarn})
    theirs = transformers.DeepseekV3Config(**config.to_dict())
    assert theirs.rope_parameters["rope_theta"] == 50000.0
    rotary = DeepseekV3RotaryEmbedding(theirs)
    torch.testing.assert_close(rotary.inv_freq, rotary_frequencies(config), rtol=1e-6, atol=1e-9)
    assert rotary.attention_scaling == pytest.approx(yarn.rotary_scale if yarn else 1.0)
    assert _read_quietly(theirs.to_dict()) == config  # and back, in transformers' own spelling


def _read_quietly(keys: dict[str, Any]) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelConfig.from_dict(json.loads(json.dumps(keys, default=str)))
