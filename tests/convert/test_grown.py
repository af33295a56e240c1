"""Packages into a model and out of it: the same files back, the same logits; what does not fit is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepseek import files
from deepseek.atlas import Atlas, ExpertUsage, NamedGroup
from deepseek.checkpoint import EXPERT_USE, MANIFEST, fingerprint, load_model, read_package, save_delta, tensor_hashes
from deepseek.checkpoint.identity import base_tensors
from deepseek.config import LongRope
from deepseek.convert import GROWN, export, grown, install, installed, merge, quantize, remove, verify_model
from deepseek.convert.packages import calibrate
from deepseek.engine import LLM
from deepseek.errors import CheckpointError, ConfigError, DataError
from deepseek.ids import ExpertId, ExpertSet
from deepseek.model import CausalLM, RoutingRecord
from deepseek.ops.panels import unpack_mlp
from tests.helpers.expert_packages import EXPERTS, GENERAL, WIDTH, about, hashes, make_base, make_keys, make_package

pytestmark = pytest.mark.filterwarnings("ignore:.*unsigned:UserWarning")
IDS = torch.tensor([[5, 17, 3, 99, 250, 7, 7, 12]])
FORMS = ("float32", "bfloat16", "sharded", "tied", "upcycled", "nf4", "int8")


def base_of(folder: Path, form: str) -> Path:
    every: dict[str, dict[str, Any]] = {
        "bfloat16": dict(dtype=torch.bfloat16), "sharded": dict(shard_bytes=60_000),
        "tied": dict(tie_word_embeddings=True),
        "upcycled": dict(qk_nope_head_dim=0, attention_bias=True, longrope=LongRope((1.0, 0.5, 3.0, 7.0) * 2, 64))}
    options = every.get(form, {})
    if form not in ("nf4", "int8"):
        return make_base(folder, **options)
    plain = make_base(folder.with_name("plain"))
    quantize(plain, folder, form, progress=False)  # type: ignore[arg-type]
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load_model(folder)(IDS)


@pytest.mark.parametrize("form", FORMS)
def test_removal_in_reverse_order_gives_every_file_back(form: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", form)
    packages = [make_package(tmp_path, base, name, seed) for seed, name in enumerate(("law", "code", "math"))]
    before, seen = [hashes(base)], [logits(base)]
    for place, package in enumerate(packages):
        assert install(package, base, calibration=GENERAL).place == place
        verify_model(base)
        before.append(hashes(base))
        seen.append(logits(base))
        assert not torch.equal(seen[-1], seen[0])
    for name in ("math", "code", "law"):
        assert hashes(base) == before.pop() and torch.equal(logits(base), seen.pop())
        remove(base, name)
    assert hashes(base) == before.pop() and torch.equal(logits(base), seen.pop()) and not before


@pytest.mark.parametrize("form", ["float32", "nf4"])
def test_removal_from_the_middle_is_never_having_installed_it(form: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", form)
    other = shutil.copytree(base, tmp_path / "other")
    packages = {name: make_package(tmp_path, base, name, seed) for seed, name in enumerate(("law", "code", "math"))}
    for package in packages.values():
        install(package, base, calibration=GENERAL)
    remove(base, "law")
    for name in ("code", "math"):
        install(packages[name], other, calibration=GENERAL)
    assert hashes(base) == hashes(other)
    assert Atlas.load(base).names == ("code", "math")
    assert [e.index for e in Atlas.load(base)["math"]] == [4, 5, 6, 7] * 2


@pytest.mark.parametrize("form", FORMS)
def test_new_experts_with_zero_down_projections_change_nothing(form: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", form)
    before = logits(base)
    for name in ("law", "code"):
        install(make_package(tmp_path, base, name, zero_down=True), base)
        assert torch.equal(logits(base), before)


def test_a_new_folder_has_the_same_files_and_the_source_stays(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "notes.bin").write_bytes(b"kept")
    (base / "more").mkdir()
    (base / "more" / "text.md").write_text("kept too")
    package, before = make_package(tmp_path, base, "law"), hashes(base)
    out = tmp_path / "out"
    install(package, base, out=out)
    assert hashes(base) == before and {"notes.bin", "more/text.md"} < hashes(out).keys()
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        install(package, base, out=out)
    with pytest.raises(ConfigError, match="must not be the source"):
        install(package, base, out=base)
    install(package, base)
    assert hashes(base) == hashes(out)
    remove(out, "law", out=tmp_path / "back")
    assert hashes(out) == hashes(base) and hashes(tmp_path / "back") == before


# ---- what the model computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float32", "bfloat16", "upcycled"])
def test_transformers_computes_the_same(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs the test extra (transformers)")
    base = base_of(tmp_path / "base", form)
    for seed, name in enumerate(("law", "code")):
        install(make_package(tmp_path, base, name, seed), base, calibration=GENERAL)
    twin, report = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert type(twin).__name__ == "DeepseekV3ForCausalLM"
    ours = load_model(base, "float32")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), twin.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["float32", "nf4", "int8"])
def test_a_token_goes_to_one_group_with_raw_scores(form: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", form)
    for seed, name in enumerate(("law", "code", "math")):
        install(make_package(tmp_path, base, name, seed), base, calibration=GENERAL)
    model, routing = load_model(base), RoutingRecord()
    with torch.no_grad():
        model(IDS, routing=routing)
    assert set(routing.routes) == {1, 2}
    chosen = set()
    for layer, route in routing.routes.items():
        bias = model.moe_blocks()[layer].gate.bias
        score = (route.scores_TE + bias).unflatten(1, (3, EXPERTS)).topk(2).values.sum(-1)
        group = score.argmax(1, keepdim=True)
        chosen |= set(group.flatten().tolist())
        want = group * EXPERTS + torch.arange(EXPERTS)
        assert torch.equal(route.index_TK.sort(1).values, want)
        torch.testing.assert_close(route.weight_TK, route.scores_TE.gather(1, route.index_TK))
    assert len(chosen) > 1


@pytest.mark.parametrize("form", ["float32", "nf4"])
def test_the_engine_serves_a_grown_model(form: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", form)
    for seed, name in enumerate(("law", "code")):
        install(make_package(tmp_path, base, name, seed), base)
    prompts = [[5, 17, 3, 99], [7, 12, 250]]
    usage = ExpertUsage(load_model(base).config)
    llm = LLM(base, warmup_experts=["law"], expert_memory="64KiB" if form == "nf4" else None)
    whole = LLM(base)
    try:
        assert llm.warmup is not None and llm.warmup.experts == 2 * EXPERTS
        outputs = llm.generate(prompts, max_tokens=8, temperature=0, ignore_eos=True, usage=usage)
        told = usage.named(llm.engine.atlas)
        again = whole.generate(prompts, max_tokens=8, temperature=0, ignore_eos=True)
    finally:
        llm.close()
        whole.close()
    assert "law" in told and "code" in told
    assert int(usage.counts_LE.sum()) == usage.tokens * 2 * EXPERTS
    assert [output.token_ids for output in outputs] == [output.token_ids for output in again]
    for prompt, output in zip(prompts, outputs, strict=True) if form == "float32" else ():
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(whole.model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids[len(prompt):] == list(output.token_ids)


# ---- calibration ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def group_scores(folder: Path, base: CausalLM, rows: list[list[int]]) -> torch.Tensor:
    """Mean score of every group in every layer, on the base's hidden states, by hand."""
    grown_model = load_model(folder)
    found = []
    for layer in (1, 2):
        inputs: list[torch.Tensor] = []
        hook = base.model.layers[layer].mlp.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1)))
        for row in rows:
            base(torch.tensor([row]))
        hook.remove()
        gate = grown_model.moe_blocks()[layer].gate
        score = (torch.cat(inputs) @ gate.weight.t()).sigmoid() + gate.bias
        found.append(score.unflatten(1, (-1, EXPERTS)).topk(2).values.sum(-1).mean(0))
    return torch.stack(found)


