"""Download one file over HTTP, resuming interrupted transfers, and verify it before it gets its final name.

Uses urllib rather than a library: pooch, the usual choice, would add requests to the light install, and its
documentation does not mention resumed downloads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medim.data.public.http import RetryableError, apply_mirror, get_validator, open_url
from medim.files import read_json, write_json
from medim.types import UserError

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # consecutive attempts without a new byte
MAX_WAIT_SECONDS = 60
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileDigest:
    """Size and checksums of a file.

    Attributes:
        size: size in bytes.
        md5: hex digest; the checksum that most publishers provide.
        sha256: hex digest.
    """

    size: int
    md5: str
    sha256: str


def download_file(
    url: str,
    path: Path,
    *,
    md5: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> FileDigest:
    """Download a file, or resume its download.

    Partial content is stored in `<path>.part`, and the server's metadata in `<path>.part.json`. A download is resumed
    if the server supports ranges and the file is unchanged (RFC 9110, sections 13 and 14); otherwise it starts over.

    Args:
        url: address at the publisher; replaced by `apply_mirror` if MEDIM_MIRROR is set.
        path: target file, in an existing folder. An existing file is verified and kept.
        md5: checksum from the publisher, or None.
        progress: called with the number of bytes so far and the total number (0 if unknown).
        pause: function that waits some seconds between attempts.

    Raises:
        UserError: the server refuses the request, every attempt fails, the file does not match `md5`, or there is not
            enough free space.
    """
    part = _PartialDownload(apply_mirror(url), path)
    if path.is_file():
        return _verify_digest(path, part.url, md5)
    failures, max_size = 0, part.size
    while not part.is_complete:
        try:
            _request_rest(part, progress)
        except RetryableError as error:
            if error.restart:
                part.discard()
            failures = 1 if part.size > max_size else failures + 1
            max_size = max(max_size, part.size)
            if failures == MAX_ATTEMPTS:
                if not part.size:
                    part.discard()
                raise UserError(
                    f"{part.url}: could not be downloaded: {error} ({MAX_ATTEMPTS} tries without progress). "
                    "Check the connection (HTTPS_PROXY is used if set) and run the same command again: it continues."
                ) from None
            wait = min(error.wait or 2.0 ** (failures - 1), MAX_WAIT_SECONDS)
            log.info("%s: %s; trying again in %.0f s", part.url, error, wait)
            pause(wait)
    file_digest = _verify_digest(part.path, part.url, md5)
    part.path.replace(path)
    part.discard()
    return file_digest


def compute_digest(path: Path) -> FileDigest:
    """Compute size and checksums of a file in one pass."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            size += len(chunk)
    return FileDigest(size=size, md5=md5.hexdigest(), sha256=sha256.hexdigest())


class _PartialDownload:
    """State of an incomplete download."""

    def __init__(self, url: str, path: Path) -> None:
        self.url = url
        self.path = path.with_name(f"{path.name}.part")
        self._state_path = path.with_name(f"{path.name}.part.json")
        self.total: int | None = None
        self.validator: str | None = None
        with contextlib.suppress(UserError):
            state = read_json(self._state_path)
            if state.get("url") == url:
                self.total, self.validator = state.get("total"), state.get("validator")
        self.at_end = False

    @property
    def size(self) -> int:
        """Number of bytes on disk."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have been received."""
        return self.at_end or (self.total is not None and self.size == self.total and self.path.is_file())

    def restart(self, total: int | None, validator: str | None) -> None:
        """Discard previous content, and store the server's metadata of the file."""
        self.path.unlink(missing_ok=True)
        self.total, self.validator = total, validator
        write_json(self._state_path, {"url": self.url, "total": total, "validator": validator})

    def discard(self) -> None:
        """Remove all files of the partial download."""
        self.path.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)


def _request_rest(part: _PartialDownload, progress: Callable[[int, int], None] | None) -> None:
    """Send one request for the missing bytes, and append them."""
    offset = part.size if part.validator else 0
    with open_url(part.url, offset, part.validator) as response:
        if response.status == 206:
            if response.headers.get("Content-Range", "").split("-")[0] != f"bytes {offset}":
                raise RetryableError("the server sent another range than requested; starting over", restart=True)
        else:
            length = response.headers.get("Content-Length", "")
            part.restart(int(length) if length.isdecimal() else None, get_validator(response.headers))
            offset = 0
        free = shutil.disk_usage(part.path.parent).free
        if part.total is not None and part.total - offset > free:
            raise UserError(
                f"{part.path.parent}: expected {(part.total - offset) / 1e6:.0f} MB free, got {free / 1e6:.0f}. "
                "Free some space and run the same command again: it continues."
            )
        _append_response(part, response, progress)
    if part.total is not None and part.size != part.total:
        raise RetryableError(f"the connection ended after {part.size} of {part.total} bytes")
    part.at_end = True


def _append_response(
    part: _PartialDownload, response: http.client.HTTPResponse, progress: Callable[[int, int], None] | None
) -> None:
    """Append the content of a response to the partial file."""
    done = part.size
    try:
        with part.path.open("ab") as file:
            while part.total is None or done < part.total:
                chunk_size = _CHUNK_BYTES if part.total is None else min(_CHUNK_BYTES, part.total - done)
                try:
                    chunk = response.read1(chunk_size)
                except (OSError, http.client.HTTPException) as error:
                    raise RetryableError(f"the connection was cut ({type(error).__name__})") from error
                if not chunk:
                    break
                file.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, part.total or 0)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        note = " The partial download is kept." if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
        raise UserError(f"{part.path}: could not be written ({error.strerror}).{note} Free some space.") from error


def _verify_digest(path: Path, url: str, md5: str | None) -> FileDigest:
    """Compute size and checksums of a file, and remove it if the md5 does not match."""
    file_digest = compute_digest(path)
    if md5 is not None and file_digest.md5 != md5:
        path.unlink()
        path.with_name(f"{path.name}.json").unlink(missing_ok=True)
        raise UserError(
            f"{url}: expected a file with the md5 {md5}, got {file_digest.md5} ({file_digest.size} bytes). "
            "The file was removed. Run the same command again; if the sum differs again, the publisher or a proxy has "
            "changed the file."
        )
    return file_digest
