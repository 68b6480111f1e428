"""Outbox of a run: records for the tracking server, stored on disk until they have arrived.

A record is first written to disk and later sent by a separate thread, so a slow or unreachable server neither delays a
step nor loses a number. Records that are unsent when the run ends or is killed stay in the folder of the run.
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
from medim.types import UserError

log = logging.getLogger(__name__)
OutboxRecord = dict[str, Any]
SendFunction = Callable[["Outbox", list[OutboxRecord]], object]
RECORDS, STATE = "mlflow.jsonl", "mlflow.json"
EVERY_SECONDS = 2.0  # between two deliveries, or two attempts
BATCH_SIZE = 200  # records per delivery
MAX_STEP = 2**53  # of a record: MLflow stores steps as 64-bit integers


class Outbox:
    """Records of a run in `mlflow.jsonl`, and the state of the delivery in `mlflow.json`.

    Args:
        out: folder of the run; the unsent records of an earlier process are read.
        folder: folder of the two files; None: `out`.

    Attributes:
        out: folder of the files that records name.
        state: `run` (run id of MLflow), `sent` (number of records of the file that were sent), `last` (last step of
            each metric).
    """

    def __init__(self, out: Path, folder: Path | None = None) -> None:
        self.out = out
        self._folder = folder or out
        self._path = self._folder / RECORDS
        self._lock = threading.Lock()
        self.state = _read_state(self._folder / STATE)
        self.last: dict[str, int] = self.state.setdefault("last", {})
        self._pending = self._read_pending()
        for record in self._pending:
            self._update_last_steps(record)
        self._file = self._path.open("a", encoding="utf-8")

    def _read_pending(self) -> list[OutboxRecord]:
        """Read the unsent records; damaged lines, left by a kill or a full disk, are logged and removed."""
        if not self._path.is_file():
            return []
        text = self._path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        n_sent = self.state.get("sent", 0)
        records = [record for line in lines[n_sent:] if (record := _parse_record(line))]
        if len(records) != len(lines) - n_sent or not text.endswith("\n"):
            log.warning("tracking: %s is damaged; %d readable records are left to send", self._path, len(records))
            self.state["sent"] = 0
            write_json(self._folder / STATE, self.state)
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def add(self, record: OutboxRecord) -> None:
        """Write a record to disk; a record with `metrics` has a `step`."""
        with self._lock:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self._pending.append(record)
            self._update_last_steps(record)

    def _update_last_steps(self, record: OutboxRecord) -> None:
        for name in record.get("metrics", ()):
            self.last[name] = max(record["step"], self.last.get(name, -1))

    def pending(self, limit: int | None = None) -> list[OutboxRecord]:
        """List the oldest records that have not arrived."""
        with self._lock:
            return self._pending[:limit]

    def acknowledge(self, count: int) -> None:
        """Record that the oldest `count` records have arrived."""
        with self._lock:
            del self._pending[:count]
            self.state["sent"] = self.state.get("sent", 0) + count
            write_json(self._folder / STATE, self.state)

    def close(self) -> None:
        """Close the file, and delete it if no record is pending."""
        with self._lock:
            self._file.close()
            if not self._pending:
                self.state["sent"] = 0
                write_json(self._folder / STATE, self.state)
                self._path.unlink(missing_ok=True)


def _read_state(path: Path) -> dict[str, Any]:
    """Read the state of the delivery; an invalid file is logged, and all records are sent again."""
    if not path.is_file():
        return {}
    try:
        state = read_json(path)
        run, sent, last = state.get("run"), state.get("sent", 0), state.get("last", {})
        if not isinstance(run, str | None) or not isinstance(last, dict):
            raise UserError(f"{path}: expected a run id and a table of steps.")
        if not all(_is_step(step) for step in (sent, *last.values())):
            raise UserError(f"{path}: expected steps and counts of 0 to {MAX_STEP}.")
    except UserError as error:
        log.warning("tracking: the state of the delivery is ignored (%s)", error)
        return {}
    return state


def format_server_error(error: Exception) -> str:
    """Format the first line of an error, without passwords in addresses and without the SQL below it."""
    return re.sub(r"//[^/@\s]*@", "//", str(error).partition("\n")[0])


def _parse_record(line: str) -> OutboxRecord | None:
    """Parse the record of a line; None if the line is incomplete or is no record."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    metrics = content.get("metrics", {})
    return content if isinstance(metrics, dict) and (not metrics or _is_step(content.get("step"))) else None


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_STEP


class OutboxSender(threading.Thread):
    """Thread that sends the records of an outbox in order and retries until they arrive.

    Args:
        outbox: outbox to send.
        send: function that sends records, oldest first, or raises; records that had already arrived may be sent again.
        measure: function that returns a record of measurements; called before a delivery, at most every
            `measure_seconds`. None disables measurements.
        measure_seconds: shortest time between two measurements.
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
        """Send records until the sender is closed, and either all have arrived or the time is over."""
        last_measurement = -float("inf")
        while True:
            closing = self._closing.is_set()
            if self._measure and not closing and time.monotonic() - last_measurement >= self._measure_seconds:
                last_measurement = time.monotonic()
                with suppress(Exception):  # a system or driver without this figure
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
        except Exception as error:  # any failure of a server, a network or a disk
            if self._offline_since is None:
                self._offline_since = time.monotonic()
                log.warning(
                    "tracking: the server does not accept records (%s); they are kept and sent again",
                    format_server_error(error),
                )
            return False
        if self._offline_since is not None:
            log.info("tracking: the server accepts records again after %.0f s", time.monotonic() - self._offline_since)
            self._offline_since = None
        return True

    def finish(self, seconds: float) -> int:
        """Send the pending records within the given time, and close the outbox.

        Args:
            seconds: longest time for sending.

        Returns:
            Number of records that have not arrived.
        """
        self._deadline = time.monotonic() + seconds
        self._closing.set()
        self.join(seconds + 15.0)  # a request in progress may last until its time-out
        self._outbox.close()
        return len(self._outbox.pending())
