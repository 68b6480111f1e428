"""Download one file over HTTP, resuming interrupted transfers, and verify it before it gets its final name.

Uses urllib instead of a library. pooch (1.9) sends no Range header and deletes the partial file, so it starts
interrupted downloads over. It would also add requests, urllib3 and certifi to the light install, and would replace
neither the mirror nor the check of redirections.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medim.files import read_json, write_json
from medim.types import UserError
from medim.version import __version__

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # consecutive attempts without a new byte
MAX_WAIT_SECONDS = 60
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60  # seconds without data after which a connection is considered lost
_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses of temporary errors


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


class RetryableError(Exception):
    """A failed attempt that may be repeated, after `wait` seconds if the server requests it, or from the start."""

    def __init__(self, reason: str, *, wait: float | None = None, restart: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.restart = restart


def apply_mirror(url: str) -> str:
    """Map a URL to the mirror in MEDIM_MIRROR: its address, followed by host and path as in folders of `wget -x`.

    Raises:
        UserError: MEDIM_MIRROR is not an http or https address, or contains a password.
    """
    mirror = os.environ.get("MEDIM_MIRROR", "")
    if not mirror:
        return url
    address = urlsplit(mirror)
    if address.scheme not in {"http", "https"} or not address.hostname or "@" in address.netloc:
        raise UserError("MEDIM_MIRROR: expected an address such as https://mirror.hospital/public, without a password.")
    return f"{mirror.rstrip('/')}/{url.split('://', 1)[1]}"


def open_url(url: str, offset: int = 0, validator: str | None = None) -> http.client.HTTPResponse:
    """Send a request, through the proxies configured in the environment.

    Args:
        url: http or https.
        offset: first byte to request; the server may start at 0 nevertheless.
        validator: validator of the partial file (see `get_validator`); required for an offset.

    Raises:
        RetryableError: a temporary error.
        UserError: a permanent error.
    """
    if urlsplit(url).scheme not in {"http", "https"}:
        raise UserError(f"{url}: expected an address that starts with https://.")
    request = urllib.request.Request(url, headers={"User-Agent": f"medim/{__version__}", "Accept-Encoding": "identity"})
    if offset and validator:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", validator)
    try:
        response: http.client.HTTPResponse = urllib.request.build_opener(_HttpsRedirectHandler).open(
            request, timeout=_TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise RetryableError("the server has no such range; starting over", restart=True) from None
        if error.code in _TRANSIENT_STATUSES:
            retry_after = error.headers.get("Retry-After", "")
            wait = float(retry_after) if retry_after.isdecimal() else None
            raise RetryableError(f"HTTP {error.code} {error.reason}", wait=wait) from None
        raise UserError(
            f"{url}: expected the file, got HTTP {error.code} {error.reason}. "
            "The publisher may have moved or closed it, or a proxy blocks it; check the page of the data set."
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{url}: the server's certificate is not trusted ({reason.verify_message}). If a proxy replaces "
                "certificates, set SSL_CERT_FILE to the certificates of your hospital."
            ) from None
        raise RetryableError(f"no connection ({reason})") from error
    return response


def get_validator(headers: Message) -> str | None:
    """Get the validator that identifies an unchanged file: a strong entity tag, else the modification time."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")


class _HttpsRedirectHandler(urllib.request.HTTPRedirectHandler):
    """Redirect handler that rejects redirections from https to an insecure scheme."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Build the request for a redirection.

        Raises:
            UserError: its scheme is neither https nor the original scheme.
        """
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and scheme != urlsplit(req.full_url).scheme:
            raise UserError(f"{req.full_url}: expected a redirection to https, got one to {newurl}; not followed.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
