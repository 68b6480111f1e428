"""Folder of a node: received images, answers and locks. A file is in its place only after it is on disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medim.types import UserError

_DATASET_OFFSET = 144  # size of preamble, prefix and the element with the length of the meta information
_FOLDERS = ("incoming", "series", "conflicts", "outbox", "work", "locks")


class Spool:
    """Files of a node.

    Args:
        root: folder of the spool.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming, self.series, self.conflicts = root / "incoming", root / "series", root / "conflicts"
        self.outbox, self.work, self.locks = root / "outbox", root / "work", root / "locks"
        self.journal = root / "journal.db"

    def create(self) -> None:
        """Create the folders, accessible to the current user only.

        Raises:
            UserError: the folder contains other files, or cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self.journal.exists() and any(path.name not in _FOLDERS for path in self.root.iterdir()):
                raise UserError(f"{self.root}: expected the spool of a node, or a new folder. Use another --spool.")
            self.root.chmod(0o700)
            for name in _FOLDERS:
                (self.root / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be written ({error.strerror}). Use another --spool.") from error

    def locate_instance(self, series: str, sop: str) -> Path:
        """Return the path of an image."""
        return self.series / series / f"{sop}.dcm"

    def store_instance(self, temporary: Path, series: str, sop: str) -> None:
        """Move a received file to its place; after return, it survives a power failure."""
        self._move_durably(temporary, self.locate_instance(series, sop))

    def store_conflict(self, temporary: Path, sop: str) -> None:
        """Move a file with the UID of another one to the conflicts; a later one replaces it."""
        self._move_durably(temporary, self.conflicts / f"{sop}.dcm")

    def store_answer(self, temporary: Path, answer: str) -> None:
        """Move an answer to the outbox; after return, it survives a power failure."""
        self._move_durably(temporary, self.locate_answer(answer))

    def locate_answer(self, answer: str) -> Path:
        """Return the path of an answer."""
        return self.outbox / f"{answer}.dcm"

    def remove_series(self, series: str) -> None:
        """Delete the images of a series."""
        shutil.rmtree(self.series / series, ignore_errors=True)

    def remove_answers(self, answers: Iterable[str]) -> None:
        """Delete answers."""
        for answer in answers:
            self.locate_answer(answer).unlink(missing_ok=True)

    def list_series(self) -> list[str]:
        """List the keys of the series with images."""
        return sorted(folder.name for folder in self.series.iterdir())

    def list_instances(self) -> Iterator[tuple[str, str, Path]]:
        """Yield the series, the name and the path of each stored image."""
        for folder in sorted(self.series.iterdir()):
            for path in sorted(folder.glob("*.dcm")):
                yield folder.name, path.stem, path

    def free_bytes(self) -> int:
        """Return the free space of the disk."""
        return shutil.disk_usage(self.root).free

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Reserve a role inside the block.

        Raises:
            UserError: another process has the role.
        """
        with (self.locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.root}: another node uses this spool ({name}). Stop it, or use another --spool."
                ) from None
            yield

    @staticmethod
    def _move_durably(temporary: Path, path: Path) -> None:
        """Flush a file to disk, rename it, and flush its folder."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _flush_folder(path.parent.parent)
        temporary.chmod(0o600)
        temporary.replace(path)
        _flush_folder(path.parent)


def hash_dataset(path: Path, syntax: str) -> str:
    """Compute the SHA-256 of a received data set and its transfer syntax, without the meta information of the file.

    The receiver writes the meta information itself, so it may differ between two transfers of one object.
    """
    digest = hashlib.sha256(syntax.encode())
    with path.open("rb") as file:
        start = file.read(_DATASET_OFFSET)
        file.seek(_DATASET_OFFSET + int.from_bytes(start[140:144], "little") if start[128:132] == b"DICM" else 0)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
