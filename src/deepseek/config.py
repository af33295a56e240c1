"""ModelConfig: the keys of Hugging Face's config.json for DeepseekV2/V3ForCausalLM, checked once, frozen.

Three kinds of keys meet here:

    mathematics   the dataclass fields below; an impossible value is an error that names key, rule and value
    foreign       keys that other tools write (auto_map, torch_dtype, …): kept in `extra` and written back
    dangerous     keys that would change the mathematics if ignored (a sliding window, a soft cap): refused

Our own files carry `"moe_dr": {"format": 1}`; in them, and in a configuration that a user hands to `deepseek train`,
an unknown key is a typing error and refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, NotFoundError, nearest, printable, shown
from .files import not_finite, read_json
from .settings import is_int, is_number

FORMAT = 1
ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}

# Keys of other tools that do not touch the mathematics: carried along without a warning.
FOREIGN = frozenset(
    "architectures auto_map dtype torch_dtype ep_size head_dim qk_head_dim is_decoder moe_dr name_or_path "
    "_name_or_path num_key_value_heads output_router_logits pretraining_tp quantization_config return_dict seq_aux "
    "aux_loss_alpha transformers_version use_cache chunk_size_feed_forward id2label label2id problem_type "
    "output_attentions output_hidden_states is_encoder_decoder tie_encoder_decoder task_specific_params".split()
)
# Keys that change the mathematics in other models; harmless only with the value given.
DANGEROUS: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "sliding_window": (None, False),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "mlp_bias": (None, False),
    "index_topk": (None,),
    "index_n_heads": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "zero_expert_num": (None, 0),
    "attention_dropout": (None, 0, 0.0),
    "layer_types": (None,),
    "vision_config": (None,),
    "audio_config": (None,),
}


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) as DeepSeek uses it.

    `attention_factor` multiplies cos and sin; `mscale_all_dim` enters the softmax scale of MLA.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(self, key)
            _need(f"rope_scaling.{key}", value, "must be a positive number", _is_positive(value))
        for key in ("mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, key)
            _need(f"rope_scaling.{key}", value, "must be a number >= 0", _equals(value, 0, None) or _is_positive(value))
        _need("rope_scaling.truncate", self.truncate, "must be true or false", isinstance(self.truncate, bool))

    @property
    def rotary_scale(self) -> float:
        """Factor on cos and sin; 1.0 whenever mscale equals mscale_all_dim (all published DeepSeek models)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_scale(self) -> float:
        """Factor on the softmax scale: (0.1 * mscale_all_dim * ln(factor) + 1)^2."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): every rotary pair's frequency is divided by a factor of its own, the same one in
    short and in long texts.

    `attention_factor` multiplies cos and sin.
    """

    factors: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _need("rope_scaling.short_factor", self.factors, "must be a list of positive numbers",
              isinstance(self.factors, tuple) and all(map(_is_positive, self.factors)))
        for key in ("factor", "original_max_position_embeddings", "attention_factor"):
            value = getattr(self, key)
            _need(f"rope_scaling.{key}", value, "must be a positive number",
                  _is_positive(value) or (key == "attention_factor" and value is None))

    @property
    def rotary_scale(self) -> float:
        """Factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        stretch = math.log(self.factor) / math.log(self.original_max_position_embeddings)
        return math.sqrt(1 + stretch) if self.factor > 1 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The keys of rope_scaling in config.json."""
        scaling = {key: value for key, value in vars(self).items() if value is not None and key != "factors"}
        return scaling | {"short_factor": list(self.factors), "long_factor": list(self.factors)}


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3 (or V2) model. Defaults describe the small `v3-63m` preset's family, not any published model.

    Shape letters used elsewhere: H hidden_size, N num_attention_heads, R kv_lora_rank, E n_routed_experts,
    K num_experts_per_tok, I moe_intermediate_size, V vocab_size.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    num_nextn_predict_layers: int = 0
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: YarnScaling | None = None
    longrope: LongRope | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    model_type: str = "deepseek_v3"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    # ---- derived ----------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cached MLA entry: compressed KV plus the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_head_dim**-0.5 * (self.yarn.softmax_scale if self.yarn else 1.0)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold routed experts (the MTP layers, which always do, not counted)."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    def is_moe(self, layer: int) -> bool:
        if layer >= self.num_hidden_layers:  # an MTP layer
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def with_(self, **changes: Any) -> ModelConfig:
        """A checked copy with `changes` applied."""
        return replace(self, **changes)

    # ---- checks -----------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        for key, most in _AT_MOST.items():
            value = getattr(self, key)
            _need(key, value, f"must be at most {most:,}", not _is_int(value, most + 1))
        for key in (
            "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size moe_intermediate_size "
            "n_routed_experts num_experts_per_tok n_group topk_group moe_layer_freq kv_lora_rank "
            "qk_rope_head_dim v_head_dim max_position_embeddings"
        ).split():
            _need(key, getattr(self, key), "must be a positive integer", _is_int(getattr(self, key), 1))
        for key in "n_shared_experts first_k_dense_replace num_nextn_predict_layers qk_nope_head_dim".split():
            _need(key, getattr(self, key), "must be an integer >= 0", _is_int(getattr(self, key), 0))
        for key in "routed_scaling_factor rope_theta rms_norm_eps initializer_range".split():
            _need(key, getattr(self, key), "must be a positive number", _is_positive(getattr(self, key)))
        for key in "norm_topk_prob attention_bias rope_interleave tie_word_embeddings".split():
            _need(key, getattr(self, key), "must be true or false", isinstance(getattr(self, key), bool))
        rank = self.q_lora_rank
        _need("q_lora_rank", rank, "must be null or a positive integer", rank is None or _is_int(rank, 1))
        experts, groups, top = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        _need("n_group", groups, f"must divide n_routed_experts ({experts})", experts % groups == 0)
        _need("topk_group", self.topk_group, f"must be at most n_group ({groups})", self.topk_group <= groups)
        pool = experts // groups * self.topk_group
        _need("num_experts_per_tok", top, f"must be at most the {pool} experts of the kept groups", top <= pool)
        _need("qk_rope_head_dim", self.qk_rope_head_dim, "must be even", self.qk_rope_head_dim % 2 == 0)
        if self.longrope is not None:
            _need("yarn", self.yarn, "must be null beside longrope", self.yarn is None)
            _need("rope_scaling.short_factor", self.longrope.factors,
                  f"must have qk_rope_head_dim / 2 = {self.qk_rope_head_dim // 2} numbers",
                  2 * len(self.longrope.factors) == self.qk_rope_head_dim)
        _need("hidden_act", self.hidden_act, "must be 'silu'", self.hidden_act == "silu")
        kind, score = self.model_type, self.scoring_func
        _need("model_type", kind, f"must be one of {', '.join(ARCHITECTURES)}", kind in ARCHITECTURES)
        methods = ("noaux_tc", "greedy", "group_limited_greedy")
        _need("topk_method", self.topk_method, f"must be one of {', '.join(methods)}", self.topk_method in methods)
        _need("scoring_func", score, "must be sigmoid or softmax", score in ("sigmoid", "softmax"))
        if self.topk_method == "noaux_tc":
            _need("n_group", groups, f"needs two experts a group at least (n_routed_experts {experts}): "
                  "a group's score is the sum of its two best", groups == 1 or experts // groups >= 2)
        _need("num_hidden_layers", self.num_hidden_layers, f"with n_routed_experts = {experts} there would be more "
              f"than {_EXPERTS_AT_MOST:,} experts", self.num_hidden_layers * experts <= _EXPERTS_AT_MOST)
        last = self.vocab_size - 1
        for token in self.eos_token_ids:
            _need("eos_token_id", token, f"must lie in 0..vocab_size-1 ({last})", _is_int(token, 0) and token <= last)
        for key in ("bos_token_id", "pad_token_id"):  # foreign files use values outside the vocabulary for "none"
            token = getattr(self, key)
            _need(key, token, "must be null or an integer", token is None or _is_int(token, -(2**31)))

    # ---- Hugging Face's config.json ---------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any], *, strict: bool | None = None, origin: str = "config") -> ModelConfig:
        """Read the keys of a config.json.

        strict: refuse unknown keys; None means: exactly when the file is ours (`moe_dr`).
        Raises ConfigError naming the key, the rule and the value.
        """
        keys = dict(keys)
        if (inner := _wrapper(keys)) is not None:
            kind, own = (shown(part.get("model_type")) for part in (keys, keys[inner]))
            raise ConfigError(f"{origin}: model_type = {kind} wraps a text model ({inner}, model_type = {own}) in one "
                              "of images or sound: only models of text alone are read here")
        if strict is None:
            # transformers keeps our mark when it writes, and adds keys of its own
            strict = "moe_dr" in keys and "transformers_version" not in keys
        extra: dict[str, Any] = {}
        kept = _kept_keys(keys.get("moe_dr"), origin)
        names = keys.get("architectures")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ConfigError(f"{origin}: architectures = {shown(names)}: must be a list of names")
        values = _read_generation(keys, strict, origin)
        _read_rope(keys, values, origin)
        known = {f.name for f in fields(cls)} - _NO_KEYS
        for key, value in keys.items():
            if key in known:
                if value is None and key in _NULL_MEANS_DEFAULT:
                    continue
                values[key] = tuple(value) if key == "eos_token_id" and isinstance(value, list) else value
            elif key in DANGEROUS:
                if not _equals(value, *DANGEROUS[key]):
                    raise ConfigError(f"{origin}: {key} = {shown(value)} changes the mathematics and is not supported "
                                      f"(only {DANGEROUS[key][-1]!r} is)")
                extra[key] = value
            elif key in FOREIGN:
                extra[key] = value
            elif strict and key not in kept:
                raise ConfigError(f"{origin}: unknown key {printable(key)} = {shown(value)}{nearest(key, known)}")
            else:
                warnings.warn(f"{origin}: unknown key {printable(key)} = {shown(value)} is kept but has no effect",
                              stacklevel=2)
                extra[key] = value
        try:
            odd = not_finite(extra)
        except ValueError as error:
            raise ConfigError(f"{origin}: {error}") from None
        if odd:
            raise ConfigError(f"{origin}: {printable(odd)}: must be a number of JSON, or text")
        if missing := [key for key in _REQUIRED if key not in values]:
            raise ConfigError(f"{origin}: missing key {', '.join(missing)}")
        try:
            return cls(**values, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path, *, strict: bool | None = None) -> ModelConfig:
        """Read a config.json, or the one inside a checkpoint folder."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path, ConfigError, finite=False), strict=strict, origin=str(path))

    @classmethod
    def of_wrapper(cls, path: str | Path) -> tuple[ModelConfig, str] | None:
        """(the text model's, the key it stands under) where a folder's config.json wraps a text model in others; None
        where it does not, or where that is not read here either."""
        file = Path(path) / "config.json"
        try:
            keys = read_json(file, ConfigError, finite=False)
            name = _wrapper(keys)
            return None if name is None else (cls.from_dict(keys[name], strict=False, origin=f"{file}: {name}"), name)
        except ConfigError:
            return None

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of PRESETS by name. Raises NotFoundError listing them."""
        if name not in PRESETS:
            raise NotFoundError(f"no preset named {name!r}; there are {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        return cls.from_dict(PRESETS[name], strict=True, origin=name)

    def to_dict(self) -> dict[str, Any]:
        """The keys of a config.json that transformers reads as the same model, marked as ours."""
        out: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            **{k: v for k, v in self.extra.items() if k not in ("moe_dr", "architectures", "quantization_config")},
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NO_KEYS},
            "num_key_value_heads": self.num_attention_heads,
            "moe_dr": {"format": FORMAT},
        }
        if kept := sorted(key for key in self.extra if key not in FOREIGN and key not in DANGEROUS):
            out["moe_dr"]["kept"] = kept  # unknown to us, but not typing errors of ours
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        if self.yarn:
            scaling = {k: v for k, v in vars(self.yarn).items() if v is not None and v is not True}
            for key in ("mscale", "mscale_all_dim"):  # 0 means "not given": transformers tests them for presence
                if not scaling[key]:
                    del scaling[key]
            out["rope_scaling"] = {"rope_type": "yarn", "type": "yarn"} | scaling
        elif self.longrope:
            out["rope_scaling"] = {"rope_type": "longrope", "type": "longrope"} | self.longrope.to_dict()
        return out


_NO_KEYS = frozenset(("extra", "yarn", "longrope"))  # fields that stand under other names in config.json
_REQUIRED = ("vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size moe_intermediate_size "
             "n_routed_experts num_experts_per_tok").split()
# transformers writes null for "one group" and for "no shared experts"
_NULL_MEANS_DEFAULT = {"n_group", "topk_group", "n_shared_experts", "topk_method", "scoring_func", "norm_topk_prob",
                       "attention_bias", "rope_interleave", "num_nextn_predict_layers", "moe_layer_freq", "v_head_dim"}


# Far beyond any published model, and small enough that nothing is allocated or counted for hours before the tensors
# are looked at.
_AT_MOST = {
    "num_hidden_layers": 4096, "num_nextn_predict_layers": 64, "n_routed_experts": 1 << 16, "n_shared_experts": 1024,
    "vocab_size": 1 << 24, "max_position_embeddings": 1 << 31, "num_attention_heads": 1 << 14,
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank",
                     "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1 << 20)}
_EXPERTS_AT_MOST = 1 << 20


def _is_int(value: Any, least: int) -> bool:
    return is_int(value) and value >= least


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < 1e300


def _need(key: str, value: object, rule: str, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"{key} = {shown(value)}: {rule}")


def _equals(value: object, *options: object) -> bool:
    """Whether a value of a file is one of these. For Python True is 1 and False is 0; in a file they are not."""
    return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options)


# What transformers assumes where a downloaded file leaves a key out (its configuration classes, release 5.23).
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": dict(first_k_dense_replace=3, routed_scaling_factor=2.5, n_group=8, topk_group=4, q_lora_rank=1536),
    "deepseek_v2": dict(first_k_dense_replace=0, n_shared_experts=2, q_lora_rank=1536, topk_method="greedy",
                        scoring_func="softmax", norm_topk_prob=False, max_position_embeddings=2048),
}
_NEWER_SPELLING = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts",
                   "num_experts": "n_routed_experts"}


