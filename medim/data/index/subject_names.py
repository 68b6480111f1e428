"""Whose images are, where only the names of files and folders can tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

PathParts = tuple[str, ...]


def infer_subjects(paths: Iterable[PathParts]) -> dict[PathParts, str]:
    """The subject of each image, by its path alone.

    A file is a subject of its own, as long as names do not repeat from folder to folder. Where half of them or more do,
    one level of the path is the subjects': the files' (`T1/ann`, `T2/ann`) where more names repeat than there are
    folders, else a folder's (`ann/t1`, `bob/t1`), and of folders in the same way (`ann/visit1/t1`). Two of one name are
    one subject: what is guessed errs towards fewer of them, so that nobody stands on both sides of a split.

    Args:
        paths: folders from the source down, then the file's name without suffix. That of its folder does not count in
            it (`ann/ann_t1`).
    """
    rests = {path: _strip_folder_name(path) for path in paths}
    repeats = Counter(rests.values())
    unique_names = {path: (*path[:-1], rest if repeats[rest] > 1 else path[-1]) for path, rest in rests.items()}
    subjects = _find_subject_level(set(unique_names.values()))
    return {path: subjects[name] for path, name in unique_names.items()}


def _find_subject_level(paths: set[PathParts]) -> dict[PathParts, str]:
    """Of distinct paths, the name of the level that is the subjects'."""
    counts = Counter(path[-1] for path in paths)
    repeated_paths = [path for path in paths if counts[path[-1]] > 1]
    names, folders = {path[-1] for path in repeated_paths}, {path[:-1] for path in repeated_paths}
    if 2 * len(repeated_paths) < len(paths) or len(names) > len(folders) or not repeated_paths:
        return {path: path[-1] for path in paths}
    parent_subjects = _find_subject_level({path[:-1] for path in paths if path[:-1]})
    return {path: parent_subjects.get(path[:-1], path[-1]) for path in paths}


def _strip_folder_name(path: PathParts) -> str:
    name, folder = path[-1], path[-2] if len(path) > 1 else ""
    rest = name.removeprefix(folder)
    return rest.lstrip("_- .") if folder and not rest[:1].isalnum() else name
