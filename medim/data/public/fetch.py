"""Public data sets: brought once, checked against their publishers' sums, recorded, and found again by name.

A set's folder holds its images, `fetched.json` (where they came from and on what terms) and `SHA256SUMS` of every file
(`sha256sum -c SHA256SUMS` checks them, too). What is under way lies in its folder `.download`.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medim.data.public.archives import unpack_archive
from medim.data.public.catalog import PUBLIC_SETS
from medim.data.public.download import download_file
from medim.data.public.record import compute_checksums, load_manifest, read_checksums, verify_set_checksums
from medim.data.public.tcia import check_series
from medim.files import cache_folder, read_json, write_json, write_text
from medim.types import Modality, UsageError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchResult:
    """A set on the disk.

    Attributes:
        folder: where it lies.
        file_count: number of its files.
        is_new: whether anything was downloaded; else all was there, and checked.
        manifest: what `fetched.json` holds.
    """

    folder: Path
    file_count: int
    is_new: bool
    manifest: dict[str, Any]


def fetch_public_set(
    name: str,
    out: Path | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> FetchResult:
    """Download a public set, or what is missing of it, and check what is there.

    Args:
        name: a key of `PUBLIC_SETS`, in any case.
        out: the set's folder; None takes the cache, where `--data NAME` looks.
        progress: called with the bytes done and their total.
        pause: waits some seconds between tries.

    Raises:
        UsageError: no such set.
        UserError: the download fails; a sum is not the publisher's, or not the one of the first download; a file was
            changed since; `out` holds something else.
    """
    name = resolve_set_name(name)
    folder = out or locate_public_folder(name)
    with _lock_folder(folder, name):
        manifest = load_manifest(folder, name, pause)
        checksums = read_checksums(folder)
        verify_set_checksums(folder, checksums)
        is_new = False
        for number, archive in enumerate(manifest["archives"]):
            if archive["sha256"] is None or not (folder / archive["file"]).exists():
                is_new = True
                _download_entry(
                    folder, manifest, number, checksums, progress if len(manifest["archives"]) == 1 else None, pause
                )
            if progress and len(manifest["archives"]) > 1:
                sizes = [entry["expected"]["bytes"] for entry in manifest["archives"]]
                progress(sum(sizes[: number + 1]), sum(sizes))
        shutil.rmtree(folder / ".download", ignore_errors=True)
    return FetchResult(folder=folder, file_count=len(checksums), is_new=is_new, manifest=manifest)


def resolve_set_name(name: str) -> str:
    """The right spelling of a set's name.

    Raises:
        UsageError: no such set.
    """
    names = {key.casefold(): key for key in PUBLIC_SETS}
    if name.casefold() in names:
        return names[name.casefold()]
    suggestions = difflib.get_close_matches(name.casefold(), names, n=1)
    hint = f"Did you mean {names[suggestions[0]]}? " if suggestions else ""
    raise UsageError(f"{name}: expected the name of a public set. {hint}`medim fetch --list` shows all.")


def locate_public_folder(name: str) -> Path:
    """Where a set lies unless the user says otherwise: in the cache, beside the store."""
    return cache_folder() / "public" / name


def resolve_data_argument(data: Path, modality: Modality) -> Path:
    """What `--data` means: a path that exists, else the folder of a public set that was fetched before.

    Raises:
        UserError: the set was not fetched, only in part, or holds other images.
    """
    set_name = {key.casefold(): key for key in PUBLIC_SETS}.get(str(data).casefold())
    if data.exists() or set_name is None:
        return data
    if PUBLIC_SETS[set_name].modality != modality:
        raise UserError(
            f"--data {data}: expected {modality} images, and that public set holds {PUBLIC_SETS[set_name].modality}."
        )
    folder = locate_public_folder(set_name)
    manifest = read_json(folder / "fetched.json") if (folder / "fetched.json").is_file() else {"archives": [{}]}
    if not all(entry.get("sha256") and (folder / entry["file"]).exists() for entry in manifest["archives"]):
        raise UserError(f"--data {data}: that public set is not here, or not all of it. Run: medim fetch {set_name}")
    return folder


@contextlib.contextmanager
def _lock_folder(folder: Path, name: str) -> Iterator[None]:
    """The folder for this process alone; another one waits. A folder that stays empty is removed again."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (names - {".medim"} and not names & {".download", "fetched.json"}):
        raise UserError(
            f"{folder}: expected a new or empty folder, or one that `medim fetch` made. Choose another --out."
        )
    marker = folder / ".medim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _acquire_lock(marker):
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


@contextlib.contextmanager
def _acquire_lock(marker: Path) -> Iterator[None]:
    """An exclusive lock on a file, which the one before may have removed while this one waited."""
    while True:
        marker.parent.mkdir(parents=True, exist_ok=True)
        file = marker.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another medim fetch is at work here; waiting for it", marker.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        if marker.exists() and os.path.samestat(os.fstat(file.fileno()), marker.stat()):
            break
        file.close()
    with file:
        yield


def _download_entry(
    folder: Path,
    manifest: dict[str, Any],
    number: int,
    checksums: dict[str, str],
    progress: Callable[[int, int], None] | None,
    pause: Callable[[float], None],
) -> None:
    """Download an archive, check it, record it, and give it its name: in that order, so that any may be interrupted."""
    entry, work_folder = manifest["archives"][number], folder / ".download"
    work_folder.mkdir(exist_ok=True)
    target, download_path = (
        folder / entry["file"],
        work_folder / f"{entry['file']}{'.archive' if entry['archive'] else ''}",
    )
    if target.exists():
        raise UserError(f"{target}: expected nothing here yet, and medim did not fetch it. Move it away.")
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
    new_checksums = {f"{entry['file']}{path}": value for path, value in compute_checksums(content_path).items()}
    old_checksums = {path: value for path, value in checksums.items() if path.split("/")[0] == entry["file"]}
    if old_checksums and old_checksums != new_checksums:
        shutil.rmtree(work_folder)
        raise UserError(
            f"{entry['url']}: the publisher has changed this file since {manifest['fetched']}: expected the sha256 "
            f"{entry['sha256']}, got {file_digest.sha256}. Results on the two are not comparable; fetch it into "
            "another --out."
        )
    if not old_checksums:
        entry |= {"bytes": file_digest.size, "sha256": file_digest.sha256}
        entry["publisher"]["matched"] = True if entry["publisher"]["from"] else None
    manifest["fetched"] = manifest["fetched"] or datetime.date.today().isoformat()
    checksums |= new_checksums
    write_text(folder / "SHA256SUMS", "".join(f"{value}  {path}\n" for path, value in sorted(checksums.items())))
    write_json(folder / "fetched.json", manifest)
    content_path.replace(target)
    download_path.unlink(missing_ok=True)
