"""Processes of a node: each has one role, and may be killed at any time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from medim.node.event_log import configure_event_log, log_event
from medim.node.journal import Journal
from medim.node.settings import NodeSettings, read_settings
from medim.node.spool import Spool
from medim.package.package import load_package
from medim.types import UserError

RECEIVER, CLOSER, FORWARDER, WORKER = "receiver", "closer", "forwarder", "worker"


def list_roles(settings: NodeSettings) -> list[str]:
    """List the processes of a node."""
    forwarders = [FORWARDER] if settings.forward else []
    return [RECEIVER, CLOSER, *forwarders, *(f"{WORKER}-{number}" for number in range(settings.workers))]


def run_process(role: str, spool_folder: str) -> None:
    """Run one process of a node until SIGTERM, or until the supervisor closes its end of standard input.

    Args:
        role: name in `list_roles`.
        spool_folder: folder of the spool.
    """
    configure_event_log(role)
    is_stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_stopped.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the supervisor
    threading.Thread(target=_wait_for_end, args=[is_stopped], daemon=True).start()
    spool = Spool(Path(spool_folder))
    try:
        with spool.lock(role):
            _run_role(role, read_settings(spool.root), spool, is_stopped)
    except (UserError, OSError) as error:
        log_event("process-failed", detail={"exception": type(error).__name__, "message": _describe_error(error)})
        raise SystemExit(getattr(error, "exit_code", 1)) from None


def _run_role(role: str, settings: NodeSettings, spool: Spool, is_stopped: threading.Event) -> None:
    """Run the loop of a role. Its libraries are imported here, because no role needs all of them."""

    def open_journal() -> Journal:
        return Journal(spool.journal, log_transaction_event)

    if role == RECEIVER:
        from medim.node.network.receiver import Receiver

        Receiver(settings, spool, open_journal()).run(is_stopped.is_set)
    elif role == CLOSER:
        from medim.node.completeness import Closer

        Closer(settings, spool, open_journal()).run(is_stopped.is_set)
    elif role == FORWARDER:
        from medim.node.network.forwarder import run_forwarders

        run_forwarders(settings, spool, open_journal, is_stopped)
    else:
        from medim.node.worker import Worker

        package = load_package(settings.package, public_key=settings.public_key)
        if package.sha256 != settings.package_sha256:
            raise UserError(f"{settings.package}: the package has changed. Stop the node and start it again.")
        Worker(role, settings, package, spool, open_journal()).run(is_stopped.is_set)


def log_transaction_event(what: str, key: str, detail: Mapping[str, object]) -> None:
    """Write a committed event of the journal to the log."""
    log_event(what, key, detail)


def _describe_error(error: Exception) -> str:
    """Describe an error of the configuration: the message of medim, or the error of the operating system."""
    return str(error) if isinstance(error, UserError) else str(getattr(error, "strerror", "") or "")


def _wait_for_end(is_stopped: threading.Event) -> None:
    """Set the event at the end of standard input, which is the end of the supervisor."""
    while os.read(sys.stdin.fileno(), 1):  # not through a buffer, which is locked while Python exits
        pass
    is_stopped.set()