def _wrapper(keys: Mapping[str, Any]) -> str | None:
    """The key under which the text model of a multimodal one stands."""
    return next((key for key in ("text_config", "language_config", "llm_config")
                 if isinstance(keys.get(key), Mapping) and keys[key]), None)


def _kept_keys(ours: Any, origin: str) -> list[str]:
    """The unknown keys that a file of ours keeps, by its mark. Raises ConfigError for a mark that is newer, or none."""
    if ours is None:
        return []
    if not isinstance(ours, Mapping):
        raise ConfigError(f"{origin}: moe_dr = {shown(ours)}: must be an object")
    version, kept = ours.get("format"), ours.get("kept", [])
    if not isinstance(version, int) or not _is_int(version, 1):
        raise ConfigError(f"{origin}: moe_dr.format = {shown(version)}: must be a positive integer")
    if version > FORMAT:
        raise ConfigError(f"{origin}: moe_dr.format = {version} is newer than this program reads ({FORMAT})")
    if not isinstance(kept, list | tuple) or not all(isinstance(key, str) for key in kept):
        raise ConfigError(f"{origin}: moe_dr.kept = {shown(kept)}: must be a list of keys")
    return list(kept)


def _read_generation(keys: dict[str, Any], strict: bool, origin: str) -> dict[str, Any]:
    """Which generation of the architecture the keys describe, and that generation's defaults."""
    kind = keys.pop("model_type", None)
    known = tuple(ARCHITECTURES)  # a tuple: compares, where a set would hash what may be a list
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"{origin}: model_type = {shown(kind)}: must be one of {', '.join(ARCHITECTURES)}")
    if kind not in known:  # other model types publish V3 weights under V3's architecture name
        names = keys.get("architectures") or []
        kind = next((k for k, name in ARCHITECTURES.items() if name in names), kind or "deepseek_v3")
    if kind not in known:
        raise ConfigError(f"{origin}: model_type = {shown(kind)}: must be one of {', '.join(ARCHITECTURES)}")
    for new, old in _NEWER_SPELLING.items():
        if new in keys:
            keys.setdefault(old, keys.pop(new))
    v2_gate = {} if kind == "deepseek_v3" else {"topk_method": "greedy", "scoring_func": "softmax"}
    return {"model_type": kind, **(v2_gate if strict else _HF_DEFAULTS[kind])}


