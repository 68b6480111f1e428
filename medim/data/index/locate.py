"""Find the files of an image key, in which names of files and folders may be pseudonyms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from medim.data.index.decathlon import file_stem
from medim.data.index.index import Index, is_index
from medim.privacy import hide_name, scrubbed_name
from medim.types import UserError


def locate_files(source: Path, key: str) -> list[Path]:
    """Find the files, or the folder of a series, that an image key or a recorded path refers to.

    Args:
        source: an index, or the folder of images that an index or an answer was made from.
        key: `image` or `path` of an index, `predictions.csv`, `rejected.csv` or another output.

    Raises:
        UserError: no file has this key, or the site key differs from the one used for the key.
    """
    files = _search_index(Index.read(source), key) if is_index(source) else _search_folder(source, key)
    if not files:
        raise UserError(
            f"{'/'.join(map(hide_name, key.split('/')))}: expected the key or path of an image in this source, found "
            "none. Was a file moved, or is another MEDIM_SITE_KEY set?"
        )
    return files


def _search_index(index: Index, key: str) -> list[Path]:
    files = [index.locate(record) for record in index.records if key in (record.image, record.path)]
    return files or _search_folder(index.root, key)


def _search_folder(source: Path, key: str) -> list[Path]:
    """Follow the parts of a key from a folder; the last part may lack the suffix, and items of a file are ignored."""
    root = source if source.is_dir() else source.parent
    parts = PurePosixPath(key.partition("#")[0]).parts
    if len(parts) == 1 and parts[0] in (root.name, scrubbed_name(root.name)):
        return [root]
    paths = [root]
    for part in parts:
        paths = [path if path.is_file() else match for path in paths for match in _match_entries(path, part)]
    return sorted(set(paths))


def _match_entries(folder: Path, part: str) -> Sequence[Path]:
    """List the entries of a folder with this name or pseudonym, with or without suffix; a file matches itself."""
    if folder.is_file():
        return [folder]
    if part == "..":
        return [folder.parent]
    return [
        entry
        for entry in folder.iterdir()
        if part
        in {spelling for name in (entry.name, file_stem(entry.name)) for spelling in (name, scrubbed_name(name))}
    ]
