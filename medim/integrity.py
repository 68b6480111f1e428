"""Verify a folder against SHA256SUMS and check the signature."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medim.files import file_sha256, write_bytes, write_text
from medim.signing import is_signed, key_from_hex, key_to_hex, load_private_key, load_public_key
from medim.types import UsageError, UserError

MAX_FILE_BYTES = 1 << 31  # limit of Protocol Buffers, and so of a graph
SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
MAX_FILES, MAX_SUMS_BYTES, MAX_TEXT_BYTES = 1000, 1 << 20, 1 << 26  # files per package; size of SHA256SUMS and of JSON
OPTIONAL_FILES = frozenset({"models/model.pt"})  # for MONAI; a registry without pickles leaves it out
_DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory"}
COPY_AGAIN = "Copy the package again from where it was exported."


class PackageError(UserError):
    """The package is modified, incomplete or of another schema version."""

    exit_code = 3


@dataclass(frozen=True)
class ChecksumManifest:
    """SHA256SUMS of a folder, after all files were verified against it.

    Attributes:
        sums: sha256 by path relative to the folder; without `OPTIONAL_FILES` that are absent.
        data: bytes of SHA256SUMS.
        signature: signature of `data`; None if the package is not signed.
        trusted: whether the signature was verified with a public key of the caller.
    """

    sums: dict[str, str]
    data: bytes
    signature: bytes | None
    trusted: bool

    @property
    def sha256(self) -> str:
        """Digest of SHA256SUMS, which identifies the package."""
        return hashlib.sha256(self.data).hexdigest()

    def check_signer(self, signer: str | None, folder: Path) -> None:
        """Check that the signature belongs to the signer in the contract.

        Args:
            signer: public key of the contract as hexadecimal digits; None if the contract specifies none.
            folder: the package.

        Raises:
            PackageError: only one of signer and signature is present, or the signature is of another key.
        """
        if signer is None and self.signature is None:
            return
        if signer is None or self.signature is None or not is_signed(self.data, self.signature, key_from_hex(signer)):
            raise PackageError(
                f"{folder / SIGNATURE}: expected a signature by the key in the contract, got "
                f"{'none' if self.signature is None else 'another'}. {COPY_AGAIN}"
            )


def write_sums(folder: Path, *, key: Path | None = None) -> None:
    """Write SHA256SUMS with the digest of each file of a folder, in the format of `sha256sum -c SHA256SUMS`.

    Args:
        folder: the package.
        key: Ed25519 private key; if given, the signature of SHA256SUMS is written to SHA256SUMS.sig.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in files if name not in (SUMS, SIGNATURE)]
    write_text(folder / SUMS, "".join(lines))
    if key is not None:
        write_bytes(folder / SIGNATURE, load_private_key(key).sign((folder / SUMS).read_bytes()))


