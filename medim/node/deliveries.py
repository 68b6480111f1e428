"""Answers in the journal, and their deliveries to each destination."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from medim.node.journal import Journal
from medim.node.series import ClaimedSeries


@dataclass(frozen=True, kw_only=True)
class AnswerFile:
    """One DICOM object of an answer.

    Attributes:
        name: name of its file in the outbox.
        kind: `seg` or `sr`, and a number if the series has several images.
        sop: key of its SOPInstanceUID.
    """

    name: str
    kind: str
    sop: str


@dataclass(frozen=True, kw_only=True)
class PendingDelivery:
    """An object that a destination has not confirmed.

    Attributes:
        answer: name of the file in the outbox.
        series: key of the source series.
        tries: number of rejections by the destination.
    """

    answer: str
    series: str
    tries: int


def commit_answers(
    journal: Journal,
    worker: str,
    claim: ClaimedSeries,
    package_sha256: str,
    files: Sequence[AnswerFile],
    destinations: Sequence[str],
) -> bool:
    """Record the answer of a series and its deliveries. The files are in the outbox already.

    Returns:
        Whether the worker still had the claim; it loses the claim if an image arrives.
    """
    now = time.time()
    with journal.transaction() as transaction:
        changed = transaction.execute(
            "UPDATE series SET state = 'answered', reason = '', claim = '' WHERE key = ? AND claim = ?",
            *(claim.key, worker),
        )
        if not changed:
            return False
        for file in files:
            transaction.execute(
                "INSERT OR IGNORE INTO answer VALUES (?, ?, ?, ?, ?, ?, ?)",
                *(file.name, claim.key, claim.set_sha, package_sha256, file.kind, file.sop, now),
            )
            for destination in destinations:
                transaction.execute(
                    "INSERT OR IGNORE INTO delivery (answer, destination, state, at) VALUES (?, ?, 'pending', ?)",
                    *(file.name, destination, now),
                )
        transaction.record_event("series-answered", claim.key, objects=len(files), images=len(claim.digests))
    return True


def list_pending(journal: Journal, destination: str, retry_seconds: float, limit: int = 50) -> list[PendingDelivery]:
    """List the deliveries of a destination in the order of the answers.

    Args:
        journal: journal of the node.
        destination: application entity.
        retry_seconds: delay after a rejection by the destination.
        limit: maximum number of deliveries.
    """
    rows = journal.query(
        "SELECT answer, series, tries FROM delivery JOIN answer ON answer.id = delivery.answer "
        "WHERE destination = ? AND state = 'pending' AND (tries = 0 OR ABS(? - delivery.at) >= ?) "
        "ORDER BY answer.at, kind LIMIT ?",
        *(destination, time.time(), retry_seconds, limit),
    )
    return [PendingDelivery(answer=row["answer"], series=row["series"], tries=row["tries"]) for row in rows]


def record_delivery(journal: Journal, delivery: PendingDelivery, destination: str, state: str, reason: str) -> None:
    """Record the response of a destination: `delivered`, `pending` after a rejection, or `dead`."""
    with journal.transaction() as transaction:
        transaction.execute(
            "UPDATE delivery SET state = ?, reason = ?, tries = tries + ?, at = ? WHERE answer = ? AND destination = ?",
            *(state, reason, state != "delivered", time.time(), delivery.answer, destination),
        )
        if state != "pending":
            transaction.record_event(f"answer-{state}", delivery.series, destination=destination, status=reason)


def list_purgeable(journal: Journal, keep_seconds: float) -> list[str]:
    """List the answered series with all deliveries confirmed for some time."""
    rows = journal.query(
        "SELECT key FROM series WHERE series.state = 'answered' "
        "AND EXISTS (SELECT 1 FROM answer JOIN delivery ON delivery.answer = answer.id WHERE answer.series = key) "
        "AND NOT EXISTS (SELECT 1 FROM answer JOIN delivery ON delivery.answer = answer.id WHERE answer.series = key "
        "AND (delivery.state != 'delivered' OR delivery.at > ?))",
        time.time() - keep_seconds,
    )
    return [str(row["key"]) for row in rows]


def list_answers(journal: Journal, series: str) -> list[str]:
    """List the names of the answers of a series."""
    return [str(row["id"]) for row in journal.query("SELECT id FROM answer WHERE series = ? ORDER BY id", series)]


def list_earlier_reports(journal: Journal, series: str, set_sha: str) -> list[str]:
    """List the names of the newest reports about another set of images of a series."""
    rows = journal.query(
        "SELECT id, kind FROM answer WHERE series = ? AND set_sha != ? AND kind LIKE 'sr-%' AND at = "
        "(SELECT MAX(at) FROM answer WHERE series = ? AND set_sha != ?)",
        *(series, set_sha, series, set_sha),
    )
    return [str(row["id"]) for row in sorted(rows, key=lambda row: int(row["kind"].removeprefix("sr-")))]
