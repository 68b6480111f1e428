from __future__ import annotations

import threading
import time

import pytest
from pydicom.uid import MRImageStorage, SegmentationStorage

from medim.node.deliveries import AnswerFile
from medim.node.journal import Journal
from medim.node.network import forwarder as forwarder_module
from medim.node.network.forwarder import Forwarder, run_forwarders
from medim.node.settings import Address, Destination, NodeSettings
from medim.node.spool import Spool
from tests.node.senders import Archive, free_port, make_series


@pytest.fixture
def journal(spool: Spool) -> Journal:
    return Journal(spool.journal)


def fill(spool: Spool, journal: Journal, destinations: list[Destination], n_objects: int = 3) -> list[str]:
    """Put segmentations into the outbox, with their deliveries."""
    files = []
    for dataset in make_series(0, n_objects):
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SegmentationStorage
        name = str(dataset.SOPInstanceUID)
        dataset.save_as(spool.locate_answer(name), enforce_file_format=True)
        files.append(AnswerFile(name=name, kind=f"seg-{len(files)}", sop=name))
    with journal.transaction() as transaction:
        for file in files:
            transaction.execute(
                "INSERT INTO answer VALUES (?, 's', '', '', ?, ?, ?)", file.name, file.kind, file.sop, time.time()
            )
            for one in destinations:
                transaction.execute(
                    "INSERT INTO delivery (answer, destination, state, at) VALUES (?, ?, 'pending', ?)",
                    *(file.name, str(one), time.time()),
                )
    return [file.name for file in files]


def at(port: int) -> Destination:
    return Destination(ae_title="ARCHIVE", address=Address(host="127.0.0.1", port=port))


def deliveries(journal: Journal) -> list[tuple[str, str, int]]:
    rows = journal.query("SELECT state, reason, tries FROM delivery ORDER BY answer")
    return [(row["state"], row["reason"], row["tries"]) for row in rows]


def test_objects_are_delivered_once_with_their_bytes(settings: NodeSettings, spool: Spool, journal: Journal) -> None:
    import pydicom

    with Archive() as archive:
        names = fill(spool, journal, [at(archive.port)])
        forwarder = Forwarder(at(archive.port), settings, spool, journal)
        assert forwarder.send_pending()
        assert forwarder.send_pending()
    assert dict(archive.deliveries) == dict.fromkeys(names, 1)
    assert all(pydicom.dcmread(spool.locate_answer(name)) == archive.objects[name] for name in names)
    assert deliveries(journal) == [("delivered", "0000", 0)] * 3


@pytest.mark.parametrize("status", [0xA700, 0xFE00])
def test_a_destination_without_space_gets_the_object_later(
    settings: NodeSettings, spool: Spool, journal: Journal, status: int
) -> None:
    with Archive() as archive:
        fill(spool, journal, [at(archive.port)])
        archive.statuses = [status]
        forwarder = Forwarder(at(archive.port), settings, spool, journal)
        assert not forwarder.send_pending()
        assert deliveries(journal) == [("pending", "", 0)] * 3
        assert forwarder.send_pending()
    assert deliveries(journal) == [("delivered", "0000", 0)] * 3


def test_an_object_that_a_destination_rejects_three_times_is_given_up_and_the_others_arrive(
    settings: NodeSettings, spool: Spool, journal: Journal
) -> None:
    settings = settings.model_copy(update={"retry_seconds": (0.0,)})
    with Archive() as archive:
        fill(spool, journal, [at(archive.port)])
        forwarder = Forwarder(at(archive.port), settings, spool, journal)
        for _ in range(4):
            archive.statuses = [0xC000]
            forwarder.send_pending()
            archive.statuses = []
    assert deliveries(journal) == [("dead", "C000", 3)] + [("delivered", "0000", 0)] * 2


def test_a_warning_is_a_delivery(settings: NodeSettings, spool: Spool, journal: Journal) -> None:
    with Archive() as archive:
        fill(spool, journal, [at(archive.port)], 1)
        archive.statuses = [0xB000]
        Forwarder(at(archive.port), settings, spool, journal).send_pending()
    assert deliveries(journal) == [("delivered", "B000", 0)]


def test_a_class_that_the_destination_does_not_accept_is_a_rejection(
    settings: NodeSettings, spool: Spool, journal: Journal
) -> None:
    with Archive() as archive:
        (name,) = fill(spool, journal, [at(archive.port)], 1)
        (dataset,) = make_series(0, 1)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = name
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
        dataset.save_as(spool.locate_answer(name), enforce_file_format=True)
        Forwarder(at(archive.port), settings, spool, journal).send_pending()
    assert deliveries(journal) == [("pending", "class-not-accepted", 1)]


def test_a_destination_that_is_down_delays_no_other_and_gets_all_objects_afterwards(
    settings: NodeSettings, spool: Spool, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder_module, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(forwarder_module, "LONGEST_DELAY", 0.2)
    down = at(free_port())
    is_stopped = threading.Event()
    with Archive() as archive:
        settings = settings.model_copy(update={"forward": (down, at(archive.port))})
        names = fill(spool, journal, list(settings.forward))
        thread = threading.Thread(
            target=run_forwarders, args=[settings, spool, lambda: Journal(spool.journal), is_stopped]
        )
        thread.start()
        try:
            wait_for(lambda: len(archive.objects) == 3)
            with Archive(down.address.port) as late_archive:
                wait_for(lambda: len(late_archive.objects) == 3)
                wait_for(lambda: all(state == "delivered" for state, _, _ in deliveries(journal)))
        finally:
            is_stopped.set()
            thread.join()
    assert dict(archive.deliveries) == dict(late_archive.deliveries) == dict.fromkeys(names, 1)


def wait_for(condition: object, seconds: float = 20.0) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.05)