def read_with_digest(path: Path, digest: str) -> bytes:
    """Read a file and verify its sha256.

    Raises:
        PackageError: the file cannot be read, is too large, or has another digest.
    """
    data = _read_at_most(path, MAX_TEXT_BYTES if path.suffix == ".json" else MAX_FILE_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise PackageError(f"{path}: the file changed since it was verified. {COPY_AGAIN}")
    return data


def _read_at_most(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)  # read() allocates its argument
    except OSError as error:
        raise PackageError(f"{path}: could not be read ({error.strerror}). {COPY_AGAIN}") from error
    if len(data) > limit:
        raise PackageError(f"{path}: expected at most {limit:,} bytes. {COPY_AGAIN}")
    return data


def verify_checksums(folder: Path, *, public_key: Path | None = None) -> ChecksumManifest:
    """Verify the files of a package against its SHA256SUMS.

    The signature is verified before any file is parsed.

    Args:
        folder: the package.
        public_key: public key; if given, the package must be signed with its private key.

    Raises:
        PackageError: `folder` is not a package; a key was given and the package is unsigned or signed by another key;
            a file is modified, missing or not listed.
        UserError: `public_key` is not a public key.
    """
    key = None if public_key is None else load_public_key(public_key)
    if not (folder / SUMS).is_file():
        raise PackageError(_describe_missing_package(folder))
    files = _list_package_files(folder)
    data = _read_at_most(folder / SUMS, MAX_SUMS_BYTES)
    signature = _read_at_most(folder / SIGNATURE, MAX_SUMS_BYTES) if (folder / SIGNATURE).is_file() else None
    if key is not None and (signature is None or not is_signed(data, signature, key)):
        raise PackageError(
            f"{folder}: expected {SUMS} to be signed by the key of --public-key ({key_to_hex(key)[:16]}), got "
            f"{'no signature' if signature is None else 'a signature by another key or of other content'}. "
            "Request a package that was exported with --private-key and that key."
        )
    sums = _parse_checksums(data, folder / SUMS)
    _compare_checksums(folder, files, sums)
    present = {name: digest for name, digest in sums.items() if name in files}
    return ChecksumManifest(present, data, signature, trusted=key is not None)


def require_signature(path: Path | None, public_key: Path | None) -> None:
    """Verify that a package is signed with the private key of a public key, before any other file of it is read.

    Args:
        path: the package; None if the command has no weights to start from.
        public_key: public key of the trusted signer; None for no requirement.

    Raises:
        UsageError: there is no package, so nothing can be signed.
        PackageError: see `verify_checksums`.
    """
    if public_key is None:
        return
    if path is not None and not path.exists():
        raise UserError(f"{path}: there is no such file or folder. Check the path of the package.")
    if path is None or not (path / SUMS).is_file():
        raise UsageError(
            "--public-key: expected a package, got a run or no weights. Export the run with --private-key, or leave "
            "--public-key out."
        )
    verify_checksums(path, public_key=public_key)


def _describe_missing_package(folder: Path) -> str:
    """Describe a folder that is no package; for a run, with the command that makes it one."""
    if (folder / "model" / "model.json").is_file():
        return f"{folder}: expected a package, got a fine-tuning run. Run `medim export {folder} --out PACKAGE`."
    if (folder / "encoder" / "encoder.json").is_file():
        return (
            f"{folder}: expected a package, got a pretraining run. Run `medim export {folder} --out PACKAGE` for a "
            f"package that gives features, or fine-tune it (`medim finetune --encoder {folder}`) and export that run "
            "for one that predicts."
        )
    return f"{folder}: expected a package (a folder with {SUMS} and medim.json), found none. Check the path."


def _compare_checksums(folder: Path, files: set[str], sums: dict[str, str]) -> None:
    """Compare the files of a package with its checksums.

    Raises:
        PackageError: a file is missing (except those of `OPTIONAL_FILES`), not listed or modified, or an essential file
            is not part of the package.
    """
    missing_files, extra_files = sorted(sums.keys() - files - OPTIONAL_FILES), sorted(files - sums.keys())
    if not missing_files and extra_files and all(PurePosixPath(name).name in _DESKTOP_FILES for name in extra_files):
        raise PackageError(
            f"{folder}: the file manager of a desktop wrote {', '.join(extra_files)} into the package. Delete it."
        )
    if missing_files or extra_files:
        raise PackageError(
            f"{folder}: expected exactly the files of {SUMS}; missing: {missing_files}, not listed: {extra_files}. "
            f"{COPY_AGAIN}"
        )
    for name in sums.keys() & files:
        if file_sha256(folder / name) != sums[name]:
            raise PackageError(
                f"{folder / name}: modified or corrupt; its sha256 differs from the one in {SUMS}. {COPY_AGAIN}"
            )
    if "medim.json" not in files:
        raise PackageError(f"{folder}: the package lacks medim.json. {COPY_AGAIN}")


def _list_package_files(folder: Path) -> set[str]:
    """List the relative paths of the files of a package, without SHA256SUMS and its signature.

    Raises:
        PackageError: the folder contains a link or a device, or too many files.
    """
    relative_paths: set[str] = set()
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise PackageError(f"{path}: expected plain files in a package, got a link or device. {COPY_AGAIN}")
            if len(relative_paths) >= MAX_FILES:
                raise PackageError(f"{folder}: expected at most {MAX_FILES} files in a package. {COPY_AGAIN}")
            if stat.S_ISREG(mode):
                relative_paths.add(path.relative_to(folder).as_posix())
    return relative_paths - {SUMS, SIGNATURE}


def _parse_checksums(data: bytes, path: Path) -> dict[str, str]:
    """Parse SHA256SUMS as {path: digest}; paths outside the folder are rejected."""
    sums: dict[str, str] = {}
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise PackageError(f"{path}: expected text. {COPY_AGAIN}") from None
    for number, line in enumerate(lines, start=1):
        digest, separator, name = line.partition("  ")
        parts = PurePosixPath(name).parts
        is_plain_path = bool(name) and not PurePosixPath(name).is_absolute() and ".." not in parts and "\\" not in name
        is_digest = len(digest) == 64 and not set(digest) - set("0123456789abcdef")
        if not (separator and is_digest and is_plain_path) or name in sums:
            raise PackageError(
                f"{path}, line {number}: expected `sha256  path inside the package`, once each. {COPY_AGAIN}"
            )
        sums[name] = digest
    return sums
