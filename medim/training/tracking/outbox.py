"""What is on its way to a tracking server: on the disk of the run until it has arrived.

A record is written down first and sent afterwards, from a thread of its own, so a server that is slow, away or gone
costs a run no step and no number: what a kill, or the end of the run, finds unsent stays in the run's folder.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from medim.files import read_json, write_json, write_text

log = logging.getLogger(__name__)
OutboxRecord = dict[str, Any]
SendFunction = Callable[["Outbox", list[OutboxRecord]], None]
RECORDS, STATE = "mlflow.jsonl", "mlflow.json"
EVERY_SECONDS = 2.0  # between two deliveries, or two tries
BATCH_SIZE = 200  # records in a delivery


class Outbox:
    """Records in `mlflow.jsonl` of a run's folder, and in `mlflow.json` what is known of the run and how many arrived.

    Args:
        out: the run's folder; what an earlier process left there is taken up.

    Attributes:
        state: `run` (MLflow's id), `sent` (records of the file), `last` (the last step of each metric).
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._path = out / RECORDS
        self._lock = threading.Lock()
        self.state: dict[str, Any] = read_json(out / STATE) if (out / STATE).is_file() else {}
        self.last: dict[str, int] = self.state.setdefault("last", {})
        self._pending = self._read_pending()
        for record in self._pending:
            self._update_last_steps(record)
        self._file = self._path.open("a", encoding="utf-8")

    def _read_pending(self) -> list[OutboxRecord]:
        """What was not sent; what a kill or a full disk has spoilt is told and taken off."""
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        n_sent = self.state.get("sent", 0)
        records = [record for line in lines[n_sent:] if (record := _parse_record(line))]
        if len(records) != len(lines) - n_sent or not text.endswith("\n"):
            log.warning("tracking: %s: not whole; %d records are left to send", self._path, len(records))
            self.state["sent"] = 0
            write_json(self.out / STATE, self.state)
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def add(self, record: OutboxRecord) -> None:
        """Write a record down; one with `metrics` has a `step`."""
        with self._lock:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self._pending.append(record)
            self._update_last_steps(record)

    def _update_last_steps(self, record: OutboxRecord) -> None:
        for name in record.get("metrics", ()):
            self.last[name] = max(record["step"], self.last.get(name, -1))

    def pending(self, limit: int | None = None) -> list[OutboxRecord]:
        """The oldest records that have not arrived."""
        with self._lock:
            return self._pending[:limit]

    def acknowledge(self, count: int) -> None:
        """Note that the oldest `count` have arrived."""
        with self._lock:
            del self._pending[:count]
            self.state["sent"] = self.state.get("sent", 0) + count
            write_json(self.out / STATE, self.state)

    def close(self) -> None:
        """Close the file, and remove it where nothing waits."""
        with self._lock:
            self._file.close()
            if not self._pending:
                self.state["sent"] = 0
                write_json(self.out / STATE, self.state)
                self._path.unlink(missing_ok=True)


def _parse_record(line: str) -> OutboxRecord | None:
    """What a line holds; None where it is not whole."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


class OutboxSender(threading.Thread):
    """Sends a journal's records in their order, and again until they arrive.

    Args:
        outbox: whose.
        send: delivers records, oldest first, or raises; what had arrived before may be sent a second time.
        measure: asked for a record before a delivery, at most every `measure_seconds`; None where there is none.
        measure_seconds: see `measure`.
    """

    def __init__(
        self,
        outbox: Outbox,
        send: SendFunction,
        *,
        measure: Callable[[], OutboxRecord] | None = None,
        measure_seconds: float = 10.0,
    ) -> None:
        super().__init__(daemon=True, name="medim-tracking")
        self._outbox, self._send = outbox, send
        self._measure, self._measure_seconds = measure, measure_seconds
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._offline_since: float | None = None

    def run(self) -> None:
        """Deliver until closed and done, or closed and out of time."""
        last_measurement = -float("inf")
        while True:
            closing = self._closing.is_set()
            if self._measure and not closing and time.monotonic() - last_measurement >= self._measure_seconds:
                last_measurement = time.monotonic()
                with suppress(Exception):  # what a system or a driver does not tell
                    self._outbox.add(self._measure())
            success = self._send_batch()
            if closing and ((success and not self._outbox.pending(1)) or time.monotonic() > self._deadline):
                return
            if not success or not self._outbox.pending(1):
                self._pause(closing)

    def _pause(self, closing: bool) -> None:
        if closing:
            time.sleep(min(EVERY_SECONDS, max(0.0, self._deadline - time.monotonic()) + 0.01))
        else:
            self._closing.wait(EVERY_SECONDS)

    def _send_batch(self) -> bool:
        records = self._outbox.pending(BATCH_SIZE)
        if not records:
            return True
        try:
            self._send(self._outbox, records)
        except Exception as error:  # whatever a server, a network or a disk may do to it
            if self._offline_since is None:
                self._offline_since = time.monotonic()
                message = re.sub(r"//[^/@\s]*@", "//", str(error))  # no password
                log.warning("tracking: the server does not take records (%s); they are kept, and sent again", message)
            return False
        if self._offline_since is not None:
            log.info("tracking: the server answers again after %.0f s", time.monotonic() - self._offline_since)
            self._offline_since = None
        return True

    def finish(self, seconds: float) -> int:
        """Send what waits, for at most so long.

        Returns:
            How many records have not arrived.
        """
        self._deadline = time.monotonic() + seconds
        self._closing.set()
        self.join(seconds + 15.0)  # a request that is on may take its time-out
        self._outbox.close()
        return len(self._outbox.pending())
