from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from medim.node.completeness import Closer, Decision, Geometry, decide_series
from medim.node.journal import Journal
from medim.node.series import SeriesStatus
from medim.node.settings import NodeSettings
from medim.node.spool import Spool
from tests.node.network.test_receiver import running, send_to
from tests.node.senders import make_series

COMPLETE = Geometry("complete")


def make_status(**changes: Any) -> SeriesStatus:
    """A series of 8 images, the last of them at time 0."""
    values = {
        "key": "s", "state": "receiving", "reason": "", "first_at": -5.0, "last_at": 0.0, "n_instances": 8,
        "n_expected": 0, "n_acquired": 0, "is_object": False, "is_open": False, "version": 8, "tries": 0,
    }  # fmt: skip
    return SeriesStatus(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "now", "unconfirmed", "geometry", "expected"),
    [
        # a number of the sender or of an archive
        ({"n_expected": 8}, 0, "hold", None, Decision("ready")),
        ({"n_expected": 9}, 40, "answer", None, None),
        ({"n_expected": 9}, 2000, "answer", None, Decision("held", "fewer-than-expected")),
        # an X-ray, or a multi-frame object
        ({"is_object": True, "n_instances": 1}, 0, "hold", None, Decision("ready")),
        # time without a new image
        ({}, 29, "answer", None, None),
        ({"is_open": True}, 40, "answer", None, None),
        ({"is_open": True}, 2000, "answer", COMPLETE, Decision("ready", "unconfirmed-count")),
        # ImagesInAcquisition
        ({"n_acquired": 8}, 29, "hold", None, None),
        ({"n_acquired": 8}, 31, "hold", COMPLETE, Decision("ready")),
        ({"n_acquired": 4}, 31, "hold", COMPLETE, Decision("ready")),
        ({"n_acquired": 5}, 31, "hold", COMPLETE, None),
        # no number
        ({}, 31, "answer", COMPLETE, Decision("ready", "unconfirmed-count")),
        ({}, 31, "hold", COMPLETE, None),
        ({}, 2000, "hold", COMPLETE, Decision("held", "unconfirmed-count")),
        # geometry
        ({}, 31, "answer", Geometry("incomplete", "missing-slices"), None),
        ({}, 2000, "answer", Geometry("incomplete", "missing-slices"), Decision("held", "missing-slices")),
        ({}, 31, "hold", Geometry("unusable", "localizer"), Decision("ready")),
    ],
)
def test_a_series_is_ready_on_hold_or_waits(
    settings: NodeSettings,
    changes: dict[str, Any],
    now: float,
    unconfirmed: str,
    geometry: Geometry | None,
    expected: Decision | None,
) -> None:
    settings = settings.model_copy(update={"unconfirmed": unconfirmed})

    def inspect() -> Geometry:
        assert geometry is not None, "the geometry is not needed here"
        return geometry

    assert decide_series(make_status(**changes), now, settings, inspect) == expected


@pytest.mark.parametrize(
    ("omitted", "expected"),
    [((), "ready"), ((0,), "fewer-slices-than-numbered"), ((4,), "missing-slices"), ((7,), "ready")],
)
def test_the_geometry_and_the_numbers_show_a_missing_slice_except_the_last(
    settings: NodeSettings, spool: Spool, omitted: tuple[int, ...], expected: str
) -> None:
    policy = {"unconfirmed": "answer", "quiet_seconds": 1e-3, "max_wait_seconds": 2e-3}
    with running(settings, spool) as receiver:
        send_to(receiver, [one for k, one in enumerate(make_series(0)) if k not in omitted])
    journal = Journal(spool.journal)
    journal.close_association()
    Closer(settings.model_copy(update=policy), spool, journal).decide_all()
    (series,) = journal.list_series()
    assert expected in {series.state, series.reason}


def test_the_last_slice_is_missed_if_the_header_has_the_number_of_images(settings: NodeSettings, spool: Spool) -> None:
    policy = {"unconfirmed": "answer", "quiet_seconds": 1e-3, "max_wait_seconds": 2e-3}
    with running(settings, spool) as receiver:
        send_to(receiver, make_series(0, ImagesInAcquisition=8)[:-1])
    journal = Journal(spool.journal)
    journal.close_association()
    Closer(settings.model_copy(update=policy), spool, journal).decide_all()
    (series,) = journal.list_series()
    assert (series.state, series.reason) == ("held", "fewer-slices-than-numbered")


def test_a_delivered_series_is_deleted_from_the_spool(settings: NodeSettings, spool: Spool, tmp_path: Path) -> None:
    from medim.node.deliveries import AnswerFile, commit_answers, list_pending, record_delivery

    with running(settings, spool) as receiver:
        send_to(receiver, make_series(0))
    journal = Journal(spool.journal)
    (series,) = journal.list_series()
    journal.set_state(series.key, series.version, "ready")
    claim = journal.claim_series("w")
    assert claim is not None
    spool.locate_answer("2.25.1").write_bytes(b"answer")
    commit_answers(journal, "w", claim, "p", [AnswerFile(name="2.25.1", kind="seg-0", sop="k")], ["PACS"])
    closer = Closer(settings.model_copy(update={"keep_hours": 0.0}), spool, journal)
    closer.purge_delivered()
    assert spool.list_series() == [series.key]
    record_delivery(journal, list_pending(journal, "PACS", 60.0)[0], "PACS", "delivered", "0000")
    closer.purge_delivered()
    assert spool.list_series() == []
    assert not spool.locate_answer("2.25.1").exists()
    assert [one.state for one in journal.list_series()] == ["purged"]


def test_a_clock_that_is_set_back_delays_no_series(
    settings: NodeSettings, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 3600)
        with running(settings, spool) as receiver:
            send_to(receiver, make_series(0, ImagesInAcquisition=8))
        journal = Journal(spool.journal)
        journal.close_association()
        closer = Closer(settings, spool, journal)
        closer.decide_all()
    closer.decide_all()
    monkeypatch.setattr(time, "time", lambda: now + settings.quiet_seconds + 10)
    closer.decide_all()
    assert [one.state for one in journal.list_series()] == ["ready"]
