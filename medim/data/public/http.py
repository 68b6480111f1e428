"""HTTP requests for downloads: mirrors, proxies, redirections, and the distinction of temporary and final errors."""

from __future__ import annotations

import http.client
import os
import ssl
import urllib.error
import urllib.request
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from medim.types import UserError
from medim.version import __version__

_TIMEOUT_SECONDS = 60  # seconds without data after which a connection is considered lost
_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses of temporary errors


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
