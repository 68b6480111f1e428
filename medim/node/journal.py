"""Journal of a node: an SQLite database with the state of every image, series, answer and delivery.

The journal and the files of the spool are the only truth about the work of a node. A change is committed to disk before
it has an effect elsewhere, so any process of the node may be killed at any time. Several processes open the journal at
once. It contains no identities: images and series have keyed hashes of their UIDs as names.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from medim.node.series import ClaimedSeries, ReceivedInstance, SeriesState, SeriesStatus, StoreResult, hash_set
from medim.node.settings import LatePolicy

EventListener = Callable[[str, str, Mapping[str, object]], None]  # arguments: event, key, details
LATE, LATE_AFTER_PURGE = "late-instances", "late-after-purge"  # reasons of a series on hold
MAX_DELAY = 3600.0  # seconds until a further attempt; a longer one is due to a clock that was set back
_BUSY_SECONDS = 20.0  # wait for the lock of another process
_SCHEMA = """
CREATE TABLE IF NOT EXISTS instance (
    sop TEXT PRIMARY KEY, series TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, peer TEXT NOT NULL,
    association INTEGER, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS instance_series ON instance (series);
CREATE TABLE IF NOT EXISTS series (
    key TEXT PRIMARY KEY, state TEXT NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL,
    is_object INTEGER NOT NULL, n_expected INTEGER NOT NULL DEFAULT 0, n_acquired INTEGER NOT NULL DEFAULT 0,
    version INTEGER NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '', claim TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS series_state ON series (state, next_at);
CREATE TABLE IF NOT EXISTS association (
    id INTEGER PRIMARY KEY AUTOINCREMENT, peer TEXT NOT NULL, opened_at REAL NOT NULL, closed_at REAL);
CREATE TABLE IF NOT EXISTS answer (
    id TEXT PRIMARY KEY, series TEXT NOT NULL, set_sha TEXT NOT NULL, package_sha TEXT NOT NULL, kind TEXT NOT NULL,
    sop TEXT NOT NULL, at REAL NOT NULL, UNIQUE (series, set_sha, package_sha, kind)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answer_sop ON answer (sop);
CREATE TABLE IF NOT EXISTS delivery (
    answer TEXT NOT NULL, destination TEXT NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '', at REAL NOT NULL, PRIMARY KEY (answer, destination)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS delivery_state ON delivery (destination, state);
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS event (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, what TEXT NOT NULL, key TEXT NOT NULL,
    detail TEXT NOT NULL, digest TEXT NOT NULL);
"""


class Journal:
    """Connection to the journal, for all threads of a process.

    Args:
        path: database file, created if it does not exist.
        listener: called after the commit of each event.
        busy_seconds: time to wait for the lock of another process.
    """

    def __init__(
        self, path: Path, listener: EventListener | None = None, *, busy_seconds: float = _BUSY_SECONDS
    ) -> None:
        self._database = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        self._lock = threading.RLock()
        self._listener = listener
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[JournalTransaction]:
        """Commit all changes of the block to disk at its end, or none after an error."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            transaction = JournalTransaction(self._database)
            try:
                yield transaction
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
        if self._listener is not None:
            for event in transaction.events:
                self._listener(*event)

    def query(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Read rows."""
        with self._lock:
            return self._database.execute(sql, values).fetchall()

    def record_event(self, what: str, key: str = "", **detail: object) -> None:
        """Append an event to the audit trail."""
        with self.transaction() as transaction:
            transaction.record_event(what, key, **detail)

    def count_up(self, name: str) -> None:
        """Add 1 to a counter."""
        with self.transaction() as transaction:
            transaction.count_up(name)

    # Images

    def find_digest(self, sop: str) -> str | None:
        """Return the digest of a stored image."""
        rows = self.query("SELECT sha256 FROM instance WHERE sop = ?", sop)
        return str(rows[0]["sha256"]) if rows else None

    def is_own_answer(self, sop: str) -> bool:
        """Whether an object is an answer of this node."""
        return bool(self.query("SELECT 1 FROM answer WHERE sop = ?", sop))

    def add_instance(self, instance: ReceivedInstance, late: LatePolicy) -> StoreResult:
        """Add an image. A new image makes its series incomplete again.

        Args:
            instance: image with its file in the spool.
            late: treatment of an image that arrives after the answer.
        """
        now = time.time()
        with self.transaction() as transaction:
            row = transaction.select("SELECT sha256 FROM instance WHERE sop = ?", instance.sop)
            if row is not None:
                result: StoreResult = "duplicate" if row["sha256"] == instance.sha256 else "conflict"
                transaction.count_up(result)
                return result
            transaction.execute(
                "INSERT INTO instance VALUES (?, ?, ?, ?, ?, ?, ?)",
                *(instance.sop, instance.series, instance.sha256, instance.n_bytes, instance.peer),
                *(instance.association, now),
            )
            transaction.count_up("received")
            self._add_to_series(transaction, instance, late, now)
        return "stored"

    def _add_to_series(
        self, transaction: JournalTransaction, instance: ReceivedInstance, late: LatePolicy, now: float
    ) -> None:
        """Create or change the series of a new image."""
        series = transaction.select("SELECT * FROM series WHERE key = ?", instance.series)
        if series is None:
            transaction.execute(
                "INSERT INTO series (key, state, first_at, last_at, is_object, n_expected, n_acquired, version) "
                "VALUES (?, 'receiving', ?, ?, ?, ?, ?, 1)",
                *(instance.series, now, now, instance.is_object, instance.n_expected, instance.n_acquired),
            )
            transaction.record_event("series-received", instance.series, peer=instance.peer)
            return
        state, reason = "receiving", ""
        if series["state"] == "purged" or series["reason"] == LATE_AFTER_PURGE:
            state, reason = "held", LATE_AFTER_PURGE
        elif late == "hold" and (series["state"] == "answered" or series["reason"] == LATE):
            state, reason = "held", LATE
        transaction.execute(
            "UPDATE series SET state = ?, reason = ?, last_at = ?, n_expected = MAX(n_expected, ?), "
            "n_acquired = MAX(n_acquired, ?), version = version + 1, tries = 0, next_at = 0, claim = '' WHERE key = ?",
            *(state, reason, now, instance.n_expected, instance.n_acquired, instance.series),
        )
        if (state, reason) != (series["state"], series["reason"]):
            transaction.record_event(
                f"series-{state}", instance.series, reason=reason or "new-instance", before=series["state"]
            )

    # Associations

    def open_association(self, peer: str) -> int:
        """Record an association and return its number."""
        with self.transaction() as transaction:
            number = transaction.execute("INSERT INTO association (peer, opened_at) VALUES (?, ?)", peer, time.time())
            transaction.record_event("association-opened", peer=peer, association=number)
        return number

    def close_association(self, number: int | None = None) -> None:
        """Record the end of an association; None ends those of a receiver that was killed."""
        with self.transaction() as transaction:
            transaction.execute(
                "UPDATE association SET closed_at = ? WHERE closed_at IS NULL AND (id = ? OR ? IS NULL)",
                *(time.time(), number, number),
            )

    # Series

    def list_series(self, *states: SeriesState) -> list[SeriesStatus]:
        """List the series in some states, or all, the oldest first."""
        condition = f"WHERE state IN ({', '.join('?' * len(states))})" if states else ""
        return self._select_series(condition, *states)

    def find_series(self, key: str) -> SeriesStatus | None:
        """Return the state of a series."""
        rows = self._select_series("WHERE key = ?", key)
        return rows[0] if rows else None

    def _select_series(self, condition: str, *values: object) -> list[SeriesStatus]:
        rows = self.query(
            "SELECT key, state, reason, first_at, last_at, n_expected, n_acquired, is_object, version, tries, "
            "(SELECT COUNT(*) FROM instance WHERE series = key) AS n_instances, "
            "EXISTS (SELECT 1 FROM instance JOIN association ON association.id = instance.association "
            f"WHERE series = key AND closed_at IS NULL) AS is_open FROM series {condition} ORDER BY first_at, key",
            *values,
        )
        return [
            SeriesStatus(**{**dict(row), "is_object": bool(row["is_object"]), "is_open": bool(row["is_open"])})
            for row in rows
        ]

    def set_state(self, key: str, version: int, state: SeriesState, reason: str = "") -> bool:
        """Change the state of a series without a claim, unless an image arrived since `version`."""
        with self.transaction() as transaction:
            changed = transaction.execute(
                "UPDATE series SET state = ?, reason = ?, next_at = 0 WHERE key = ? AND version = ? AND claim = ''",
                *(state, reason, key, version),
            )
            if changed:
                transaction.record_event(f"series-{state}", key, **({"reason": reason} if reason else {}))
        return bool(changed)

    def set_expected(self, key: str, n_expected: int) -> None:
        """Set the number of images of a series that an archive reported."""
        with self.transaction() as transaction:
            transaction.execute("UPDATE series SET n_expected = MAX(n_expected, ?) WHERE key = ?", n_expected, key)

    def shift_clock(self) -> None:
        """Correct times in the future, after the clock was set back."""
        now = time.time()
        with self.transaction() as transaction:
            transaction.execute("UPDATE series SET last_at = ? WHERE last_at > ?", now, now)
            transaction.execute("UPDATE series SET next_at = ? WHERE next_at > ?", now, now + MAX_DELAY)

    # Predictions

    def claim_series(self, worker: str) -> ClaimedSeries | None:
        """Reserve the oldest series that is ready for a worker; None if there is none."""
        now = time.time()
        due = "state = 'ready' AND next_at <= ?"
        if not self.query(f"SELECT 1 FROM series WHERE {due} LIMIT 1", now):
            return None
        with self.transaction() as transaction:
            row = transaction.select(f"SELECT key, tries FROM series WHERE {due} ORDER BY first_at LIMIT 1", now)
            if row is None:
                return None
            transaction.execute("UPDATE series SET state = 'predicting', claim = ? WHERE key = ?", worker, row["key"])
            rows = transaction.select_all("SELECT sop, sha256 FROM instance WHERE series = ?", row["key"])
        digests = {str(one["sop"]): str(one["sha256"]) for one in rows}
        return ClaimedSeries(key=row["key"], digests=digests, set_sha=hash_set(digests), tries=row["tries"])

    def end_claim(
        self, worker: str, key: str, state: SeriesState, reason: str = "", *, delay: float | None = None
    ) -> bool:
        """End the prediction of a series without an answer.

        Args:
            worker: name of the worker with the claim.
            key: key of the series.
            state: new state.
            reason: stable code.
            delay: seconds until the next attempt; None does not count the attempt as failed.

        Returns:
            Whether the worker had the claim; it loses the claim if an image arrives.
        """
        with self.transaction() as transaction:
            changed = transaction.execute(
                "UPDATE series SET state = ?, reason = ?, claim = '', tries = tries + ?, next_at = ? "
                "WHERE key = ? AND claim = ?",
                *(state, reason, delay is not None, time.time() + (delay or 0), key, worker),
            )
            if changed:
                transaction.record_event(f"series-{state}", key, **({"reason": reason} if reason else {}))
        return bool(changed)

    def list_claims(self, worker: str = "") -> list[SeriesStatus]:
        """List the series that a worker, or any worker, has reserved."""
        return self._select_series("WHERE claim = ? OR (? = '' AND claim != '')", worker, worker)


class JournalTransaction:
    """Changes of the journal that are committed together.

    Args:
        database: connection inside a transaction.

    Attributes:
        events: event, key and details of each event so far.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.events: list[tuple[str, str, Mapping[str, object]]] = []

    def execute(self, sql: str, *values: object) -> int:
        """Change rows; return the number of the inserted row, or the count of changed rows."""
        cursor = self._database.execute(sql, values)
        return int((cursor.lastrowid if sql.startswith("INSERT") else cursor.rowcount) or 0)

    def select(self, sql: str, *values: object) -> sqlite3.Row | None:
        """Read the first row; None if there is none."""
        row: sqlite3.Row | None = self._database.execute(sql, values).fetchone()
        return row

    def select_all(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Read all rows."""
        return self._database.execute(sql, values).fetchall()

    def count_up(self, name: str) -> None:
        """Add 1 to a counter."""
        self._database.execute("INSERT INTO counter VALUES (?, 1) ON CONFLICT DO UPDATE SET n = n + 1", (name,))

    def record_event(self, what: str, key: str = "", **detail: object) -> None:
        """Append an event to the audit trail. Its digest depends on all events before."""
        text, now = json.dumps(detail, sort_keys=True), time.time()
        last = self.select("SELECT digest FROM event ORDER BY id DESC LIMIT 1")
        digest = hash_event(last["digest"] if last else "", now, what, key, text)
        self._database.execute(
            "INSERT INTO event (at, what, key, detail, digest) VALUES (?, ?, ?, ?, ?)", (now, what, key, text, digest)
        )
        self.events.append((what, key, detail))


def hash_event(previous: str, at: float, what: str, key: str, detail: str) -> str:
    """Compute the digest of an event of the audit trail from the digest of the event before."""
    return hashlib.sha256(f"{previous} {at!r} {what} {key} {detail}".encode()).hexdigest()


def find_broken_event(journal: Journal) -> int | None:
    """Return the number of the first event that was changed or removed afterwards; None if the trail is intact."""
    previous = ""
    for number, row in enumerate(journal.query("SELECT * FROM event ORDER BY id"), start=1):
        if row["id"] != number or row["digest"] != hash_event(
            previous, row["at"], row["what"], row["key"], row["detail"]
        ):
            return number
        previous = str(row["digest"])
    return None
