from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage

from medim.data.index.index import AllRejectedError, Index, Rejection
from medim.node import worker as worker_module
from medim.node.deliveries import list_answers, list_pending
from medim.node.journal import Journal
from medim.node.settings import NodeSettings, parse_destination
from medim.node.spool import Spool
from medim.node.worker import TIMEOUT_EXIT_CODE, Worker
from medim.predict.dicom.uids import create_uid
from tests.node.network.test_receiver import running, send_to
from tests.node.senders import make_series

PACS = "PACS@127.0.0.1:104"


def answer_in_seg(package: object, paths: Sequence[Path], out: Path, **_: object) -> list[dict[str, str]]:
    """Write one object, as `predict` does, without a network."""
    out.mkdir()
    dataset = make_series(0, 1)[0]
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = create_uid()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.ContentDescription = str(time.monotonic_ns())  # differs from run to run, as a date does
    dataset.save_as(out / "image.seg.dcm", enforce_file_format=True)
    return [{"image": "image", "file": "image.seg.dcm"}]


@pytest.fixture
def journal(settings: NodeSettings, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """A journal with two series that are ready."""
    monkeypatch.setattr(worker_module, "predict", answer_in_seg)
    with running(settings, spool) as receiver:
        for number in range(2):
            send_to(receiver, make_series(number, 3))
    journal = Journal(spool.journal)
    for series in journal.list_series():
        journal.set_state(series.key, series.version, "ready")
    return journal


def make_worker(settings: NodeSettings, spool: Spool, journal: Journal, **changes: Any) -> Worker:
    changes = {"forward": (parse_destination(PACS, "--forward"),), "retry_seconds": (0.0, 0.0), **changes}
    package: Any = SimpleNamespace(sha256="p")
    return Worker("worker-0", settings.model_copy(update=changes), package, spool, journal)


def states(journal: Journal) -> list[tuple[str, str]]:
    return [(series.state, series.reason) for series in journal.list_series()]


def test_each_series_is_answered_and_its_objects_wait_for_each_destination(
    settings: NodeSettings, spool: Spool, journal: Journal
) -> None:
    worker = make_worker(settings, spool, journal)
    assert [worker.answer_next() for _ in range(3)] == [True, True, False]
    assert states(journal) == [("answered", "")] * 2
    names = [one.answer for one in list_pending(journal, PACS, 60.0)]
    assert len(names) == 2
    for name in names:
        assert pydicom.dcmread(spool.locate_answer(name)).SOPInstanceUID == name
    assert list(spool.work.iterdir()) == []


def test_a_repeated_prediction_has_the_same_uids_and_keeps_the_bytes_in_the_outbox(
    settings: NodeSettings, spool: Spool, journal: Journal
) -> None:
    worker = make_worker(settings, spool, journal)
    worker.answer_next()
    series = journal.list_series("answered")[0]
    (name,) = list_answers(journal, series.key)
    content = spool.locate_answer(name).read_bytes()
    journal.set_state(series.key, series.version, "ready")
    worker.answer_next()
    assert list_answers(journal, series.key) == [name]
    assert spool.locate_answer(name).read_bytes() == content


def test_a_larger_set_of_images_has_other_uids(settings: NodeSettings, spool: Spool, journal: Journal) -> None:
    worker = make_worker(settings, spool, journal)
    worker.answer_next()
    series = journal.list_series("answered")[0]
    with running(settings.model_copy(update={"late": "replace"}), spool) as receiver:
        send_to(receiver, make_series(0, 4))
    journal.set_state(series.key, series.version + 1, "ready")
    while worker.answer_next():
        pass
    assert len(list_answers(journal, series.key)) == 2


def test_a_report_on_a_larger_set_of_images_names_the_report_that_it_replaces(
    settings: NodeSettings, spool: Spool, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(package: object, paths: Sequence[Path], out: Path, **_: object) -> list[dict[str, str]]:
        answer_in_seg(package, paths, out)
        (out / "image.seg.dcm").rename(out / "image.sr.dcm")
        return [{"image": "image", "file": "image.sr.dcm"}]

    monkeypatch.setattr(worker_module, "predict", report)
    worker = make_worker(settings, spool, journal)
    worker.answer_next()
    series = journal.list_series("answered")[0]
    (first,) = list_answers(journal, series.key)
    with running(settings.model_copy(update={"late": "replace"}), spool) as receiver:
        send_to(receiver, make_series(0, 4))
    journal.set_state(series.key, series.version + 1, "ready")
    while worker.answer_next():
        pass
    (second,) = set(list_answers(journal, series.key)) - {first}
    assert "PredecessorDocumentsSequence" not in pydicom.dcmread(spool.locate_answer(first))
    (study,) = pydicom.dcmread(spool.locate_answer(second)).PredecessorDocumentsSequence
    (sop,) = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert sop.ReferencedSOPInstanceUID == first


def test_a_file_that_changed_in_the_spool_is_not_predicted(
    settings: NodeSettings, spool: Spool, journal: Journal
) -> None:
    (first, second) = journal.list_series()
    for key, damage in ((first.key, True), (second.key, False)):
        path = next((spool.series / key).iterdir())
        if damage:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        else:
            path.unlink()
    worker = make_worker(settings, spool, journal)
    while worker.answer_next():
        pass
    assert states(journal) == [("held", "damaged-spool")] * 2


def test_a_refusal_of_the_reader_is_the_reason_of_the_series(
    settings: NodeSettings, spool: Spool, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        rejected = (Rejection("a", "duplicate", ""), Rejection("b", "burned-in", ""))
        raise AllRejectedError("", Index(root=Path(), modality="mri", records=(), rejected=rejected))

    monkeypatch.setattr(worker_module, "predict", refuse)
    make_worker(settings, spool, journal).answer_next()
    assert states(journal)[0] == ("rejected", "burned-in")


@pytest.mark.parametrize("error", [RuntimeError("Doe^John"), MemoryError()])
def test_an_unexpected_error_is_repeated_twice(
    settings: NodeSettings, spool: Spool, journal: Journal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = []

    def fail(*args: object, **_: object) -> None:
        calls.append(args)
        raise error

    monkeypatch.setattr(worker_module, "predict", fail)
    worker = make_worker(settings, spool, journal)
    while worker.answer_next():
        pass
    assert len(calls) == 6
    reason = "too-much-memory" if isinstance(error, MemoryError) else "RuntimeError"
    assert states(journal) == [("dead", reason)] * 2


def run_in_child(worker: Worker) -> int:
    """Let a forked process run the worker until it ends or has nothing to do; return its exit status."""
    child = os.fork()
    if child == 0:
        worker.fail_interrupted()
        while worker.answer_next():
            pass
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_series_that_kills_its_worker_is_given_up_and_the_next_is_answered(
    settings: NodeSettings, spool: Spool, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = journal.list_series()[0].key

    def kill_or_answer(package: object, paths: Sequence[Path], out: Path, **_: object) -> list[dict[str, str]]:
        if paths[0].parent.name == bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer_in_seg(package, paths, out)

    monkeypatch.setattr(worker_module, "predict", kill_or_answer)
    journal.close()
    exits = [run_in_child(make_worker(settings, spool, Journal(spool.journal))) for _ in range(4)]
    assert exits == [-signal.SIGKILL] * 3 + [0]
    assert states(Journal(spool.journal)) == [("dead", "worker-died"), ("answered", "")]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_prediction_that_takes_too_long_is_stopped(
    settings: NodeSettings, spool: Spool, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "predict", lambda *_, **__: time.sleep(60))
    journal.close()
    worker = make_worker(settings, spool, Journal(spool.journal), series_seconds=0.1, retry_seconds=(3600.0,))
    assert run_in_child(worker) == TIMEOUT_EXIT_CODE
    assert states(Journal(spool.journal))[0] == ("ready", "too-slow")
