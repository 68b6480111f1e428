"""One file over HTTP: continued where a connection was cut, checked before it gets its name.

urllib and not a library: pooch, the usual choice, would bring requests into the light install, and we found no word of
its continuing a download.
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

MAX_ATTEMPTS = 5  # in a row without a new byte
MAX_WAIT_SECONDS = 60  # seconds
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileDigest:
    """What a file is known by.

    Attributes:
        size: its length.
        md5: hex digest; what most publishers give.
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
    """Bring a file, or what is missing of it.

    What came so far lies in `<path>.part`, and what the server said of it in `<path>.part.json`. A part is continued
    where the server sends a range of the same, unchanged file (RFC 9110, sections 13 and 14); elsewhere it starts over.

    Args:
        url: the publisher's address; where MEDIM_MIRROR is set, `apply_mirror` says what is asked instead.
        path: where to, in a folder that exists. A file that stands there is checked and kept.
        md5: the publisher's checksum, where one is known.
        progress: called with the bytes done and, where the server says it, their total (else 0).
        pause: waits some seconds between tries.

    Raises:
        UserError: the server refuses, cuts every try, or sends another file than `md5`; no free space.
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
                    "Check the connection (HTTPS_PROXY is honoured) and run the same command again: it continues."
                ) from None
            wait = min(error.wait or 2.0 ** (failures - 1), MAX_WAIT_SECONDS)
            log.info("%s: %s; trying again in %.0f s", part.url, error, wait)
            pause(wait)
    file_digest = _verify_digest(part.path, part.url, md5)
    part.path.replace(path)
    part.discard()
    return file_digest


def compute_digest(path: Path) -> FileDigest:
    """Length and checksums of a file, in one pass."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            size += len(chunk)
    return FileDigest(size=size, md5=md5.hexdigest(), sha256=sha256.hexdigest())


class _PartialDownload:
    """What has come of a file so far."""

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
        """Bytes on the disk."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def is_complete(self) -> bool:
        """Whether every byte that the server announced is here."""
        return self.at_end or (self.total is not None and self.size == self.total and self.path.is_file())

    def restart(self, total: int | None, validator: str | None) -> None:
        """Forget what came before, and note what the server says of the file."""
        self.path.unlink(missing_ok=True)
        self.total, self.validator = total, validator
        write_json(self._state_path, {"url": self.url, "total": total, "validator": validator})

    def discard(self) -> None:
        """Remove what is left on the disk."""
        self.path.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)


def _request_rest(part: _PartialDownload, progress: Callable[[int, int], None] | None) -> None:
    """One request: append what it brings."""
    offset = part.size if part.validator else 0
    with open_url(part.url, offset, part.validator) as response:
        if response.status == 206:
            if response.headers.get("Content-Range", "").split("-")[0] != f"bytes {offset}":
                raise RetryableError("the server sent another range than was asked for; starting over", restart=True)
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
    """Write what a response brings to the end of the part."""
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
        note = " What came so far is kept." if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
        raise UserError(f"{part.path}: could not be written ({error.strerror}).{note} Free some space.") from error


def _verify_digest(path: Path, url: str, md5: str | None) -> FileDigest:
    """The sums of a file; one that is not the publisher's is removed."""
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
