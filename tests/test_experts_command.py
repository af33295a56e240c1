"""`deepseek experts` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek.cli import main
from tests.helpers.expert_packages import hashes, make_base, make_keys, make_package

pytestmark = pytest.mark.filterwarnings("default::UserWarning")


@pytest.fixture(autouse=True)
def _no_keys_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def run(*words: object) -> int:
    return main(["experts", *map(str, words)])


def test_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    before = hashes(base)
    secret, public = make_keys(tmp_path)
    law, code = make_package(tmp_path, base, "law", key=secret), make_package(tmp_path, base, "code", 1)
    assert run("list", base) == 0 and f"{base}: no packages are installed" in capsys.readouterr().out

    (tmp_path / "general.txt").write_text("the quick brown fox 12345\n" * 20)
    assert run("install", base, law, code, "--trust", public, "--calibrate", tmp_path / "general.txt") == 0
    out, err = capsys.readouterr()
    assert "law: group 1, 4 experts of width 16 in 2 layers, float32, MIT, signed by me; bias set on " in out
    assert "code: group 2, " in out and "general text" in out
    assert err.count("deepseek: warning: ") == 1 and "code.safetensors: code: unsigned" in err

    assert run("list", base) == 0
    out = capsys.readouterr().out
    assert "1  law: " in out and "2  code: " in out and "perplexity 1.5; random numbers" in out
    assert run("verify", base, law, code) == 0
    out = capsys.readouterr().out
    assert f"{base}: whole: law, code; the base can be restored" in out and f"{code}: whole: code" in out

    (tmp_path / "card.json").write_text(json.dumps({"summary": "mine", "figures": {"x": 1}}))
    exported = tmp_path / "mine.safetensors"
    assert run("export", base, "code", exported, "--license", "CC0-1.0", "--card", tmp_path / "card.json", "--sign",
               secret) == 0
    assert run("verify", exported, "--trust", public, "--require_signature") == 0
    assert "CC0-1.0, signed by me" in capsys.readouterr().out

    assert main(["infer", "--model", str(base), "--prompt", "the fox", "--max_tokens", "4", "--show_experts"]) == 0
    assert "of the slots" in capsys.readouterr().err
    assert run("remove", base, "law") == 0 and "law: removed; there are code" in capsys.readouterr().out
    assert run("remove", base, "code") == 0 and "the model is its base again" in capsys.readouterr().out
    assert hashes(base) == before
    assert run("install", base, law, code, "--out", tmp_path / "new") == 0
    assert hashes(base) == before and run("verify", tmp_path / "new") == 0


def test_what_is_refused_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    package = make_package(tmp_path, base, "law")
    for words, message in (
            (("install", base, package, "--require_signature"), "unsigned: the signature of a trusted key is required"),
            (("install", base, package, "--overwrite"), "overwrite = True: has a meaning only with out"),
            (("install", base, package, "--trust", tmp_path / "x.pem"), "x.pem: no such file"),
            (("install", base, tmp_path / "nothing"), "nothing: no such file"),
            (("install", "nowhere", package), "nowhere: no such folder here"),
            (("install", base, package, "--tokens", 5, "--seed", 0), "tokens = 5; seed = 0: has a meaning only with"),
            (("install", base, package, "--out", base), "must not be the source"),
            (("verify", package, base, "--require_signature"), f"only with packages, not with the model {base}"),
            (("verify", base), "no packages are installed"),
            (("verify", base / "config.json"), "config.json: not an expert package"),
            (("remove", base, "law"), "no packages are installed"),
            (("export", base, "law", tmp_path / "x"), "no packages are installed")):
        assert run(*words) == 2
        err = capsys.readouterr().err.splitlines()
        assert message in err[-1] and err[-1].startswith("deepseek: ")
    grown = tmp_path / "grown"
    assert run("install", base, package, "--out", grown) == 0
    refused: list[tuple[tuple[object, ...], str]] = [
        (("install", grown, package), "a package 'law' is installed already"),
        (("remove", grown, "lwa"), "no package 'lwa' is installed; there are law; did you mean law?"),
        (("export", grown, "law", tmp_path), "must be a file, this is a folder"),
        (("export", grown, "law", tmp_path / "x", "--license", ""), "license = '': must be a text of 1 to 200"),
        (("export", grown, "law", tmp_path / "x", "--card", package), "law.safetensors: not valid JSON")]
    for given, said in refused:
        capsys.readouterr()
        assert run(*given) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "x").exists()
    before = hashes(base)
    data = bytearray(package.read_bytes())
    data[-1] ^= 1
    package.write_bytes(data)
    assert run("install", base, package) == 2 and f"{package}: altered" in capsys.readouterr().err
    assert hashes(base) == before


def test_packages_of_one_command_are_installed_together_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", seed=1)
    before = hashes(base)
    law, code = make_package(tmp_path, base, "law"), make_package(tmp_path, other, "code")
    for packages, why in (((law, code), "code"), ((law, law), "a package 'law' is installed already")):
        assert run("install", base, *packages) == 2 and why in capsys.readouterr().err
        assert hashes(base) == before