def test_general_text_favours_no_group(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    dense = load_model(base)
    (base / "calibration.json").write_text(json.dumps({"format": 1, "tokens": GENERAL}))
    for seed, name in enumerate(("law", "code", "math")):
        done = install(make_package(tmp_path, base, name, seed), base)
        assert done.group.calibrated == sum(map(len, GENERAL))
    torch.testing.assert_close(group_scores(base, dense, GENERAL), torch.full((2, 3), 2.0), rtol=0, atol=1e-5)
    assert all((block.gate.bias >= 0).all() for block in load_model(base).moe_blocks().values())


def test_without_general_text_the_bias_is_the_packages_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    package = make_package(tmp_path, base, "law")
    assert install(package, base).group.calibrated == 0
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert torch.equal(load_file(base / "gates.safetensors")[name], load_file(package)[name])


@pytest.mark.parametrize(("ids", "message"), [
    ([[1, 300]], "must be lists of token ids from 0 to 299"), ([[]], "must be lists of token"), ([], "holds no text"),
    ([["a"]], "must be lists of token ids"), ([[True]], "must be lists of token ids"),
])
def test_general_text_that_is_none_is_refused(ids: Any, message: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    package, before = make_package(tmp_path, base, "law"), hashes(base)
    with pytest.raises(DataError, match=message):
        install(package, base, calibration=ids)
    assert hashes(base) == before
    (base / "calibration.json").write_text(json.dumps({"format": 1, "tokens": ids}))
    with pytest.raises(DataError, match=f"{base / 'calibration.json'}: tokens: .*{message}"):
        install(package, base)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", seed=1)

    def made(base: Path, name: str, **changes: Any) -> Path:
        folder = tmp_path / f"{name}-{base.name}-{changes}"
        folder.mkdir()
        return make_package(folder, base, name, **changes)

    install(law := made(base, "law"), base)
    before = hashes(base)
    for package, message in (
            (made(other, "law"), "law.safetensors: law: made for another base"),
            (law, "a package 'law' is installed already"),
            (made(base, "code", tokenizer="0" * 64), "code: made for another tokenizer"),
            (made(base, "code", tokenizer=None), "code: made for another tokenizer"),
            (made(base, "code", width=32),
             "code: has 4 experts of width 32 in layers 1 to 2: must have 4 experts of width 16"),
            (made(base, "code", experts=8), "code: has 8 experts of width 16 .* must have 4"),
            (made(base, "code", layers=(2,)), "code: has 4 experts of width 16 in layers 2 to 2"),
            (made(base, "code", layers=(0, 1)), "code: is for 2 layers of width 64, the model has"),
            (made(base, "code", hidden=32), "code: is for 3 layers of width 32"),
            (made(base, "code", width=24), "experts of width 24: must divide the FFN's .64.")):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            install(package, base)
    with pytest.raises(CheckpointError, match=r"wide: has 4 experts of width 32 .* must have 4 experts of width 16"):
        calibrate(other, [read_package(file) for file in (law, made(base, "wide", width=32))], [[1, 2]])
    with pytest.raises(ConfigError, match="no package 'lav' is installed; there are law; did you mean law"):
        remove(base, "lav")
    assert hashes(base) == before
    with pytest.raises(ConfigError, match=f"{other}: no packages are installed"):
        remove(other, "law")
    assert installed(other) is None


def test_models_that_take_no_packages(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    package = make_package(tmp_path, base, "law")
    moe = make_base(tmp_path / "moe", first_k_dense_replace=1)
    with pytest.raises(CheckpointError, match="has routed experts that came from no package"):
        install(package, moe)
    quantize(base, tmp_path / "first", "nf4", progress=False)
    install(package, tmp_path / "first")
    install(package, base)
    quantize(base, tmp_path / "then", "nf4", progress=False)  # another layout: no grown model any more
    assert not (tmp_path / "then" / GROWN).exists()
    assert torch.equal(logits(tmp_path / "first"), logits(tmp_path / "then"))
    with pytest.raises(CheckpointError, match="a conversion of a grown model is none"):
        install(package, tmp_path / "then")


def test_unsigned_packages_are_installed_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    base = make_base(tmp_path / "base")
    secret, public = make_keys(tmp_path)
    with pytest.warns(UserWarning, match="law.safetensors: law: unsigned"):
        install(make_package(tmp_path, base, "law"), base)
    with pytest.warns(UserWarning, match=r"code: unsigned: its key [0-9a-f]{64} is not one that you trust"):
        install(signed := make_package(tmp_path, base, "code", key=secret), base)
    remove(base, "code")
    with pytest.raises(CheckpointError, match="the signature of a trusted key is required"):
        install(signed, base, require_signature=True)
    assert install(signed, base, trust=[public], require_signature=True).group.signer == "signed by me"


# ---- formats --------------------------------------------------------------------------------------------------------


def test_a_package_made_on_the_plain_base_goes_into_its_four_and_eight_bits(tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain")
    package = make_package(tmp_path, plain, "law")
    for bits, form in ((4, "nf4"), (8, "int8")):
        quantize(plain, tmp_path / form, form, progress=False)  # type: ignore[arg-type]
        install(package, tmp_path / form)
        name = "model.layers.1.mlp.experts.2"
        stored = load_file(tmp_path / form / "experts-01.safetensors")[f"{name}.packed"]
        gate, _, down = (part.dequantize() for part in unpack_mlp(stored, 64, WIDTH, bits))
        for part, own in ((gate, "gate_proj"), (down, "down_proj")):
            want = load_file(package)[f"{name}.{own}.weight"]
            assert (part - want).norm() < (0.12 if bits == 4 else 0.01) * want.norm()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_packed_packages_go_into_every_format(precision: str, tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain")
    package = make_package(tmp_path, plain, "law", precision=precision)
    opened = read_package(package)
    wanted = opened.expert(2, 3)
    for form in ("nf4", "int8"):
        quantize(plain, tmp_path / form, form, progress=False)
    for form in ("plain", "nf4", "int8"):
        install(package, tmp_path / form)
        tensors = load_file(tmp_path / form / "experts-01.safetensors")
        if form == "plain":
            assert torch.equal(tensors["model.layers.2.mlp.experts.3.down_proj.weight"], wanted[2])
        elif form == precision:
            own = load_file(package)
            assert all(torch.equal(tensors[name], own[name]) for name in own if name.endswith("packed"))
        logits(tmp_path / form)


def test_exported_packages_are_what_is_installed(tmp_path: Path) -> None:
    secret, public = make_keys(tmp_path)
    for form in ("float32", "nf4"):
        (tmp_path / form).mkdir()
        base = base_of(tmp_path / form / "base", form)
        first = shutil.copytree(base, tmp_path / form / "first")
        for seed, name in enumerate(("law", "code")):
            install(make_package(tmp_path / form, base, name, seed), base, calibration=GENERAL)
        package = export(base, "code", tmp_path / form / "out.safetensors", license="CC0-1.0", key=secret)
        assert package.info.precision == form and package.info.license == "CC0-1.0"
        assert package.info.evidence == {"perplexity": 1.5} and package.info.base == about(base, "x").base
        assert read_package(package.path, trust=[public], require_signature=True).signer == "signed by me"
        if form == "float32":  # nothing was rounded
            own, back = load_file(tmp_path / form / "code.safetensors"), load_file(package.path)
            assert own.keys() == back.keys() and all(torch.equal(own[name], back[name]) for name in own)
        install(package.path, first, calibration=GENERAL)
        remove(base, "law")
        assert torch.equal(logits(first), logits(base))


def test_weights_that_a_quantized_base_keeps_stay_plain(tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain")
    package = make_package(tmp_path, plain, "law")
    base = tmp_path / "kept"
    quantize(plain, base, "nf4", keep=["model.layers.1.mlp.*"], progress=False)
    before, files = logits(base), hashes(base)
    install(make_package(tmp_path, plain, "none", zero_down=True), base)
    assert torch.equal(logits(base), before)
    install(package, base)
    names = load_file(base / "experts-02.safetensors").keys()
    assert "model.layers.1.mlp.experts.4.gate_proj.weight" in names and "model.layers.2.mlp.experts.4.packed" in names
    with pytest.raises(ConfigError, match="law: the experts of layer 1 are plain and others packed"):
        export(base, "law", tmp_path / "x.safetensors")
    remove(base, "law")
    remove(base, "none")
    assert hashes(base) == files
    odd = tmp_path / "odd"
    quantize(plain, odd, "nf4", keep=["lm_head.*"], progress=False)
    keys = json.loads((odd / "config.json").read_text())
    keys["quantization_config"]["keep"].append("*.shared_experts.*")
    (odd / "config.json").write_text(json.dumps(keys))
    (odd / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="keeps the shared experts of layer 1, whose FFN is packed"):
        install(package, odd)


# ---- what lies beside a model ---------------------------------------------------------------------------------------


def test_adapters_of_another_set_of_groups_are_refused_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")

    def delta(name: str, part: str) -> Path:
        model = load_model(base)
        tensors = {key: t * 1.1 for key, t in base_tensors(model).items() if part in key}
        assert tensors
        own = fingerprint(tensor_hashes(model), model.config)
        return save_delta(tmp_path / name, tensors, own, {"base_name": "base", "mode": "experts", "experts": {}})

    of_base = delta("of_base", "layers.0.mlp.gate_proj")
    load_model(base, adapter=of_base)
    install(make_package(tmp_path, base, "law"), base)
    of_law = delta("of_law", "layers.1.mlp.experts.3.")
    load_model(base, adapter=of_law)
    with pytest.raises(CheckpointError, match=r"of_base.*: made for another base"):
        load_model(base, adapter=of_base)
    install(make_package(tmp_path, base, "code", 1), base)
    with pytest.raises(CheckpointError, match=r"of_law.*: made for another base"):
        load_model(base, adapter=of_law)
    remove(base, "code")
    load_model(base, adapter=of_law)
    merge(base, of_law, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged" / GROWN).exists()


def test_recorded_use_and_the_atlas_go_along(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for seed, name in enumerate(("law", "code")):
        install(make_package(tmp_path, base, name, seed), base)
    usage = ExpertUsage(load_model(base).config)
    usage.tokens = 6
    usage.counts_LE += torch.arange(8)
    usage.weights_LE += torch.arange(8) / 8
    usage.part("me").counts_LE += 1
    (base / EXPERT_USE).write_text(usage.to_json())
    atlas = Atlas.load(base)
    assert atlas.group("law").evidence == {"perplexity": 1.5} and atlas.group("code").kind == "built-in"
    measured = [NamedGroup("late", "measured", ExpertSet([ExpertId(2, 7), ExpertId(1, 5)]), (0.5, 0.25)),
                NamedGroup("mixed", "measured", ExpertSet([ExpertId(2, 7), ExpertId(2, 0)]))]
    Atlas(atlas.shape, [*atlas.groups, *measured]).save(base)
    before = hashes(base)
    install(make_package(tmp_path, base, "math", 2), base)
    wider = ExpertUsage.from_json((base / EXPERT_USE).read_text())
    assert wider.counts_LE.tolist() == [[*range(8), 0, 0, 0, 0]] * 2
    assert Atlas.load(base).names == ("law", "code", "late", "mixed", "math")
    assert list(Atlas.load(base)["late"]) == [ExpertId(2, 7), ExpertId(1, 5)]
    remove(base, "math")
    assert hashes(base) == before
    remove(base, "law")
    use, atlas = ExpertUsage.from_json((base / EXPERT_USE).read_text()), Atlas.load(base)
    assert use.counts_LE.tolist() == [[4, 5, 6, 7]] * 2 and use.adapters["me"].counts_LE.tolist() == [[1] * 4] * 2
    assert list(atlas["late"]) == [ExpertId(2, 3), ExpertId(1, 1)] and atlas.group("late").scores == (0.5, 0.25)
    assert [(r.name, r.reason) for r in atlas.refused] == [
        ("mixed", "some of its experts were those of law, which was removed")]
    remove(base, "code")
    assert not (base / EXPERT_USE).exists() and not (base / "atlas.json").exists()


def test_a_name_that_the_atlas_gives_to_others_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    install(make_package(tmp_path, base, "law"), base)
    atlas = Atlas.load(base)
    Atlas(atlas.shape, [*atlas.groups, NamedGroup("code", "measured", ExpertSet([ExpertId(1, 0)]))]).save(base)
    with pytest.raises(ConfigError, match="names other experts 'code'"):
        install(make_package(tmp_path, base, "code"), base)


# ---- whole or not at all --------------------------------------------------------------------------------------------


# every step of the writing fails once; from outside they cannot be told apart
@pytest.mark.parametrize("what", ["write_file", "write_json", "_atlas", "_write_manifest", "_write_use"])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    law, code = (make_package(tmp_path, base, name) for name in ("law", "code"))
    install(law, base)
    before = hashes(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(grown, what, fail)
        for action in (lambda: install(code, base), lambda: install(code, base, out=tmp_path / "out")):
            with pytest.raises(OSError, match="No space left"):
                action()
    assert hashes(tmp_path) == before
    install(code, base)
    verify_model(base)


def install_or_die(package: Path, base: Path, left: int) -> int:
    """The exit status of a process that installs the package: 77 where it died after so many writes."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(77)
            return function(*args, **options)
        return call

    status = 1
    try:
        for place, name in ((grown, "_clone"), (grown, "write_file"), (grown, "write_json"), (files, "exchange")):
            setattr(place, name, mortal(getattr(place, name)))
        install(package, base)
        status = 0
    finally:
        os._exit(status)


def test_a_killed_installation_is_made_again(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    package, whole = make_package(tmp_path, base, "law"), shutil.copytree(base, tmp_path / "whole")
    install(package, whole)
    before, after = hashes(base), hashes(whole)
    for left in (0, 2, 4, 6, 8, 99):
        assert install_or_die(package, base, left) == (0 if left == 99 else 77)
        assert hashes(base) == (after if left == 99 else before)
        logits(base)


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    package = make_package(tmp_path, base, "law")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{base / 'notes.txt'}: leads out of the checkpoint"):
        install(package, base, out=tmp_path / "out")
    install(package, base)  # in place the link stays a link
    assert (base / "notes.txt").is_symlink()
    (base / "notes.txt").unlink()
    (base / MANIFEST).unlink()
    (base / "base" / "atlas.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"base/atlas\.json: leads out of the checkpoint"):
        remove(base, "law")


def test_damage_is_said(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    install(make_package(tmp_path, base, "law"), base)
    header = base / "base" / "model.safetensors.header"
    header.write_bytes(header.read_bytes().replace(b"mlp.up_proj", b"mlp.uq_proj", 1))
    with pytest.raises(CheckpointError, match=f"{header}: altered"):
        verify_model(base)
    (base / MANIFEST).unlink()
    for action in (lambda: verify_model(base), lambda: remove(base, "law")):
        with pytest.raises(CheckpointError, match=r"base\.safetensors: altered: it would not be the base's"):
            action()
    for text, message in (("{}", "KeyError"), ('{"format": 9}', "this program reads 1"),
                          ('{"format": 1, "groups": [{}], "base": 1}', "KeyError"), ("[]", "must be a JSON object")):
        (base / GROWN).write_text(text)
        with pytest.raises(CheckpointError, match=f"{base / GROWN}: not a list of packages: .*{message}"):
            installed(base)


@pytest.mark.parametrize("form", FORMS)
def test_an_altered_byte_of_a_group_is_found(form: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", form)
    install(make_package(tmp_path, base, "law"), base)
    verify_model(base)
    file = base / "experts-01.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file}: altered: its SHA-256 is not the manifest's"):
        verify_model(base)
