from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from medim.node.deliveries import (
    AnswerFile,
    commit_answers,
    list_answers,
    list_pending,
    list_purgeable,
    record_delivery,
)
from medim.node.journal import Journal, find_broken_event
from medim.node.series import ReceivedInstance

IMAGE = ReceivedInstance(series="s", sop="a", sha256="1", n_bytes=10, peer="SCANNER")
FILES = [AnswerFile(name="2.25.1", kind="seg-0", sop="k1"), AnswerFile(name="2.25.2", kind="sr-1", sop="k2")]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.db")


def answer(journal: Journal, destinations: tuple[str, ...] = ("PACS",)) -> bool:
    (series,) = journal.list_series()
    journal.set_state("s", series.version, "ready")
    claim = journal.claim_series("w")
    assert claim is not None
    return commit_answers(journal, "w", claim, "p", FILES, destinations)


def state(journal: Journal) -> tuple[str, str]:
    (series,) = journal.list_series()
    return series.state, series.reason


def test_an_image_is_stored_once_and_another_content_under_its_name_is_a_conflict(journal: Journal) -> None:
    assert journal.add_instance(IMAGE, "hold") == "stored"
    assert journal.add_instance(IMAGE, "hold") == "duplicate"
    assert journal.add_instance(replace(IMAGE, sha256="2"), "hold") == "conflict"
    (series,) = journal.list_series("receiving")
    assert (series.n_instances, series.version) == (1, 1)
    assert journal.find_digest("a") == "1"


def test_a_committed_image_is_there_for_another_process(journal: Journal, tmp_path: Path) -> None:
    journal.add_instance(IMAGE, "hold")
    assert Journal(tmp_path / "journal.db").find_digest("a") == "1"


def test_every_commit_is_flushed_to_disk(journal: Journal) -> None:
    assert journal.query("PRAGMA synchronous")[0][0] == 2
    assert journal.query("PRAGMA journal_mode")[0][0] == "wal"


