"""Fetch public data sets: download once, verify the publishers' checksums, record, and find them by name later.

The folder of a data set contains its images, `fetched.json` (origin and licence) and `SHA256SUMS` of all files (for
`sha256sum -c SHA256SUMS`). Unfinished downloads are in its subfolder `.download`.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medim.data.public.archives import unpack_archive
from medim.data.public.catalog import PUBLIC_SETS, PublicSet
from medim.data.public.download import download_file
from medim.data.public.manifest import SCHEMA_VERSION, Download, Manifest, read_manifest
from medim.data.public.tcia import check_series, is_series_entry, list_series
from medim.files import cache_folder, file_sha256, remove_temporary_files, write_json, write_text
from medim.output_folder import acquire_lock
from medim.types import Modality, UsageError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchResult:
    """A data set on disk.

    Attributes:
        folder: folder of the data set.
        file_count: number of its files.
        is_new: whether anything was downloaded; otherwise all files existed and were verified.
        manifest: content of `fetched.json`.
    """

    folder: Path
    file_count: int
    is_new: bool
    manifest: Manifest


def fetch_public_set(
    name: str,
    out: Path | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> FetchResult:
    """Download a public data set, or its missing files, and verify existing files.

    Args:
        name: a key of `PUBLIC_SETS`, in any case.
        out: folder of the data set; None for the cache, which `--data NAME` searches.
        progress: called with the number of downloaded bytes and the total number.
        pause: function that waits some seconds between attempts.

    Raises:
        UsageError: no such data set.
        UserError: the download fails; a checksum differs from that of the publisher or of the first download; a file
            was changed since; or `out` contains something else.
    """
    name = resolve_set_name(name)
    folder = out or locate_public_folder(name)
    with _lock_folder(folder, name):
        manifest = _load_manifest(folder, name, pause)
        checksums = _read_checksums(folder)
        _verify_set_checksums(folder, checksums)
        is_new = False
        for number, archive in enumerate(manifest["archives"]):
            if archive["sha256"] is None or not (folder / archive["file"]).exists():
                is_new = True
                _download_entry(
                    folder, manifest, number, checksums, progress if len(manifest["archives"]) == 1 else None, pause
                )
            if progress and len(manifest["archives"]) > 1:
                sizes = [entry["expected"]["bytes"] if entry["expected"] else 0 for entry in manifest["archives"]]
                progress(sum(sizes[: number + 1]), sum(sizes))
        shutil.rmtree(folder / ".download", ignore_errors=True)
    return FetchResult(folder=folder, file_count=len(checksums), is_new=is_new, manifest=manifest)


def resolve_set_name(name: str) -> str:
    """Find the exact spelling of a data set's name.

    Raises:
        UsageError: no such data set.
    """
    names = {key.casefold(): key for key in PUBLIC_SETS}
    if name.casefold() in names:
        return names[name.casefold()]
    suggestions = difflib.get_close_matches(name.casefold(), names, n=1)
    hint = f"Did you mean {names[suggestions[0]]}? " if suggestions else ""
    raise UsageError(f"{name}: expected the name of a public data set. {hint}`medim fetch --list` lists all.")


def locate_public_folder(name: str) -> Path:
    """Return the default folder of a data set: in the cache, next to the store."""
    return cache_folder() / "public" / name


def find_public_set(data: Path) -> PublicSet | None:
    """Find the public data set that `--data` names; None for a path."""
    name = _find_set_name(data)
    return None if name is None else PUBLIC_SETS[name]


def _find_set_name(data: Path) -> str | None:
    """Find the key of the public data set that `--data` names; an existing path has priority."""
    return None if data.exists() else {key.casefold(): key for key in PUBLIC_SETS}.get(str(data).casefold())


def resolve_data_argument(data: Path, modality: Modality) -> Path:
    """Resolve `--data`: an existing path, else the folder of a downloaded public data set.

    Raises:
        UserError: the data set is missing or incomplete, or has images of another modality.
    """
    set_name = _find_set_name(data)
    if set_name is None:
        return data
    if PUBLIC_SETS[set_name].modality != modality:
        raise UserError(
            f"--data {data}: expected {modality} images, but this public data set has "
            f"{PUBLIC_SETS[set_name].modality} images."
        )
    folder = locate_public_folder(set_name)
    archives = read_manifest(folder / "fetched.json")["archives"] if (folder / "fetched.json").is_file() else []
    if not archives or not all(entry["sha256"] and (folder / entry["file"]).exists() for entry in archives):
        raise UserError(f"--data {data}: this public data set is missing or incomplete. Run: medim fetch {set_name}")
    return folder


@contextlib.contextmanager
def _lock_folder(folder: Path, name: str) -> Iterator[None]:
    """Lock the folder for this process; other processes wait. A folder that stays empty is removed again."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    work_folder = folder / ".download"
    links = [work_folder, *(work_folder.iterdir() if work_folder.is_dir() else ())]
    if any(path.is_symlink() for path in links):
        raise UserError(f"{work_folder}: expected no links in this folder. Remove it, and run the same command again.")
    if folder.is_file() or (names - {".medim"} and not names & {".download", "fetched.json"}):
        raise UserError(
            f"{folder}: expected a new or empty folder, or one that `medim fetch` made. Choose another --out."
        )
    marker = folder / ".medim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with acquire_lock(marker, wait=True):
            remove_temporary_files(folder)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    (folder / ".download").rmdir()
                if [path.name for path in folder.iterdir()] == [".medim"]:
                    marker.unlink()
                    folder.rmdir()
    except OSError as error:
        raise UserError(f"{folder}: {name} could not be written ({error.strerror}). Choose another --out.") from error


