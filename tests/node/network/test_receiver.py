from __future__ import annotations

import ipaddress
import socket
import sqlite3
import ssl
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage, SegmentationStorage
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from medim.node.deliveries import AnswerFile, commit_answers
from medim.node.journal import Journal
from medim.node.monitor import read_counters
from medim.node.network import receiver as receiver_module
from medim.node.network.receiver import Receiver
from medim.node.network.tls import make_client_context
from medim.node.series import make_key
from medim.node.settings import NodeSettings, Peer, TlsFiles
from medim.node.spool import Spool
from tests.node.senders import make_series, send


@contextmanager
def running(settings: NodeSettings, spool: Spool) -> Iterator[Receiver]:
    """A receiver for MR images that listens on an ephemeral port."""
    settings = settings.model_copy(update={"sop_classes": (str(MRImageStorage),)})
    receiver = Receiver(settings, spool, Journal(spool.journal))
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def send_to(receiver: Receiver, datasets: list[Dataset], **options: str) -> list[int | None]:
    return send(datasets, receiver.port, **options)


def count(spool: Spool, name: str) -> int:
    return read_counters(Journal(spool.journal)).get(name, 0)


def test_a_confirmed_image_is_in_the_spool_with_its_bytes_and_in_the_journal(
    settings: NodeSettings, spool: Spool
) -> None:
    images = make_series(0)
    with running(settings, spool) as receiver:
        assert send_to(receiver, images) == [0] * 8
    (series,) = Journal(spool.journal).list_series()
    assert (series.key, series.n_instances) == (make_key(images[0].SeriesInstanceUID), 8)
    for image in images:
        path = spool.locate_instance(series.key, make_key(image.SOPInstanceUID))
        assert pydicom.dcmread(path) == image
        assert path.stat().st_mode & 0o077 == 0
    assert list(spool.incoming.iterdir()) == []


def test_a_copy_is_confirmed_and_another_content_is_kept_aside(settings: NodeSettings, spool: Spool) -> None:
    first, other = make_series(0, 1), make_series(0, 1, SliceThickness=2)
    with running(settings, spool) as receiver:
        assert send_to(receiver, first) == [0]
        assert send_to(receiver, first) == [0]
        assert send_to(receiver, other) == [0xA900]
        assert send_to(receiver, first) == [0]
    assert (count(spool, "received"), count(spool, "duplicate"), count(spool, "conflict")) == (1, 2, 1)
    assert [path.stem for path in spool.conflicts.iterdir()] == [make_key(first[0].SOPInstanceUID)]


def test_objects_of_a_class_that_the_package_does_not_answer_are_refused(settings: NodeSettings, spool: Spool) -> None:
    images = make_series(0, 3)
    for image in images:
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    with running(settings, spool) as receiver:
        assert send_to(receiver, images) == [0x0122] * 3
    assert list(spool.list_instances()) == []
    assert count(spool, "refused_class-not-supported") == 3


def test_an_own_answer_that_returns_is_confirmed_and_not_answered(settings: NodeSettings, spool: Spool) -> None:
    (answer,) = make_series(5, 1)
    answer.SOPClassUID = answer.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    with running(settings, spool) as receiver:
        send_to(receiver, make_series(0))
        journal = Journal(spool.journal)
        (series,) = journal.list_series()
        journal.set_state(series.key, series.version, "ready")
        claim = journal.claim_series("w")
        assert claim is not None
        sop = make_key(answer.SOPInstanceUID)
        commit_answers(journal, "w", claim, "p", [AnswerFile(name="1", kind="seg-0", sop=sop)], [])
        assert send_to(receiver, [answer]) == [0]
        assert len(journal.list_series()) == 1
    assert count(spool, "own_answers_returned") == 1