def _read_rope(keys: dict[str, Any], values: dict[str, Any], origin: str) -> None:
    """`rope_scaling` (the published files) or `rope_parameters` (transformers 5) -> rope_theta, yarn or longrope.
    Where a file has both, or a base in two places, they must agree."""
    found = {key: _one_rope(key, scaling, origin) for key in ("rope_scaling", "rope_parameters")
             if (scaling := keys.pop(key, None)) is not None}
    bases = {f"{key}.rope_theta": theta for key, (theta, _) in found.items() if theta is not None}
    if "rope_theta" in keys:
        bases["rope_theta"] = keys.pop("rope_theta")
    for name, theta in bases.items():
        _need(f"{origin}: {name}", theta, "must be a positive number", _is_positive(theta))
    kinds = {key: scaling for key, (_, scaling) in found.items() if scaling != "no type"}
    for said in (bases, kinds):
        first, *others = said.values() or (None,)
        if any(other != first for other in others):
            raise ConfigError(f"{origin}: {' and '.join(said)} differ: {shown([first, *others], 200)}")
    if bases:
        values["rope_theta"] = next(iter(bases.values()))
    scaling = next(iter(kinds.values()), None)
    if isinstance(scaling, YarnScaling | LongRope):
        values["yarn" if isinstance(scaling, YarnScaling) else "longrope"] = scaling


