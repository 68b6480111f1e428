"""Inspect many files in parallel, and cache the results until a file changes.

The results are stored in the user's cache folder, in one SQLite file per source. The key is the pseudonym of the file's
path, and an entry is valid while size and time of the file stay the same. The cache contains no identities.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medim.data.parallel import map_in_processes
from medim.data.readers import SANDBOXED_READERS
from medim.data.readers.base import DECODER, ReadError
from medim.data.readers.inspection import INSPECTION_ADAPTER, FileInspection, RejectedFile
from medim.files import cache_folder
from medim.privacy import make_pseudonym
from medim.version import __version__

log = logging.getLogger(__name__)

InspectFn = Callable[[Path], FileInspection]
ProgressCallback = Callable[[int, int], None]

_CACHE_VERSION = f"{__version__}/17"  # increase the number if a reader changes its result for the same file
_CACHE_BATCH = 1000  # inspections per write
_MIN_PARALLEL_FILES = 64  # with fewer files, starting processes takes longer than inspecting
# reasons that can change without a change of the file: a network drive, an installed package, the free memory
_TRANSIENT_REASONS = {
    "missing", "reader-failed", "reader-missing", "too-much-memory", "too-slow", "unreadable", "worker-died"
}  # fmt: skip
_PATH_FIELDS: Any = {"images": {"__all__": {"files"}}, "rejected": {"__all__": {"path"}}, "instance": {"path"}}


def inspect_file(inspect: InspectFn, path: Path) -> FileInspection:
    """Inspect one file, in the decoding process if there is one; an error of the reader becomes a rejection."""
    decoder, reader = DECODER.get(), getattr(inspect, "__self__", None)
    try:
        if decoder is not None and reader in SANDBOXED_READERS:
            return decoder.inspect(path).with_path(path)
        return inspect(path).with_path(path)
    except ReadError as error:
        return FileInspection(rejected=(RejectedFile(path=path, reason=error.reason, detail=error.detail),))
    except OSError as error:  # removed, or no permission
        detail = f"the file cannot be opened ({error.strerror})"
        return FileInspection(rejected=(RejectedFile(path=path, reason="unreadable", detail=detail),))
    except MemoryError:
        detail = "the file does not fit into memory"
        return FileInspection(rejected=(RejectedFile(path=path, reason="too-much-memory", detail=detail),))
    except Exception as error:  # a bug in a reader must not abort an index of thousands of files
        detail = f"the reader failed ({type(error).__name__}); please report it"
        return FileInspection(rejected=(RejectedFile(path=path, reason="reader-failed", detail=detail),))


def _inspect_batch(inspect: InspectFn, paths: Sequence[Path]) -> list[FileInspection]:
    return [inspect_file(inspect, path) for path in paths]


class FileScanner:
    """Parallel inspection of files, with cached results for unchanged files.

    Args:
        source: root folder of the files, which selects the cache; None disables the cache.
        jobs: number of processes; with more than one, a script needs the usual `if __name__ == "__main__":`.
        progress: called with the number of processed files and the total, both counted per reader.

    Attributes:
        n_inspected: files opened so far.
        n_cached: files found in the cache so far.
    """

    def __init__(self, source: Path | None = None, *, jobs: int = 1, progress: ProgressCallback | None = None) -> None:
        self.n_inspected = self.n_cached = 0
        self._cache = ScanCache(cache_folder() / "looks" / f"{make_pseudonym(str(source))}.sqlite") if source else None
        self._jobs = jobs
        self._progress = progress

    def __call__(self, inspect: InspectFn, paths: Sequence[Path]) -> list[FileInspection]:
        """Inspect files, in the given order; `inspect` is a method of a reader or a module-level function."""
        # read before the inspection, because a file may be being written
        states = {path: _read_file_state(path) for path in paths} if self._cache else {}
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
                path=path, reason="worker-died", detail="the process that read the file was killed or crashed"
            )
            yield path, inspection or FileInspection(rejected=(rejected,))


class ScanCache:
    """Cached inspections. If the database cannot be used, the cache is disabled and every file is inspected."""

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
        """Yield the files with an unchanged state and their cached inspections."""
        for path, state in states.items():
            row = self._select_row(_cache_key(inspect, path))
            if row is None or state is None or row[0] != state:
                continue
            try:
                yield path, INSPECTION_ADAPTER.validate_json(row[1]).with_path(path)
            except ValidationError:
                log.debug("a cached inspection is damaged; the file is read again")

    def put(self, inspect: InspectFn, inspections: Sequence[tuple[Path, str | None, FileInspection]]) -> None:
        """Store the inspections of files in their current state, except rejections with a transient reason."""
        rows = [
            (_cache_key(inspect, path), state, INSPECTION_ADAPTER.dump_json(inspection, exclude=_PATH_FIELDS))
            for path, state, inspection in inspections
            if not any(rejected.reason in _TRANSIENT_REASONS for rejected in inspection.rejected)
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
        log.warning("the inspection cache cannot be used (%s); all files are read", type(error).__name__)
        self._database = None


def _cache_key(inspect: InspectFn, path: Path) -> str:
    owner = getattr(inspect, "__self__", None)
    name = type(owner).__name__ if owner is not None else inspect.__qualname__
    return make_pseudonym(f"{name} {path}", prefix="f")


def _read_file_state(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:  # removed; such a file is not cached
        return None
    # ctime also changes with the permissions
    return f"{_CACHE_VERSION} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
