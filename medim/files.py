"""Atomic file writing: a file is complete or absent (write to a temporary file, flush to disk, rename)."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medim.parsing import MAX_JSON_BYTES, encode_csv, parse_json, read_limited
from medim.types import UserError

TEMPORARY_SUFFIX = ".medim-part"


def cache_folder() -> Path:
    """Return the folder of reproducible files: $MEDIM_CACHE, else $XDG_CACHE_HOME/medim, else ~/.cache/medim."""
    custom_folder = os.environ.get("MEDIM_CACHE")
    return (
        Path(custom_folder)
        if custom_folder
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medim"
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: after a crash, the path contains the old or the new content, never a part of it.

    Where the file system permits, the temporary file has no name until it is complete, so a kill leaves no part of it.

    Raises:
        UserError: the folder cannot be written (missing permission, full disk).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open_unnamed_file(path.parent)
        if handle is None:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=TEMPORARY_SUFFIX)
            temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            if temporary is None:
                temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
                # The descriptor of a folder, which an absolute source does not need, makes Python follow the link.
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error.strerror}). Free some space or choose another --out."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _open_unnamed_file(folder: Path) -> int | None:
    """Open a new file without a name; None if the system or the file system, such as NFS, has no such files."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError:
        return None


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder to which no other process writes."""
    for path in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, see `write_bytes`."""
    write_bytes(path, text.encode())


def encode_json(content: Mapping[str, Any]) -> bytes:
    """Encode canonical JSON: indented, in the given key order, without NaN (use None)."""
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, see `encode_json` and `write_bytes`."""
    write_bytes(path, encode_json(content))


def read_json(path: Path, *, place: str | None = None) -> dict[str, Any]:
    """Read a JSON object; messages name `place`, or the path.

    Raises:
        UserError: the file is missing, not JSON, or not an object.
    """
    try:
        return decode_json(read_limited(path, MAX_JSON_BYTES, place=place), place or path)
    except FileNotFoundError:
        raise UserError(f"{place or path}: expected a JSON file here, found none.") from None


def decode_json(data: bytes, place: Path | str) -> dict[str, object]:
    """Decode the bytes of a JSON object.

    Args:
        data: content of the file.
        place: the file, for the message.

    Raises:
        UserError: the bytes are not JSON (see `parse_json`), or not an object.
    """
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(f"{place}: expected JSON, got something else ({error}). Copy the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{place}: expected a JSON object, got a {type(content).__name__}. Copy the file again.")
    return content


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file with a header line, see `medim.parsing.encode_csv`."""
    write_bytes(path, encode_csv(columns, rows))


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 hex digest of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """Compute the SHA-256 hex digest of a JSON-serialisable object, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
