"""Associations that the node opens: to destinations of answers and to an archive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pynetdicom import AE

from medim.node.network.tls import make_client_context
from medim.node.settings import Destination, TlsFiles

_CONNECT_SECONDS, _RESPONSE_SECONDS = 10.0, 60.0


@contextmanager
def open_association(entity: AE, peer: Destination, tls: TlsFiles | None) -> Iterator[Any]:
    """Open an association inside the block; yields None if the peer cannot be reached or rejects it.

    Args:
        entity: application entity of the node, with its requested contexts.
        peer: called application entity.
        tls: certificates; None for a connection without encryption.
    """
    entity.connection_timeout = entity.acse_timeout = _CONNECT_SECONDS
    entity.dimse_timeout = entity.network_timeout = _RESPONSE_SECONDS
    host, port = peer.address.host, peer.address.port
    tls_args = (make_client_context(tls), host) if tls else None
    association = entity.associate(host, port, ae_title=peer.ae_title, tls_args=tls_args)
    try:
        yield association if association.is_established else None
    finally:
        if association.is_established:
            association.release()
