"""Closer of a node: decides whether all images of a series have arrived.

DICOM has no message for the end of a series. The number of images is compared with a number of the sender or of an
archive, if there is one. Geometry alone cannot show that slices at an end are missing.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from medim.data.index.index import AllRejectedError, build_index
from medim.data.readers import ReadError
from medim.node.deliveries import list_answers, list_purgeable
from medim.node.event_log import log_failure
from medim.node.journal import Journal
from medim.node.network.query import count_series_images
from medim.node.series import SeriesStatus
from medim.node.settings import NodeSettings
from medim.node.spool import Spool
from medim.types import UserError

_LOOK_SECONDS = 0.5  # seconds between two looks at the journal
_QUERY_PERIOD = 15.0  # seconds between two queries about one series
_PURGE_PERIOD = 60.0
_CURABLE_REASONS = {  # of series that further images can complete
    "missing-slices",
    "uneven-gaps",
    "incomplete-series",
}
_INCOMPLETE_QUALITY = {"fewer-slices-than-numbered", "damaged-neighbour", "single-slice"}


@dataclass(frozen=True)
class Geometry:
    """Result of the reader for the images of a series.

    Attributes:
        state: `complete` if the images form even stacks, `incomplete` if further images can change the result, or
            `unusable`.
        reason: stable code, unless complete.
    """

    state: Literal["complete", "incomplete", "unusable"]
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """New state of a series, with the reason of a hold."""

    state: Literal["ready", "held"]
    reason: str = ""


def decide_series(
    series: SeriesStatus, now: float, settings: NodeSettings, inspect: Callable[[], Geometry]
) -> Decision | None:
    """Decide whether a series is complete; None waits for further images.

    Args:
        series: state of the series.
        now: time in seconds since 1970.
        settings: waiting times and policies.
        inspect: function that reads the geometry; called only if the decision depends on it.
    """
    if series.is_object or (series.n_expected and series.n_instances >= series.n_expected):
        return Decision("ready")
    idle_seconds = now - series.last_at
    overdue = idle_seconds >= settings.max_wait_seconds
    if not overdue and (idle_seconds < settings.quiet_seconds or series.is_open):
        return None
    if series.n_expected:
        return Decision("held", "fewer-than-expected") if overdue else None
    geometry = inspect()
    if geometry.state == "unusable":
        return Decision("ready")  # for the code of the reader or of the package
    if geometry.state == "incomplete":
        return Decision("held", geometry.reason) if overdue else None
    if series.n_acquired and series.n_instances % series.n_acquired == 0:
        return Decision("ready")
    if settings.unconfirmed == "answer":
        return Decision("ready", "unconfirmed-count")
    return Decision("held", "unconfirmed-count") if overdue else None


class Closer:
    """Process that decides about series, and deletes delivered ones after some time.

    Args:
        settings: settings of the node.
        spool: folder of the files.
        journal: journal of the node.
    """

    def __init__(self, settings: NodeSettings, spool: Spool, journal: Journal) -> None:
        self._settings, self._spool, self._journal = settings, spool, journal
        self._geometries: dict[str, tuple[int, Geometry]] = {}  # version and result by series
        self._query_times: dict[str, float] = {}
        self._last_time = 0.0

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Decide about all series until `is_stopped`."""
        next_purge = 0.0
        while not is_stopped():
            try:
                self.decide_all()
                if time.monotonic() >= next_purge:
                    self.purge_delivered()
                    next_purge = time.monotonic() + _PURGE_PERIOD
            except (sqlite3.Error, OSError) as error:  # a locked journal, a full disk
                log_failure("closer-failed", error)
            time.sleep(_LOOK_SECONDS)

    def decide_all(self) -> None:
        """Decide about each series that is receiving images."""
        now = time.time()
        if now < self._last_time or not self._last_time:
            self._journal.shift_clock()
        self._last_time = now
        series_list = self._journal.list_series("receiving")
        for series in series_list:
            decision = decide_series(series, time.time(), self._settings, lambda series=series: self._inspect(series))  # type: ignore[misc]
            if decision is not None:
                self._journal.set_state(series.key, series.version, decision.state, decision.reason)
            elif self._settings.ask is not None and not series.is_open and series.n_expected == 0:
                self._query_count(series)
        keys = {series.key for series in series_list}
        self._geometries = {key: value for key, value in self._geometries.items() if key in keys}
        self._query_times = {key: value for key, value in self._query_times.items() if key in keys}

    def purge_delivered(self) -> None:
        """Delete the images and answers of the series that were delivered some time ago."""
        for key in list_purgeable(self._journal, self._settings.keep_hours * 3600):
            series = self._journal.find_series(key)
            if series is not None and self._journal.set_state(key, series.version, "purged"):
                self._spool.remove_answers(list_answers(self._journal, key))
        for key in self._spool.list_series():  # also after a kill between the two steps
            series = self._journal.find_series(key)
            if series is not None and series.state == "purged":
                self._spool.remove_series(key)

    def _inspect(self, series: SeriesStatus) -> Geometry:
        """Read the geometry of a series, once per set of images."""
        version, geometry = self._geometries.get(series.key, (0, Geometry("incomplete")))
        if version != series.version:
            geometry = self._read_geometry(series.key)
            self._geometries[series.key] = series.version, geometry
        return geometry

    def _read_geometry(self, key: str) -> Geometry:
        rows = self._journal.query("SELECT sop FROM instance WHERE series = ? ORDER BY sop", key)
        paths = [self._spool.locate_instance(key, str(row["sop"])) for row in rows]
        try:
            index = build_index(paths, self._settings.modality, remember=False)
        except AllRejectedError as error:
            reasons = [rejection.reason for rejection in error.index.rejected]
            return next(
                (Geometry("incomplete", reason) for reason in reasons if reason in _CURABLE_REASONS),
                Geometry("unusable", reasons[0]),
            )
        except (ReadError, UserError):
            return Geometry("unusable", "unreadable")
        index.log_unidentified()
        incomplete = [rejection.reason for rejection in index.rejected if rejection.reason in _CURABLE_REASONS]
        incomplete += [
            code for record in index.records for code in (record.quality or "").split() if code in _INCOMPLETE_QUALITY
        ]
        return Geometry("incomplete", incomplete[0]) if incomplete else Geometry("complete")

    def _query_count(self, series: SeriesStatus) -> None:
        """Query the archive for the number of images of a series."""
        assert self._settings.ask is not None
        idle_seconds = time.time() - series.last_at
        if idle_seconds < self._settings.quiet_seconds or time.monotonic() < self._query_times.get(series.key, 0.0):
            return
        self._query_times[series.key] = time.monotonic() + _QUERY_PERIOD
        rows = self._journal.query("SELECT sop FROM instance WHERE series = ? LIMIT 1", series.key)
        path = self._spool.locate_instance(series.key, str(rows[0]["sop"]))
        count = count_series_images(path, self._settings.ask, self._settings.ae_title, self._settings.tls)
        if count:
            self._journal.set_expected(series.key, count)
