"""Infer the subjects of images from file and folder names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

PathParts = tuple[str, ...]


def infer_subjects(paths: Iterable[PathParts]) -> dict[PathParts, str]:
    """Infer the subject of each image from its path alone.

    Each file is its own subject, unless at least half of the file names repeat from folder to folder. In that case one
    level of the path is taken as the subject. It is the file level (`T1/ann`, `T2/ann`) if there are more repeated
    names than folders, else a folder level (`ann/t1`, `bob/t1`), chosen by the same rule (`ann/visit1/t1`). Equal names
    count as one subject: the guess prefers too few subjects, so that no subject is in two splits.

    Args:
        paths: folders from the source down, then the file name without suffix. The name of its folder is ignored in a
            file name (`ann/ann_t1`).
    """
    rests = {path: _strip_folder_name(path) for path in paths}
    repeats = Counter(rests.values())
    unique_names = {path: (*path[:-1], rest if repeats[rest] > 1 else path[-1]) for path, rest in rests.items()}
    subjects = _find_subject_level(set(unique_names.values()))
    return {path: subjects[name] for path, name in unique_names.items()}


def _find_subject_level(paths: set[PathParts]) -> dict[PathParts, str]:
    """Map distinct paths to the name at the level of the subjects."""
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
