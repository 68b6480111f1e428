"""Every file of a source, and what in it is no file: nothing is passed over in silence, nothing is waited for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from medim.data.readers.inspection import Refused

_NO_FOLDER = "a folder that cannot be opened; what lies in it is not known. Check its permissions"
_NO_READ = "a file that may not be read. Check its permissions"
_NO_FILE = "a link to nothing, or a pipe, socket or device"


def walk(places: Iterable[Path]) -> list[Path]:
    """The files that `survey` finds."""
    return survey(places)[0]


def survey(places: Iterable[Path]) -> tuple[list[Path], list[Refused]]:
    """Every file of the sources, once and sorted; links are followed, names that start with a dot are left out.

    Returns:
        the files, and what cannot be opened: a folder, a file without permission, a broken link, a pipe.
    """
    files: set[Path] = set()
    strays: dict[Path, Refused] = {}
    for place in places:
        if place.is_file():
            files.add(place)
            continue
        open_folders, seen = [place], set()
        while open_folders:  # not recursive: a tree may be deeper than Python's stack
            folder = open_folders.pop()
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    inside = [entry for entry in entries if not entry.name.startswith(".")]
                    inside.sort(key=lambda entry: entry.name, reverse=True)  # the last one is opened first
            except OSError:
                strays[folder] = Refused(path=folder, reason="unreadable", detail=_NO_FOLDER)
                continue
            for entry in inside:
                path = Path(entry.path)
                if _is(entry.is_dir):
                    open_folders.append(path)
                elif not _is(entry.is_file):
                    strays[path] = Refused(path=path, reason="not-a-file", detail=_NO_FILE)
                elif not os.access(path, os.R_OK):
                    strays[path] = Refused(path=path, reason="unreadable", detail=_NO_READ)
                else:
                    files.add(path)
    return sorted(files), list(strays.values())


def _is(question: Callable[[], bool]) -> bool:
    """An entry's answer; a link in a circle has none."""
    try:
        return question()
    except OSError:
        return False
