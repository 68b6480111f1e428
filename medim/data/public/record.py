"""Records in the folder of a public data set: `fetched.json` and `SHA256SUMS`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medim.data.public.catalog import PUBLIC_SETS, PublicSet
from medim.data.public.tcia import list_series
from medim.files import file_sha256, read_json
from medim.types import UserError

SCHEMA_VERSION = 1


def load_manifest(folder: Path, name: str, pause: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Load the record of a folder, or create a new one without downloaded files."""
    path = folder / "fetched.json"
    if path.is_file():
        manifest = read_json(path)
        if manifest.get("name") != name or manifest.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{folder}: expected {name}, got {manifest.get('name')}. Choose another --out.")
        return manifest
    public_set = PUBLIC_SETS[name]
    (folder / ".download").mkdir(exist_ok=True)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "title": public_set.title,
        "modality": public_set.modality,
        "licence": public_set.licence,
        "citation": public_set.citation,
        "fetched": None,
        "archives": _list_downloads(public_set, folder / ".download", pause),
    }


def _list_downloads(public_set: PublicSet, work_folder: Path, pause: Callable[[float], None]) -> list[dict[str, Any]]:
    """List the files or series to download."""
    if public_set.collection is not None:
        return list_series(public_set.collection, public_set.dicom, work_folder, pause)
    return [
        {
            "url": file.url,
            "file": file.name,
            "archive": file.archive,
            "publisher": {"md5": file.md5, "from": public_set.sums if file.md5 else None, "matched": None},
            "expected": None,
            "bytes": None,
            "sha256": None,
        }
        for file in public_set.files
    ]


def compute_checksums(content_path: Path) -> dict[str, str]:
    """Compute the sha256 of a file, or of every file in a folder, by the path below the top-level name."""
    if content_path.is_file():
        return {"": file_sha256(content_path)}
    files = sorted(path for path in content_path.rglob("*") if path.is_file())
    return {f"/{path.relative_to(content_path).as_posix()}": file_sha256(path) for path in files}


def read_checksums(folder: Path) -> dict[str, str]:
    """Read `SHA256SUMS` as a map from relative path to sha256."""
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def verify_set_checksums(folder: Path, checksums: dict[str, str]) -> None:
    """Verify that the files are unchanged since the download. Removed top-level files or folders are ignored."""
    invalid_paths = [
        path
        for path, value in checksums.items()
        if (folder / path.split("/")[0]).exists()
        and not ((folder / path).is_file() and file_sha256(folder / path) == value)
    ]
    if invalid_paths:
        raise UserError(
            f"{folder}: {len(invalid_paths)} files are missing or changed since the download, such as "
            f"{invalid_paths[0]}. "
            f"Move {folder / invalid_paths[0].split('/')[0]} away and run the same command again to download it again."
        )
