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

from medim.data.public.archives import unpack
from medim.data.public.catalog import SETS
from medim.data.public.download import download
from medim.data.public.record import check, opened, read_sums, sums_of
from medim.data.public.tcia import check_series
from medim.files import cache_folder, read_json, write_json, write_text
from medim.types import Modality, UsageError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """A set on the disk.

    Attributes:
        folder: where it lies.
        files: number of its files.
        new: whether anything was downloaded; else all was there, and checked.
        record: what `fetched.json` holds.
    """

    folder: Path
    files: int
    new: bool
    record: dict[str, Any]


def fetch(
    name: str,
    out: Path | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Fetched:
    """Download a public set, or what is missing of it, and check what is there.

    Args:
        name: a key of `SETS`, in any case.
        out: the set's folder; None takes the cache, where `--data NAME` looks.
        progress: called with the bytes done and their total.
        pause: waits some seconds between tries.

    Raises:
        UsageError: no such set.
        UserError: the download fails; a sum is not the publisher's, or not the one of the first download; a file was
            changed since; `out` holds something else.
    """
    name = find(name)
    folder = out or public_folder(name)
    with _claimed(folder, name):
        record = opened(folder, name, pause)
        sums = read_sums(folder)
        check(folder, sums)
        new = False
        for place, archive in enumerate(record["archives"]):
            if archive["sha256"] is None or not (folder / archive["file"]).exists():
                new = True
                _bring(folder, record, place, sums, progress if len(record["archives"]) == 1 else None, pause)
            if progress and len(record["archives"]) > 1:
                sizes = [entry["expected"]["bytes"] for entry in record["archives"]]
                progress(sum(sizes[: place + 1]), sum(sizes))
        shutil.rmtree(folder / ".download", ignore_errors=True)
    return Fetched(folder=folder, files=len(sums), new=new, record=record)


def find(name: str) -> str:
    """The right spelling of a set's name.

    Raises:
        UsageError: no such set.
    """
    names = {key.casefold(): key for key in SETS}
    if name.casefold() in names:
        return names[name.casefold()]
    near = difflib.get_close_matches(name.casefold(), names, n=1)
    hint = f"Did you mean {names[near[0]]}? " if near else ""
    raise UsageError(f"{name}: expected the name of a public set. {hint}`medim fetch --list` shows all.")


def public_folder(name: str) -> Path:
    """Where a set lies unless the user says otherwise: in the cache, beside the store."""
    return cache_folder() / "public" / name


def named(data: Path, modality: Modality) -> Path:
    """What `--data` means: a path that exists, else the folder of a public set that was fetched before.

    Raises:
        UserError: the set was not fetched, only in part, or holds other images.
    """
    known = {key.casefold(): key for key in SETS}.get(str(data).casefold())
    if data.exists() or known is None:
        return data
    if SETS[known].modality != modality:
        raise UserError(f"--data {data}: expected {modality} images, and that public set holds {SETS[known].modality}.")
    folder = public_folder(known)
    record = read_json(folder / "fetched.json") if (folder / "fetched.json").is_file() else {"archives": [{}]}
    if not all(entry.get("sha256") and (folder / entry["file"]).exists() for entry in record["archives"]):
        raise UserError(f"--data {data}: that public set is not here, or not all of it. Run: medim fetch {known}")
    return folder


@contextlib.contextmanager
def _claimed(folder: Path, name: str) -> Iterator[None]:
    """The folder for this process alone; another one waits. A folder that stays empty is removed again."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (held - {".medim"} and not held & {".download", "fetched.json"}):
        raise UserError(
            f"{folder}: expected a new or empty folder, or one that `medim fetch` made. Choose another --out."
        )
    marker = folder / ".medim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(marker):
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
def _locked(marker: Path) -> Iterator[None]:
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


def _bring(
    folder: Path,
    record: dict[str, Any],
    place: int,
    sums: dict[str, str],
    progress: Callable[[int, int], None] | None,
    pause: Callable[[float], None],
) -> None:
    """Download an archive, check it, record it, and give it its name: in that order, so that any may be interrupted."""
    entry, work = record["archives"][place], folder / ".download"
    work.mkdir(exist_ok=True)
    target, came = folder / entry["file"], work / f"{entry['file']}{'.archive' if entry['archive'] else ''}"
    if target.exists():
        raise UserError(f"{target}: expected nothing here yet, and medim did not fetch it. Move it away.")
    got = download(entry["url"], came, md5=entry["publisher"]["md5"], progress=progress, pause=pause)
    ready = came
    if entry["archive"]:
        ready = work / entry["file"]
        shutil.rmtree(ready, ignore_errors=True)
        try:
            unpack(came, ready)
            if entry["expected"] is not None:
                check_series(ready, entry)
        except UserError:
            came.unlink(missing_ok=True)
            shutil.rmtree(ready, ignore_errors=True)
            raise
    new = {f"{entry['file']}{path}": value for path, value in sums_of(ready).items()}
    old = {path: value for path, value in sums.items() if path.split("/")[0] == entry["file"]}
    if old and old != new:
        shutil.rmtree(work)
        raise UserError(
            f"{entry['url']}: the publisher has changed this file since {record['fetched']}: expected the sha256 "
            f"{entry['sha256']}, got {got.sha256}. Results on the two are not comparable; fetch it into another --out."
        )
    if not old:
        entry |= {"bytes": got.bytes, "sha256": got.sha256}
        entry["publisher"]["matched"] = True if entry["publisher"]["from"] else None
    record["fetched"] = record["fetched"] or datetime.date.today().isoformat()
    sums |= new
    write_text(folder / "SHA256SUMS", "".join(f"{value}  {path}\n" for path, value in sorted(sums.items())))
    write_json(folder / "fetched.json", record)
    ready.replace(target)
    came.unlink(missing_ok=True)
