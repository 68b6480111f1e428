"""Safe extraction of zip and tar archives: rejects path traversal, links and archive bombs; all or nothing."""

from __future__ import annotations

import errno
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from medim.types import UserError

MAX_ARCHIVE_FILES = 1_000_000
MAX_EXPANSION_RATIO = 100  # extracted size / archive size; about 10 for DICOM series with empty margins
MIN_BYTE_LIMIT = 1 << 30  # extracted size in bytes that is accepted for any archive
_DAMAGE_ERRORS = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, ValueError),
)


def unpack_archive(archive: Path, folder: Path) -> None:
    """Extract a tar (also gzip, bzip2, xz) or zip archive into a new folder.

    If the archive contains only one folder with the name of `folder`, that folder is used directly. Resource forks
    added by macOS (`._name`) are skipped.

    Raises:
        UserError: the archive is damaged or encrypted; it contains absolute paths, paths outside the folder, links,
            devices, or a name twice; it exceeds the limits on files or bytes; or there is not enough free space.
            `folder` is not created in these cases.
    """
    staging = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        with tarfile.open(archive) if tarfile.is_tarfile(archive) else zipfile.ZipFile(archive) as container:
            if isinstance(container, tarfile.TarFile):
                container.extraction_filter = tarfile.data_filter
            for entry in _check_entries(container, archive):
                container.extract(entry, staging)
        inner = [path for path in staging.iterdir() if path.is_dir() and path.name == folder.name]
        (inner[0] if len(list(staging.iterdir())) == len(inner) == 1 else staging).replace(folder)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
            raise UserError(f"{folder}: could not be written ({error.strerror}). Free some space.") from error
        raise UserError(f"{archive.name}: the archive is damaged ({error}). Fetch it again.") from error
    except _DAMAGE_ERRORS as error:
        raise UserError(f"{archive.name}: the archive is damaged ({error}). Fetch it again.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_entries(container: Any, archive: Path) -> Iterator[Any]:
    """Yield the files of a TarFile or ZipFile to extract, each checked before it is read.

    The filter of `tarfile` is not sufficient: it makes absolute paths relative, and it accepts links, repeated names
    and any number of bytes.
    """
    max_bytes = min(
        max(MIN_BYTE_LIMIT, MAX_EXPANSION_RATIO * archive.stat().st_size),
        shutil.disk_usage(archive.parent).free,
    )
    names: set[PurePosixPath] = set()
    total = 0
    for entry in container if isinstance(container, tarfile.TarFile) else container.infolist():
        if isinstance(entry, tarfile.TarInfo):
            text, size, is_folder = entry.name, entry.size, entry.isdir()
            is_plain = entry.isreg() and not entry.issparse()
        else:
            text, size, is_folder = entry.filename, entry.file_size, entry.is_dir()
            file_type = entry.external_attr >> 28  # of Unix: 0 if unspecified, 8 for a regular file
            is_plain = file_type in {0, 8} and not entry.flag_bits & 1
        if is_folder:
            continue
        name = PurePosixPath(text.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or not name.parts or ":" in name.parts[0]:
            raise UserError(f"{archive.name}: expected names inside the archive's folder, got {text!r}. Not unpacked.")
        if not is_plain:
            raise UserError(f"{archive.name}: expected plain files, got {text!r}, a link, device or encrypted file.")
        if name in names:
            raise UserError(f"{archive.name}: expected each name once, got {text!r} twice. Not unpacked.")
        names.add(name)
        total += size
        if total > max_bytes or len(names) > MAX_ARCHIVE_FILES:
            raise UserError(
                f"{archive.name}: expected at most {MAX_ARCHIVE_FILES} files and {max_bytes / 1e6:.0f} MB "
                f"(the free space, or {MAX_EXPANSION_RATIO} times the archive), got more at {text!r}. Not unpacked."
            )
        if not any(part.startswith("._") or part == "__MACOSX" for part in name.parts):
            yield entry
