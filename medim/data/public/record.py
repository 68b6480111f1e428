"""What a public set's folder says of itself: `fetched.json` and `SHA256SUMS`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medim.data.public.catalog import SETS, PublicSet
from medim.data.public.tcia import list_series
from medim.files import read_json, sha256
from medim.types import UserError

SCHEMA_VERSION = 1


def opened(folder: Path, name: str, pause: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """The record of the folder, or a new one with nothing fetched yet."""
    path = folder / "fetched.json"
    if path.is_file():
        record = read_json(path)
        if record.get("name") != name or record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{folder}: expected {name}, and it holds {record.get('name')}. Choose another --out.")
        return record
    known = SETS[name]
    (folder / ".download").mkdir(exist_ok=True)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "title": known.title,
        "modality": known.modality,
        "licence": known.licence,
        "citation": known.citation,
        "fetched": None,
        "archives": _planned(known, folder / ".download", pause),
    }


def _planned(known: PublicSet, work: Path, pause: Callable[[float], None]) -> list[dict[str, Any]]:
    """What there is to download."""
    if known.collection is not None:
        return list_series(known.collection, known.dicom, work, pause)
    return [
        {
            "url": file.url,
            "file": file.name,
            "archive": file.archive,
            "publisher": {"md5": file.md5, "from": known.sums if file.md5 else None, "matched": None},
            "expected": None,
            "bytes": None,
            "sha256": None,
        }
        for file in known.files
    ]


def sums_of(ready: Path) -> dict[str, str]:
    """sha256 by what stands after the top name: of a file, or of every file in a folder."""
    if ready.is_file():
        return {"": sha256(ready)}
    files = sorted(path for path in ready.rglob("*") if path.is_file())
    return {f"/{path.relative_to(ready).as_posix()}": sha256(path) for path in files}


def read_sums(folder: Path) -> dict[str, str]:
    """`SHA256SUMS` as sha256 by relative path."""
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def check(folder: Path, sums: dict[str, str]) -> None:
    """Every file as it was fetched, but for what was removed as a whole."""
    wrong = [
        path
        for path, value in sums.items()
        if (folder / path.split("/")[0]).exists() and not ((folder / path).is_file() and sha256(folder / path) == value)
    ]
    if wrong:
        raise UserError(
            f"{folder}: expected the files as they were fetched; {len(wrong)} are missing or changed, as {wrong[0]}. "
            f"Move {folder / wrong[0].split('/')[0]} away and run the same command again: it is fetched anew."
        )