def test_a_series_is_claimed_by_one_worker_only(journal: Journal) -> None:
    for number in range(5):
        journal.add_instance(replace(IMAGE, series=f"s{number}", sop=f"a{number}"), "hold")
        journal.set_state(f"s{number}", 1, "ready")
    claims: list[str] = []

    def work(name: str) -> None:
        while (claim := journal.claim_series(name)) is not None:
            claims.append(claim.key)

    threads = [threading.Thread(target=work, args=[f"w{number}"]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == [f"s{number}" for number in range(5)]


def test_an_image_that_arrives_during_a_prediction_takes_the_claim(journal: Journal) -> None:
    journal.add_instance(IMAGE, "hold")
    journal.set_state("s", 1, "ready")
    claim = journal.claim_series("w")
    assert claim is not None
    journal.add_instance(replace(IMAGE, sop="b"), "hold")
    assert not commit_answers(journal, "w", claim, "p", FILES, ["PACS"])
    assert not journal.end_claim("w", "s", "rejected", "x")
    assert state(journal) == ("receiving", "")
    assert list_answers(journal, "s") == []


def test_a_decision_about_an_older_set_of_images_has_no_effect(journal: Journal) -> None:
    journal.add_instance(IMAGE, "hold")
    journal.add_instance(replace(IMAGE, sop="b"), "hold")
    assert not journal.set_state("s", 1, "ready")
    assert journal.set_state("s", 2, "ready")


def test_an_answer_is_recorded_once_for_each_destination(journal: Journal) -> None:
    journal.add_instance(IMAGE, "hold")
    assert answer(journal, ("PACS", "RIS"))
    assert answer(journal, ("PACS", "RIS"))  # the same set again
    assert list_answers(journal, "s") == ["2.25.1", "2.25.2"]
    for destination in ("PACS", "RIS"):
        assert [one.answer for one in list_pending(journal, destination, 60.0)] == ["2.25.1", "2.25.2"]
    assert journal.is_own_answer("k1")


@pytest.mark.parametrize(("late", "expected"), [("hold", ("held", "late-instances")), ("replace", ("receiving", ""))])
def test_an_image_after_the_answer_is_put_on_hold_or_starts_a_new_one(
    journal: Journal, late: str, expected: tuple[str, str]
) -> None:
    journal.add_instance(IMAGE, "hold")
    answer(journal)
    for sop in ("b", "c"):
        journal.add_instance(replace(IMAGE, sop=sop), late)  # type: ignore[arg-type]
    assert state(journal) == expected


def test_an_image_after_the_deletion_of_its_series_is_put_on_hold(journal: Journal) -> None:
    journal.add_instance(IMAGE, "hold")
    answer(journal)
    journal.set_state("s", 1, "purged")
    journal.add_instance(replace(IMAGE, sop="b"), "replace")
    assert state(journal) == ("held", "late-after-purge")


def test_a_series_is_purgeable_after_all_deliveries_and_the_time_to_keep(journal: Journal) -> None:
    journal.add_instance(IMAGE, "hold")
    answer(journal)
    for delivery in list_pending(journal, "PACS", 60.0):
        assert list_purgeable(journal, 0.0) == []
        record_delivery(journal, delivery, "PACS", "delivered", "0000")
    assert list_purgeable(journal, 3600.0) == []
    assert list_purgeable(journal, -1.0) == ["s"]


def test_an_answer_without_a_destination_is_not_deleted(journal: Journal) -> None:
    journal.add_instance(IMAGE, "hold")
    answer(journal, ())
    assert list_purgeable(journal, -1.0) == []


def test_a_rejected_delivery_waits_and_does_not_block_the_next(journal: Journal) -> None:
    journal.add_instance(IMAGE, "hold")
    answer(journal)
    record_delivery(journal, list_pending(journal, "PACS", 60.0)[0], "PACS", "pending", "C000")
    assert [one.answer for one in list_pending(journal, "PACS", 60.0)] == ["2.25.2"]
    assert [one.tries for one in list_pending(journal, "PACS", 0.0)] == [1, 0]


def test_times_in_the_future_are_corrected(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 7200)
        journal.add_instance(IMAGE, "hold")
        journal.set_state("s", 1, "ready")
        journal.claim_series("w")
        journal.end_claim("w", "s", "ready", delay=60.0)
    journal.shift_clock()
    (series,) = journal.list_series()
    assert series.last_at <= time.time()
    assert journal.claim_series("w") is not None


def test_an_open_association_belongs_to_the_series_that_it_sent(journal: Journal) -> None:
    number = journal.open_association("SCANNER")
    journal.add_instance(replace(IMAGE, association=number), "hold")
    journal.add_instance(replace(IMAGE, series="t", sop="b"), "hold")
    assert {one.key: one.is_open for one in journal.list_series()} == {"s": True, "t": False}
    journal.close_association(number)
    assert not any(one.is_open for one in journal.list_series())


def test_a_change_in_the_audit_trail_is_found(journal: Journal) -> None:
    for number in range(5):
        journal.record_event("test", str(number), n=number)
    assert find_broken_event(journal) is None
    with journal.transaction() as transaction:
        transaction.execute("UPDATE event SET detail = ? WHERE id = 3", "{}")
    assert find_broken_event(journal) == 3


def test_a_removed_event_is_found(journal: Journal) -> None:
    for number in range(5):
        journal.record_event("test", str(number))
    with journal.transaction() as transaction:
        transaction.execute("DELETE FROM event WHERE id = 2")
    assert find_broken_event(journal) == 2


def test_an_error_inside_a_transaction_leaves_nothing(journal: Journal) -> None:
    def fail() -> None:
        with journal.transaction() as transaction:
            transaction.record_event("test")
            transaction.execute("INSERT INTO series (key) VALUES ('x')")

    with pytest.raises(sqlite3.IntegrityError):
        fail()
    assert journal.query("SELECT * FROM event") == []
