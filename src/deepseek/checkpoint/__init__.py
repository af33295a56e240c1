"""The one place that reads and writes weights.

On disk: Hugging Face's layout for DeepseekV3ForCausalLM / DeepseekV2ForCausalLM, safetensors only (weights never
execute code), one file or shards with an index, beside `config.json` and the tokenizer. In memory the names are the
same, but for two rows of one table:

    in memory                                       on disk
    model.layers.L.mlp.experts.gate_up_proj [E,..]  model.layers.L.mlp.experts.e.gate_proj.weight, ….up_proj.weight
    model.layers.L.mlp.experts.down_proj    [E,..]  model.layers.L.mlp.experts.e.down_proj.weight
    model.mtp.d.…  (input.enorm, …)                 model.layers.(num_hidden_layers + d).…  (enorm, …)

MTP tensors are written to `mtp.safetensors`, outside the index, unless the model has V3's 61 layers: transformers
skips `model.layers.61.*` by name and would report any other extra layer as unexpected.

A quantized checkpoint (docs/formats.md, written by convert) has packed tensors in the places of its weights. They
are not read but mapped: a module's weights are views of the file.

What we write carries `manifest.json` with the size and SHA-256 of every file; reading refuses, by name, a file that is
truncated or altered. Official FP8 weights (`weight_scale_inv`) are dequantized on the way in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..deprecation import renamed
from .adapted import AdaptedFiles
from .adapters import attach_adapter, check_targets, save_adapter, save_delta
from .files import EXPERT_USE, MANIFEST, TORCH_DTYPES, Span, TensorFiles, check_manifest, write_manifest, write_tensors
from .identity import base_tensors, fingerprint, stored_fingerprint, tensor_hashes
from .loads import Verdict, verdict
from .models import (
    Dtype,
    check_tensors,
    expert_spans,
    load_model,
    open_checkpoint,
    save_model,
    stored_dtype,
    to_dtype,
    with_state,
)
from .names import INDEX, PAGE, find_config, hf_names, outside_index, quantized_targets, resolve, units
from .packages import ExpertPackage, PackageInfo, read_package, write_package
from .several import UNNAMED, put_beside, read_several, sort_out

__all__ = [
    "EXPERT_USE", "INDEX", "MANIFEST", "PAGE", "TORCH_DTYPES", "UNNAMED", "AdaptedFiles", "Dtype", "ExpertPackage",
    "PackageInfo", "Span", "TensorFiles", "Verdict", "attach_adapter", "base_tensors", "check_manifest",
    "check_targets", "check_tensors", "expert_spans", "find_config", "fingerprint", "hf_names", "load_model",
    "open_checkpoint", "outside_index", "put_beside", "quantized_targets", "read_package", "read_several", "resolve",
    "save_adapter", "save_delta", "save_model", "sort_out", "stored_dtype", "stored_fingerprint", "tensor_hashes",
    "to_dtype", "units", "verdict", "with_state", "write_manifest", "write_package", "write_tensors",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"disk_parts": "hf_names", "quantised_places": "quantized_targets"})
