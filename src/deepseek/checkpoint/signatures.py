"""Ed25519 signatures (RFC 8032): who signs, whom the user trusts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from ..files import reading

_BYTES = 1 << 16  # of a key file at most


def key_folder() -> Path:
    """Where the user's trusted keys lie: *.pem files, one public key each."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "deepseek" / "keys"


def trusted_keys(files: Iterable[str | Path] = ()) -> dict[str, Path]:
    """Public key, in hexadecimal -> its file: of `files` and of the user's key folder. Raises NotFoundError or
    ConfigError naming a file that is no PEM file of an Ed25519 public key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found = {}
    for file in [*map(Path, files), *sorted(key_folder().glob("*.pem"))]:
        try:
            key = load_pem_public_key(_read(file))
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{file}: must be a PEM file of an Ed25519 public key (`openssl pkey -in KEY -pubout`)")
        found[key.public_bytes_raw().hex()] = file
    return found


def sign(text: str, key_file: str | Path) -> tuple[str, str]:
    """(public key, signature) in hexadecimal. Raises NotFoundError or ConfigError naming a file that is no PEM file of
    an unencrypted Ed25519 private key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(Path(key_file)), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{key_file}: must be a PEM file of an Ed25519 private key without a password "
                          "(`openssl genpkey -algorithm ed25519`)")
    return key.public_key().public_bytes_raw().hex(), key.sign(text.encode()).hex()


def check_signature(text: str, key: str, signature: str, what: object) -> None:
    """Raises CheckpointError, naming `what`, unless `signature` is that of `text` by `key`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        raw = [bytes.fromhex(value) for value in (key, signature)]
        if [value.hex() for value in raw] != [key, signature]:
            raise ValueError("must be lower case")
        Ed25519PublicKey.from_public_bytes(raw[0]).verify(raw[1], text.encode())
    except (InvalidSignature, ValueError):
        raise CheckpointError(f"{what}: wrong signature: it is not the one of the key {key:.16}…") from None


def _read(file: Path) -> bytes:
    with reading(file, ConfigError), file.expanduser().open("rb") as stream:
        return stream.read(_BYTES)