def test_no_image_is_accepted_below_the_low_mark_of_the_disk(
    settings: NodeSettings, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"min_free_bytes": 100})
    with running(settings, spool) as receiver:
        monkeypatch.setattr(Spool, "free_bytes", lambda _: 99)
        assert send_to(receiver, make_series(0, 1)) == [0xA700]
        assert list(spool.incoming.iterdir()) == []
        monkeypatch.setattr(Spool, "free_bytes", lambda _: 100)
        assert send_to(receiver, make_series(0, 1)) == [0]


def test_a_locked_journal_is_a_failure_that_the_sender_repeats(
    settings: NodeSettings, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_series(0, 1)
    with running(settings, spool) as receiver:
        receiver._journal.close()
        receiver._journal = Journal(spool.journal, busy_seconds=0.1)
        other = sqlite3.connect(spool.journal, isolation_level=None)
        monkeypatch.setattr(Receiver, "_open_association", lambda *_: None)
        other.execute("BEGIN IMMEDIATE")
        assert send_to(receiver, images) == [0xA700]
        other.execute("ROLLBACK")
        assert send_to(receiver, images) == [0]
    (series,) = Journal(spool.journal).list_series()
    assert series.n_instances == 1


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (lambda image: delattr(image, "SeriesInstanceUID"), 0xA900, "no-series"),
        (lambda image: setattr(image, "NumberOfFrames", "x"), 0xC000, "unreadable-header"),
    ],
)
def test_a_header_that_cannot_be_filed_is_refused(
    settings: NodeSettings, spool: Spool, change: object, status: int, reason: str
) -> None:
    (image,) = make_series(0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if reason == "unreadable-header":
            image.add_new(0x00280008, "LO", "x")
        else:
            change(image)  # type: ignore[operator]
        with running(settings, spool) as receiver:
            assert send_to(receiver, [image]) == [status]
    assert count(spool, f"refused_{reason}") == 1
    assert list(spool.list_instances()) == []


def test_a_command_that_names_another_object_than_the_data_is_refused(
    settings: NodeSettings, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pynetdicom.dimse_primitives import C_STORE

    original = C_STORE.AffectedSOPInstanceUID
    assert original.fset is not None
    with running(settings, spool) as receiver:
        real_store = receiver._store_file

        def store_renamed(event: object, path: object) -> int:
            event.request.AffectedSOPInstanceUID = "1.2.3"  # type: ignore[attr-defined]
            return real_store(event, path)  # type: ignore[arg-type]

        monkeypatch.setattr(receiver, "_store_file", store_renamed)
        assert send_to(receiver, make_series(0, 1)) == [0xA900]
    assert count(spool, "refused_identifiers-differ") == 1


def test_an_unknown_caller_is_rejected_and_nothing_is_written(settings: NodeSettings, spool: Spool) -> None:
    settings = settings.model_copy(update={"allow": (Peer(ae_title="SCANNER", host="127.0.0.1"),)})
    with running(settings, spool) as receiver:
        assert send_to(receiver, make_series(0, 1), calling="STRANGER") == [None]
        assert send_to(receiver, make_series(0, 1), called="OTHER") == [None]
        assert send_to(receiver, make_series(0, 1)) == [0]
    events = [
        row["detail"] for row in Journal(spool.journal).query("SELECT detail FROM event WHERE what LIKE '%rejected'")
    ]
    assert len(events) == count(spool, "rejected_associations") == 2
    assert not any("STRANGER" in event for event in events)
    assert len(list(spool.list_instances())) == 1


def test_a_known_title_from_another_host_is_rejected(settings: NodeSettings, spool: Spool) -> None:
    settings = settings.model_copy(update={"allow": (Peer(ae_title="SCANNER", host="192.0.2.0/24"),)})
    with running(settings, spool) as receiver:
        assert send_to(receiver, make_series(0, 1)) == [None]
    assert list(spool.list_instances()) == []


def echo(port: int, **options: object) -> float:
    """Seconds until the response to a C-ECHO."""
    start = time.monotonic()
    entity = AE("SCANNER")
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", port, ae_title="MEDIM", **options)  # type: ignore[arg-type]
    assert association.is_established
    assert association.send_c_echo().Status == 0
    association.release()
    return time.monotonic() - start


def test_connections_that_send_nothing_or_garbage_do_not_block_others(settings: NodeSettings, spool: Spool) -> None:
    with running(settings, spool) as receiver:
        silent = [
            socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(20)
        ]  # more than the limit of associations
        for content in (b"GET / HTTP/1.1\r\n\r\n", bytes(200), b"\xff" * 200, b"\x01\x00\xff\xff\xff\xff" + bytes(80)):
            with socket.create_connection(("127.0.0.1", receiver.port)) as garbage:
                garbage.sendall(content)
        assert echo(receiver.port) < 5
        for connection in silent:
            connection.close()


def test_a_sender_has_a_limited_number_of_associations(
    settings: NodeSettings, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver_module, "MAX_PEER_ASSOCIATIONS", 2)
    with running(settings, spool) as receiver:
        entity = AE("SCANNER")
        entity.add_requested_context(Verification)
        associations = [entity.associate("127.0.0.1", receiver.port, ae_title="MEDIM") for _ in range(3)]
        assert [one.is_established for one in associations] == [True, True, False]
        for association in associations[:2]:
            association.release()


def test_files_of_a_killed_receiver_are_adopted_or_removed(settings: NodeSettings, spool: Spool) -> None:
    with running(settings, spool) as receiver:
        send_to(receiver, make_series(0))
    (series,) = Journal(spool.journal).list_series()
    (spool.incoming / "half.dcm").write_bytes(b"half")
    for path in spool.root.glob("journal.db*"):
        path.unlink()  # the journal is lost: the files are the truth
    with running(settings, spool) as receiver:
        (found_series,) = Journal(spool.journal).list_series()
        assert (found_series.key, found_series.n_instances) == (series.key, 8)
        assert send_to(receiver, make_series(0)) == [0] * 8
    assert count(spool, "duplicate") == 8
    assert list(spool.incoming.iterdir()) == []


def write_certificates(folder: Path, *names: str) -> dict[str, TlsFiles]:
    """A certificate for 127.0.0.1 by an authority of its own, for each name."""
    files = {}
    for name in names:
        authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Authority {name}")])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)

        def sign(subject: x509.Name, public_key: Any, *, is_authority: bool) -> bytes:
            builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)  # noqa: B023
            builder = builder.serial_number(x509.random_serial_number())
            builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))  # noqa: B023
            builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
            return builder.sign(authority_key, hashes.SHA256()).public_bytes(Encoding.PEM)  # noqa: B023

        files[name] = TlsFiles(
            certificate=folder / f"{name}.pem",
            private_key=folder / f"{name}.key",
            authorities=folder / f"{name}-ca.pem",
        )
        files[name].certificate.write_bytes(sign(subject, key.public_key(), is_authority=False))
        files[name].authorities.write_bytes(sign(issuer, authority_key.public_key(), is_authority=True))
        files[name].private_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def test_a_sender_without_a_certificate_of_the_authority_is_not_served(
    settings: NodeSettings, spool: Spool, tmp_path: Path
) -> None:
    files = write_certificates(tmp_path, "site", "stranger")
    stranger = files["stranger"].model_copy(update={"authorities": files["site"].authorities})
    old = make_client_context(files["site"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with running(settings.model_copy(update={"tls": files["site"]}), spool) as receiver:
        for context in (None, make_client_context(stranger), old):
            options: dict[str, Any] = {"tls_args": (context, "127.0.0.1")} if context else {}
            assert send(make_series(0, 1), receiver.port, **options) == [None]
        site_args = (make_client_context(files["site"]), "127.0.0.1")
        assert send(make_series(0, 1), receiver.port, tls_args=site_args) == [0]
    assert len(list(spool.list_instances())) == 1
