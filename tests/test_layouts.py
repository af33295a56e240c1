"""Published layouts: what `deepseek info` says of each, logits equal to transformers', and the README's table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.checkpoint import INDEX, load_model
from deepseek.cli import main
from deepseek.convert import dequantize, quantize
from deepseek.engine import LLM, SamplingParams
from deepseek.quant import fp8, int4
from tests.helpers import ROOT
from tests.helpers.layouts import LAYOUTS, rows, small, verdict, write
from tests.helpers.layouts_tokens import ranks, special

LOADS = [name for name, layout in LAYOUTS.items() if not layout.prefix and "index_topk" not in layout.config]
TOLERANCE = 1e-4  # on logits of magnitude 1-5
every_layout = pytest.mark.parametrize("name", LOADS)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a layout, written once; not to be changed."""
    root = tmp_path_factory.mktemp("layouts")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else write(root / name, name)

    return folder


@every_layout
def test_loads_runs_and_equals_transformers(name: str, stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    """`pytest -s` prints the table of verdicts and differences."""
    transformers = pytest.importorskip("transformers", reason="parity needs the test extra (transformers)")
    folder = stand_in(name)
    said = verdict(folder)
    assert said.startswith("loads here: yes (")
    kinds = {"bf16": "BF16", "fp8": "FP8", "int4": "compressed-tensors' int4"}
    assert kinds[LAYOUTS[name].weights] in said
    assert ("tiktoken.model, converted: 1,024 tokens" in said) == (LAYOUTS[name].tokens != "tokenizer.json")

    plain = dequantize(folder, tmp_path / "plain", "float32", progress=False)
    ours = load_model(folder, "float32")
    for tensor, again in zip(ours.state_dict().values(), load_model(plain).state_dict().values(), strict=True):
        assert torch.equal(tensor, again)
    twin, report = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    ids_BT = torch.randint(0, 1024, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, mine = twin.eval()(ids_BT).logits, ours(ids_BT)
    difference = float((theirs - mine).abs().max())
    print(f"{name:<24}{said:<88}largest logit {theirs.abs().max():5.1f}, difference {difference:.1e}")
    assert 1 < theirs.std() < 5 and difference <= TOLERANCE

    llm = LLM(folder)
    assert llm.tokenizer is not None
    (output,) = llm.generate(["ab 混合"], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    assert len(output.token_ids) == 2


@pytest.mark.parametrize("name", ["Moonlight-16B-A3B", "Kimi-K2-Instruct"])
def test_tokenizer_ids(name: str, stand_in: Callable[[str], Path]) -> None:
    """More of it in test_tiktokens.py."""
    tiktoken = pytest.importorskip("tiktoken", reason="parity needs the test extra (tiktoken)")
    theirs = tiktoken.Encoding("kimi", pat_str="|".join(_pattern(stand_in(name))), mergeable_ranks=dict(ranks()),
                               special_tokens=special())
    ours = LLM(stand_in(name)).tokenizer
    assert ours is not None
    for text in ("It's 12345:混合专家。", "ひらがな\r\n\tдля ΑΒΓ", (ROOT / "README.zh.md").read_text(encoding="utf-8")):
        assert ours.encode(text) == theirs.encode_ordinary(text)


def _pattern(folder: Path) -> list[str]:
    """The parts that the code beside the vocabulary lists; read as text."""
    (code,) = folder.glob("tokenization_*.py")
    return code.read_text().partition('r"""')[2].rpartition('"""')[0].split('""", r"""')


@pytest.mark.parametrize(("name", "message"), [
    ("Kimi-VL-A3B", "no, because config.json: model_type = 'kimi_vl' wraps a text model (text_config, model_type = "
                    "'deepseek_v3') in one of images or sound"),
    ("DeepSeek-VL2-Small", "no, because config.json: model_type = 'deepseek_vl_v2' wraps a text model "
                           "(language_config, model_type = 'deepseek_v2')"),
    ("DeepSeek-V3.2", "no, because config.json: model_type = 'deepseek_v32': must be one of"),
])
def test_what_does_not_load_is_named(
    name: str, message: str, stand_in: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in(name)
    assert f"loads here: {message}" in verdict(folder)
    for words in (["infer", "--prompt", "a", "--model", str(folder)], ["quantize", str(folder), f"{tmp_path}/o"]):
        assert main(words) == 2
        assert message.removeprefix("no, because ") in capsys.readouterr().err.replace(f"{folder}/", "")
    assert main(["info", str(folder), "--json"]) == (2 if name == "DeepSeek-V3.2" else 0)


@every_layout
def test_the_index_alone_tells(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", name, weights=False)
    assert "loads here: yes (by its index: 2 of its 2 files of weights are not here; " in verdict(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "no, because" in (said := verdict(folder)) and "1 tensors are missing, first model.norm.weight" in said


def test_a_hub_id_is_looked_at_without_its_weights(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads its environment when it is imported."""
    for owner, files in (("some", 1), ("none", 0)):
        place = tmp_path / "hub" / f"models--{owner}--model"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(stand_in("Moonlight-16B-A3B"), snapshot := place / "snapshots" / ("0" * 40))
        for file in sorted(snapshot.glob("*.safetensors"))[files:]:
            file.unlink()
    code = "import sys; from deepseek.cli import main; sys.exit(sum(main(['info', name]) for name in sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "some/model", "none/model"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("loads here: yes (by its index: ")]
    assert [line.partition(" of weights")[0][31:] for line in said] == ["1 of its 2 files", "2 of its 2 files"], done


def _keys(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        keys = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(keys))

    return edit


def _tensor(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "model-00001-of-00002.safetensors"
        stored = load_file(file)
        edit(stored)
        save_file(stored, file)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file.name} | dict.fromkeys(
            stored, file.name)
        (folder / INDEX).write_text(json.dumps(index))

    return change


NORM = "model.layers.0.self_attn.kv_a_layernorm.weight"


@pytest.mark.parametrize(("name", "edit", "reason"), [
    ("DeepSeek-V3", lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002.safetensors: the file is miss"),
    ("DeepSeek-V3", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    ("DeepSeek-V3", lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    ("DeepSeek-V3", _keys(hidden_size=65), "has shape"), ("DeepSeek-V3", _keys(num_hidden_layers=9), "the tensors 6"),
    ("DeepSeek-V3", _keys(quantization_config={"quant_method": "awq"}), "quant_method = 'awq'"),
    ("DeepSeek-V3", _keys(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
     "quantization_config.weight_block_size = [64, 64]: of FP8 only DeepSeek's is read ([128, 128])"),
    ("DeepSeek-V3", _keys(quantization_config={"quant_method": "fp8", "fmt": "e5m2"}), "fmt = 'e5m2'"),
    ("DeepSeek-V3", _keys(quantization_config={"quant_method": "compressed-tensors", "format": "float-quantized"}),
     "quantization_config.format = 'float-quantized': of compressed-tensors only pack-quantized"),
    ("DeepSeek-V3", _tensor(lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv", t.pop(
        "model.layers.0.mlp.down_proj.weight_scale_inv", None))), "is FP8 but model.layers.0.mlp."),
    ("DeepSeek-V2-Lite", lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]],
     "model.safetensors: the file is missing"),
    ("DeepSeek-V2-Lite", lambda f: (f / INDEX).write_text("{}"), "not a weight index"),
    ("DeepSeek-V2-Lite", _keys(topk_method="noaux_tc"), "e_score_correction_bias"),
    ("DeepSeek-V2-Lite", _keys(sliding_window=512), "sliding_window = 512 changes the mathematics"),
    ("Kimi-K2-Thinking", lambda f: (f / "tiktoken.model").write_text("?"), "tiktoken.model: line 1"),
])
def test_what_is_wrong_with_a_layout(
    name: str, edit: Callable[[Path], object], reason: str, stand_in: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(stand_in(name), tmp_path / "m")
    edit(folder)
    said = verdict(folder)
    assert said.startswith("loads here: no, because ") and reason in said and "\n" not in said


def test_gguf_and_pickles_in_the_place_of_the_index(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "DeepSeek-V2-Lite", weights=False)
    (folder / INDEX).unlink()
    (folder / "m-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "no, because" in (said := verdict(folder)) and "it has GGUF (m-Q4_K_M.gguf)" in said


@pytest.mark.parametrize("name", ["DeepSeek-V2.5", "DeepSeek-V3", "Kimi-K2-Thinking"])
def test_four_bits_of_a_layout_load_here(name: str, stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(stand_in(name), tmp_path / "nf4", progress=False)
    assert verdict(tmp_path / "nf4").startswith("loads here: yes (nf4; tokenizer.json: ")
    (tmp_path / "nf4" / "manifest.json").unlink()
    stored = load_file(file := tmp_path / "nf4" / "model.safetensors")
    stored.pop("model.embed_tokens.step")
    save_file(stored, file)
    assert "1 tensors are missing, first model.embed_tokens.step" in verdict(tmp_path / "nf4")


def test_values_by_the_formulas(stand_in: Callable[[str], Path]) -> None:
    """FP8 and int4 as the layouts store them, against the codecs that test_fp8.py and test_int4.py hold."""
    for name, expert in (("DeepSeek-V3", 3), ("Kimi-K2-Thinking", 5)):
        stored = {k: t for file in stand_in(name).glob("*.safetensors") for k, t in load_file(file).items()}
        stem = f"model.layers.{small(LAYOUTS[name].config)['first_k_dense_replace']}.mlp.experts"
        down = f"{stem}.{expert}.down_proj"
        want = (fp8.dequantize(stored[f"{down}.weight"], stored[f"{down}.weight_scale_inv"])
                if name == "DeepSeek-V3" else
                int4.dequantize(stored[f"{down}.weight_packed"], stored[f"{down}.weight_scale"], 32))
        model = load_model(stand_in(name), "float32")
        assert torch.equal(model.state_dict()[f"{stem}.down_proj"][expert], want)


@pytest.mark.parametrize(("language", "file"), [("en", "README.md"), ("zh", "README.zh.md")])
def test_the_readme_has_the_table(language: str, file: str, stand_in: Callable[[str], Path]) -> None:
    assert "\n".join(rows(language, stand_in)) in (ROOT / file).read_text(encoding="utf-8"), (
        f"`python -m tests.helpers.layouts {language}` prints it")
