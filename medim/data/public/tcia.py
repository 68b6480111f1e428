"""Download DICOM collections of The Cancer Imaging Archive series by series, verified with the archive's md5 sums.

The NBIA Search REST API, version 4: `getSeries` lists a collection, `getImageWithMD5Hash` sends a series as a zip with
`md5hashes.csv` inside. The zip is created anew for every request, so it has no constant checksum.
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
from medim.data.public.manifest import Download
from medim.types import UserError

API_URL = "https://services.cancerimagingarchive.net/nbia-api/services/v4"
_UID_PATTERN = re.compile(r"[0-9]+(\.[0-9]+)+")
_FILES_WITHOUT_MD5 = {"LICENSE"}  # files of the zip that have no md5


def list_series(
    collection: str, modalities: Sequence[str], work_folder: Path, pause: Callable[[float], None] = time.sleep
) -> list[Download]:
    """List the series of a collection with given DICOM modalities, as entries of `fetched.json`.

    Args:
        collection: name of the collection in the archive.
        modalities: values of the attribute Modality.
        work_folder: folder for temporary files.
        pause: function that waits some seconds between attempts.

    Raises:
        UserError: the archive does not respond, or lists no such series.
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


def check_series(folder: Path, entry: Download) -> None:
    """Compare an extracted series with its md5 list from the archive, and remove the list.

    Raises:
        UserError: files are missing, unexpected, or differ from the list.
    """
    table = folder / "md5hashes.csv"
    if not table.is_file():
        raise UserError(
            f"{entry['url']}: the download has no md5hashes.csv and is incomplete. Run the same command again."
        )
    with table.open(newline="", encoding="utf-8-sig") as lines:
        expected_md5 = {row["Filename"]: row["MD5Hash"].lower() for row in csv.DictReader(lines)}
    file_names = {path.name for path in folder.iterdir()} - {table.name} - _FILES_WITHOUT_MD5
    image_count = entry["expected"]["images"] if entry["expected"] else 0
    if file_names != set(expected_md5) or len(expected_md5) != image_count:
        raise UserError(
            f"{entry['url']}: expected {image_count} files, got {len(file_names)}, and "
            f"md5 sums of {len(expected_md5)}. Run the same command again."
        )
    mismatches = [name for name in sorted(file_names) if compute_digest(folder / name).md5 != expected_md5[name]]
    if mismatches:
        raise UserError(f"{entry['url']}: {mismatches[0]} does not match its md5 sum. Run the same command again.")
    table.unlink()


def is_series_entry(entry: Download) -> bool:
    """Whether an entry of `fetched.json` downloads a series from the archive into a folder named by its UID."""
    return (
        _UID_PATTERN.fullmatch(entry["file"]) is not None
        and entry["url"] == _series_url(entry["file"])
        and entry["archive"]
        and entry["expected"] is not None
        and entry["publisher"]["md5"] is None
    )


def _series_url(series: str) -> str:
    return f"{API_URL}/getImageWithMD5Hash?{urlencode({'SeriesInstanceUID': series})}"


def _parse_series_list(response_path: Path, collection: str) -> list[Any]:
    """Parse the response of the archive; an empty response is an empty list."""
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


def _build_series_entry(row: Any, collection: str) -> Download:
    """Convert a series to an entry of `fetched.json`, without patient data."""
    series = str(row.get("SeriesInstanceUID")) if isinstance(row, dict) else ""
    if not _UID_PATTERN.fullmatch(series):
        raise UserError(
            f"{API_URL}: expected series of {collection}, got one without a SeriesInstanceUID. Try again later."
        )
    return {
        "url": _series_url(series),
        "file": series,
        "archive": True,
        "publisher": {"md5": None, "from": "md5hashes.csv, sent with the images", "matched": None},
        "expected": {"images": int(row.get("ImageCount") or 0), "bytes": int(row.get("FileSize") or 0)},
        "licence": row.get("LicenseName"),
        "bytes": None,
        "sha256": None,
    }
