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

from medim.data.public.download import compute_digest, download_file
from medim.types import UserError

API_URL = "https://services.cancerimagingarchive.net/nbia-api/services/v4"
_FILES_WITHOUT_MD5 = {"LICENSE"}  # in the zip, without an md5


def list_series(
    collection: str, modalities: Sequence[str], work_folder: Path, pause: Callable[[float], None] = time.sleep
) -> list[dict[str, Any]]:
    """Every series of a collection that is of these DICOM modalities, as entries of `fetched.json`.

    Args:
        collection: the archive's name of it.
        modalities: values of the attribute Modality.
        work_folder: a folder for what is under way.
        pause: waits some seconds between tries.

    Raises:
        UserError: the archive does not answer, or lists no such series.
    """
    entries = []
    for modality in modalities:
        query = urlencode({"Collection": collection, "Modality": modality, "format": "json"})
        with tempfile.TemporaryDirectory(dir=work_folder, prefix="list-") as folder:
            response_path = Path(folder) / "series.json"
            download_file(f"{API_URL}/getSeries?{query}", response_path, pause=pause)
            entries += [_build_series_entry(row, collection) for row in _parse_series_list(response_path, collection)]
    if not entries:
        raise UserError(
            f"{API_URL}: expected {' or '.join(modalities)} series in the collection {collection}, got none. "
            "The archive may have closed it; see https://www.cancerimagingarchive.net."
        )
    return sorted(entries, key=lambda entry: str(entry["file"]))


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
        expected_md5 = {row["Filename"]: row["MD5Hash"].lower() for row in csv.DictReader(lines)}
    file_names = {path.name for path in folder.iterdir()} - {table.name} - _FILES_WITHOUT_MD5
    image_count = entry["expected"]["images"]
    if file_names != set(expected_md5) or len(expected_md5) != image_count:
        raise UserError(
            f"{entry['url']}: expected the {image_count} files that the archive announced, got {len(file_names)}, and "
            f"sums of {len(expected_md5)}. Run the same command again."
        )
    mismatches = [name for name in sorted(file_names) if compute_digest(folder / name).md5 != expected_md5[name]]
    if mismatches:
        raise UserError(
            f"{entry['url']}: {mismatches[0]} is not as the archive's md5 says. Run the same command again."
        )
    table.unlink()


def _parse_series_list(response_path: Path, collection: str) -> list[Any]:
    """The archive's answer; nothing at all stands for an empty list."""
    text = response_path.read_text(encoding="utf-8", errors="replace")
    try:
        rows = json.loads(text or "[]")
    except ValueError:
        rows = None
    if not isinstance(rows, list):
        raise UserError(
            f"{API_URL}: expected a JSON list of the series of {collection}, got {text[:60]!r}. Try again later."
        )
    return rows


def _build_series_entry(row: Any, collection: str) -> dict[str, Any]:
    """A series as an entry of `fetched.json`; nothing of the patient is kept."""
    series = str(row.get("SeriesInstanceUID")) if isinstance(row, dict) else ""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)+", series):
        raise UserError(
            f"{API_URL}: expected series of {collection}, got one without a SeriesInstanceUID. Try again later."
        )
    return {
        "url": f"{API_URL}/getImageWithMD5Hash?{urlencode({'SeriesInstanceUID': series})}",
        "file": series,
        "archive": True,
        "publisher": {"md5": None, "from": "md5hashes.csv, sent with the images", "matched": None},
        "expected": {"images": int(row.get("ImageCount") or 0), "bytes": int(row.get("FileSize") or 0)},
        "licence": row.get("LicenseName"),
        "bytes": None,
        "sha256": None,
    }
