"""Every file of a source, and what in it is no file: nothing is passed over in silence, nothing is waited for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from medim.data.readers.inspection import RejectedFile

_FOLDER_UNREADABLE = "a folder that cannot be opened; what lies in it is not known. Check its permissions"
_FILE_UNREADABLE = "a file that may not be read. Check its permissions"
_NOT_A_FILE = "a link to nothing, or a pipe, socket or device"


def list_readable_files(sources: Iterable[Path]) -> list[Path]:
    """The files that `list_files` finds."""
    return list_files(sources)[0]


def list_files(sources: Iterable[Path]) -> tuple[list[Path], list[RejectedFile]]:
    """Every file of the sources, once and sorted; links are followed, names that start with a dot are left out.

    Returns:
        the files, and what cannot be opened: a folder, a file without permission, a broken link, a pipe.
    """
    files: set[Path] = set()
    unreadable: dict[Path, RejectedFile] = {}
    for source in sources:
        if source.is_file():
            files.add(source)
            continue
        pending_folders, folder_ids = [source], set()
        while pending_folders:  # not recursive: a tree may be deeper than Python's stack
            folder = pending_folders.pop()
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in folder_ids:
                    continue
                folder_ids.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    visible_entries = [entry for entry in entries if not entry.name.startswith(".")]
                    visible_entries.sort(key=lambda entry: entry.name, reverse=True)  # the last one is opened first
            except OSError:
                unreadable[folder] = RejectedFile(path=folder, reason="unreadable", detail=_FOLDER_UNREADABLE)
                continue
            for entry in visible_entries:
                path = Path(entry.path)
                if _query_entry(entry.is_dir):
                    pending_folders.append(path)
                elif not _query_entry(entry.is_file):
                    unreadable[path] = RejectedFile(path=path, reason="not-a-file", detail=_NOT_A_FILE)
                elif not os.access(path, os.R_OK):
                    unreadable[path] = RejectedFile(path=path, reason="unreadable", detail=_FILE_UNREADABLE)
                else:
                    files.add(path)
    return sorted(files), list(unreadable.values())


def _query_entry(query: Callable[[], bool]) -> bool:
    """An entry's answer; a link in a circle has none."""
    try:
        return query()
    except OSError:
        return False
