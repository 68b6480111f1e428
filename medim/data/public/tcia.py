"""DICOM collections of The Cancer Imaging Archive, a series at a time, with the archive's own md5 of every file.

The NBIA Search REST API, version 4: `getSeries` lists a collection, `getImageWithMD5Hash` sends a series as a zip that
is packed anew at every request (so that the zip itself has no lasting checksum) with `md5hashes.csv` inside.
"""

from __future__ import annotations

import csv
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from medim.data.public.download import digest, download
from medim.types import UserError

API = "https://services.cancerimagingarchive.net/nbia-api/services/v4"
_UNLISTED = {"LICENSE"}  # in the zip, without an md5


def list_series(
    collection: str, dicom: Sequence[str], work: Path, pause: Callable[[float], None] = time.sleep
) -> list[dict[str, Any]]:
    """Every series of a collection that is of these DICOM modalities, as entries of `fetched.json`.

    Args:
        collection: the archive's name of it.
        dicom: values of the attribute Modality.
        work: a folder for what is under way.
        pause: waits some seconds between tries.

    Raises:
        UserError: the archive does not answer, or lists no such series.
    """
    found = []
    for modality in dicom:
        query = urlencode({"Collection": collection, "Modality": modality, "format": "json"})
        with tempfile.TemporaryDirectory(dir=work, prefix="list-") as folder:
            answer = Path(folder) / "series.json"
            download(f"{API}/getSeries?{query}", answer, pause=pause)
            found += [_entry(row, collection) for row in _rows(answer, collection)]
    if not found:
        raise UserError(
            f"{API}: expected {' or '.join(dicom)} series in the collection {collection}, got none. "
            "The archive may have closed it; see https://www.cancerimagingarchive.net."
        )
    return sorted(found, key=lambda entry: str(entry["file"]))


def check_series(folder: Path, entry: dict[str, Any]) -> None:
    """Compare an unpacked series with the archive's list of it, and remove the list.

    Raises:
        UserError: a file more or less than listed, or with other content.
    """
    table = folder / "md5hashes.csv"
    if not table.is_file():
        raise UserError(
            f"{entry['url']}: expected md5hashes.csv in what the archive sent; it is cut short. Run it again."
        )
    with table.open(newline="", encoding="utf-8-sig") as lines:
        listed = {row["Filename"]: row["MD5Hash"].lower() for row in csv.DictReader(lines)}
    here = {path.name for path in folder.iterdir()} - {table.name} - _UNLISTED
    images = entry["expected"]["images"]
    if here != set(listed) or len(listed) != images:
        raise UserError(
            f"{entry['url']}: expected the {images} files that the archive announced, got {len(here)}, and sums of "
            f"{len(listed)}. Run the same command again."
        )
    wrong = [name for name in sorted(here) if digest(folder / name).md5 != listed[name]]
    if wrong:
        raise UserError(f"{entry['url']}: {wrong[0]} is not as the archive's md5 says. Run the same command again.")
    table.unlink()


def _rows(answer: Path, collection: str) -> list[Any]:
    """The archive's answer; nothing at all stands for an empty list."""
    text = answer.read_text(encoding="utf-8", errors="replace")
    try:
        rows = json.loads(text or "[]")
    except ValueError:
        rows = None
    if not isinstance(rows, list):
        raise UserError(
            f"{API}: expected a JSON list of the series of {collection}, got {text[:60]!r}. Try again later."
        )
    return rows


def _entry(row: Any, collection: str) -> dict[str, Any]:
    """A series as an entry of `fetched.json`; nothing of the patient is kept."""
    series = str(row.get("SeriesInstanceUID")) if isinstance(row, dict) else ""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)+", series):
        raise UserError(
            f"{API}: expected series of {collection}, got one without a SeriesInstanceUID. Try again later."
        )
    return {
        "url": f"{API}/getImageWithMD5Hash?{urlencode({'SeriesInstanceUID': series})}",
        "file": series,
        "archive": True,
        "publisher": {"md5": None, "from": "md5hashes.csv, sent with the images", "matched": None},
        "expected": {"images": int(row.get("ImageCount") or 0), "bytes": int(row.get("FileSize") or 0)},
        "licence": row.get("LicenseName"),
        "bytes": None,
        "sha256": None,
    }
