"""List all files of a source, and report broken links, pipes and unreadable folders without blocking on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from medim.data.readers.inspection import RejectedFile

_FOLDER_UNREADABLE = "a folder that cannot be opened; its content is unknown. Check its permissions"
_FILE_UNREADABLE = "a file without read permission. Check its permissions"
_NOT_A_FILE = "a broken link, or a pipe, socket or device"


def list_readable_files(sources: Iterable[Path]) -> list[Path]:
    """List the readable files of the sources, see `list_files`."""
    return list_files(sources)[0]


def list_files(sources: Iterable[Path]) -> tuple[list[Path], list[RejectedFile]]:
    """List every file of the sources, once and sorted. Links are followed; names that start with a dot are skipped.

    Returns:
        The files, and the rejected entries: unreadable folders and files, broken links, pipes.
    """
    files: set[Path] = set()
    unreadable: dict[Path, RejectedFile] = {}
    for source in sources:
        if source.is_file():
            files.add(source)
            continue
        pending_folders, folder_ids = [source], set()
        while pending_folders:  # not recursive, because a tree may be deeper than Python's recursion limit
            folder = pending_folders.pop()
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in folder_ids:
                    continue
                folder_ids.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    visible_entries = [entry for entry in entries if not entry.name.startswith(".")]
                    visible_entries.sort(key=lambda entry: entry.name, reverse=True)  # the last one is visited first
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
    """Query a directory entry; False for a link that forms a cycle."""
    try:
        return query()
    except OSError:
        return False
