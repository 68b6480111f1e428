"""List all files of a source, and report broken links, pipes and unreadable folders without blocking on them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from medim.data.readers.inspection import RejectedFile
from medim.output_folder import is_result_folder

log = logging.getLogger(__name__)

_FOLDER_UNREADABLE = "a folder that cannot be opened; its content is unknown. Check its permissions"
_FILE_UNREADABLE = "a file without read permission. Check its permissions"
_LINK_TO_SYSTEM = "a link to a folder that contains it, or to a folder of the operating system"
_SYSTEM_FOLDERS = (Path("/proc"), Path("/sys"), Path("/dev"))
_NOT_A_FILE = "a broken link, or a pipe, socket or device"


def list_readable_files(sources: Iterable[Path]) -> list[Path]:
    """List the readable files of the sources, see `list_files`."""
    return list_files(sources)[0]


def list_files(sources: Iterable[Path]) -> tuple[list[Path], list[RejectedFile]]:
    """List every file of the sources, once and sorted. Links are followed; names that start with a dot are skipped.

    Folders with results of medim inside a source, such as predicted masks, are skipped, too: they are no new images.

    Returns:
        The files, and the rejected entries: unreadable folders and files, broken links, pipes.
    """
    files: set[Path] = set()
    unreadable: dict[Path, RejectedFile] = {}
    n_result_folders = 0
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
                if entry.is_symlink() and _leads_out_of_data(path):
                    unreadable[path] = RejectedFile(path=path, reason="outside-folder", detail=_LINK_TO_SYSTEM)
                elif _query_entry(entry.is_dir):
                    if is_result_folder(path):
                        n_result_folders += 1
                    else:
                        pending_folders.append(path)
                elif not _query_entry(entry.is_file):
                    unreadable[path] = RejectedFile(path=path, reason="not-a-file", detail=_NOT_A_FILE)
                elif not os.access(path, os.R_OK):
                    unreadable[path] = RejectedFile(path=path, reason="unreadable", detail=_FILE_UNREADABLE)
                else:
                    files.add(path)
    if n_result_folders:
        log.info("skipped %d folders of the source, which contain results of medim", n_result_folders)
    return sorted(files), list(unreadable.values())


def _leads_out_of_data(path: Path) -> bool:
    """Whether a path resolves to a folder that contains it, or to a file system of the kernel."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    return target in path.absolute().parents or is_system_path(target)


def is_system_path(path: Path) -> bool:
    """Whether a path is in a file system of the kernel, which contains no images and may be endless."""
    return any(path.is_relative_to(folder) for folder in _SYSTEM_FOLDERS)


def _query_entry(query: Callable[[], bool]) -> bool:
    """Query a directory entry; False for a link that forms a cycle."""
    try:
        return query()
    except OSError:
        return False
