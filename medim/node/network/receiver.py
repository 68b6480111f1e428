"""Receiver of a node: a storage SCP that confirms an image only after its file and its journal entry are on disk.

Pixels are never decoded here; of the header only identifiers and counts are read, by the parser of the index.
"""

from __future__ import annotations

import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom.uid
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from medim.data.readers import ReadError
from medim.data.readers.dicom.header import MODALITIES
from medim.data.readers.dicom.header_scan import HeaderScan, scan_header
from medim.data.readers.dicom.values import DicomHeader
from medim.node.event_log import log_failure
from medim.node.journal import Journal
from medim.node.network.tls import make_server_context
from medim.node.series import ReceivedInstance, make_key
from medim.node.settings import NodeSettings
from medim.node.spool import Spool, hash_dataset
from medim.privacy import make_pseudonym

SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND, CLASS_NOT_SUPPORTED = 0x0000, 0xA700, 0xA900, 0xC000, 0x0122
MAX_ASSOCIATIONS, MAX_PEER_ASSOCIATIONS = 16, 4
MAX_CONNECTIONS = 1024  # with those that do not ask for an association, which end after `_ACSE_SECONDS`
_ACSE_SECONDS, _NETWORK_SECONDS = 10.0, 60.0
_PDU_BYTES = 1 << 17
_STALE_SECONDS = 600.0  # age of a file of an interrupted transfer
_HEADER_KEYWORDS = frozenset(
    ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "NumberOfFrames", "ImagesInAcquisition",
     "NumberOfSeriesRelatedInstances")
)  # fmt: skip
_SYNTAXES = [  # of the DICOM reader
    pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian,
    pydicom.uid.DeflatedExplicitVRLittleEndian, pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit,
    pydicom.uid.JPEGLossless, pydicom.uid.JPEGLosslessSV1, pydicom.uid.JPEGLSLossless, pydicom.uid.JPEGLSNearLossless,
    pydicom.uid.JPEG2000Lossless, pydicom.uid.JPEG2000, pydicom.uid.RLELossless,
]  # fmt: skip


