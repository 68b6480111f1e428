"""Ed25519 signatures (RFC 8032) of SHA256SUMS, as `openssl pkeyutl -rawin` makes and checks them.

openssl genpkey -algorithm ed25519 -out key.pem        # stays with who exports
openssl pkey -in key.pem -pubout -out public.pem       # goes, by another way than the package, to who trusts it
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medim.types import UserError


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """The key of who signs.

    Raises:
        UserError: no Ed25519 private key in PEM, without a password, lies at `path`.
    """
    key = _load_pem(path, lambda data: serialization.load_pem_private_key(data, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise _build_key_error(path, "private")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The key of whom a site trusts.

    Raises:
        UserError: no Ed25519 public key in PEM lies at `path`.
    """
    key = _load_pem(path, serialization.load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise _build_key_error(path, "public")
    return key


def key_to_hex(key: Ed25519PublicKey) -> str:
    """A public key as 64 hexadecimal digits."""
    return key.public_bytes_raw().hex()


def key_from_hex(digits: str) -> Ed25519PublicKey:
    """What `key_to_hex` wrote."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(digits))


def is_signed(data: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether the owner of a key signed some bytes."""
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _load_pem(path: Path, parse_key: Callable[[bytes], object]) -> object:
    """What a PEM file holds; None where it holds no key that can be read."""
    try:
        return parse_key(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror}). Give the file of a key.") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        return None


def _build_key_error(path: Path, kind: str) -> UserError:
    return UserError(
        f"{path}: expected an Ed25519 {kind} key in PEM without a password, got something else. "
        "`openssl genpkey -algorithm ed25519 -out key.pem` makes a private key, "
        "`openssl pkey -in key.pem -pubout -out public.pem` its public one."
    )
