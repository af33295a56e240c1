"""Expert packages: what is written is read back, and anything else is refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepseek.checkpoint import read_package, write_package
from deepseek.errors import CheckpointError, ConfigError, NotFoundError
from tests.helpers.expert_packages import about, forge, make_base, make_keys, make_package, random_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def _no_keys_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "nf4", "int8"])
def test_a_package_comes_back_and_needs_no_code_of_ours(base: Path, tmp_path: Path, precision: str) -> None:
    info = about(base, "法律_law-1", precision=precision, evidence={"routing accuracy": 0.93}, measured={"score": "x"},
                 card={"summary": "混合 \x1b", "figures": {"loss": [1.5, None]}})
    tensors = random_tensors(info)
    path = tmp_path / "law.safetensors"
    written = write_package(path, info, tensors)
    read = read_package(path)
    assert read.info == written.info and read.sha256 == written.sha256 and read.signature is None
    assert read.info.name == info.name and read.info.card == info.card and read.info.evidence == info.evidence
    plain = load_file(path)  # safetensors alone
    assert plain.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(plain[name], tensor), name
    write_package(tmp_path / "again.safetensors", info, dict(reversed(tensors.items())))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_every_byte_of_a_package_counts(base: Path, tmp_path: Path) -> None:
    path = make_package(tmp_path, base, "law", key=make_keys(tmp_path)[0])
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    places = [*range(8), *range(8, end, 7), *range(end - 9, end), *rng.sample(range(end, len(data)), 200)]
    for place in places:
        for bit in (0x01, 0x20) if place < end else (1 << rng.randrange(8),):
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            with pytest.raises(CheckpointError, match=str(path)):
                read_package(path)
    for changed in (data[:-1], data + b"\0", data[:7], b"", data[8:]):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=str(path)):
            read_package(path)


def test_a_flipped_byte_is_named(base: Path, tmp_path: Path) -> None:
    path = make_package(tmp_path, base, "law")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"altered: the SHA-256 of model\.layers\..* is not the one of its text"):
        read_package(path)


# ---- signatures -----------------------------------------------------------------------------------------------------


def test_signatures(base: Path, tmp_path: Path) -> None:
    secret, public = make_keys(tmp_path)
    _, other = make_keys(tmp_path, "other")
    signed = make_package(tmp_path, base, "law", key=secret)
    (tmp_path / "plain").mkdir()
    plain = make_package(tmp_path / "plain", base, "law")
    assert read_package(plain).signer == "unsigned"
    assert read_package(signed, trust=[public], require_signature=True).signer == "signed by me"
    key = read_package(signed).signature.key
    assert read_package(signed).signer == f"unsigned: its key {key} is not one that you trust"
    for path, trust in ((plain, [public]), (signed, []), (signed, [other])):
        with pytest.raises(CheckpointError, match="the signature of a trusted key is required"):
            read_package(path, trust=trust, require_signature=True)
    folder = tmp_path / "config" / "deepseek" / "keys"
    folder.mkdir(parents=True)
    (folder / "the_house.pem").write_bytes(public.read_bytes())
    assert read_package(signed, require_signature=True).signer == "signed by the_house"


def test_a_wrong_signature_is_refused_whatever_key_is_trusted(base: Path, tmp_path: Path) -> None:
    secret, public = make_keys(tmp_path)
    path = make_package(tmp_path, base, "law", key=secret)
    forge(path, lambda keys, header: keys.update(license="Apache-2.0"))
    for trust in ([], [public]):
        with pytest.raises(CheckpointError, match=f"{path}: wrong signature"):
            read_package(path, trust=trust)
    strange = {"key": "zz", "signature": "00"}
    forge(path, lambda keys, header: header["__metadata__"].update(strange))
    with pytest.raises(CheckpointError, match="wrong signature"):
        read_package(path)


def test_key_files_that_are_none_are_named(base: Path, tmp_path: Path) -> None:
    secret, public = make_keys(tmp_path)
    (tmp_path / "odd").write_text("no key")
    for file in (secret, tmp_path / "odd"):
        with pytest.raises(ConfigError, match=f"{file}: must be a PEM file of an Ed25519 public key"):
            read_package(make_package(tmp_path, base, "law"), trust=[file])
    for file in (public, tmp_path / "odd"):
        with pytest.raises(ConfigError, match=f"{file}: must be a PEM file of an Ed25519 private key"):
            make_package(tmp_path, base, "law", key=file)
    with pytest.raises(NotFoundError, match="nowhere: no such file"):
        make_package(tmp_path, base, "law", key=tmp_path / "nowhere")


# ---- from strangers, whose hashes are right ------------------------------------------------------------------------

FIRST = "model.layers.1.mlp.experts.0.down_proj.weight"
Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def _twice_as_long(keys: dict[str, Any], header: dict[str, Any]) -> None:
    for name in (FIRST, FIRST.replace("0.down", "1.down")):
        header[name]["shape"][0] *= 2


HOSTILE: dict[str, tuple[Edit, str]] = {
    "a path": (lambda k, h: k.update(name="../../etc/passwd"), "name = '../../etc/passwd': must be 1 to 64 letters"),
    "an absolute path": (lambda k, h: k.update(name="/etc/passwd"), "name = '/etc/passwd': must be"),
    "dots": (lambda k, h: k.update(name=".."), r"name = '\.\.': must be"),
    "no name": (lambda k, h: k.update(name=None), "name = None: must be"),
    "a name for terminals": (lambda k, h: k.update(name="\x1b[2J"), "name = '.x1b"),
    "another format": (lambda k, h: k.update(format=2), "format = 2: this program reads 1"),
    "a format that is true": (lambda k, h: k.update(format=True), "format = True: this program"),
    "a key too many": (lambda k, h: k.update(pickle="x"), "'pickle': is no key of a package"),
    "a key too few": (lambda k, h: k.pop("license"), "'license': is missing"),
    "an empty licence": (lambda k, h: k.update(license=""), "license = '': must be a text"),
    "a base that is none": (lambda k, h: k.update(base="x"), "base = 'x': must be a SHA-256"),
    "numbers as text": (lambda k, h: k.update(evidence={"x": "1"}), "evidence = .*: must be an object of finite"),
    "a number beyond floats": (lambda k, h: k.update(evidence={"x": 10**400}), "evidence = .*: must be"),
    "layers with a hole": (lambda k, h: k.update(layers=[0, 2]), r"layers = \(0, 2\): must be the numbers of layers"),
    "no layers": (lambda k, h: k.update(layers=[]), r"layers = \(\): must be"),
    "layers without end": (lambda k, h: k.update(layers=list(range(5000))), "layers = .*: must be"),
    "experts without end": (lambda k, h: k.update(experts=1 << 16), "28 tensors: must be 393,?220"),
    "a huge number": (lambda k, h: k.update(experts=1 << 63), "experts = 9223372036854775808: must be"),
    "a wide expert": (lambda k, h: k.update(width=1 << 20), r"must be F32 \[64, 1048576\]"),
    "another precision": (lambda k, h: k.update(precision="nf4"), "28 tensors: must be 12"),
    "an unknown precision": (lambda k, h: k.update(precision=["nf4"]), r"precision = \['nf4'\]: must be one of"),
    "a hash that is none": (lambda k, h: k["tensors"].update({FIRST: "0"}), "tensors = .*: must be an object of SHA"),
    "another tensor's hash": (lambda k, h: k["tensors"].update({FIRST: "0" * 64}), f"the SHA-256 of {FIRST} is not"),
    "a tensor of elsewhere": (
        lambda k, h: (k["tensors"].update({"model.embed_tokens.weight": k["tensors"].pop(FIRST)}),
                      h.update({"model.embed_tokens.weight": h.pop(FIRST)})),
        "'model.embed_tokens.weight': is no tensor of such a package|is missing"),
    "a shape that is not its bytes": (_twice_as_long, f"{FIRST} is 'F32' "),
    "a huge shape": (lambda k, h: h[FIRST].update(shape=[1 << 40, 1 << 40]), f"{FIRST} is 'F32' "),
    "offsets beyond the file": (lambda k, h: h[FIRST].update(data_offsets=[0, 1 << 62]), f"{FIRST}: .*must lie at"),
    "offsets that overlap": (lambda k, h: h[FIRST].update(data_offsets=[4096, 8192]), f"{FIRST}: .*must lie at"),
    "an entry that is none": (lambda k, h: h.update({FIRST: 5}), "not in their order|not an object"),
    "a last entry that is none": (lambda k, h: h.update({max(h): 5}), "is 5: must be F32"),
    "a last entry without a dtype": (lambda k, h: h[max(h)].pop("dtype"), "is None .*: must be F32"),
    "another dtype": (lambda k, h: h[FIRST].update(dtype="F8_E4M3"), "not in their order"),
    "a nested card": (lambda k, h: k.update(card=json.loads("{\"a\":" * 70 + "1" + "}" * 70)), "at most 64 deep"),
    "metadata of another kind": (lambda k, h: h["__metadata__"].update(x="y"), "not an expert package: its metadata"),
    "half a signature": (lambda k, h: h["__metadata__"].update(key="00"), "not an expert package: its metadata"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_stranger_writes_is_refused_by_name(base: Path, tmp_path: Path, what: str) -> None:
    edit, message = HOSTILE[what]
    path = make_package(tmp_path, base, "law")
    forge(path, edit)
    with pytest.raises(CheckpointError, match=f"(?s){path}: .*({message})"):
        read_package(path)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_numbers_that_are_not_finite_are_refused(base: Path, tmp_path: Path, precision: str) -> None:
    info = about(base, "law", precision=precision)
    tensors = random_tensors(info)
    gates = "model.layers.2.mlp.gate.weight"
    with pytest.raises(CheckpointError, match=f"{gates} holds values that are not finite"):
        write_package(tmp_path / "x.safetensors", info, tensors | {gates: torch.full((4, 64), float("nan"))})
    if precision == "nf4":  # inside what is packed
        name = "model.layers.1.mlp.experts.3.packed"
        tensors[name][:4] = torch.tensor([float("nan")]).view(torch.uint8)
        with pytest.raises(CheckpointError, match=f"{name} holds values that are not finite"):
            write_package(tmp_path / "x.safetensors", info, tensors)


def test_files_that_are_no_packages(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere: no such file"):
        read_package(tmp_path / "nowhere")
    (tmp_path / "text").write_text("law")
    for path in (base, base / "model.safetensors", base / "config.json", tmp_path / "text"):
        with pytest.raises(CheckpointError, match=f"{path}: .*not an expert package|{path}: .*not valid JSON"):
            read_package(path)
    with pytest.raises(ConfigError, match="must be a file, this is a folder"):
        write_package(tmp_path, info := about(base, "law"), random_tensors(info))


def test_a_writer_is_held_to_the_same_rules(base: Path, tmp_path: Path) -> None:
    info = about(base, "law")
    tensors = random_tensors(info)
    path = tmp_path / "law.safetensors"
    with pytest.raises(CheckpointError, match=r"name = '\.\./x': must be"):
        about(base, "../x")
    for changed, message in (
            ({FIRST: tensors[FIRST].t().contiguous()}, f"{FIRST} is 'F32' .16, 64.: must be F32 .64, 16."),
            ({FIRST: tensors[FIRST].bfloat16()}, "must be F32"), ({"x": tensors[FIRST]}, "29 tensors: must be 28")):
        with pytest.raises(CheckpointError, match=message):
            write_package(path, info, tensors | changed)
    assert not path.exists()
