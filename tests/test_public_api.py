"""The public names: a sorted list, loaded when first used, and nothing heavy before."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import deepseek

PUBLIC = ["Atlas", "ExpertId", "ExpertPool", "KnowledgeBase", "LLM", "LoRAAdapter", "MoEFineTuner", "ModelConfig",
          "SamplingParams", "Tokenizer", "Trainer", "calculate_relevance", "dynamic_batching", "dynamic_routing",
          "extract_keywords", "fuse_expert_outputs", "load_model", "pull", "quantize", "save_model", "select_experts",
          "upcycle"]


def test_the_public_names_are_this_sorted_list() -> None:
    assert deepseek.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(deepseek) == sorted([*PUBLIC, "__version__"])


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_loads(name: str) -> None:
    value = getattr(deepseek, name)
    assert callable(value) and value.__name__ == name and value.__module__.startswith("deepseek.")
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'deepseek' has no attribute 'nothing'"):
        deepseek.nothing  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        exec("from deepseek import nothing")


HEAVY = ("torch", "numpy", "transformers", "matplotlib", "huggingface_hub", "safetensors", "tokenizers", "jinja2")


@pytest.mark.parametrize("module", ["deepseek", "deepseek.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    loaded = _python(f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))")
    assert loaded.split() == []


def test_configurations_need_no_torch() -> None:
    assert _python("import sys; from deepseek import ModelConfig, ExpertId; print('torch' in sys.modules)") == "False\n"


def test_an_unknown_name_loads_nothing_either() -> None:
    assert _python("import sys, deepseek; hasattr(deepseek, 'x'); print('torch' in sys.modules)") == "False\n"


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
