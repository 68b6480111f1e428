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

from medim.data.public.http import CutError, mirrored, open_url, validator_of
from medim.files import read_json, write_json
from medim.types import UserError

log = logging.getLogger(__name__)

TRIES = 5  # in a row without a new byte
LONGEST_WAIT = 60  # seconds
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Sums:
    """What a file is known by.

    Attributes:
        bytes: its length.
        md5: hex digest; what most publishers give.
        sha256: hex digest.
    """

    bytes: int
    md5: str
    sha256: str


def download(
    url: str,
    path: Path,
    *,
    md5: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Sums:
    """Bring a file, or what is missing of it.

    What came so far lies in `<path>.part`, and what the server said of it in `<path>.part.json`. A part is continued
    where the server sends a range of the same, unchanged file (RFC 9110, sections 13 and 14); elsewhere it starts over.

    Args:
        url: the publisher's address; where MEDIM_MIRROR is set, `mirrored` says what is asked instead.
        path: where to, in a folder that exists. A file that stands there is checked and kept.
        md5: the publisher's checksum, where one is known.
        progress: called with the bytes done and, where the server says it, their total (else 0).
        pause: waits some seconds between tries.

    Raises:
        UserError: the server refuses, cuts every try, or sends another file than `md5`; no free space.
    """
    part = _Part(mirrored(url), path)
    if path.is_file():
        return _checked(path, part.url, md5)
    failures, furthest = 0, part.held
    while not part.whole:
        try:
            _try(part, progress)
        except CutError as cut:
            if cut.restart:
                part.forget()
            failures = 1 if part.held > furthest else failures + 1
            furthest = max(furthest, part.held)
            if failures == TRIES:
                if not part.held:
                    part.forget()
                raise UserError(
                    f"{part.url}: could not be downloaded: {cut} ({TRIES} tries without progress). "
                    "Check the connection (HTTPS_PROXY is honoured) and run the same command again: it continues."
                ) from None
            wait = min(cut.wait or 2.0 ** (failures - 1), LONGEST_WAIT)
            log.info("%s: %s; trying again in %.0f s", part.url, cut, wait)
            pause(wait)
    sums = _checked(part.path, part.url, md5)
    part.path.replace(path)
    part.forget()
    return sums


def digest(path: Path) -> Sums:
    """Length and checksums of a file, in one pass."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
            sha256.update(chunk)
            size += len(chunk)
    return Sums(bytes=size, md5=md5.hexdigest(), sha256=sha256.hexdigest())


class _Part:
    """What has come of a file so far."""

    def __init__(self, url: str, path: Path) -> None:
        self.url = url
        self.path = path.with_name(f"{path.name}.part")
        self._about = path.with_name(f"{path.name}.part.json")
        self.total: int | None = None
        self.validator: str | None = None
        with contextlib.suppress(UserError):
            said = read_json(self._about)
            if said.get("url") == url:
                self.total, self.validator = said.get("total"), said.get("validator")
        self.ended = False

    @property
    def held(self) -> int:
        """Bytes on the disk."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def whole(self) -> bool:
        """Whether every byte that the server announced is here."""
        return self.ended or (self.total is not None and self.held == self.total and self.path.is_file())

    def begin(self, total: int | None, validator: str | None) -> None:
        """Forget what came before, and note what the server says of the file."""
        self.path.unlink(missing_ok=True)
        self.total, self.validator = total, validator
        write_json(self._about, {"url": self.url, "total": total, "validator": validator})

    def forget(self) -> None:
        """Remove what is left on the disk."""
        self.path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)


def _try(part: _Part, progress: Callable[[int, int], None] | None) -> None:
    """One request: append what it brings."""
    offset = part.held if part.validator else 0
    with open_url(part.url, offset, part.validator) as response:
        if response.status == 206:
            if response.headers.get("Content-Range", "").split("-")[0] != f"bytes {offset}":
                raise CutError("the server sent another range than was asked for; starting over", restart=True)
        else:
            length = response.headers.get("Content-Length", "")
            part.begin(int(length) if length.isdecimal() else None, validator_of(response.headers))
            offset = 0
        free = shutil.disk_usage(part.path.parent).free
        if part.total is not None and part.total - offset > free:
            raise UserError(
                f"{part.path.parent}: expected {(part.total - offset) / 1e6:.0f} MB free, got {free / 1e6:.0f}. "
                "Free some space and run the same command again: it continues."
            )
        _append(part, response, progress)
    if part.total is not None and part.held != part.total:
        raise CutError(f"the connection ended after {part.held} of {part.total} bytes")
    part.ended = True


def _append(part: _Part, response: http.client.HTTPResponse, progress: Callable[[int, int], None] | None) -> None:
    """Write what a response brings to the end of the part."""
    done = part.held
    try:
        with part.path.open("ab") as file:
            while part.total is None or done < part.total:
                most = _CHUNK if part.total is None else min(_CHUNK, part.total - done)
                try:
                    chunk = response.read1(most)
                except (OSError, http.client.HTTPException) as error:
                    raise CutError(f"the connection was cut ({type(error).__name__})") from error
                if not chunk:
                    break
                file.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, part.total or 0)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kept = " What came so far is kept." if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
        raise UserError(f"{part.path}: could not be written ({error.strerror}).{kept} Free some space.") from error


def _checked(path: Path, url: str, md5: str | None) -> Sums:
    """The sums of a file; one that is not the publisher's is removed."""
    sums = digest(path)
    if md5 is not None and sums.md5 != md5:
        path.unlink()
        path.with_name(f"{path.name}.json").unlink(missing_ok=True)
        raise UserError(
            f"{url}: expected a file with the md5 {md5}, got {sums.md5} ({sums.bytes} bytes); it was removed. "
            "Run the same command again; where it ends the same way, the publisher or a proxy has changed the file."
        )
    return sums
