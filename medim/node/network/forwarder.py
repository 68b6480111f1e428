"""Forwarder of a node: sends the objects of the outbox to each destination until it confirms them.

An object is sent with the same bytes and UIDs each time, so a destination that stored it before losing the connection
stores it once. Each destination has a thread of its own, so one that does not respond delays no other.
"""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable, Sequence

from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, _config
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    Comprehensive3DSRStorage,
    LabelMapSegmentationStorage,
    SegmentationStorage,
)

from medim.node.deliveries import PendingDelivery, list_pending, record_delivery
from medim.node.event_log import log_event, log_failure
from medim.node.journal import Journal
from medim.node.network.association import open_association
from medim.node.settings import Destination, NodeSettings
from medim.node.spool import Spool

MAX_REJECTIONS = 3  # responses of failure until a delivery is given up
FIRST_DELAY, LONGEST_DELAY = 1.0, 600.0  # seconds until the next connection
_POLL_SECONDS = 0.5  # seconds between two looks at the journal
_WARNINGS = {0xB000, 0xB006, 0xB007}  # the object is stored


class Forwarder:
    """Storage SCU for one destination.

    Args:
        destination: application entity.
        settings: settings of the node.
        spool: folder of the files.
        journal: journal of the node.
    """

    def __init__(self, destination: Destination, settings: NodeSettings, spool: Spool, journal: Journal) -> None:
        self._destination, self._settings, self._spool, self._journal = destination, settings, spool, journal

    def run(self, is_stopped: threading.Event) -> None:
        """Send objects until the event is set."""
        delay = 0.0
        while not is_stopped.wait(delay * random.uniform(0.8, 1.2) or _POLL_SECONDS):
            try:
                is_reachable = self.send_pending()
            except (sqlite3.Error, OSError) as error:  # a locked journal, a full disk
                log_failure("forwarder-failed", error)
                is_reachable = False
            if is_reachable:
                delay = 0.0
            else:
                delay = min(max(2 * delay, FIRST_DELAY), LONGEST_DELAY)
                log_event("destination-unreachable", detail={"destination": str(self._destination), "wait": delay})

    def send_pending(self) -> bool:
        """Send the objects that the destination has not confirmed; return whether it responded to all."""
        deliveries = list_pending(self._journal, str(self._destination), self._settings.retry_seconds[-1])
        if not deliveries:
            return True
        entity = AE(self._settings.ae_title)
        for sop_class in (SegmentationStorage, LabelMapSegmentationStorage, Comprehensive3DSRStorage):
            entity.add_requested_context(sop_class, ExplicitVRLittleEndian)
        with open_association(entity, self._destination, self._settings.tls) as association:
            if association is None:
                return False
            return all(self._send(association, delivery) for delivery in deliveries)

    def _send(self, association: object, delivery: PendingDelivery) -> bool:
        """Send one object and record the response; return whether there was one that allows further objects."""
        path, destination = self._spool.locate_answer(delivery.answer), str(self._destination)
        if not path.is_file():
            record_delivery(self._journal, delivery, destination, "dead", "missing-file")
            return True
        try:
            response = association.send_c_store(path)  # type: ignore[attr-defined]
        except ValueError:  # the destination does not accept the class of the object
            self._reject(delivery, "class-not-accepted")
            return True
        except (RuntimeError, OSError):  # the connection ended
            return False
        if "Status" not in response:
            return False
        status = int(response.Status)
        if status == 0 or status in _WARNINGS:
            record_delivery(self._journal, delivery, destination, "delivered", f"{status:04X}")
            return True
        if 0xA700 <= status <= 0xA7FF or status == 0xFE00:  # out of resources: for ever, with a delay
            return False
        self._reject(delivery, f"{status:04X}")
        return True

    def _reject(self, delivery: PendingDelivery, reason: str) -> None:
        """Record a failure that a further attempt will hardly change."""
        state = "dead" if delivery.tries + 1 >= MAX_REJECTIONS else "pending"
        record_delivery(self._journal, delivery, str(self._destination), state, reason)


def run_forwarders(
    settings: NodeSettings, spool: Spool, open_journal: Callable[[], Journal], is_stopped: threading.Event
) -> None:
    """Send to all destinations, in one thread each, until the event is set."""
    _config.STORE_SEND_CHUNKED_DATASET = True  # the bytes of the file, without decoding
    forwarders: Sequence[Forwarder] = [
        Forwarder(destination, settings, spool, open_journal()) for destination in settings.forward
    ]
    threads = [threading.Thread(target=forwarder.run, args=[is_stopped], daemon=True) for forwarder in forwarders]
    for thread in threads:
        thread.start()
    is_stopped.wait()
    for thread in threads:
        thread.join(timeout=5)