def _download_entry(
    folder: Path,
    manifest: Manifest,
    number: int,
    checksums: dict[str, str],
    progress: Callable[[int, int], None] | None,
    pause: Callable[[float], None],
) -> None:
    """Download an archive, verify and record it, and then rename it, so that each step may be interrupted."""
    entry, work_folder = manifest["archives"][number], folder / ".download"
    work_folder.mkdir(exist_ok=True)
    target, download_path = (
        folder / entry["file"],
        work_folder / f"{entry['file']}{'.archive' if entry['archive'] else ''}",
    )
    if target.exists():
        raise UserError(f"{target} already exists and was not created by medim. Move or delete it.")
    file_digest = download_file(
        entry["url"], download_path, md5=entry["publisher"]["md5"], progress=progress, pause=pause
    )
    content_path = download_path
    if entry["archive"]:
        content_path = work_folder / entry["file"]
        shutil.rmtree(content_path, ignore_errors=True)
        try:
            unpack_archive(download_path, content_path)
            if entry["expected"] is not None:
                check_series(content_path, entry)
        except UserError:
            download_path.unlink(missing_ok=True)
            shutil.rmtree(content_path, ignore_errors=True)
            raise
    new_checksums = {f"{entry['file']}{path}": value for path, value in _compute_checksums(content_path).items()}
    old_checksums = {path: value for path, value in checksums.items() if path.split("/")[0] == entry["file"]}
    if old_checksums and old_checksums != new_checksums:
        shutil.rmtree(work_folder)
        raise UserError(
            f"{entry['url']}: the publisher has changed this file since {manifest['fetched']}: expected the sha256 "
            f"{entry['sha256']}, got {file_digest.sha256}. Results with the two versions are not comparable. Use "
            "another --out for the new version."
        )
    if not old_checksums or entry["sha256"] is None:  # without it, a kill came between the two files written below
        entry |= {"bytes": file_digest.size, "sha256": file_digest.sha256}
        entry["publisher"]["matched"] = True if entry["publisher"]["from"] else None
    manifest["fetched"] = manifest["fetched"] or datetime.date.today().isoformat()
    checksums |= new_checksums
    write_text(folder / "SHA256SUMS", "".join(f"{value}  {path}\n" for path, value in sorted(checksums.items())))
    write_json(folder / "fetched.json", manifest)
    content_path.replace(target)
    download_path.unlink(missing_ok=True)


def _load_manifest(folder: Path, name: str, pause: Callable[[float], None] = time.sleep) -> Manifest:
    """Load the record of a folder, or create a new one without downloaded files."""
    path = folder / "fetched.json"
    if path.is_file():
        manifest = read_manifest(path)
        if manifest["name"] != name or manifest["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"{folder}: expected {name}, got {manifest['name']}. Choose another --out.")
        _check_manifest_sources(path, manifest, PUBLIC_SETS[name])
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


def _check_manifest_sources(path: Path, manifest: Manifest, public_set: PublicSet) -> None:
    """Compare the addresses, file names and publisher's checksums of `fetched.json` with the catalog.

    A folder may come from elsewhere: it must not name other addresses, or files outside the folder.

    Raises:
        UserError: an entry differs from the catalog.
    """

    def list_origins(entries: Iterable[Download]) -> list[tuple[object, ...]]:
        """List the fields of entries that the catalog determines."""
        return [(row["url"], row["file"], row["archive"], row["expected"], row["publisher"]["md5"]) for row in entries]

    entries = manifest["archives"]
    if public_set.collection is not None:
        is_valid = bool(entries) and all(map(is_series_entry, entries))
    else:
        is_valid = list_origins(entries) == list_origins(_list_catalog_files(public_set))
    if not is_valid:
        raise UserError(
            f"{path}: expected the files of this version's catalog, got others. Use another --out to download them."
        )


def _list_downloads(public_set: PublicSet, work_folder: Path, pause: Callable[[float], None]) -> list[Download]:
    """List the files or series to download."""
    if public_set.collection is not None:
        return list_series(public_set.collection, public_set.dicom, work_folder, pause)
    return _list_catalog_files(public_set)


def _list_catalog_files(public_set: PublicSet) -> list[Download]:
    """List the files of a data set that are not series of a collection, without downloaded files."""
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


def _compute_checksums(content_path: Path) -> dict[str, str]:
    """Compute the sha256 of a file, or of every file in a folder, by the path below the top-level name."""
    if content_path.is_file():
        return {"": file_sha256(content_path)}
    files = sorted(path for path in content_path.rglob("*") if path.is_file())
    return {f"/{path.relative_to(content_path).as_posix()}": file_sha256(path) for path in files}


def _read_checksums(folder: Path) -> dict[str, str]:
    """Read `SHA256SUMS` as a map from relative path to sha256."""
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def _verify_set_checksums(folder: Path, checksums: dict[str, str]) -> None:
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