class RefusalError(Exception):
    """A C-STORE request that is not accepted.

    Attributes:
        status: DIMSE status of the response.
        reason: stable code.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Receiver:
    """Storage SCP.

    Args:
        settings: settings of the node.
        spool: folder of the files.
        journal: journal of the node.
    """

    def __init__(self, settings: NodeSettings, spool: Spool, journal: Journal) -> None:
        self._settings, self._spool, self._journal = settings, spool, journal
        self._numbers: dict[Any, int] = {}  # journal numbers of the open associations
        self._locks = [threading.Lock() for _ in range(64)]  # one object is stored by one thread at a time
        self._server: Any = None
        self._entity = AE(settings.ae_title)
        self._entity.maximum_associations = MAX_CONNECTIONS
        self._entity.maximum_pdu_size = _PDU_BYTES
        self._entity.require_called_aet = True
        self._entity.acse_timeout = _ACSE_SECONDS
        self._entity.network_timeout = self._entity.dimse_timeout = _NETWORK_SECONDS
        self._entity.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:  # every class, so that a refusal names its reason
            self._entity.add_supported_context(str(context.abstract_syntax), _SYNTAXES)

    @property
    def port(self) -> int:
        """TCP port of the running server."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Recover from the last end of the process, and accept connections in threads of their own.

        Raises:
            OSError: the address is in use.
        """
        _config.STORE_RECV_CHUNKED_DATASET = True  # to a file in `tempfile.tempdir`, not to memory
        tempfile.tempdir = str(self._spool.incoming)
        self._journal.close_association()
        self.remove_stale_files(0.0)
        self.adopt_files()
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self.check_request),
            (evt.EVT_REJECTED, self._record_rejection),
            (evt.EVT_ESTABLISHED, self._open_association),
            (evt.EVT_CONN_CLOSE, self._close_association),
            (evt.EVT_C_STORE, self.store_object),
        ]
        listen = self._settings.listen
        self._server = self._entity.start_server(
            (listen.host, listen.port),
            block=False,
            evt_handlers=handlers,
            ssl_context=make_server_context(self._settings.tls) if self._settings.tls else None,
        )

    def stop(self) -> None:
        """Close the listening socket, and abort the associations."""
        if self._server is not None:
            self._server.shutdown()

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Serve until `is_stopped`."""
        self.start()
        self._journal.record_event("receiver-started", port=self.port)
        next_sweep = time.monotonic() + _STALE_SECONDS
        while not is_stopped():
            time.sleep(0.1)
            if time.monotonic() > next_sweep:
                self.remove_stale_files(_STALE_SECONDS)
                next_sweep = time.monotonic() + _STALE_SECONDS
        self.stop()

    # Files of an earlier process

    def remove_stale_files(self, min_seconds: float) -> None:
        """Delete the files of interrupted transfers, which no sender received a confirmation for."""
        for path in self._spool.incoming.iterdir():
            try:
                if time.time() - path.stat().st_mtime >= min_seconds:
                    path.unlink()
            except FileNotFoundError:
                continue  # its transfer ended meanwhile

    def adopt_files(self) -> None:
        """Add the images of the spool to the journal that a killed receiver stored and did not record."""
        for series, sop, path in self._spool.list_instances():
            if self._journal.find_digest(sop) is None:
                try:
                    instance = _describe_file(path, scan_header(path, _HEADER_KEYWORDS), series, sop, "spool")
                except ReadError:
                    path.unlink()  # not a file of the receiver
                else:
                    self._journal.add_instance(instance, self._settings.late)

    # Associations

    def check_request(self, event: Any) -> None:
        """Reject an association of an unknown sender, or beyond the number of associations."""
        association = event.assoc
        title = str(association.requestor.primitive.calling_ae_title)
        if not self._is_allowed(title, str(association.requestor.address)):
            association.acse.send_reject(0x01, 0x01, 0x03)  # permanent: calling AE title not recognised
            self._record_rejection(event, reason="unknown-caller")
            association.kill()
            return
        active = [one for one in self._entity.active_associations if one.is_established]
        n_same = sum(one.requestor.ae_title == title for one in active)
        if len(active) >= MAX_ASSOCIATIONS or n_same >= MAX_PEER_ASSOCIATIONS:
            association.acse.send_reject(0x02, 0x03, 0x02)  # transient: local limit exceeded
            self._record_rejection(event, reason="too-many-associations")
            association.kill()

    def _is_allowed(self, title: str, address: str) -> bool:
        """Whether a sender is in the list of allowed peers; without a list, only this machine can connect."""
        return not self._settings.allow or any(peer.matches(title, address) for peer in self._settings.allow)

    def _record_rejection(self, event: Any, reason: str = "wrong-called-title") -> None:
        """Count a rejected association. The title of an unknown caller is recorded as a pseudonym."""
        title = str(event.assoc.requestor.primitive.calling_ae_title)
        with self._journal.transaction() as transaction:
            transaction.count_up("rejected_associations")
            transaction.record_event("association-rejected", peer=self._name_peer(title), reason=reason)

    def _name_peer(self, title: str) -> str:
        """Return the AE title of a configured peer, and a pseudonym of any other."""
        peer_titles = {peer.ae_title for peer in self._settings.allow}
        return title.strip() if title.strip() in peer_titles else make_pseudonym(title, prefix="ae")

    def _open_association(self, event: Any) -> None:
        peer = self._name_peer(str(event.assoc.requestor.primitive.calling_ae_title))
        self._numbers[event.assoc] = self._journal.open_association(peer)

    def _close_association(self, event: Any) -> None:
        if (number := self._numbers.pop(event.assoc, None)) is not None:
            self._journal.close_association(number)

    # C-STORE

    def store_object(self, event: Any) -> int:
        """Store an object and return the DIMSE status.

        Success means that the file and its entry in the journal are on disk, or that they have been before.
        """
        path = Path(event.dataset_path)
        try:
            return self._store_file(event, path)
        except RefusalError as error:
            self._count_refusal(error)
            return error.status
        except (OSError, sqlite3.Error) as error:  # a full disk, a locked journal: the sender tries again later
            log_failure("store-failed", error)
            return OUT_OF_RESOURCES
        finally:
            path.unlink(missing_ok=True)

    def _store_file(self, event: Any, path: Path) -> int:
        """Check an object and store it.

        Raises:
            RefusalError: the object is not accepted.
        """
        sop_class, sop_uid = str(event.request.AffectedSOPClassUID), str(event.request.AffectedSOPInstanceUID)
        sop = make_key(sop_uid)
        if not self._accepts_class(sop_class):
            if self._journal.is_own_answer(sop):
                self._journal.count_up("own_answers_returned")
                return SUCCESS
            raise RefusalError(CLASS_NOT_SUPPORTED, "class-not-supported")
        if self._spool.free_bytes() < self._settings.min_free_bytes:
            raise RefusalError(OUT_OF_RESOURCES, "disk-full")
        try:
            result = scan_header(path, _HEADER_KEYWORDS)
            header = result.header
            series_uid, is_object = header.text("SeriesInstanceUID"), _is_complete_alone(header)
        except ReadError as error:
            raise RefusalError(CANNOT_UNDERSTAND, "unreadable-header") from error
        if header.text("SOPInstanceUID") != sop_uid or header.text("SOPClassUID") != sop_class:
            raise RefusalError(MISMATCH, "identifiers-differ")
        if not series_uid:
            raise RefusalError(MISMATCH, "no-series")
        peer = self._name_peer(str(event.assoc.requestor.primitive.calling_ae_title))
        instance = _describe_file(path, result, make_key(sop_uid if is_object else series_uid), sop, peer)
        with self._locks[int(sop[:2], 16) % len(self._locks)]:
            return self._store_once(path, replace(instance, association=self._numbers.get(event.assoc)))

    def _store_once(self, path: Path, instance: ReceivedInstance) -> int:
        """Store a checked object, unless it is in the spool."""
        known_digest = self._journal.find_digest(instance.sop)
        if known_digest == instance.sha256:
            self._journal.count_up("duplicate")
            return SUCCESS
        if known_digest is not None:
            self._spool.store_conflict(path, instance.sop)
            with self._journal.transaction() as transaction:
                transaction.count_up("conflict")
                transaction.record_event(
                    "instance-conflict", instance.series, instance=instance.sop, peer=instance.peer
                )
            return MISMATCH
        self._spool.store_instance(path, instance.series, instance.sop)
        self._journal.add_instance(instance, self._settings.late)
        return SUCCESS

    def _accepts_class(self, sop_class: str) -> bool:
        """Whether the package answers objects of a class."""
        if self._settings.sop_classes:
            return sop_class in self._settings.sop_classes
        return "Image Storage" in pydicom.uid.UID(sop_class).name

    def _count_refusal(self, error: RefusalError) -> None:
        """Count a refused object."""
        try:
            self._journal.count_up(f"refused_{error.reason}")
        except sqlite3.Error as failure:
            log_failure("count-failed", failure)


def _describe_file(path: Path, result: HeaderScan, series: str, sop: str, peer: str) -> ReceivedInstance:
    """Build the journal entry of a file."""
    return ReceivedInstance(
        series=series,
        sop=sop,
        sha256=hash_dataset(path, result.syntax),
        n_bytes=path.stat().st_size,
        peer=peer,
        is_object=_is_complete_alone(result.header),
        n_expected=_read_count(result.header, "NumberOfSeriesRelatedInstances"),
        n_acquired=_read_count(result.header, "ImagesInAcquisition"),
    )


def _is_complete_alone(header: DicomHeader) -> bool:
    """Whether an image is read as one image whatever else its series contains: an X-ray, or a multi-frame object."""
    return MODALITIES.get(header.text("Modality")) == "xray" or header.integer("NumberOfFrames", 1) > 1


def _read_count(header: DicomHeader, keyword: str) -> int:
    """Read a number of images; 0 if it is absent or no positive number."""
    try:
        return min(max(int(header.integer(keyword, 0)), 0), 1 << 31)
    except ReadError:
        return 0