def _one_rope(key: str, given: Any, origin: str) -> tuple[Any, YarnScaling | LongRope | str | None]:
    """(rope_theta or None; the scaling, None for plain positions, or "no type" where nothing is said about that)."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{origin}: {key} = {shown(given)}: must be an object or null")
    scaling = dict(given)
    named = (scaling.pop("type", None), scaling.pop("rope_type", None))
    kinds = [kind for kind in named if kind is not None]
    kind = None if not kinds else kinds[0] if kinds[0] == kinds[-1] else kinds
    theta = scaling.pop("rope_theta", None)
    if kind in (None, "default"):
        part = scaling.pop("partial_rotary_factor", None)
        if not _equals(part, *DANGEROUS["partial_rotary_factor"]):
            raise ConfigError(f"{origin}: {key}.partial_rotary_factor = {shown(part)} changes the mathematics and is "
                              "unsupported")
        if scaling:
            raise ConfigError(f"{origin}: {key} has {printable(', '.join(scaling))} but no type")
        return theta, "no type" if kind is None else None
    if kind not in ("yarn", "longrope"):
        raise ConfigError(f"{origin}: {key}.type = {shown(kind)}: must be 'yarn', 'longrope' or 'default'")
    made: type[YarnScaling | LongRope] = YarnScaling if kind == "yarn" else LongRope
    if kind == "longrope":
        short, long = (scaling.pop(f"{name}_factor", None) for name in ("short", "long"))
        _need(f"{origin}: {key}.long_factor", long, "must equal short_factor: other factors for long texts than for "
              "short ones are not supported", long == short)
        scaling["factors"] = tuple(short) if isinstance(short, list) else ()
    known = {f.name for f in fields(made)}
    if unknown := sorted(set(scaling) - known):
        raise ConfigError(f"{origin}: {key}: unknown key {printable(', '.join(unknown))}")
    stated = {k: v for k, v in scaling.items() if v is not None}
    try:
        needed: dict[str, Any] = {"original_max_position_embeddings": None}
        if stated.get("attention_factor") is None or kind == "yarn":
            needed["factor"] = None
        return theta, made(**needed | stated)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _yarn(factor: float, mscale: float) -> dict[str, Any]:
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": 4096, "beta_fast": 32,
            "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale}


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2412.19437, section 4.2, and the published config.json
    "deepseek-v3": dict(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, intermediate_size=18432,
        moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3, num_nextn_predict_layers=1, q_lora_rank=1536,
        max_position_embeddings=163840, rope_scaling=_yarn(40, 1.0)),
    # the user's figures: 67 B parameters, 11 B active, 16.4 %
    "v3-67b": dict(
        vocab_size=129280, hidden_size=5120, num_hidden_layers=44, num_attention_heads=40, intermediate_size=10752,
        moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=1, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3, num_nextn_predict_layers=1, q_lora_rank=1536,
        max_position_embeddings=163840, rope_scaling=_yarn(40, 1.0)),
    # V2-Lite's layer shapes (arXiv 2405.04434, appendix B) under V3's gate: fits a consumer machine
    "v3-16b-a3b": dict(
        vocab_size=102400, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=1, num_nextn_predict_layers=1, q_lora_rank=None,
        max_position_embeddings=163840, rope_scaling=_yarn(40, 0.707)),
    # for experiments on one machine: 63 M parameters (without the MTP layer), 20 M of them active
    "v3-63m": dict(
        vocab_size=16384, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, intermediate_size=1024,
        moe_intermediate_size=192, n_routed_experts=32, num_experts_per_tok=4, n_shared_experts=1, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=1, num_nextn_predict_layers=1, q_lora_rank=None,
        kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True),
    # eight routing groups to bind names to: 11 M parameters, 4 M active; trains in about an hour on two cores
    "small": dict(
        vocab_size=8192, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        moe_intermediate_size=64, n_routed_experts=32, num_experts_per_tok=4, n_shared_experts=1, n_group=8,
        topk_group=2, routed_scaling_factor=1.0, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, max_position_embeddings=2048,
        tie_word_embeddings=True),
    # for a demonstration of minutes
    "nano": dict(
        vocab_size=4096, hidden_size=192, num_hidden_layers=5, num_attention_heads=4, intermediate_size=512,
        moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, n_group=4,
        topk_group=2, routed_scaling_factor=1.0, first_k_dense_replace=1, num_nextn_predict_layers=1, q_lora_rank=None,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, max_position_embeddings=1024),
}
