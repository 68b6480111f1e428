"""Infer the subjects of images from file and folder names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

PathParts = tuple[str, ...]
_TOKEN = re.compile(r"[^\W_]+")  # letters and digits between separators
_GROUP_WORDS = {  # words before a number that counts something else than persons
    "batch", "center", "centre", "class", "day", "epoch", "fold", "group", "hospital", "page", "part", "room",
    "scanner", "set", "site", "slice", "split", "ward", "week", "year",
}  # fmt: skip
_MAX_MEAN_IMAGES = 8  # per subject; with more, a common start is the name of a group of subjects
_MIN_GROUPED_FRACTION = 0.2  # of the files, in groups of two or more


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


def infer_subjects_from_stems(names: Collection[str]) -> dict[str, str]:
    """Infer subjects from file names that begin alike (`pat000_view0`, `pat000_view1`), of the files of one source.

    The shortest start that ends with a number and divides the files into groups of a few images each is taken.

    Args:
        names: file names without suffix.

    Returns:
        The start of each name; empty if names do not begin alike.

    Examples:
        >>> infer_subjects_from_stems(["p1_left", "p1_right", "p2_left", "p2_right"])
        {'p1_left': 'p1', 'p1_right': 'p1', 'p2_left': 'p2', 'p2_right': 'p2'}
        >>> infer_subjects_from_stems(["image_001", "image_002", "image_003"])
        {}
    """
    ends = {name: [match.end() for match in _TOKEN.finditer(name)] for name in names}
    for level in range(max(map(len, ends.values()), default=0) - 1):
        starts = {
            name: name[: positions[level]] if level < len(positions) else name for name, positions in ends.items()
        }
        counts = Counter(starts.values())
        groups = [start for start, count in counts.items() if count > 1]
        n_grouped = sum(counts[start] for start in groups)
        has_few_images = len(starts) <= _MAX_MEAN_IMAGES * len(counts)
        if len(groups) > 1 and n_grouped >= _MIN_GROUPED_FRACTION * len(starts) and has_few_images:
            return starts if all(map(_ends_with_person, groups)) else {}
    return {}


def _ends_with_person(start: str) -> bool:
    """Whether the start of a file name ends with the number or code of a person, by its last words."""
    words = _TOKEN.findall(start.lower())
    last_word = words[-1] if words else ""
    letters = last_word.rstrip("0123456789") or (words[-2] if len(words) > 1 else "")
    return any(character.isdigit() for character in last_word) and letters not in _GROUP_WORDS
