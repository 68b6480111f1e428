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

from medim.data.parallel import in_processes
from medim.data.readers.base import ReadError
from medim.data.readers.inspection import Refused, Sight
from medim.files import cache_folder
from medim.privacy import pseudonym
from medim.version import __version__

log = logging.getLogger(__name__)

Look = Callable[[Path], Sight]
Progress = Callable[[int, int], None]

_READING = f"{__version__}/5"  # raise the number where a reader sees something else in the same file
_SAVED = 1000  # sights that are written down at once
_FEW = 64  # files that one process has looked at before another one has started
_PASSING = {"missing", "reader-failed", "reader-missing", "unreadable", "worker-died"}  # a network drive, a package
_SIGHT = TypeAdapter(Sight)
_PATHS: Any = {"found": {"__all__": {"files"}}, "refused": {"__all__": {"path"}}, "instance": {"path"}}


def look_at(look: Look, path: Path) -> Sight:
    """Look at one file; a reader's error is what was seen."""
    try:
        return look(path).at(path)
    except ReadError as error:
        return Sight(refused=(Refused(path=path, reason=error.reason, detail=error.detail),))
    except OSError as error:  # it vanished, or may not be read
        detail = f"the file cannot be opened ({error.strerror})"
        return Sight(refused=(Refused(path=path, reason="unreadable", detail=detail),))
    except Exception as error:  # a reader's mistake: one file must not end an index of thousands
        detail = f"the reader failed ({type(error).__name__}); please report it"
        return Sight(refused=(Refused(path=path, reason="reader-failed", detail=detail),))


def _batch(look: Look, paths: Sequence[Path]) -> list[Sight]:
    return [look_at(look, path) for path in paths]


class Looks:
    """Looks at files, or remembers.

    Args:
        source: folder that the memory is of; None remembers nothing.
        jobs: processes; with more than one, a script needs the usual `if __name__ == "__main__":`.
        progress: called with the number of files seen, and of all, reader by reader.

    Attributes:
        opened: files opened so far.
        known: files remembered so far.
    """

    def __init__(self, source: Path | None = None, *, jobs: int = 1, progress: Progress | None = None) -> None:
        self.opened = self.known = 0
        self._memory = Memory(cache_folder() / "looks" / f"{pseudonym(str(source))}.sqlite") if source else None
        self._jobs = jobs
        self._progress = progress

    def __call__(self, look: Look, paths: Sequence[Path]) -> list[Sight]:
        """What is in each file, in the order given; `look` is a reader's, or another function of a module."""
        states = {path: _state(path) for path in paths} if self._memory else {}  # before: a copy may be under way
        sights: dict[Path, Sight] = dict(self._memory.recall(look, states)) if self._memory else {}
        self.known += len(sights)
        new = [path for path in paths if path not in sights]
        fresh: list[Path] = []
        for path, sight in self._look(look, new):
            sights[path] = sight
            fresh.append(path)
            self.opened += 1
            if self._progress:
                self._progress(len(sights), len(paths))
            if self._memory and (len(fresh) >= _SAVED or len(sights) == len(paths)):
                self._memory.keep(look, [(path, states[path], sights[path]) for path in fresh])
                fresh.clear()
        return [sights.pop(path) for path in paths]

    def _look(self, look: Look, paths: Sequence[Path]) -> Iterator[tuple[Path, Sight]]:
        if self._jobs == 1 or len(paths) < _FEW:
            yield from ((path, look_at(look, path)) for path in paths)
            return
        for path, sight in in_processes(partial(_batch, look), paths, self._jobs, most=256):
            died = Refused(path=path, reason="worker-died", detail="the process that read it was killed or crashed")
            yield path, sight or Sight(refused=(died,))


class Memory:
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
            self._give_up(error)

    def recall(self, look: Look, states: Mapping[Path, str | None]) -> Iterator[tuple[Path, Sight]]:
        """Those files that are as they were, with what was seen of them."""
        for path, state in states.items():
            row = self._row(_key(look, path))
            if row is None or state is None or row[0] != state:
                continue
            try:
                yield path, _SIGHT.validate_json(row[1]).at(path)
            except ValidationError:
                log.debug("a remembered sight is damaged; the file is read again")

    def keep(self, look: Look, looks: Sequence[tuple[Path, str | None, Sight]]) -> None:
        """Remember what was seen of files in a state, but for what has its cause outside the file."""
        rows = [
            (_key(look, path), state, _SIGHT.dump_json(sight, exclude=_PATHS))
            for path, state, sight in looks
            if not any(refused.reason in _PASSING for refused in sight.refused)
        ]
        try:
            if self._database is not None:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT OR REPLACE INTO sights VALUES (?, ?, ?)", rows)
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._give_up(error)

    def _row(self, key: str) -> tuple[str, bytes] | None:
        if self._database is None:
            return None
        try:
            row: tuple[str, bytes] | None = self._database.execute(
                "SELECT state, sight FROM sights WHERE file = ?", (key,)
            ).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return row

    def _give_up(self, error: Exception) -> None:
        log.warning("what files held last time cannot be remembered (%s); all are read", type(error).__name__)
        self._database = None


def _key(look: Look, path: Path) -> str:
    owner = getattr(look, "__self__", None)
    name = type(owner).__name__ if owner is not None else look.__qualname__
    return pseudonym(f"{name} {path}", prefix="f")


def _state(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:  # it vanished, and is known by no state
        return None
    return f"{_READING} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"  # ctime: permissions, too
