from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from medim.tracking import outbox as module
from medim.tracking.outbox import RECORDS, STATE, Outbox, OutboxRecord, OutboxSender


class Server:
    """Takes records while it is up."""

    def __init__(self) -> None:
        self.up, self.got = True, []  # type: tuple[bool, list[Record]]

    def __call__(self, journal: Outbox, records: list[OutboxRecord]) -> None:
        for record in records:
            if not self.up:
                raise ConnectionError("refused")
            self.got.append(record)
            journal.acknowledge(1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.01)


def test_all_records_arrive_in_their_order_and_nothing_is_left(tmp_path: Path) -> None:
    journal, server = Outbox(tmp_path), Server()
    courier = OutboxSender(journal, server)
    courier.start()
    for n in range(250):
        journal.add({"n": n})
    assert courier.finish(10) == 0
    assert [record["n"] for record in server.got] == list(range(250))
    assert not (tmp_path / RECORDS).exists()


def test_a_server_that_is_away_for_a_while_loses_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medim")
    journal, server = Outbox(tmp_path), Server()
    server.up = False
    courier = OutboxSender(journal, server)
    courier.start()
    for n in range(10):
        journal.add({"n": n})
    while "does not accept records" not in caplog.text:
        pass
    courier.join(0.1)
    server.up = True
    assert courier.finish(10) == 0
    assert [record["n"] for record in server.got] == list(range(10))
    assert caplog.text.count("does not accept records") == caplog.text.count("accepts records again") == 1


def test_what_a_server_never_took_is_kept_and_sent_by_the_next_process(tmp_path: Path) -> None:
    journal, server = Outbox(tmp_path), Server()
    courier = OutboxSender(journal, server)
    courier.start()
    journal.add({"n": 0})
    while not server.got:
        pass
    server.up = False
    journal.add({"n": 1})
    assert courier.finish(0.1) == 1
    assert (tmp_path / RECORDS).is_file()
    server.up = True
    later = Outbox(tmp_path)
    later.add({"n": 2})
    resumed = OutboxSender(later, server)
    resumed.start()
    assert resumed.finish(10) == 0
    assert [record["n"] for record in server.got] == [0, 1, 2]


def test_a_line_that_a_kill_cut_is_taken_off(tmp_path: Path) -> None:
    Outbox(tmp_path).add({"n": 0})
    with (tmp_path / RECORDS).open("a") as file:
        file.write('{"n": ')
    later = Outbox(tmp_path)
    later.add({"n": 1})
    assert Outbox(tmp_path).pending() == [{"n": 0}, {"n": 1}]


def test_spoilt_lines_are_told_and_the_rest_is_sent_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Outbox(tmp_path)
    for n in range(4):
        journal.add({"n": n})
    journal.acknowledge(1)
    lines = (tmp_path / RECORDS).read_bytes().splitlines()
    (tmp_path / RECORDS).write_bytes(b"\n".join([lines[0], lines[1], lines[2][:4] + b"\0" * 4, lines[3], b""]))
    later = Outbox(tmp_path)
    later.add({"n": 4})
    assert "is damaged; 2 readable records are left" in caplog.text
    assert Outbox(tmp_path).pending() == [{"n": 1}, {"n": 3}, {"n": 4}]


@pytest.mark.parametrize("damage", [{"step": 10**23}, {"step": -1}, {"step": "a"}, {}, {"step": 1, "metrics": [1]}])
def test_a_record_without_a_valid_step_is_left_out(tmp_path: Path, damage: dict[str, object]) -> None:
    damaged, whole = {"metrics": {"loss": 1.0}, **damage}, {"metrics": {"loss": 2.0}, "step": 3}
    (tmp_path / RECORDS).write_text(f"{json.dumps(damaged)}\n{json.dumps(whole)}\n")
    assert Outbox(tmp_path).pending() == [whole]


def test_a_journal_that_lost_lines_it_had_sent_keeps_what_comes_next(tmp_path: Path) -> None:
    journal = Outbox(tmp_path)
    for n in range(3):
        journal.add({"n": n})
    journal.acknowledge(3)
    (tmp_path / RECORDS).write_text('{"n": 0}\n')  # the disk had kept no more
    Outbox(tmp_path).add({"n": 3})
    assert Outbox(tmp_path).pending() == [{"n": 3}]


def test_how_many_arrived_is_known_after_a_kill(tmp_path: Path) -> None:
    journal = Outbox(tmp_path)
    for n in range(3):
        journal.add({"n": n})
    journal.acknowledge(2)
    assert (tmp_path / STATE).is_file()
    assert Outbox(tmp_path).pending() == [{"n": 2}]


def test_what_is_measured_is_sent_with_the_rest(tmp_path: Path) -> None:
    journal, server = Outbox(tmp_path), Server()
    courier = OutboxSender(journal, server, measure=lambda: {"busy": 1}, measure_seconds=0.0)
    courier.start()
    while len(server.got) < 3:
        pass
    assert courier.finish(10) == 0
    assert server.got[0] == {"busy": 1}


@pytest.mark.parametrize(
    "content",
    [
        '{"run": 5, "sent": -4}',
        '{"last": {"a": 100000000000000000000000}}',
        '{"run": "a", "sent": -4}',
        '{"last": 3}',
        '{"last": {"a": "b"}}',
        "[",
        "[]",
    ],
)
def test_an_invalid_delivery_state_is_reported_and_all_records_are_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / RECORDS).write_text('{"n": 0}\n{"n": 1}\n')
    (tmp_path / STATE).write_text(content)
    outbox, server = Outbox(tmp_path), Server()
    sender = OutboxSender(outbox, server)
    sender.start()
    assert sender.finish(10) == 0
    assert [record["n"] for record in server.got] == [0, 1]
    assert "the state of the delivery is ignored" in caplog.text
