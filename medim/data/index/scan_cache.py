"""Looking at many files: in several processes, and only at those that changed since the last time.

What was seen of a file is remembered in the user's cache folder, one SQLite file a source, under the pseudonym of the
file's path and as long as its size and time stay. Like a sight itself it holds no identity.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from medim.data.parallel import map_in_processes
from medim.data.readers.base import ReadError
from medim.data.readers.inspection import FileInspection, RejectedFile
from medim.files import cache_folder
from medim.privacy import make_pseudonym
from medim.version import __version__

log = logging.getLogger(__name__)

InspectFn = Callable[[Path], FileInspection]
ProgressCallback = Callable[[int, int], None]

_CACHE_VERSION = f"{__version__}/5"  # raise the number where a reader sees something else in the same file
_CACHE_BATCH = 1000  # sights that are written down at once
_MIN_PARALLEL_FILES = 64  # files that one process has looked at before another one has started
_TRANSIENT_REASONS = {
    "missing",
    "reader-failed",
    "reader-missing",
    "unreadable",
    "worker-died",
}  # a network drive, a package
_INSPECTION_ADAPTER = TypeAdapter(FileInspection)
_PATH_FIELDS: Any = {"found": {"__all__": {"files"}}, "refused": {"__all__": {"path"}}, "instance": {"path"}}


def inspect_file(inspect: InspectFn, path: Path) -> FileInspection:
    """Look at one file; a reader's error is what was seen."""
    try:
        return inspect(path).with_path(path)
    except ReadError as error:
        return FileInspection(refused=(RejectedFile(path=path, reason=error.reason, detail=error.detail),))
    except OSError as error:  # it vanished, or may not be read
        detail = f"the file cannot be opened ({error.strerror})"
        return FileInspection(refused=(RejectedFile(path=path, reason="unreadable", detail=detail),))
    except Exception as error:  # a reader's mistake: one file must not end an index of thousands
        detail = f"the reader failed ({type(error).__name__}); please report it"
        return FileInspection(refused=(RejectedFile(path=path, reason="reader-failed", detail=detail),))


def _inspect_batch(inspect: InspectFn, paths: Sequence[Path]) -> list[FileInspection]:
    return [inspect_file(inspect, path) for path in paths]


class FileScanner:
    """Looks at files, or remembers.

    Args:
        source: folder that the memory is of; None remembers nothing.
        jobs: processes; with more than one, a script needs the usual `if __name__ == "__main__":`.
        progress: called with the number of files seen, and of all, reader by reader.

    Attributes:
        n_inspected: files opened so far.
        n_cached: files remembered so far.
    """

    def __init__(self, source: Path | None = None, *, jobs: int = 1, progress: ProgressCallback | None = None) -> None:
        self.n_inspected = self.n_cached = 0
        self._cache = ScanCache(cache_folder() / "looks" / f"{make_pseudonym(str(source))}.sqlite") if source else None
        self._jobs = jobs
        self._progress = progress

    def __call__(self, inspect: InspectFn, paths: Sequence[Path]) -> list[FileInspection]:
        """What is in each file, in the order given; `inspect` is a reader's, or another function of a module."""
        states = (
            {path: _read_file_state(path) for path in paths} if self._cache else {}
        )  # before: a copy may be under way
        inspections: dict[Path, FileInspection] = dict(self._cache.get(inspect, states)) if self._cache else {}
        self.n_cached += len(inspections)
        new_paths = [path for path in paths if path not in inspections]
        unsaved_paths: list[Path] = []
        for path, inspection in self._inspect_new(inspect, new_paths):
            inspections[path] = inspection
            unsaved_paths.append(path)
            self.n_inspected += 1
            if self._progress:
                self._progress(len(inspections), len(paths))
            if self._cache and (len(unsaved_paths) >= _CACHE_BATCH or len(inspections) == len(paths)):
                self._cache.put(inspect, [(path, states[path], inspections[path]) for path in unsaved_paths])
                unsaved_paths.clear()
        return [inspections.pop(path) for path in paths]

    def _inspect_new(self, inspect: InspectFn, paths: Sequence[Path]) -> Iterator[tuple[Path, FileInspection]]:
        if self._jobs == 1 or len(paths) < _MIN_PARALLEL_FILES:
            yield from ((path, inspect_file(inspect, path)) for path in paths)
            return
        for path, inspection in map_in_processes(partial(_inspect_batch, inspect), paths, self._jobs, max_batch=256):
            rejected = RejectedFile(
                path=path, reason="worker-died", detail="the process that read it was killed or crashed"
            )
            yield path, inspection or FileInspection(refused=(rejected,))


class ScanCache:
    """What was seen of files; a database that cannot be used is left alone, and every file is looked at again."""

    def __init__(self, file: Path) -> None:
        self._database: sqlite3.Connection | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS sights (file TEXT PRIMARY KEY, state TEXT, sight BLOB) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            self._disable(error)

    def get(self, inspect: InspectFn, states: Mapping[Path, str | None]) -> Iterator[tuple[Path, FileInspection]]:
        """Those files that are as they were, with what was seen of them."""
        for path, state in states.items():
            row = self._select_row(_cache_key(inspect, path))
            if row is None or state is None or row[0] != state:
                continue
            try:
                yield path, _INSPECTION_ADAPTER.validate_json(row[1]).with_path(path)
            except ValidationError:
                log.debug("a remembered sight is damaged; the file is read again")

    def put(self, inspect: InspectFn, inspections: Sequence[tuple[Path, str | None, FileInspection]]) -> None:
        """Remember what was seen of files in a state, but for what has its cause outside the file."""
        rows = [
            (_cache_key(inspect, path), state, _INSPECTION_ADAPTER.dump_json(inspection, exclude=_PATH_FIELDS))
            for path, state, inspection in inspections
            if not any(rejected.reason in _TRANSIENT_REASONS for rejected in inspection.refused)
        ]
        try:
            if self._database is not None:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT OR REPLACE INTO sights VALUES (?, ?, ?)", rows)
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._disable(error)

    def _select_row(self, key: str) -> tuple[str, bytes] | None:
        if self._database is None:
            return None
        try:
            row: tuple[str, bytes] | None = self._database.execute(
                "SELECT state, sight FROM sights WHERE file = ?", (key,)
            ).fetchone()
        except sqlite3.Error as error:
            self._disable(error)
            return None
        return row

    def _disable(self, error: Exception) -> None:
        log.warning("what files held last time cannot be remembered (%s); all are read", type(error).__name__)
        self._database = None


def _cache_key(inspect: InspectFn, path: Path) -> str:
    owner = getattr(inspect, "__self__", None)
    name = type(owner).__name__ if owner is not None else inspect.__qualname__
    return make_pseudonym(f"{name} {path}", prefix="f")


def _read_file_state(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:  # it vanished, and is known by no state
        return None
    return f"{_CACHE_VERSION} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"  # ctime: permissions, too
