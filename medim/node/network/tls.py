"""TLS contexts of a node: TLS 1.2 or newer, with certificates on both sides (BCP 195)."""

from __future__ import annotations

import ssl

from medim.node.settings import TlsFiles
from medim.types import UserError


def make_server_context(files: TlsFiles) -> ssl.SSLContext:
    """Build the context of the receiver, which requires a certificate of the client.

    Raises:
        UserError: a file is missing or is not a certificate or key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _load_files(context, files)


def make_client_context(files: TlsFiles) -> ssl.SSLContext:
    """Build the context of connections to destinations, which verifies their certificates and host names.

    Raises:
        UserError: as in `make_server_context`.
    """
    return _load_files(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), files)


def _load_files(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.private_key)
        context.load_verify_locations(files.authorities)
    except OSError as error:
        raise UserError(
            f"{files.certificate}, {files.private_key}, {files.authorities}: expected a certificate, its key and the "
            f"certificates of the authorities in PEM ({type(error).__name__}). Check --tls-cert, --tls-key, --tls-ca."
        ) from error
    return context
