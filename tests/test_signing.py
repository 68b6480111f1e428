from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from typer.testing import CliRunner

from medim.cli import app
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.integrity import write_sums
from medim.package.package import Package, PackageError, load_package, verify_package
from medim.signing import load_private_key, load_public_key
from medim.types import UserError


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key as PEM files."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "ours")


@pytest.fixture
def signed(keys: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path, same_graph: None, short_gates: None) -> Path:
    return export(runs["classifier"], tmp_path / "package", ExportOptions(private_key=keys[0])).folder


def test_a_signed_package_verifies_by_the_key_of_who_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    first = verify_package(signed, public_key=keys[1])[0]
    assert (first.name, first.verdict) == ("signature", "pass")
    assert load_package(signed).contract.signed_by == load_public_key(keys[1]).public_bytes_raw().hex()
    untold = verify_package(signed)[0]
    assert (untold.verdict, "--public-key" in untold.detail) == ("not run", True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_makes_the_keys_and_checks_the_signature(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    def openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)

    files = ["-sigfile", signed / "SHA256SUMS.sig", "-in", signed / "SHA256SUMS"]
    openssl("pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", keys[1], *files)
    openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "made.pem")
    openssl("pkey", "-in", tmp_path / "made.pem", "-pubout", "-out", tmp_path / "made.pub")
    assert load_private_key(tmp_path / "made.pem").public_key() == load_public_key(tmp_path / "made.pub")


def test_an_unsigned_package_verifies_with_a_note_and_not_for_a_site_that_trusts_a_key(
    packages: dict[str, Package], keys: tuple[Path, Path]
) -> None:
    folder = packages["classifier"].folder
    assert verify_package(folder)[0].detail == "the package is not signed"
    with pytest.raises(PackageError, match="no signature"):
        load_package(folder, public_key=keys[1])


def test_another_key_is_not_trusted(signed: Path, tmp_path: Path) -> None:
    _, theirs = write_keys(tmp_path, "theirs")
    with pytest.raises(PackageError, match="a signature by another key or of other content"):
        load_package(signed, public_key=theirs)


def test_the_signature_is_checked_before_anything_is_parsed(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "SHA256SUMS").write_bytes(b"\xff no sums at all")
    with pytest.raises(PackageError, match="signature"):
        load_package(signed, public_key=keys[1])
    with pytest.raises(PackageError, match="expected text"):
        load_package(signed)


def test_changed_files_with_recomputed_sums_do_not_pass_the_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "LICENSE").write_text("anything goes")
    write_sums(signed)
    for public_key in (keys[1], None):
        with pytest.raises(PackageError, match="signature"):
            load_package(signed, public_key=public_key)


def _flip(signature: Path) -> None:
    data = bytearray(signature.read_bytes())
    data[len(data) // 2] ^= 1
    signature.write_bytes(data)


@pytest.mark.parametrize("damage", [_flip, Path.unlink])
def test_a_damaged_or_missing_signature_is_found_even_without_a_key(signed: Path, damage: object) -> None:
    assert callable(damage)
    damage(signed / "SHA256SUMS.sig")
    with pytest.raises(PackageError, match="a signature by the key in the contract"):
        load_package(signed)


def test_a_signature_that_the_contract_does_not_name_is_found(
    packages: dict[str, Package], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packages["encoder"].folder, tmp_path / "package"))
    write_sums(folder, key=keys[0])
    with pytest.raises(PackageError, match="another"):
        load_package(folder)


def test_the_private_key_is_in_no_file(signed: Path, keys: tuple[Path, Path]) -> None:
    raw = load_private_key(keys[0]).private_bytes_raw()
    lines = keys[0].read_bytes().splitlines()[1:-1]
    for path in signed.rglob("*"):
        if path.is_file():
            assert not [secret for secret in (raw, raw.hex().encode(), *lines) if secret in path.read_bytes()], path


def test_keys_that_are_none_are_told_apart(keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    for number, content in enumerate((other, locked, b"no key", b"")):
        path = tmp_path / str(number)
        path.write_bytes(content)
        with pytest.raises(UserError, match="expected an Ed25519 private key"):
            load_private_key(path)
    with pytest.raises(UserError, match="expected an Ed25519 public key"):
        load_public_key(keys[0])
    with pytest.raises(UserError, match="could not be read"):
        load_public_key(tmp_path / "nowhere")


@pytest.mark.parametrize("command", ["verify", "predict"])
def test_the_commands_leave_with_3_where_the_trusted_key_did_not_sign(
    packages: dict[str, Package], keys: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    words = [command, str(packages["classifier"].folder), "--public-key", str(keys[1])]
    if command == "predict":
        words += [str(tmp_path), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 3
    assert not (tmp_path / "out").exists()


def test_embed_leaves_with_3_too_and_trusts_no_run(
    packages: dict[str, Package], runs: dict[str, Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    rest = [str(tmp_path), "--out", str(tmp_path / "f.npz"), "--public-key", str(keys[1])]
    assert CliRunner().invoke(app, ["embed", str(packages["encoder"].folder), *rest]).exit_code == 3
    assert CliRunner().invoke(app, ["embed", str(runs["encoder"]), *rest]).exit_code == 2
