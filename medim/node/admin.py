"""Commands for the operator of a node: list, show, retry and drop series."""

from __future__ import annotations

import time
from pathlib import Path

from medim.node.journal import Journal, find_broken_event
from medim.node.monitor import count_deliveries, count_states, read_counters
from medim.node.series import SeriesStatus
from medim.node.settings import read_settings
from medim.node.spool import Spool
from medim.types import UserError

_RETRYABLE = {"held", "rejected", "dead", "answered"}
_N_EVENTS = 20  # newest events of a series


class NodeAdmin:
    """Access to the journal of a node, which may be running.

    Args:
        spool_folder: folder of the spool.

    Raises:
        UserError: the folder is not the spool of a node.
    """

    def __init__(self, spool_folder: Path) -> None:
        self.settings = read_settings(spool_folder)
        self._spool = Spool(spool_folder)
        self._journal = Journal(self._spool.journal)

    def describe_node(self) -> dict[str, object]:
        """Describe the counts of the node, and the series without an answer."""
        rows: dict[str, object] = {f"series {state}": n for state, n in count_states(self._journal).items()}
        rows |= {f"{destination} {state}": n for (destination, state), n in count_deliveries(self._journal).items()}
        rows |= {name.replace("_", " "): n for name, n in read_counters(self._journal).items()}
        rows["free disk"] = f"{self._spool.free_bytes() / 2**30:.1f} GiB"
        broken = find_broken_event(self._journal)
        rows["audit trail"] = "intact" if broken is None else f"changed at event {broken}"
        for series in self._journal.list_series("held", "rejected", "dead"):
            rows[series.key] = f"{series.state}: {series.reason}"
        return rows

    def describe_series(self, key: str) -> dict[str, object]:
        """Describe a series: its state, images, answers, deliveries and newest events.

        Raises:
            UserError: there is no such series, or several.
        """
        series = self._find_series(key)
        rows: dict[str, object] = {
            "key": series.key,
            "state": f"{series.state} {series.reason}".strip(),
            "images": f"{series.n_instances} of {series.n_expected or series.n_acquired or 'an unknown number'}",
            "failed attempts": series.tries,
            "seconds since the last image": round(time.time() - series.last_at),
        }
        for row in self._journal.query(
            "SELECT kind, destination, delivery.state, delivery.reason FROM answer LEFT JOIN delivery "
            "ON delivery.answer = answer.id WHERE series = ? ORDER BY answer.at, kind, destination",
            series.key,
        ):
            rows[f"{row['kind']} to {row['destination'] or 'outbox'}"] = f"{row['state'] or ''} {row['reason'] or ''}"
        events = self._journal.query(
            "SELECT at, what, detail FROM event WHERE key = ? ORDER BY id DESC LIMIT ?", series.key, _N_EVENTS
        )
        for number, row in enumerate(reversed(events), start=1):
            rows[f"event {number}"] = f"{row['what']} {row['detail']}"
        return rows

    def retry_series(self, key: str) -> str:
        """Predict a series again, or send its answer again where a destination rejected it.

        Returns:
            Name of the action: `predict` or `send`.

        Raises:
            UserError: there is no such series, or it is not in a state to be tried again.
        """
        series = self._find_series(key)
        if series.state not in _RETRYABLE or series.reason == "late-after-purge":
            raise UserError(
                f"{series.key}: a series in the state {series.state} {series.reason} cannot be tried again. "
                "Use `medim serve drop`, and send it again."
            )
        if series.state == "answered":
            with self._journal.transaction() as transaction:
                n_changed = transaction.execute(
                    "UPDATE delivery SET state = 'pending', tries = 0 WHERE state = 'dead' AND answer IN "
                    "(SELECT id FROM answer WHERE series = ?)",
                    series.key,
                )
                transaction.record_event("operator-retry", series.key, deliveries=n_changed)
            return "send"
        self._change_series(series, "UPDATE series SET state = 'ready', reason = '', tries = 0, next_at = 0", "retry")
        return "predict"

    def drop_series(self, key: str) -> None:
        """Delete the images of a series, so that it can be sent again; its answers are not deleted.

        Raises:
            UserError: there is no such series, or a worker predicts it.
        """
        series = self._find_series(key)
        self._change_series(series, "UPDATE series SET state = 'dropped', reason = '', version = version + 1", "drop")
        self._spool.remove_series(series.key)
        with self._journal.transaction() as transaction:
            transaction.execute("DELETE FROM instance WHERE series = ?", series.key)

    def _find_series(self, key: str) -> SeriesStatus:
        """Find a series by its key or the beginning of it."""
        matches = [series for series in self._journal.list_series() if key and series.key.startswith(key)]
        if len(matches) != 1:
            problem = "no series has" if not matches else f"{len(matches)} series have"
            raise UserError(f"{key}: {problem} a key that begins so. Use `medim serve status` to list the keys.")
        return matches[0]

    def _change_series(self, series: SeriesStatus, update: str, action: str) -> None:
        """Change a series that no worker predicts.

        Raises:
            UserError: the series changed meanwhile.
        """
        with self._journal.transaction() as transaction:
            n_changed = transaction.execute(
                f"{update} WHERE key = ? AND version = ? AND claim = ''", series.key, series.version
            )
            if not n_changed:
                raise UserError(f"{series.key}: the series changed meanwhile, or a worker predicts it. Try again.")
            transaction.record_event(f"operator-{action}", series.key, before=series.state)
