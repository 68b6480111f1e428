"""Check the package and the addresses of a node before it starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pydicom.uid

from medim.node.network.tls import make_server_context
from medim.node.settings import NodeSettings
from medim.node.supervisor import Supervisor
from medim.package.package import Package, load_package
from medim.predict.dicom.writer import dicom_writer
from medim.tasks import ENCODER
from medim.types import UsageError, UserError

log = logging.getLogger(__name__)


def open_package(folder: Path, public_key: Path | None) -> Package:
    """Load the package of a node, and check that it can answer in DICOM.

    Raises:
        PackageError: the package is invalid.
        UserError: the package is an encoder, or a segmenter without label codes.
    """
    package = load_package(folder, public_key=public_key)
    if package.contract.kind == ENCODER:
        raise UserError(f"{folder}: expected a fine-tuned model, got an encoder, which gives no answer.")
    dicom_writer(package)
    return package


def list_sop_classes(package: Package) -> tuple[str, ...]:
    """List the UIDs of the storage classes in the rules of a package; empty if it accepts any image."""
    return tuple(str(getattr(pydicom.uid, name)) for name in package.contract.dicom_in.sop_class)


def start_node(settings: NodeSettings) -> None:
    """Run a node until it is stopped.

    Raises:
        UsageError: the node would accept senders from other machines without a list of them.
        UserError: the certificates or the spool cannot be used.
    """
    for option, address in (("--listen", settings.listen), ("--metrics", settings.metrics)):
        if address is None or address.is_loopback:
            continue
        if option == "--metrics":
            raise UsageError(f"--metrics {address}: expected an address of this machine alone, such as 127.0.0.1:9112.")
        if not settings.allow:
            raise UsageError(f"--listen {address}: requires --allow AET@HOST, the senders from other machines.")
        if settings.tls is None:
            log.warning("%s accepts connections without encryption; see --tls-cert", address)
    if settings.tls is not None:
        make_server_context(settings.tls)
    if not settings.forward:
        log.warning("no --forward: the answers remain in %s", settings.spool / "outbox")
    Supervisor(settings).run()
