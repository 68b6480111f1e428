"""Ed25519 signatures (RFC 8032) of SHA256SUMS, compatible with `openssl pkeyutl -rawin`.

openssl genpkey -algorithm ed25519 -out key.pem        # private key of the exporter
openssl pkey -in key.pem -pubout -out public.pem       # public key; send it separately from the package
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medim.types import UserError


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Load the private key of the signer.

    Raises:
        UserError: `path` is not an Ed25519 private key in PEM without a password.
    """
    key = _load_pem(path, lambda data: serialization.load_pem_private_key(data, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise _build_key_error(path, "private")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Load the public key of a trusted signer.

    Raises:
        UserError: `path` is not an Ed25519 public key in PEM.
    """
    key = _load_pem(path, serialization.load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise _build_key_error(path, "public")
    return key


def key_to_hex(key: Ed25519PublicKey) -> str:
    """Convert a public key to 64 hexadecimal digits."""
    return key.public_bytes_raw().hex()


def key_from_hex(digits: str) -> Ed25519PublicKey:
    """Convert 64 hexadecimal digits to a public key."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(digits))


def is_signed(data: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether a signature of the data is valid for a public key."""
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _load_pem(path: Path, parse_key: Callable[[bytes], object]) -> object:
    """Read a PEM file; return None if it contains no readable key.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return parse_key(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror}). Specify a key file.") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: the key has a password
        return None


def _build_key_error(path: Path, kind: str) -> UserError:
    return UserError(
        f"{path}: expected an Ed25519 {kind} key in PEM without a password, got something else. "
        "Create a private key with `openssl genpkey -algorithm ed25519 -out key.pem` "
        "and its public key with `openssl pkey -in key.pem -pubout -out public.pem`."
    )
